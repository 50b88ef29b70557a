"""The figure of targets and fitted flows, after Rezende & Mohamed (2015), figure 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vvae_fast.nn.planar import PlanarFlow
from vvae_fast.train.density.energies import ENERGIES
from vvae_fast.train.density.fit import Divergence, FitConfig, log_density, make_grid
from vvae_fast.train.study.plots import SEED, make_figure, save_figure

VIEW, PIXELS = 5.0, 200  # the pictures show z in [-5, 5]^2; pixels on each side
BINS = 80  # on each side of the samples' histogram
NUM_SAMPLES = 200_000


def plot_fits(fits: Sequence[tuple[FitConfig, PlanarFlow, Divergence]], path: Path) -> None:
    """A row for each energy: the target, then each flow's density, then a histogram of each flow's samples.

    All pictures of a row use one colour scale, from 0 to the target's highest density.
    """
    energies, steps = ([*dict.fromkeys(getattr(c, name) for c, *_ in fits)] for name in ("energy", "num_steps"))
    width = 1 + 2 * len(steps)
    figure = make_figure(1.25 * width + 0.3, 1.4 * len(energies))
    axes = figure.subplots(len(energies), width, squeeze=False)
    for config, flow, divergence in fits:
        line, column = axes[energies.index(config.energy)], 1 + steps.index(config.num_steps)
        target = _target(config.energy, divergence.log_normalizer)
        top = target.max().item()
        _draw(line[0], target, top, "target")
        line[0].set_ylabel(config.energy, rotation=0, ha="right", va="center")
        _draw(line[column], _density(flow), top, f"q, K = {config.num_steps}: KL {divergence.kl:.3f}")
        _draw(line[column + len(steps)], _histogram(flow), top, f"samples, K = {config.num_steps}")
    save_figure(figure, path)


def _draw(axes: Any, density: Tensor, top: float, title: str) -> None:
    limits = (-VIEW, VIEW, -VIEW, VIEW)
    axes.imshow(density.T.numpy(), origin="lower", extent=limits, cmap="magma", vmin=0, vmax=top)
    axes.set_title(title, fontsize=7)
    axes.set(xticks=[], yticks=[])


def _target(energy: str, log_normalizer: float) -> Tensor:
    """p [PIXELS, PIXELS] on the view."""
    return (-ENERGIES[energy](make_grid(VIEW, PIXELS).points) - log_normalizer).exp().view(PIXELS, PIXELS)


def _density(flow: PlanarFlow) -> Tensor:
    """q_K [PIXELS, PIXELS] on the view."""
    return log_density(flow, make_grid(VIEW, PIXELS).points).exp().view(PIXELS, PIXELS)


def _histogram(flow: PlanarFlow) -> Tensor:
    """The density [BINS, BINS] that samples of q_K have on the view."""
    generator = torch.Generator().manual_seed(SEED)
    z, _ = flow(torch.randn(NUM_SAMPLES, 2, dtype=torch.float64, generator=generator))
    counts, _ = torch.histogramdd(z, [BINS, BINS], [-VIEW, VIEW, -VIEW, VIEW])
    return counts / (NUM_SAMPLES * (2 * VIEW / BINS) ** 2)
