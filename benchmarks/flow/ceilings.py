"""The rates that no kernel can beat: of copying z, and of a large matrix product. Both are measured in the same run."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Bytes. A smaller copy would time the dispatcher or, on a GPU, the launch, which makes the ratio to the floor too good.
SMALLEST_COPY = {"cpu": 64 * 1024, "cuda": 512 * 1024**2}


def copy_source(z: Tensor) -> Tensor:
    """The tensor that the copy ceiling of a case clones: its z [B, D], repeated up to SMALLEST_COPY bytes."""
    return z.detach().repeat(max(1, -(-SMALLEST_COPY[z.device.type] // z.nbytes)), 1)


def matrix_product_rates(
    dtype: torch.dtype, device: torch.device, repeats: int = 10, size: int | None = None
) -> dict[str, float]:
    """flops/s of large matrix products, by the unit that computes them: the best of all calls, for a strict floor.

    Three products in TF32 make one in float32 on a GPU's tensor cores, so that unit's rate is a third of TF32's.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    x, y = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    work = 2 * size**3

    def rate() -> float:
        return work / min(_best_seconds(product, repeats, device) for product in _products(x, y))

    rates = {str(dtype).removeprefix("torch."): rate()}
    if device.type == "cuda" and dtype == torch.float32:
        with _tf32():
            rates["tf32 / 3"] = rate() / 3
    return rates


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        yield
    except RuntimeError:  # if PyTorch rejects the setting, only this rate is missing
        return
    finally:
        settings.fp32_precision = before


def _products(x: Tensor, y: Tensor) -> list[Callable[[], Tensor]]:
    products = [lambda: torch.mm(x, y)]
    if x.device.type == "cpu":  # oneDNN is twice as fast as MKL on some CPUs; some dtypes and builds lack it
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
