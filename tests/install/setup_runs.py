"""Runs of setup.py that build nothing, with stand-ins for the compilers that it asks."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from build_tools import compiler, environment  # noqa: E402, next to setup.py, and installed nowhere

CUDA_VARIABLES = ("FORCE_CUDA", "NO_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")
VARIABLES = (*CUDA_VARIABLES, *compiler.VARIABLES, "CC", "MAX_JOBS", "TORCH_DONT_CHECK_COMPILER_ABI", "UV")


def fake_compiler(file: Path, macros: str = "#define __GNUC__ 12", complaint: str = "") -> str:
    """A C++ compiler that only answers questions, and compiles nothing where it has a complaint."""
    file.write_text(
        f"#!/bin/sh\ncase \"$*\" in *-dM*) echo '{macros}'; exit 0;; esac\n"
        + (f"echo 'trial.cpp: In function:'\necho '{complaint}'\nexit 1\n" if complaint else "")
    )
    file.chmod(0o755)
    return str(file)


@contextmanager
def setup_runs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Callable[..., dict[str, object]]]:
    """A function that runs setup.py under the variables given, and returns the arguments of setup()."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    monkeypatch.setattr(environment, "wait_for_turn", lambda: None)
    default = {"CXX": fake_compiler(folder / "fake-g++")}

    def run_setup(**variables: str) -> dict[str, object]:
        seen = {}
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(default | variables)
        monkeypatch.setattr(setuptools, "setup", seen.update)
        runpy.run_path(str(ROOT / "setup.py"))
        return seen

    with mock.patch.dict(os.environ):
        yield run_setup


def toolkit(folder: Path, version: str = "13.0", library: bool = True, complaint: str = "") -> Path:
    """A folder that looks like CUDA's toolkit, with a compiler that only answers questions."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    if library:
        (folder / "lib64" / "libcudart.so").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.88"\n'
        "elif [ $1 = --list-gpu-arch ]; then echo compute_75 compute_80 compute_86 compute_89 compute_90 compute_100\n"
        f"else echo '{complaint}'; exit {int(bool(complaint))}; fi\n"
    )
    nvcc.chmod(0o755)
    return folder


def fact(extension: setuptools.Extension, name: str) -> str:
    return dict(extension.define_macros)[name].strip('"')


def ends_with(run, **variables: str) -> str:
    """The one line that setup.py ends with."""
    with pytest.raises(SystemExit) as end:
        run(**variables)
    assert "\n" not in str(end.value)
    return str(end.value)
