"""The CUDA kernels compile for GPUs that are not here, and keep everything in registers."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_host import CSRC, DTYPES, keep_dtypes, kernel_names, sources

# What is compiled for each: a dtype takes a minute or more. float64 needs the most registers, bfloat16 the newest
# instructions; float32 and float16 have neither of their own.
DTYPES_OF = {"sm_80": (torch.float64, torch.bfloat16), "sm_90": tuple(DTYPES)}
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-c", "-o", "/dev/null"]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Compiled(NamedTuple):
    kernel: str  # with its template's arguments
    arch: str
    stack: int  # bytes, as all but the registers
    spill_stores: int
    spill_loads: int
    registers: int


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def compile_one(source: Path, arch: str) -> list[Compiled]:
    target = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
    done = subprocess.run(["nvcc", *FLAGS, target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [match.groupdict() for match in ENTRY.finditer(done.stderr)]
    assert len(found) == done.stderr.count("Compiling entry function")
    names = demangled([entry.pop("name") for entry in found])
    return [
        Compiled(name, entry["arch"], *(int(entry[key]) for key in ("stack", "stores", "loads", "registers")))
        for name, entry in zip(names, found, strict=True)
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[Compiled]:
    """Every kernel of each architecture's dtypes; the longest source first, two at a time."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    work = []
    for arch, dtypes in DTYPES_OF.items():
        csrc = shutil.copytree(CSRC, tmp_path_factory.mktemp(arch) / "csrc")
        keep_dtypes(csrc, dtypes)
        work += [(source, arch) for source in sources(csrc)]
    longest_first = sorted(work, key=lambda one: (-one[0].stat().st_size, -len(DTYPES_OF[one[1]])))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda one: compile_one(*one), longest_first)
        return [kernel for kernels in found for kernel in kernels]


def test_every_kernel_compiles_for_every_architecture(compiled):
    names = kernel_names()
    assert names
    for arch in DTYPES_OF:
        kernels = [entry.kernel for entry in compiled if entry.arch == arch]
        assert {name for name in names if any(f"::{name}" in kernel for kernel in kernels)} == names
    by_arch = {arch: {entry.kernel for entry in compiled if entry.arch == arch} for arch in DTYPES_OF}
    assert by_arch["sm_80"] < by_arch["sm_90"]


def test_nothing_spills(compiled):
    wrong = [entry for entry in compiled if entry.stack or entry.spill_stores or entry.spill_loads]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(0 < entry.registers <= 255 for entry in compiled)  # they were read


def test_entries_are_read_from_what_ptxas_says():
    """A kernel with an array indexed at run time, and one that only waits."""
    said = (
        "ptxas info    : Compiling entry function '_ZN4vvae1kEv' for 'sm_80'\n"
        "ptxas info    : Function properties for _ZN4vvae1kEv\n"
        "    512 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 512 bytes cumulative stack size, 380 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_ZN4vvae1jEv' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN4vvae1jEv\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 1 barriers\n"
    )
    found = [match.groupdict() for match in ENTRY.finditer(said)]
    assert [list(entry.values())[1:] for entry in found] == [["sm_80", "512", "16", "20", "255"], ["sm_90", *"0008"]]
