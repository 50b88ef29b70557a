"""Times of calls on a GPU: by the clock, and on the device alone.

By the clock: calls in a row, as a training loop makes them, from the first launch until the device has done the last.
On the device: events around each call, whose launches were queued while the device was kept busy, so that no gap
between them counts, and whose inputs are in no cache.
"""

import functools
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

FLUSHED = 256 * 2**20  # bytes written before a call that is timed on the device; an H200 has 60 MB of L2
CYCLES = 2e9  # a second of the device's clock, or a little more
LONGEST_LEAD = 5e-3  # seconds; a loop of a thousand launches fills the queue whatever the lead, and its gaps do count
MOST_CALLS = 50


def wall_seconds(
    call: Callable, setup: Callable | None, count: int, synchronize: Callable[[], None] | None = None
) -> float:
    """Seconds a call, of `count` in a row; what has to be done before each of them is done before the first."""
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
    """Seconds of single calls on the device, of as many as take about `seconds`; `wall` is one by the clock."""
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
