"""Data: the IDX parser, the protocol of each data set, array files, loaders as functions of (seed, epoch)."""

from __future__ import annotations

import gzip
import os
import struct
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from vvae_fast.train.data import sets
from vvae_fast.train.data.idx import read_idx
from vvae_fast.train.data.sets import DataError, Dataset, load_dataset, make_loaders

TRAIN_FILE, TEST_FILE = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"


def idx_bytes(sizes: tuple[int, ...], payload: bytes, magic: int | None = None) -> bytes:
    magic = 0x0800 | len(sizes) if magic is None else magic
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + payload


def refusal(call, *words: str) -> str:
    """The message of the DataError that the call must raise: one line with all of the words."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "wanted" in message
    assert "got" in message
    for word in words:
        assert word in message
    return message


# IDX files


def test_idx_reads_what_was_written(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx_bytes((2, 3, 4), bytes(range(24)))))
    assert torch.equal(read_idx(path, rank=3), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


GOOD = idx_bytes((2, 3, 4), bytes(24))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(gzip.compress(GOOD)[:-12], ["whole gzip file"], id="truncated"),
        pytest.param(gzip.compress(GOOD)[:3], ["gzip"], id="truncated in the gzip header"),
        pytest.param(GOOD, ["wanted a gzip file"], id="not gzip"),
        pytest.param(
            gzip.compress(idx_bytes((2, 3, 4), bytes(24), magic=0x801)), ["0x00000803", "0x00000801"], id="magic"
        ),
        pytest.param(gzip.compress(idx_bytes((24,), bytes(24))), ["rank 3", "0x00000801"], id="wrong rank"),
        pytest.param(gzip.compress(GOOD[:-1]), ["24", "23"], id="short payload"),
        pytest.param(gzip.compress(GOOD + b"x"), ["24", "25"], id="long payload"),
        pytest.param(gzip.compress(GOOD[:10]), ["16", "10"], id="cut header"),
        pytest.param(gzip.compress(GOOD[:2]), ["2 bytes"], id="cut magic"),
        pytest.param(gzip.compress(idx_bytes((0, 3, 4), b"")), ["[0, 3, 4]"], id="empty"),
        pytest.param(b"", ["0 bytes"], id="no content"),
    ],
)
def test_idx_refuses(tmp_path, content, words):
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    refusal(lambda: read_idx(path, rank=3), str(path), *words)


def test_idx_refuses_missing_file_and_folder(tmp_path):
    refusal(lambda: read_idx(tmp_path / "a.gz", rank=3), "no such file")
    refusal(lambda: read_idx(tmp_path, rank=3), "readable file")


# Digits


def test_digits_split_is_disjoint_and_complete():
    datasets = pytest.importorskip("sklearn.datasets")
    data = load_dataset("digits")
    assert (data.name, data.likelihood, data.total_count) == ("digits", "binomial", 16)
    assert (data.image_shape, data.dynamic) == ((8, 8), False)
    assert [len(x) for x in (data.train, data.val, data.test)] == [1397, 200, 200]
    rows = torch.cat([data.train, data.val, data.test]).flatten(1)  # [1797, 64]
    original = torch.from_numpy(datasets.load_digits().data).float()
    assert rows.dtype == torch.float32
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, original.tolist()))
    assert torch.equal(load_dataset("digits").test, data.test)


# MNIST


def write_mnist(folder: Path) -> None:
    """Files of the right sizes; every image of a file has the same few grey levels."""
    image = bytes([0, 51, 255, 102] * 196)
    for name, rows in ((TRAIN_FILE, 60_000), (TEST_FILE, 10_000)):
        (folder / name).write_bytes(gzip.compress(idx_bytes((rows, 28, 28), image * rows), compresslevel=1))


def test_mnist_protocol_on_synthetic_files(tmp_path):
    write_mnist(tmp_path)
    data = load_dataset("mnist", root=str(tmp_path))
    assert (data.likelihood, data.total_count, data.image_shape, data.dynamic) == ("bernoulli", None, (28, 28), True)
    assert [len(x) for x in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    assert torch.equal(data.train[0].flatten()[:4], torch.tensor([0.0, 0.2, 1.0, 0.4]))
    stream = np.random.RandomState(777)
    p = np.tile(np.float32([0, 51, 255, 102]) / 255, (10_000, 196)).astype(np.float32)
    for part in (data.val, data.test):
        bits = stream.random_sample((10_000, 28, 28)).reshape(10_000, -1) < p
        assert torch.equal(part.flatten(1), torch.from_numpy(bits).float())


def test_each_of_mnist_and_fashion_mnist_refuses_the_others_files(tmp_path, monkeypatch):
    """Here the known files are small ones, whose sizes are refused after that."""
    for name, pixel in (("mnist", 1), ("fashion-mnist", 2)):
        pixels = bytes([pixel] * 2 * 784)
        monkeypatch.setitem(sets.KNOWN, zlib.crc32(pixels), name)
        (tmp_path / name).mkdir()
        for file in (TRAIN_FILE, TEST_FILE):
            (tmp_path / name / file).write_bytes(gzip.compress(idx_bytes((2, 28, 28), pixels)))
    for name, title, other, found in (
        ("mnist", "MNIST", "fashion-mnist", "FashionMNIST"),
        ("fashion-mnist", "FashionMNIST", "mnist", "MNIST"),
    ):
        words = (TRAIN_FILE, f"wanted {title}, got {found}; choose data '{other}'")
        refusal(partial(load_dataset, name, root=tmp_path / other), *words)
        refusal(partial(load_dataset, name, root=tmp_path / name), "[60000, 28, 28]", "[2, 28, 28]")
        refusal(partial(load_dataset, name), f"{name}: wanted the folder", "--root")


def test_fashion_mnist_is_read_as_mnist_is(tmp_path):
    write_mnist(tmp_path)
    data, mnist = (load_dataset(name, root=tmp_path) for name in ("fashion-mnist", "mnist"))
    assert (data.name, data.source) == ("fashion-mnist", "FashionMNIST's original files")
    assert torch.equal(data.train, mnist.train)
    assert torch.equal(data.test, mnist.test)


def test_mnist_refuses(tmp_path):
    refusal(lambda: load_dataset("mnist"), "root", TRAIN_FILE, TEST_FILE)
    refusal(lambda: load_dataset("mnist", root=tmp_path / "nowhere"), "nowhere", "no such folder")
    refusal(lambda: load_dataset("mnist", root=tmp_path), TRAIN_FILE, TEST_FILE)
    (tmp_path / TRAIN_FILE).write_bytes(gzip.compress(idx_bytes((2, 28, 28), bytes(2 * 784))))
    assert TRAIN_FILE not in refusal(lambda: load_dataset("mnist", root=tmp_path), TEST_FILE)
    (tmp_path / TEST_FILE).write_bytes(b"")
    refusal(lambda: load_dataset("mnist", root=tmp_path), TRAIN_FILE, "[60000, 28, 28]", "[2, 28, 28]")


def test_real_mnist():
    default = Path(__file__).resolve().parents[2] / "../shared/data/mnist"
    folder = Path(os.environ.get("VVAE_FAST_MNIST") or default)
    if not folder.is_dir():
        pytest.skip(f"MNIST's files are not in {folder}; set VVAE_FAST_MNIST to their folder")
    data, again = load_dataset("mnist", root=folder), load_dataset("mnist", root=folder)
    assert [len(x) for x in (data.train, data.val, data.test)] == [50_000, 10_000, 10_000]
    assert 0.12 < data.train.mean() < 0.14
    for part, same in ((data.val, again.val), (data.test, again.test)):
        assert 0.12 < part.mean() < 0.14
        assert set(part.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(part, same)


# Array files


def save(path: Path, *arrays, **named) -> str:
    if path.suffix == ".npy":
        np.save(path, *arrays)
    else:
        np.savez(path, *arrays, **named)
    return str(path)


COUNTS = np.arange(60).reshape(20, 3) % 7


@pytest.mark.parametrize(
    ("x", "likelihood", "total_count", "dynamic"),
    [
        pytest.param(COUNTS % 2 == 0, "bernoulli", None, False, id="booleans"),
        pytest.param((COUNTS % 2).astype(float), "bernoulli", None, False, id="zeros and ones"),
        pytest.param(COUNTS / 6, "bernoulli", None, True, id="within 0 and 1"),
        pytest.param(COUNTS.astype(np.uint8), "binomial", 6, False, id="counts"),
        pytest.param(COUNTS.astype(">f8"), "binomial", 6, False, id="counts as big-endian floats"),
        pytest.param(COUNTS - 1, "gaussian", None, False, id="a negative integer"),
        pytest.param(COUNTS / 2, "gaussian", None, False, id="real numbers"),
    ],
)
def test_likelihood_follows_the_values(tmp_path, x, likelihood, total_count, dynamic):
    data = load_dataset(save(tmp_path / "a.npy", x))
    assert (data.name, data.likelihood, data.total_count) == ("a.npy", likelihood, total_count)
    assert (data.image_shape, data.dynamic) == (None, dynamic)
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 2, 2]
    if dynamic:
        assert set(torch.cat([data.val, data.test]).unique().tolist()) == {0.0, 1.0}
    else:
        rows = torch.cat([data.train, data.val, data.test])
        assert rows.dtype == torch.float32
        assert sorted(rows.tolist()) == sorted(x.astype(float).tolist())


def test_npz_archives(tmp_path):
    images = np.random.RandomState(0).randn(20, 4, 5)
    parts = load_dataset(save(tmp_path / "a.npz", train=images[:9], val=images[9:12], test=images[12:]))
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [9, 3, 8]
    assert parts.image_shape == (4, 5)
    assert torch.equal(parts.test, torch.from_numpy(images[12:]).float())
    named = load_dataset(save(tmp_path / "b.npz", labels=np.arange(20), x=images))
    chosen = load_dataset(save(tmp_path / "c.npz", images[:, None], np.arange(20)), array="arr_0")
    assert torch.equal(named.train, chosen.train[:, 0])
    assert chosen.image_shape == (4, 5)
    only = load_dataset(save(tmp_path / "d.npz", anything=images))
    assert torch.equal(named.train, only.train)
    relative = load_dataset("b.npz", root=tmp_path)
    assert torch.equal(relative.val, named.val)


def with_value(value: float) -> np.ndarray:
    x = COUNTS.astype(float)
    x[3, 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "words"),
    [
        pytest.param(np.arange(9.0), ["rank 2", "[9]"], id="rank 1"),
        pytest.param(np.float64(3), ["rank 2", "[]"], id="rank 0"),
        pytest.param(np.zeros((0, 3)), ["[0, 3]"], id="no rows"),
        pytest.param(np.zeros((9, 0)), ["[9, 0]"], id="no columns"),
        pytest.param(np.zeros((2, 3)), ["3 rows", "2"], id="too few rows to split"),
        pytest.param(with_value(np.nan), ["1 NaN"], id="NaN"),
        pytest.param(with_value(-np.inf), ["infinite"], id="infinity"),
        pytest.param(with_value(1e300), ["float32"], id="overflow in float32"),
        pytest.param(with_value(2**24 + 1), ["16777215"], id="counts that float32 rounds"),
        pytest.param(COUNTS.astype(object), ["objects"], id="objects"),
        pytest.param(COUNTS.astype(str), ["<U"], id="text"),
        pytest.param(COUNTS * 1j, ["complex"], id="complex"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_are_refused(tmp_path, x, words, suffix):
    path = save(tmp_path / f"a{suffix}", x)
    refusal(lambda: load_dataset(path), path, *words)


def test_array_files_are_refused(tmp_path):
    refusal(lambda: load_dataset("cifar"), "'cifar'", "'digits'", ".npz")
    refusal(lambda: load_dataset(str(tmp_path / "a.npy")), "a.npy", "no such file")
    x = np.random.RandomState(0).randn(6, 3)
    path = save(tmp_path / "a.npz", train=x, val=x)
    refusal(lambda: load_dataset(path), "no test")
    path = save(tmp_path / "a.npz", train=x, val=x, test=x[:, :2])
    refusal(lambda: load_dataset(path), "one shape", "[6, 2]")
    path = save(tmp_path / "a.npz")
    refusal(lambda: load_dataset(path), "none")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("keep", [0, 5, 100, -9])
def test_damaged_array_files_are_refused(tmp_path, suffix, keep):
    path = tmp_path / f"a{suffix}"
    content = Path(save(path, COUNTS)).read_bytes()
    path.write_bytes(content[:keep])
    refusal(lambda: load_dataset(str(path)), str(path))
    path.write_bytes(b"not an array" + content)
    refusal(lambda: load_dataset(str(path)), str(path))


# Loaders


def rows_of_their_number(num_rows: int) -> Dataset:
    x = torch.arange(num_rows * 6.0).view(num_rows, 2, 3)
    return Dataset("rows", x, x[:5], x[5:12], "gaussian", total_count=None, image_shape=(2, 3), dynamic=False)


def grey(num_rows: int = 500) -> Dataset:
    p = torch.linspace(0, 1, 256).round(decimals=6).expand(num_rows, 256).contiguous()
    return replace(rows_of_their_number(20), train=p, likelihood="bernoulli", dynamic=True)


def epoch_of(data: Dataset, seed: int, epoch: int, batch_size: int = 7) -> torch.Tensor:
    train, _, _ = make_loaders(data, batch_size, seed)
    train.set_epoch(epoch)
    return torch.cat(list(train))


def test_train_loader_gives_every_row_once():
    data = rows_of_their_number(20)
    train, _, _ = make_loaders(data, batch_size=8, seed=0)
    got = list(train)
    assert [tuple(x.shape) for x in got] == [(8, 6), (8, 6), (4, 6)]
    assert len(train) == 3
    assert all(x.dtype == torch.float32 for x in got)
    assert sorted(torch.cat(got)[:, 0].tolist()) == data.train[:, 0, 0].tolist()
    assert torch.cat(got)[:, 0].tolist() != data.train[:, 0, 0].tolist()


def test_eval_loaders_keep_the_order():
    data = rows_of_their_number(20)
    _, val, test = make_loaders(data, batch_size=3, seed=0)
    for loader, x in ((val, data.val), (test, data.test)):
        assert torch.equal(torch.cat(list(loader)), x.flatten(1))
        assert len(loader) == len(list(loader))
        assert torch.equal(torch.cat(list(loader)), x.flatten(1))


@pytest.mark.parametrize("data", [rows_of_their_number(50), grey()], ids=["static", "dynamic"])
def test_epochs_are_functions_of_seed_and_epoch(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train, _, _ = make_loaders(data, batch_size=7, seed=3)
    uninterrupted = []
    for epoch in range(3):
        train.sampler.set_epoch(epoch)
        uninterrupted.append(torch.cat(list(train)))
    assert torch.equal(epoch_of(data, seed=3, epoch=2), uninterrupted[2])
    assert not torch.equal(uninterrupted[1], uninterrupted[2])
    assert not torch.equal(epoch_of(data, seed=4, epoch=2), uninterrupted[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_epoch_may_be_set_after_iter():
    data = rows_of_their_number(50)
    train, _, _ = make_loaders(data, batch_size=7, seed=3)
    iterator = iter(train)
    train.set_epoch(5)
    assert torch.equal(torch.cat(list(iterator)), epoch_of(data, seed=3, epoch=5))


def test_bits_have_the_right_mean():
    data, num_rows, epochs = grey(), 500, 8
    bits = torch.stack([epoch_of(data, seed=0, epoch=epoch, batch_size=100) for epoch in range(epochs)])
    p = data.train[0].double()  # [256]
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    mean = bits.double().mean((0, 1))  # [256]
    error = (p * (1 - p) / (num_rows * epochs)).sqrt()
    assert mean[0] == 0
    assert mean[-1] == 1
    assert ((mean - p).abs() <= 5 * error).all()
    assert ((mean - p).mean().abs() < 5 * error.mean() / 16).item()
    assert not torch.equal(bits[0], bits[1])


@pytest.mark.parametrize(
    ("batch_size", "seed", "error", "name"),
    [(0, 0, ValueError, "batch_size"), (2.0, 0, TypeError, "batch_size"), (2, -1, ValueError, "seed")],
)
def test_loader_arguments_are_refused(batch_size, seed, error, name):
    with pytest.raises(error, match=name):
        make_loaders(rows_of_their_number(20), batch_size, seed)


def test_missing_extra_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vvae_fast\[train\]'"):
        load_dataset("digits")
