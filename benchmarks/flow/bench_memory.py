"""Bytes saved for the backward, and peak bytes, against K and B. Run with `make bench`."""

from benchmarks.flow.cases import GPU_MEMORY_CASES, MEMORY_CASES
from benchmarks.flow.measure import Block
from benchmarks.flow.memory import peak_bytes, saved_bytes


def pytest_generate_tests(metafunc):
    bench = metafunc.config.bench
    cases = bench.chosen(MEMORY_CASES, GPU_MEMORY_CASES)
    blocks = [Block(case, "memory", name, 0) for case in cases for name in bench.names(case)]
    metafunc.parametrize("block", blocks, ids=str)


def bench_memory(block, bench):
    with bench.recording(block):
        stage = bench.stage(block.group)
        saved, own = saved_bytes(bench.prepared(block))
        peak = peak_bytes(stage, bench.contestants[block.contestant])
        bench.run.memory[block.group, block.contestant] = {
            "saved_bytes": saved,
            "saved_beside_inputs_bytes": own,
            "peak_bytes": peak,
        }
