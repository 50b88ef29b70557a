"""The command that runs other packages' tests with this package's classes, on stand-ins for their files."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.other_packages import peers_tests
from benchmarks.other_packages.peers_tests import PEERS, Peer, Reason, find, reason

COMMAND = Path(peers_tests.__file__)

NORMFLOWS = """
import unittest
from normflows.flows import Planar

class PlanarTest(unittest.TestCase):
    def test_ours(self):
        assert Planar.__module__ == "vvae_fast.interop.normflows"
        for size in (2, 3):
            with self.subTest(size=size):
                assert size != {bad}
"""
PYTORCH = """
import pytest
from torch.distributions.transforms import (AbsTransform,
    ExpTransform)
from torch.testing._internal.common_utils import run_tests

def identifier(transform):
    return type(transform).__name__

TRANSFORMS_CACHE_ACTIVE, TRANSFORMS_CACHE_INACTIVE = [AbsTransform(cache_size=1)], [AbsTransform()]
ALL_TRANSFORMS = TRANSFORMS_CACHE_ACTIVE + TRANSFORMS_CACHE_INACTIVE

@pytest.mark.parametrize("transform", ALL_TRANSFORMS, ids=identifier)
def test_inverse(transform):
    assert transform.inv.inv is transform

@pytest.mark.parametrize("transform", TRANSFORMS_CACHE_INACTIVE, ids=identifier)
def test_skips(transform):
    pytest.skip("of no use")
"""
PYRO = """
import pyro.distributions.transforms as T
from tests.common import LIMIT

def test_planar():
    assert T.planar(LIMIT).__class__.__module__ == T.Planar.__module__ == "vvae_fast.interop.pyro"
    assert T.conditional_planar(2, 3).__class__.__module__ == "vvae_fast.interop.pyro"

def test_householder_and_sylvester():
    for make in (T.householder, T.sylvester):
        assert make(LIMIT).__class__.__module__ == "vvae_fast.interop._pyro_reflections"
    assert T.conditional_householder(2, 3).__class__.__module__ == "vvae_fast.interop._pyro_reflections"

def test_radial():
    raise AssertionError("not selected")
"""
PYTHAE = """
from pythae.models import VAE_LinNF, VAE_LinNF_Config
from pythae.models.normalizing_flows import PlanarFlow

def test_planar():
    assert PlanarFlow.__module__ == "vvae_fast.interop.pythae"
    model = VAE_LinNF(VAE_LinNF_Config(input_dim=(1, 4), latent_dim=2, flows=["Planar", "Planar"]))
    assert [type(layer).__name__ for layer in model.net] == ["PlanarStack"]
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def command(*paths: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, COMMAND, *map(str, paths)], capture_output=True, text=True)


def rows(text: str) -> dict[tuple[str, str], str]:
    words = [line.split() for line in text.splitlines() if line[0] != " "]
    return {(row[0], row[1]): " ".join(row[2:]) for row in words}


@pytest.mark.long
def test_every_peer_runs_with_our_classes(tmp_path):
    pytest.importorskip("normflows"), pytest.importorskip("pyro"), pytest.importorskip("pythae")
    files = {
        "a/planar_test.py": NORMFLOWS.format(bad=None),
        "b/test_transforms.py": PYTORCH,
        "c/tests/__init__.py": "",
        "c/tests/common.py": "LIMIT = 3",
        "c/tests/distributions/test_transforms.py": PYRO,
        "d/test_planar_flow.py": PYTHAE,
    }
    done = command(write(tmp_path, files))
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done.stdout) == {
        ("package", "file"): "run passed failed skipped",
        ("normflows", "planar_test.py"): "1 1 0 0",
        ("pythae", "test_planar_flow.py"): "1 1 0 0",
        ("pythae", "test_VAE_LinFlow.py"): "not found: give its path, or that of a checkout",
        ("pyro", "test_transforms.py"): "2 2 0 0",
        ("pytorch", "test_transforms.py"): "14 14 0 7",  # by name, so without the inverses
    }


def test_a_failure_without_a_reason_is_the_exit_code(tmp_path):
    pytest.importorskip("normflows")
    file = write(tmp_path, {"planar_test.py": NORMFLOWS.format(bad=3)}) / "planar_test.py"
    outcomes = peers_tests.run(PEERS[0], file)
    assert [result["outcome"] for result in outcomes.values()] == ["failed"]  # a subtest's
    ((test, _),) = peers_tests.failures(outcomes)
    assert test == "PlanarTest::test_ours"
    assert "    PlanarTest::test_ours: UNEXPLAINED: " in "\n".join(peers_tests.lines(PEERS[0], outcomes))
    file.write_text("import normflows, missing_module")
    done = command(file)
    assert done.returncode == 1
    assert "UNEXPLAINED: " in done.stdout
    assert "missing_module" in done.stdout


def test_a_reason_fits_package_test_and_message(monkeypatch):
    monkeypatch.setattr(peers_tests, "EXPLAINED", (Reason("pyro", r"test_planar\b", "KeyError", "by contract"),))
    assert reason("pyro", "TransformTests::test_planar", "KeyError: x") == "by contract"
    assert reason("pyro", "TransformTests::test_planar", "ValueError: x") is None
    assert reason("pyro", "TransformTests::test_planar_2", "KeyError: x") is None
    assert reason("pythae", "TransformTests::test_planar", "KeyError: x") is None
    outcomes = {"a/b.py::test_planar": {"outcome": "failed", "message": "KeyError: x"}}
    assert list(peers_tests.lines(Peer("pyro", "pyro", "b.py", ""), outcomes))[1:] == ["    test_planar: by contract"]


def test_the_reasons_are_those_of_the_documentation():
    """docs/interop.md lists each, without its marks of code."""
    page = (COMMAND.parents[2] / "docs" / "interop.md").read_text().replace("`", "")
    assert not [entry.why for entry in peers_tests.EXPLAINED if entry.why not in page]


def test_files_are_found(tmp_path):
    """In folders at any depth, by name and by what they import, given ones before installed ones."""
    pyro, pytorch = PEERS[3:]
    folder = write(tmp_path, {"x/y/test_transforms.py": PYTORCH, "z/test_transforms.py": PYRO, "planar_test.py": ""})
    assert find(pytorch, [folder]) == folder / "x/y/test_transforms.py"
    assert find(pyro, [folder]) == folder / "z/test_transforms.py"
    assert find(pyro, [folder / "x/y/test_transforms.py"]) is None
    normflows = pytest.importorskip("normflows")
    installed = Path(normflows.__file__).parent / "flows" / "planar_test.py"
    assert find(PEERS[0], [folder]) == installed  # the folder's mentions no normflows


def test_paths_without_tests_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        done = command(path)
        assert done.returncode == 2
        assert f"{path}: none of planar_test.py, test_VAE_LinFlow.py, " in done.stderr
