"""The autograd Function around the kernels, and the choice of the differentiable reference where it cannot serve."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vvae_fast import ops, reference, shapes

_unsafe_view = torch.ops.aten._unsafe_view.default  # a Function's outputs that are views allow no change in place


class PlanarFlowFunction(torch.autograd.Function):
    """planar_forward and planar_backward on z [*batch, D], saving z and the pre-activations a [K, rows] only."""

    @staticmethod
    def forward(
        ctx, z: Tensor, u: Tensor, w: Tensor, b: Tensor, constraint: str, backend: str
    ) -> tuple[Tensor, Tensor]:
        z_K, log_det, a = _run_forward(z, u, w, b, constraint, backend, save=True)
        ctx.save_for_backward(z, u, w, b, a)
        ctx.constraint, ctx.backend = constraint, backend
        ctx.set_materialize_grads(False)
        return z_K, log_det

    @staticmethod
    def backward(ctx, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_log_det is None:
            return None, None, None, None, None, None
        z, u, w, b, a = ctx.saved_tensors
        grad_z, grad_log_det = _zeros_for_none(grad_z, grad_log_det, z)
        if torch.is_grad_enabled():  # create_graph=True: the gradients must be differentiable themselves
            return *_reference_backward(grad_z, grad_log_det, z, u, w, b, ctx.constraint), None, None
        return *_run_backward(grad_z, grad_log_det, z, u, w, b, a, ctx.constraint, ctx.backend), None, None


def planar_flow(z: Tensor, u: Tensor, w: Tensor, b: Tensor, constraint: str, backend: str) -> tuple[Tensor, Tensor]:
    """z_K [*batch, D] and log_det [*batch] of arguments that share one dtype, which the kernels of `backend` take."""
    if torch.is_grad_enabled() and (z.requires_grad or u.requires_grad or w.requires_grad or b.requires_grad):
        return PlanarFlowFunction.apply(z, u, w, b, constraint, backend)
    return _run_forward(z, u, w, b, constraint, backend, save=False)[:2]


class PackedPlanarFlowFunction(torch.autograd.Function):
    """The same for parameters that a linear head packed, [*params, K (2 D + 1)]: one gradient, in the head's layout."""

    @staticmethod
    def forward(ctx, z: Tensor, packed: Tensor, num_steps: int, constraint: str, backend: str) -> tuple[Tensor, Tensor]:
        z_K, log_det, a = _run_forward(z, *ops.unpack(packed, num_steps, z.shape[-1]), constraint, backend, save=True)
        ctx.save_for_backward(z, packed, a)
        ctx.num_steps, ctx.constraint, ctx.backend = num_steps, constraint, backend
        ctx.set_materialize_grads(False)
        return z_K, log_det

    @staticmethod
    def backward(ctx, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_log_det is None:
            return None, None, None, None, None
        z, packed, a = ctx.saved_tensors
        grad_z, grad_log_det = _zeros_for_none(grad_z, grad_log_det, z)
        if torch.is_grad_enabled():
            u, w, b = ops.unpack(packed, ctx.num_steps, z.shape[-1])
            dz, du, dw, db = _reference_backward(grad_z, grad_log_det, z, u, w, b, ctx.constraint)
            return dz, torch.cat([du.flatten(-2), dw.flatten(-2), db], -1), None, None, None
        dz, dpacked = ops.OPERATORS[ctx.backend].planar_backward_packed(
            grad_z.reshape(-1, z.shape[-1]),
            grad_log_det.reshape(-1),
            z.reshape(-1, z.shape[-1]),
            packed.flatten(0, -2) if packed.dim() > 1 else packed[None],
            a,
            ctx.constraint == "softplus",
        )
        return dz.view(z.shape), dpacked.view(packed.shape), None, None, None


def packed_planar_flow(
    z: Tensor, packed: Tensor, num_steps: int, constraint: str, backend: str
) -> tuple[Tensor, Tensor]:
    """`planar_flow` with the parameters that `ops.unpack` finds in packed [*params, K (2 D + 1)]."""
    if not torch.is_grad_enabled():
        return planar_flow(z, *ops.unpack(packed, num_steps, z.shape[-1]), constraint, backend)
    return PackedPlanarFlowFunction.apply(z, packed, num_steps, constraint, backend)


def needs_plain_torch() -> bool:
    """Inside torch.func transforms and forward-mode AD only plain torch operations are transformed."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _zeros_for_none(grad_z: Tensor | None, grad_log_det: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both outputs, of which one was not used."""
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_log_det is None:
        grad_log_det = z.new_zeros(z.shape[:-1], dtype=shapes.compute_dtype(z.dtype))
    return grad_z, grad_log_det


def _reference_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, constraint: str
) -> tuple[Tensor, ...]:
    """The reference's, differentiable, in the dtype of computation."""
    inputs = (t.to(grad_log_det.dtype) for t in (grad_z, grad_log_det, z, u, w, b))
    return tuple(t.to(z.dtype) for t in reference.planar_backward(*inputs, constraint))


def _flat_params(u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[K, D], [K, D], [K] as they are, or [P, K, D], [P, K, D], [P, K]: views wherever the strides allow one."""
    if u.dim() <= 3:
        return u, w, b
    return u.flatten(0, -3), w.flatten(0, -3), b.flatten(0, -2)


def _run_forward(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, constraint: str, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if z.dim() == 2:
        return ops.OPERATORS[backend].planar_forward(z, u, w, b, constraint == "softplus", save)
    rows = z.reshape(-1, z.shape[-1])
    z_K, log_det, a = ops.OPERATORS[backend].planar_forward(
        rows, *_flat_params(u, w, b), constraint == "softplus", save
    )
    return _unsafe_view(z_K, z.shape), _unsafe_view(log_det, z.shape[:-1]), a


def _run_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    constraint: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    planar_backward = ops.OPERATORS[backend].planar_backward
    if z.dim() == 2:
        return planar_backward(grad_z, grad_log_det, z, u, w, b, a, constraint == "softplus")
    dim = z.shape[-1]
    dz, du, dw, db = planar_backward(
        grad_z.reshape(-1, dim),
        grad_log_det.reshape(-1),
        z.reshape(-1, dim),
        *_flat_params(u, w, b),
        a,
        constraint == "softplus",
    )
    return dz.view(z.shape), du.view(u.shape), dw.view(w.shape), db.view(b.shape)
