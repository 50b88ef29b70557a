"""The CUDA kernels: the only loader of the extension vvae_fast._C_cuda."""

import functools
from types import ModuleType
from typing import Any

import torch

from vvae_fast.backends import cpp, operators
from vvae_fast.backends.base import Backend
from vvae_fast.shapes import Problem

LEAST_CAPABILITY = (8, 0)  # of GPUs that the kernels are made for


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none."""
    if torch.version.cuda is None:  # a torch without CUDA, or for AMD's GPUs, lacks the libraries that it is linked to
        return None, f"PyTorch {torch.__version__} is not built for CUDA{', but for ROCm' if torch.version.hip else ''}"
    built = cpp.build_facts().get("cuda_build", "built")
    if built != "built":
        return None, f"the extension vvae_fast._C_cuda was {built} (FORCE_CUDA=1 pip install . says what to do)"
    try:
        import vvae_fast._C_cuda as _C_cuda

        _C_cuda.most_dim("float32")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # one that an older build left, too
        return None, f"the extension vvae_fast._C_cuda did not load ({error}): build it again with `pip install .`"
    return _C_cuda, None


_C_cuda, load_error = _load()
# The most columns that the kernels take, by the dtype of computation. Asked once: torch.compile sees through no call of
# the extension.
most_dim = (
    {dtype: _C_cuda.most_dim(str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.float64)}
    if _C_cuda is not None
    else {}
)


def build_facts() -> dict[str, Any]:
    """How the extension was built; empty where it did not load."""
    return dict(_C_cuda.build_facts()) if _C_cuda is not None else {}


def set_form(name: str) -> None:
    """Makes the kernels take the form "direct" or "compact", or the one that the shape chooses, "automatic"."""
    if _C_cuda is None:
        raise RuntimeError(f"the CUDA kernels are not there to take the form {name!r}: {load_error}")
    _C_cuda.set_form(name)


def _unavailable() -> list[str]:
    if load_error:
        return [load_error]
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


def _unsupported(problem: Problem) -> list[str]:
    reasons = []
    if problem.device_type != "cuda":
        reasons.append(f"the cuda backend runs on cuda tensors, got {problem.device_type}")
    most = most_dim[problem.compute_dtype]
    if problem.dim > most:
        reasons.append(f"the cuda backend runs D up to {most}, got {problem.dim}")
    return reasons


def _takes_halves(problem: Problem) -> bool:
    constraint, activation, _, log_det_eps = problem.spec
    usual = activation == "tanh" and constraint != "log_softplus" and log_det_eps == 0
    return usual and not problem.inverse


CUDA = Backend("cuda", operators.OPERATORS["cuda"], _unavailable, _unsupported, _takes_halves)
