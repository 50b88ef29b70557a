"""Training on Lightning: data, objective, module, plots and the command line (extra ``[train]``); `load_run` reads a
run's folder."""

from importlib import import_module
from typing import Any

__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    """`load_run` when it is asked for: it needs the extra, which importing the package does not."""
    if name in __all__:
        return getattr(import_module("vvae_fast.train.trained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
