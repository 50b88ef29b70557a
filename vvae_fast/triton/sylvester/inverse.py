"""The inverse of a Sylvester flow, docs/math.md (62): a layer is a triangular system, whose units are solved from the
last to the first, one root each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.spec import FlowSpec
from vvae_fast.triton.launch import Launch, planned
from vvae_fast.triton.math import AnyFlow, activate, log_abs_determinant
from vvae_fast.triton.root import solve
from vvae_fast.triton.sylvester.calls import Call, Sizes
from vvae_fast.triton.sylvester.layer import (
    into,
    load_columns,
    load_r_column,
    load_r_tilde,
    load_r_tilde_row,
    load_units,
    out_of,
    rows_at,
    rows_of_program,
    times_r_tilde,
    units_of,
)


@triton.jit(do_not_specialize=["rows", "num_layers", "num_sets"])
def sylvester_inverse_kernel(
    z,  # [rows, D]
    columns,  # [sets, L, M, D]; anything of the triangular kind
    r,  # [sets, L, M, M]
    r_tilde,  # [sets, L, M, M]; anything where r is packed
    d,  # [sets, L, M]
    d_tilde,  # [sets, L, M]
    b,  # [sets, L, M]
    s,  # [sets, L, M]
    z_0,  # [rows, D]
    log_det,  # [rows]
    saved,  # [L, rows, M]: a
    rows,
    num_layers,
    num_sets,
    columns_set,  # strides of the sets
    r_set,
    r_tilde_set,
    d_set,
    d_tilde_set,
    b_set,
    s_set,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
    SAVE: tl.constexpr,
):
    M: tl.constexpr = FIXED.units
    row, inside, owner, owned = rows_of_program(rows, num_sets, FIXED, BLOCK)  # [R], [S]
    layer = num_layers.to(tl.int64) - 1
    columns += owner * columns_set  # [S]
    r += owner * r_set
    r_tilde += owner * r_tilde_set
    d += owner * d_set
    d_tilde += owner * d_tilde_set
    b += owner * b_set
    s += owner * s_set
    unit, there = units_of(FIXED, BLOCK)  # [M]
    col = tl.arange(0, BLOCK.dim)  # [D]
    mask = inside[:, None] & (col < FIXED.dim)[None, :]  # [R, D]

    z_l = tl.load(z + rows_at(row, FIXED.dim, col), mask, 0)  # [R, D]
    sum_of_logs = tl.zeros([BLOCK.rows], z.dtype.element_ty)  # [R]
    for _ in tl.range(num_layers):
        q = load_columns(columns, layer, unit, owned, there, FIXED, BLOCK)  # [S, M, D]
        d_l = load_units(d, layer, unit, owned, there, 0, FIXED)  # [S, M]
        d_tilde_l = load_units(d_tilde, layer, unit, owned, there, 0, FIXED)  # [S, M]
        p = into(z_l, q, layer, FIXED, BLOCK)  # [R, M]
        of_p = times_r_tilde(load_r_tilde(r, r_tilde, layer, unit, owned, there, FIXED), d_tilde_l, p, FIXED)  # [R, M]
        rhs = of_p + load_units(b, layer, unit, owned, there, 0, FIXED)  # [R, M]
        a, x = tl.zeros_like(rhs), tl.zeros_like(rhs)  # [R, M], x is R h of the units behind m
        for nth in tl.range(M):
            m = M - 1 - nth
            here = (unit == m)[None, :]  # [1, M]
            coupling = load_r_tilde_row(r, r_tilde, layer, m, unit, owned, there, FIXED)  # [S, M]
            right = tl.sum(tl.where(here, rhs - d_tilde_l * x, -coupling * x), 1)  # [R]
            at = layer * M + m
            s_m = tl.load(s + at, owned, 1)  # [S]
            d_m = tl.load(d + at, owned, 0)  # [S]
            c_m = d_m * tl.load(d_tilde + at, owned, 0)  # [S]
            root = solve(tl.where(s_m > 0, right, float("nan")), c_m, s_m, F)  # [R], NaN where there is no inverse
            h_m = activate(root, F)[0]  # [R]
            of_h = tl.where(here, d_m[:, None], load_r_column(r, layer, m, unit, owned, there, FIXED))  # [S, M]
            x += of_h * h_m[:, None]
            a = tl.where(here, root[:, None], a)
        if SAVE:
            tl.store(saved + rows_at(layer * rows + row, M, unit), a, inside[:, None] & there[None, :])
        h, h_prime = activate(a, F)  # [R, M]
        s_l = load_units(s, layer, unit, owned, there, 1, FIXED)  # [S, M]
        sum_of_logs -= tl.sum(log_abs_determinant(h, h_prime, d_l * d_tilde_l, s_l, 0.0, F), 1)
        z_l -= out_of(x, q, layer, FIXED, BLOCK)
        layer -= 1
    tl.store(z_0 + rows_at(row, FIXED.dim, col), z_l, mask)
    tl.store(log_det + row, sum_of_logs, inside)


@planned
def _plan(sizes: Sizes, device: torch.device, spec: FlowSpec, save: bool) -> Launch:
    return sizes.launch(sylvester_inverse_kernel, AnyFlow.of(spec), save)


def launch_inverse(call: Call, z_0: Tensor, log_det: Tensor, saved: Tensor, spec: FlowSpec, save: bool) -> None:
    """Fills z_0 [R, D], log_det [R] and, if `save`, the roots a [L, R, M]."""
    _plan(call.sizes, call.z.device, spec, save)(call.z, *call.params, z_0, log_det, saved)
