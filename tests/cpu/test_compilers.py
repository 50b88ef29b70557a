"""The CPU kernels are C++ for more compilers and processors than the one that built them."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-Wall",
    "-Werror",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fwrapv",
    "-c",
    "-o",
    "/dev/null",
]


SOURCES = ["isa_avx512.cpp", "isa_avx2.cpp", "isa_baseline.cpp"]


# With g++ the build has compiled all three; here one of them, for warnings: they share all their code but the vectors.
@pytest.mark.long
@pytest.mark.parametrize(
    ("compiler", "source"),
    [
        ("g++", SOURCES[0]),
        *((compiler, source) for compiler in ("clang++", "aarch64-linux-gnu-g++") for source in SOURCES),
    ],
)
def test_kernels_compile(compiler, source):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    # clang calls the alignment of a vector that one instruction set lacks a change of the ABI: none crosses a call here
    ignored = ["-Wno-psabi", "-Wno-unknown-warning-option"]
    done = subprocess.run(
        [compiler, *FLAGS, *ignored, "-c", "-o", "/dev/null", CSRC / "cpu" / source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
