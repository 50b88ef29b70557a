"""`vvae-fast info`: what is installed, and which backends are available."""

from __future__ import annotations

from typing import Any

import vvae_fast


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
