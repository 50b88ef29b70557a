"""`make gpu`: builds, tests and measures on this machine's GPU, a line a step, and ends with one short table.

It takes Python's packages as they are and installs nothing. Whatever it prints, and what its steps print, is in
gpu.log beside the results, as it comes. It exits with 0 where no step failed.
"""

import argparse
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 525  # seconds for everything
BUILD, TESTS, BENCHMARKS = 150, 190, 240  # seconds at most; the benchmarks' is when they start nothing more
LAST_BLOCK = 25  # seconds kept at least for what the benchmarks have started by then
WORKERS = 8  # most of the tests' time is Triton's compiler's
# The packages are not the pinned ones: what they warn of is shown, and fails nothing.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-W", "default"]


class Missing(Exception):
    """The step needs something that is not here; the message names it."""


class Failed(Exception):
    """The step did what it should not; the message says what."""


class Steps:
    """Runs steps one after the other, whatever became of those before, and keeps a record of them."""

    def __init__(self, log: TextIO, seconds: float = TOTAL) -> None:
        self.log, self.ends = log, time.monotonic() + seconds
        self.outcomes: dict[str, str] = {}  # PASS, FAIL or "missing: ..."

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def say(self, text: str) -> None:
        """To the terminal and the log, at once: a machine that goes away leaves what it said."""
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def step(self, name: str, action: Callable[[], str | None]) -> None:
        """One line: what became of it, the seconds, and the action's note."""
        start = time.monotonic()
        try:
            outcome, note = "PASS", action()
        except Missing as missing:
            outcome, note = f"missing: {missing}", None
        except Failed as failed:
            outcome, note = "FAIL", str(failed)
        except Exception as error:
            outcome, note = "FAIL", f"{type(error).__name__}: {error}"
        self.outcomes[name] = outcome
        self.say(f"{name}: {outcome} ({time.monotonic() - start:.1f} s){f', {note}' if note else ''}")

    def command(self, arguments: list[str], limit: float, **environment: str) -> list[str]:
        """The last lines that it printed; Failed where it exits with another code than 0 or needs longer."""
        limit = min(limit, self.left)
        env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        # A session of its own, so that the workers of a command that is not done in time end with it.
        with subprocess.Popen(arguments, cwd=ROOT, env=env, start_new_session=True, **pipes) as process:
            end = functools.partial(os.killpg, process.pid, signal.SIGKILL)
            timer, lines = threading.Timer(max(limit, 0), end), []
            timer.start()
            try:
                for line in process.stdout:
                    self.say(line.rstrip("\n"))
                    lines = [*lines[-20:], line.rstrip("\n")]
                code = process.wait()
            finally:
                late = not timer.is_alive()
                timer.cancel()
                if process.poll() is None:
                    end()
        if code:
            raise Failed(f"not done in {limit:.0f} s" if late else f"exit status {code}: {lines[-1] if lines else ''}")
        return lines

    @property
    def exit_status(self) -> int:
        return int("FAIL" in self.outcomes.values())


def environment() -> str:
    """The versions; Missing where there is nothing to measure."""
    try:
        import torch
    except ImportError as error:
        raise Missing(f"PyTorch, for {sys.executable}: make gpu PYTHON=...") from error
    if not torch.cuda.is_available():
        raise Missing("PyTorch sees no GPU")
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split() or [driver])[0]
    try:
        import triton
    except ImportError as error:
        raise Missing("Triton") from error
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}"
    return f"{torch.cuda.get_device_name()}, driver {driver}, {versions}"


def nvcc() -> str:
    """The version of CUDA's compiler, which nothing here needs yet."""
    if not shutil.which("nvcc"):
        raise Missing("nvcc")
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=30).stdout
    return next(iter(re.findall(r"release \S+", printed)), printed.strip()).rstrip(",")


def build(steps: Steps) -> None:
    """The extension of the CPU backend, in place."""
    needed("pybind11", "setuptools", "ninja")
    steps.command([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD)


def needed(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Missing(module)


def tests(steps: Steps) -> str:
    """All that has the marker gpu, in several processes where pytest-xdist is there."""
    needed("pytest")
    files = sorted(str(f.relative_to(ROOT)) for name in ("gpu", "triton") for f in ROOT.glob(f"tests/test_{name}*.py"))
    command = [*PYTEST, *files, "-m", "gpu", "-v", "--durations=6"]  # a line a test: one that hangs is found
    if importlib.util.find_spec("xdist"):
        command += ["-p", "xdist", "-n", str(min(WORKERS, os.cpu_count() or 1))]
    threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    summary = steps.command(command, TESTS, **threads)[-1].strip("= ")
    if "passed" not in summary:
        raise Failed(f"nothing was tested: {summary}")
    return summary


def benchmarks(steps: Steps, folder: Path, commit: str | None) -> str:
    """The suite on the GPU; the results are written whatever became of single contestants."""
    needed("pytest", "pytest_benchmark")
    seconds = min(BENCHMARKS, steps.left - LAST_BLOCK)
    if seconds <= 0:
        raise Failed("no time is left for them")
    command = [*PYTEST, "-W", "ignore:Benchmark fixture was not used", "benchmarks", "-q", "-p", "benchmark", "-rf"]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    started = time.time()
    command += ["--benchmark-disable-gc", "--benchmark-quiet", "--device=cuda", f"--seconds={seconds:.0f}"]
    steps.command([*command, f"--results={folder}", *([f"--commit={commit}"] if commit else [])], steps.left)
    return f"{newest(folder, started)}"


def newest(folder: Path, since: float) -> Path:
    """The results that the benchmarks wrote last, not before `since`."""
    written = [path for path in folder.glob("*/*torch-*.json") if path.stat().st_mtime >= since]
    if not written:
        raise Failed("there are no results")
    return max(written, key=lambda path: path.stat().st_mtime)


def memory(folder: Path, since: float) -> str:
    """Part of the benchmarks' run: whether it has the bytes of this package in every case."""
    import results

    found = [row for row in results.read(newest(folder, since)).rows if row.pass_ == "memory" and row.role == "ours"]
    found = [row for row in found if not row.status.startswith(("not run", "missing"))]
    if not found or not all(row.saved_bytes and row.peak_bytes for row in found):
        raise Failed("the run lacks the bytes of this package")
    return ", ".join(f"{row.case} saves {row.saved_bytes / 1e6:.1f} MB" for row in found)


def table(steps: Steps, folder: Path, since: float) -> None:
    import bars
    import results

    steps.say(bars.table(results.read(newest(folder, since))))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of all machines'")
    parser.add_argument("--commit", help="`git describe --always --dirty`, where git knows nothing of these files")
    options = parser.parse_args(arguments)
    folder = options.results.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu.log").open("w") as log:
        return run(Steps(log), folder, options.commit)


def run(steps: Steps, folder: Path, commit: str | None) -> int:
    """All steps; without a GPU the first alone."""
    steps.step("environment", environment)
    if steps.outcomes["environment"] != "PASS":
        return 1
    steps.step("nvcc", nvcc)
    steps.step("build", lambda: build(steps))
    steps.step("tests", lambda: tests(steps))
    started = time.time()
    steps.step("benchmarks", lambda: benchmarks(steps, folder, commit))
    sys.path.insert(0, str(ROOT))  # the package, built in place
    steps.step("memory", lambda: memory(folder, started))
    steps.step("table", lambda: table(steps, folder, started))
    return steps.exit_status


if __name__ == "__main__":
    sys.exit(main())
