import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vvae_fast.train.base.files import RunError
from vvae_fast.train.cli import main
from vvae_fast.train.data.sets import load_dataset
from vvae_fast.train.run.networks import build_vae
from vvae_fast.train.study.compare import COLUMNS, RECORD, Model, print_table
from vvae_fast.train.study.spread import in_words
from vvae_fast.train.study.studies import load_study

CONFIGS = Path(__file__).parents[2] / "configs"
PDFS = ("elbo.pdf", "posterior.pdf")
PLOTS = ("elbo.png", "reconstructions.png", "samples.png", "posterior.png")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "counts.npy", rng.integers(0, 5, (100, 4, 4)))
    return tmp_path / "counts.npy"


def arguments(data, out, *more: str) -> list[str]:
    options = "--epochs 2 --batch-size 40 --latent-dim 2 --hidden 5 --num-samples 10 --steps 1 2 --seeds 0 1"
    return ["compare", "--data", str(data), "--out", str(out), *options.split(), *more]


def records(out) -> list[dict]:
    return json.loads((out / "results.json").read_text())["runs"]


@pytest.mark.parametrize(
    ("nlls", "vanilla", "words"),
    [
        ([95.0, 96.0, 97.0], [98.0, 99.0, 100.6], "3.20 ± 0.35 nats better than the vanilla VAE in NLL (3 seeds)"),
        ([98.0, 99.0], [95.0, 96.0], "3.00 ± 0.00 nats worse than the vanilla VAE in NLL (2 seeds)"),
        ([98.0, 95.0], [97.0, 97.0], "no clear difference from the vanilla VAE, NLL -0.50 ± 2.12 nats (2 seeds)"),
        ([95.0, 95.0], [95.0, 95.0], "no clear difference from the vanilla VAE, NLL +0.00 ± 0.00 nats (2 seeds)"),
        ([95.0, None, 1.0], [98.0, 90.0, None], "3.00 nats better than the vanilla VAE in NLL (one seed)"),
        ([None], [98.0], "not compared with the vanilla VAE, no seed has a score of both"),
    ],
)
def test_a_gain_in_words(nlls, vanilla, words):
    assert in_words("a flow", nlls, vanilla) == f"a flow: {words}"


def test_table_results_and_plots(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(data, out, "--shared")) == 0
    runs = records(out)
    assert [tuple(run) for run in runs] == [RECORD] * 10
    models = [(run["model"], run["num_steps"], run["seed"]) for run in runs]
    kinds = [("vanilla", 0), ("amortized", 1), ("amortized", 2), ("shared", 1), ("shared", 2)]
    assert models == [(*kind, seed) for kind in kinds for seed in (0, 1)]
    for run in runs:
        assert run["neg_elbo"] == pytest.approx(run["reconstruction"] + run["kl"], rel=1e-6)
        assert run["seconds_per_epoch"] > 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert "-ELBO" in rows[0]
    assert "NLL" in rows[0]
    assert "s / epoch" in rows[0]
    mean = sum(run["nll"] for run in runs[:2]) / 2
    assert rows[2].split()[1:3] == ["vanilla", "VAE"]
    assert f"{mean:.2f} ±" in rows[2]
    assert len(rows) == 2 + len(kinds)
    assert "[10/10] shared planar K=2, seed 1: -ELBO" in printed
    vanilla, shared = ([run["nll"] for run in runs[start : start + 2]] for start in (0, 8))
    assert in_words("shared planar K=2", shared, vanilla) in printed
    assert "standard deviations of the seeds' differences." in printed
    assert all((out / name).read_bytes().startswith(b"%PDF") for name in PDFS)
    image = pytest.importorskip("matplotlib.image")
    for name in PLOTS:
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.05


def test_matched_adds_vanilla_vaes_of_as_many_parameters(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(data, out)) == 0
    alone = capsys.readouterr().out
    counts = {(run["model"], run["num_steps"], run["matched"]): run["num_parameters"] for run in records(out)}
    ratio = counts["amortized", 2, 0] / counts["vanilla", 0, 0]
    advice = "; --matched, or vanilla-matched in a study's file, adds a vanilla VAE of as many"
    assert f"\namortized planar K=2 has {ratio:.1f} times the vanilla VAE's parameters{advice}\n" in alone
    assert main(arguments(data, out, "--matched", "2")) == 0
    one = capsys.readouterr().out
    assert "K=2 has" not in one
    assert (
        "than the vanilla VAE, matched to K = 2 in NLL" in one or "from the vanilla VAE, matched to K = 2, NLL" in one
    )
    assert main(arguments(data, out, "--matched")) == 0
    assert "times the vanilla VAE's parameters" not in capsys.readouterr().out
    counts = {(run["model"], run["num_steps"], run["matched"]): run["num_parameters"] for run in records(out)}
    assert len(counts) == 5
    for num_steps in (1, 2):
        wide, flow = counts["vanilla", 0, num_steps], counts["amortized", num_steps, 0]
        assert flow <= wide < 1.2 * flow


def test_no_advice_where_no_width_can_match(capsys):
    run = {"nll": 1.0, "status": "finished", "best_epoch": 0, "epochs_done": 2, "seed": 0}
    run |= dict.fromkeys(COLUMNS, 1.0)
    counts = {Model("vanilla", 0): 10, Model("amortized", 4): 50, Model("shared", 4): 11}
    print_table({model: [{**run, "num_parameters": count}] for model, count in counts.items()}, can_match=False)
    printed = capsys.readouterr().out
    assert "\namortized planar K=4 has 5.0 times the vanilla VAE's parameters\n" in printed
    assert "shared planar K=4 has" not in printed


def test_a_best_epoch_that_is_the_last_is_told(capsys):
    run = {"nll": 1.0, "status": "finished", "seed": 0, "num_parameters": 10, "epochs_done": 2}
    runs = [{**run, **dict.fromkeys(COLUMNS, 1.0), "best_epoch": epoch} for epoch in (1, 0, 1)]
    print_table({Model("vanilla", 0): runs, Model("shared", 4): runs[1:2] * 3})
    printed = capsys.readouterr().out
    assert (
        "\nvanilla VAE was still improving at the last epoch (2 of 3 seeds): more --epochs go on with it\n" in printed
    )
    assert "shared planar K=4 was" not in printed
    print_table({Model("vanilla", 0): runs[:1]})
    assert "\nvanilla VAE was still improving at the last epoch: more --epochs" in capsys.readouterr().out


def test_a_second_call_repeats_nothing_and_fresh_repeats_all(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(data, out)) == 0
    before = records(out)
    result = out / "vanilla-seed0" / "result.json"
    written = result.stat().st_mtime_ns
    assert main(arguments(data, out)) == 0
    assert records(out) == before
    assert result.stat().st_mtime_ns == written
    assert main(arguments(data, out, "--fresh")) == 0
    assert result.stat().st_mtime_ns > written
    scores = [[run["nll"] for run in runs] for runs in (before, records(out))]
    assert scores[0] == scores[1]


def test_another_configuration_is_refused_before_anything_is_trained(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(data, out, "--seeds", "0", "--steps", "1")) == 0
    capsys.readouterr()
    assert main(arguments(data, out, "--latent-dim", "3", "--seeds", "1", "0")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "latent_dim is 2 there, 3 here" in captured.err
    assert "--fresh" in captured.err
    assert "--out" in captured.err
    assert not (out / "vanilla-seed1").exists()


@pytest.mark.long
def test_sigkill_loses_no_finished_epoch(data, tmp_path):
    """A killed program's comparison, taken up again, ends where an uninterrupted one ends."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = ("--epochs", "80", "--seeds", "0", "--steps", "1")
    program = [sys.executable, "-m", "vvae_fast", *arguments(data, killed, *long)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    last = killed / "amortized-K1-seed0" / "last.ckpt"
    while not last.exists() and process.poll() is None:  # however long this machine takes
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert last.exists()
    assert not (killed / "results.json").exists()
    finished = (killed / "vanilla-seed0" / "result.json").read_bytes()
    assert main(arguments(data, killed, *long)) == main(arguments(data, whole, *long)) == 0
    assert (killed / "vanilla-seed0" / "result.json").read_bytes() == finished
    scores = [[(run["neg_elbo"], run["nll"]) for run in records(out)] for out in (killed, whole)]
    assert scores[0] == scores[1]


def test_layer_norm_is_a_setting_of_the_heads_with_a_rank(tmp_path):
    text = (CONFIGS / "families" / "mnist_rank_layer_norm.yaml").read_text()
    (tmp_path / "study.yaml").write_text(text)
    study, dataset = load_study(tmp_path / "study.yaml"), load_dataset("digits")
    configs = [model.config(study.base(dataset), 0, dataset) for model in study.models]
    assert [config.layer_norm for config in configs] == [config.rank > 0 for config in configs]
    flows = [build_vae(config, dataset).flow for config in configs]
    assert [getattr(flow, "layer_norm", False) for flow in flows] == [config.layer_norm for config in configs]
    assert configs[-1].name == "amortized-K80-rank128-layer-norm-seed0"
    (tmp_path / "study.yaml").write_text(text.replace("layer_norm: true", "layer_norm: 1"))
    with pytest.raises(RunError, match="layer_norm must be true or false, got 1"):
        load_study(tmp_path / "study.yaml")
