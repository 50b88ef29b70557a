"""planar_flow, forward, backward and both, against the alternatives that a user has. Run with `make bench`."""

from benchmarks.flow.cases import GPU_CASES, PLANAR_CASES
from benchmarks.flow.measure import COPY, Block

ROUNDS, QUICK_ROUNDS, GPU_ROUNDS = 5, 3, 3
BLOCK_SECONDS, GPU_BLOCK_SECONDS = 0.06, 0.02


def pytest_generate_tests(metafunc):
    bench = metafunc.config.bench
    rounds = QUICK_ROUNDS if bench.quick else GPU_ROUNDS if bench.on_gpu else ROUNDS
    blocks = [
        Block(case, pass_, name, r)
        for case in bench.chosen(PLANAR_CASES, GPU_CASES)
        for pass_ in case.passes
        for r in range(rounds)
        for name in (COPY, *bench.names(case))
    ]
    metafunc.parametrize("block", blocks, ids=str)


def bench_planar(block, bench, benchmark):
    with bench.recording(block):
        stage = bench.stage(block.group)
        if block.contestant == COPY:
            call, setup = stage.copy_calls()
        else:
            call, setup = stage.calls(bench.prepared(block), block.pass_)
        bench.run.time_block(block, call, benchmark, setup, GPU_BLOCK_SECONDS if bench.on_gpu else BLOCK_SECONDS)
