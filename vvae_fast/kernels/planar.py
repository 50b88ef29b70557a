"""The operators of the Triton backend: arguments checked, outputs made, the form chosen, kernels launched.

Shapes as in vvae_fast/ops.py. With no rows or no steps there is nothing to launch.
"""

import torch
from torch import Tensor

from vvae_fast import ops, shapes
from vvae_fast.kernels import _heuristics
from vvae_fast.kernels.compact_backward import launch_compact_backward
from vvae_fast.kernels.compact_forward import launch_compact_forward
from vvae_fast.kernels.direct_backward import launch_direct_backward
from vvae_fast.kernels.direct_forward import launch_direct_forward


def planar_forward(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, constrained: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z_K [R, D] in z's dtype, log_det [R] and, if `save`, a [K, R] in the dtype of computation."""
    shapes.check_rows(z, u, w, b)
    rows, num_steps, dtype = z.shape[0], u.shape[-2], shapes.compute_dtype(z.dtype)
    z_K = torch.empty_like(z, memory_format=torch.contiguous_format)
    log_det = z.new_empty(rows, dtype=dtype)
    a = z.new_empty((num_steps, rows) if save else (0,), dtype=dtype)
    if rows and num_steps:
        launch_forward = launch_compact_forward if _is_compact(z, u) else launch_direct_forward
        launch_forward(z, u, w, b, z_K, log_det, a, constrained, save)
    elif rows:
        z_K.copy_(z)
        log_det.zero_()
    return z_K, log_det, a


def planar_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, a: Tensor, constrained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz [R, D], du and dw as u, db as b; all contiguous, in the dtype of z."""
    du, dw, db = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, w, b))
    return _backward(grad_z, grad_log_det, z, u, w, b, a, du, dw, db, constrained), du, dw, db


def planar_backward_packed(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, packed: Tensor, a: Tensor, constrained: bool
) -> tuple[Tensor, Tensor]:
    """dz [R, D] and dpacked [P, K (2 D + 1)], in which du, dw and db lie behind one another."""
    if z.dim() != 2 or a.dim() != 2:
        raise ValueError(f"z must be [R, D] and a [K, R], got {tuple(z.shape)} and {tuple(a.shape)}")
    num_steps, dim = a.shape[0], z.shape[1]
    if packed.dim() != 2 or packed.shape[1] != num_steps * (2 * dim + 1):
        wanted = f"[P, K (2 D + 1)] with K = {num_steps} and D = {dim}"
        raise ValueError(f"packed must have shape {wanted}, got {tuple(packed.shape)}")
    dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
    params, gradients = (ops.unpack(t, num_steps, dim) for t in (packed, dpacked))
    return _backward(grad_z, grad_log_det, z, *params, a, *gradients, constrained), dpacked


def _is_compact(z: Tensor, u: Tensor) -> bool:
    rows_per_set = z.shape[0] // shapes.num_sets(u)
    return _heuristics.is_compact(rows_per_set, z.shape[1], u.shape[-2], shapes.compute_dtype(z.dtype))


def _backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    du: Tensor,
    dw: Tensor,
    db: Tensor,
    constrained: bool,
) -> Tensor:
    """Fills du, dw and db, in which a set's steps are contiguous, and returns dz."""
    shapes.check_rows(z, u, w, b)
    rows, num_steps = z.shape[0], u.shape[-2]
    shapes.check_saved(grad_z, grad_log_det, z, a, num_steps)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    if rows and num_steps:
        launch_backward = launch_compact_backward if _is_compact(z, u) else launch_direct_backward
        launch_backward(grad_z, grad_log_det, z, u, w, a, dz, du, dw, db, constrained)
    else:
        dz.copy_(grad_z)
        for t in (du, dw, db):
            t.zero_()
    return dz
