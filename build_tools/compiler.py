"""The C++ compiler: which one, and whether it compiles and links what an extension needs."""

import functools
import os
import re
import shlex
import shutil
import sysconfig
import tempfile
from pathlib import Path

from build_tools.environment import run_program, stop

OLDEST_GCC = 11
INSTALL = (
    f"Install g++ {OLDEST_GCC} or newer, or clang: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora),"
    " conda install gxx (conda), or set CXX to one"
)
HEADERS = (
    "Install Python's headers: apt install python3-dev (Debian, Ubuntu), dnf install python3-devel (Fedora), or use a"
    " Python that has them, such as conda's or uv's"
)
VARIABLES = ("CXX", "CFLAGS", "CPPFLAGS", "LDFLAGS")
TRIAL = "#include <Python.h>\n#include <concepts>\n#include <vector>\nstd::vector<int> trial(int n) { return {n}; }\n"


def choose_compiler() -> tuple[str, ...]:
    """The command that torch, setuptools and nvcc are to compile C++ with, from CXX or PATH, for all of them alike."""
    command = words("CXX")
    if command:
        if shutil.which(command[0]) is None:
            stop(f"CXX names {command[0]!r}, which is no program. Change it, or unset it to use PATH's. {INSTALL}")
        return command
    known = dict.fromkeys(["c++", *(sysconfig.get_config_var("CXX") or "").split()[:1], "g++", "clang++"])
    found = next(filter(shutil.which, known), None)
    if found is None:
        stop(f"there is no C++ compiler: none of {', '.join(known)} is on PATH. {INSTALL}")
    os.environ["CXX"] = found
    return (found,)


def first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fatal|unrecogni[sz]ed|not found|cannot|denied", line)]
    return (telling or lines or ["it said nothing"])[0]


@functools.cache
def examine(command: tuple[str, ...], flags: tuple[str, ...], link_flags: tuple[str, ...]) -> tuple[str, str | None]:
    """The compiler's predefined macros, and what went wrong where it does not compile and link the trial."""
    asked = run_program([*command, "-dM", "-E", "-x", "c++", os.devnull])
    if asked.returncode or "__GNUC__" not in asked.stdout:
        return "", f"it is neither g++ nor clang ({first_error(asked.stdout)})"
    include = f"-I{sysconfig.get_path('include')}"
    with tempfile.TemporaryDirectory(prefix="vvae_fast-") as folder:
        source, compiled, library = (str(Path(folder, f"trial{suffix}")) for suffix in (".cpp", ".o", ".so"))
        Path(source).write_text(TRIAL, encoding="utf-8")
        for step in (
            [*command, *flags, include, "-fPIC", "-std=c++20", "-c", source, "-o", compiled],
            [*command, "-shared", compiled, *link_flags, "-o", library],
        ):
            done = run_program(step)
            if done.returncode:
                return asked.stdout, first_error(done.stdout)
    return asked.stdout, None


def words(variable: str) -> tuple[str, ...]:
    """A variable's words as a shell reads them; ends the build where a quote is open."""
    try:
        return tuple(shlex.split(os.environ.get(variable, "")))
    except ValueError as error:
        stop(f"{variable} must be words as a shell reads them, got {os.environ[variable]!r} ({error}). Unset it")


def check_compiler() -> None:
    """Ends the build where there is no C++ compiler, or it is too old, or fails at the least of an extension."""
    command = choose_compiler()
    name = os.environ["CXX"]
    try:
        macros, fault = examine(command, words("CFLAGS") + words("CPPFLAGS"), words("LDFLAGS"))
    except OSError as error:
        stop(f"the C++ compiler {name} does not run, or not where it writes ({error}). {INSTALL}")
    version = re.search(r"__GNUC__ (\d+)", macros)
    if version and "__clang__" not in macros and int(version[1]) < OLDEST_GCC:
        stop(f"{name} is g++ {version[1]}, which is too old. {INSTALL}")
    if fault and "Python.h" in fault:
        stop(f"Python.h, a header of this Python, is not in {sysconfig.get_path('include')}. {HEADERS}")
    if fault:
        named = [f"{key}={os.environ[key]!r}" for key in VARIABLES if os.environ.get(key)]
        stop(f"the C++ compiler fails on a file of four lines ({', '.join(named)}): {fault}. Change these. {INSTALL}")
    leave_to_this()


def leave_to_this() -> None:
    """Takes back what torch would make of the same variables after the checks above."""
    # It asks the first word of CXX, which may be ccache, for its version.
    os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"
    # It takes every word of CC but the first for a flag, and there is no C here. nvcc gets a CC of one word.
    if len(os.environ.get("CC", "").split()) != 1:
        os.environ.pop("CC", None)
