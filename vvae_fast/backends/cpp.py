"""The C++ kernels for the CPU: the only loader of the extension vvae_fast._C."""

from pathlib import Path
from typing import Any

from vvae_fast import config
from vvae_fast.backends import headed, operators
from vvae_fast.backends.base import Backend
from vvae_fast.shapes import Problem

load_error: str | None = None
try:
    import vvae_fast._C as _C
except ImportError as error:
    _C = None
    load_error = (
        f"the extension vvae_fast._C did not load from {Path(__file__).parent.parent} ({error}): build it with "
        "`pip install .` after `pip install torch`, and start Python outside the source folder"
    )


def build_facts() -> dict[str, Any]:
    """How the extension was built; empty where it did not load."""
    return dict(_C.build_facts()) if _C is not None else {}


def isa_levels() -> tuple[str, ...]:
    """The instruction sets that the kernels can use on this machine, widest first."""
    return tuple(_C.isa_levels()) if _C is not None else ()


def isa() -> str | None:
    """The instruction set that the kernels use."""
    return _C.isa() if _C is not None else None


def set_isa(name: str) -> None:
    """Makes the kernels use another instruction set; ValueError if this machine or build lacks it."""
    levels = isa_levels()
    if name not in levels:
        raise ValueError(f"the instruction set must be one of {levels} on this machine, got {name!r}")
    _C.set_isa(name)


if _C is not None and (_asked_for := config.isa()) is not None:
    try:
        set_isa(_asked_for)
    except ValueError as error:
        load_error = f"VVAE_FAST_ISA: {error}"


def _unavailable() -> list[str]:
    return [load_error] if load_error else []


def not_on(device_type: str) -> list[str]:
    """Why the kernels cannot run on tensors of a device."""
    return [] if device_type == "cpu" else [f"the cpp backend runs on cpu tensors, got {device_type}"]


def _unsupported(problem: Problem) -> list[str]:
    return not_on(problem.device_type)


CPP = Backend("cpp", operators.OPERATORS["cpp"], _unavailable, _unsupported, headed=headed.OPERATORS)
