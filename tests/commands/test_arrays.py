"""`vvae-fast sample`, `reconstruct` and `encode`, and `load_run`: arrays out of a trained run, and their rows."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import data, one_line_and_exit_2, small  # noqa: F401  # data is a fixture
from test_gaps_command import run  # noqa: F401  # a fixture

from vvae_fast.train import cli, load_run
from vvae_fast.train.base.files import RunError
from vvae_fast.train.cli import main
from vvae_fast.train.data.sets import SPLITS, load_dataset
from vvae_fast.train.trained import reconstruct, rows_of

COMMANDS = ("sample", "reconstruct", "encode")
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def written(tmp_path, *command: str) -> dict[str, np.ndarray]:
    out = tmp_path / "arrays" / "of.npz"
    assert main([*command, "--out", str(out)]) == 0
    with np.load(out) as arrays:
        return dict(arrays)


def test_load_run_gives_the_vae_its_settings_and_the_rows_of_its_splits(run, data):  # noqa: F811
    loaded = load_run(run)
    assert not loaded.vae.training
    assert (loaded.config.name, loaded.vae.latent_dim) == ("amortized-K1-seed0", 2)
    everything = np.load(data)
    assert np.array_equal(np.sort(np.concatenate([loaded.rows[split] for split in SPLITS])), np.arange(100))
    for split in SPLITS:
        assert np.array_equal(everything[loaded.rows[split]], getattr(loaded.dataset, split))
    weights = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in loaded.vae.state_dict().items():
        assert torch.equal(value, weights[f"vae.{name}"])


def test_load_run_takes_paths_as_texts_and_data_from_elsewhere(run, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir("/")
    assert load_run(str(run), data=data).config == load_run(run, root=tmp_path).config
    with pytest.raises(RunError, match=r"best.ckpt: no such checkpoint; check the path"):
        load_run(tmp_path)


def test_rows_of_digits():
    images = pytest.importorskip("sklearn.datasets").load_digits().images
    digits = load_dataset("digits")
    for split in SPLITS:
        assert np.array_equal(images[digits.row_numbers(split)], getattr(digits, split))


def test_rows_of_splits_that_are_arrays_of_their_own(tmp_path):
    np.savez(tmp_path / "of.npz", train=np.eye(5), val=np.eye(5)[:3], test=np.eye(5)[:2])
    dataset = load_dataset(str(tmp_path / "of.npz"))
    assert [dataset.row_numbers(split).tolist() for split in SPLITS] == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1]]


def test_load_run_refuses_what_is_no_path(run, data):  # noqa: F811
    assert load_run(run, data=Path(data)).config == load_run(run).config
    for arguments, words in (
        ({"folder": 3}, "folder must be a path, a str or a Path, got int"),
        ({"folder": run, "data": np.load(data)}, "data must be a path, .* got ndarray; for new rows call the VAE"),
        ({"folder": run, "root": 1.0}, "root must be a path, a str or a Path, got float"),
    ):
        with pytest.raises(TypeError, match=words):
            load_run(**arguments)


@pytest.mark.parametrize("split", SPLITS)
def test_encode_writes_the_posterior_of_each_row(run, data, tmp_path, split):  # noqa: F811
    arrays = written(tmp_path, "encode", str(run), "--split", split, "--num-samples", "3")
    loaded = load_run(run)
    x = torch.from_numpy(np.load(data)[arrays["rows"]]).float()
    count = len(x)
    assert {name: array.shape for name, array in arrays.items()} == {
        "rows": (count,),
        "mean": (count, 2),
        "log_var": (count, 2),
        "z_K": (3, count, 2),
        "log_q": (3, count),
    }
    with torch.no_grad():
        posterior = loaded.vae.encode(x)
        z_0, log_det = loaded.vae.flow.inverse(torch.from_numpy(arrays["z_K"]), posterior.features)
        deviation = (z_0 - posterior.mean) * (-0.5 * posterior.log_var).exp()
        log_q = -(0.5 * deviation.square() + 0.5 * posterior.log_var + HALF_LOG_2PI).sum(-1) + log_det
    np.testing.assert_allclose(arrays["mean"], posterior.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays["log_var"], posterior.log_var, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays["log_q"], log_q, rtol=1e-3, atol=1e-3)


def test_reconstruct_writes_rows_beside_their_reconstructions(run, data, tmp_path):  # noqa: F811
    arrays = written(tmp_path, "reconstruct", str(run), "--split", "val")
    assert np.array_equal(np.load(data)[arrays["rows"]], arrays["x"])
    assert arrays["reconstruction"].shape == arrays["x"].shape
    assert ((arrays["reconstruction"] > 0) & (arrays["reconstruction"] < 1)).all()


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_all_splits_stand_in_the_order_of_the_file(run, data, tmp_path, command):  # noqa: F811
    arrays = written(tmp_path, command, str(run), "--split", "all")
    loaded = load_run(run)
    assert arrays["rows"].tolist() == list(range(100))
    for number, split in enumerate(SPLITS):
        assert np.array_equal(np.flatnonzero(arrays["split"] == number), np.sort(loaded.rows[split]))
    x = torch.from_numpy(np.load(data)).float()
    if command == "reconstruct":
        assert np.array_equal(arrays["x"], x)
    else:
        with torch.no_grad():
            np.testing.assert_allclose(arrays["mean"], loaded.vae.encode(x).mean, rtol=1e-5, atol=1e-6)


def test_splits_that_are_arrays_of_their_own_stand_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("of.npz", train=np.eye(8), val=np.eye(8)[:3], test=np.eye(8)[:2])
    assert main(small("--data", "of.npz", "--out", "run")) == 0
    arrays = written(tmp_path, "reconstruct", "run", "--split", "all")
    assert arrays["rows"].tolist() == [*range(8), *range(3), *range(2)]
    assert arrays["split"].tolist() == [0] * 8 + [1] * 3 + [2] * 2
    assert np.array_equal(arrays["x"], np.eye(8)[arrays["rows"]])


def test_sample_writes_draws_and_their_means(run, tmp_path):  # noqa: F811
    arrays = written(tmp_path, "sample", str(run), "--num-samples", "500")
    assert arrays["x"].shape == arrays["mean"].shape == (500, 16)
    assert set(np.unique(arrays["x"])) <= {0.0, 1.0}
    # of the same z: five standard errors of the mean of 8,000 bits
    assert abs((arrays["x"] - arrays["mean"]).mean()) < 5 * 0.5 / 8000**0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_the_seed_decides_what_is_drawn(run, tmp_path, command):  # noqa: F811
    first, again, other = (written(tmp_path, command, str(run), "--seed", seed) for seed in "334")
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_images_keep_their_shape_and_probabilities_become_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("grey.npy", np.random.default_rng(0).random((250, 3, 4)))
    assert main(small("--data", "grey.npy", "--out", "run")) == 0
    loaded = load_run("run")
    bits = rows_of(loaded, "train")
    assert bits.shape == (200, 3, 4)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(bits, reconstruct(loaded, "train", 0)["x"])
    assert written(tmp_path, "sample", "run", "--num-samples", "2")["mean"].shape == (2, 3, 4)
    assert written(tmp_path, "reconstruct", "run")["reconstruction"].shape == (25, 3, 4)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_refused(run, tmp_path, capsys, monkeypatch, command):  # noqa: F811
    out = ["--out", str(tmp_path / "of.npz")]
    assert "best.ckpt: no such checkpoint" in one_line_and_exit_2(capsys, [command, str(tmp_path), *out])
    wrong = [command, str(run), *out, "--data", "digits"]
    assert "was trained on other data" in one_line_and_exit_2(capsys, wrong)
    with pytest.raises(SystemExit, match="2"):
        main([command, str(run), "--out", "of.npy"])
    assert "argument --out: must end with .npz, got of.npy" in capsys.readouterr().err
    assert not (tmp_path / "of.npz").exists()


def test_what_was_written_is_said(run, tmp_path, capsys):  # noqa: F811
    written(tmp_path, "sample", str(run), "--num-samples", "7")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'arrays' / 'of.npz'}: x [7, 16], mean [7, 16]\n"


def test_train_says_where_it_wrote(data, tmp_path, capsys):  # noqa: F811
    assert main(small("--data", data, "--out", str(tmp_path / "run"))) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'run'}\n")


def commands() -> dict:
    return next(action.choices for action in cli._parser()._actions if action.dest == "==SUPPRESS==")


@pytest.mark.parametrize("name", commands())
def test_help_has_examples_that_parse_and_says_every_default(name):
    command = commands()[name]
    helped = command.format_help()
    for example in re.findall(r"^  vvae-fast (.*)$", helped, re.M):
        assert cli._parser().parse_args(example.split()).command == name
    assert ("examples:" in helped) == (name != "info")
    words = " ".join(helped.split())
    for action in command._actions:
        if action.option_strings:
            assert action.help, action.option_strings
            assert action.default is None or action.nargs == 0 or f"(default: {action.default})" in words
