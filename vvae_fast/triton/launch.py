"""What every launcher shares: the sizes and strides of a call, plans of all that follows from its signature, and the
launch itself."""

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from vvae_fast import shapes

AMD = torch.version.hip is not None
BARRIER_ORDERS_MEMORY = not AMD  # Triton's barrier waits for stores to memory on NVIDIA's GPUs, not on AMD's
MOST_PLANS = 256  # that a launcher keeps; what goes is made again

Tensors = tuple[Tensor, ...]
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
P = ParamSpec("P")
R = TypeVar("R")
_WITH_COLUMNS = ("grad_z", "z", "u", "w", "b")
_forgetting: list[Callable[[], None]] = []  # of each launcher's plans


class Matrix(NamedTuple):
    """The strides of a tensor [rows, columns]."""

    row: int
    col: int


class Params(NamedTuple):
    """The strides of u or w [sets, K, D], or of b [sets, K]. A single set has stride 0: its own may be a multiple of K,
    and kernels are compiled for strides."""

    set: int
    step: int
    col: int = 0

    @classmethod
    def of(cls, layout: Layout, num_dims: int) -> "Params":
        """Of a tensor that has num_dims dimensions, or one less where it has no sets."""
        shape, strides = layout
        if len(shape) < num_dims:
            return cls(0, *strides)
        return cls(strides[0] if shape[0] > 1 else 0, *strides[1:])


class Fixed(NamedTuple):
    """The sizes and strides for which a kernel is compiled; it has no strides of tensors that it does not take."""

    dim: int
    shared: bool  # one parameter set for all rows
    grad_z: Matrix | None = None
    grad_log_det: int | None = None
    z: Matrix | None = None
    u: Params | None = None
    w: Params | None = None
    b: Params | None = None
    du: Params | None = None  # of the gradients kernels take the sets' stride; the steps of a set are contiguous
    dw: Params | None = None
    db: Params | None = None


class Call:
    """The sizes and strides of a call, from the layouts of its tensors by name.

    `copies` says which of them a kernel takes as contiguous copies, None where it is none: the last stride of its
    inputs is 0 or 1, for kernels are compiled for their strides, and any other may be the batch size.
    """

    def __init__(self, layouts: dict[str, Layout], dtype: torch.dtype) -> None:
        """For `dtype` the tensors' own."""
        self.dtype = shapes.compute_dtype(dtype)
        copies, self.strides = [], {}
        for name, layout in layouts.items():
            copy, told = _unit_column(*layout) if name in _WITH_COLUMNS else (False, layout)
            copies.append(copy)
            self.strides[name] = _strides(name, told)
        self.copies = tuple(copies) if any(copies) else None
        (self.rows, self.dim), of_u = layouts["z"][0], layouts["u"][0]
        self.num_steps, self.num_sets = of_u[-2], of_u[0] if len(of_u) == 3 else 1
        self.rows_per_set, self.shared = self.rows // self.num_sets, self.num_sets == 1

    def fixed(self, *names: str) -> Fixed:
        """For a kernel that takes the tensors of these names."""
        return Fixed(self.dim, self.shared, **{name: self.strides[name] for name in names})


def _unit_column(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[bool, Layout]:
    """Whether a tensor is copied, and its layout then."""
    copy = shape[-1] != 1 and strides[-1] not in (0, 1)
    if copy:
        strides = torch.empty(shape, device="meta").stride()
    return copy, (shape, (*strides[:-1], 1) if shape[-1] == 1 else strides)


def _strides(name: str, layout: Layout) -> Matrix | Params | int:
    if name in ("z", "grad_z"):
        return Matrix(*layout[1])
    if name == "grad_log_det":
        return layout[1][0]
    return Params.of(layout, 2 if name in ("b", "db") else 3)


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

    def __call__(self, *tensors: Tensor) -> None:
        """Runs the kernel on the tensors' device, which need not be the current one, and on its current stream."""
        like = tensors[0]
        if like.is_cuda and like.get_device() != torch.cuda.current_device():
            with torch.cuda.device(like.device):  # Triton launches on the current device
                self.kernel[self.programs](*tensors, *self.arguments, **self.options)
        else:
            self.kernel[self.programs](*tensors, *self.arguments, **self.options)


def planned(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, once for equal arguments: a pure function of layouts, dtypes, the device and the spec. Threads may share
    it."""
    cached = functools.lru_cache(MOST_PLANS)(make)
    _forgetting.append(cached.cache_clear)
    return cached


def forget_plans() -> None:
    """For whoever changes what plans are made from, such as an entry of _table.py."""
    for forget in _forgetting:
        forget()


def layouts(*tensors: Tensor) -> tuple[Layout, ...]:
    return tuple([(t.shape, t.stride()) for t in tensors])


def copied(copies: tuple[bool, ...] | None, tensors: Tensors) -> Tensors:
    """The first tensors of a call, contiguous where a plan wants copies."""
    if copies is None:
        return tensors
    return tuple(t.contiguous() if copy else t for t, copy in zip(tensors, copies, strict=False))


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)
