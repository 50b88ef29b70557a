"""What the compact form does with one chunk of steps, docs/math.md (9) to (12), on Triton tensors.

The scans run with a thread a row: the tile of a chunk goes through memory and comes back as CHUNK vectors [R], so that
no step waits for another thread. Every dot product of a step, an H, a delta, is a tile again.
"""

import triton
import triton.language as tl

from vvae_fast.kernels.math import activate, constrain

CHUNK = tl.constexpr(16)  # steps
GRAM = tl.constexpr(16 * 16)  # numbers of a chunk's Gram matrix


@triton.jit
def dot(x, y, sum, PRECISION: tl.constexpr):
    """sum + x y."""
    return tl.dot(x, y, sum, input_precision=PRECISION, out_dtype=sum.dtype)


@triton.jit
def rows_of(owner, block, num_sets, BLOCK_ROWS: tl.constexpr, SHARED: tl.constexpr):
    """The rows [R] of a set's row block."""
    nth = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if SHARED:  # num_sets is 1, and Triton sees that the rows are consecutive
        return nth
    return nth * num_sets + owner


@triton.jit
def load_state(begun, x, x_row: tl.constexpr, x_col: tl.constexpr, state, row, col, mask, D: tl.constexpr):
    """[R, BLOCK_D] of the state that goes from chunk to chunk in memory; x is what the first chunk starts from."""
    if begun:
        tile = tl.load(state + row[:, None] * D + col[None, :], mask, 0)
    else:
        tile = tl.load(x + row[:, None] * x_row + col[None, :] * x_col, mask, 0).to(state.dtype.element_ty)
    return tile


@triton.jit
def load_params(p, at, p_col: tl.constexpr, steps, D: tl.constexpr, dtype: tl.constexpr):
    """[CHUNK, BLOCK_D] of u or w from p [CHUNK, 1] on, 0 where there is no step or no column."""
    return tl.load(p + at[None, :] * p_col, steps[:, None] & (at < D)[None, :], 0).to(dtype)


@triton.jit
def constrain_chunk(
    u,  # [CHUNK, 1], as w
    w,
    u_col: tl.constexpr,
    w_col: tl.constexpr,
    steps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CONSTRAINT: tl.constexpr,
    dtype: tl.constexpr,
):
    """c, s, sunk and of_w [CHUNK], where u_hat = u + of_w w, docs/math.md (4), (5), (38)."""
    alpha, n = tl.zeros([CHUNK], dtype), tl.zeros([CHUNK], dtype)
    for start in tl.range(0, D, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        u_k = load_params(u, at, u_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
        w_k = load_params(w, at, w_col, steps, D, dtype)  # [CHUNK, BLOCK_D]
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
    """The pre-activations (9) in the place of P: `a` [R] points to the first step of the chunk; `left` [R] steps
    are there, 0 in rows behind the last."""
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
