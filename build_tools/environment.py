"""The checks that need neither torch nor a compiler: environment variables, the build's own tools, the folder."""

import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
ON, OFF = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")


def stop(message: str) -> NoReturn:
    """Ends the build with one line, which is the last that pip, uv and build show."""
    sys.exit(f"vvae_fast: {' '.join(message.split())}")


def say(message: str) -> None:
    """A line of the build's log; pip shows it with -v."""
    print(f"vvae_fast: {' '.join(message.split())}", file=sys.stderr, flush=True)


def run_program(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A compiler's run, both of its streams in stdout; OSError if it does not start."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def is_set(variable: str) -> bool:
    """Whether a switch of the environment is on; ends the build where it is neither on nor off."""
    value = os.environ.get(variable, "").strip().lower()
    if value not in (*ON, *OFF):
        stop(f"{variable} must be 1 or 0, got {os.environ[variable]!r}. Set it to one of them or unset it")
    return value in ON


def check_jobs() -> None:
    """Ends the build where MAX_JOBS is no number of compilers, which torch would ignore, or 0, which is no limit."""
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        stop(f"MAX_JOBS, how many compilers run at once, must be a whole number from 1 on, got {jobs!r}. Unset it")


def requirements() -> dict[str, tuple[int, ...]]:
    """The build's tools and the oldest versions that serve, which have their home in pyproject.toml."""
    text = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: numbers(oldest) for name, oldest in re.findall(r'"([\w-]+)(?:>=([\d.]+))?"', text[1])}


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13) of 2.13.0+cpu, as many as one compares."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def installer() -> str:
    """What installs packages where the build was started: uv's environments have no pip."""
    return "uv pip install" if "UV" in os.environ else "pip install"


def install_tools() -> str:
    """The command that installs the build's tools."""
    names = [f"{name}>={'.'.join(map(str, oldest))}" if oldest else name for name, oldest in requirements().items()]
    return " ".join([installer(), *(f"'{name}'" if ">" in name else name for name in names)])


def check_tools(*wanted: str) -> None:
    """Ends the build where one of its tools is missing or too old, as happens without build isolation alone."""
    faults = []
    for name in wanted:
        oldest = requirements()[name]
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{name} is missing")
            continue
        if numbers(found) < oldest:
            faults.append(f"{name} {found} is older than {'.'.join(map(str, oldest))}")
    if faults:
        stop(f"without isolation the build needs its tools: {', '.join(faults)}. Run: {install_tools()}")


def check_ninja() -> None:
    """Puts this environment's ninja on PATH, where torch looks for it alone; ends the build where there is none."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), os.environ.get("PATH")]))
        if shutil.which("ninja") is None:
            stop(f"ninja, which runs the compilers, is missing. Run: {install_tools()}")


def check_folder() -> None:
    """Ends the build where the source folder, or what an earlier build left in it, cannot be written."""
    left = [ROOT / "build", ROOT / "vvae_fast.egg-info"]
    folders = [ROOT, *left, *(path for folder in left for path in folder.rglob("*") if path.is_dir())]
    for folder in folders:
        if folder.exists() and not os.access(folder, os.W_OK):
            remedy = "Copy the source to a folder of yours, or install from a source archive or a wheel"
            if folder != ROOT:
                remedy = "An earlier build by another user left it: have it removed"
            stop(f"the build writes into its source folder, and {folder} is not writable. {remedy}")


def wait_for_turn() -> None:
    """Two builds in one folder would write the same files: the second waits until the first one's process ends."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"waiting for another build in {ROOT}")
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError as error:
        say(f"{ROOT} cannot be locked ({error}): build there once at a time")
