"""The Triton kernels: a file for each form and pass, kernel and launcher. The first call imports them, and Triton.

`planar.py` has the operators and chooses the form, `_heuristics.py` the blocks and warps.
"""

import contextlib
import importlib.metadata
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from vvae_fast import config, ops
from vvae_fast.kernels import _heuristics, launch
from vvae_fast.shapes import Problem, beyond_kernels

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
    if problem.inverse:
        reasons.append("the triton backend has no inverse, the reference has")
    most = _heuristics.most_direct_dim(problem.compute_dtype)
    if problem.dim > most and not launch.BARRIER_ORDERS_MEMORY:
        reasons.append(f"on AMD's GPUs the triton backend runs D up to {most}, got {problem.dim}")
    return reasons + beyond_kernels(problem, "triton")


def _planar() -> ModuleType:
    from vvae_fast.kernels import planar

    return planar


_DEVICES = ("cuda", "cpu") if interpreted else ("cuda",)


@torch.library.impl(ops.OPERATORS["triton"].planar_forward.name(), _DEVICES)
def _(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    constraint: int,
    activation: int,
    slope: float,
    log_det_eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _planar().planar_forward(z, u, w, b, constraint == 0, save)


@torch.library.impl(ops.OPERATORS["triton"].planar_backward.name(), _DEVICES)
def _(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    constraint: int,
    activation: int,
    slope: float,
    log_det_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _planar().planar_backward(grad_z, grad_log_det, z, u, w, b, a, constraint == 0)


@torch.library.impl(ops.OPERATORS["triton"].planar_backward_packed.name(), _DEVICES)
def _(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    packed: Tensor,
    a: Tensor,
    constraint: int,
    activation: int,
    slope: float,
    log_det_eps: float,
) -> tuple[Tensor, Tensor]:
    return _planar().planar_backward_packed(grad_z, grad_log_det, z, packed, a, constraint == 0)
