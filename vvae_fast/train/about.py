"""What is installed, and which backends are available: `vvae-fast info`, and a check before each command."""

from __future__ import annotations

from typing import Any

import vvae_fast
from vvae_fast import backends
from vvae_fast.backends import selection
from vvae_fast.train.base.files import RunError


def print_info() -> None:
    """Prints `vvae_fast.info()`, one line for each key and each backend."""
    info = vvae_fast.info()
    available, node = info.pop("backends"), info.pop("node")
    for key, value in info.items():
        print(f"{key + ':':16}{_one_line(value)}")
    print(f"{'node:':16}{_available(node)}")
    print("backends:")
    for name, backend in available.items():
        print(f"  {name + ':':14}{_available(backend)}")


def _available(state: dict[str, Any]) -> str:
    return "available" if state["available"] else "; ".join(state["reasons"])


def _one_line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_backend() -> None:
    """Raises RunError, with the reasons, if VVAE_FAST_BACKEND names a backend that cannot run."""
    try:
        backends.check_name(selection.environment_name, "the backend")
        with vvae_fast.use_backend(selection.environment_name):
            pass
    except (ValueError, RuntimeError) as error:
        raise RunError(f"VVAE_FAST_BACKEND: {error}; unset it or choose another") from error
