"""Contestants that take turns, with a block of calls each: what the machine does meanwhile, it does to all."""

import gc
import statistics
from collections.abc import Callable

import torch

from benchmarks.flow.measure import calls_of_block, seconds_of, settle_allocator

BLOCK_SECONDS = 0.05
WARM_UP = 1  # round


def quiet(threads: int = 1) -> None:
    """One process, its threads, no garbage collection in the middle of a call."""
    torch.set_num_threads(threads)
    gc.disable()
    settle_allocator()


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Of each contestant the median call of each round's block, in milliseconds."""
    counts = {name: calls_of_block(BLOCK_SECONDS, min(map(seconds_of, 2 * [call]))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + rounds):
        for name, call in calls.items():
            times[name].append(1e3 * statistics.median(seconds_of(call) for _ in range(counts[name])))
    return {name: kept[WARM_UP:] for name, kept in times.items()}


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of a round's ratio."""
    return statistics.median(t / other for t, other in zip(times[name], times[to], strict=True))
