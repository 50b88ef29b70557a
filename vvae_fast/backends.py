"""The backends, what each of them cannot do, and how one is chosen. A backend asked for by name works or raises."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from vvae_fast import _preference, config, kernels, node, ops
from vvae_fast._version import __version__
from vvae_fast.shapes import Problem

AUTO = "auto"
LEAST_CAPABILITY = (8, 0)  # of GPUs that the CUDA kernels are made for
environment_name = config.backend()  # where neither backend= nor use_backend names one


class Backend(NamedTuple):
    """`unavailable` says why it cannot run on this machine, `unsupported` why it cannot run a problem."""

    name: str
    unavailable: Callable[[], list[str]]
    unsupported: Callable[[Problem], list[str]]


def _cpp_unavailable() -> list[str]:
    return [ops.load_error] if ops.load_error else []


def _cpp_unsupported(problem: Problem) -> list[str]:
    return [] if problem.device_type == "cpu" else [f"the cpp backend runs on cpu tensors, got {problem.device_type}"]


def _cuda_unavailable() -> list[str]:
    if ops.cuda_load_error:
        return [ops.cuda_load_error]
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return ["PyTorch sees no GPU here"]
    # torch.compile cannot trace the question
    if torch.compiler.is_compiling() or _newest_capability() >= LEAST_CAPABILITY:
        return []
    wanted, got = (".".join(map(str, capability)) for capability in (LEAST_CAPABILITY, _newest_capability()))
    return [f"the CUDA kernels need a GPU of compute capability {wanted}, got {got}"]


@functools.cache
def _newest_capability() -> tuple[int, int]:
    """Of the GPUs that PyTorch sees."""
    return max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def _cuda_unsupported(problem: Problem) -> list[str]:
    reasons = []
    if problem.device_type != "cuda":
        reasons.append(f"the cuda backend runs on cuda tensors, got {problem.device_type}")
    most = ops.cuda_most_dim[problem.compute_dtype]
    if problem.dim > most:
        reasons.append(f"the cuda backend runs D up to {most}, got {problem.dim}")
    return reasons


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpp", _cpp_unavailable, _cpp_unsupported),
        Backend("triton", kernels.unavailable, kernels.unsupported),
        Backend("cuda", _cuda_unavailable, _cuda_unsupported),
        Backend("reference", lambda: [], lambda problem: []),
    )
}
NAMES = tuple(_BACKENDS)  # the order in which "auto" asks, unless measurements put cuda before triton
_CUDA_FIRST = ("cpp", "cuda", "triton", "reference")


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
    """Raises ValueError where `name`, which `source` gave, is neither a backend nor "auto"."""
    if not isinstance(name, str) or name not in (*NAMES, AUTO):
        raise ValueError(f"{source} must be one of {(*NAMES, AUTO)}, got {name!r}")


@contextlib.contextmanager
def _overriding(name: str) -> Iterator[None]:
    previous, _override.name = _override.name, name
    try:
        yield
    finally:
        _override.name = previous


def computes_halves(name: str, problem: Problem) -> bool:
    """Whether the backend takes bfloat16 and float16 as they are and converts on the way."""
    return name == "triton" or (name == "cuda" and problem.formulas.is_usual())


def select(problem: Problem, name: str | None) -> str:
    """The backend that runs `problem`: `name`, else `use_backend`'s, else the environment's, else the fastest.

    Raises ValueError for an unknown name and RuntimeError, with the reasons, where the one asked for cannot run it.
    """
    source = "backend"
    if name is None:
        name, source = _override.name, "use_backend's name"
    if name is None:
        name, source = environment_name, "the environment variable VVAE_FAST_BACKEND"
    if name == AUTO:
        cuda_first = problem.device_type == "cuda" and _preference.preferred(problem) == "cuda"
        for candidate in _CUDA_FIRST if cuda_first else NAMES:
            backend = _BACKENDS[candidate]
            interpreted = backend.name == "triton" and problem.device_type == "cpu"  # by name only
            if not interpreted and not _reasons(backend, problem):
                if backend.name == "reference" and problem.device_type == "cpu":
                    _warn_of_the_reference()
                return backend.name
    check_name(name, source)
    _require(_BACKENDS[name], _reasons(_BACKENDS[name], problem))
    return name


def is_cpp(name: str | None) -> bool:
    """Whether `select` gives "cpp" for a problem on the CPU: the question of nearly every call, asked quickly."""
    if name is None:
        name = environment_name if _override.name is None else _override.name
    return name in ("cpp", AUTO) and ops.load_error is None


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
        "build": ops.build_facts(),
        "build_cuda": ops.cuda_build_facts(),
        "isa": ops.isa(),
        "isa_levels": list(ops.isa_levels()),
    }


def _warn_of_the_reference() -> None:
    if ops.load_error and not torch.compiler.is_compiling():
        _warn_once()


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"planar flows run on the slow reference: {ops.load_error}", RuntimeWarning, stacklevel=5)


def _reasons(backend: Backend, problem: Problem) -> list[str]:
    return backend.unavailable() or backend.unsupported(problem)


def _require(backend: Backend, reasons: list[str]) -> None:
    if reasons:
        raise RuntimeError(f"the backend {backend.name!r} was asked for and cannot run: {'; '.join(reasons)}")
