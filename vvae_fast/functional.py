"""The functional interface: `planar_flow` and `planar_flow_inverse`."""

from torch import Tensor

from vvae_fast import autograd, backends, shapes
from vvae_fast.spec import DEFAULT_SLOPE, FlowSpec

_REFUSALS = RuntimeError, TypeError, ValueError


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
        z: [*batch, D], any leading dimensions, none included.
        u, w: [K, D], shared by all samples, or [*params, K, D], amortized, where *params are the trailing dimensions of
            *batch: z [S, B, D] with u [B, K, D] draws S samples per data point and copies nothing.
        b: u's shape without D.
        activation: h: "tanh", "leaky_relu", "elu", "sigmoid" or "linear".
        slope: leaky_relu's below 0, above 0; the other activations ignore it.
        constraint: "softplus" maps u to u_hat with w . u_hat > -1, so that each step is invertible; "log_softplus" does
            so by flowjax's formula, docs/math.md (29); "none" leaves u.
        log_det_eps: 0.0 is exact. Above 0, log(|det| + eps) of each step in place of log|det|: for models of pythae,
            which has 1e-4.
        backend: one of `vvae_fast.info()["backends"]`, or None for `use_backend`'s, the environment's or the fastest.

    Returns:
        z_K [*batch, D] in z's dtype, and log_det [*batch] = log|det dz_K/dz| in nats, float32 for the half precisions:
        log q_K(z_K) = log q_0(z) - log_det.

    Raises:
        TypeError: an argument is no floating tensor or no number, or dtypes differ outside torch.autocast.
        ValueError: shapes, devices, names or numbers that do not fit; the message says which and what was wanted.
        RuntimeError: the backend asked for cannot run this problem; the message has the reasons.
    """
    if autograd.is_ordinary(z, u, w, b):
        try:
            chosen = backends.select_ordinary(z, u, backend)
            if not chosen.is_plain:
                call = autograd.ordinary_call(chosen, constraint, activation, slope, log_det_eps)
                return autograd.run_ordinary(call, z, u, w, b)
        except _REFUSALS:
            _explain(z, (u, w, b), FlowSpec(constraint, activation, slope, log_det_eps), backend)
            raise
    return _flow(z, (u, w, b), FlowSpec(constraint, activation, slope, log_det_eps), backend)


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
    if autograd.is_ordinary_packed(z, packed, num_steps, dim):
        try:
            chosen = backends.select_ordinary(z, packed, backend, num_steps=num_steps)
            if not chosen.is_plain:
                call = autograd.ordinary_call(chosen, constraint, activation, slope, log_det_eps, False, num_steps)
                return autograd.run_ordinary(call, z, packed)
        except _REFUSALS:
            params = shapes.unpack(packed, num_steps, dim)
            _explain(z, params, FlowSpec(constraint, activation, slope, log_det_eps), backend)
            raise
    params = shapes.unpack(packed.detach(), num_steps, dim)
    return _flow(z, params, FlowSpec(constraint, activation, slope, log_det_eps), backend, packed=packed)


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

    Arguments and errors are those of `planar_flow`. What guarantees no inverse is refused with a ValueError:
    constraint="none", and leaky_relu with a slope above 1.

    In float32 the root of each step is right for w . u from -80 to 1e34, its gradients from -40: below, z_0 or its
    gradient leaves the range of float32 itself, growing as 1 / softplus(w . u) and its square.
    """
    if autograd.is_ordinary(z, u, w, b):
        try:
            chosen = backends.select_ordinary(z, u, backend, inverse=True)
            if not chosen.is_plain:
                call = autograd.ordinary_call(chosen, constraint, activation, slope, 0.0, True)
                return autograd.run(call, z, u, w, b)
        except _REFUSALS:
            _explain(z, (u, w, b), FlowSpec(constraint, activation, slope), backend, inverse=True)
            raise
    return _flow(z, (u, w, b), FlowSpec(constraint, activation, slope), backend, inverse=True)


def _flow(
    z: Tensor,
    params: tuple[Tensor, Tensor, Tensor],
    spec: FlowSpec,
    backend: str | None,
    inverse: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A call whose arguments are checked: of u, w and b, or of the tensor in which they are packed."""
    problem = shapes.check(z, *params, spec, inverse)
    chosen = backends.select(problem, backend)
    call = autograd.Call.of(chosen, problem.spec, inverse, None if packed is None else problem.num_steps)
    inputs = (z, *params) if packed is None else (z, packed)
    alike = all(t.dtype == z.dtype for t in params)
    if alike and (z.dtype == problem.compute_dtype or chosen.takes_halves(problem)):
        return autograd.run(call, *inputs)
    z_out, log_det = autograd.run(call, *(t.to(problem.compute_dtype) for t in inputs))
    return z_out.to(z.dtype), log_det


def _explain(
    z: Tensor, params: tuple[Tensor, Tensor, Tensor], spec: FlowSpec, backend: str | None, inverse: bool = False
) -> None:
    """Raises what is wrong with a call that was refused, in the words of the checks, which may find nothing."""
    try:
        backends.select(shapes.check(z, *params, spec, inverse), backend)
    except _REFUSALS as reason:
        raise reason from None
