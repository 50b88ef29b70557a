"""Interleaves the contestants in rounds and prints their ratios: the machine may drift, a round is short."""

import time
from collections import defaultdict
from statistics import median

import pytest
import torch

ROUNDS = 5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # The round is the slowest index: all contestants of a case, then all of them again.
    if "round_number" in metafunc.fixturenames:
        metafunc.parametrize("round_number", range(ROUNDS))


@pytest.fixture
def timed(benchmark, round_number):
    """timed(group, contestant, call, base): two unrecorded calls, then a block of recorded ones."""

    def run(group: str, contestant: str, call, base: str) -> None:
        benchmark.group = group
        benchmark.extra_info.update(
            contestant=contestant,
            base=base,
            round=round_number,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        benchmark.pedantic(call, rounds=block_size(call), warmup_rounds=2)

    return run


def block_size(call) -> int:
    """Calls that take about 0.3 s together, from 5 to 200."""
    start = time.perf_counter()
    call()
    return int(min(200, max(5, 0.3 / (time.perf_counter() - start))))


def pytest_terminal_summary(terminalreporter, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    medians = defaultdict(lambda: defaultdict(dict))  # group -> contestant -> round -> seconds
    bases, notes = {}, defaultdict(set)
    for bench in session.benchmarks:
        info = bench.extra_info
        medians[bench.group][info["contestant"]][info["round"]] = bench.stats.median
        bases[bench.group] = info["base"]
        if "compile_seconds" in info:
            notes[bench.group, info["contestant"]].add(f"compiled in {info['compile_seconds']:.0f} s")
    terminalreporter.section(
        f"medians of {ROUNDS} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for group, contestants in medians.items():
        base = contestants[bases[group]]
        terminalreporter.write_line(group)
        for name, rounds in contestants.items():
            ratios = [rounds[r] / base[r] for r in rounds]
            time_and_ratio = f"{1e6 * median(rounds.values()):10.0f} us {median(ratios):8.2f} x {bases[group]}"
            note = ", ".join([f"{min(ratios):.2f} to {max(ratios):.2f}", *sorted(notes[group, name])])
            terminalreporter.write_line(f"  {name:24} {time_and_ratio} ({note})")
