"""The machine and the versions that a run used, as its folder records them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from vvae_fast._version import __version__
from vvae_fast.backends import selection

PACKAGES = ("torch", "lightning", "numpy", "scikit-learn")


def describe_environment(compile_mode: str | None = None) -> dict[str, object]:
    """Versions, processor, threads, the GPU if there is one, the backend of the flow, and torch.compile's mode."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "vvae_fast": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.system(),
        "processor": processor_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "backend": selection.environment_name,
        "compile": compile_mode,
    }


def processor_name() -> str:
    """The CPU's model, or else Python's name for it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
