"""The Triton kernels: a file for each form and pass, kernel and launcher. The first call imports them, and Triton.

`planar.py` has the operators and chooses the form, `_heuristics.py` the blocks and warps.
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
def find_planar() -> ModuleType:
    """planar.py, which has the operators."""
    return importlib.import_module("vvae_fast.triton.planar")
