"""Single data points' posteriors drawn: before the flow, after it and, for two latent dimensions, the true one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast.nn.vae import VAE
from vvae_fast.train.data.sets import Dataset
from vvae_fast.train.study.plots import MOST, SEED, make_figure, save_figure

NUM_POINTS = 3  # data points, a row of panels each
SEARCHED = 100  # rows of the test set among which they are
NUM_SAMPLES = 50_000
CELLS = 80  # of a panel's side
WIDE = 6.0  # standard deviations of the prior: how far the true posterior is looked for
TAIL = 0.002  # of the samples on each side lie outside a panel
MASSES = (0.9, 0.5)  # a contour contains so much of a panel's mass
BLUR = (1.0, 4.0, 6.0, 4.0, 1.0)  # of neighbouring cells, against the noise of their counts


class Panel(NamedTuple):
    """A density on a grid of cells: per unit of area, [CELLS, CELLS], first dimension first."""

    title: str
    density: Tensor


def plot_posterior(vae: VAE, dataset: Dataset, path: Path) -> None:
    """Draws densities of the posteriors of some rows of the test set, in two latent dimensions, with one range and one
    scale of colors for all panels of a row; writes `path`, a PNG, and a PDF beside it.

    The rows, among the first hundred, are those with the largest correlation of two dimensions after the flow, and
    these are the dimensions. The true posterior p(z | x) is on a grid, normalised within the panel.
    """
    x = dataset.test[:SEARCHED].flatten(1)  # [N, P]
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        found = _most_correlated(vae.posterior_sample(x, 200, generator).z_K)
        rows = [(row, dims, *_panels(vae, x[row : row + 1], dims, generator)) for row, *dims in found]
    columns = len(rows[0][2])
    figure = make_figure(2.6 * columns + 0.8, 2.5 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, panel in zip(grid[0], rows[0][2], strict=True):
        axes.set_title(panel.title, fontsize="medium")
    for line, (row, dims, panels, limits) in zip(grid, rows, strict=True):
        top = max(float(panel.density.max()) for panel in panels)
        for axes, panel in zip(line, panels, strict=True):
            image = _draw(axes, panel, limits, top)
            axes.set_xlabel(f"$z_{{{dims[0] + 1}}}$")
        line[0].set_ylabel(f"test row {row}\n$z_{{{dims[1] + 1}}}$")
        figure.colorbar(image, ax=list(line), label="density")
    save_figure(figure, path)
    save_figure(figure, path.with_suffix(".pdf"))


def _most_correlated(z: Tensor) -> list[tuple[int, int, int]]:
    """(row, dimension, dimension) of the NUM_POINTS rows with the largest correlations, for z [S, B, D]."""
    centred = (z - z.mean(0)) / z.std(0)
    correlation = torch.einsum("sbi,sbj->bij", centred, centred).abs().nan_to_num().triu(1)  # [B, D, D]
    pairs = correlation.flatten(1).max(1)
    rows = pairs.values.argsort(descending=True, stable=True)[:NUM_POINTS]
    return [(int(row), *divmod(int(pairs.indices[row]), z.shape[-1])) for row in rows]


def _panels(vae: VAE, x: Tensor, dims: list[int], generator: torch.Generator) -> tuple[list[Panel], Tensor]:
    """The panels of one data point, x [1, P], and the limits of both dimensions, [2, 2]: least and greatest."""
    drawn = vae.posterior_sample(x, NUM_SAMPLES, generator)
    before, after = sets = [_drawable(z[:, 0, dims]) for z in (drawn.z_0, drawn.z_K)]  # [S, 2] each
    if vae.latent_dim == 2:  # the true posterior may lie elsewhere: drawn from a coarse grid, it moves the limits too
        z, shares = _true_posterior(vae, x, torch.tensor([[-WIDE, WIDE]] * 2))
        sets = [*sets, z[shares.multinomial(NUM_SAMPLES, replacement=True, generator=generator)]]
    limits = _limits(sets)
    panels = [
        Panel(r"before: $q(z_0 \mid x)$", _histogram(before, limits)),
        Panel(r"after: $q(z_K \mid x)$", _histogram(after, limits)),
    ]
    if vae.latent_dim == 2:
        shares = _true_posterior(vae, x, limits)[1]
        panels.append(Panel(r"true: $p(z \mid x)$", shares.reshape(CELLS, CELLS) / _area(limits)))
    return panels, limits


def _drawable(z: Tensor) -> Tensor:
    return z[(z.abs() < MOST).all(-1)]


def _limits(sets: list[Tensor]) -> Tensor:
    """Of both dimensions, around all but the tails of each set of points [S, 2]; with a margin. A posterior of a run
    that diverged may have no points."""
    sets = [points for points in sets if len(points) > 0] or [torch.zeros(1, 2)]
    ends = torch.stack([points.quantile(torch.tensor([TAIL, 1 - TAIL]), 0) for points in sets])  # [sets, 2, 2]
    limits = torch.stack([ends[:, 0].amin(0), ends[:, 1].amax(0)], 1)
    margin = 1e-3 * (1.0 + limits.abs().amax(1, keepdim=True))
    return limits + torch.tensor([-1.0, 1.0]) * (0.1 * (limits[:, 1:] - limits[:, :1]) + margin)


def _area(limits: Tensor) -> float:
    """Of a cell."""
    return float((limits[:, 1] - limits[:, 0]).double().prod()) / CELLS**2


def _histogram(z: Tensor, limits: Tensor) -> Tensor:
    """The density of samples z [S, 2] in the cells, slightly blurred."""
    flat = [float(limit) for limit in limits.flatten()]
    counts = torch.histogramdd(z.double(), [CELLS, CELLS], range=flat).hist
    taps = torch.tensor(BLUR, dtype=counts.dtype) / sum(BLUR)
    kernel = torch.outer(taps, taps)[None, None]
    blurred = torch.nn.functional.conv2d(counts[None, None], kernel, padding=len(BLUR) // 2)[0, 0]
    return blurred / (max(1, len(z)) * _area(limits))


def _true_posterior(vae: VAE, x: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The middles of the cells, [CELLS^2, 2], and each cell's share of p(z | x) within the limits, [CELLS^2]."""
    steps = (torch.arange(CELLS) + 0.5) / CELLS
    z = torch.cartesian_prod(*(least + (greatest - least) * steps for least, greatest in limits))
    log_p = torch.cat([vae.log_joint(x, part) for part in z[:, None].split(1000)])[:, 0]
    return z, log_p.double().nan_to_num(nan=-MOST).softmax(0)


def _draw(axes: Any, panel: Panel, limits: Tensor, top: float) -> Any:
    """The density as an image with contours around MASSES of it."""
    extent = [float(limit) for limit in limits.flatten()]
    density = panel.density.T.numpy()  # rows are the second dimension
    image = axes.imshow(density, origin="lower", extent=extent, aspect="auto", cmap="Blues", vmin=0.0, vmax=top)
    levels = sorted({_level(panel.density, mass) for mass in MASSES})
    if levels[0] > 0 and math.isfinite(levels[-1]):
        axes.contour(density, levels=levels, origin="lower", extent=extent, colors="#1b2631", linewidths=0.9)
    return image


def _level(density: Tensor, mass: float) -> float:
    """The density above which the cells contain so much of the mass."""
    values = density.flatten().sort(descending=True).values
    enough = int((values.cumsum(0) < mass * values.sum()).sum())
    return float(values[min(enough, len(values) - 1)])
