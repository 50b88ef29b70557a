"""What every launcher shares: the device a kernel runs on, and strides."""

import torch
from torch import Tensor

AMD = torch.version.hip is not None
BARRIER_ORDERS_MEMORY = not AMD  # Triton's barrier waits for stores to memory on NVIDIA's GPUs, not on AMD's


def launch(kernel, programs: tuple[int, ...], like: Tensor, *args, num_warps: int, capped: bool = False) -> None:
    """Runs `programs` of `kernel` on like's device, which need not be the current one, and on its current stream."""
    chosen = options(num_warps, capped)
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):  # Triton launches on the current device
            kernel[programs](*args, **chosen)
    else:
        kernel[programs](*args, **chosen)


def options(num_warps: int, capped: bool) -> dict[str, object]:
    """What the compiler is told, beside the arguments. `capped` states the cap on registers that holds anyway: ptxas,
    which otherwise makes room for more warps, then spills none of a kernel that comes near."""
    chosen = {"num_warps": num_warps, "enable_fp_fusion": True}
    return chosen | {"maxnreg": min(255, 2048 // num_warps)} if capped and not AMD else chosen


def set_strides(t: Tensor, num_dims: int) -> tuple[int, ...]:
    """(set, step, d) strides of u or w [K, D] or [P, K, D], (set, step) of b [K] or [P, K], with num_dims 3 and 2. One
    set alone has no stride: kernels are compiled for their strides, and that one may be a multiple of K."""
    if t.dim() < num_dims:
        return (0, *t.stride())
    return t.stride() if t.shape[0] > 1 else (0, *t.stride()[1:])


def unit_columns(t: Tensor) -> Tensor:
    """t, copied where its last stride is neither 0 nor 1: kernels are compiled for their strides, and such a one may be
    the batch size."""
    if t.shape[-1] == 1:
        return t.as_strided(t.shape, (*t.stride()[:-1], 1))
    return t if t.stride(-1) in (0, 1) else t.contiguous()


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)
