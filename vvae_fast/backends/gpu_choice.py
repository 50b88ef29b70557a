"""Which of the backends for a GPU goes first, from the measurements in `_measured.py`: by the class of the shape, and
where that was not measured, by the nearest class that was."""

import functools
import math

import torch

from vvae_fast.backends import _measured
from vvae_fast.shapes import Problem

# The ends of the classes; what is larger than the last is in the last.
DIMS = (2, 8, 16, 32, 64, 128, 256, 512, 1024)
STEPS = (8, 32, 128)
ROWS = (128, 1024, 8192, 65536, 524288)
UNMEASURED = "triton"


def preferred(problem: Problem) -> str:
    """The backend that is faster on problems like this one."""
    if not _measured.FASTER:
        return UNMEASURED
    parameters = "amortized" if problem.amortized else "shared"
    # torch.compile warns of a cache that it traces through, and asks once only
    look_up = nearest.__wrapped__ if torch.compiler.is_compiling() else nearest
    return look_up(parameters, _end(DIMS, problem.dim), _end(STEPS, problem.num_steps), _end(ROWS, problem.rows))


def _end(ends: tuple[int, ...], size: int) -> int:
    for end in ends:
        if size <= end:
            return end
    return ends[-1]


@functools.cache
def nearest(parameters: str, dim: int, num_steps: int, rows: int) -> str:
    """What the table has for the class, or for the one with the least distance of logarithms, the first of equals."""
    least, found = math.inf, UNMEASURED
    for (kind, measured_dim, measured_steps), by_rows in _measured.FASTER.items():
        for measured_rows, name in by_rows.items():
            distance = (
                abs(math.log(measured_dim / dim))
                + abs(math.log(measured_steps / num_steps))
                + abs(math.log(measured_rows / rows))
            )
            if kind == parameters and distance < least:
                least, found = distance, name
    return found
