"""Orthonormal columns from vectors, by Householder reflections: differentiable, and orthonormal to rounding."""

import torch
from torch import Tensor

from vvae_fast.shapes import untraced


def reflectors(v: Tensor) -> Tensor:
    """v [*, H, D] with each vector brought to the length sqrt 2, so that w reflects z to z - w (w . z).

    A vector of zeros stays one, and reflects nothing.
    """
    # A common factor of a vector changes nothing, in derivatives either: so it needs none, and no square overflows.
    size = v.detach().abs().amax(-1, keepdim=True)
    v = v / torch.where(size > 0, size, 1)
    square = v.square().sum(-1, keepdim=True)
    return v * (2 / torch.where(square > 0, square, 1)).sqrt()


def orthonormal(v: Tensor, num_columns: int | None = None) -> Tensor:
    """The first M columns q [*, D, M] of the product of the H reflections I - 2 v v^T / |v|^2 of v [*, H, D].

    By the compact form of the product, in two matrix products and one triangular solve, docs/math.md (63). q is the
    .mT of a contiguous tensor [*, M, D]. Its columns are orthonormal to rounding for any v; a vector of zeros reflects
    nothing. M is H by default.

    Raises ValueError if v is not [*, H, D] with D >= 1, or M not in 1 to D.
    """
    num_columns = _check(v, num_columns)
    w = reflectors(v)
    # solve_triangular reads the strict upper triangle alone, and takes the diagonal for ones.
    solved = torch.linalg.solve_triangular(w @ w.mT, w[..., :num_columns], upper=True, unitriangular=True)  # [*, H, M]
    identity = torch.eye(num_columns, v.shape[-1], dtype=v.dtype, device=v.device)
    return (identity - solved.mT @ w).mT


@untraced
def _check(v: Tensor, num_columns: int | None) -> int:
    """M."""
    if v.dim() < 2 or v.shape[-1] < 1:
        raise ValueError(f"v must be [*, H, D] with D >= 1, got {tuple(v.shape)}: a single vector is v[None]")
    num_columns = v.shape[-2] if num_columns is None else num_columns
    if not 1 <= num_columns <= v.shape[-1]:
        raise ValueError(f"num_columns must be from 1 to D = {v.shape[-1]}, got {num_columns}: Q is [D, M] with M <= D")
    return num_columns
