"""What `make wheel` checks, the files of a release, and what importing the package costs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setup_runs import ROOT

import vvae_fast
from build_tools import wheel

STABLE = """
                 U aoti_torch_get_dim@VERS_1
                 U torch_call_dispatcher
                 U PyModule_Create2
                 U _ZNSt6vectorIiSaIiEE4dataEv
                 U _ZSt20__throw_length_errorPKc@GLIBCXX_3.4
                 w __gmon_start__
"""
UNSTABLE = ["_ZN3c105ErrorC1Ev", "_ZNK2at10TensorBase4sizeEl", "_ZN5torch8autograd4NodeD2Ev", "_ZTIN3c105ErrorE"]
HEAVY = {"lightning", "matplotlib", "rich", "sklearn", "tensorboard", "triton", "yaml", "normflows", "pyro", "pythae"}
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


def test_the_page_on_installing_has_every_extra_and_how_a_wheel_gets_them():
    page, project = (ROOT / "docs/install.md").read_text(), (ROOT / "pyproject.toml").read_text()
    extras = re.findall(
        r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
    )
    assert set(extras) == set(re.findall(r"^\| `(\w+)` \|", page.partition("## Extras")[2].partition("\n## ")[0], re.M))
    assert re.search(r"pip install '[\w./-]+\.whl\[train\]'", page)


@pytest.mark.parametrize("symbol", UNSTABLE)
def test_pytorchs_cpp_interface_is_found_among_the_symbols(symbol):
    assert wheel.unstable(STABLE) == []
    assert wheel.unstable(f"{STABLE}                 U {symbol}@VERS_1\n") == [symbol]


def wheel_of(folder: Path, library: Path) -> Path:
    path = folder / "of.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(library, "vvae_fast/_C.of.so")
    return path


@needs_nm
def test_the_kernels_use_the_stable_abi_alone(tmp_path, capsys):
    from vvae_fast import _C

    wheel.check_symbols(wheel_of(tmp_path, Path(_C.__file__)))
    assert "uses PyTorch's stable C ABI alone" in capsys.readouterr().err


@needs_nm
def test_a_library_of_one_version_of_torch_is_refused(tmp_path):
    node = pytest.importorskip("vvae_fast._C_node")
    with pytest.raises(SystemExit, match=r"_C.of.so uses PyTorch's C\+\+ interface, which changes: _Z"):
        wheel.check_symbols(wheel_of(tmp_path, Path(node.__file__)))


@needs_nm
def test_a_wheel_without_kernels_is_refused(tmp_path):
    path = tmp_path / "of.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vvae_fast/__init__.py", "")
    with pytest.raises(SystemExit, match=r"of.whl holds no kernels, only vvae_fast/__init__.py"):
        wheel.check_symbols(path)


def test_what_auditwheel_needs_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # so that it is as before afterwards
    assert wheel.repair(tmp_path) == tmp_path
    assert "not run here: auditwheel, for want of auditwheel and patchelf" in capsys.readouterr().err


def test_a_step_that_fails_ends_in_one_line():
    with pytest.raises(SystemExit, match=r"^vvae_fast: trying failed with exit code 3: its output is above$"):
        wheel.run_or_stop("trying", sys.executable, "-c", "raise SystemExit(3)")


def test_the_program_for_a_fresh_environment_runs_here():
    command = [sys.executable, "-c", wheel.PROGRAM, "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith(f"vvae_fast {vvae_fast.__version__} runs on torch ")


def test_importing_brings_no_package_that_torch_does_not():
    program = "import sys, torch; before = {*sys.modules}; import vvae_fast; print(*({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    brought = {name.partition(".")[0] for name in done.stdout.split()}
    assert "vvae_fast" in brought
    assert not brought & HEAVY


def test_the_citation_is_of_this_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1] == vvae_fast.__version__
