"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import a module of the extra ``[train]``.

    Raises:
        ModuleNotFoundError: it is not installed; the message is the one-line remedy.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # installed, but one of its own dependencies is missing
        raise ModuleNotFoundError(
            f"'{module}' is not installed; run: pip install 'vvae_fast[train]'", name=error.name
        ) from error
