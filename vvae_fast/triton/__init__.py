"""The Triton kernels: a file for each form and pass, kernel and launcher. The first call imports them, and Triton.

`planar.py` has the operators and chooses the form, `_heuristics.py` the blocks and warps. `sylvester/` has those of
Sylvester flows.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

import torch

from vvae_fast import config
from vvae_fast.shapes import Problem
from vvae_fast.triton import _heuristics, launch
from vvae_fast.triton.sylvester import sizes

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
    reasons = _not_on(problem.device_type)
    most = _heuristics.most_direct_dim(problem.compute_dtype)
    if problem.dim > most and problem.inverse:
        reasons.append(f"the triton backend inverts D up to {most}, got {problem.dim}")
    elif problem.dim > most and not launch.BARRIER_ORDERS_MEMORY:
        reasons.append(f"on AMD's GPUs the triton backend runs D up to {most}, got {problem.dim}")
    return reasons


def unsupported_sylvester(dim: int, units: int, dtype: torch.dtype, device_type: str) -> list[str]:
    """Why the kernels, where they can run, cannot run a Sylvester flow, of the dtype of computation."""
    reasons, most = _not_on(device_type), sizes.most_numbers(dtype)
    if sizes.numbers(dim, units) > most:
        name = str(dtype).removeprefix("torch.")
        reasons.append(
            f"the triton backend runs Sylvester flows whose M x D, both rounded up to powers of two, is at most {most} "
            f"in {name}, got {units} x {dim}"
        )
    return reasons


def _not_on(device_type: str) -> list[str]:
    """Why the kernels cannot run on tensors of a device."""
    if device_type == "cuda" or (interpreted and device_type == "cpu"):
        return []
    return [f"the triton backend runs on cuda tensors, got {device_type}"]


@functools.cache
def find_planar() -> ModuleType:
    """planar.py, which has the operators."""
    return importlib.import_module("vvae_fast.triton.planar")


@functools.cache
def find_sylvester() -> ModuleType:
    """sylvester/operators.py."""
    return importlib.import_module("vvae_fast.triton.sylvester.operators")
