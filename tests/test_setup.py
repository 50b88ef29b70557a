"""What setup.py decides to build, and what it says where it cannot: with stand-ins for torch's CUDA and for nvcc."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
VARIABLES = ("FORCE_CUDA", "NO_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")
# setup.py imports it
pytest.importorskip("pybind11", reason="pybind11 is not installed")


@pytest.fixture
def run(monkeypatch):
    """Runs setup.py without building anything: the arguments of setup(), under the variables given."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in VARIABLES})

    def run_setup(**variables: str) -> dict[str, object]:
        seen = {}
        os.environ.update(variables)
        monkeypatch.setattr(setuptools, "setup", seen.update)
        runpy.run_path(str(ROOT / "setup.py"))
        return seen

    return run_setup


def toolkit(folder: Path, version: str = "13.0", library: bool = True) -> Path:
    """A folder that looks like CUDA's toolkit, with a compiler that only answers questions."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    if library:
        (folder / "lib64" / "libcudart.so").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.88"\n'
        "else echo compute_75 compute_80 compute_89 compute_90; fi\n"
    )
    nvcc.chmod(0o755)
    return folder


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


def fact(extension: setuptools.Extension, name: str) -> str:
    return dict(extension.define_macros)[name].strip('"')


def ends_with(run, **variables: str) -> str:
    """The one line that setup.py ends with."""
    with pytest.raises(SystemExit) as end:
        run(**variables)
    assert "\n" not in str(end.value)
    return str(end.value)


@pytest.fixture
def cpu_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)


@pytest.mark.usefixtures("cpu_torch")
def test_without_cuda_the_cpu_kernels_are_built_and_know_why(run):
    (extension,) = run()["ext_modules"]
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
    cpu, cuda = run()["ext_modules"]
    assert fact(cpu, "VVAE_FAST_CUDA_BUILD") == "built"
    assert cuda.name == "vvae_fast._C_cuda"
    assert {"csrc/cuda/planar_cuda.cpp", "csrc/cuda/module.cpp"} <= set(cuda.sources)
    assert {Path(source).suffix for source in cuda.sources} <= {".cpp", ".cu"}
    assert {"csrc/planar_math.h", "csrc/checks.h", "csrc/cuda/planar_cuda.h"} <= set(cuda.depends)
    assert fact(cuda, "VVAE_FAST_NVCC") == "13.0"
    assert "USE_CUDA" in dict(cuda.define_macros)
    assert "USE_CUDA" not in dict(cpu.define_macros)
    assert {"-O3", "-lineinfo", "-std=c++17"} <= set(cuda.extra_compile_args["nvcc"])
    assert not any("fast" in flag for flag in cuda.extra_compile_args["nvcc"])
    assert str(cuda_torch[0] / "lib64") in cuda.library_dirs


def test_no_cuda_leaves_it_out(run, cuda_torch):
    (extension,) = run(NO_CUDA="1")["ext_modules"]
    assert fact(extension, "VVAE_FAST_CUDA_BUILD") == "not built: NO_CUDA was set"


def test_force_and_no_contradict_each_other(run, cuda_torch):
    assert "FORCE_CUDA and NO_CUDA contradict each other" in ends_with(run, FORCE_CUDA="1", NO_CUDA="1")


@pytest.mark.parametrize(
    ("version", "library", "reason"),
    [
        ("12.4", True, "nvcc 12.4 is not of CUDA 13.0, which torch was built with"),
        ("13.0", False, "no CUDA toolkit, a folder with bin/nvcc and libcudart.so, was found"),
    ],
)
def test_a_toolkit_that_does_not_serve(run, cuda_torch, tmp_path, monkeypatch, version, library, reason):
    home = toolkit(tmp_path / "other", version, library)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    (extension,) = run(CUDA_HOME=str(home))["ext_modules"]
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
    ],
)
def test_architectures(run, cuda_torch, gpus, variable, wanted):
    cuda_torch[1].extend(gpus)
    _, cuda = run(**({} if variable is None else {"TORCH_CUDA_ARCH_LIST": variable}))["ext_modules"]
    assert fact(cuda, "VVAE_FAST_CUDA_ARCHITECTURES") == os.environ["TORCH_CUDA_ARCH_LIST"] == wanted
    assert cpp_extension._get_cuda_arch_flags()  # torch understands it


@pytest.mark.parametrize("variable", ["garbage", "90", "sm_90", "8.0,9.0", "8.0;;9.0", "7.0", "8.0;7.5+PTX"])
def test_architectures_that_cannot_be(run, cuda_torch, variable):
    message = ends_with(run, TORCH_CUDA_ARCH_LIST=variable)
    assert "TORCH_CUDA_ARCH_LIST must name compute capabilities from 8.0 on, such as '8.0;9.0+PTX', got " in message
    assert repr(variable) in message


def test_a_compiler_that_does_not_run(run, cuda_torch):
    (cuda_torch[0] / "bin" / "nvcc").chmod(0o644)
    (extension,) = run()["ext_modules"]
    assert "not built: nvcc does not run (" in fact(extension, "VVAE_FAST_CUDA_BUILD")
    assert "repair the CUDA toolkit" in ends_with(run, FORCE_CUDA="1")


def test_a_source_archive_needs_no_torch(run, monkeypatch, cuda_torch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert run(FORCE_CUDA="1", NO_CUDA="1") == {}
