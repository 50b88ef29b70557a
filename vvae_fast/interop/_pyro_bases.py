"""What this package's versions of Pyro's transforms have in common: their bases, and networks of a context."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast import shapes
from vvae_fast.distributions import CachedTransform

try:  # Pyro's conditional distributions take only Pyro's own classes
    from pyro.distributions import TransformModule as ModuleBase
    from pyro.distributions.conditional import ConditionalTransformModule as ConditionalBase
except ImportError:
    ModuleBase = ConditionalBase = nn.Module  # type: ignore[misc, assignment]


class AsModule(CachedTransform, ModuleBase):
    """A transform that is also a module, for pyro.module."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    __repr__ = nn.Module.__repr__


class Conditioned(CachedTransform):
    """A transform whose parameters a function computes at every call.

    The cache sees a change of a module's parameters, buffers and mode. For any other callable nothing is cached.
    """

    nn: Callable[[Tensor], Any]
    context: Tensor

    def _sources(self) -> tuple[Tensor, ...] | None:
        if not isinstance(self.nn, torch.nn.Module):
            return None
        return self.context, *self.nn.parameters(), *self.nn.buffers()

    def _mode(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.nn.modules()) if isinstance(self.nn, torch.nn.Module) else ()

    def _shape(self, name: str, shape: torch.Size) -> torch.Size:
        return shape  # like Pyro's, which does not call nn and samples as many as there are contexts


def check_callable(nn: object, outputs: str) -> None:
    """Raises TypeError if nn cannot be called with a context."""
    if not callable(nn):
        raise TypeError(f"nn must map context to {outputs}, a module or a function, got {type(nn).__name__}")


def sizes(params: object) -> str:
    """What nn gave, for messages."""
    if isinstance(params, (tuple, list)):
        return str([tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in params])
    return type(params).__name__


def dense(input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None, outputs: list[int]) -> Any:
    """Pyro's DenseNN with outputs of these sizes, hidden layers of 10 input_dim by default."""
    from pyro.nn import DenseNN

    hidden_dims = [input_dim * 10, input_dim * 10] if hidden_dims is None else list(hidden_dims)
    for name, size in (("input_dim", input_dim), ("context_dim", context_dim)):
        shapes.check_size(name, size, 1)
    for size in hidden_dims:
        shapes.check_size("hidden_dims' sizes", size, 1)
    return DenseNN(context_dim, hidden_dims, param_dims=outputs)
