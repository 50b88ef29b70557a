"""The scores of a trained VAE."""

import pytest
import torch

from vvae_fast import VAE, AmortizedPlanarFlow
from vvae_fast.nn import mlp_decoder, mlp_encoder
from vvae_fast.train.data.sets import Dataset
from vvae_fast.train.run import evaluation, processes
from vvae_fast.train.run.evaluation import evaluate

ACTIVE, ROWS = 3, 730  # the last batch is a smaller one


@pytest.fixture
def dataset():
    parts = (torch.rand(count, 12).round() for count in (10, 10, ROWS))
    return Dataset("bits", *parts, "bernoulli", total_count=None, image_shape=None, dynamic=False)


@pytest.fixture
def vae():
    """Its first ACTIVE posterior means follow the data, the other two do not; all have the variance 1."""
    vae = VAE(mlp_encoder(12, 16), mlp_decoder(5, 16, 12), latent_dim=5)
    with torch.no_grad():
        vae.posterior_head.weight[ACTIVE:] = 0
        vae.posterior_head.bias.zero_()
        vae.posterior_head.weight[:ACTIVE] *= 3
    return vae


def test_active_units_are_those_whose_mean_follows_the_data(vae, dataset):
    assert evaluate(vae, dataset, 5, seed=0)["active_units"] == ACTIVE


def test_active_units_are_counted_after_the_flow(vae, dataset):
    """A flow that shifts a latent dimension by what it knows of the data makes it active."""
    flow = AmortizedPlanarFlow(5, 1, 16)
    moved = VAE(vae.encoder, vae.decoder, latent_dim=5, flow=flow)
    moved.posterior_head = vae.posterior_head
    assert evaluate(moved, dataset, 5, seed=0)["active_units"] == ACTIVE
    with torch.no_grad():
        head = flow.head.weight  # u, w, b of the one step: u moves dimension 4 by u tanh(b), where b follows the data
        head.zero_()
        flow.head.bias.zero_()
        flow.head.bias[4] = 1.0
        flow.head.bias[5] = 1e-3
        head[10] = 3 * vae.posterior_head.weight[0]
    assert evaluate(moved, dataset, 5, seed=0)["active_units"] == ACTIVE + 1


def test_scores_agree_with_each_other_and_with_the_terms(vae, dataset):
    scores = evaluate(vae, dataset, 20, seed=3)
    assert scores["gap"] == scores["neg_elbo"] - scores["nll"]
    assert scores["gap"] > 0
    assert scores["neg_elbo"] == pytest.approx(scores["reconstruction"] + scores["kl"], rel=1e-6)
    with torch.no_grad():
        kl = vae(dataset.test).kl.mean().item()  # exact without a flow
    assert scores["kl"] == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_batches(vae, dataset, monkeypatch, count):
    """The sums of `count` processes, each with its own batches, are those of one: no row is lost or seen twice."""
    whole = evaluate(vae, dataset, 7, seed=1)
    sums = []
    for rank in range(count):
        with monkeypatch.context() as patch:
            patch.setattr(processes, "count", lambda: count)
            patch.setattr(processes, "rank", lambda rank=rank: rank)
            patch.setattr(processes, "sum_over_all", lambda x: sums.append(x) or x)
            evaluate(vae, dataset, 7, seed=1)
    parts = torch.stack(sums[::2])  # [count, 4], and the moments between them
    names = ("neg_elbo", "reconstruction", "kl", "nll")
    for name, total in zip(names, parts.sum(0).tolist(), strict=True):
        assert total / ROWS == pytest.approx(whole[name], rel=1e-12)
    moments = sum(sums[1::2]) / ROWS
    assert evaluation._count_active_units(moments) == whole["active_units"]
