"""The two triangular matrices of a Sylvester layer from free parameters, and 1 + R_ii R~_ii without cancellation."""

from typing import NamedTuple

import torch
from torch import Tensor


class Triangles(NamedTuple):
    """R and R~, upper triangular [*, M, M], and s = 1 + R_ii R~_ii [*, M]."""

    r: Tensor
    r_tilde: Tensor
    s: Tensor


class Diagonals(NamedTuple):
    """R_ii and R~_ii, d and d_tilde [*, M], and s = 1 + R_ii R~_ii [*, M]."""

    d: Tensor
    d_tilde: Tensor
    s: Tensor


def diagonals(mixed: Tensor, y: Tensor) -> Diagonals:
    """tanh mixed_ii, tanh y_i and s from mixed [*, M, M] and y [*, M], docs/math.md (59)."""
    x = mixed.diagonal(dim1=-2, dim2=-1)
    d, d_tilde = _tanh(x), _tanh(y)
    product = d * d_tilde
    return Diagonals(d, d_tilde, _one_plus_product(x.detach(), y.detach()) + (product - product.detach()))


def triangles(mixed: Tensor, y: Tensor) -> Triangles:
    """R, R~ and s from mixed [*, M, M] and y [*, M], docs/math.md (59).

    Above its diagonal mixed has R's entries, and below, transposed, R~'s; R_ii = tanh mixed_ii and R~_ii = tanh y_i.
    """
    d, d_tilde, s = diagonals(mixed, y)
    r = torch.diagonal_scatter(mixed.triu(1), d, dim1=-2, dim2=-1)
    r_tilde = torch.diagonal_scatter(mixed.mT.triu(1), d_tilde, dim1=-2, dim2=-1)
    return Triangles(r, r_tilde, s)


def _tanh(x: Tensor) -> Tensor:
    """tanh x whose derivatives of every order keep their digits: PyTorch's 1 - tanh^2 is 0 from x = 9 on in float32."""
    surrogate = torch.where(x >= 0, 1 - 2 * torch.sigmoid(-2 * x), 2 * torch.sigmoid(2 * x) - 1)
    return torch.tanh(x.detach()) + (surrogate - surrogate.detach())


def _one_plus_product(x: Tensor, y: Tensor) -> Tensor:
    """1 + tanh x tanh y by its formula without a subtraction, docs/math.md (59); only the value."""
    a, b = x.abs(), y.abs()
    sinks = torch.where(x.sign() * y.sign() < 0, 2 * torch.minimum(a, b), 0)
    below = (1 + torch.exp(-2 * a)) * (1 + torch.exp(-2 * b))
    return 2 * (1 + torch.exp(-2 * (x + y).abs())) * torch.exp(-sinks) / below
