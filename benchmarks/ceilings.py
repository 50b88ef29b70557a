"""The rates that no kernel beats: copying z, and a large matrix product. Both measured in the run that uses them."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_COPY = 64 * 1024  # bytes: the copy of less times the dispatcher, and would flatter the ratio to the floor


def copy_source(z: Tensor) -> Tensor:
    """What the copy ceiling of a case clones: its z [B, D], repeated where that is less than SMALLEST_COPY bytes."""
    return z.detach().repeat(max(1, -(-SMALLEST_COPY // z.nbytes)), 1)


def matrix_product_rate(dtype: torch.dtype, device: torch.device, repeats: int = 10) -> float:
    """flops/s of the fastest matrix product that PyTorch has here: the sceptic's choice is the best of all calls."""
    size = 8192 if device.type == "cuda" else 1024
    x, y = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = min(_best_seconds(product, repeats, device) for product in _products(x, y))
    return 2 * size**3 / best


def _products(x: Tensor, y: Tensor) -> list[Callable[[], Tensor]]:
    products = [lambda: torch.mm(x, y)]
    if x.device.type == "cpu":  # oneDNN is twice as fast as MKL on some CPUs; it lacks dtypes, and builds lack it
        one_dnn = lambda: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")  # noqa: E731
        try:
            one_dnn()
        except (RuntimeError, AttributeError):
            return products
        products.append(one_dnn)
    return products


def _best_seconds(call: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
