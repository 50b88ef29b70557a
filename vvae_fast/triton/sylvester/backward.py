"""The adjoint of a Sylvester flow, docs/math.md (60), (61), from p of every layer."""

import torch
import triton
import triton.language as tl

from vvae_fast.spec import FlowSpec
from vvae_fast.triton.launch import Launch, planned
from vvae_fast.triton.math import AnyFlow, activate, step_adjoint
from vvae_fast.triton.sylvester.calls import Sizes
from vvae_fast.triton.sylvester.gradients import put_gradients
from vvae_fast.triton.sylvester.layer import (
    combine,
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
    times_r_tilde_transposed,
    units_of,
)


@triton.jit(do_not_specialize=["rows", "num_layers", "num_sets"])
def sylvester_backward_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    columns,  # [sets, L, M, D]; anything of the triangular kind
    r,  # [sets, L, M, M]
    r_tilde,  # [sets, L, M, M]; anything where r is packed
    d,  # [sets, L, M]
    d_tilde,  # [sets, L, M]
    b,  # [sets, L, M]
    s,  # [sets, L, M]
    saved,  # [L, rows, M]: p
    passed,  # [L + 1, rows, D]: z_0 to z_L; anything of the triangular kind
    dz,  # [rows, D]
    dcolumns,  # this and the following as in `put_gradients`
    dr,
    dr_tilde,
    dd,
    dd_tilde,
    db,
    ds,
    parts,
    of_z,
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
    OWN: tl.constexpr,
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

    g = tl.load(grad_z + rows_at(row, FIXED.dim, col), mask, 0)  # [R, D]
    lambda_ = tl.load(grad_log_det + row, inside, 0)[:, None]  # [R, 1]
    for _ in tl.range(num_layers):
        of_r = into(g, load_columns(columns, layer, unit, owned, there, FIXED, BLOCK), layer, FIXED, BLOCK)  # [R, M]
        p = tl.load(saved + rows_at(layer * rows + row, M, unit), inside[:, None] & there[None, :], 0)  # [R, M]
        d_tilde_l = load_units(d_tilde, layer, unit, owned, there, 0, FIXED)  # [S, M]
        r_tilde_l = load_r_tilde(r, r_tilde, layer, unit, owned, there, FIXED)  # [S, M, M]
        a = times_r_tilde(r_tilde_l, d_tilde_l, p, FIXED) + load_units(b, layer, unit, owned, there, 0, FIXED)  # [R, M]
        h, h_prime = activate(a, F)  # [R, M]
        d_l = load_units(d, layer, unit, owned, there, 0, FIXED)  # [S, M]
        r_l = load_triangle(r, layer, unit, owned, there, FIXED, True)  # [S, M, M]
        e = combine(r_l, of_r) + d_l * of_r  # [R, M]
        s_l = load_units(s, layer, unit, owned, there, 1, FIXED)  # [S, M]
        of_a, of_s = step_adjoint(e, lambda_, h, h_prime, d_l * d_tilde_l, s_l, 1.0, F)  # [R, M]
        dp = times_r_tilde_transposed(r_tilde_l, d_tilde_l, of_a, FIXED)  # [R, M]
        x, z_l = h, g
        if FIXED.columns:
            x = dots(r_l, h) + d_l * h
            z_l = tl.load(passed + rows_at(layer * rows + row, FIXED.dim, col), mask, 0)  # [R, D]
        put_gradients(
            dcolumns,
            dr,
            dr_tilde,
            dd,
            dd_tilde,
            db,
            ds,
            parts,
            of_z,
            of_r * h,
            of_a * p,
            of_s,
            of_r,
            h,
            of_a,
            p,
            x,
            dp,
            g,
            z_l,
            row,
            rows,
            inside,
            layer,
            num_layers,
            unit,
            there,
            FIXED,
            BLOCK,
            OWN,
        )
        # Loaded once more: registers hold no three matrices.
        g += out_of(dp, load_columns(columns, layer, unit, owned, there, FIXED, BLOCK), layer, FIXED, BLOCK)
        layer -= 1
    tl.store(dz + rows_at(row, FIXED.dim, col), g, mask)


@planned
def plan_backward(sizes: Sizes, device: torch.device, spec: FlowSpec) -> Launch:
    """The launch of the kernel."""
    return sizes.launch(sylvester_backward_kernel, AnyFlow.of(spec), sizes.rows_per_set == 1)
