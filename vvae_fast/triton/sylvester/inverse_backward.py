"""The adjoint of the inverse of a Sylvester flow, docs/math.md (64), from the roots a of every layer."""

import torch
import triton
import triton.language as tl

from vvae_fast.spec import FlowSpec
from vvae_fast.triton.launch import Launch, planned
from vvae_fast.triton.math import AnyFlow, activate, determinant, h_second
from vvae_fast.triton.sylvester.calls import Sizes
from vvae_fast.triton.sylvester.gradients import put_gradients
from vvae_fast.triton.sylvester.layer import (
    combine,
    dots,
    into,
    load_columns,
    load_r_column,
    load_r_tilde_row,
    load_triangle,
    load_units,
    out_of,
    rows_at,
    rows_of_program,
    units_of,
)


@triton.jit(do_not_specialize=["rows", "num_layers", "num_sets"])
def sylvester_inverse_backward_kernel(
    grad_z,  # [rows, D]
    grad_log_det,  # [rows]
    columns,  # [sets, L, M, D]; anything of the triangular kind
    r,  # [sets, L, M, M]
    r_tilde,  # [sets, L, M, M]; anything where r is packed
    d,  # [sets, L, M]
    d_tilde,  # [sets, L, M]
    b,  # [sets, L, M], not used here
    s,  # [sets, L, M]
    saved,  # [L, rows, M]: a
    passed,  # [L + 1, rows, D]: z_0 to z_L
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
    columns += owner * columns_set  # [S]
    r += owner * r_set
    r_tilde += owner * r_tilde_set
    d += owner * d_set
    d_tilde += owner * d_tilde_set
    s += owner * s_set
    unit, there = units_of(FIXED, BLOCK)  # [M]
    col = tl.arange(0, BLOCK.dim)  # [D]
    mask = inside[:, None] & (col < FIXED.dim)[None, :]  # [R, D]

    g = tl.load(grad_z + rows_at(row, FIXED.dim, col), mask, 0)  # [R, D]
    lambda_ = tl.load(grad_log_det + row, inside, 0)[:, None]  # [R, 1]
    layer = num_layers.to(tl.int64) * 0
    for _ in tl.range(num_layers):
        q = load_columns(columns, layer, unit, owned, there, FIXED, BLOCK)  # [S, M, D]
        z_before = tl.load(passed + rows_at(layer * rows + row, FIXED.dim, col), mask, 0)  # [R, D]
        p = into(z_before, q, layer, FIXED, BLOCK)  # [R, M]
        z_l = tl.load(passed + rows_at((layer + 1) * rows + row, FIXED.dim, col), mask, 0)  # [R, D], behind the layer
        a = tl.load(saved + rows_at(layer * rows + row, M, unit), inside[:, None] & there[None, :], 0)  # [R, M]
        h, h_prime = activate(a, F)  # [R, M]
        d_l = load_units(d, layer, unit, owned, there, 0, FIXED)  # [S, M]
        d_tilde_l = load_units(d_tilde, layer, unit, owned, there, 0, FIXED)  # [S, M]
        c = d_l * d_tilde_l  # [S, M]
        inverse = 1 / determinant(h, h_prime, c, load_units(s, layer, unit, owned, there, 1, FIXED), F)  # [R, M]
        r_l = load_triangle(r, layer, unit, owned, there, FIXED, True)  # [S, M, M]
        of_g = into(g, q, layer, FIXED, BLOCK)  # [R, M]
        e = combine(r_l, of_g) + d_l * of_g  # [R, M]
        # mu but for the sum in (64), which is times slope
        of_a = (-e * h_prime - lambda_ * (c * h_second(h, h_prime, F) * inverse)) * inverse  # [R, M]
        slope = h_prime * inverse  # [R, M]
        mu, v = tl.zeros_like(of_a), tl.zeros_like(of_a)  # [R, M], v is R~^T mu of the units before m
        for m in tl.range(M):
            here = (unit == m)[None, :]  # [1, M]
            coupling = tl.where(here, d_l, load_r_column(r, layer, m, unit, owned, there, FIXED))  # [S, M]
            of_m = tl.sum(coupling * v, 1)  # [R]
            mu_m = tl.sum(tl.where(here, of_a - slope * of_m[:, None], 0), 1)[:, None]  # [R, 1]
            mu = tl.where(here, mu_m, mu)
            of_mu = load_r_tilde_row(r, r_tilde, layer, m, unit, owned, there, FIXED)  # [S, M]
            v += tl.where(here, d_tilde_l, of_mu) * mu_m
        of_r = -(of_g + v)  # [R, M]
        mu_h = mu * h  # [R, M]
        x = -(dots(r_l, h) + d_l * h)  # [R, M]
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
            of_r * h + d_tilde_l * mu_h,
            mu * p + d_l * mu_h,
            -mu_h - lambda_ * slope,
            of_r,
            h,
            mu,
            p,
            x,
            v,
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
        g += out_of(v, load_columns(columns, layer, unit, owned, there, FIXED, BLOCK), layer, FIXED, BLOCK)
        layer += 1
    tl.store(dz + rows_at(row, FIXED.dim, col), g, mask)


@planned
def plan_inverse_backward(sizes: Sizes, device: torch.device, spec: FlowSpec) -> Launch:
    """The launch of the kernel."""
    return sizes.launch(sylvester_inverse_backward_kernel, AnyFlow.of(spec), sizes.rows_per_set == 1)
