"""What the tests of the Triton kernels rest on where Triton interprets them."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is not used")


@triton.jit
def product_kernel(x, y, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    row, step, col = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    tile = tl.dot(tl.load(x + row * K + step[None, :]), tl.load(y + step[:, None] * N + col), input_precision="ieee")
    tl.store(out + row * N + col, tile)


def test_tl_dot_adds_up_a_column_at_a_time():
    """To the bit: a BLAS that fuses or blocks its sums gives others, and others again in another row of the tile."""
    x, y, out = torch.randn(16, 64), torch.randn(64, 16), torch.empty(16, 16)
    product_kernel[(1,)](x, y, out, 16, 64, 16)
    wanted = torch.zeros(16, 16)
    for k in range(64):
        wanted = wanted + x[:, k, None] * y[None, k]
    assert torch.equal(out, wanted)


@triton.jit
def twice(x):
    return x + x


@triton.jit
def fourfold_kernel(x, out):
    tl.store(out, twice(twice(tl.load(x))))


def test_functions_find_the_language_that_the_launch_put_there(monkeypatch):
    calls = []
    patch = interpreter._patch_builtin
    monkeypatch.setattr(
        interpreter, "_patch_builtin", lambda module, *rest: calls.append(module) or patch(module, *rest)
    )
    for _ in range(2):
        out = torch.zeros(1)
        fourfold_kernel[(1,)](torch.ones(1), out)
        assert out.item() == 4
    assert calls.count(tl) == 2  # once in each launch, whatever is called there
    assert tl.core.is_builtin(tl.load)  # as it was
