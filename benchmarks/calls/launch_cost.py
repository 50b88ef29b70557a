"""Python's time in a call of the Triton kernels, without a GPU.

    python -m benchmarks.calls.launch_cost [--seconds 0.3]

Two stand-ins take turns. One replaces `Launch.__call__` by a function that does nothing: this times the operators and
the launchers. The other replaces the driver by one that compiles for sm_90 and runs nothing (count_variants.py): this
adds Triton's own time for a launch. The tensors are on the CPU. It prints medians in microseconds.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

sys.path += [
    str(room) for room in (Path(__file__).resolve().parents[2] / "tests").iterdir()
]  # the driver that runs nothing

os.environ.pop("TRITON_INTERPRET", None)  # nothing is interpreted here

import torch
from count_variants import fake_driver
from triton.runtime import driver

from vvae_fast.backends import operators
from vvae_fast.spec import FlowSpec
from vvae_fast.triton import planar
from vvae_fast.triton.launch import Launch

CASES = {  # rows, D, K, parameter sets
    "128 x 40, K = 80": (128, 40, 80, 1),
    "128 x 40, K = 16, amortized": (128, 40, 16, 128),
    "4,096 x 64, K = 32": (4096, 64, 32, 1),
}
BLOCK = 40  # calls in a row
NUMBERS = FlowSpec().arguments()


def calls(rows: int, dim: int, num_steps: int, num_sets: int) -> dict[str, Callable]:
    """Forward and backward as the operators call them, by their printed names."""
    sets = (num_sets,) if num_sets > 1 else ()
    z, u, b = torch.zeros(rows, dim), torch.zeros(*sets, num_steps, dim), torch.zeros(*sets, num_steps)
    forward, backward, *_ = operators.in_python(lambda: planar)
    z_K, log_det, a = forward(z, u, u, b, *NUMBERS, True)
    return {
        "forward": lambda: forward(z, u, u, b, *NUMBERS, True),
        "backward": lambda: backward(z_K, log_det, z, u, u, b, a, *NUMBERS, True),
        "backward, frozen": lambda: backward(z_K, log_det, z, u, u, b, a, *NUMBERS, False),
    }


def nothing(*args) -> None:
    pass


def nothing_launched() -> AbstractContextManager:
    return mock.patch.object(Launch, "__call__", nothing)


def microseconds(call: Callable) -> float:
    start = time.thread_time()
    for _ in range(BLOCK):
        call()
    return 1e6 * (time.thread_time() - start) / BLOCK


def measure(call: Callable, seconds: float) -> tuple[float, float]:
    """The medians without launches, and with it on the driver that runs nothing."""
    call()  # compiles
    times, end = ([], []), time.perf_counter() + seconds
    while not times[0] or time.perf_counter() < end:
        with nothing_launched():
            times[0].append(microseconds(call))
        times[1].append(microseconds(call))
    return statistics.median(times[0]), statistics.median(times[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Python's microseconds of a call of the Triton kernels.")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each line")
    seconds = parser.parse_args(arguments).seconds
    torch.set_num_threads(1)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # from here on malloc keeps what is freed, as in measure.py
    driver.set_active(fake_driver())
    print(f"{'':48s} {'our own':>8s} {'+ Triton':>8s}")
    for name, case in CASES.items():
        for pass_, call in calls(*case).items():
            ours, all_of_it = measure(call, seconds)
            print(f"{name + ', ' + pass_:48s} {ours:8.1f} {all_of_it:8.1f}", flush=True)


if __name__ == "__main__":
    main()
