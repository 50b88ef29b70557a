"""How a backend is chosen. One that is asked for by name works or raises."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vvae_fast import config, node
from vvae_fast import triton as kernels
from vvae_fast._version import __version__
from vvae_fast.backends import cpp, cuda, gpu_choice
from vvae_fast.backends.base import Backend
from vvae_fast.backends.cpp import CPP
from vvae_fast.backends.cuda import CUDA
from vvae_fast.backends.reference import REFERENCE
from vvae_fast.backends.triton import TRITON
from vvae_fast.shapes import Problem

AUTO = "auto"
environment_name = config.backend()  # where neither backend= nor use_backend names one


_BACKENDS = {backend.name: backend for backend in (CPP, TRITON, CUDA, REFERENCE)}
NAMES = tuple(_BACKENDS)  # the order in which "auto" asks, after what measurements prefer


class _Override(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None  # an attribute of the instance: torch.compile guards no other


_override = _Override()


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Inside the `with` block every flow of this thread that has no `backend=` of its own runs on the backend `name`.

    Raises ValueError for an unknown name and RuntimeError, with the reasons, for a backend that cannot run here.
    """
    check_name(name, "use_backend's name")
    if name != AUTO:
        _require(_BACKENDS[name], _BACKENDS[name].unavailable())
    return _overriding(name)


def check_name(name: str, source: str = "backend") -> None:
    """Raises ValueError if `name`, which `source` gave, is neither a backend nor "auto"."""
    if not isinstance(name, str) or name not in (*NAMES, AUTO):
        raise ValueError(f"{source} must be one of {(*NAMES, AUTO)}, got {name!r}")


@contextlib.contextmanager
def _overriding(name: str) -> Iterator[None]:
    previous, _override.name = _override.name, name
    try:
        yield
    finally:
        _override.name = previous


def needs_plain_torch() -> bool:
    """Whether only plain torch operations serve: torch.func and forward-mode AD transform no others, and traces for
    TorchScript and ONNX take no others along."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
    )


def select(problem: Problem, name: str | None) -> Backend:
    """The backend that runs `problem`: `name`, else `use_backend`'s, else the environment's, else the fastest; and the
    reference in the place of any other where plain torch operations have to serve.

    Raises ValueError for an unknown name and RuntimeError, with the reasons, where the one asked for cannot run it.
    """
    name = _asked_for(name)
    if name == AUTO:
        chosen = _fastest(problem)
    else:
        chosen = _BACKENDS[name]
        _require(chosen, _reasons(chosen, problem))
    return REFERENCE if needs_plain_torch() else chosen


def select_sylvester(z: Tensor, units: int, dtype: torch.dtype, name: str | None) -> Backend:
    """The backend of a Sylvester flow of `units` units, computed in `dtype`: the C++ kernels on the CPU, the Triton
    kernels on a GPU, and matrix products in plain PyTorch elsewhere.

    Raises as `select` does, also for the backends that have no kernel of it.
    """
    name, dim, device = _asked_for(name), z.shape[-1], z.device.type
    reasons: dict[str, Callable[[], list[str]]] = {
        "cpp": lambda: CPP.unavailable() + cpp.not_on(device),
        "triton": lambda: TRITON.unavailable() or kernels.unsupported_sylvester(dim, units, dtype, device),
        "cuda": lambda: [*CUDA.unavailable(), "cuda has no kernels of Sylvester flows"],
        "reference": lambda: [],
    }
    if name == AUTO:
        fused = {"cpu": CPP, "cuda": TRITON}.get(device, REFERENCE)
        chosen = REFERENCE if reasons[fused.name]() else fused
        if chosen is REFERENCE and device == "cpu" and not torch.compiler.is_compiling():
            _warn_once()
    else:
        chosen = _BACKENDS[name]
        _require(chosen, reasons[name]())
    return REFERENCE if needs_plain_torch() else chosen


def _asked_for(name: str | None) -> str:
    """`name`, else `use_backend`'s, else the environment's. Raises ValueError for an unknown one."""
    source = "backend"
    if name is None:
        name, source = _override.name, "use_backend's name"
    if name is None:
        name, source = environment_name, "the environment variable VVAE_FAST_BACKEND"
    check_name(name, source)
    return name


def select_ordinary(
    z: Tensor, u: Tensor, name: str | None, inverse: bool = False, num_steps: int | None = None
) -> Backend:
    """`select` for an ordinary call with unchecked arguments; u may be packed, if the number of steps is given."""
    if z.is_cpu and not cpp.load_error:
        asked = name if name is not None else environment_name if _override.name is None else _override.name
        if asked in (AUTO, CPP.name):  # nearly every call
            return _BACKENDS[CPP.name]
    (rows, dim), amortized = z.shape, num_steps is not None or u.ndim == 3
    steps, sets = u.shape[-2] if num_steps is None else num_steps, rows if amortized else 1
    return select(Problem(rows, dim, steps, sets, amortized, z.dtype, z.device.type, inverse), name)


def info() -> dict[str, Any]:
    """Every backend, whether it is available and if not why, the same of the autograd nodes in C++, the build facts of
    the extensions, and the versions."""
    backends = {b.name: {"available": not b.unavailable(), "reasons": b.unavailable()} for b in _BACKENDS.values()}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "triton_version": kernels.version(),
        "backends": backends,
        "node": {"available": node.load_error is None, "reasons": [node.load_error] if node.load_error else []},
        "build": cpp.build_facts(),
        "build_cuda": cuda.build_facts(),
        "isa": cpp.isa(),
        "isa_levels": list(cpp.isa_levels()),
    }


def _fastest(problem: Problem) -> Backend:
    """The first of the backends that can run the problem, after the one that was measured to be faster on GPUs."""
    for name in (gpu_choice.preferred(problem), *NAMES) if problem.device_type == "cuda" else NAMES:
        backend = _BACKENDS[name]
        if backend.is_automatic(problem) and not _reasons(backend, problem):
            break
    if backend is REFERENCE and problem.device_type == "cpu" and not torch.compiler.is_compiling():
        _warn_once()
    return backend


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"planar flows run on the slow reference: {cpp.load_error}", RuntimeWarning, stacklevel=6)


def _reasons(backend: Backend, problem: Problem) -> list[str]:
    return backend.unavailable() or backend.unsupported(problem)


def _require(backend: Backend, reasons: list[str]) -> None:
    if reasons:
        raise RuntimeError(f"the backend {backend.name!r} was asked for and cannot run: {'; '.join(reasons)}")
