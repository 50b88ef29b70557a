"""The script that writes which GPU backend is the faster: what it times, keeps and writes. No clock runs here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import tune_backends
from benchmarks.gpu.tune_backends import Shape
from vvae_fast import shapes
from vvae_fast.backends import _measured, gpu_choice
from vvae_fast.spec import FlowSpec

SHAPE = Shape("shared", 2, 8, 128)
CLASSES = {
    (parameters, dim, steps): dict.fromkeys(gpu_choice.ROWS, "triton")
    for parameters in ("shared", "amortized")
    for dim in gpu_choice.DIMS
    for steps in gpu_choice.STEPS
}


@pytest.fixture
def on_cpu(monkeypatch):
    """Two backends that run here stand in for those of a GPU."""
    monkeypatch.setattr(tune_backends, "BACKENDS", ("reference", "cpp"))


def scripted(times: dict[str, list[float]]):
    """A clock that runs the call and reports the next of the backend's times."""
    left = {name: iter(seconds) for name, seconds in times.items()}

    def clock(name, call) -> float:
        call()
        return next(left[name])

    return clock


def test_the_committed_table_is_what_the_script_writes():
    assert tune_backends.render(_measured.MEASURED_ON, _measured.FASTER) == Path(_measured.__file__).read_text()


def test_a_table_is_written_in_order_and_read_back():
    table = {("amortized", 8, 8): {128: "cuda"}, ("shared", 16, 8): {1024: "triton", 128: "cuda"}}
    names = {}
    exec(tune_backends.render("NVIDIA H200", table), names)
    assert names["MEASURED_ON"] == "NVIDIA H200"
    assert names["FASTER"] == table
    assert list(names["FASTER"]) == [("shared", 16, 8), ("amortized", 8, 8)]
    assert list(names["FASTER"]["shared", 16, 8]) == [128, 1024]


def test_the_largest_table_is_formatted():
    text = tune_backends.render("NVIDIA H200", CLASSES)
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", "-"]
    if subprocess.run([*ruff[:3], "--version"], capture_output=True).returncode:
        pytest.skip("ruff is not installed")
    assert subprocess.run(ruff, input=text, text=True, capture_output=True).returncode == 0


def test_shapes_are_classes_and_fit():
    found = tune_backends.shapes()
    assert len(found) == len(set(found))
    assert found == tune_backends.shapes()
    assert Shape("amortized", 1024, 128, 524288) not in found
    assert {shape[:3] for shape in found} == set(CLASSES)
    assert {shape.rows for shape in found} == set(gpu_choice.ROWS)


@pytest.mark.parametrize("parameters", ["shared", "amortized"])
def test_a_shape_is_timed_on_a_problem_of_its_class(parameters, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_choice, "nearest", lambda *key: seen.append(key))
    monkeypatch.setattr(_measured, "FASTER", CLASSES)
    shape = Shape(parameters, 8, 32, 1024)
    leaves, _ = tune_backends.problem_of(shape, "cpu")
    gpu_choice.preferred(shapes.check(*leaves, FlowSpec()))
    assert seen == [shape]


@pytest.mark.usefixtures("on_cpu")
def test_medians_of_alternating_rounds_decide(tmp_path, capsys):
    clock = scripted({"cpp": [1.0, 9.0, 1.0, 9.0, 1.0, 1.0, 1.0], "reference": [2.0] * 7})
    file = tmp_path / "table.py"
    tune_backends.tune([SHAPE], clock, file, "a GPU", float("inf"), "cpu")
    names = {}
    exec(file.read_text(), names)
    assert names["FASTER"] == {SHAPE[:3]: {SHAPE.rows: "cpp"}}
    assert "shared 2 8 128: reference 2000000.0 us, cpp 1000000.0 us: cpp" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
def test_what_was_measured_on_another_gpu_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(_measured, "MEASURED_ON", "the old GPU")
    monkeypatch.setattr(_measured, "FASTER", {("shared", 64, 8): {128: "cuda"}})
    for gpu, kept in (("the old GPU", True), ("a GPU", False)):
        clock = scripted({"cpp": [1.0] * 7, "reference": [2.0] * 7})
        tune_backends.tune([SHAPE], clock, tmp_path / "table.py", gpu, float("inf"), "cpu")
        names = {}
        exec((tmp_path / "table.py").read_text(), names)
        assert (("shared", 64, 8) in names["FASTER"]) == kept
        assert SHAPE[:3] in names["FASTER"]
    assert {*_measured.FASTER} == {("shared", 64, 8)}


@pytest.mark.usefixtures("on_cpu")
def test_answers_that_differ_and_refusals_are_not_timed(tmp_path, monkeypatch, capsys):
    file = tmp_path / "table.py"
    monkeypatch.setattr(tune_backends, "same", lambda answers: False)
    tune_backends.tune([SHAPE], None, file, "a GPU", float("inf"), "cpu")
    monkeypatch.setattr(tune_backends, "BACKENDS", ("cuda", "cpp"))
    tune_backends.tune([SHAPE], None, file, "a GPU", float("inf"), "cpu")
    printed = capsys.readouterr().out
    assert "not measured: the answers differ" in printed
    assert "not measured: the backend 'cuda' was asked for and cannot run" in printed
    assert not file.exists()


def test_a_nan_is_no_answer():
    x, nan = torch.ones(2), torch.full((2,), float("nan"))
    assert tune_backends.same([(x, x), (x, x * 1.0001)])
    assert not tune_backends.same([(x, nan), (x, nan)])
    assert not tune_backends.same([(x, x), (x, x * 1.01)])


@pytest.mark.usefixtures("on_cpu")
def test_no_shape_is_started_when_the_time_is_up(tmp_path, capsys):
    tune_backends.tune([SHAPE], None, tmp_path / "table.py", "a GPU", -1.0, "cpu")
    assert capsys.readouterr().out == "1 of 1 shapes were not measured: the time is up\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the script would tune for")
def test_without_a_gpu_it_says_so(capsys):
    assert tune_backends.main([]) == 1
    assert capsys.readouterr().out == "missing: PyTorch sees no GPU\n"
