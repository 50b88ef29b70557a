"""What leads out of a trained run: the VAE, and samples, reconstructions and latents as arrays in a .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vvae_fast.nn.vae import VAE
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import make_folder, replacing
from vvae_fast.train.base.paths import resolve
from vvae_fast.train.data.loaders import BinarizedRows, Draw
from vvae_fast.train.data.sets import SPLITS, Dataset
from vvae_fast.train.run.evaluation import EVALUATION_BATCH
from vvae_fast.train.run.runconfig import RunConfig
from vvae_fast.train.run.runs import load_trained

Arrays = dict[str, Tensor]
ALL = "all"  # the splits together, see `rows_of`


class LoadedRun(NamedTuple):
    """A run read from its folder.

    vae is that of its best epoch, on the CPU and in evaluation mode; config has its settings, dataset its data. rows
    has the numbers of the rows of "train", "val" and "test" in the array that was split, int64 [N] each: see
    `Dataset.row_numbers`.
    """

    vae: VAE
    config: RunConfig
    dataset: Dataset
    rows: dict[str, Tensor]

    def __repr__(self) -> str:
        """Without the tensors."""
        rows = ", ".join(f"{len(numbers)} {split}" for split, numbers in self.rows.items())
        return f"LoadedRun of {self.config.name}: vae, config, dataset {self.dataset.name!r}, rows ({rows})"


def load_run(folder: Path | str, data: Path | str | None = None, root: Path | str | None = None) -> LoadedRun:
    """The VAE of a folder that `vvae-fast train`, or compare for each model and seed, has written.

    Args:
        folder: the run's, with best.ckpt.
        data: the path of the array file that the run was trained on; digits, mnist and fashion-mnist are found by
            their names.
        root: the folder of MNIST or FashionMNIST.

    Raises:
        RunError: the folder has no checkpoint of this package, or the data are not those that the run was trained on.
        DataError: the data cannot be read.
        TypeError: an argument is not a path.
    """
    for name, value in (("folder", folder), ("data", data), ("root", root)):
        if not isinstance(value, (str, Path)) and (value is not None or name == "folder"):
            remedy = "; for new rows call the VAE of the run, see docs/arrays.md" if name == "data" else ""
            raise TypeError(f"{name} must be a path, a str or a Path, got {type(value).__name__}{remedy}")
    data = data if data is None else str(data)
    _, config, dataset, vae = load_trained(resolve(str(folder)), data, None if root is None else Path(root))
    return LoadedRun(vae, config, dataset, {split: dataset.row_numbers(split) for split in SPLITS})


@torch.no_grad()
def sample(run: LoadedRun, num_samples: int, seed: int) -> Arrays:
    """num_samples draws x of the model and their means E[x | z], each [num_samples, *shape]."""
    drawn = {}
    for name, is_mean in (("x", False), ("mean", True)):  # of the same z, which the seed decides
        generator = torch.Generator().manual_seed(seed)
        drawn[name] = run.vae.sample(num_samples, is_mean, generator).reshape(num_samples, *run.dataset.train.shape[1:])
    return drawn


@torch.no_grad()
def reconstruct(run: LoadedRun, split: str, seed: int) -> Arrays:
    """rows [N], x and reconstruction E[x | z] for one posterior sample z of each row, [N, *shape]; of ALL also split
    [N], 0 for train, 1 for val, 2 for test."""
    x, generator = rows_of(run, split), torch.Generator().manual_seed(seed)
    means = [run.vae.reconstruct(batch.flatten(1), generator) for batch in x.split(EVALUATION_BATCH)]
    return {**_numbers_of(run, split), "x": x, "reconstruction": torch.cat(means).reshape(x.shape)}


@torch.no_grad()
def encode(run: LoadedRun, split: str, num_samples: int, seed: int) -> Arrays:
    """rows [N]; mean and log_var [N, D] of q_0(z_0 | x); z_K [S, N, D], num_samples draws of the posterior, and their
    log_q = log q_K(z_K | x) in nats, [S, N]; of ALL also split as `reconstruct`'s."""
    generator = torch.Generator().manual_seed(seed)
    dims = {"mean": 0, "log_var": 0, "z_K": 1, "log_q": 1}  # which counts the rows
    parts: dict[str, list[Tensor]] = {name: [] for name in dims}
    for batch in rows_of(run, split).flatten(1).split(EVALUATION_BATCH):
        mean, log_var, _ = run.vae.encode(batch)
        _, z_K, log_q = run.vae.posterior_sample(batch, num_samples, generator)
        for name, part in zip(parts, (mean, log_var, z_K, log_q), strict=True):
            parts[name].append(part)
    return {**_numbers_of(run, split), **{name: torch.cat(parts[name], dim) for name, dim in dims.items()}}


def rows_of(run: LoadedRun, split: str) -> Tensor:
    """The rows of a split as the encoder takes them, [N, *shape]: for probabilities their bits, by the run's seed.

    Those of ALL stand in the order of the array that was split; where there was none, train comes first, then val.
    """
    if split == ALL:
        return torch.cat([rows_of(run, name) for name in SPLITS])[_file_order(run)]
    x = getattr(run.dataset, split)
    if split != "train" or not run.dataset.dynamic:
        return x
    bits, parts = BinarizedRows(x, run.config.seed), torch.arange(len(x)).split(EVALUATION_BATCH)
    return torch.cat([bits(Draw(0, number, rows)) for number, rows in enumerate(parts)]).reshape(x.shape)


def _file_order(run: LoadedRun) -> Tensor:
    """Where the rows of the array that was split stand in train, val and test one after the other, int64 [N]."""
    numbers = torch.cat([run.rows[split] for split in SPLITS])
    is_one_array = len(numbers.unique()) == len(numbers)
    return numbers.argsort() if is_one_array else torch.arange(len(numbers))


def _numbers_of(run: LoadedRun, split: str) -> Arrays:
    if split != ALL:
        return {"rows": run.rows[split]}
    order = _file_order(run)
    splits = torch.cat([torch.full_like(run.rows[name], number) for number, name in enumerate(SPLITS)])
    return {"rows": torch.cat([run.rows[name] for name in SPLITS])[order], "split": splits[order]}


def write_arrays(path: Path, arrays: Arrays) -> str:
    """Writes a .npz file in one step; returns what it holds, for a line of output."""
    make_folder(path.parent)
    with replacing(path) as temporary, temporary.open("wb") as file:  # savez adds .npz to the name of a path
        require("numpy").savez(file, **{name: array.numpy() for name, array in arrays.items()})
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
