"""Choice of backend: one asked for by name works or raises with the reasons; nothing falls back silently."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from problems import random_problem

import vvae_fast
from vvae_fast import backends, ops, shapes
from vvae_fast._version import __version__


def problem():
    p = random_problem((3,), 2, 2)
    return shapes.check(*p.inputs, "tanh", "softplus")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(ops, "load_error", "the extension vvae_fast._C did not load (no such file)")


def test_auto_takes_the_kernels():
    assert backends.select(problem(), None) == "cpp"
    assert backends.select(problem(), "auto") == "cpp"


def test_auto_takes_the_reference_where_the_kernels_cannot_run():
    assert backends.select(problem()._replace(device_type="meta"), None) == "reference"


@pytest.mark.usefixtures("without_extension")
def test_asked_for_by_name_but_not_there():
    with pytest.raises(RuntimeError, match=r"'cpp' was asked for and cannot run: .*did not load \(no such file\)"):
        backends.select(problem(), "cpp")
    with pytest.raises(RuntimeError, match="'cpp' was asked for"), vvae_fast.use_backend("cpp"):
        pass
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="run on the slow reference: the extension"):
        assert backends.select(problem(), None) == "reference"
    assert vvae_fast.info()["backends"]["cpp"] == {"available": False, "reasons": [ops.load_error]}


def test_unknown_names():
    with pytest.raises(ValueError, match=r"backend must be one of \('cpp', 'triton', 'reference', 'auto'\), got 'gpu'"):
        backends.select(problem(), "gpu")
    with pytest.raises(ValueError, match="use_backend's name must be one of"):
        vvae_fast.use_backend("gpu")  # not only when the block is entered


def test_use_backend_nests_and_ends():
    with vvae_fast.use_backend("reference"):
        assert backends.select(problem(), None) == "reference"
        assert backends.select(problem(), "cpp") == "cpp"
        with vvae_fast.use_backend("cpp"):
            assert backends.select(problem(), None) == "cpp"
        assert backends.select(problem(), None) == "reference"
    assert backends.select(problem(), None) == "cpp"


def test_use_backend_ends_after_an_error():
    with pytest.raises(KeyError), vvae_fast.use_backend("reference"):
        raise KeyError
    assert backends.select(problem(), None) == "cpp"


def test_use_backend_is_this_threads_own():
    seen = []
    with vvae_fast.use_backend("reference"):
        other = threading.Thread(target=lambda: seen.append(backends.select(problem(), None)))
        other.start()
        other.join()
    assert seen == ["cpp"]


def test_environment_chooses(monkeypatch):
    code = "import torch, vvae_fast; print(vvae_fast.PlanarFlow(2, 3)(torch.zeros(4, 2))[0].grad_fn)"
    assert "PlanarFlowFunction" in python(code).stdout
    assert "PlanarFlowFunction" not in python(code, VVAE_FAST_BACKEND="reference").stdout
    assert "VVAE_FAST_BACKEND must be one of" in python(code, VVAE_FAST_BACKEND="gpu").stderr
    monkeypatch.setattr(backends, "environment_name", "reference")
    assert backends.select(problem(), None) == "reference"
    assert backends.select(problem(), "cpp") == "cpp"
    monkeypatch.setattr(backends, "environment_name", "gpu")
    with pytest.raises(ValueError, match=r"environment variable VVAE_FAST_BACKEND must be one of .* got 'gpu'"):
        backends.select(problem(), None)


def test_the_reference_is_what_runs_under_use_backend():
    p = random_problem((3,), 2, 2)
    inputs = [t.requires_grad_() for t in p.inputs]
    with vvae_fast.use_backend("reference"):
        assert "PlanarFlowFunction" not in str(vvae_fast.planar_flow(*inputs)[0].grad_fn)
    assert "PlanarFlowFunction" in str(vvae_fast.planar_flow(*inputs)[0].grad_fn)


def test_info():
    info = vvae_fast.info()
    assert info["version"] == info["build"]["version"] == __version__
    assert info["torch"] == torch.__version__
    assert info["backends"]["cpp"] == {"available": True, "reasons": []}
    assert info["isa"] in info["isa_levels"]


def test_instruction_set_from_the_environment():
    level = ops.isa_levels()[-1]
    done = python("import vvae_fast; print(vvae_fast.info()['isa'])", VVAE_FAST_ISA=level)
    assert done.stdout.strip() == level
    done = python("import vvae_fast; print(vvae_fast.info()['backends']['cpp'])", VVAE_FAST_ISA="mmx")
    assert "VVAE_FAST_ISA: the instruction set must be one of" in done.stdout
    assert "'available': False" in done.stdout


def test_import_needs_torch_alone_and_prints_nothing():
    code = (
        "import sys; import vvae_fast; "
        "extras = {'lightning', 'matplotlib', 'sklearn', 'rich', 'tensorboard', 'triton'} & set(sys.modules); "
        "sys.exit(str(extras) if extras else 0)"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_missing_extension_is_said_and_the_reference_serves():
    code = (
        "import sys; sys.modules['vvae_fast._C'] = None\n"
        "import torch, vvae_fast\n"
        "print(vvae_fast.info()['backends']['cpp'])\n"
        "vvae_fast.PlanarFlow(2, 3)(torch.zeros(4, 2))\n"
        "vvae_fast.PlanarFlow(2, 3, backend='cpp')(torch.zeros(4, 2))\n"
    )
    done = python(code)
    assert "RuntimeWarning: planar flows run on the slow reference" in done.stderr
    assert "'available': False" in done.stdout
    assert "did not load" in done.stdout
    assert "RuntimeError: the backend 'cpp' was asked for and cannot run" in done.stderr


def test_triton_is_refused_with_the_reason_where_it_cannot_run():
    code = (
        "import torch, vvae_fast\n"
        "print(vvae_fast.info()['backends']['triton'])\n"
        "vvae_fast.PlanarFlow(2, 3, backend='triton')(torch.zeros(4, 2))\n"
    )
    done = python(code, CUDA_VISIBLE_DEVICES="")
    assert "'available': False" in done.stdout
    assert "RuntimeError: the backend 'triton' was asked for and cannot run: PyTorch sees no GPU here" in done.stderr


def test_interpreted_kernels_are_chosen_by_name_only():
    code = (
        "import torch, vvae_fast\n"
        "from vvae_fast import backends, shapes\n"
        "p = shapes.check(torch.zeros(4, 2), *[torch.zeros(3, 2)] * 2, torch.zeros(3), 'tanh', 'softplus')\n"
        "print(backends.select(p, None), backends.select(p, 'triton'))\n"
    )
    pytest.importorskip("triton", reason="Triton is not installed")
    done = python(code, TRITON_INTERPRET="1")
    assert done.stdout == "cpp triton\n", done.stderr
