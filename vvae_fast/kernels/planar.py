"""The operators of the Triton backend: arguments checked, outputs made, the form chosen, kernels launched.

Shapes as in backends/operators.py. With no rows or no steps there is nothing to launch.
"""

from torch import Tensor

from vvae_fast import shapes
from vvae_fast.kernels import _heuristics
from vvae_fast.kernels.compact_backward import launch_compact_backward
from vvae_fast.kernels.compact_forward import launch_compact_forward
from vvae_fast.kernels.direct_backward import launch_direct_backward
from vvae_fast.kernels.direct_forward import launch_direct_forward
from vvae_fast.spec import FlowSpec as Formulas


def planar_forward(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, formulas: Formulas, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z_K [R, D] in z's dtype, log_det [R] and, if `save`, a [K, R] in the dtype of computation."""
    z_K, log_det, a = _outputs(z, u, w, b, save)
    if _is_launched(z, u):
        launch_forward = launch_compact_forward if _is_compact(z, u) else launch_direct_forward
        launch_forward(z, u, w, b, z_K, log_det, a, formulas, save)
    return z_K, log_det, a


def planar_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    formulas: Formulas,
    params: bool = True,
    inverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz [R, D], du and dw as u, db as b; all contiguous, in the dtype of z; all but dz empty without `params`. Of the
    inverse where it is asked for, in the direct form."""
    du, dw, db = u.new_empty(u.shape), w.new_empty(w.shape), b.new_empty(b.shape)
    dz = _backward(grad_z, grad_log_det, z, u, w, b, a, du, dw, db, formulas, params, inverse)
    return dz, *((du, dw, db) if params else _nothing(z, 3))


def planar_backward_packed(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    packed: Tensor,
    a: Tensor,
    formulas: Formulas,
    params: bool = True,
) -> tuple[Tensor, Tensor]:
    """dz [R, D] and dpacked [P, K (2 D + 1)], in which du, dw and db lie behind one another; empty without `params`."""
    if z.dim() != 2 or a.dim() != 2:
        raise ValueError(f"z must be [R, D] and a [K, R], got {tuple(z.shape)} and {tuple(a.shape)}")
    num_steps, dim = a.shape[0], z.shape[1]
    if packed.dim() != 2 or packed.shape[1] != num_steps * (2 * dim + 1):
        wanted = f"[P, K (2 D + 1)] with K = {num_steps} and D = {dim}"
        raise ValueError(f"packed must have shape {wanted}, got {tuple(packed.shape)}")
    dpacked = packed.new_empty(packed.shape)
    parts, gradients = (shapes.unpack(t, num_steps, dim) for t in (packed, dpacked))
    dz = _backward(grad_z, grad_log_det, z, *parts, a, *gradients, formulas, params)
    return dz, *((dpacked,) if params else _nothing(z, 1))


def planar_inverse(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, formulas: Formulas, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z_0 [R, D] in z's dtype, the inverse map's log_det [R] and, if `save`, the roots a [K, R]: in the direct form."""
    z_0, log_det, a = _outputs(z, u, w, b, save)
    _check_direct(z)
    if _is_launched(z, u):
        launch_direct_forward(z, u, w, b, z_0, log_det, a, formulas, save, inverse=True)
    return z_0, log_det, a


def planar_inverse_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    formulas: Formulas,
    params: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`planar_backward` of the inverse, whose own z is z."""
    _check_direct(z)
    return planar_backward(grad_z, grad_log_det, z, u, w, b, a, formulas, params, inverse=True)


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
    """What the operators return for gradients that nobody wants."""
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
    formulas: Formulas,
    params: bool,
    inverse: bool = False,
) -> Tensor:
    """Fills du, dw and db, in which a set's steps are contiguous, and returns dz. Without `params` they are room to
    work in: the direct form's kernel computes its sums all the same, and the launch that adds these is left out."""
    shapes.check_rows(z, u, w, b)
    shapes.check_saved(grad_z, grad_log_det, z, a, u.shape[-2])
    dz = z.new_empty(z.shape)
    if _is_launched(z, u):
        arguments = (grad_z, grad_log_det, z, u, w, a, dz, du, dw, db, formulas)
        if not inverse and _is_compact(z, u):
            launch_compact_backward(*arguments, params)
        else:
            launch_direct_backward(*arguments, params, inverse)
    else:
        dz.copy_(grad_z)
        for t in (du, dw, db):
            t.zero_()
    return dz
