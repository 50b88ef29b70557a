"""What setup.py decides to build, and what it says where it cannot: with stand-ins for torch's CUDA and for nvcc."""

import os
import re
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from setup_runs import ends_with, fact, setup_runs, toolkit
from torch.utils import cpp_extension

# setup.py asks for it
pytest.importorskip("pybind11", reason="pybind11 is not installed")


@pytest.fixture
def run(monkeypatch, tmp_path):
    with setup_runs(monkeypatch, tmp_path) as run_setup:
        yield run_setup


@pytest.fixture
def cuda_torch(monkeypatch, tmp_path):
    """A torch for CUDA 13 that sees the GPUs of the list, and finds the toolkit returned."""
    gpus = []
    home = toolkit(tmp_path / "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    return home, gpus


@pytest.fixture
def cpu_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)


@pytest.mark.usefixtures("cpu_torch")
def test_without_cuda_the_cpu_kernels_are_built_and_know_why(run):
    extension, _ = run()["ext_modules"]
    assert extension.name == "vvae_fast._C"
    assert fact(extension, "VVAE_FAST_CUDA_BUILD") == f"not built: torch {torch.__version__} has no CUDA"
    assert not any("cuda" in source for source in extension.sources)


@pytest.mark.usefixtures("cpu_torch")
def test_force_cuda_needs_a_torch_with_cuda(run):
    message = ends_with(run, FORCE_CUDA="1")
    assert message.startswith(
        f"vvae_fast: FORCE_CUDA was set, but torch {torch.__version__} has no CUDA. Remedy: install"
    )
    assert run(FORCE_CUDA="0")["ext_modules"]


def test_both_extensions_are_built_where_there_is_cuda(run, cuda_torch):
    cpu, _, cuda = run()["ext_modules"]
    assert fact(cpu, "VVAE_FAST_CUDA_BUILD") == "built"
    assert cuda.name == "vvae_fast._C_cuda"
    assert {"csrc/cuda/operators.cpp", "csrc/cuda/direct/shared_forward.cu"} <= set(cuda.sources)
    assert {Path(source).suffix for source in cuda.sources} <= {".cpp", ".cu"}
    assert {"csrc/planar/log_det.h", "csrc/operators/checks.h", "csrc/cuda/launch.h"} <= set(cuda.depends)
    assert fact(cuda, "VVAE_FAST_NVCC") == "13.0"
    assert "USE_CUDA" in dict(cuda.define_macros)
    assert "USE_CUDA" not in dict(cpu.define_macros)
    assert {"-O3", "-lineinfo", "-std=c++17"} <= set(cuda.extra_compile_args["nvcc"])
    assert not any("fast" in flag for flag in cuda.extra_compile_args["nvcc"])
    assert str(cuda_torch[0] / "lib64") in cuda.library_dirs


def test_no_cuda_leaves_it_out(run, cuda_torch):
    extension, _ = run(NO_CUDA="1")["ext_modules"]
    assert fact(extension, "VVAE_FAST_CUDA_BUILD") == "not built: NO_CUDA was set"


def test_force_and_no_contradict_each_other(run, cuda_torch):
    assert "FORCE_CUDA and NO_CUDA contradict each other" in ends_with(run, FORCE_CUDA="1", NO_CUDA="1")


@pytest.mark.parametrize(
    ("version", "library", "reason"),
    [
        ("12.4", True, "nvcc 12.4 is not of CUDA 13.0, which torch was built with"),
        ("13.0", False, "no CUDA toolkit, a folder with bin/nvcc and libcudart.so, was found in CUDA_HOME ({home})"),
    ],
)
def test_a_toolkit_that_does_not_serve(run, cuda_torch, tmp_path, monkeypatch, version, library, reason):
    home = toolkit(tmp_path / "other", version, library)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    reason = reason.format(home=home)
    extension, _ = run(CUDA_HOME=str(home))["ext_modules"]
    assert fact(extension, "VVAE_FAST_CUDA_BUILD") == f"not built: {reason}"
    message = ends_with(run, CUDA_HOME=str(home), FORCE_CUDA="1")
    assert f"FORCE_CUDA was set, but {reason}. Remedy: " in message
    assert "CUDA 13" in message


@pytest.mark.parametrize(
    ("gpus", "variable", "wanted"),
    [
        ([], None, "8.0;9.0+PTX"),
        ([], "", "8.0;9.0+PTX"),
        ([], "native", "8.0;9.0+PTX"),
        ([], "8.0 8.6+PTX", "8.0 8.6+PTX"),
        ([], " ", "8.0;9.0+PTX"),
        ([(9, 0), (9, 0)], None, "8.0;9.0+PTX"),
        ([(8, 9), (7, 5), (8, 9)], None, "8.0;9.0+PTX;8.9"),  # 7.5 lacks the instructions,
        ([(12, 0)], None, "8.0;9.0+PTX"),  # unknown to this nvcc: the PTX serves it
        ([(8, 9)], "native", "8.0;9.0+PTX;8.9"),
        ([], "9.0a", "9.0a"),
        ([], "Hopper", "Hopper"),
        ([], "8.0 10.0a", "8.0 10.0a"),
        # what lacks the instructions is left out, however it is written
        ([], "7.5;8.0;9.0+PTX", "8.0;9.0+PTX"),
        ([], "8.0;7.5+PTX", "8.0"),
        ([], "7.0 7.5 8.6", "8.6"),
        ([], "Pascal;Volta+Tegra;Turing;Ampere", "Ampere"),
    ],
)
def test_architectures(run, cuda_torch, gpus, variable, wanted):
    cuda_torch[1].extend(gpus)
    *_, cuda = run(**({} if variable is None else {"TORCH_CUDA_ARCH_LIST": variable}))["ext_modules"]
    assert fact(cuda, "VVAE_FAST_CUDA_ARCHITECTURES") == os.environ["TORCH_CUDA_ARCH_LIST"] == wanted
    assert cpp_extension._get_cuda_arch_flags()  # torch understands it


def test_architectures_left_out_are_named(run, cuda_torch, capsys):
    run(TORCH_CUDA_ARCH_LIST="7.5;8.0;Turing;9.0+PTX")
    assert (
        "TORCH_CUDA_ARCH_LIST: 7.5, Turing left out, the CUDA kernels need compute capability 8.0"
        in capsys.readouterr().err
    )


def test_architectures_that_this_nvcc_does_not_know(run, cuda_torch):
    message = ends_with(run, TORCH_CUDA_ARCH_LIST="8.0;12.0+PTX")
    assert "TORCH_CUDA_ARCH_LIST names 12.0+PTX, which this nvcc does not know; it knows compute_100, " in message


@pytest.mark.parametrize(
    "variable", ["garbage", "90", "sm_90", "8.0,9.0", "8.0;;9.0", ";", "7.0", "Turing", "7.5;garbage", "8.0;native"]
)
def test_architectures_that_cannot_be(run, cuda_torch, variable):
    message = ends_with(run, TORCH_CUDA_ARCH_LIST=variable)
    assert "TORCH_CUDA_ARCH_LIST must name compute capabilities from 8.0 on, such as '8.0;9.0+PTX', got " in message
    assert repr(variable) in message


def test_a_compiler_that_does_not_run(run, cuda_torch):
    (cuda_torch[0] / "bin" / "nvcc").chmod(0o644)
    extension, _ = run()["ext_modules"]
    assert "not built: nvcc does not run (" in fact(extension, "VVAE_FAST_CUDA_BUILD")
    assert "repair the CUDA toolkit" in ends_with(run, FORCE_CUDA="1")


def test_a_source_archive_needs_no_torch(run, monkeypatch, cuda_torch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert run(FORCE_CUDA="1", NO_CUDA="1") == {}


def test_nvcc_that_refuses_the_compiler(run, cuda_torch, tmp_path, monkeypatch):
    complaint = "error: -- unsupported GNU version! gcc versions later than 15 are not supported!"
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit(tmp_path / "other", complaint=complaint)))
    reason = f"nvcc 13.0 does not compile an empty file ({complaint})"
    extension, _ = run()["ext_modules"]
    assert text_of(extension, "VVAE_FAST_CUDA_BUILD") == f"not built: {reason}"
    assert f"FORCE_CUDA was set, but {reason}. Remedy: set CC to a C++ compiler" in ends_with(run, FORCE_CUDA="1")


def text_of(extension: setuptools.Extension, name: str) -> str:
    """The macro's text, as C++ reads it."""
    return re.sub(r"(\\\d{3})+", lambda match: decoded(match[0]), fact(extension, name))


def decoded(octal: str) -> str:
    return bytes(int(digits, 8) for digits in octal.split("\\")[1:]).decode()


def test_a_reason_with_odd_characters_reaches_the_compiler_whole(run, cuda_torch, tmp_path, monkeypatch):
    home = str(tmp_path / """a "b' é $HOME \\n""")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    extension, _ = run(CUDA_HOME=home)["ext_modules"]
    macro = dict(extension.define_macros)["VVAE_FAST_CUDA_BUILD"]
    assert re.fullmatch(r'"[\w .,:;+()/\\-]*"', macro, re.ASCII)
    assert text_of(extension, "VVAE_FAST_CUDA_BUILD").endswith(f"was found in CUDA_HOME ({home})")


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "OFF", " 0 "])
def test_a_switch_that_is_off(run, cuda_torch, value):
    assert len(run(NO_CUDA=value, FORCE_CUDA=value)["ext_modules"]) == 3


@pytest.mark.usefixtures("cpu_torch")
@pytest.mark.parametrize("value", ["", "0", "false", "no", "off"])
def test_cuda_is_not_forced_where_the_switch_is_off(run, value):
    assert len(run(FORCE_CUDA=value)["ext_modules"]) == 2


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_a_switch_that_is_on(run, cuda_torch, value):
    assert len(run(NO_CUDA=value)["ext_modules"]) == 2
    assert "contradict each other" in ends_with(run, NO_CUDA=value, FORCE_CUDA=value)


@pytest.mark.parametrize("variable", ["NO_CUDA", "FORCE_CUDA"])
def test_a_switch_that_is_neither(run, cuda_torch, variable):
    assert ends_with(run, **{variable: "maybe"}).startswith(f"vvae_fast: {variable} must be 1 or 0, got 'maybe'")
