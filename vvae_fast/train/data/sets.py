"""Data sets as tensors in memory: scikit-learn's digits, MNIST and FashionMNIST from their files, any array file."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast.shapes import check_size
from vvae_fast.train.base.extras import require
from vvae_fast.train.data.arrays import SPLITS, read_arrays, too_large
from vvae_fast.train.data.idx import DataError, read_idx
from vvae_fast.train.data.loaders import BinarizedRows, EpochSampler, EvalLoader, StaticRows, TrainLoader
from vvae_fast.train.data.statistics import statistics

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "LIKELIHOODS",
    "SPLITS",
    "DataError",
    "Dataset",
    "LikelihoodError",
    "describe",
    "load_dataset",
    "make_loaders",
    "summary",
]

BERNOULLI, BINOMIAL, GAUSSIAN = LIKELIHOODS = ("bernoulli", "binomial", "gaussian")
SPLIT_SEED = 20150521  # the day "Variational Inference with Normalizing Flows" appeared on arXiv
BITS_SEED = 777  # the protocol's seed, from which validation and test bits are drawn once
DIGITS_HELD_OUT = 200  # rows of validation, and of test, out of 1,797
MNIST_VALIDATION = 10_000  # the last rows of the training file
MNIST_FILES = {  # name: sizes
    "train-images-idx3-ubyte.gz": [60_000, 28, 28],
    "t10k-images-idx3-ubyte.gz": [10_000, 28, 28],
}
MNIST, FASHION = "mnist", "fashion-mnist"
TITLES = {MNIST: "MNIST", FASHION: "FashionMNIST"}  # whose files have the same names and sizes
KNOWN = {  # the CRC-32 of a file's pixels: whose file it is
    **dict.fromkeys((0xF3639B56, 0xE4CA5F57), MNIST),
    **dict.fromkeys((0xAE65DCCD, 0x12728439), FASHION),
}
MAX_COUNT = 2**24 - 1  # float32 rounds larger integers


class LikelihoodError(DataError):
    """Values that are impossible under the requested likelihood."""


class Model(NamedTuple):
    """The likelihood of the data, and why: see Dataset."""

    likelihood: str
    total_count: int | None
    dynamic: bool
    why: str


@dataclass(frozen=True)
class Dataset:
    """Three splits, and the facts about them that the model needs.

    Attributes:
        name: "digits", "mnist", "fashion-mnist" or the file's name.
        train, val, test: float32 [N, *shape], the same shape in each.
        likelihood: "bernoulli" (values in [0, 1]), "binomial" (counts) or "gaussian".
        total_count: the largest possible count for "binomial", None otherwise.
        image_shape: (height, width) when a row is a grey image, None otherwise.
        dynamic: train holds probabilities, and its bits are redrawn for each batch; val and test hold bits.
        why: the reason for the likelihood, in words.
        source: the file or folder of the data.
        arrays: the names of the arrays that were read from the file.
        value_range: the smallest and the largest value of the source; None: those of the splits.
        order: for each split the numbers of its rows, int64 [N], in the array that was split; None: each split is an
            array of its own, in its order.
    """

    name: str
    train: Tensor
    val: Tensor
    test: Tensor
    likelihood: str
    total_count: int | None
    image_shape: tuple[int, int] | None
    dynamic: bool
    why: str = "given"
    source: str = "memory"
    arrays: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    order: tuple[Tensor, ...] | None = None

    def row_numbers(self, split: str) -> Tensor:
        """Where the rows of "train", "val" or "test" stand in the array that they come from, int64 [N].

        That array is load_digits().images for digits, and the training file for MNIST's train and val, the test file
        for its test.
        """
        return torch.arange(len(getattr(self, split))) if self.order is None else self.order[SPLITS.index(split)]


def load_dataset(
    name_or_path: str, root: Path | str | None = None, *, array: str | None = None, likelihood: str | None = None
) -> Dataset:
    """Load a data set into memory. Nothing is downloaded.

    Args:
        name_or_path: one of
            "digits": 8x8 counts 0..16 that come with scikit-learn, binomial; 1,397 / 200 / 200 rows, fixed split.
            "mnist": the original files in ``root``, Bernoulli, dynamic: the first 50,000 rows of the training file
            train, its last 10,000 validate, the 10,000 of the test file test. The bits of validation, then
            test, are drawn once from ``numpy.random.RandomState(777)``, a stream that numpy has frozen.
            "fashion-mnist": Zalando's FashionMNIST, whose files have the same names, in the same way. Each of the two
            refuses the other's original files.
            A path to a .npy array [N, *shape], split 80 / 10 / 10 in a fixed random order, or to a .npz archive with
            the arrays train, val and test, or with one to split: its only one, or "x". Any other archive is rejected.
        root: the folder of MNIST or FashionMNIST; for array files, where a relative path starts. Digits ignore it.
        array: the name of the archive's array to split.
        likelihood: "bernoulli", "binomial" or "gaussian". By default it follows from the values of all splits:
            only 0 and 1, Bernoulli; within [0, 1], Bernoulli and dynamic, as for MNIST (its density is one of bits,
            not of grey levels); non-negative integers, binomial with the largest as total count; anything else,
            Gaussian.

    Raises:
        DataError: unknown name, missing folder or file, damaged file, an archive that can be read in several ways,
            unusable values, values that are impossible under the likelihood, or too many for the memory.
        ModuleNotFoundError: numpy or scikit-learn is not installed.
    """
    path = Path(name_or_path)
    try:
        if name_or_path in ("digits", *TITLES):
            if array is not None:
                raise DataError(f"{name_or_path}: wanted an archive to take '{array}' from, got no file; leave it out")
            return _digits(likelihood) if name_or_path == "digits" else _mnist(name_or_path, root, likelihood)
        if path.suffix not in (".npy", ".npz"):
            save = ", or save the file's numbers by numpy.save" if path.is_file() else ""
            if path.suffix == ".csv" and save:
                save += f": numpy.save('{path.stem}.npy', numpy.loadtxt('{path}', delimiter=',', skiprows=1))"
            raise DataError(
                f"data: wanted {', '.join(map(repr, ('digits', *TITLES)))} or the path of a .npz or .npy file, got "
                f"'{name_or_path}'; check the name{save}"
            )
        return _array_file(path if root is None else Path(root) / path, array, likelihood)
    except MemoryError as error:
        raise too_large(str(path), str(error) or "no memory") from error


def make_loaders(dataset: Dataset, batch_size: int, seed: int) -> tuple[TrainLoader, EvalLoader, EvalLoader]:
    """Loaders of float32 batches [B, prod(shape)] for training, validation and test; each has a length.

    The order of the training set, and its bits when the data set is dynamic, are a pure function of
    (seed, epoch): call ``set_epoch(epoch)`` on the loader or on its ``sampler`` (Lightning does). No row is dropped,
    the last batch may be smaller. Validation and test come in order, as views of the data set.

    Raises:
        TypeError: batch_size or seed is not an int.
        ValueError: batch_size is not positive or seed is negative.
        DataError: the memory cannot hold the thresholds of a dynamic data set.
    """
    batch_size, seed = check_size("batch_size", batch_size, 1), check_size("seed", seed, 0)
    try:
        rows = BinarizedRows(dataset.train, seed) if dataset.dynamic else StaticRows(dataset.train)
    except MemoryError as error:
        raise too_large(dataset.name, str(error) or "no memory") from error
    train = TrainLoader(rows, EpochSampler(len(dataset.train), batch_size, seed))
    return train, EvalLoader(dataset.val, batch_size), EvalLoader(dataset.test, batch_size)


def describe(dataset: Dataset) -> dict[str, Any]:
    """How the data of a data set were understood, as files record it."""
    splits = {name: getattr(dataset, name) for name in SPLITS}
    low, high = dataset.value_range or _range([x.numpy() for x in splits.values()])
    return {
        "source": dataset.source,
        "arrays": list(dataset.arrays),
        "rows": {name: len(x) for name, x in splits.items()},
        "row_shape": list(dataset.train.shape[1:]),
        "least": low,
        "greatest": high,
        "likelihood": dataset.likelihood,
        "total_count": dataset.total_count,
        "dynamic": dataset.dynamic,
        "why": dataset.why,
    }


def summary(dataset: Dataset) -> str:
    """The content of `describe` in one line."""
    seen = describe(dataset)
    arrays = f", array{'s' * (len(dataset.arrays) > 1)} {', '.join(dataset.arrays)}" if dataset.arrays else ""
    rows = ", ".join(f"{count} {name}" for name, count in seen["rows"].items())
    count = f"({dataset.total_count})" if dataset.likelihood == BINOMIAL else ""
    line = (
        f"data: {seen['source']}{arrays}; rows of {seen['row_shape']}: {rows}; values {seen['least']:g} to "
        f"{seen['greatest']:g}; {dataset.likelihood}{count} likelihood: {dataset.why}"
    )
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _digits(likelihood: str | None) -> Dataset:
    x = require("sklearn.datasets").load_digits().images.astype("float32")  # [1797, 8, 8]
    model = _choose_likelihood([x], likelihood, "digits")
    order = _split_order(len(x), DIGITS_HELD_OUT)
    parts = [torch.from_numpy(x[rows]) for rows in order]
    return _make("digits", parts, model, source="digits of scikit-learn", value_range=_range([x]), order=order)


def _mnist(name: str, root: Path | str | None, likelihood: str | None) -> Dataset:
    """MNIST or FashionMNIST."""
    title = TITLES[name]
    if likelihood not in (None, BERNOULLI):
        raise DataError(f"{name}: wanted the likelihood {BERNOULLI}, its protocol's, got {likelihood}; leave it out")
    if root is None:
        raise DataError(f"{name}: wanted the folder with {' and '.join(MNIST_FILES)}, got none; pass root (--root DIR)")
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: wanted {title}'s folder, got no such folder; pass the right root (--root DIR)")
    missing = [file for file in MNIST_FILES if not (folder / file).is_file()]
    if missing:
        raise DataError(
            f"{folder}: wanted {title}'s original files, got a folder without {', '.join(missing)}; add them"
        )
    images = []
    for file, sizes in MNIST_FILES.items():
        x = read_idx(folder / file, rank=3)  # [N, 28, 28]
        found = KNOWN.get(zlib.crc32(x.numpy().data), name)  # files of others are taken as they are
        if found != name:
            raise DataError(
                f"{folder / file}: wanted {title}, got {TITLES[found]}; choose data '{found}' or another folder"
            )
        if list(x.shape) != sizes:
            raise DataError(f"{folder / file}: wanted sizes {sizes}, got {list(x.shape)}; fetch the original file")
        images.append(x.float().div_(255).numpy())
    np = require("numpy")
    train_file, test = images
    train, val = train_file[:-MNIST_VALIDATION], train_file[-MNIST_VALIDATION:]
    parts = [torch.from_numpy(x) for x in (train, *_draw_bits(val, test))]
    model = Model(BERNOULLI, None, dynamic=True, why="grey levels over 255 are probabilities of bits, drawn anew")
    order = [*np.split(np.arange(len(train_file)), [len(train)]), np.arange(len(test))]
    source = f"{title}'s original files"
    return _make(name, parts, model, source=source, value_range=_range(images), order=order)


def _array_file(path: Path, array: str | None, likelihood: str | None) -> Dataset:
    arrays = read_arrays(path, array)
    parts = [_as_float32(x, f"{path}, array '{name}'") for name, x in arrays.items()]
    model = _choose_likelihood(parts, likelihood, str(path))
    train, original = parts[0], next(iter(arrays.values()))
    value_range, order = _range(arrays.values()), None
    if len(parts) == 1:
        if len(train) < len(SPLITS):
            raise DataError(f"{path}: wanted at least {len(SPLITS)} rows to split, got {len(train)}; add rows")
        order = _split_order(len(train), max(1, len(train) // 10))
        parts = [train[rows] for rows in order]
        original = original[order[0]] if model.likelihood == GAUSSIAN else original
    elif len({x.shape[1:] for x in parts}) > 1:
        shapes = {name: list(x.shape) for name, x in arrays.items()}
        raise DataError(f"{path}: wanted rows of one shape, got {shapes}; make all sizes but the first agree")
    if model.likelihood == GAUSSIAN:
        for rows in (original, parts[0]):  # checked before time is lost, and also before float32 rounded the values
            statistics(rows, str(path))
    if model.dynamic:
        parts = [parts[0], *_draw_bits(*parts[1:])]
    tensors = [torch.from_numpy(x) for x in parts]
    return _make(path.name, tensors, model, str(path.resolve()), tuple(arrays), value_range, order)


def _make(
    name: str,
    parts: Sequence[Tensor],
    model: Model,
    source: str,
    arrays: tuple[str, ...] = (),
    value_range: tuple[float, float] | None = None,
    order: Sequence[np.ndarray] | None = None,
) -> Dataset:
    likelihood, total_count, dynamic, why = model
    train, val, test = parts
    shape = _image_shape(train)
    facts = (likelihood, total_count, shape, dynamic, why, source, arrays, value_range)
    return Dataset(name, train, val, test, *facts, None if order is None else tuple(map(torch.from_numpy, order)))


def _as_float32(array: np.ndarray, where: str) -> np.ndarray:
    """The array as float32 [N, *shape], all finite."""
    np = require("numpy")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(x)
    bad = x.size - np.count_nonzero(finite)
    if bad:
        first = [int(i) for i in np.unravel_index(np.argmin(finite), x.shape)]
        raise DataError(
            f"{where}: wanted values that are finite in float32, got {bad} NaN or infinite, the first at {first}; "
            "clean it"
        )
    return x


def _choose_likelihood(parts: Sequence[np.ndarray], asked: str | None, where: str) -> Model:
    """The requested likelihood, else the one that follows from the values of all splits."""
    if asked not in (None, *LIKELIHOODS):
        raise DataError(f"likelihood: wanted one of {', '.join(LIKELIHOODS)}, got '{asked}'; check the name")
    low, high = _range(parts)
    whole = all(bool((x == x.round()).all()) for x in parts)
    within = f"values from {low:g} to {high:g}{'' if whole else ', not all whole'}"
    inferred = BERNOULLI if low >= 0 and high <= 1 else BINOMIAL if low >= 0 and whole else GAUSSIAN
    chosen = asked or inferred
    if chosen == BERNOULLI:
        if inferred != BERNOULLI:
            raise LikelihoodError(
                f"{where}: wanted values in [0, 1] for {BERNOULLI}, got {within}; {_remedy(inferred)}"
            )
        why = "all values are 0 or 1" if whole else "values in [0, 1] are probabilities of bits, drawn anew"
        model = Model(BERNOULLI, None, dynamic=not whole, why=why)
    elif chosen == BINOMIAL:
        if low < 0 or high < 1 or not whole:
            raise LikelihoodError(f"{where}: wanted counts from 0 for {BINOMIAL}, got {within}; {_remedy(inferred)}")
        if high > MAX_COUNT:
            raise DataError(
                f"{where}: wanted counts up to {MAX_COUNT}, got {high:.0f}; divide them by a scale, or ask for the "
                f"likelihood {GAUSSIAN}"
            )
        model = Model(BINOMIAL, int(high), dynamic=False, why="all values are whole numbers from 0")
    else:
        why = "there are negative values" if low < 0 else "there are values above 1 that are not whole"
        model = Model(GAUSSIAN, None, dynamic=False, why=why)
    return model if asked is None else model._replace(why=f"asked for{_and_bits(model)}")


def _and_bits(model: Model) -> str:
    return "; values are probabilities of bits, drawn anew" if model.dynamic else ""


def _remedy(likelihood: str) -> str:
    return f"change the values, or ask for the likelihood {likelihood}, which has them"


def _range(arrays: Iterable[np.ndarray]) -> tuple[float, float]:
    arrays = list(arrays)
    return min(float(x.min()) for x in arrays), max(float(x.max()) for x in arrays)


def _image_shape(x: Tensor) -> tuple[int, int] | None:
    """(height, width) of [N, H, W] and [N, 1, H, W], which are images; None for other shapes."""
    if x.ndim == 3 or (x.ndim == 4 and x.shape[1] == 1):
        return x.shape[-2], x.shape[-1]
    return None


def _split_order(num_rows: int, held_out: int) -> list[np.ndarray]:
    """The rows of train, val and test in a fixed random order, held_out of them in each of the last two."""
    np = require("numpy")
    order = np.random.RandomState(SPLIT_SEED).permutation(num_rows)
    return np.split(order, [num_rows - 2 * held_out, num_rows - held_out])


def _draw_bits(*parts: np.ndarray) -> list[np.ndarray]:
    """Bits of probabilities, drawn once and in this order, float32 of the same shapes."""
    stream = require("numpy").random.RandomState(BITS_SEED)
    return [(stream.random_sample(x.shape) < x).astype("float32") for x in parts]
