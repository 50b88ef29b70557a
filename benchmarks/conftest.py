"""The benchmark session's options and hooks.

pytest runs the blocks in the order of bench_*.py: for each case and pass, all contestants, in rounds.
"""

import math
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.flow.contestants import NO_LEAF
from benchmarks.flow.session import Bench, Progress
from benchmarks.report import report, results

MODULES = ("bench_planar", "bench_training", "bench_memory")
GPU_MODULES = (
    "bench_memory",
    "bench_training",
    "bench_planar",
)  # the longest last, since the session's time may run out


def pytest_addoption(parser):
    group = parser.getgroup("vvae_fast")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--quick", action="store_true", help="few cases and rounds, nothing compiled")
    group.addoption("--seconds", type=float, default=math.inf, help="start nothing after that many")
    group.addoption("--commit", help="of this code, where git cannot tell")
    group.addoption("--results", type=Path, default=results.FOLDER, help="folder for the results of all machines")


def pytest_configure(config):
    _probe(config.getoption("results"))
    # A warning of pytest-benchmark if a session is interrupted between two timings: all warnings are errors here.
    unused = "ignore:Benchmark fixture was not used:pytest_benchmark.logger.PytestBenchmarkWarning"
    config.addinivalue_line("filterwarnings", unused)
    config.addinivalue_line("filterwarnings", NO_LEAF)
    # Compile times are for a cold cache; inductor reads this when it first compiles.
    config.compile_cache = tempfile.mkdtemp(prefix="vvae-fast-bench-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.compile_cache
    config.bench = Bench(config.getoption("device"), config.getoption("quick"), config.getoption("seconds"))
    config.part = None
    config.complete = True  # every block of the full or the quick run


def _probe(folder: Path) -> None:
    """Fails now, and not after the measurements, if the folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise pytest.UsageError(f"cannot write results to {folder}: {error.strerror}") from error


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    if hasattr(config, "compile_cache"):
        shutil.rmtree(config.compile_cache, ignore_errors=True)
    if getattr(config, "interrupted", False):
        config.pluginmanager.get_plugin("terminalreporter").write_line(
            f"interrupted: {config.part or 'no results'} written"
        )


def pytest_collection_modifyitems(items, config):
    order = GPU_MODULES if config.bench.on_gpu else MODULES
    items.sort(key=lambda item: order.index(item.path.stem))


def pytest_deselected(items):
    if items:
        items[0].config.complete = False


def pytest_collection_finish(session):
    config = session.config
    if {item.path.stem for item in session.items} != set(MODULES):
        config.complete = False
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    progress = Progress(config.bench, reporter, partial(_write, config, "partial"))
    progress.plan(session.items)
    config.pluginmanager.register(progress)
    config.progress = progress


def pytest_report_teststatus(report):
    if report.passed or report.skipped:
        return ("skipped" if report.skipped else "passed" if report.when == "call" else ""), "", report.outcome.upper()
    return None


@pytest.fixture(scope="session")
def bench(request):
    return request.config.bench


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    config.written = None
    config.interrupted = exitstatus == pytest.ExitCode.INTERRUPTED
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and config.bench.run.timings:
        complete = config.complete and config.progress.done == len(config.progress.blocks)  # -x stops before
        kind = "partial" if not complete or config.bench.cut_short else "quick" if config.bench.quick else "full"
        config.written = _write(config, kind)


def _write(config, kind: str) -> Path:
    """Writes the measurements so far, and deletes the partial files of an earlier call."""
    bench = config.bench
    rows = results.rows(bench.run, bench.contestants)
    header = results.header(bench.run, kind, time.time() - bench.started, config.getoption("commit"))
    if config.part is not None:
        for part in (config.part, config.part.with_suffix(".csv")):
            part.unlink(missing_ok=True)
    path = results.write(results.Results(header, rows), config.getoption("results"))
    config.part = path if kind == "partial" else None
    return path


def pytest_terminal_summary(terminalreporter, config):
    if config.written is not None:
        terminalreporter.ensure_newline()
        terminalreporter.write_line(report.summary(results.read(config.written)))
        terminalreporter.write_line(f"written: {config.written} and .csv beside it")
