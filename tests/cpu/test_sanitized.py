"""What `make sanitize` rests on: that sanitizers see what they should, and that its faults are still in the sources."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized
from sanitized import CPU, HERE, MUTANTS, ROOT, SANITIZERS
from sanitizers import stress


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_fault_on_purpose_is_one_change(mutant):
    """In the driver or in a header that it includes: what a mutant compiles anew."""
    assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1
    name = Path(mutant.file).name
    assert name == sanitized.DRIVER or f'{name}"\n' in (CPU / sanitized.DRIVER).read_text()


def test_each_sanitizer_has_faults_to_find():
    caught = {(mutant.sanitizer, mutant.caught) for mutant in MUTANTS}
    assert {sanitizer for sanitizer, _ in caught} == set(SANITIZERS)
    assert {"heap-buffer-overflow", "misaligned address"} <= {words for _, words in caught}
    threads = {mutant.threads for mutant in MUTANTS if mutant.sanitizer == "thread"}
    assert any(python > 1 and openmp == 1 for python, openmp in threads)
    assert any(python == 1 and openmp > 1 for python, openmp in threads)


COMMANDS = """
import json, sanitized
driver = sanitized.CPU / sanitized.DRIVER
commands = {name: sanitized.instrumented(driver, sanitized.ROOT / "out.o", name) for name in sanitized.SANITIZERS}
print(json.dumps([sanitized.extension().sources, commands], default=str))
"""


def test_the_build_is_that_of_setup():
    """In a process of its own, as `make sanitize` is: whose distutils there is depends on what was imported before."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cpu")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sources, commands = json.loads(done.stdout.splitlines()[-1])
    assert {ROOT / path for path in sources} == set(CPU.glob("*.cpp"))
    for sanitizer, kind in SANITIZERS.items():
        driver = commands[sanitizer]
        assert set(kind.flags) <= set(driver)
        assert "-O3" not in driver
        assert "-ffp-contract=fast" in driver


def test_our_library_is_never_suppressed():
    lines = [line for line in (HERE / "thread.supp").read_text().splitlines() if line and not line.startswith("#")]
    libraries = [line.removeprefix("called_from_lib:") for line in lines]
    assert len(libraries) == 1
    assert not any(re.search(name, "vvae_fast/_C.so libgomp.so.1 libtorch_cpu.so") for name in libraries)


def test_what_runs_under_a_sanitizer_is_there():
    assert all(path.is_file() for path in sanitized.tests())


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """A program of parallel regions on OpenMP, and what ThreadSanitizer says of it."""
    if sanitized.missing():
        pytest.skip(f"missing: {', '.join(sanitized.missing())}")
    folder = tmp_path_factory.mktemp("regions")
    program, shim = folder / "regions", folder / "fork_join.so"
    sanitized.call(sanitized.compile_fork_join(shim))
    flags = ["-O1", "-g", "-fopenmp", "-fsanitize=thread"]
    sanitized.call(["gcc", *flags, str(HERE / "regions.c"), "-o", str(program)])

    def run(*arguments: str, preload: bool) -> str:
        libraries = [sanitized.library("libtsan.so").resolve(), *([shim] if preload else [])]
        done = subprocess.run(
            [*sanitized.at_fixed_addresses(), program, *arguments],
            env={"LD_PRELOAD": ":".join(map(str, libraries)), **SANITIZERS["thread"].environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == ("data race" not in done.stderr), done.stderr
        return "race" if done.returncode else "clean"

    return run


def test_thread_sanitizer_sees_the_ends_of_a_region_and_races_inside(regions):
    """Both with fork_join.c, without which it takes the ends of a region for races."""
    assert regions(preload=True) == "clean"
    assert regions("race", preload=True) == "race"
    assert regions(preload=False) == "race"


def test_the_stress_passes_without_a_sanitizer():
    """Python threads times OpenMP threads, bit for bit what one thread gives."""
    options = stress.parse(["--python-threads", "3", "--openmp-threads", "2", "--rounds", "1", "--thin", "2"])
    assert stress.find_problems(options) == []
