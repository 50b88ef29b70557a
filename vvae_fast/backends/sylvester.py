"""The operators of Sylvester flows: their schemas and their fakes. Only the C++ backend has them.

    sylvester_forward(z, columns, r, r_tilde, b, c, s, activation, slope, save) -> (z_L, log_det, p)
    sylvester_backward(grad_z, grad_log_det, z, columns, r, r_tilde, b, c, s, p, activation, slope)
        -> (dz, dcolumns, dr, dr_tilde, db, ds)

z [R, D]; columns [P, L, M, D], Q's columns in rows, or None for the triangular kind; r, r_tilde [P, L, M, M], of which
what lies below the diagonal is ignored; b, c, s [P, L, M]; row r uses set r mod P. p [L, R, M] is Q^T z of each layer
when `save`, else empty. dcolumns is empty where columns are None. Of the parameters' strides only that of the sets is
free; others are copied.
"""

from typing import Any

import torch
from torch import Tensor

from vvae_fast.backends.operators import define

_PARAMS = "Tensor z, Tensor? columns, Tensor r, Tensor r_tilde, Tensor b, Tensor c, Tensor s"
_SPEC = "int activation, float slope"


def _fake_outputs(z: Tensor, columns: Tensor | None, r: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, (_, layers, units, _) = z.shape[0], r.shape
    p = z.new_empty((layers, rows, units) if others[-1] else (0,))
    return z.new_empty(z.shape), z.new_empty((rows,)), p


def _fake_gradients(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, columns: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    r, r_tilde, b, _, s = others[:5]
    dcolumns = z.new_empty((0,) if columns is None else columns.shape)
    return z.new_empty(z.shape), dcolumns, *(t.new_empty(t.shape) for t in (r, r_tilde, b, s))


_SIX = ", ".join(["Tensor"] * 6)
sylvester_forward = define(
    "sylvester_forward", f"({_PARAMS}, {_SPEC}, bool save) -> (Tensor, Tensor, Tensor)", _fake_outputs
)
sylvester_backward = define(
    "sylvester_backward",
    f"(Tensor grad_z, Tensor grad_log_det, {_PARAMS}, Tensor p, {_SPEC}) -> ({_SIX})",
    _fake_gradients,
)
