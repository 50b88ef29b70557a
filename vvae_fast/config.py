"""The only reader of environment variables; VVAE_FAST_* are read once, when the package is imported.

VVAE_FAST_BACKEND: the backend used where neither `backend=` nor `use_backend` names one ("auto" or unset: the fastest).
VVAE_FAST_ISA: the instruction set of the CPU kernels ("avx512", "avx2", "baseline"; unset: the widest that runs here).
LOCAL_RANK, LOCAL_WORLD_SIZE: torchrun's own; which of how many processes of this machine this is, read when asked for.
TRITON_INTERPRET: Triton's own; "1" runs the kernels of the Triton backend on the CPU, in Python and in one thread.
"""

import os


def backend() -> str:
    """The backend that the environment asks for; "auto" when it asks for none."""
    return os.environ.get("VVAE_FAST_BACKEND", "") or "auto"


def isa() -> str | None:
    """The instruction set that the environment asks for, or None."""
    return os.environ.get("VVAE_FAST_ISA", "") or None


def triton_interprets() -> bool:
    """Whether Triton interprets its kernels, in which case they take tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def local_rank() -> int:
    """The number of this process among those that torchrun started on this machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_processes() -> int:
    """How many processes torchrun started on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
