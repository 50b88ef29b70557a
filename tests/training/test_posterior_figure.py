"""The densities of the figure of posteriors, on a VAE whose true posterior is known."""

import math

import pytest
import torch
from torch import nn

from vvae_fast.nn import VAE
from vvae_fast.train.study import posterior


class Exact(nn.Module):
    """The encoder of x = z + noise of variance 1, z [B, 2]: the posterior is N(x / 2, 1 / 2)."""

    def forward(self, x):
        return x / 2, torch.full_like(x, -math.log(2.0))


class Identity(nn.Module):
    """The decoder of that VAE: means and log-variances."""

    def forward(self, z):
        return torch.cat([z, torch.zeros_like(z)], -1)


@pytest.fixture
def vae():
    return VAE(Exact(), Identity(), 2, None, "gaussian", feature_dim=0).eval()


def test_before_after_and_truth_agree_where_the_encoder_is_exact(vae):
    x = torch.tensor([[1.0, -2.0]])
    with torch.no_grad():
        panels, limits = posterior._panels(vae, x, [0, 1], torch.Generator().manual_seed(0))
    assert limits[:, 0].lt(x[0] / 2).all()
    assert limits[:, 1].gt(x[0] / 2).all()
    truth = panels[2].density
    peak = 1.0 / math.pi  # of N(x / 2, I / 2) in two dimensions
    assert truth.max().item() == pytest.approx(peak, rel=0.05)
    for panel in panels:
        assert panel.density.sum().item() * posterior._area(limits) == pytest.approx(1.0, abs=0.03)
        difference = (panel.density - truth).abs().sum().item() * posterior._area(limits)
        assert difference < 0.15, panel.title


@pytest.mark.parametrize("size", [1e20, 1e35, math.inf])
def test_huge_posteriors_of_diverged_runs_are_drawn(vae, size):
    with torch.no_grad():
        panels, limits = posterior._panels(vae, torch.full((1, 2), size), [0, 1], torch.Generator().manual_seed(0))
    assert limits.isfinite().all()
    assert (limits[:, 0] < limits[:, 1]).all()
    for panel in panels:
        assert panel.density.isfinite().all()


def test_a_level_contains_its_mass():
    density = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    assert [posterior._level(density, mass) for mass in (0.3, 0.5, 0.9)] == [4.0, 3.0, 2.0]


def test_the_most_correlated_rows_come_first():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 4, 3, generator=generator)
    z[:, 2, 1] = z[:, 2, 0]
    z[:, 0, 2] = z[:, 0, 1] + torch.randn(500, generator=generator)
    assert posterior._most_correlated(z)[:2] == [(2, 0, 1), (0, 1, 2)]
