"""The Triton kernels: a file for each form and pass, kernel and launcher. The first call imports them, and Triton.

`planar.py` has the operators and chooses the form, `_heuristics.py` the blocks and warps.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from vvae_fast import config, ops
from vvae_fast.kernels import _heuristics, launch
from vvae_fast.shapes import Formulas, Problem

interpreted = config.triton_interprets()
_installed = importlib.util.find_spec("triton") is not None


def version() -> str | None:
    """Triton's, without importing it; None where it is not installed under one of its names."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def unavailable() -> list[str]:
    """Why the kernels cannot run on this machine."""
    if not _installed:
        return ["Triton is not installed: PyTorch's builds for GPUs bring it, or `pip install 'triton>=3.6'`"]
    if interpreted or torch.cuda.is_initialized() or torch.cuda.is_available():
        return []
    return ["PyTorch sees no GPU here (TRITON_INTERPRET=1 runs the kernels on the CPU, for debugging)"]


def unsupported(problem: Problem) -> list[str]:
    """Why the kernels, where they can run, cannot run this problem."""
    reasons = []
    if problem.device_type != "cuda" and not (interpreted and problem.device_type == "cpu"):
        reasons.append(f"the triton backend runs on cuda tensors, got {problem.device_type}")
    most = _heuristics.most_direct_dim(problem.compute_dtype)
    if problem.dim > most and problem.inverse:
        reasons.append(f"the triton backend inverts D up to {most}, got {problem.dim}")
    elif problem.dim > most and not launch.BARRIER_ORDERS_MEMORY:
        reasons.append(f"on AMD's GPUs the triton backend runs D up to {most}, got {problem.dim}")
    return reasons


@functools.cache
def _planar() -> ModuleType:
    from vvae_fast.kernels import planar

    return planar


_DEVICES = ("cuda", "cpu") if interpreted else ("cuda",)


_formulas_of = functools.lru_cache(256)(Formulas.of_numbers)


def implementation(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """What the operator of that name does: planar.py's function takes `Formulas` where an operator takes numbers."""
    names = [argument.name for argument in getattr(ops.OPERATORS["triton"], name)._schema.arguments]
    first, end = names.index("constraint"), names.index("save" if "save" in names else "params")

    def implement(*args) -> tuple[Tensor, ...]:
        return getattr(_planar(), name)(*args[:first], _formulas_of(*args[first:end]), *args[end:])

    return implement


for _name in ops.Operators._fields:
    torch.library.impl(getattr(ops.OPERATORS["triton"], _name).name(), _DEVICES, implementation(_name))
