"""The functional interface of Sylvester flows: `sylvester_flow` and `sylvester_flow_inverse`."""

from typing import Any

import torch
from torch import Tensor

from vvae_fast import backends, reference, shapes
from vvae_fast.backends.sylvester import sylvester_backward, sylvester_forward
from vvae_fast.spec import ACTIVATIONS, DEFAULT_SLOPE, FlowSpec


def sylvester_flow(
    z: Tensor,
    q: Tensor | None,
    r: Tensor,
    r_tilde: Tensor,
    b: Tensor,
    *,
    s: Tensor | None = None,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """L Sylvester layers z <- z + Q R h(R~ Q^T z + b) and the sum of their log-determinants, in one fused pass.

    van den Berg et al. 2018, equations 13 to 15. A layer of M units is M planar steps that do not see each other,
    docs/math.md (57).

    Args:
        z: [*batch, D], any number of leading dimensions, or none.
        q: [L, D, M], shared by all samples, or [*params, L, D, M], amortized, where *params are the trailing dimensions
            of *batch. Each Q has orthonormal columns, which is not checked: without, log_det and the inverse are wrong.
            None is the triangular kind: M = D, Q is the identity, and every second layer takes z in reverse order.
        r, r_tilde: [*params, L, M, M], upper triangular: what lies below the diagonal is not read.
        b: [*params, L, M].
        s: [*params, L, M], 1 + R_ii R~_ii where the caller knows it better than as that sum, which cancels near -1. The
            gradient of the log-determinants by R_ii R~_ii goes to s.
        activation, slope: those of `planar_flow`.
        backend: "cpp", "reference" or None for `use_backend`'s, the environment's or the fastest. No other backend has
            kernels of Sylvester flows; on a GPU they run as matrix products of PyTorch.

    Returns:
        z_L [*batch, D] in z's dtype, and log_det [*batch] = log|det dz_L/dz| in nats, float32 for the half precisions.

    Raises:
        TypeError: an argument is not a floating tensor or not a number, or dtypes differ outside torch.autocast.
        ValueError: shapes, devices, names or numbers do not fit; the message says which and what was expected.
        RuntimeError: the requested backend cannot run this problem; the message has the reasons.
    """
    return _flow(z, q, r, r_tilde, b, s, FlowSpec("none", activation, slope).checked(), backend, inverse=False)


def sylvester_flow_inverse(
    z: Tensor,
    q: Tensor | None,
    r: Tensor,
    r_tilde: Tensor,
    b: Tensor,
    *,
    s: Tensor | None = None,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The z_0 [*batch, D] that `sylvester_flow` maps to z, and the log_det [*batch] of the inverse map, in nats.

    Arguments and errors are those of `sylvester_flow`. There is an inverse wherever R_ii R~_ii > -1 for every unit; a
    row with another unit gets NaN. leaky_relu with a slope above 1 raises ValueError.
    """
    FlowSpec("softplus", activation, slope).checked(inverse=True)
    return _flow(z, q, r, r_tilde, b, s, FlowSpec("none", activation, slope).checked(), backend, inverse=True)


class _Function(torch.autograd.Function):
    """The operators of the C++ backend, saving the tensors and p [L, rows, M] only."""

    @staticmethod
    def forward(ctx: Any, spec: tuple[int, float], z: Tensor, *params: Tensor | None) -> tuple[Tensor, Tensor]:
        z_out, log_det, p = sylvester_forward(z, *params, *spec, True)
        ctx.save_for_backward(z, *params, p)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return z_out, log_det

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_log_det is None:
            return (None,) * 8
        z, *params, p = ctx.saved_tensors
        grad_z = torch.zeros_like(z) if grad_z is None else grad_z
        grad_log_det = z.new_zeros(z.shape[0]) if grad_log_det is None else grad_log_det
        if torch.is_grad_enabled():  # create_graph=True
            names = ACTIVATIONS[ctx.spec[0]], ctx.spec[1]
            dz, dcolumns, *others, ds = reference.sylvester_backward(grad_z, grad_log_det, z, *params, *names)
        else:
            dz, dcolumns, *others, ds = sylvester_backward(grad_z, grad_log_det, z, *params, p, *ctx.spec)
        return None, dz, None if params[0] is None else dcolumns, *others, None, ds


def _flow(
    z: Tensor,
    q: Tensor | None,
    r: Tensor,
    r_tilde: Tensor,
    b: Tensor,
    s: Tensor | None,
    spec: FlowSpec,
    backend: str | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    dtype = _check(z, q, r, r_tilde, b, s)
    chosen = backends.select_sylvester(z, backend)
    z_dtype = z.dtype
    z, r, r_tilde, b = (t.to(dtype) for t in (z, r, r_tilde, b))
    columns = None if q is None else q.to(dtype).mT
    c = r.diagonal(dim1=-2, dim2=-1) * r_tilde.diagonal(dim1=-2, dim2=-1)  # [*params, L, M]
    params = columns, r, r_tilde, b, c.detach(), 1 + c if s is None else s.to(dtype)
    if chosen.is_plain or inverse:
        flow = reference.sylvester_inverse if inverse else reference.sylvester_forward
        z_out, log_det, *_ = flow(z, *params, spec.activation, spec.slope)
    else:
        z_out, log_det = _run(z, params, (ACTIVATIONS.index(spec.activation), spec.slope))
    return z_out.to(z_dtype), log_det


def _run(z: Tensor, params: tuple[Tensor | None, ...], spec: tuple[int, float]) -> tuple[Tensor, Tensor]:
    """By the operators, which take rows [R, D] and sets [P, L, ...]."""
    rows = z.reshape(-1, z.shape[-1])
    amortized = params[1].dim() > 3
    sets = [
        t if t is None else t.flatten(0, t.dim() - trailing - 1) if amortized else t[None]
        for t, trailing in zip(params, (3, 3, 3, 2, 2, 2), strict=True)
    ]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, *params)):
        z_out, log_det = _Function.apply(spec, rows, *sets)
    else:
        z_out, log_det, _ = sylvester_forward(rows, *sets, *spec, False)
    return z_out.view(z.shape), log_det.view(z.shape[:-1])


@shapes.untraced
def _check(z: Tensor, q: Tensor | None, r: Tensor, r_tilde: Tensor, b: Tensor, s: Tensor | None) -> torch.dtype:
    """The dtype of computation. Raises TypeError or ValueError where the tensors do not fit."""
    given = {"z": z, "q": q, "r": r, "r_tilde": r_tilde, "b": b, "s": s}
    tensors = {name: t for name, t in given.items() if t is not None or name not in ("q", "s")}
    shapes.check_tensors(**tensors)
    if z.dim() < 1 or z.shape[-1] < 1:
        raise ValueError(f"z must have shape [*batch, D] with D >= 1, got {tuple(z.shape)}")
    dim, batch = z.shape[-1], z.shape[:-1]
    if r.dim() < 3 or r.shape[-1] != r.shape[-2] or not 1 <= r.shape[-1] <= dim:
        raise ValueError(
            f"r must have shape [L, M, M] or [*batch, L, M, M] with 1 <= M <= D = {dim}, got {tuple(r.shape)}"
        )
    *params, layers, units, _ = r.shape
    if q is None and units != dim:
        raise ValueError(f"r must be [*params, L, D, D] with D = {dim} where q is None, got {tuple(r.shape)}")
    wanted = {
        "q": (*params, layers, dim, units),
        "r_tilde": tuple(r.shape),
        "b": (*params, layers, units),
        "s": (*params, layers, units),
    }
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit r and z, got {tuple(tensors[name].shape)}")
    if not shapes.is_trailing(torch.Size(params), batch):
        raise ValueError(
            f"r's batch dimensions must equal the trailing batch dimensions of z, {tuple(batch)}, got {tuple(params)}: "
            "nothing else is broadcast (for parameters shared by all samples pass r [L, M, M])"
        )
    return shapes.common_dtype(**tensors)
