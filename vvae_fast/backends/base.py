"""What every backend is."""

from collections.abc import Callable
from dataclasses import dataclass

from vvae_fast.backends.headed import HeadedOperators
from vvae_fast.backends.operators import Operators
from vvae_fast.shapes import Problem


@dataclass(frozen=True, eq=False)  # one is equal to itself alone, and quickly hashed
class Backend:
    """Who computes a flow."""

    name: str
    operators: Operators
    unavailable: Callable[[], list[str]]  # why it cannot run on this machine
    unsupported: Callable[[Problem], list[str]]  # why it cannot run a problem
    # Whether it takes bfloat16 and float16 as they are, and converts on the way.
    takes_halves: Callable[[Problem], bool] = lambda problem: False
    is_automatic: Callable[[Problem], bool] = lambda problem: True  # whether "auto" may choose it
    # Plain PyTorch on z [*batch, D]: autograd, torch.func and traces see through it, and it checks no arguments.
    is_plain: bool = False
    headed: HeadedOperators | None = None  # of a flow together with its head
