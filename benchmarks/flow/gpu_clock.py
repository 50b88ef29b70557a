"""Times of calls on a GPU: by the clock, and on the device alone.

By the clock: calls in a row, as in a training loop, from the first launch until the device has finished the last. On
the device: events around each call. Its launches are queued while the device is busy, so that no gaps between them
count, and its inputs are in no cache.
"""

import functools
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

FLUSHED = 256 * 2**20  # bytes written before a timed call on the device, to empty its caches; an H200 has 60 MB of L2
CYCLES = 2e9  # a second of the device's clock, or a little more
LONGEST_LEAD = 5e-3  # seconds; a loop of a thousand launches always fills the queue, so its gaps do count
MOST_CALLS = 50


def wall_seconds(
    call: Callable, setup: Callable | None, count: int, synchronize: Callable[[], None] | None = None
) -> float:
    """Seconds per call, of `count` in a row; the setups of all calls run before the first call."""
    synchronize = synchronize or torch.cuda.synchronize
    arguments = [setup()[0] if setup else () for _ in range(count)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call(*arguments.pop())
        synchronize()
        return (time.perf_counter() - start) / count
    finally:
        if collecting:
            gc.enable()


def device_seconds(call: Callable, setup: Callable | None, seconds: float, wall: float) -> list[float]:
    """Seconds of single calls on the device, as many as take about `seconds`; `wall` is a call's time by the clock."""
    lead = min(1.5 * wall + 50e-6, LONGEST_LEAD)
    count = int(min(MOST_CALLS, max(3, seconds / (lead + wall))))
    flushed, events = _flushed(), []
    for _ in range(count):
        arguments = setup()[0] if setup else ()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(lead * CYCLES))
        flushed.zero_()
        start.record()
        call(*arguments)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


@functools.cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
