"""The operators of the Triton backend: arguments checked, outputs made, the form chosen, kernels launched.

Shapes as in backends/operators.py. With no rows or no steps there is nothing to launch.
"""

import functools

from torch import Tensor

from vvae_fast import shapes
from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics
from vvae_fast.triton.compact_backward import launch_compact_backward
from vvae_fast.triton.compact_forward import launch_compact_forward
from vvae_fast.triton.direct_backward import launch_direct_backward
from vvae_fast.triton.direct_forward import launch_direct_forward
from vvae_fast.triton.launch import Tensors


def planar_forward(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec, save: bool, inverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """z_K [R, D] in z's dtype, log_det [R] and, if `save`, a [K, R] in the dtype of computation. Of the inverse, always
    in the direct form, z_0, the inverse map's log_det and the roots a."""
    outputs = _outputs(z, u, w, b, save)
    if inverse:
        _check_direct(z)
    if _is_launched(z, u):
        if inverse or not _is_compact(z, u):
            launch_direct_forward((z, u, w, b), outputs, spec, save, inverse)
        else:
            launch_compact_forward((z, u, w, b), outputs, spec, save)
    return outputs


def planar_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    spec: FlowSpec,
    params: bool = True,
    inverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz [R, D], du and dw as u, db as b; all contiguous, in the dtype of z; all but dz empty without `params`. Of the
    inverse, always in the direct form, z is its own z."""
    if inverse:
        _check_direct(z)
    du, dw, db = u.new_empty(u.shape), w.new_empty(w.shape), b.new_empty(b.shape)
    dz = _backward((grad_z, grad_log_det, z, u, w), b, a, (du, dw, db), spec, params, inverse)
    return dz, *((du, dw, db) if params else _nothing(z, 3))


planar_inverse = functools.partial(planar_forward, inverse=True)
planar_inverse_backward = functools.partial(planar_backward, inverse=True)


def planar_backward_packed(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    packed: Tensor,
    a: Tensor,
    spec: FlowSpec,
    params: bool = True,
) -> tuple[Tensor, Tensor]:
    """dz [R, D] and dpacked [P, K (2 D + 1)], in which du, dw and db are concatenated; empty without `params`."""
    if z.dim() != 2 or a.dim() != 2:
        raise ValueError(f"z must be [R, D] and a [K, R], got {tuple(z.shape)} and {tuple(a.shape)}")
    num_steps, dim = a.shape[0], z.shape[1]
    if packed.dim() != 2 or packed.shape[1] != num_steps * (2 * dim + 1):
        wanted = f"[P, K (2 D + 1)] with K = {num_steps} and D = {dim}"
        raise ValueError(f"packed must have shape {wanted}, got {tuple(packed.shape)}")
    dpacked = packed.new_empty(packed.shape)
    (u, w, b), gradients = (shapes.unpack(t, num_steps, dim) for t in (packed, dpacked))
    dz = _backward((grad_z, grad_log_det, z, u, w), b, a, gradients, spec, params)
    return dz, *((dpacked,) if params else _nothing(z, 1))


def _outputs(z: Tensor, u: Tensor, w: Tensor, b: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z_K or z_0, log_det and a, empty where a kernel fills them. Raises ValueError for what does not fit."""
    shapes.check_rows(z, u, w, b)
    rows, num_steps, dtype = z.shape[0], u.shape[-2], shapes.compute_dtype(z.dtype)
    z_out, log_det = z.new_empty(z.shape), z.new_empty(rows, dtype=dtype)
    if not _is_launched(z, u):
        z_out.copy_(z)
        log_det.zero_()
    return z_out, log_det, log_det.new_empty((num_steps, rows) if save else (0,))


def _nothing(z: Tensor, count: int) -> tuple[Tensor, ...]:
    """What the operators return for unused gradients."""
    return tuple(z.new_empty(0) for _ in range(count))


def _is_launched(z: Tensor, u: Tensor) -> bool:
    return z.shape[0] > 0 and u.shape[-2] > 0


def _check_direct(z: Tensor) -> None:
    most = _heuristics.most_direct_dim(z.dtype)
    if z.shape[1] > most:
        raise ValueError(f"z must be [R, D] with D up to {most} for the inverse in {z.dtype}, got {tuple(z.shape)}")


def _is_compact(z: Tensor, u: Tensor) -> bool:
    rows_per_set = z.shape[0] // shapes.num_sets(u)
    return _heuristics.is_compact(rows_per_set, z.shape[1], u.shape[-2], shapes.compute_dtype(z.dtype))


def _backward(
    inputs: Tensors, b: Tensor, a: Tensor, gradients: Tensors, spec: FlowSpec, params: bool, inverse: bool = False
) -> Tensor:
    """From grad_z, grad_log_det, z, u and w fills du, dw and db, in which a set's steps are contiguous, and returns dz.
    Without `params` they are room to work in: the direct form's kernel computes its sums all the same, and the launch
    that adds these is left out."""
    grad_z, grad_log_det, z, u, w = inputs
    shapes.check_rows(z, u, w, b)
    shapes.check_saved(grad_z, grad_log_det, z, a, u.shape[-2])
    dz = z.new_empty(z.shape)
    if not _is_launched(z, u):
        dz.copy_(grad_z)
        for t in gradients:
            t.zero_()
    elif inverse or not _is_compact(z, u):
        launch_direct_backward(inputs, a, dz, gradients, spec, params, inverse)
    else:
        launch_compact_backward(inputs, a, dz, gradients, spec, params)
    return dz
