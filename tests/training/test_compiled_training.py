"""`train --compile` and `compare --compile`: whole graphs, the results of runs without, or one line that says why not.

Most of these compile for aot_eager, which traces, partitions and differentiates as inductor does and spares C++.
"""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

from vvae_fast.nn.vae import VAE
from vvae_fast.train.base.files import read_json
from vvae_fast.train.cli import main
from vvae_fast.train.data.sets import load_dataset
from vvae_fast.train.run import compiling, runs
from vvae_fast.train.run.runconfig import RunConfig, data_digest

TOLERANCE = 1e-4  # nats
OPTIONS = "--epochs 1 --batch-size 40 --latent-dim 2 --hidden 5 --num-samples 5 --compile"


@pytest.fixture(scope="module")
def dataset():
    digits = load_dataset("digits")
    return dataclasses.replace(digits, train=digits.train[:100], val=digits.val[:40], test=digits.test[:30])


@pytest.fixture
def graphs(monkeypatch):
    """Compiles for aot_eager; counts graphs."""
    counter, compile_ = CompileCounterWithBackend("aot_eager"), VAE.compile

    def for_aot_eager(self, mode, **options):
        compile_(self, backend=counter, **options)

    monkeypatch.setattr(VAE, "compile", for_aot_eager)
    return counter


@pytest.fixture
def bits(tmp_path) -> str:
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)))
    return str(tmp_path / "bits.npy")


def make_config(dataset, **changes) -> RunConfig:
    settings = {
        **{"model": "amortized", "num_steps": 2, "seed": 3, "data": "digits", "data_digest": data_digest(dataset)},
        **{"epochs": 3, "batch_size": 50, "latent_dim": 3, "hidden": (7,), "lr": 1e-2},
        **{"warmup_epochs": 1, "patience": 0, "num_samples": 20},
    }
    return RunConfig(**{**settings, **changes})


def assert_alike(got: dict, wanted: dict) -> None:
    for key in ("neg_elbo", "nll", "kl", "num_parameters", "status", "best_epoch"):
        assert got[key] == pytest.approx(wanted[key], abs=TOLERANCE)
    for x, y in zip(got["history"], wanted["history"], strict=True):
        assert {**x, "seconds": 0} == pytest.approx({**y, "seconds": 0}, abs=TOLERANCE)


def one_line_and_exit_2(capsys, arguments: list[str]) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("vvae-fast: error: torch.compile ")
    assert error.endswith("--compile out to train without it\n")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("model", "num_steps", "batch_size", "shapes"),
    [("vanilla", 0, 40, 3), ("amortized", 2, 50, 2), ("shared", 2, 50, 2)],
)
def test_results_are_those_of_a_run_without(dataset, tmp_path, graphs, model, num_steps, batch_size, shapes):
    """100 training rows by 40 leave 20; 40 validation rows are one batch."""
    config = make_config(dataset, model=model, num_steps=num_steps, batch_size=batch_size)
    wanted = runs.run(config, dataset, tmp_path / "without")
    assert graphs.frame_count == 0
    got = runs.run(config, dataset, tmp_path / "with", compile_=True)
    assert graphs.frame_count == shapes
    assert_alike(got, wanted)
    assert read_json(tmp_path / "with" / "environment.json")["compile"] == "default"
    assert read_json(tmp_path / "without" / "environment.json")["compile"] is None
    assert read_json(tmp_path / "with" / "config.json") == read_json(tmp_path / "without" / "config.json")
    stored = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("with", "without")]
    assert list(stored[0]["state_dict"]) == list(stored[1]["state_dict"])


def test_a_run_goes_on_with_or_without(dataset, tmp_path, graphs):
    def interrupt(stage, history):
        if len(history) == 1:
            raise KeyboardInterrupt

    config = make_config(dataset, epochs=2)
    wanted = runs.run(config, dataset, tmp_path / "whole")
    for first in (True, False):
        folder, before = tmp_path / f"{first} first", graphs.frame_count
        with pytest.raises(KeyboardInterrupt):
            runs.run(config, dataset, folder, interrupt, compile_=first)
        got = runs.run(config, dataset, folder, compile_=not first)
        assert graphs.frame_count == before + 2
        assert_alike(got, wanted)


def test_a_comparison_of_more_graphs_than_are_kept(bits, tmp_path, graphs):
    """Each run starts without the graphs of the one before; a finished one compiles nothing."""
    out = tmp_path / "out"
    models = ["--steps", "1", "--seeds", "0"]
    command = ["compare", *OPTIONS.split(), *models, "--data", bits, "--out", str(out)]
    for _ in range(2):
        with torch._dynamo.config.patch(recompile_limit=2):
            assert main(command) == 0
        assert graphs.frame_count == 2 * 2
    assert read_json(out / "results.json")["environment"]["compile"] == "default"


@pytest.mark.parametrize("compile_", [False, True])
def test_data_of_no_probability_are_refused(dataset, tmp_path, graphs, compile_):
    wrong = dataclasses.replace(dataset, likelihood="bernoulli", total_count=None)  # counts to 16
    with pytest.raises(ValueError, match=r"x must hold values in \[0, 1\] for the bernoulli likelihood, got .* to 16"):
        runs.run(make_config(wrong), wrong, tmp_path, compile_=compile_)
    assert graphs.frame_count == 0


def test_a_graph_break_is_an_error(bits, tmp_path, graphs, monkeypatch, capsys):
    forward = VAE.forward

    def broken(self, x, noise):
        torch._dynamo.graph_break()
        return forward(self, x, noise=noise)

    monkeypatch.setattr(VAE, "forward", broken)
    command = ["train", *OPTIONS.split(), "--model", "vanilla", "--data", bits, "--out", str(tmp_path / "run")]
    assert "torch.compile failed (" in one_line_and_exit_2(capsys, command)
    assert not (tmp_path / "run" / "result.json").exists()


def test_no_compiler(bits, tmp_path, capsys):
    """Inductor's own words, in one line; the same folder then trains without."""
    command = ["train", *OPTIONS.split(), "--model", "vanilla", "--data", bits, "--out", str(tmp_path / "run")]
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        assert "/no/such/compiler" in one_line_and_exit_2(capsys, command)
    assert main([part for part in command if part != "--compile"]) == 0


def test_compiling_that_is_turned_off(bits, tmp_path, capsys):
    command = ["train", *OPTIONS.split(), "--data", bits, "--out", str(tmp_path / "run")]
    with torch._dynamo.config.patch(disable=True):
        assert "TORCHDYNAMO_DISABLE" in one_line_and_exit_2(capsys, command)


def test_a_python_that_is_not_compiled_for(bits, tmp_path, monkeypatch, capsys):
    def refuse(self, **options):
        raise RuntimeError("torch.compile is not supported on Python 4.0+\nmore")

    monkeypatch.setattr(VAE, "compile", refuse)
    command = ["train", *OPTIONS.split(), "--data", bits, "--out", str(tmp_path / "run")]
    assert "not supported on Python 4.0+); leave" in one_line_and_exit_2(capsys, command)


def test_other_errors_are_not_taken_for_the_compilers(dataset, tmp_path, graphs, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a defect")

    monkeypatch.setattr(runs.VAEModule, "on_train_epoch_end", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        runs.run(make_config(dataset), dataset, tmp_path, compile_=True)


@pytest.mark.parametrize(("device", "mode"), [("cuda", "reduce-overhead"), ("cpu", "default")])
def test_a_gpu_takes_cuda_graphs(monkeypatch, device, mode):
    monkeypatch.setattr(compiling.processes, "device", lambda: torch.device(device))
    asked = []
    monkeypatch.setattr(VAE, "compile", lambda self, **options: asked.append(options))
    vae = VAE(torch.nn.Linear(4, 3), torch.nn.Linear(2, 4), 2)
    with compiling.compiled(vae, True):
        pass
    assert asked == [{"fullgraph": True, "dynamic": False, "mode": mode}]


TWO_PROCESSES = """
import sys
from vvae_fast.nn.vae import VAE
from vvae_fast.train.cli import main

compile_ = VAE.compile
VAE.compile = lambda self, mode, **options: compile_(self, backend="aot_eager", **options)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_two_processes_compile_and_train_what_one_does(bits, tmp_path):
    """80 training rows: the last batch has 1, and one of the processes none of it."""
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    options = "train --epochs 1 --batch-size 79 --latent-dim 2 --hidden 5 --steps 2 --num-samples 9"
    command = [*options.split(), "--data", bits, "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "program.py")]
    command_of_two = [sys.executable, *launcher, *command, str(tmp_path / "two"), "--compile"]
    done = subprocess.run(command_of_two, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert_alike(two, one)
