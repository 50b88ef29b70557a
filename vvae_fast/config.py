"""The only reader of environment variables; VVAE_FAST_* are read once, when the package is imported.

VVAE_FAST_BACKEND: the backend if neither `backend=` nor `use_backend` names one ("auto" or unset: the fastest).
VVAE_FAST_ISA: the instruction set of the CPU kernels ("avx512", "avx2", "baseline"; unset: the widest that runs here).
VVAE_FAST_NODE: "0" uses the autograd nodes in Python in place of those in C++ (unset: C++ if they are available).
LOCAL_RANK, LOCAL_WORLD_SIZE: set by torchrun; the number of this process on this machine, and how many there are. They
are read at each call. A process is one of several only if all of torchrun's variables are set: see `is_launched`.
TRITON_INTERPRET: Triton's variable; "1" runs the kernels of the Triton backend on the CPU, in Python and in one thread.
"""

import os


def backend() -> str:
    """The backend that the environment names; "auto" if it names none."""
    return os.environ.get("VVAE_FAST_BACKEND", "") or "auto"


def isa() -> str | None:
    """The instruction set that the environment names, or None."""
    return os.environ.get("VVAE_FAST_ISA", "") or None


def wants_node() -> bool:
    """Whether the autograd nodes in C++ may be used."""
    return os.environ.get("VVAE_FAST_NODE", "") != "0"


def triton_interprets() -> bool:
    """Whether Triton interprets its kernels; then they take tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


# The variables that torchrun sets.
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OTHERS = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
# Lightning reads a rank from these, too, when it is imported.
OTHER_RANKS = ("SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_launched() -> bool:
    """Whether torchrun has started this process: whether all of its variables are set.

    Raises ValueError, in one line, if one of them is not a number, or if they contradict each other.
    """
    numbers = {name: _number(name) for name in (*NUMBERS, *OTHER_RANKS) if name in os.environ}
    if not all(name in os.environ for name in (*NUMBERS, *OTHERS)):
        return False
    rank, world, local_rank, local_world = (numbers[name] for name in NUMBERS)
    _number("MASTER_PORT")
    if not (rank < world and local_rank < local_world <= world and world % local_world == 0):
        came = ", ".join(f"{name}={numbers[name]}" for name in NUMBERS)
        raise ValueError(f"{came} contradict each other; start as many processes on every machine, with torchrun")
    return True


def leftovers() -> list[str]:
    """The variables, as `NAME=value`, that wrongly say that this process is one of several."""
    if is_launched():
        return []
    found = [name for name in (*NUMBERS, OTHERS[0]) if name in os.environ]
    found += [name for name in OTHER_RANKS if os.environ.get(name, "0") != "0"]
    return [f"{name}={os.environ[name]}" for name in found]


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}; unset it")
    return int(text)


def local_rank() -> int:
    """The number of this process among those that torchrun started on this machine; 0 without torchrun."""
    return int(os.environ[LOCAL_RANK]) if is_launched() else 0


def local_processes() -> int:
    """How many processes torchrun started on this machine; 1 without torchrun."""
    return int(os.environ[LOCAL_WORLD_SIZE]) if is_launched() else 1
