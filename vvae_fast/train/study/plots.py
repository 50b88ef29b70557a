"""Plots of finished runs. They need no display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vvae_fast.nn.vae import VAE
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import replacing
from vvae_fast.train.data.sets import Dataset

SEED = 0  # for the samples in the plots
NUM_IMAGES = 12
MOST = 1e30  # for larger values matplotlib's float32 and its margins overflow


def plot_curves(histories: Mapping[str, Sequence[list[dict]]], path: Path) -> None:
    """Validation -ELBO over the epochs, a colour for each model and a line for each seed. Values that are not finite,
    or too large for a figure, leave a gap."""
    figure = make_figure(7.0, 4.5)
    axes = figure.add_subplot()
    finals = []
    for number, (model, runs) in enumerate(histories.items()):
        for history in runs:
            values = [_drawable(record["val_neg_elbo"]) for record in history]
            finals += [value for value in values if math.isfinite(value)][-1:]
            label = model if history is runs[0] else None
            epochs = [record["epoch"] + 1 for record in history]
            alone = "." if len(values) == 1 else None  # a line needs two points
            axes.plot(epochs, values, color=f"C{number}", alpha=0.7, linewidth=1.0, label=label, marker=alone)
    if finals:  # the first epochs are far above the values in which models differ
        lowest, highest = min(finals), max(finals)
        margin = 0.05 * abs(lowest) or 1.0
        axes.set_ylim(lowest - margin, highest + 10 * margin)
    axes.set_xlabel("epoch")
    axes.set_ylabel("-ELBO on the validation set (nats)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    save_figure(figure, path)
    save_figure(figure, path.with_suffix(".pdf"))


def _drawable(value: float) -> float:
    return value if abs(value) < MOST else math.nan  # false for nan


def plot_reconstructions(vaes: Mapping[str, VAE], dataset: Dataset, path: Path) -> None:
    """Rows of the test set, and below them each model's E[x | z] for one posterior sample."""
    x = dataset.test[:NUM_IMAGES].flatten(1)  # [N, P]
    rows = {"data": x}
    for model, vae in vaes.items():
        rows[model] = vae.reconstruct(x, generator=torch.Generator().manual_seed(SEED))
    _plot_images(rows, dataset, path)


def plot_samples(vaes: Mapping[str, VAE], dataset: Dataset, path: Path) -> None:
    """E[x | z] of each model for the same draws z of the prior."""
    rows = {
        model: vae.sample(NUM_IMAGES, mean=True, generator=torch.Generator().manual_seed(SEED))
        for model, vae in vaes.items()
    }
    _plot_images(rows, dataset, path)


def _plot_images(rows: Mapping[str, Tensor], dataset: Dataset, path: Path) -> None:
    """A row of pictures for each name; data that are not images become strips of one pixel's height."""
    count = min(len(x) for x in rows.values())
    shape = dataset.image_shape or (1, dataset.test[0].numel())
    top = dataset.total_count or 1
    limits = {} if dataset.likelihood == "gaussian" else {"vmin": 0, "vmax": top}
    figure = make_figure(0.8 * count + 1.0, 0.9 * len(rows))
    grid = figure.subplots(len(rows), count, squeeze=False)
    for (name, x), line in zip(rows.items(), grid, strict=True):
        for image, axes in zip(x, line, strict=False):
            drawn = torch.where(image.abs() < MOST, image, math.nan)
            axes.imshow(drawn.reshape(shape).numpy(), cmap="gray", aspect="auto", **limits)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center")
    save_figure(figure, path)


def make_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches."""
    return require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG or a PDF, as the suffix says, in one step; the same figure gives the same bytes."""
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:], metadata=metadata)
