"""Choice of backend: one asked for by name works or raises with the reasons; nothing falls back silently."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from problems import random_problem

import vvae_fast
from vvae_fast import backends, shapes
from vvae_fast._version import __version__
from vvae_fast.backends import _measured, cpp, cuda, gpu_choice, selection
from vvae_fast.spec import FlowSpec


def problem():
    p = random_problem((3,), 2, 2)
    return shapes.check(*p.inputs, FlowSpec())


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(cpp, "load_error", "the extension vvae_fast._C did not load (no such file)")


def test_auto_takes_the_kernels():
    assert backends.select(problem(), None).name == "cpp"
    assert backends.select(problem(), "auto").name == "cpp"


def test_auto_takes_the_reference_where_the_kernels_cannot_run():
    assert backends.select(problem()._replace(device_type="meta"), None).name == "reference"


@pytest.mark.usefixtures("without_extension")
def test_asked_for_by_name_but_not_there():
    with pytest.raises(RuntimeError, match=r"'cpp' was asked for and cannot run: .*did not load \(no such file\)"):
        backends.select(problem(), "cpp")
    with pytest.raises(RuntimeError, match="'cpp' was asked for"), vvae_fast.use_backend("cpp"):
        pass
    selection._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="run on the slow reference: the extension"):
        assert backends.select(problem(), None).name == "reference"
    assert vvae_fast.info()["backends"]["cpp"] == {"available": False, "reasons": [cpp.load_error]}


def test_unknown_names():
    names = r"\('cpp', 'triton', 'cuda', 'reference', 'auto'\)"
    with pytest.raises(ValueError, match=rf"backend must be one of {names}, got 'gpu'"):
        backends.select(problem(), "gpu")
    with pytest.raises(ValueError, match="use_backend's name must be one of"):
        vvae_fast.use_backend("gpu")  # not only when the block is entered


def test_use_backend_nests_and_ends():
    with vvae_fast.use_backend("reference"):
        assert backends.select(problem(), None).name == "reference"
        assert backends.select(problem(), "cpp").name == "cpp"
        with vvae_fast.use_backend("cpp"):
            assert backends.select(problem(), None).name == "cpp"
        assert backends.select(problem(), None).name == "reference"
    assert backends.select(problem(), None).name == "cpp"


def test_use_backend_ends_after_an_error():
    with pytest.raises(KeyError), vvae_fast.use_backend("reference"):
        raise KeyError
    assert backends.select(problem(), None).name == "cpp"


def test_use_backend_is_this_threads_own():
    seen = []
    with vvae_fast.use_backend("reference"):
        other = threading.Thread(target=lambda: seen.append(backends.select(problem(), None).name))
        other.start()
        other.join()
    assert seen == ["cpp"]


def test_environment_chooses(monkeypatch):
    code = "import torch, vvae_fast; print(vvae_fast.PlanarFlow(2, 3)(torch.zeros(4, 2))[0].grad_fn.name())"
    assert "PlanarFlow" in python(code).stdout
    assert "PlanarFlow" not in python(code, VVAE_FAST_BACKEND="reference").stdout
    assert "VVAE_FAST_BACKEND must be one of" in python(code, VVAE_FAST_BACKEND="gpu").stderr
    monkeypatch.setattr(selection, "environment_name", "reference")
    assert backends.select(problem(), None).name == "reference"
    assert backends.select(problem(), "cpp").name == "cpp"
    monkeypatch.setattr(selection, "environment_name", "gpu")
    with pytest.raises(ValueError, match=r"environment variable VVAE_FAST_BACKEND must be one of .* got 'gpu'"):
        backends.select(problem(), None)


def test_the_reference_is_what_runs_under_use_backend():
    p = random_problem((3,), 2, 2)
    inputs = [t.requires_grad_() for t in p.inputs]
    with vvae_fast.use_backend("reference"):
        assert "PlanarFlow" not in vvae_fast.planar_flow(*inputs)[0].grad_fn.name()
    assert "PlanarFlow" in vvae_fast.planar_flow(*inputs)[0].grad_fn.name()


def test_info():
    info = vvae_fast.info()
    assert info["version"] == info["build"]["version"] == __version__
    assert info["torch"] == torch.__version__
    assert info["backends"]["cpp"] == {"available": True, "reasons": []}
    assert info["isa"] in info["isa_levels"]
    built = info["build"]["cuda_build"]
    assert built == "built" or built.startswith("not built: ")
    assert bool(info["build_cuda"]) == (built == "built")


def test_instruction_set_from_the_environment():
    level = cpp.isa_levels()[-1]
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
        "from vvae_fast import backends, shapes, spec\n"
        "p = shapes.check(torch.zeros(4, 2), *[torch.zeros(3, 2)] * 2, torch.zeros(3), spec.DEFAULT)\n"
        "print(backends.select(p, None).name, backends.select(p, 'triton').name)\n"
    )
    pytest.importorskip("triton", reason="Triton is not installed")
    done = python(code, TRITON_INTERPRET="1")
    assert done.stdout == "cpp triton\n", done.stderr


@pytest.fixture
def gpu_backends(monkeypatch):
    """Both backends for GPUs as if there were one, and a table that a test may fill: {name: why it is not there}."""
    reasons = {"triton": [], "cuda": []}
    for name, why in reasons.items():
        there = dataclasses.replace(selection._BACKENDS[name], unavailable=lambda why=why: why)
        monkeypatch.setitem(selection._BACKENDS, name, there)
    monkeypatch.setattr(cuda, "most_dim", {torch.float32: 2048, torch.float64: 1024})
    monkeypatch.setattr(_measured, "FASTER", {})
    gpu_choice.nearest.cache_clear()
    yield reasons
    gpu_choice.nearest.cache_clear()


def on_gpu(rows: int = 100, dim: int = 2, num_steps: int = 8, **changes) -> shapes.Problem:
    return shapes.Problem(rows, dim, num_steps, 1, False, torch.float32, "cuda")._replace(**changes)


def test_cuda_is_refused_with_the_reason_where_it_cannot_run():
    code = (
        "import torch, vvae_fast\n"
        "print(vvae_fast.info()['backends']['cuda'])\n"
        "vvae_fast.PlanarFlow(2, 3, backend='cuda')(torch.zeros(4, 2))\n"
    )
    done = python(code, CUDA_VISIBLE_DEVICES="")
    reason = cuda.load_error or "PyTorch sees no GPU here"
    assert f"'reasons': [{reason!r}]" in done.stdout
    assert f"RuntimeError: the backend 'cuda' was asked for and cannot run: {reason}" in done.stderr


def test_old_gpus_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(cuda, "load_error", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpus = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    cuda._newest_capability.cache_clear()
    assert cuda._unavailable() == ["the CUDA kernels need a GPU of compute capability 8.0, got 7.5"]
    cuda._newest_capability.cache_clear()
    gpus.append((8, 6))
    assert cuda._unavailable() == []
    cuda._newest_capability.cache_clear()


@pytest.mark.parametrize("module", ["raise OSError('libcudart is gone')", "# an older one, without most_dim"])
def test_cuda_kernels_that_do_not_load_are_a_reason_and_no_error(monkeypatch, tmp_path, module):
    class Finder:
        @staticmethod
        def find_spec(name, *rest):
            return importlib.util.spec_from_file_location(name, path) if name.endswith("._C_cuda") else None

    path = tmp_path / "module.py"
    path.write_text(module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp, "build_facts", lambda: {"cuda_build": "built"})
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "vvae_fast._C_cuda", raising=False)
    monkeypatch.delattr(vvae_fast, "_C_cuda", raising=False)
    loaded, reason = cuda._load()
    sys.modules.pop("vvae_fast._C_cuda", None)
    assert loaded is None
    assert reason.startswith("the extension vvae_fast._C_cuda did not load (")
    assert reason.endswith("build it again with `pip install .`")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
def test_a_pytorch_without_cuda_never_loads_the_cuda_kernels():
    assert cuda.load_error == f"PyTorch {torch.__version__} is not built for CUDA"
    assert cuda.build_facts() == {}
    with pytest.raises(RuntimeError, match="is not built for CUDA"):
        cuda.set_form("direct")


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        ("not built: NO_CUDA was set", "_C_cuda was not built: NO_CUDA was set .*FORCE_CUDA=1 pip install"),
        ("built", r"_C_cuda did not load \(.*No module.*|import of .*\): build it again"),
    ],
)
def test_why_the_cuda_kernels_are_not_there(fact, reason, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp, "build_facts", lambda: {"cuda_build": fact})
    monkeypatch.setitem(sys.modules, "vvae_fast._C_cuda", None)
    module, error = cuda._load()
    assert module is None
    assert re.search(reason, error)


def test_what_the_cuda_backend_does_not_do(gpu_backends):
    def refused(p: shapes.Problem) -> str:
        with pytest.raises(RuntimeError, match="the backend 'cuda' was asked for and cannot run") as error:
            backends.select(p, "cuda")
        return str(error.value)

    assert "runs on cuda tensors, got cpu" in refused(problem())
    assert "runs D up to 2048, got 2049" in refused(on_gpu(dim=2049))
    assert "runs D up to 1024, got 2048" in refused(on_gpu(dim=2048, compute_dtype=torch.float64))
    assert backends.select(on_gpu(), "cuda").name == backends.select(on_gpu(inverse=True), "cuda").name == "cuda"
    gpu_backends["cuda"].append("PyTorch sees no GPU here")
    assert refused(on_gpu()).endswith("PyTorch sees no GPU here")


def test_auto_takes_what_was_measured_to_be_faster(gpu_backends, monkeypatch):
    assert backends.select(on_gpu(), None).name == "triton"
    monkeypatch.setattr(_measured, "FASTER", {("shared", 2, 8): {128: "cuda", 65536: "triton"}})
    assert backends.select(on_gpu(), None).name == "cuda"
    assert backends.select(on_gpu(rows=10**6), None).name == "triton"
    assert backends.select(on_gpu(amortized=True), None).name == "triton"
    assert backends.select(problem(), None).name == "cpp"
    assert backends.select(on_gpu(inverse=True), None).name == "cuda"
    assert backends.select(on_gpu(inverse=True, dim=2049), None).name == "reference"


def test_auto_takes_the_other_where_the_faster_cannot_run(gpu_backends, monkeypatch):
    gpu_backends["triton"].append("Triton is not installed")
    assert backends.select(on_gpu(), None).name == "cuda"
    gpu_backends["triton"].clear()
    monkeypatch.setattr(_measured, "FASTER", {("shared", 1024, 8): {128: "cuda"}})
    assert backends.select(on_gpu(dim=2048), None).name == "cuda"
    assert backends.select(on_gpu(dim=2049), None).name == "triton"
    gpu_backends["cuda"].append("not built")
    assert backends.select(on_gpu(dim=2048), None).name == "triton"
    gpu_backends["triton"].append("Triton is not installed")
    assert backends.select(on_gpu(), None).name == "reference"


@pytest.mark.usefixtures("gpu_backends")
def test_the_nearest_measured_class_of_the_same_parameters_counts(monkeypatch):
    table = {
        ("shared", 64, 32): {1024: "cuda", 65536: "triton"},
        ("shared", 8, 8): {1024: "triton"},
        ("amortized", 2, 8): {128: "cuda"},
    }
    monkeypatch.setattr(_measured, "FASTER", table)
    assert gpu_choice.preferred(on_gpu(1024, 64, 32)) == "cuda"
    assert gpu_choice.preferred(on_gpu(1025, 40, 9)) == "cuda"  # 8,192 rows are as far from both: the first counts
    assert gpu_choice.preferred(on_gpu(8193, 64, 32)) == "triton"
    assert gpu_choice.preferred(on_gpu(128, 512, 128)) == "cuda"
    assert gpu_choice.preferred(on_gpu(0, 1, 0)) == "triton"
    assert gpu_choice.preferred(on_gpu(10**7, 10**5, 10**4, amortized=True)) == "cuda"


@pytest.mark.usefixtures("gpu_backends")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_sees_through_the_choice(dynamic, monkeypatch):
    monkeypatch.setattr(_measured, "FASTER", {("shared", 64, 8): {1024: "cuda", 65536: "triton"}})

    def flow(z):
        problem = on_gpu(z.shape[0], z.shape[1], compute_dtype=z.dtype)
        return z.sum() + int(backends.select(problem, None).name == "cuda")

    compiled = torch.compile(flow, fullgraph=True, backend="eager", dynamic=dynamic)
    for rows, takes_cuda in ((100, 1), (65536, 0), (300, 1)):
        assert compiled(torch.zeros(rows, 60)).item() == flow(torch.zeros(rows, 60)).item() == takes_cuda


def test_the_committed_table_is_of_classes_that_are_looked_up():
    for (parameters, dim, num_steps), by_rows in _measured.FASTER.items():
        assert parameters in ("shared", "amortized")
        assert dim in gpu_choice.DIMS
        assert num_steps in gpu_choice.STEPS
        assert set(by_rows) <= set(gpu_choice.ROWS)
        assert set(by_rows.values()) <= {"cuda", "triton"}
    assert bool(_measured.FASTER) == (_measured.MEASURED_ON is not None)
