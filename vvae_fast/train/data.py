"""Data sets as tensors in memory: scikit-learn's digits, MNIST from its original files, any array file."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vvae_fast.shapes import check_size
from vvae_fast.train.extras import require
from vvae_fast.train.idx import DataError, read_idx
from vvae_fast.train.loaders import BinarizedRows, EpochSampler, EvalLoader, StaticRows, TrainLoader

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DataError", "Dataset", "load_dataset", "make_loaders"]

SPLIT_SEED = 20150521  # the day "Variational Inference with Normalizing Flows" appeared on arXiv
BITS_SEED = 777  # of the protocol: validation and test bits are drawn once from it
DIGITS_HELD_OUT = 200  # rows each of validation and test, of 1,797
MNIST_VALIDATION = 10_000  # the last rows of the training file
MNIST_FILES = {  # name: sizes
    "train-images-idx3-ubyte.gz": [60_000, 28, 28],
    "t10k-images-idx3-ubyte.gz": [10_000, 28, 28],
}
MAX_COUNT = 2**24 - 1  # beyond, float32 rounds integers
SPLITS = ("train", "val", "test")
# What numpy lets through from an array file that it cannot read; zipfile raises RuntimeError for unknown flags.
DAMAGED = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)


@dataclass(frozen=True)
class Dataset:
    """Three splits and what the model must know of them.

    Attributes:
        name: "digits", "mnist" or the file's name.
        train, val, test: float32 [N, *shape], the same shape in each.
        likelihood: "bernoulli" (values in [0, 1]), "binomial" (counts) or "gaussian".
        total_count: the largest possible count for "binomial", None otherwise.
        image_shape: (height, width) when a row is a grey image, None otherwise.
        dynamic: train holds probabilities, and its bits are redrawn for each batch; val and test hold bits.
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    likelihood: str
    total_count: int | None
    image_shape: tuple[int, int] | None
    dynamic: bool


def load_dataset(name_or_path: str, root: Path | str | None = None) -> Dataset:
    """Load a data set into memory. Nothing is downloaded.

    Args:
        name_or_path: one of
            "digits": 8x8 counts 0..16 that come with scikit-learn, binomial; 1,397 / 200 / 200 rows, fixed split.
            "mnist": the original files in ``root``, Bernoulli, dynamic: the first 50,000 rows of the training file
            train, its last 10,000 validate, the 10,000 of the test file test. The bits of validation, then
            test, are drawn once from ``numpy.random.RandomState(777)``, a stream that numpy has frozen.
            A path to a .npy array [N, *shape], split 80 / 10 / 10 in a fixed random order, or to a .npz archive with
            the arrays train, val and test, or with one to be split: "x", else the first.
            Their likelihood follows from the values of all splits: only 0 and 1, Bernoulli; within [0, 1],
            Bernoulli and dynamic, as for MNIST (its density is one of bits, not of grey levels); non-negative
            integers, binomial with the largest as total count; anything else, Gaussian.
        root: MNIST's folder; for array files, where a relative path starts. Digits ignore it.

    Raises:
        DataError: unknown name, missing folder or file, damaged file, or unusable values.
        ModuleNotFoundError: numpy or scikit-learn is not installed.
    """
    if name_or_path == "digits":
        return _digits()
    if name_or_path == "mnist":
        return _mnist(root)
    path = Path(name_or_path)
    if path.suffix not in (".npy", ".npz"):
        raise DataError(
            f"data: wanted 'digits', 'mnist' or the path of a .npz or .npy file, got '{name_or_path}'; check the name"
        )
    return _array_file(path if root is None else Path(root) / path)


def make_loaders(dataset: Dataset, batch_size: int, seed: int) -> tuple[TrainLoader, EvalLoader, EvalLoader]:
    """Loaders of float32 batches [B, prod(shape)] for training, validation and test; each has a length.

    The order of the training set, and its bits when the data set is dynamic, are a pure function of
    (seed, epoch): call ``set_epoch(epoch)`` on the loader or on its ``sampler`` (Lightning does). No row is dropped,
    the last batch may be smaller. Validation and test come in order, as views of the data set.

    Raises:
        TypeError: batch_size or seed is not an int.
        ValueError: batch_size is not positive or seed is negative.
    """
    batch_size, seed = check_size("batch_size", batch_size, 1), check_size("seed", seed, 0)
    rows = BinarizedRows(dataset.train, seed) if dataset.dynamic else StaticRows(dataset.train)
    train = TrainLoader(rows, EpochSampler(len(dataset.train), batch_size, seed))
    return train, EvalLoader(dataset.val, batch_size), EvalLoader(dataset.test, batch_size)


def _digits() -> Dataset:
    x = require("sklearn.datasets").load_digits().images  # [1797, 8, 8]
    parts = _split(torch.from_numpy(x).float(), DIGITS_HELD_OUT)
    return Dataset("digits", *parts, likelihood="binomial", total_count=16, image_shape=(8, 8), dynamic=False)


def _mnist(root: Path | str | None) -> Dataset:
    if root is None:
        raise DataError(f"mnist: wanted the folder with {' and '.join(MNIST_FILES)}, got none; pass root (--root DIR)")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: wanted MNIST's folder, got no such folder; pass the right root (--root DIR)")
    missing = [name for name in MNIST_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: wanted MNIST's original files, got a folder without {', '.join(missing)}; add them")
    images = []
    for name, sizes in MNIST_FILES.items():
        x = read_idx(folder / name, rank=3)  # [N, 28, 28]
        if list(x.shape) != sizes:
            raise DataError(f"{folder / name}: wanted sizes {sizes}, got {list(x.shape)}; fetch the original file")
        images.append(x.float() / 255)
    train_file, test = images
    train, val = train_file[:-MNIST_VALIDATION], train_file[-MNIST_VALIDATION:]
    val, test = _draw_bits(val, test)
    return Dataset("mnist", train, val, test, "bernoulli", total_count=None, image_shape=(28, 28), dynamic=True)


def _array_file(path: Path) -> Dataset:
    arrays = {name: _checked(array, path, name) for name, array in _read_arrays(path).items()}
    if len(arrays) == 1:
        (x,) = arrays.values()
        if len(x) < len(SPLITS):
            raise DataError(f"{path}: wanted at least {len(SPLITS)} rows to split, got {len(x)}; add rows")
        parts = _split(x, max(1, len(x) // 10))
    else:
        parts = tuple(arrays[name] for name in SPLITS)
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        if len({x.shape[1:] for x in parts}) > 1:
            raise DataError(f"{path}: wanted rows of one shape, got {shapes}; make all sizes but the first agree")
    likelihood, total_count, dynamic = _infer_likelihood(parts, path)
    if dynamic:
        parts = (parts[0], *_draw_bits(*parts[1:]))
    return Dataset(path.name, *parts, likelihood, total_count, _image_shape(parts[0]), dynamic)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The splits train, val and test, or one array under its own name."""
    np = require("numpy")
    if not path.is_file():
        raise DataError(f"{path}: wanted an array file, got no such file; check the path")
    try:
        with path.open("rb") as file:  # opened here, since np.load leaves it open when it fails
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                return {path.stem: content}
            return {name: content[name] for name in _wanted_keys(content.files, path)}
    except DataError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: wanted numbers as numpy.save or numpy.savez write them, got something else or a damaged file "
            f"({reason}); save it again, without objects"
        ) from error


def _wanted_keys(keys: list[str], path: Path) -> list[str]:
    if not keys:
        raise DataError(f"{path}: wanted the arrays train, val and test, or one to split, got none; save it again")
    missing = [name for name in SPLITS if name not in keys]
    if not missing:
        return list(SPLITS)
    if len(missing) < len(SPLITS):
        raise DataError(f"{path}: wanted train, val and test, got no {' and no '.join(missing)}; add what is missing")
    return ["x"] if "x" in keys else keys[:1]


def _checked(array: np.ndarray, path: Path, name: str) -> Tensor:
    """The array as a float32 tensor [N, *shape] with at least one element, all finite."""
    np = require("numpy")
    where = f"{path}, array '{name}'"
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: wanted booleans, integers or real numbers, got {array.dtype}; convert it")
    if array.ndim < 2:
        raise DataError(f"{where}: wanted rank 2 or more [N, *shape], got sizes {list(array.shape)}; reshape it")
    if array.size == 0:
        raise DataError(f"{where}: wanted at least one element, got sizes {list(array.shape)}; add rows")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(array, dtype=np.float32)
    bad = x.size - np.count_nonzero(np.isfinite(x))
    if bad:
        raise DataError(f"{where}: wanted values that are finite in float32, got {bad} NaN or infinite; clean it")
    return torch.from_numpy(x)


def _infer_likelihood(parts: tuple[Tensor, ...], path: Path) -> tuple[str, int | None, bool]:
    """(likelihood, total_count, dynamic) from the values of all splits."""
    low = min(x.min().item() for x in parts)
    high = max(x.max().item() for x in parts)
    whole = all(bool((x == x.round()).all()) for x in parts)
    if low >= 0 and high <= 1:
        return "bernoulli", None, not whole
    if low < 0 or not whole:
        return "gaussian", None, False
    if high > MAX_COUNT:
        raise DataError(f"{path}: wanted counts up to {MAX_COUNT}, got {high:.0f}; divide them by a scale")
    return "binomial", int(high), False


def _image_shape(x: Tensor) -> tuple[int, int] | None:
    """[N, H, W] and [N, 1, H, W] are images; a flat row could be anything."""
    if x.ndim == 3 or (x.ndim == 4 and x.shape[1] == 1):
        return x.shape[-2], x.shape[-1]
    return None


def _split(x: Tensor, held_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """(train, val, test) in a fixed random order, held_out rows in each of the last two."""
    order = torch.from_numpy(require("numpy").random.RandomState(SPLIT_SEED).permutation(len(x)))
    train, val, test = order.split([len(x) - 2 * held_out, held_out, held_out])
    return x[train], x[val], x[test]


def _draw_bits(*parts: Tensor) -> tuple[Tensor, ...]:
    """Bits of probabilities, drawn once and in this order, float32 of the same shapes."""
    stream = require("numpy").random.RandomState(BITS_SEED)
    return tuple((torch.from_numpy(stream.random_sample(x.shape)) < x).float() for x in parts)
