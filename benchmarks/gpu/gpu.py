"""`make gpu`: builds, tests and measures on this machine's GPU, one line for each step; docs/gpu.md explains the lines.

    python -m benchmarks.gpu.gpu [test | bench | sanitize | tune ...] [--results FOLDER] [--commit TEXT]

A single target takes under 9 minutes; without a name all targets run in turn. It uses the installed packages and
installs nothing. The output of a target and its steps goes at once to gpu-<target>.log beside the results. The exit
status is 0 if no step failed.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import prebuilt
from benchmarks.gpu.gpu_steps import GRACE, ROOT, Failed, Missing, Steps, end_with_what_runs, toolkit

# Limits in seconds; a step without a number gets the rest of its target's time.
BUILD, SMOKE, TESTS, FAULT, SANITIZED = 130, 60, 260, 40, 150
LAST_BLOCK = 25  # seconds kept for the block that runs when the benchmarks' time is up
TABLE = 5  # seconds kept for the table of their results
SETUPTOOLS = 77  # the oldest major version that reads pyproject.toml
WORKERS = 14  # most of the tests' time is Triton's compiler's
# The packages are not the pinned ones, so their warnings are shown and are not errors.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-W", "default"]


def environment() -> str:
    """The versions; raises Missing if there is nothing to measure."""
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
    """The version of CUDA's compiler, which builds the cuda backend."""
    program = toolkit("nvcc")
    if not program:
        raise Missing("nvcc")
    printed = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout
    return next(iter(re.findall(r"release \S+", printed)), printed.strip()).rstrip(",")


def build(steps: Steps) -> str:
    """Uses the prebuilt extensions if they fit, else builds new ones in place. With nvcc that includes the cuda
    backend's, only for this GPU, which takes less time."""
    misfit = prebuilt.misfit(architecture())
    if misfit is None:
        misfit = cuda_reasons(steps)
        if not misfit:
            return f"prebuilt, with the backend cuda for {architecture()}"
        cuda_reasons.cache_clear()
    return f"{built(steps)}; not the prebuilt ones: {misfit}"


def built(steps: Steps) -> str:
    needed("pybind11", "setuptools", "ninja")
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < SETUPTOOLS:
        raise Missing(f"setuptools {SETUPTOOLS} or newer, which pyproject.toml is written for, got {version}")
    if not toolkit("nvcc"):
        steps.command([*prebuilt.BUILD], BUILD)
        return "without the backend cuda: there is no nvcc"
    steps.command([*prebuilt.BUILD], BUILD, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture())
    if reasons := cuda_reasons(steps):
        raise Failed(f"the backend cuda was built and cannot run: {reasons}")
    prebuilt.write(architecture())
    return f"with the backend cuda for {architecture()}"


def architecture() -> str:
    """The compute capability of the visible GPU, such as "9.0"."""
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability())


@functools.cache
def cuda_reasons(steps: Steps) -> str:
    """Why the cuda backend cannot run, empty if it can. A new process finds out, since it loads the new extensions."""
    ask = "import vvae_fast; print('cuda:', '; '.join(vvae_fast.info()['backends']['cuda']['reasons']))"
    return steps.command([sys.executable, "-c", ask], 60)[-1].removeprefix("cuda:").strip()


def needed(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Missing(module)


def smoke(steps: Steps) -> str:
    """Runs each kernel of the cuda backend once: this finds in seconds those that cannot run at all."""
    if reasons := cuda_reasons(steps):
        raise Missing(f"the backend cuda: {reasons}")
    return steps.command([sys.executable, "-m", "benchmarks.gpu.sanitize"], SMOKE)[-1]


def tests(steps: Steps) -> str:
    """Runs all tests with the marker gpu, in several processes if pytest-xdist is installed."""
    needed("pytest")
    files = sorted(
        str(f.relative_to(ROOT)) for name in ("gpu", "triton") for f in ROOT.glob(f"tests/*/test_{name}*.py")
    )
    command = [*PYTEST, *files, "-m", "gpu", "-v", "--durations=6"]  # a line for each test, to find one that hangs
    if importlib.util.find_spec("xdist"):
        command += ["-p", "xdist", "-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    summary = steps.command(command, TESTS, **threads)[-1].strip("= ")
    if "passed" not in summary:
        raise Failed(f"nothing was tested: {summary}")
    return summary


# Messages of compute-sanitizer when it checked nothing, because the device, the driver or the container prevents it.
NOT_LOOKED = (
    *("not supported", "Internal Sanitizer Error", "No attachable process", "before first instrumented API call"),
    *("Failed to", "Unable to", "nsufficient p"),
)


def sanitizer(steps: Steps) -> str:
    """Runs compute-sanitizer on a small problem of each kernel of the cuda backend. First it must find a deliberate
    read
    past the end, since a sanitizer that checks nothing finds nothing."""
    program = toolkit("compute-sanitizer")
    if not program:
        raise Missing("compute-sanitizer")
    if reasons := cuda_reasons(steps):
        raise Missing(f"the backend cuda: {reasons}")
    found, first, _ = sanitized(steps, program, "memcheck", FAULT, "--fault")
    if not found:
        raise Missing(f"compute-sanitizer: {program} finds no error where one is")
    notes = []
    for tool in ("memcheck", "racecheck"):
        found, first, done = sanitized(steps, program, tool, SANITIZED)
        if found:
            raise Failed(f"{tool} finds {found}, the first: {first}")
        notes.append(f"{tool} finds nothing in {done}")
    return ", ".join(notes)


def sanitized(steps: Steps, program: str, tool: str, limit: float, *options: str) -> tuple[int, str, str]:
    """The number of errors that a tool found, the first error, and "N of M cases" that ran. Raises Missing, with the
    tool's message, if it checked nothing."""
    # API errors are ignored: PyTorch provokes and handles some.
    command = [program, "--tool", tool, "--kernel-name", "kns=vvae", "--report-api-errors", "no", "--print-limit", "10"]
    command += [sys.executable, "-m", "benchmarks.gpu.sanitize", f"--seconds={0.6 * limit:.0f}", *options]
    late = None
    try:  # a separate allocation for each tensor, so that its end is also the end of the allocation
        lines = steps.command(command, limit, kept=1000, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except Failed as failed:
        lines = failed.lines
        late = str(failed) if str(failed).startswith("not done") else None
    said = [line.strip("= ") for line in lines if line.startswith("=========")]
    said = [line for line in said if line and line != "COMPUTE-SANITIZER"]
    for line in said:
        if any(words in line for words in NOT_LOOKED):
            raise Missing(f"compute-sanitizer: {line}")
    counted = [int(count) for line in said for count in re.findall(r"SUMMARY: (\d+)", line)]
    if not counted:
        raise Missing(f"compute-sanitizer: {late or 'it printed no summary'}: {lines[-1] if lines else ''}")
    done = re.findall(r"^sanitized (\d+ of \d+ cases)", "\n".join(lines), flags=re.MULTILINE)
    if not done and not sum(counted):
        raise Failed(f"{tool}: the cases ended early: {next((x for x in lines[::-1] if not x.startswith('===')), '')}")
    return sum(counted), said[0], "".join(done)


def backends(steps: Steps, folder: Path) -> str:
    """Times the cuda backend against the Triton backend by shape, into a file beside the results."""
    if reasons := cuda_reasons(steps):
        raise Missing(f"the backend cuda: {reasons}")
    file = folder / "_measured.py"
    file.unlink(missing_ok=True)  # from an earlier run
    limit = steps.left - GRACE
    # A shape for which Triton compiles takes seconds, and so does the start.
    command = [sys.executable, "-m", "benchmarks.gpu.tune_backends", f"--write={file}", f"--seconds={limit - 20:.0f}"]
    steps.command(command, limit)
    if not file.exists():
        raise Failed("no shape was measured")
    return f"{file}, to be committed as vvae_fast/backends/_measured.py"


def benchmarks(steps: Steps, folder: Path, commit: str | None) -> str:
    """Runs the suite on the GPU; the results are written even if single contestants fail."""
    needed("pytest", "pytest_benchmark")
    seconds = steps.left - LAST_BLOCK - GRACE - TABLE
    if seconds <= 0:
        raise Failed("no time is left for them")
    command = [*PYTEST, "-W", "ignore:Benchmark fixture was not used", "benchmarks", "-q", "-p", "benchmark", "-rf"]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    started = time.time()
    command += ["--benchmark-disable-gc", "--benchmark-quiet", "--device=cuda", f"--seconds={seconds:.0f}"]
    command += [f"--results={folder}", *([f"--commit={commit}"] if commit else [])]
    steps.command(command, seconds + LAST_BLOCK)
    return f"{newest(folder, started)}"


def newest(folder: Path, since: float) -> Path:
    """The last results that the benchmarks wrote, not before `since`."""
    written = [path for path in folder.glob("*/*torch-*.json") if path.stat().st_mtime >= since]
    if not written:
        raise Failed("there are no results")
    return max(written, key=lambda path: path.stat().st_mtime)


def memory(folder: Path, since: float) -> str:
    """Checks that the benchmarks' run has the bytes of this package in every case."""
    from benchmarks.report import results

    found = [row for row in results.read(newest(folder, since)).rows if row.pass_ == "memory" and row.role == "ours"]
    found = [row for row in found if not row.status.startswith(("not run", "missing"))]
    if not found or not all(row.saved_bytes and row.peak_bytes for row in found):
        raise Failed("the run lacks the bytes of this package")
    return ", ".join(f"{row.contestant} saves {row.saved_bytes / 1e6:.1f} MB at {row.case}" for row in found)


def table(steps: Steps, folder: Path, since: float) -> None:
    from benchmarks.gpu import bars
    from benchmarks.report import results

    steps.say(bars.table(results.read(newest(folder, since))))


def measured(steps: Steps, folder: Path, commit: str | None) -> None:
    """Runs the benchmarks, then tabulates their results, or a part of them if the run was cut off."""
    started = time.time()
    steps.step("benchmarks", lambda: benchmarks(steps, folder, commit))
    steps.step("memory", lambda: memory(folder, started))
    steps.step("table", lambda: table(steps, folder, started))


def run(target: str, steps: Steps, folder: Path, commit: str | None) -> int:
    """Runs a target's steps; without a GPU only the first."""
    steps.step("environment", environment)
    if steps.outcomes["environment"] != "PASS":
        return 1
    steps.step("nvcc", nvcc)
    steps.step("build", lambda: build(steps))
    if target == "test":
        steps.step("smoke", lambda: smoke(steps))
        steps.step("tests", lambda: tests(steps))
    elif target == "bench":
        measured(steps, folder, commit)
    elif target == "sanitize":
        steps.step("sanitizer", lambda: sanitizer(steps))
    else:
        steps.step("backends", lambda: backends(steps, folder))
    return steps.exit_status


TARGETS = ("test", "bench", "sanitize", "tune")  # the most important answers first


def run_all(targets: list[str], folder: Path, commit: str | None) -> int:
    """Runs each target with its own clock and log, even if earlier ones failed; stops if there is no GPU."""
    status = 0
    for target in targets:
        with (folder / f"gpu-{target}.log").open("w") as log:
            steps = Steps(log)
            status |= run(target, steps, folder, commit)
        if list(steps.outcomes) == ["environment"]:
            break
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; all of them by default")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of all machines'")
    parser.add_argument("--commit", help="`git describe --always --dirty`, where git knows nothing of these files")
    options = parser.parse_args(arguments)
    if unknown := [target for target in options.targets if target not in TARGETS]:
        parser.error(f"TARGET must be one of {', '.join(TARGETS)}, got {unknown[0]}")
    folder = options.results.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end_with_what_runs()
    return run_all(options.targets or list(TARGETS), folder, options.commit)


if __name__ == "__main__":
    sys.exit(main())
