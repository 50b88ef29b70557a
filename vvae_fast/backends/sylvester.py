"""The operators of Sylvester flows: their schemas and their fakes. The C++ and the Triton backend have them.

    sylvester_forward(z, columns, r, r_tilde, d, d_tilde, b, s, activation, slope, save) -> (z_L, log_det, p)
    sylvester_backward(grad_z, grad_log_det, z, columns, r, r_tilde, d, d_tilde, b, s, p, activation, slope)
        -> (dz, dcolumns, dr, dr_tilde, dd, dd_tilde, db, ds)
    sylvester_inverse, sylvester_inverse_backward: the same of the inverse, with its roots a in place of p

z [R, D]; columns [P, L, M, D], Q's columns in rows, or None for the triangular kind; r, r_tilde [P, L, M, M], of which
only what lies above the diagonal is read, or r_tilde None, and R~ transposed below the diagonal of r; their diagonals
d, d_tilde, b and s = 1 + d d_tilde [P, L, M]. Row r uses set r mod P. p [L, R, M] is Q^T z of each layer when `save`,
else empty. dcolumns and dr_tilde are empty where there are no columns and no r_tilde; dr and dr_tilde are zero where
those are not read. Of the parameters' strides only that of the sets is free; others are copied. The operators of the
Triton backend are named triton_sylvester_forward and so on.
"""

from typing import Any, NamedTuple

from torch import Tensor

from vvae_fast.backends.operators import PREFIXES, Operator, define


class Operators(NamedTuple):
    """What a backend implements."""

    sylvester_forward: Operator
    sylvester_backward: Operator
    sylvester_inverse: Operator
    sylvester_inverse_backward: Operator


_PARAMS = "Tensor z, Tensor? columns, Tensor r, Tensor? r_tilde, Tensor d, Tensor d_tilde, Tensor b, Tensor s"
_SPEC = "int activation, float slope"


def _fake_outputs(z: Tensor, columns: Tensor | None, r: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, (_, layers, units, _) = z.shape[0], r.shape
    p = z.new_empty((layers, rows, units) if others[-1] else (0,))
    return z.new_empty(z.shape), z.new_empty((rows,)), p


def _fake_gradients(grad_z: Tensor, grad_log_det: Tensor, z: Tensor, *others: Any) -> tuple[Tensor, ...]:
    params = others[:7]
    return z.new_empty(z.shape), *(z.new_empty((0,) if t is None else t.shape) for t in params)


_FORWARD = f"({_PARAMS}, {_SPEC}, bool save) -> (Tensor, Tensor, Tensor)"
_BACKWARD = f"(Tensor grad_z, Tensor grad_log_det, {_PARAMS}, Tensor saved, {_SPEC}) -> ({', '.join(['Tensor'] * 8)})"
OPERATORS = {
    backend: Operators(
        define(f"{PREFIXES[backend]}sylvester_forward", _FORWARD, _fake_outputs),
        define(f"{PREFIXES[backend]}sylvester_backward", _BACKWARD, _fake_gradients),
        define(f"{PREFIXES[backend]}sylvester_inverse", _FORWARD, _fake_outputs),
        define(f"{PREFIXES[backend]}sylvester_inverse_backward", _BACKWARD, _fake_gradients),
    )
    for backend in ("cpp", "triton")
}
sylvester_forward, sylvester_backward, sylvester_inverse, sylvester_inverse_backward = OPERATORS["cpp"]
