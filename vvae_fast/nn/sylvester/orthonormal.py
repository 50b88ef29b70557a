"""Orthonormal columns from vectors, by Householder reflections: differentiable, and orthonormal to rounding.

Lengths of vectors do not matter, from 1e-18 to 1e18 in float32: squares below are zeros, and above infinite.
"""

from typing import Any

import torch
from torch import Tensor

from vvae_fast.backends import needs_plain_torch
from vvae_fast.nn.base import unautocast
from vvae_fast.shapes import full_precision, untraced


def reflectors(v: Tensor) -> Tensor:
    """v [*, H, D] with each vector brought to the length sqrt 2, so that w reflects z to z - w (w . z).

    A vector of zeros stays one, and reflects nothing.
    """
    square = v.square().sum(-1, keepdim=True)
    return v * (2 / torch.where(square > 0, square, 1)).sqrt()


def orthonormal(v: Tensor, num_columns: int | None = None) -> Tensor:
    """The first M columns q [*, D, M] of the product of the H reflections I - 2 v v^T / |v|^2 of v [*, H, D].

    By the compact form of the product, in two matrix products and one triangular solve, docs/math.md (63). q is the
    .mT of a contiguous tensor [*, M, D]. Its columns are orthonormal to rounding for any v; a vector of zeros reflects
    nothing. M is H by default. In half precision, and under torch.autocast, q is computed and returned in float32.

    Raises ValueError if v is not [*, H, D] with D >= 1, or M not in 1 to D.
    """
    num_columns = _check(v, num_columns)
    v = full_precision(v)
    sets = v.flatten(0, -3) if v.dim() > 2 else v[None]  # [N, H, D]
    with unautocast(v):
        if torch.compiler.is_compiling() or needs_plain_torch():
            columns = _columns(sets, num_columns)
        else:
            columns = _Columns.apply(sets, num_columns)
    return columns.view(*v.shape[:-2], num_columns, v.shape[-1]).mT


def _columns(v: Tensor, num_columns: int) -> Tensor:
    """The columns, as rows [N, M, D], for v [N, H, D]: differentiable in every mode."""
    return _times(_solved(v, num_columns)[1], v)


def _solved(v: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """T of docs/math.md (63), halved and each row and column multiplied by the length of its vector, [N, H, H], which
    has other numbers below its diagonal; and T^-1 V E [N, H, M]."""
    gram = v @ v.mT
    square = gram.diagonal(dim1=-2, dim2=-1)
    t = torch.diagonal_scatter(gram, torch.where(square > 0, square / 2, 1), dim1=-2, dim2=-1)
    return t, torch.linalg.solve_triangular(t, v[..., :num_columns], upper=True)


def _times(solved: Tensor, v: Tensor) -> Tensor:
    """E^T - solved^T V [N, M, D]."""
    identity = torch.eye(solved.shape[-1], v.shape[-1], dtype=v.dtype, device=v.device)
    return torch.baddbmm(identity.expand(v.shape[0], -1, -1), solved.mT, v, alpha=-1)


class _Columns(torch.autograd.Function):
    """`_columns` with an adjoint of fewer passes than autograd's."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, num_columns: int) -> Tensor:
        t, solved = _solved(v, num_columns)
        ctx.save_for_backward(v, t, solved)
        return _times(solved, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        v, t, solved = ctx.saved_tensors  # [N, H, D], [N, H, H], [N, H, M]
        if torch.is_grad_enabled():  # create_graph=True
            return torch.autograd.grad(_columns(v, solved.shape[-1]), v, grad, create_graph=True)[0], None
        of_first = torch.linalg.solve_triangular(t.mT, v @ grad.mT, upper=False)  # of V E, with the sign turned
        of_t = (of_first @ solved.mT).triu_()
        of_t.diagonal(dim1=-2, dim2=-1).mul_(0.5)  # which has half of |v|^2, and no v at all where it is 0
        dv = torch.baddbmm((of_t + of_t.mT) @ v, solved, grad, alpha=-1)
        dv[..., : solved.shape[-1]] -= of_first
        return dv, None


@untraced
def _check(v: Tensor, num_columns: int | None) -> int:
    """M."""
    if v.dim() < 2 or v.shape[-1] < 1:
        raise ValueError(f"v must be [*, H, D] with D >= 1, got {tuple(v.shape)}: a single vector is v[None]")
    num_columns = v.shape[-2] if num_columns is None else num_columns
    if not 1 <= num_columns <= v.shape[-1]:
        raise ValueError(f"num_columns must be from 1 to D = {v.shape[-1]}, got {num_columns}: Q is [D, M] with M <= D")
    return num_columns
