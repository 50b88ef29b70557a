"""What a fresh process pays for memory: python -m benchmarks.calls.page_faults [rounds]

glibc gives a large block back to the system when it is freed, and every page of the next one is a page fault. It stops
when a larger block has been freed once. So a process that only trains is slower than one that has loaded data, or than
`make bench`, which frees a block first (`settle_allocator`). Here each contestant trains in processes of its own, two
threads, B = 100, fused Adam, in turn as they start and after one freed block. Printed are medians over the processes.
"""

import resource
import statistics
import subprocess
import sys

import torch

from benchmarks.flow.bench_training import GROUPS, flows, make_data, make_model, step_of
from benchmarks.flow.measure import seconds_of, settle_allocator

HEADS = (" rank 32", " rank 128", "")
NAMES = ("vanilla", *(f"vvae_fast cpp amortized K={k}{head}" for k in (16, 80) for head in HEADS))
WARM_UP, STEPS = 50, 200
FRESH, SETTLED = "fresh", "settled"


def train(name: str) -> tuple[float, float]:
    """Median seconds and mean page faults of a step, in this process. Unlike `training_step` it checks nothing first,
    which would free blocks."""
    torch.set_num_threads(2)
    device = torch.device("cpu")
    step = step_of(make_model(flows(["cpp"])[name], device), make_data(device), GROUPS[-1])
    for _ in range(WARM_UP):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = statistics.median(seconds_of(step) for _ in range(STEPS))
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / STEPS


def in_a_process(name: str, state: str) -> tuple[float, float]:
    """`train` in a new process, which is in that state."""
    command = [sys.executable, "-m", "benchmarks.calls.page_faults", name, state]
    seconds, faults = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(seconds), float(faults)


def compare(rounds: int) -> None:
    print(f"torch {torch.__version__}; a step in a fresh process, in one that has freed a block, and the ratio")
    for name in NAMES:
        kept: dict[str, list[tuple[float, float]]] = {FRESH: [], SETTLED: []}
        for _ in range(rounds):
            for state, seen in kept.items():
                seen.append(in_a_process(name, state))
        (fresh, faults), (settled, left) = (map(statistics.median, zip(*seen, strict=True)) for seen in kept.values())
        times = f"{1e3 * fresh:.2f} ms, {faults:.0f} page faults; {1e3 * settled:.2f} ms, {left:.0f}"
        print(f"  {name.removeprefix('vvae_fast cpp ')}: {times}; {fresh / settled:.2f}x", flush=True)


def main() -> None:
    if len(sys.argv) > 2:
        if sys.argv[2] == SETTLED:
            settle_allocator()
        print(*train(sys.argv[1]))
    else:
        compare(int(sys.argv[1]) if len(sys.argv) > 1 else 5)


if __name__ == "__main__":
    main()
