"""The oracle of Sylvester flows: a loop over the L layers in plain PyTorch, with a hand-written adjoint and an inverse.

The adjoint is the kernels' twin, with which they are compared; derivatives of derivatives are autograd's of the loop.
Shapes: z [*batch, D]; *params is empty (shared) or ends *batch (amortized).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vvae_fast.reference.activations import Activated, activate, log_abs_determinant, solve, step_adjoint


class Layers(NamedTuple):
    """L Sylvester layers of M units."""

    columns: Tensor | None  # [*params, L, M, D]  Q's columns in rows; None: the identity, and z turned in odd layers
    r: Tensor  # [*params, L, M, M]  its upper triangle
    r_tilde: Tensor  # [*params, L, M, M]  its upper triangle
    b: Tensor  # [*params, L, M]
    c: Tensor  # [*params, L, M]  R_ii R~_ii
    s: Tensor  # [*params, L, M]  1 + c, which the caller may know better than as that sum

    def prepared(self) -> "Layers":
        """With zeros below the diagonals, and with what reaches c given to s."""
        c = self.c.detach() + (self.s - self.s.detach())
        return self._replace(r=self.r.triu(), r_tilde=self.r_tilde.triu(), c=c)


class _Passed(NamedTuple):
    """What a layer had on the way forward."""

    z: Tensor  # [*batch, D]  before it
    p: Tensor  # [*batch, M]  Q^T z
    act: Activated  # [*batch, M]


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix x [*batch, A] for matrix [*params, A, B] and x [*batch, B]."""
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x[..., None]).squeeze(-1)


def _into(z: Tensor, columns: Tensor | None, layer: int) -> Tensor:
    """Q^T z [*batch, M]."""
    if columns is None:
        return z.flip(-1) if layer % 2 else z
    return _times(columns[..., layer, :, :], z)


def _out_of(x: Tensor, columns: Tensor | None, layer: int) -> Tensor:
    """Q x [*batch, D]."""
    if columns is None:
        return x.flip(-1) if layer % 2 else x
    return _times(columns[..., layer, :, :].mT, x)


def _outer(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """x y^T, summed over the rows that share a parameter set, for like [*params, A, B]."""
    if like.dim() == 2:
        return x.reshape(-1, x.shape[-1]).mT @ y.reshape(-1, y.shape[-1])
    return (x[..., :, None] * y[..., None, :]).sum_to_size(like.shape)


def _pass(z: Tensor, f: Layers, activation: str, slope: float) -> tuple[Tensor, list[_Passed]]:
    """z_L [*batch, D] and what each layer had, docs/math.md (57)."""
    passed = []
    for layer in range(f.r.shape[-3]):
        p = _into(z, f.columns, layer)  # [*batch, M]
        act = activate(_times(f.r_tilde[..., layer, :, :], p) + f.b[..., layer, :], activation, slope)
        passed.append(_Passed(z, p, act))
        z = z + _out_of(_times(f.r[..., layer, :, :], act.h), f.columns, layer)
    return z, passed


def sylvester_forward(z: Tensor, f: Layers, activation: str, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """z_L [*batch, D], log_det [*batch] and p = Q^T z of all layers [L, *batch, M], docs/math.md (57), (58)."""
    f = f.prepared()
    zero = f.s.new_zeros(())
    log_det = torch.zeros_like(z[..., 0])  # [*batch]
    z, passed = _pass(z, f, activation, slope)
    for layer, (_, _, act) in enumerate(passed):
        log_det = log_det + log_abs_determinant(act, f.c[..., layer, :], f.s[..., layer, :], zero).sum(-1)
    p = torch.stack([x.p for x in passed]) if passed else z.new_empty((0, *z.shape[:-1], f.r.shape[-1]))
    return z, log_det, p


def sylvester_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, f: Layers, activation: str, slope: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """dz [*batch, D] and the gradients of columns, r, r_tilde, b and s, as those: the adjoint of `sylvester_forward`,
    docs/math.md (60), (61)."""
    columns, r, r_tilde, b, c, s = f = f.prepared()
    _, passed = _pass(z, f, activation, slope)

    g = grad_z  # [*batch, D]  dL/dz_l
    of_columns, of_r, of_r_tilde, of_b, of_s = [], [], [], [], []  # of the layers, the last one first
    for layer in reversed(range(r.shape[-3])):
        (z_before, p, act), r_l, r_tilde_l = passed[layer], r[..., layer, :, :], r_tilde[..., layer, :, :]
        dx = _into(g, columns, layer)  # [*batch, M]
        dh = _times(r_l.mT, dx)
        of_layer = c[..., layer, :], s[..., layer, :]
        da, ds = step_adjoint(dh, grad_log_det[..., None], act, *of_layer, torch.ones_like(of_layer[1]))  # [*batch, M]
        dp = _times(r_tilde_l.mT, da)
        like = b[..., layer, :].shape
        of_r.append(_outer(dx, act.h, r_l).triu())
        of_r_tilde.append(_outer(da, p, r_tilde_l).triu())
        of_b.append(da.sum_to_size(like))
        of_s.append(ds.sum_to_size(like))
        if columns is not None:
            of_q, x = columns[..., layer, :, :], _times(r_l, act.h)
            of_columns.append(_outer(x, g, of_q) + _outer(dp, z_before, of_q))
        g = g + _out_of(dp, columns, layer)
    if not of_r:
        of_none = None if columns is None else torch.zeros_like(columns)
        return g, of_none, torch.zeros_like(r), torch.zeros_like(r_tilde), torch.zeros_like(b), torch.zeros_like(s)
    dr, dr_tilde = (torch.stack(x[::-1], -3) for x in (of_r, of_r_tilde))
    db, ds = (torch.stack(x[::-1], -2) for x in (of_b, of_s))
    return g, torch.stack(of_columns[::-1], -3) if of_columns else None, dr, dr_tilde, db, ds


def sylvester_inverse(z: Tensor, f: Layers, activation: str, slope: float) -> tuple[Tensor, Tensor]:
    """z_0 [*batch, D] from z_L, and the log_det [*batch] of this inverse map, docs/math.md (62)."""
    columns, r, r_tilde, b, c, s = f.prepared()
    zero = s.new_zeros(())
    log_det = torch.zeros_like(z[..., 0])  # [*batch]
    for layer in reversed(range(r.shape[-3])):
        r_l, r_tilde_l = r[..., layer, :, :], r_tilde[..., layer, :, :]
        c_l, s_l = c[..., layer, :], s[..., layer, :]
        rhs = _times(r_tilde_l, _into(z, columns, layer)) + b[..., layer, :]  # [*batch, M]
        coupling = r_tilde_l @ r_l  # [*params, M, M], upper triangular
        roots: list[Tensor] = []  # a and h of the units, the last one first
        h: list[Tensor] = []
        for unit in reversed(range(r.shape[-1])):
            known = sum((coupling[..., unit, unit + 1 + i] * x for i, x in enumerate(h)), torch.zeros_like(log_det))
            right = torch.where(s_l[..., unit] > 0, rhs[..., unit] - known, torch.nan)  # or there is no inverse
            roots.insert(0, solve(right, c_l[..., unit], s_l[..., unit], activation, slope))
            h.insert(0, activate(roots[0], activation, slope).h)
        act = activate(torch.stack(roots, -1), activation, slope)
        log_det = log_det - log_abs_determinant(act, c_l, s_l, zero).sum(-1)
        z = z - _out_of(_times(r_l, act.h), columns, layer)
    return z, log_det
