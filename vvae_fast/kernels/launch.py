"""What every launcher shares: plans of all that follows from the signature of a call, and the launch itself."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

AMD = torch.version.hip is not None
BARRIER_ORDERS_MEMORY = not AMD  # Triton's barrier waits for stores to memory on NVIDIA's GPUs, not on AMD's
MOST_PLANS = 256  # that a launcher keeps; what goes is made again

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
P = ParamSpec("P")
R = TypeVar("R")
_forgetting: list[Callable[[], None]] = []  # of each launcher's plans


class Launch:
    """A launch but for its tensors: `programs` of `kernel`, and the arguments that follow the tensors."""

    __slots__ = ("arguments", "kernel", "options", "programs")

    def __init__(self, kernel, programs: tuple[int, ...], *arguments, num_warps: int, capped: bool = False) -> None:
        """`capped` states the cap on registers that holds anyway: ptxas, which otherwise makes room for more warps,
        then spills none of a kernel that comes near."""
        self.kernel, self.programs, self.arguments = kernel, programs, arguments
        self.options = {"num_warps": num_warps, "enable_fp_fusion": True}
        if capped and not AMD:
            self.options["maxnreg"] = min(255, 2048 // num_warps)


def planned(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, once for equal arguments: a pure function of layouts, dtypes, the device and formulas. Threads may share
    it."""
    cached = functools.lru_cache(MOST_PLANS)(make)
    _forgetting.append(cached.cache_clear)
    return cached


def forget_plans() -> None:
    """For whoever changes what plans are made from, such as an entry of _table.py."""
    for forget in _forgetting:
        forget()


def launch(planned: Launch, *tensors: Tensor) -> None:
    """Runs the kernel on the tensors' device, which need not be the current one, and on its current stream."""
    like = tensors[0]
    if like.is_cuda and like.get_device() != torch.cuda.current_device():
        with torch.cuda.device(like.device):  # Triton launches on the current device
            planned.kernel[planned.programs](*tensors, *planned.arguments, **planned.options)
    else:
        planned.kernel[planned.programs](*tensors, *planned.arguments, **planned.options)


def layout(t: Tensor) -> Layout:
    return t.shape, t.stride()


def sizes(z: Layout, u: Layout) -> tuple[int, int, int, int]:
    """R, D, K and P of z [R, D] and u [P, K, D], or [K, D] with P = 1."""
    (rows, dim), of_u = z[0], u[0]
    return rows, dim, of_u[-2], of_u[0] if len(of_u) == 3 else 1


def set_strides(of: Layout, num_dims: int) -> tuple[int, ...]:
    """(set, step, d) strides of u or w [K, D] or [P, K, D], (set, step) of b [K] or [P, K], with num_dims 3 and 2. One
    set alone has no stride: kernels are compiled for their strides, and that one may be a multiple of K."""
    shape, stride = of
    if len(shape) < num_dims:
        return (0, *stride)
    return stride if shape[0] > 1 else (0, *stride[1:])


def unit_columns(*layouts: Layout) -> tuple[tuple[bool, ...] | None, tuple[Layout, ...]]:
    """Which tensors a kernel takes as copies, for `copied`, and the layouts that it is told: their last stride is 0 or
    1. Kernels are compiled for their strides, and any other may be the batch size."""
    copies, told = [], []
    for shape, stride in layouts:
        copies.append(shape[-1] != 1 and stride[-1] not in (0, 1))
        if copies[-1]:
            stride = torch.empty(shape, device="meta").stride()
        told.append((shape, (*stride[:-1], 1) if shape[-1] == 1 else stride))
    return tuple(copies) if any(copies) else None, tuple(told)


def copied(copies: tuple[bool, ...] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, contiguous where a plan wants copies."""
    if copies is None:
        return tensors
    return tuple(t.contiguous() if copy else t for t, copy in zip(tensors, copies, strict=True))


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)
