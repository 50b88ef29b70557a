"""Gaussian data of any scale: standardised by the training rows, scored in their own units; large inputs train."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import distributions as dist
from torch import nn

from vvae_fast.nn import VAE, Gaussian, Standardised, mlp_decoder, mlp_encoder
from vvae_fast.train.cli import main
from vvae_fast.train.data.sets import DataError, Dataset, load_dataset, make_loaders
from vvae_fast.train.data.statistics import statistics
from vvae_fast.train.run import runs
from vvae_fast.train.run.networks import FAN_IN, build_optimizer, build_vae
from vvae_fast.train.run.runconfig import RunConfig, data_digest

SCALES = np.logspace(-3, 6, 10)


def correlated(num_rows: int = 600, seed: int = 0) -> np.ndarray:
    source = np.random.default_rng(seed)
    return source.standard_normal((num_rows, 2)) @ source.standard_normal((2, 10)) + 0.3 * source.standard_normal(
        (num_rows, 10)
    )


def config_of(dataset: Dataset, **changes) -> RunConfig:
    settings = {
        **{"model": "amortized", "num_steps": 4, "seed": 0, "data": dataset.name, "data_digest": data_digest(dataset)},
        **{"epochs": 8, "batch_size": 50, "latent_dim": 4, "hidden": (30,), "lr": 3e-3},
        **{"warmup_epochs": 0, "patience": 0, "num_samples": 20, "likelihood": dataset.likelihood},
    }
    return RunConfig(**{**settings, **changes})


def dataset_of(x: np.ndarray, likelihood: str = "gaussian", **changes) -> Dataset:
    x = torch.from_numpy(x).float()
    tenth = len(x) // 10
    settings = {"total_count": None, "image_shape": None, "dynamic": False, **changes}
    return Dataset("mine", x[2 * tenth :], x[:tenth], x[tenth : 2 * tenth], likelihood, **settings)


# The likelihood


@pytest.mark.parametrize("base", [None, Gaussian(0.3)])
def test_its_density_is_that_of_the_data(base):
    shift, scale = torch.tensor([1.0, -20.0, 3e4]).double(), torch.tensor([1e-3, 1.0, 1e5]).double()
    likelihood = Standardised(shift, scale, base)
    params = torch.randn(4, 5, 3 * likelihood.num_params).double()
    mean = shift + scale * params[..., :3]
    std = scale * ((0.5 * params[..., 3:]).exp() if base is None else math.exp(0.15))
    x = dist.Normal(mean[0], std[0] if base is None else std).sample()
    torch.testing.assert_close(likelihood.log_prob(x, params), dist.Normal(mean, std).log_prob(x).sum(-1))
    torch.testing.assert_close(likelihood.mean(params), mean)
    draws = likelihood.sample(params[0, :1].expand(40_000, -1), torch.Generator().manual_seed(0))
    wanted = std[0, :1].expand(1, 3)[0] if base is None else std
    torch.testing.assert_close(draws.std(0), wanted, rtol=0.05, atol=0.0)


def test_one_scale_for_all_counts_for_each_dimension():
    likelihood = Standardised(torch.tensor(2.0), torch.tensor(10.0))
    x, params = torch.randn(6, 7), torch.randn(6, 14)
    expected = Gaussian().log_prob((x - 2) / 10, params) - 7 * math.log(10)
    torch.testing.assert_close(likelihood.log_prob(x, params), expected)


def test_it_moves_and_is_saved_with_its_vae():
    shift, scale = torch.arange(4.0), torch.full((4,), 3.0)
    make = lambda shift, scale: VAE(  # noqa: E731
        mlp_encoder(4, 5), mlp_decoder(2, 5, 8), 2, likelihood=Standardised(shift, scale)
    )
    vae, other = make(shift, scale), make(torch.zeros(4), torch.ones(4))
    other.load_state_dict(vae.state_dict())
    x, noise = torch.randn(6, 4), torch.randn(6, 2)
    assert torch.equal(other(x, noise=noise).neg_elbo, vae(x, noise=noise).neg_elbo)
    assert vae.double()(x.double()).neg_elbo.dtype == torch.float64
    assert not list(vae.likelihood.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vae_in_half_precision_keeps_the_digits_of_the_units(dtype):
    shift, scale = torch.tensor([1e6 + 1, 1e-3]), torch.tensor([7e4, 1.0 + 1e-4])
    vae = VAE(mlp_encoder(2, 5), mlp_decoder(2, 5, 4), 2, likelihood=Standardised(shift, scale)).to(dtype)
    assert {p.dtype for p in vae.parameters()} == {dtype}
    assert torch.equal(vae.likelihood.shift, shift)
    assert torch.equal(vae.likelihood.scale, scale)
    assert vae(torch.randn(6, 2).to(dtype)).neg_elbo.dtype == torch.float32
    assert vae.double().likelihood.shift.dtype == torch.float64
    assert vae.to("meta").likelihood.shift.device.type == "meta"


@pytest.mark.parametrize(
    ("shift", "scale", "message"),
    [
        (torch.zeros(3), torch.ones(4), r"must both be \[P\] or \[\], got \(3,\), \(4,\)"),
        (torch.zeros(3, 1), torch.ones(3, 1), "must both be"),
        (torch.zeros(3), torch.tensor([1.0, 0.0, 2.0]), "scale must be positive"),
        (torch.zeros(3), torch.tensor([1.0, math.nan, 2.0]), "scale must be positive"),
        (torch.tensor([1.0, math.nan]), torch.ones(2), "shift and scale must be finite, got NaN or inf"),
        (torch.zeros(2), torch.tensor([1.0, math.inf]), "shift and scale must be finite, got NaN or inf"),
    ],
)
def test_scales_that_are_none_are_refused(shift, scale, message):
    with pytest.raises(ValueError, match=message):
        Standardised(shift, scale)


def test_scales_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match=r"shift must be a Tensor, got ndarray: pass torch.as_tensor\(shift\)"):
        Standardised(np.zeros(3), torch.ones(3))


# The statistics


def test_a_table_has_them_by_column_and_images_together(monkeypatch):
    x = correlated() * SCALES + 5.0
    mean, std = statistics(x, "x")
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(std, x.std(0))
    monkeypatch.setattr("vvae_fast.train.data.statistics.CHUNK", 170)
    np.testing.assert_allclose(statistics(x, "x")[1], x.std(0))
    images = x.reshape(600, 2, 5)
    mean, std = statistics(images, "x")
    assert (mean.shape, std.shape) == ((), ())
    np.testing.assert_allclose((mean, std), (images.mean(), images.std()))


def with_column(column: np.ndarray | float) -> np.ndarray:
    x = correlated()
    x[:, 3] = column
    return x


STEPS = np.arange(600.0)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (with_column(7.5), ["one value only in column 3, ", "numpy.delete"]),
        (np.full((60, 10), -1.5), ["column 0, 1, 2, 3, 4 and 5 more", "vary"]),
        (np.full((60, 2, 5), -1.5), ["one value only;"]),
        (with_column(1.7e9 + STEPS), ["column 3", "tell apart", "subtract its mean"]),
        (with_column(1e6 + 1e-3 * STEPS), ["column 3", "tell apart"]),
        (with_column(1e33 * STEPS), ["column 3", "scale it"]),
        (with_column(1e30 * (STEPS > 300)), ["column 3", "scale it"]),  # float32 makes it larger
        (with_column(1e-35 * STEPS), ["column 3", "scale it"]),
        (with_column(np.where(STEPS == 4, np.nan, STEPS)), ["1 NaN or infinite, the first at [4, 3]"]),
        (with_column(np.where(STEPS == 4, -np.inf, STEPS)), ["1 NaN or infinite, the first at [4, 3]"]),
    ],
)
def test_columns_that_cannot_be_standardised_are_named(tmp_path, capsys, x, words):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path / "x.npy"))
    assert all(word in str(caught.value) for word in words)
    assert main(["train", "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("column", [1e4 + STEPS, -1e7 + 1e3 * STEPS, 1e-28 * STEPS, 1e27 * STEPS, 9e29 * (STEPS > 300)])
def test_columns_at_the_edge_of_that_train(tmp_path, column):
    np.save(tmp_path / "x.npy", with_column(column))
    dataset = load_dataset(str(tmp_path / "x.npy"))
    result = runs.run(config_of(dataset, epochs=1), dataset, tmp_path / "run")
    assert math.isfinite(result["nll"])


def test_a_column_that_is_constant_in_the_training_rows_alone_is_refused(tmp_path):
    x = correlated()
    train = x[:500].copy()
    train[:, 6] = 0.25
    np.savez(tmp_path / "x.npz", train=train, val=x[500:], test=x[500:])
    with pytest.raises(DataError, match=r"training rows .* column 6"):
        load_dataset(str(tmp_path / "x.npz"))


# Runs


def test_a_table_of_any_scales_is_modelled_in_its_own_units(tmp_path):
    """The scores of a table in other units differ by the logarithms of the units, and both beat independent columns."""
    plain, scaled = dataset_of(correlated()), dataset_of(correlated() * SCALES)
    results = [
        runs.run(config_of(dataset, epochs=40), dataset, tmp_path / name)
        for name, dataset in (("plain", plain), ("scaled", scaled))
    ]
    units = np.log(SCALES).sum()
    for key in ("nll", "neg_elbo", "reconstruction"):
        assert results[1][key] - units == pytest.approx(results[0][key], abs=0.3)
    x = scaled.train.double()
    independent = -dist.Normal(x.mean(0), x.std(0)).log_prob(scaled.test.double()).sum(-1).mean().item()
    assert results[1]["nll"] < independent - 1.0


def test_the_statistics_lie_in_the_checkpoint(tmp_path, capsys):
    path = str(tmp_path / "table.npy")
    np.save(path, correlated() * SCALES)
    out = tmp_path / "run"
    options = ["--epochs", "2", "--hidden", "5", "--steps", "1", "--latent-dim", "2", "--num-samples", "5"]
    assert main(["train", "--data", path, "--out", str(out), *options]) == 0
    result = json.loads((out / "result.json").read_text())
    weights = torch.load(out / "best.ckpt", weights_only=True)["state_dict"]
    dataset = load_dataset(path)
    for key in ("vae.encoder.0.scale", "vae.likelihood.scale"):
        torch.testing.assert_close(weights[key], dataset.train.std(0, correction=0), rtol=1e-4, atol=0.0)
    capsys.readouterr()
    assert main(["evaluate", str(out / "best.ckpt"), "--data", path, "--num-samples", "5"]) == 0
    assert f"nll:            {result['nll']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("likelihood", ["bernoulli", "binomial"])
def test_other_data_have_no_statistics(likelihood):
    x = np.random.default_rng(0).integers(0, 2, (60, 10))
    dataset = dataset_of(x, likelihood, total_count=1 if likelihood == "binomial" else None)
    vae = build_vae(config_of(dataset), dataset)
    assert not list(vae.buffers())


# Large inputs


def grey(size: int, low: float, levels: int | None) -> np.ndarray:
    source = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    images = np.stack([np.sin(6 * (x * a + y * b) + c) for a, b, c in source.standard_normal((30, 3))])
    images = low + (1 - low) * (0.5 + 0.5 * images)
    return images if levels is None else np.round(images * levels)


@pytest.mark.parametrize(("low", "levels"), [(0.0, None), (0.0, 255), (-1.0, None)], ids=["bits", "counts", "reals"])
@pytest.mark.parametrize(("model", "num_steps"), [("vanilla", 0), ("amortized", 16)])
def test_large_images_train_at_the_defaults(tmp_path, low, levels, model, num_steps):
    """Nothing explodes in the first steps: the KL stays that of a few latent dimensions, and -ELBO falls, of all images
    together, since that of a batch is mostly its images'."""
    np.save(tmp_path / "x.npy", grey(192, low, levels))
    dataset = load_dataset(str(tmp_path / "x.npy"))
    config = config_of(dataset, model=model, num_steps=num_steps, hidden=(100,), latent_dim=8)
    vae = build_vae(config, dataset)
    optimizer = build_optimizer(config, vae)
    train, _, _ = make_loaders(dataset, 8, 0)
    images = torch.cat(list(train))

    def neg_elbo() -> float:
        with torch.no_grad():
            return vae(images).neg_elbo.mean().item()

    before, kl = neg_elbo(), []
    for epoch in range(4):
        train.set_epoch(epoch)
        for x in train:
            terms = vae(x)
            optimizer.zero_grad()
            terms.neg_elbo.mean().backward()
            optimizer.step()
            kl.append(terms.kl.mean().item())
    assert max(kl) < 1000
    assert neg_elbo() < before


@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_the_learning_rate_of_wide_layers_alone_falls(optimizer):
    wide, narrow = nn.Linear(4 * FAN_IN, 3), nn.Linear(FAN_IN, 4 * FAN_IN)
    dataset = dataset_of(correlated())
    built = build_optimizer(config_of(dataset, optimizer=optimizer), nn.Sequential(wide, nn.ReLU(), narrow))
    rates = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    assert rates[id(wide.weight)] == 3e-3 / 4
    assert {rates[id(p)] for p in (wide.bias, narrow.weight, narrow.bias)} == {3e-3}
    ordinary = build_optimizer(config_of(dataset), build_vae(config_of(dataset), dataset))
    assert len(ordinary.param_groups) == 1


def test_wide_layers_keep_their_share_when_a_run_goes_on(tmp_path):
    dataset = dataset_of(np.random.default_rng(0).standard_normal((60, 2 * FAN_IN)))
    config = config_of(dataset, epochs=3, hidden=(4,))
    whole = runs.run(config, dataset, tmp_path / "whole")

    def interrupt(stage, history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(config, dataset, tmp_path / "killed", interrupt)
    resumed = runs.run(config, dataset, tmp_path / "killed")
    assert [resumed[key] for key in ("nll", "neg_elbo")] == [whole[key] for key in ("nll", "neg_elbo")]


def test_runs_that_did_not_name_the_likelihood_are_theirs_still(tmp_path):
    dataset = dataset_of(correlated())
    config = config_of(dataset, epochs=1)
    result = runs.run(config, dataset, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in content.items() if k not in ("likelihood", "array")})
    )
    assert runs.run(config, dataset, tmp_path) == result
    other = dataclasses.replace(config, likelihood="binomial")
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="likelihood is gaussian there, binomial here"):
        runs.run(other, dataset, tmp_path)
