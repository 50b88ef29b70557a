"""One Sylvester layer on Triton tensors, docs/math.md (57): the parameters of a program's rows, and products with them.

Shapes: vectors [R, M] or [R, D], matrices [S, M, M] or [S, M, D], where S = 1 where parameters are shared, else R. M
and D stand for the powers of two that hold them; what is behind the last unit or column is 0. A lane of M is a unit of
the layer.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_program(rows, num_sets, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """The rows [R] of a program and which of them there are; their parameter sets [S] and which of those there are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK.rows + tl.arange(0, BLOCK.rows)
    inside = row < rows
    if FIXED.shared:
        return row, inside, tl.zeros([1], tl.int64), tl.full([1], 1, tl.int1)
    else:
        return row, inside, row % num_sets, inside


@triton.jit
def units_of(FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """The units [M] of the lanes, and which lanes have one."""
    unit = tl.arange(0, BLOCK.units)
    return unit, unit < FIXED.units


@triton.jit
def load_units(x, layer, unit, owned, there, other, FIXED: tl.constexpr):
    """A layer's vector [S, M]; x [S], here and below, points to the first layer's."""
    x += layer * FIXED.units
    return tl.load(x[:, None] + unit[None, :], owned[:, None] & there[None, :], other)


@triton.jit
def triangle(unit, there, UPPER: tl.constexpr):
    """Which numbers [M, M] of a matrix lie above its diagonal, or below it."""
    later = unit[:, None] < unit[None, :] if UPPER else unit[:, None] > unit[None, :]
    return there[:, None] & there[None, :] & later


@triton.jit
def load_triangle(x, layer, unit, owned, there, FIXED: tl.constexpr, UPPER: tl.constexpr):
    """A layer's matrix above its diagonal or below it [S, M, M]."""
    x += layer * FIXED.units * FIXED.units
    at = unit[:, None] * FIXED.units + unit[None, :]  # [M, M]
    mask = owned[:, None, None] & triangle(unit, there, UPPER)[None, :, :]
    return tl.load(x[:, None, None] + at[None, :, :], mask, 0)


@triton.jit
def load_r_tilde(r, r_tilde, layer, unit, owned, there, FIXED: tl.constexpr):
    """R~ above its diagonal [S, M, M], transposed where it is packed."""
    if FIXED.packed:
        return load_triangle(r, layer, unit, owned, there, FIXED, False)
    else:
        return load_triangle(r_tilde, layer, unit, owned, there, FIXED, True)


@triton.jit
def load_r_column(r, layer, m, unit, owned, there, FIXED: tl.constexpr):
    """R's column m above the diagonal [S, M]."""
    r += layer * FIXED.units * FIXED.units
    return tl.load(r[:, None] + (unit * FIXED.units + m)[None, :], owned[:, None] & (there & (unit < m))[None, :], 0)


@triton.jit
def load_r_tilde_row(r, r_tilde, layer, m, unit, owned, there, FIXED: tl.constexpr):
    """R~'s row m behind the diagonal [S, M]."""
    first = layer * FIXED.units * FIXED.units
    mask = owned[:, None] & (there & (unit > m))[None, :]
    if FIXED.packed:
        return tl.load((r + first)[:, None] + (unit * FIXED.units + m)[None, :], mask, 0)
    else:
        return tl.load((r_tilde + first)[:, None] + (m * FIXED.units + unit)[None, :], mask, 0)


@triton.jit
def load_columns(x, layer, unit, owned, there, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """Q's columns [S, M, D]; nothing of the triangular kind."""
    if FIXED.columns:
        col = tl.arange(0, BLOCK.dim)  # [D]
        x += layer * FIXED.units * FIXED.dim
        at = unit[:, None] * FIXED.dim + col[None, :]  # [M, D]
        mask = there[:, None] & (col < FIXED.dim)[None, :]
        return tl.load(x[:, None, None] + at[None, :, :], owned[:, None, None] & mask[None, :, :], 0)
    else:
        return owned


@triton.jit
def dots(matrix, x):
    """matrix x [R, A] for matrix [S, A, B] and x [R, B]."""
    return tl.sum(matrix * x[:, None, :], 2)


@triton.jit
def combine(matrix, x):
    """matrix^T x [R, B] for matrix [S, A, B] and x [R, A]."""
    return tl.sum(matrix * x[:, :, None], 1)


@triton.jit
def turned(x, layer, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """x [R, D], in reverse order in odd layers."""
    lane = tl.arange(0, BLOCK.dim)  # [D]
    at = tl.where((layer % 2 == 1) & (lane < FIXED.dim), FIXED.dim - 1 - lane, lane)
    return tl.gather(x, tl.broadcast_to(at[None, :], [BLOCK.rows, BLOCK.dim]), 1)


@triton.jit
def into(z, columns, layer, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """Q^T z [R, M]; the triangular kind's odd layers take z in reverse order."""
    if FIXED.columns:
        return dots(columns, z)
    else:
        return turned(z, layer, FIXED, BLOCK)


@triton.jit
def out_of(x, columns, layer, FIXED: tl.constexpr, BLOCK: tl.constexpr):
    """Q x [R, D]."""
    if FIXED.columns:
        return combine(columns, x)
    else:
        return turned(x, layer, FIXED, BLOCK)


@triton.jit
def times_r_tilde(r_tilde, d_tilde, x, FIXED: tl.constexpr):
    """R~ x [R, M]."""
    if FIXED.packed:
        return combine(r_tilde, x) + d_tilde * x
    else:
        return dots(r_tilde, x) + d_tilde * x


@triton.jit
def times_r_tilde_transposed(r_tilde, d_tilde, x, FIXED: tl.constexpr):
    """R~^T x [R, M]."""
    if FIXED.packed:
        return dots(r_tilde, x) + d_tilde * x
    else:
        return combine(r_tilde, x) + d_tilde * x


@triton.jit
def rows_at(row, size, at):
    """Offsets [R, N] of the elements `at` [N] of rows that have `size` each."""
    return row[:, None] * size + at[None, :]
