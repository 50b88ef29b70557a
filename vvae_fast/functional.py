"""The functional interface: `planar_flow` and `planar_flow_inverse`."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vvae_fast import autograd, backends, ops, reference, shapes
from vvae_fast.shapes import Formulas


def planar_flow(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    activation: str = "tanh",
    slope: float = 0.2,
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
            chosen = _choose_unchecked(z, u, backend)
            if chosen != "reference":
                numbers = shapes.numbers_of(constraint, activation, slope, log_det_eps)
                return autograd.ordinary_planar_flow(z, u, w, b, numbers, chosen)
        except (RuntimeError, TypeError, ValueError):
            _explain(z, u, w, b, Formulas(constraint, activation, slope, log_det_eps), backend)
            raise
    problem = shapes.check(z, u, w, b, Formulas(constraint, activation, slope, log_det_eps))
    numbers = problem.formulas.numbers()
    chosen = _choose(problem, backend)
    if chosen == "reference":
        return _run_reference(problem, z, u, w, b)
    if z.dtype == u.dtype == w.dtype == b.dtype and (
        z.dtype == problem.compute_dtype or backends.computes_halves(chosen, problem)
    ):
        return autograd.planar_flow(z, u, w, b, numbers, chosen)
    z_K, log_det = autograd.planar_flow(*_to_compute_dtype(problem, z, u, w, b), numbers, chosen)
    return z_K.to(z.dtype), log_det


def packed_planar_flow(
    z: Tensor,
    packed: Tensor,
    num_steps: int,
    dim: int,
    *,
    activation: str = "tanh",
    slope: float = 0.2,
    constraint: str = "softplus",
    log_det_eps: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`planar_flow` for parameters as a linear head computes them: packed [*params, K (2 D + 1)] holds the K rows of u
    [D], then those of w, then b. Neither they nor their gradient are copied. Results and errors are `planar_flow`'s.
    """
    if autograd.is_ordinary_packed(z, packed, num_steps, dim):
        try:
            chosen = _choose_unchecked(z, packed, backend, num_steps)
            if chosen != "reference":
                numbers = shapes.numbers_of(constraint, activation, slope, log_det_eps)
                return autograd.ordinary_packed_planar_flow(z, packed, num_steps, numbers, chosen)
        except (RuntimeError, TypeError, ValueError):
            params = ops.unpack(packed.detach(), num_steps, dim)
            _explain(z, *params, Formulas(constraint, activation, slope, log_det_eps), backend)
            raise
    params = ops.unpack(packed.detach(), num_steps, dim)
    problem = shapes.check(z, *params, Formulas(constraint, activation, slope, log_det_eps))
    numbers = problem.formulas.numbers()
    chosen = _choose(problem, backend)
    if chosen == "reference":
        return _run_reference(problem, z, *ops.unpack(packed, num_steps, dim))
    if z.dtype != packed.dtype or not backends.computes_halves(chosen, problem):
        z_K, log_det = autograd.packed_planar_flow(*_to_compute_dtype(problem, z, packed), num_steps, numbers, chosen)
        return z_K.to(z.dtype), log_det
    return autograd.packed_planar_flow(z, packed, num_steps, numbers, chosen)


def planar_flow_inverse(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    activation: str = "tanh",
    slope: float = 0.2,
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
            chosen = _choose_unchecked(z, u, backend, inverse=True)
            if chosen != "reference":
                numbers = shapes.numbers_of(constraint, activation, slope, 0.0, True)
                return autograd.planar_flow_inverse(z, u, w, b, numbers, chosen)
        except (RuntimeError, TypeError, ValueError):
            _explain(z, u, w, b, Formulas(constraint, activation, slope), backend, inverse=True)
            raise
    problem = shapes.check(z, u, w, b, Formulas(constraint, activation, slope))
    formulas = problem.formulas
    shapes.check_invertible(formulas)
    chosen = _choose(problem._replace(inverse=True), backend)
    inputs = _to_compute_dtype(problem, z, u, w, b)
    if chosen == "reference":
        z_0, log_det = _call_reference(reference.planar_inverse, *inputs, *formulas[:3])
    else:
        z_0, log_det = autograd.planar_flow_inverse(*inputs, formulas.numbers(), chosen)
    return z_0.to(z.dtype), log_det


def _run_reference(problem: shapes.Problem, z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    inputs = _to_compute_dtype(problem, z, u, w, b)
    z_K, log_det = _call_reference(reference.planar_forward, *inputs, *problem.formulas)
    return z_K.to(z.dtype), log_det


def _call_reference(flow: Callable, z: Tensor, u: Tensor, w: Tensor, b: Tensor, *formulas) -> tuple[Tensor, Tensor]:
    """Both outputs as functions of every input, as a kernel's are: a derivative that is zero everywhere, as those of no
    steps or of the log-determinant of linear ones, is a gradient of zeros and not None."""
    if torch._C._get_tracing_state() is not None:
        with warnings.catch_warnings():  # the trace holds these K steps, and is warned of as if they were data
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return flow(z, u, w, b, *formulas)[:2]
    z_K, log_det = flow(z, u, w, b, *formulas)[:2]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (z, u, w, b)):
        return (z.clone() if z_K is z else z_K), log_det  # no steps give no new tensor by themselves
    zero = sum(t[..., :0].sum() for t in (z, u, w, b))
    return z_K - zero, log_det - zero  # and not plus: -0.0 stays


def _to_compute_dtype(problem: shapes.Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(problem.compute_dtype) for t in tensors)


def _choose_unchecked(
    z: Tensor, u: Tensor, backend: str | None, num_steps: int | None = None, inverse: bool = False
) -> str:
    """The backend of an ordinary call, whose arguments nobody has checked; u may be packed, if its steps are told."""
    if z.is_cpu and backends.is_cpp(backend):
        return "cpp"
    (rows, dim), amortized = z.shape, num_steps is not None or u.ndim == 3
    steps, sets = u.shape[-2] if num_steps is None else num_steps, rows if amortized else 1
    return backends.select(shapes.Problem(rows, dim, steps, sets, amortized, z.dtype, z.device.type, inverse), backend)


def _explain(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, formulas: Formulas, backend: str | None, inverse: bool = False
) -> None:
    """Raises what is wrong with a call that was refused, in the words of the checks, which may find nothing."""
    try:
        problem = shapes.check(z, u, w, b, formulas)
        if inverse:
            shapes.check_invertible(problem.formulas)
        backends.select(problem._replace(inverse=inverse), backend)
    except (RuntimeError, TypeError, ValueError) as reason:
        raise reason from None


def _choose(problem: shapes.Problem, backend: str | None) -> str:
    """The backend that runs the problem: the reference where only plain PyTorch is seen through."""
    chosen = backends.select(problem, backend)
    return "reference" if autograd.needs_plain_torch() else chosen
