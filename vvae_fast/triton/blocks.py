"""Blocks of rows, columns and steps on Triton tensors, and what the compact form does with one chunk of steps,
docs/math.md (9) to (12).

The scans run with a thread a row: the tile of a chunk goes through memory and comes back as CHUNK vectors [R], so that
no step waits for another thread. Every dot product of a step, an H, a delta, is a tile again.
"""

import triton
import triton.language as tl

from vvae_fast.triton.math import activate, constrain

CHUNK = tl.constexpr(16)  # steps
GRAM = tl.constexpr(16 * 16)  # numbers of a chunk's Gram matrix


@triton.jit
def elements(x, row, col, STRIDES: tl.constexpr):
    """Pointers [R, C] to the rows [R] and columns [C] of x, which has the strides of a `Matrix`."""
    return x + row[:, None] * STRIDES.row + col[None, :] * STRIDES.col


@triton.jit
def sum_partials(partials, size, num_partials, at, mask, BLOCK_PARTIALS: tl.constexpr):
    """[N]: the elements `at` [N] of the partial sums, `size` numbers each, added in a fixed order."""
    total = tl.zeros([at.shape[0]], partials.dtype.element_ty)
    for first in tl.range(0, num_partials, BLOCK_PARTIALS):
        nth = first + tl.arange(0, BLOCK_PARTIALS)  # [BLOCK_PARTIALS]
        wanted = (nth < num_partials)[:, None] & mask[None, :]  # [BLOCK_PARTIALS, N]
        total += tl.sum(tl.load(partials + nth[:, None] * size + at[None, :], wanted, 0), 0)
    return total


@triton.jit
def dot(x, y, sum, PRECISION: tl.constexpr):
    """sum + x y."""
    return tl.dot(x, y, sum, input_precision=PRECISION, out_dtype=sum.dtype)


@triton.jit
def rows_of(owner, block, num_sets, rows_per_set, BLOCK_ROWS: tl.constexpr, SHARED: tl.constexpr):
    """The rows [R] of a set's row block, and which of them there are."""
    nth = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = nth < rows_per_set
    if SHARED:  # num_sets is 1, and Triton sees that the rows are consecutive
        return nth, inside
    return nth * num_sets + owner, inside


@triton.jit
def rows_of_program(num_blocks, num_sets, rows_per_set, BLOCK_ROWS: tl.constexpr, SHARED: tl.constexpr):
    """The program, its parameter set and its block of the set's rows, these rows [R] and which of them there are."""
    program = tl.program_id(0).to(tl.int64)
    owner, block = program // num_blocks, program % num_blocks
    row, inside = rows_of(owner, block, num_sets, rows_per_set, BLOCK_ROWS, SHARED)
    return program, owner, block, row, inside


@triton.jit
def load_state(begun, x, STRIDES: tl.constexpr, state, row, inside, col, D: tl.constexpr):
    """[R, BLOCK_D] of the state that goes from chunk to chunk in memory; x is what the first chunk starts from."""
    mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]
    if begun:
        tile = tl.load(state + row[:, None] * D + col[None, :], mask, 0)
    else:
        tile = tl.load(elements(x, row, col, STRIDES), mask, 0).to(state.dtype.element_ty)
    return tile


@triton.jit
def store_state(more, state, out, tile, row, inside, col, D: tl.constexpr):
    """The state after a chunk: in memory while there are more chunks, then in `out`."""
    mask = inside[:, None] & (col < D)[None, :]  # [R, BLOCK_D]
    if more:
        tl.store(state + row[:, None] * D + col[None, :], tile, mask)
    else:
        tl.store(out + row[:, None] * D + col[None, :], tile, mask)


@triton.jit
def load_params(params, at, STRIDES: tl.constexpr, steps, D: tl.constexpr, dtype: tl.constexpr):
    """[CHUNK, BLOCK_D] of u or w from params [CHUNK, 1] on, 0 where there is no step or no column."""
    return tl.load(params + at[None, :] * STRIDES.col, steps[:, None] & (at < D)[None, :], 0).to(dtype)


@triton.jit
def load_w_and_u_hat(u, w, of_w, at, steps, FIXED: tl.constexpr):
    """w and u_hat = u + of_w w [CHUNK, BLOCK_D] of a chunk, as `load_params`."""
    w_k = load_params(w, at, FIXED.w, steps, FIXED.dim, of_w.dtype)
    return w_k, load_params(u, at, FIXED.u, steps, FIXED.dim, of_w.dtype) + of_w[:, None] * w_k


@triton.jit
def constrain_chunk(
    u, w, steps, FIXED: tl.constexpr, BLOCK_D: tl.constexpr, CONSTRAINT: tl.constexpr, dtype: tl.constexpr
):
    """c, s, sunk and of_w [CHUNK], where u_hat = u + of_w w, docs/math.md (4), (5), (38). u and w point to [CHUNK, 1]
    steps."""
    alpha, n = tl.zeros([CHUNK], dtype), tl.zeros([CHUNK], dtype)
    for start in tl.range(0, FIXED.dim, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        u_k = load_params(u, at, FIXED.u, steps, FIXED.dim, dtype)  # [CHUNK, BLOCK_D]
        w_k = load_params(w, at, FIXED.w, steps, FIXED.dim, dtype)  # [CHUNK, BLOCK_D]
        alpha += tl.sum(w_k * u_k, 1)
        n += tl.sum(w_k * w_k, 1)
    c, s, sunk, rho, inv_n, _, _ = constrain(alpha, n, CONSTRAINT)
    return c, s, sunk, rho * inv_n


@triton.jit
def store_gram(scratch, gram):
    """Into the program's scratch, from which the scans take scalars."""
    step = tl.arange(0, CHUNK)  # [CHUNK]
    tl.store(scratch + step[:, None] * CHUNK + step[None, :], gram)


@triton.jit
def scan(a, scratch, rows, left, F: tl.constexpr):
    """The pre-activations (9) in the place of P. `a` [R] points to the first step of the chunk, of which `left` [R]
    steps exist: none in rows behind the last."""
    products = ()
    for k in tl.static_range(CHUNK):
        products += (tl.load(a + k * rows, left > k, 0),)
    tl.debug_barrier()  # a row may be that of several threads, of which one stores
    h = ()
    for k in tl.static_range(CHUNK):
        a_k = products[k]
        for j in tl.static_range(k):
            a_k += tl.load(scratch + (j * CHUNK + k)) * h[j]
        h += (activate(a_k, F)[0],)
        tl.store(a + k * rows, a_k, left > k)


@triton.jit
def scan_back(delta, slope, scratch, rows, left, BLOCK_ROWS: tl.constexpr):
    """delta (12) in the place of delta without the sum in (11); `slope` [R] points to h' of the first step."""
    products = ()
    for k in tl.static_range(CHUNK):
        products += (tl.load(delta + k * rows, left > k, 0),)
    tl.debug_barrier()  # a row may be that of several threads, of which one stores
    scanned = ()  # from the last step to the first
    for k in tl.static_range(CHUNK - 1, -1, -1):
        h_prime = tl.load(slope + k * BLOCK_ROWS)
        e = tl.zeros_like(h_prime)
        for j in tl.static_range(CHUNK - 1, k, -1):
            e += tl.load(scratch + (k * CHUNK + j)) * scanned[CHUNK - 1 - j]
        delta_k = products[k] + h_prime * e
        scanned += (delta_k,)
        tl.store(delta + k * rows, delta_k, left > k)
