"""Every kernel compiled for GPUs that are not here: the CUDA kernels by nvcc, the Triton kernels as their table chooses
them. Used by test_cuda_compiles.py, test_compiled_kernels.py and sass_tables.py, which need no compiling of
their own.
"""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_host import CSRC, DTYPES, keep_dtypes, sources

from benchmarks.sass import sass_report, sass_tables

# What nvcc compiles for each in `make test`: a dtype takes a minute or more. In bfloat16 sm_80 has instructions of its
# own; `make sass` compiles the others for it, too.
DTYPES_OF = {"sm_80": (torch.bfloat16,), "sm_90": tuple(DTYPES)}
ALL_DTYPES_OF = dict.fromkeys(DTYPES_OF, tuple(DTYPES))
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-c"]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

TRITON_TARGETS = {"sm_80": ["cuda", 80, 32], "sm_90": ["cuda", 90, 32], "gfx942": ["hip", "gfx942", 64]}


class Compiled(NamedTuple):
    kernel: str  # with its template's arguments
    arch: str
    stack: int  # bytes, as all but the registers
    spill_stores: int
    spill_loads: int
    registers: int

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def compile_source(source: Path, arch: str, folder: Path) -> list[Compiled]:
    """The object file goes to the folder."""
    target = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
    command = ["nvcc", *FLAGS, target, "-o", folder / f"{source.stem}.o", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [match.groupdict() for match in ENTRY.finditer(done.stderr)]
    assert len(found) == done.stderr.count("Compiling entry function")
    names = demangled([entry.pop("name") for entry in found])
    return [
        Compiled(name, entry["arch"], *(int(entry[key]) for key in ("stack", "stores", "loads", "registers")))
        for name, entry in zip(names, found, strict=True)
    ]


def compile_cuda(folder: Path, dtypes_of: dict[str, tuple[torch.dtype, ...]] = DTYPES_OF) -> list[Compiled]:
    """Every kernel, with its object file in folder/arch; the longest source first, two at a time."""
    work = []
    for arch, dtypes in dtypes_of.items():
        csrc = shutil.copytree(CSRC, folder / arch / "csrc")
        keep_dtypes(csrc, dtypes)
        work += [(source, arch, folder / arch) for source in sources(csrc)]
    longest_first = sorted(work, key=lambda one: (-one[0].stat().st_size, -len(dtypes_of[one[1]])))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda one: compile_source(*one), longest_first)
        return [kernel for kernels in found for kernel in kernels]


def compile_triton(target: str, cases: list[tuple], folder: Path) -> list[dict]:
    """A line for each launch of each case, see compile_kernels.py; the folder gets NVIDIA's machine code."""
    folder.mkdir(exist_ok=True)
    script = Path(__file__).parents[1] / "triton_backend" / "compile_kernels.py"
    command = [sys.executable, script, json.dumps(TRITON_TARGETS[target]), json.dumps(cases), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=script.parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def table_of(name: str) -> tuple[dict[str, Path], list[sass_report.Row]]:
    """The disassembler and the committed table "cuda" or "triton"; skips where its figures are another compiler's."""
    tools = sass_report.disassembler()
    if tools is None:
        pytest.skip("cuobjdump and nvdisasm are not installed")
    rows, then = sass_report.read(sass_report.TABLES[name].read_text())
    now = sass_tables.versions(name, tools)
    if now != then:
        pytest.skip(f"{sass_report.TABLES[name].name} was made with {then}, and here is {now}")
    return tools, rows
