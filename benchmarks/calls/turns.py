"""Contestants that take turns, with a block of calls each: what the machine does meanwhile, it does to all."""

import contextlib
import gc
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from benchmarks.flow.measure import calls_of_block, seconds_of, settle_allocator

Contexts = Mapping[str, Callable[[], AbstractContextManager[object]]]


def quiet(threads: int = 1) -> None:
    """One process, its threads, no garbage collection in the middle of a call."""
    torch.set_num_threads(threads)
    gc.disable()
    settle_allocator()


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    block_seconds: float = 0.05,
    contexts: Contexts | None = None,
) -> dict[str, list[float]]:
    """Of each contestant the median call of each round's block, in seconds, without the rounds that warm up. Its block
    runs in its context, where it has one."""
    counts = {name: calls_of_block(block_seconds, min(map(seconds_of, 2 * [call]))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + rounds):
        for name, call in calls.items():
            with (contexts or {}).get(name, contextlib.nullcontext)():
                times[name].append(statistics.median(seconds_of(call) for _ in range(counts[name])))
    return {name: kept[warm_up:] for name, kept in times.items()}


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of a round's ratio."""
    return statistics.median(t / other for t, other in zip(times[name], times[to], strict=True))
