"""The z of every layer once more, from what the forward or the inverse saved: the adjoints read them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vvae_fast.spec import FlowSpec
from vvae_fast.triton.launch import Launch, planned
from vvae_fast.triton.math import AnyFlow, activate
from vvae_fast.triton.sylvester.calls import Call, Sizes
from vvae_fast.triton.sylvester.layer import (
    dots,
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
def sylvester_passed_kernel(
    z,  # [rows, D]
    columns,  # [sets, L, M, D]; anything of the triangular kind
    r,  # [sets, L, M, M]
    r_tilde,  # [sets, L, M, M]; anything where r is packed
    d,  # [sets, L, M]
    d_tilde,  # [sets, L, M]
    b,  # [sets, L, M]
    s,  # [sets, L, M], not used here
    saved,  # [L, rows, M]: p, or a of the inverse
    passed,  # [L + 1, rows, D]: z_0 to z_L
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
    INVERSE: tl.constexpr,
):
    """From z_0 up, or of the inverse from z_L down: a launch of its own, so that no thread waits for what another one
    has written."""
    M: tl.constexpr = FIXED.units
    sign: tl.constexpr = -1 if INVERSE else 1  # in which the layers are taken
    before: tl.constexpr = 1 if INVERSE else 0  # from a layer to the z that it takes
    row, inside, owner, owned = rows_of_program(rows, num_sets, FIXED, BLOCK)  # [R], [S]
    layer = num_layers.to(tl.int64) - 1 if INVERSE else num_layers.to(tl.int64) * 0
    columns += owner * columns_set  # [S]
    r += owner * r_set
    r_tilde += owner * r_tilde_set
    d += owner * d_set
    d_tilde += owner * d_tilde_set
    b += owner * b_set
    unit, there = units_of(FIXED, BLOCK)  # [M]
    col = tl.arange(0, BLOCK.dim)  # [D]
    mask = inside[:, None] & (col < FIXED.dim)[None, :]  # [R, D]

    z_l = tl.load(z + rows_at(row, FIXED.dim, col), mask, 0)  # [R, D]
    for _ in tl.range(num_layers):
        tl.store(passed + rows_at((layer + before) * rows + row, FIXED.dim, col), z_l, mask)
        a = tl.load(saved + rows_at(layer * rows + row, M, unit), inside[:, None] & there[None, :], 0)  # [R, M]
        if not INVERSE:
            d_tilde_l = load_units(d_tilde, layer, unit, owned, there, 0, FIXED)  # [S, M]
            of_p = times_r_tilde(load_r_tilde(r, r_tilde, layer, unit, owned, there, FIXED), d_tilde_l, a, FIXED)
            a = of_p + load_units(b, layer, unit, owned, there, 0, FIXED)
        h = activate(a, F)[0]  # [R, M]
        d_l = load_units(d, layer, unit, owned, there, 0, FIXED)  # [S, M]
        x = dots(load_triangle(r, layer, unit, owned, there, FIXED, True), h) + d_l * h  # [R, M]
        z_l += sign * out_of(x, load_columns(columns, layer, unit, owned, there, FIXED, BLOCK), layer, FIXED, BLOCK)
        layer += sign
    tl.store(passed + rows_at((layer + before) * rows + row, FIXED.dim, col), z_l, mask)


@planned
def _plan(sizes: Sizes, device: torch.device, spec: FlowSpec, inverse: bool) -> Launch:
    return sizes.launch(sylvester_passed_kernel, AnyFlow.of(spec), inverse)


def launch_passed(call: Call, saved: Tensor, spec: FlowSpec, inverse: bool) -> Tensor:
    """z_0 to z_L [L + 1, R, D] from the call's z, which is z_0, or z_L of the inverse."""
    passed = call.z.new_empty((call.layers + 1, call.rows, call.dim))
    _plan(call.sizes, call.z.device, spec, inverse)(call.z, *call.params, saved, passed)
    return passed
