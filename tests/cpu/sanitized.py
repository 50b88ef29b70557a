"""`make sanitize`: the C++ backend under AddressSanitizer with UBSan, and under ThreadSanitizer.

The extension is compiled anew for each, in build/sanitize/, where a copy of the package lies beside it; the one that is
installed is left alone. Each is first shown faults made on purpose, and the run fails where one is not found: a
sanitizer that does not work finds nothing.
"""

import functools
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from vvae_fast.backends import cpp

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "sanitizers"
CPU = ROOT / "csrc" / "cpu"
BUILD = ROOT / "build" / "sanitize"
DRIVER = "operators.cpp"  # checks, allocates, cuts into passes: what a mutant of them compiles anew
STEP_LIMIT = 900  # seconds


class Sanitizer(NamedTuple):
    flags: tuple[str, ...]
    preloaded: tuple[str, ...]  # libraries of g++, in front of everything
    environment: dict[str, str]


SANITIZERS = {
    # alignment, bounds, null, shift and the rest; not vptr, which asks for types that PyTorch does not export
    "address": Sanitizer(
        ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
        ("libasan.so", "libstdc++.so"),  # without the second it cannot see an exception leave
        {
            # Python keeps its objects until the end: no leaks. Their absence is measured by tests/test_memory*.py.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    ),
    "thread": Sanitizer(
        ("-fsanitize=thread",),
        ("libtsan.so",),
        {"TSAN_OPTIONS": f"halt_on_error=1:report_signal_unsafe=0:suppressions={HERE / 'thread.supp'}"},
    ),
}


class Mutant(NamedTuple):
    name: str
    file: str  # in csrc
    old: str  # there once
    new: str
    sanitizer: str
    caught: str  # in the report
    threads: tuple[int, int]  # Python's, OpenMP's


MUTANTS = (
    Mutant(
        "OpenMP threads add into one slice's sums",
        "cpu/schedule.h",
        "const Partial<T> sums(partials + slice * partial, p.steps, p.dim);",
        "const Partial<T> sums(partials, p.steps, p.dim);",
        "thread",
        "data race",
        (1, 3),
    ),
    Mutant(
        "Python threads share their scratch memory",
        "cpu/schedule.h",
        "thread_local Arena arenas[kSlots];",
        "static Arena arenas[kSlots];",
        "thread",
        "data race",
        (3, 1),
    ),
    Mutant(
        "the instruction set is read while it is written",
        "cpu/operators.cpp",
        "std::atomic<const Isa*>& chosen_isa() {\n  static std::atomic<const Isa*> isa = [] {",
        "struct Plain {\n  const Isa* isa;\n  Plain(const Isa* to) : isa(to) {}\n"
        "  const Isa* load() const { return isa; }\n"
        "  void store(const Isa* to) { isa = to; }\n};\nPlain& chosen_isa() {\n  static Plain isa = [] {",
        "thread",
        "data race",
        (3, 1),
    ),
    Mutant(
        "scratch memory is a vector short",
        "cpu/schedule.h",
        "std::aligned_alloc(64, bytes)",
        "std::aligned_alloc(64, bytes - 64)",
        "address",
        "heap-buffer-overflow",
        (1, 1),
    ),
    Mutant(
        "an output lacks its last row",
        "operators/operators.h",
        "Tensor z_K = new_empty(z, {p.rows, p.dim}), log_det",
        "Tensor z_K = new_empty(z, {p.rows > 1 ? p.rows - 1 : p.rows, p.dim}), log_det",
        "address",
        "heap-buffer-overflow",
        (1, 1),
    ),
    Mutant(
        "scratch memory that is not aligned to its numbers",
        "cpu/schedule.h",
        "return static_cast<T*>(mine.data.get());",
        "return reinterpret_cast<T*>(static_cast<char*>(mine.data.get()) + 2);",
        "address",
        "misaligned address",
        (1, 1),
    ),
)

# What runs under AddressSanitizer beside the stress: whatever calls the operators with odd shapes, strides and numbers.
TESTS = (
    "test_properties.py",
    "test_planar_flow.py",
    "test_sylvester_flow.py",
    "test_fused_inverse.py",
    "test_passes.py",
    "test_headed_flow.py",
    "test_arguments.py",
)


def tests() -> list[Path]:
    return [path for name in TESTS for path in (ROOT / "tests").rglob(name)]


NOT_HERE = "not accuracy and not amplifying and not million and not outputs_larger and not compile and not opcheck"


@functools.cache
def extension():
    """What setup.py builds vvae_fast._C from: one home for sources, macros and flags."""
    import setuptools

    seen, argv, folder, setup = {}, sys.argv, Path.cwd(), setuptools.setup
    environment = {name: os.environ.pop(name, None) for name in ("FORCE_CUDA", "NO_CUDA")}
    try:
        os.chdir(ROOT)
        os.environ["NO_CUDA"] = "1"
        sys.argv, setuptools.setup = ["setup.py", "build_ext"], seen.update
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        os.chdir(folder)
        sys.argv, setuptools.setup = argv, setup
        os.environ.pop("NO_CUDA")
        os.environ.update({name: value for name, value in environment.items() if value is not None})
    return next(module for module in seen["ext_modules"] if module.name == "vvae_fast._C")


def library(name: str) -> Path | None:
    """The path of one of g++'s own libraries."""
    done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def missing() -> list[str]:
    """What a run needs and this machine lacks."""
    if not shutil.which("g++"):
        return ["g++"]
    names = {name for sanitizer in SANITIZERS.values() for name in sanitizer.preloaded}
    lacking = [f"g++'s {name}" for name in sorted(names) if library(name) is None]
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        lacking.append("a PyTorch whose parallel regions are OpenMP's")
    return lacking


def compiling(source: Path, out: Path, flags: list[str]) -> list[str]:
    """As setup.py compiles it, but for the optimisation: `flags` say which, and name the sanitizer."""
    ext = extension()
    given = [flag for flag in ext.extra_compile_args if not flag.startswith("-O")]
    macros = [f"-D{name}={value}" if value is not None else f"-D{name}" for name, value in ext.define_macros]
    include = [f"-isystem{path}" for path in (*ext.include_dirs, sysconfig.get_path("include"))]
    return ["g++", "-std=c++20", "-fPIC", *given, *flags, *macros, *include, "-c", str(source), "-o", str(out)]


def instrumented(source: Path, out: Path, sanitizer: str) -> list[str]:
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", "-Wno-tsan", *SANITIZERS[sanitizer].flags]
    return compiling(source, out, flags)


def stand_in(source: Path) -> Path:
    """For an instruction set that this machine lacks, what its source has for other processors."""
    name = source.stem.removeprefix("isa_")
    path = BUILD / "plain" / source.name
    table = f'const Isa isa_{name}{{"{name}", [] {{ return false; }}, {{}}, {{}}}};'
    path.write_text(f'#include "{ROOT / "csrc" / "cpu" / "kernels.h"}"\nnamespace vvae {{ {table} }}\n')
    return path


def linking(objects: list[Path], out: Path, sanitizer: str) -> list[str]:
    ext = extension()
    folders = [flag for path in ext.library_dirs for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries = [f"-l{name}" for name in ext.libraries]
    return ["g++", "-shared", *SANITIZERS[sanitizer].flags, *map(str, objects), *folders, *libraries, "-o", str(out)]


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr[:4000]}")


def build() -> None:
    """The objects of both, the slowest to compile first; those that are newer than every source are left."""
    for folder in ("plain", *SANITIZERS):
        (BUILD / folder).mkdir(parents=True, exist_ok=True)
    levels = {CPU / f"isa_{level}.cpp" for level in cpp.isa_levels()}
    wanted = [
        (BUILD / name / f"{source.stem}.o", instrumented(source, BUILD / name / f"{source.stem}.o", name))
        for source in (*sorted(levels), CPU / DRIVER)
        for name in SANITIZERS
    ]
    # Python's bindings and the other instruction sets are there to link.
    for source in {ROOT / path for path in extension().sources} - levels - {CPU / DRIVER}:
        out = BUILD / "plain" / f"{source.stem}.o"
        text = stand_in(source) if source.stem.startswith("isa_") else source
        wanted.append((out, compiling(text, out, ["-O0"])))
    there = {path for name in ("plain", *SANITIZERS) for path in (BUILD / name).glob("*.o")}
    for path in there - {out for out, _ in wanted}:
        path.unlink()  # of a source that is gone
    latest = max(path.stat().st_mtime for path in [*(ROOT / "csrc").rglob("*.*"), Path(__file__), ROOT / "setup.py"])
    old = [command for out, command in wanted if not out.exists() or out.stat().st_mtime < latest]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(call, old))
    call(compile_fork_join(fork_join()))


def fork_join() -> Path:
    return BUILD / "fork_join.so"


def compile_fork_join(out: Path) -> list[str]:
    return ["gcc", "-O1", "-g", "-fPIC", "-shared", str(HERE / "fork_join.c"), "-o", str(out), "-ldl"]


def at_fixed_addresses() -> list[str]:
    """What to put before a command: runtimes of older compilers do not start at addresses that are too random."""
    return ["setarch", "-R"] if shutil.which("setarch") else []


def stage(folder: Path, sanitizer: str, driver: Path | None = None) -> Path:
    """A folder to start Python in: package and tests by links, and the extension, perhaps with another driver."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "vvae_fast"
    package.mkdir(parents=True)
    for path in (ROOT / "vvae_fast").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in ("tests", "benchmarks", "pyproject.toml", "csrc", "setup.py"):
        (folder / name).symlink_to(ROOT / name)
    objects = sorted([*(BUILD / sanitizer).glob("*.o"), *(BUILD / "plain").glob("*.o")])
    if driver:
        objects = [driver if path.stem == Path(DRIVER).stem else path for path in objects]
    call(linking(objects, package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", sanitizer))
    return folder


def mutate(mutant: Mutant, folder: Path) -> Path:
    """The driver's object with the mutant's one change in the sources."""
    csrc = folder / "csrc"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cuda"))
    path = csrc / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: {mutant.old!r} is {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))
    out = folder / "driver.o"
    call(instrumented(csrc / "cpu" / DRIVER, out, mutant.sanitizer))
    return out


def environment(sanitizer: str, isa: str) -> dict[str, str]:
    kind = SANITIZERS[sanitizer]
    preloaded = [library(name).resolve() for name in kind.preloaded]
    preloaded += [fork_join()] if sanitizer == "thread" else []
    return {
        **os.environ,
        **kind.environment,
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "VVAE_FAST_ISA": isa,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class Result(NamedTuple):
    code: int
    text: str
    seconds: float


def run(folder: Path, sanitizer: str, isa: str, command: list[str]) -> Result:
    """Python in a staged folder."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*at_fixed_addresses(), sys.executable, *command],
            cwd=folder,
            env={**environment(sanitizer, isa), "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STEP_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return Result(124, f"longer than {STEP_LIMIT} s\n{error.stdout}", time.monotonic() - start)
    return Result(done.returncode, done.stdout + done.stderr, time.monotonic() - start)


def stress(folder: Path, sanitizer: str, isa: str, threads: tuple[int, int], *options: str) -> Result:
    python, openmp = map(str, threads)
    script = str(HERE / "stress.py")
    counts = ["--python-threads", python, "--openmp-threads", openmp]
    return run(folder, sanitizer, isa, [script, "--isa", isa, *counts, *options])


def report(name: str, result: Result, fine: bool) -> bool:
    print(f"{'ok  ' if fine else 'FAIL'} {result.seconds:6.1f} s  {name}", flush=True)
    if not fine:
        words = re.search(
            "ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error|FAILURES|Traceback", result.text
        )
        print(result.text[words.start() :][:6000] if words else result.text[-6000:], flush=True)
    return fine


def check_mutant(mutant: Mutant) -> bool:
    """The fault made on purpose is found."""
    folder = BUILD / "mutant"
    start = time.monotonic()
    staged = stage(folder / "staged", mutant.sanitizer, mutate(mutant, folder / "source"))
    result = stress(staged, mutant.sanitizer, cpp.isa_levels()[-1], mutant.threads, "--rounds", "1", "--thin", "3")
    found = result.code != 0 and re.search(mutant.caught, result.text) is not None
    return report(f"found: {mutant.name}", result._replace(seconds=time.monotonic() - start), found)


def check(sanitizer: str) -> bool:
    """The real thing, on each instruction set of this machine."""
    folder, fine = stage(BUILD / sanitizer / "staged", sanitizer), True
    loaded = "from vvae_fast.backends import cpp; print(cpp.load_error, cpp._C.__file__)"
    result = run(folder, sanitizer, cpp.isa(), ["-c", loaded])
    fine &= report(f"{sanitizer}: loads", result, f"None {folder}" in result.text)
    for isa in cpp.isa_levels():
        for threads in ((4, 2), (2, 3)):
            result = stress(folder, sanitizer, isa, threads, "--rounds", "2")
            fine &= report(f"{sanitizer}: {isa}, {threads[0]} x {threads[1]} threads", result, result.code == 0)
    if sanitizer == "address":  # the tests themselves go through the instruction sets
        pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=sanitize", "-k", NOT_HERE]
        result = run(folder, sanitizer, cpp.isa(), [*pytest, *map(str, tests())])
        fine &= report(f"{sanitizer}: {' '.join(TESTS)}", result, result.code == 0)
    return fine


def main() -> int:
    lacking = missing()
    if lacking:
        sys.exit(f"make sanitize needs {', '.join(lacking)}")
    start = time.monotonic()
    print("Building the extension for each sanitizer into build/sanitize", flush=True)
    build()
    print(f"     {time.monotonic() - start:6.1f} s  built", flush=True)
    fine = all([check_mutant(mutant) for mutant in MUTANTS])
    fine &= all([check(sanitizer) for sanitizer in SANITIZERS])
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = f"in {time.monotonic() - start:.0f} s, of processors {used.ru_utime + used.ru_stime:.0f} s"
    print(f"{'Nothing was' if fine else 'SOMETHING WAS'} found, {times}", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
