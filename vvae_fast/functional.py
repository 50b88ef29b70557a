"""The functional interface: `planar_flow` and `planar_flow_inverse`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vvae_fast import autograd, backends, node, reference, shapes
from vvae_fast.backends.base import Backend
from vvae_fast.spec import DEFAULT_SLOPE, FlowSpec

_is_compiling = torch.compiler.is_dynamo_compiling  # asked by every call
_REFUSALS = RuntimeError, TypeError, ValueError
_LEAST_ROWS = 16  # of a headed flow: fewer leave lanes of its kernels empty


def planar_flow(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    constraint: str = "softplus",
    log_det_eps: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """K planar steps z <- z + u_hat h(w . z + b) and the sum of their log-determinants, in one fused pass.

    Rezende & Mohamed 2015, equations 10 to 13, with the invertibility constraint of their appendix A.1 on u.

    Args:
        z: [*batch, D], any number of leading dimensions, or none.
        u, w: [K, D], shared by all samples, or [*params, K, D], amortized, where *params are the trailing dimensions of
            *batch: z [S, B, D] with u [B, K, D] draws S samples per data point and copies nothing.
        b: u's shape without D.
        activation: h: "tanh", "leaky_relu", "elu", "sigmoid" or "linear".
        slope: leaky_relu's below 0, above 0; the other activations ignore it.
        constraint: "softplus" maps u to u_hat with w . u_hat > -1, so that each step is invertible; "log_softplus" does
            so by flowjax's formula, docs/math.md (29); "none" leaves u.
        log_det_eps: 0.0 is exact. Above 0, each step has log(|det| + eps) in place of log|det|: for models of pythae,
            which uses 1e-4.
        backend: one of `vvae_fast.info()["backends"]`, or None for `use_backend`'s, the environment's or the fastest.

    Returns:
        z_K [*batch, D] in z's dtype, and log_det [*batch] = log|det dz_K/dz| in nats, float32 for the half precisions:
        log q_K(z_K) = log q_0(z) - log_det.

    Raises:
        TypeError: an argument is not a floating tensor or not a number, or dtypes differ outside torch.autocast.
        ValueError: shapes, devices, names or numbers do not fit; the message says which and what was expected.
        RuntimeError: the requested backend cannot run this problem; the message has the reasons.
    """
    spec = constraint, activation, slope, log_det_eps
    return _flow(node.is_ordinary, z, (u, w, b), spec, backend)


def packed_planar_flow(
    z: Tensor,
    packed: Tensor,
    num_steps: int,
    dim: int,
    *,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    constraint: str = "softplus",
    log_det_eps: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`planar_flow` for parameters as a linear head computes them: packed [*params, K (2 D + 1)] holds the K rows of u
    [D], then those of w, then b. Neither they nor their gradient are copied. Results and errors are `planar_flow`'s.
    """
    spec = constraint, activation, slope, log_det_eps
    return _flow(node.is_ordinary_packed, z, (packed,), spec, backend, sizes=(num_steps, dim))


def headed_planar_flow(
    z: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    constraint: str = "softplus",
    log_det_eps: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`packed_planar_flow` and the linear head before it: packed = context weight^T + bias, docs/math.md (67).

    On the CPU the flow's kernels compute the parameters where they need them, and multiply their gradients where they
    arise: for z [R, D] with context [R, F] neither is ever whole in memory. Elsewhere the head is a product of its own.

    Args:
        z: [*batch, D].
        context: [*params, F], where *params are the trailing dimensions of *batch.
        weight, bias: [K (2 D + 1), F] and [K (2 D + 1)]: rows for u, then w, then b, as `packed_planar_flow` has them.

    The other arguments, results and errors are `planar_flow`'s.
    """
    spec = constraint, activation, slope, log_det_eps
    call = _headed_call(z, context, weight, bias, spec, backend)
    if call is not None:
        if call.node is not None and not _is_compiling():
            return call.node(z, context, weight, bias, *call.node_arguments)
        return autograd.run(call, z, context, weight, bias)
    shapes.check_head(z, context, weight, bias)
    return packed_planar_flow(
        z,
        nn.functional.linear(context, weight, bias),
        shapes.num_steps_of(weight, z.shape[-1]),
        z.shape[-1],
        activation=activation,
        slope=slope,
        constraint=constraint,
        log_det_eps=log_det_eps,
        backend=backend,
    )


def planar_flow_inverse(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    constraint: str = "softplus",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The z_0 [*batch, D] that `planar_flow` maps to z, and the log_det [*batch] of the inverse map, in nats.

    Arguments and errors are those of `planar_flow`. Settings that do not guarantee an inverse raise ValueError:
    constraint="none", and leaky_relu with a slope above 1.

    In float32 the root of each step is right for w . u from -80 to 1e34, and its gradients from -40. Below that, z_0 or
    its gradient leaves the range of float32: they grow as 1 / softplus(w . u) and its square.
    """
    spec = constraint, activation, slope, 0.0
    return _flow(node.is_ordinary, z, (u, w, b), spec, backend, inverse=True)


def given_planar_flow(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    s: Tensor,
    *,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    backend: str | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`planar_flow`, or its inverse, for a constraint of the caller's own: of u, which is u_hat already, and of s
    [*params, K], 1 + w . u_hat as the caller knows it, above 0 and better than as that sum, which cancels near 0.

    s is what counts: u moves along w until the two agree, docs/math.md (65), so log_det is right and each step is
    invertible whatever u is. A row with s <= 0 gets NaN. Results and other errors are `planar_flow`'s.
    """
    undone = "softplus", activation, slope, 0.0  # by the kernels, from the u of (65)
    shapes.check(z, u, w, b, FlowSpec(*undone), inverse)
    shapes.check_tensors(z=z, s=s)
    if s.shape != b.shape:
        raise ValueError(f"s must have b's shape {tuple(b.shape)}, got {tuple(s.shape)}")
    dtype = shapes.common_dtype(z=z, u=u, w=w, b=b, s=s)  # half precisions would round s away
    own, u, w, b, s = (t.to(dtype) for t in (z, u, w, b, s))
    params = reference.unconstrain(u, w, s), w, b
    z_out, log_det = _flow(node.is_ordinary, own, params, undone, backend, inverse)
    return z_out.to(z.dtype), log_det


def _headed_call(
    z: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    spec: tuple[str, str, float, float],
    backend: str | None,
) -> autograd.Call | None:
    """The call of a backend that computes the flow with its head; None where the head has to be a product of its own,
    or where the checks have something to say."""
    if _is_compiling():  # one graph serves every number of rows
        serves, call_of = shapes.is_ordinary_headed(z, context, weight, bias), autograd.Call.headed
    else:
        serves = node.is_ordinary_headed(z, context, weight, bias) and z.shape[0] >= _LEAST_ROWS
        call_of = autograd.headed_call
    if not serves or forward_ad._current_level >= 0:
        return None
    try:
        chosen = backends.select_ordinary(z, weight, backend, num_steps=shapes.num_steps_of(weight, z.shape[1]))
        return call_of(chosen, *spec)
    except _REFUSALS:
        return None


def _flow(
    is_ordinary: Callable[..., bool],
    z: Tensor,
    params: tuple[Tensor, ...],
    spec: tuple[str, str, float, float],
    backend: str | None,
    inverse: bool = False,
    sizes: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """A call with u, w and b, or with the tensor that packs them and the sizes K and D. Only the operators check an
    ordinary call."""
    num_steps = sizes[0] if sizes else None
    # torch.compile and forward-mode AD look on without a trace that is_ordinary would see.
    if not (_is_compiling() or forward_ad._current_level >= 0) and is_ordinary(z, *params, *sizes):
        try:
            chosen = backends.select_ordinary(z, params[0], backend, inverse, num_steps)
            if not chosen.is_plain:
                call = autograd.ordinary_call(chosen, inverse, num_steps, *spec)
                if node.serves and call.node is not None:
                    return call.node(z, *params, *call.node_arguments)
                return autograd.run(call, z, *params)
        except _REFUSALS:
            try:  # the checks have the clearer messages, but may find nothing
                _check(z, params, spec, backend, inverse, sizes)
            except _REFUSALS as reason:
                raise reason from None
            raise
    problem, chosen, alike = _check(z, params, spec, backend, inverse, sizes)
    call = autograd.Call.of(chosen, problem.spec, inverse, num_steps)
    if alike and (z.dtype == problem.compute_dtype or chosen.takes_halves(problem)):
        return autograd.run(call, z, *params)
    z_out, log_det = autograd.run(call, *(t.to(problem.compute_dtype) for t in (z, *params)))
    return z_out.to(z.dtype), log_det


def _check(
    z: Tensor,
    params: tuple[Tensor, ...],
    spec: tuple[str, str, float, float],
    backend: str | None,
    inverse: bool,
    sizes: tuple[int, ...],
) -> tuple[shapes.Problem, Backend, bool]:
    """The problem, its backend, and whether all dtypes are the same. Raises the call's error if there is one."""
    u, w, b = shapes.unpack(params[0].detach(), *sizes) if sizes else params
    problem = shapes.check(z, u, w, b, FlowSpec(*spec), inverse)
    return problem, backends.select(problem, backend), z.dtype == u.dtype == w.dtype == b.dtype
