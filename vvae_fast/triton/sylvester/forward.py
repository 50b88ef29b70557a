"""The forward of a Sylvester flow, docs/math.md (57), (58): z stays in registers through all layers, one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.spec import FlowSpec
from vvae_fast.triton.launch import Launch, planned
from vvae_fast.triton.math import AnyFlow, activate, log_abs_determinant
from vvae_fast.triton.sylvester.calls import Call, Sizes
from vvae_fast.triton.sylvester.layer import (
    dots,
    into,
    load_columns,
    load_r_tilde,
    load_triangle,
    load_units,
    out_of,
    rows_at,
    rows_of_program,
    times_r_tilde,
    units_of,
)


@triton.jit(do_not_specialize=["rows", "num_layers", "num_sets"])
def sylvester_forward_kernel(
    z,  # [rows, D]
    columns,  # [sets, L, M, D]; anything of the triangular kind
    r,  # [sets, L, M, M]
    r_tilde,  # [sets, L, M, M]; anything where r is packed
    d,  # [sets, L, M]
    d_tilde,  # [sets, L, M]
    b,  # [sets, L, M]
    s,  # [sets, L, M]
    z_L,  # [rows, D]
    log_det,  # [rows]
    saved,  # [L, rows, M]: p
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
    layer = num_layers.to(tl.int64) * 0
    for _ in tl.range(num_layers):
        q = load_columns(columns, layer, unit, owned, there, FIXED, BLOCK)  # [S, M, D]
        p = into(z_l, q, layer, FIXED, BLOCK)  # [R, M]
        if SAVE:
            tl.store(saved + rows_at(layer * rows + row, M, unit), p, inside[:, None] & there[None, :])
        d_tilde_l = load_units(d_tilde, layer, unit, owned, there, 0, FIXED)  # [S, M]
        of_p = times_r_tilde(load_r_tilde(r, r_tilde, layer, unit, owned, there, FIXED), d_tilde_l, p, FIXED)  # [R, M]
        h, h_prime = activate(of_p + load_units(b, layer, unit, owned, there, 0, FIXED), F)  # [R, M]
        d_l = load_units(d, layer, unit, owned, there, 0, FIXED)  # [S, M]
        c, s_l = d_l * d_tilde_l, load_units(s, layer, unit, owned, there, 1, FIXED)  # [S, M]
        sum_of_logs += tl.sum(log_abs_determinant(h, h_prime, c, s_l, 0.0, F), 1)
        x = dots(load_triangle(r, layer, unit, owned, there, FIXED, True), h) + d_l * h  # [R, M]
        z_l += out_of(x, q, layer, FIXED, BLOCK)
        layer += 1
    tl.store(z_L + rows_at(row, FIXED.dim, col), z_l, mask)
    tl.store(log_det + row, sum_of_logs, inside)


@planned
def _plan(sizes: Sizes, device: torch.device, spec: FlowSpec, save: bool) -> Launch:
    return sizes.launch(sylvester_forward_kernel, AnyFlow.of(spec), save)


def launch_forward(call: Call, z_L: Tensor, log_det: Tensor, saved: Tensor, spec: FlowSpec, save: bool) -> None:
    """Fills z_L [R, D], log_det [R] and, if `save`, p [L, R, M]."""
    _plan(call.sizes, call.z.device, spec, save)(call.z, *call.params, z_L, log_det, saved)
