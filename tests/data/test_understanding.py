"""What is understood of a user's data: which array is meant and its likelihood, said before anything is trained."""

from __future__ import annotations

import io
import itertools
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vvae_fast.train.cli import main
from vvae_fast.train.data import sets as data
from vvae_fast.train.data.sets import DataError, describe, load_dataset, make_loaders, summary

IMAGES = np.random.RandomState(0).randn(20, 4, 5)
COUNTS = np.arange(60).reshape(20, 3) % 7


def savez(path: Path, **named) -> str:
    np.savez(path, **named)
    return str(path)


def save(path: Path, x) -> str:
    np.save(path, x)
    return str(path)


def refusal(call, *words: str) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in ("wanted", "got", *words):
        assert word in message
    return message


# Which array


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "val_images", "test_images"),
        ("labels", "images"),
        ("x", "train", "val", "test"),
        ("x", "test"),
        ("X", "y"),
        ("Train", "Val", "Test"),
        ("train", "valid", "test"),
        ("train", "test"),
    ],
)
def test_archives_that_can_be_read_in_several_ways_are_refused_and_listed(tmp_path, names):
    path = savez(tmp_path / "a.npz", **{name: IMAGES[: 4 + i] for i, name in enumerate(names)})
    listed = [f"{name} [{4 + i}, 4, 5] float64" for i, name in enumerate(names)]
    refusal(lambda: load_dataset(path), *listed, "--array NAME")
    chosen = load_dataset(path, array=names[1])
    assert chosen.arrays == (names[1],)
    assert sum(len(part) for part in (chosen.train, chosen.val, chosen.test)) == 5
    refusal(lambda: load_dataset(path, array="z"), "the array 'z'", *listed)


def test_archives_that_say_what_they_are(tmp_path):
    named = load_dataset(savez(tmp_path / "a.npz", labels=np.arange(20), x=IMAGES))
    assert named.arrays == ("x",)
    splits = load_dataset(savez(tmp_path / "b.npz", test=IMAGES[:3], labels=np.arange(20), val=IMAGES, train=IMAGES))
    assert splits.arrays == ("train", "val", "test")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [20, 20, 3]
    only = load_dataset(savez(tmp_path / "c.npz", measurements=IMAGES))
    assert only.arrays == ("measurements",)
    with zipfile.ZipFile(tmp_path / "c.npz", "a") as archive:
        archive.writestr("readme.txt", "no array")
    assert torch.equal(load_dataset(str(tmp_path / "c.npz")).train, only.train)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "c.npz", "a") as archive:
        archive.writestr("measurements.npy", "another of the name")
    refusal(lambda: load_dataset(str(tmp_path / "c.npz")), "--array NAME")
    refusal(lambda: load_dataset(str(tmp_path / "c.npz"), array="measurements"), "check the name")


@pytest.mark.parametrize("name", ["digits", "mnist", "a.npy"])
def test_array_belongs_to_archives(tmp_path, name):
    save(tmp_path / "a.npy", IMAGES)
    refusal(lambda: load_dataset(name, tmp_path, array="x"), "an archive to take 'x' from", "leave it out")


# Files that are none


def npy(shape: str, descr: str = "'<f8'", payload: bytes = bytes(48), version: int = 1) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 * version, "little") + header + payload


@pytest.mark.parametrize(
    "content",
    [
        b"text, and no array",
        b"",
        npy("(True,)"),
        npy("(True, 6)"),
        npy("(-2, -3)"),
        npy("(6.0, 1)"),
        npy("6"),
        npy("[6, 1]"),
        npy("(10**15, 6)"),
        npy("(1000000000000000000000, 6)"),
        npy("(1000000000000, 6)"),
        npy("(6, 2)"),
        npy("(2, 2)"),
        npy("(2, 3)", payload=bytes(48) + npy("(2, 3)")),
        npy("(6, 1)", "','"),
        npy("(6, 1)", "3"),
        npy("(6, 1)", "{}"),
        npy("(6, 1)", "[('a', '<f8')]"),
        npy("(3, 2)", "'(2,)f4'"),
        npy("(6, 1)", "'m8'"),
        npy("(6, 1)", "'M8[s]'"),
        npy("(6, 1)", "'V8'"),
        npy("(6, 1)", "'S8'"),
        npy("(6, 1)", "'O'"),
        npy("(3, 1)", "'<c16'"),
        npy("(2, 3)", version=3),
        npy("(" * 300 + ")" * 300),
        npy("(2, 3)").replace(b"False", b"0   ."),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_is_no_array_of_numbers_is_one_line(tmp_path, capsys, content, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    refusal(lambda: load_dataset(str(path)), str(path))
    assert main(["train", "--data", str(path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()


def test_a_header_of_python_2_is_read(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy("(3L, 2L)", payload=np.arange(6.0).tobytes()))
    assert load_dataset(str(tmp_path / "a.npy")).total_count == 5


def test_damaged_bytes_are_read_or_refused(tmp_path):
    """Every file that differs from a good one in a few bytes is read, or refused in one line."""
    source, refusals = random.Random(0), []
    for suffix, write in ((".npy", np.save), (".npz", np.savez), (".npz", np.savez_compressed)):
        buffer = io.BytesIO()
        write(buffer, COUNTS)
        good = buffer.getvalue()
        for trial in range(150):
            content = bytearray(good)
            for _ in range(source.choice([1, 1, 2, 8])):
                content[source.randrange(min(len(content), 160) if trial % 2 else len(content))] = source.randrange(256)
            path = tmp_path / f"a{suffix}"
            path.write_bytes(bytes(content[: source.choice([len(content), source.randrange(len(content))])]))
            try:
                load_dataset(str(path))
            except DataError as error:
                refusals.append(str(error))
    assert len(refusals) > 250
    assert not any("\n" in message for message in refusals)


@pytest.mark.parametrize("what", ["folder", "unreadable", "encrypted"])
def test_files_that_cannot_be_opened(tmp_path, monkeypatch, what):
    path = tmp_path / "a.npz"
    if what == "folder":
        path.mkdir()
        refusal(lambda: load_dataset(str(path)), "a folder")
        return
    savez(path, x=IMAGES)
    if what == "unreadable":
        monkeypatch.setattr(
            Path, "open", lambda *arguments: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        refusal(lambda: load_dataset(str(path)), "Permission denied", "permissions")
        return
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag of a password, in the member's header and in the archive's directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    refusal(lambda: load_dataset(str(path)), "password")


def test_too_large_a_file_is_told_before_it_is_read(tmp_path, capsys):
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(npy(f"({2**39}, 2)", payload=b""))
        file.truncate(file.tell() + 16 * 2**39)  # 8 TiB that take no room on the disk
    assert main(["train", "--data", str(tmp_path / "a.npy")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fewer rows" in error
    assert "--batch-size" not in error


@pytest.mark.parametrize("place", ["_as_float32", "_choose_likelihood", "_split_order", "_draw_bits", "read_arrays"])
def test_data_that_do_not_fit_into_memory_are_told(tmp_path, monkeypatch, capsys, place):
    def full(*arguments):
        raise MemoryError("Unable to allocate 5.00 GiB")

    monkeypatch.setattr(data, place, full)
    path = save(tmp_path / "grey.npy", COUNTS / 6)
    assert main(["train", "--data", path]) == 2
    error = capsys.readouterr().err
    assert "Unable to allocate 5.00 GiB" in error
    assert "fewer rows" in error
    assert "--batch-size" not in error


def test_thresholds_that_do_not_fit_into_memory_are_told(tmp_path, monkeypatch):
    dataset = load_dataset(save(tmp_path / "grey.npy", COUNTS / 6))
    monkeypatch.setattr(data, "BinarizedRows", lambda *arguments: (_ for _ in ()).throw(MemoryError()))
    refusal(lambda: make_loaders(dataset, 10, 0), "no memory", "fewer rows")


# Which likelihood


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (COUNTS % 2, {"bernoulli", "binomial", "gaussian"}),
        (COUNTS / 6, {"bernoulli", "gaussian"}),
        (COUNTS, {"binomial", "gaussian"}),
        (COUNTS - 1, {"gaussian"}),
        (COUNTS / 2, {"gaussian"}),
    ],
)
def test_a_likelihood_may_be_asked_for(tmp_path, x, fits):
    path = save(tmp_path / "a.npy", x)
    for likelihood in data.LIKELIHOODS:
        if likelihood in fits:
            dataset = load_dataset(path, likelihood=likelihood)
            assert dataset.likelihood == likelihood
            assert dataset.why.startswith("asked for")
            assert dataset.dynamic == (likelihood == "bernoulli" and x.max() == 1 and 0 < x[0, 1] < 1)
            assert dataset.total_count == (x.max() if likelihood == "binomial" else None)
        else:
            refusal(lambda likelihood=likelihood: load_dataset(path, likelihood=likelihood), likelihood, "values from")
    refusal(lambda: load_dataset(path, likelihood="poisson"), "'poisson'", "gaussian")


def test_the_likelihood_of_the_known_data_sets():
    assert load_dataset("digits", likelihood="gaussian").likelihood == "gaussian"
    refusal(lambda: load_dataset("digits", likelihood="bernoulli"), "0 to 16", "binomial")
    refusal(lambda: load_dataset("mnist", likelihood="gaussian"), "its protocol's")


# What is said, and where it is kept


def small(*more: str) -> list[str]:
    return ["--epochs", "1", "--batch-size", "8", "--latent-dim", "2", "--hidden", "3", "--num-samples", "3", *more]


def test_one_line_says_what_was_understood(tmp_path, capsys):
    path = savez(tmp_path / "a.npz", train=COUNTS[:12] - 1, val=COUNTS[:5] - 1, test=COUNTS[:4] - 1)
    assert main(["train", "--data", path, "--steps", "1", "--out", str(tmp_path / "run"), *small()]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        f"data: {Path(path).resolve()}, arrays train, val, test; rows of [3]: 12 train, 5 val, 4 test; values -1 to 5; "
        "gaussian likelihood: there are negative values"
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dataset"] == describe(load_dataset(path))
    assert result["dataset"]["rows"] == {"train": 12, "val": 5, "test": 4}
    assert (result["dataset"]["least"], result["dataset"]["greatest"]) == (-1, 5)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["likelihood"], config["array"]) == ("gaussian", "")


def test_options_choose_and_evaluate_reads_them_again(tmp_path, capsys):
    path = savez(tmp_path / "a.npz", labels=np.arange(20)[:, None], counts=COUNTS)
    options = ["--array", "counts", "--likelihood", "gaussian"]
    out = tmp_path / "run"
    command = ["train", "--data", path, "--steps", "1", "--out", str(out), *small()]
    assert main(command) == 2
    assert "labels [20, 1] int64, counts [20, 3] int64" in capsys.readouterr().err
    assert main([*command, *options]) == 0
    assert "array counts; " in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert main(["evaluate", str(out / "best.ckpt"), "--data", path, "--num-samples", "3"]) == 0
    assert f"nll:            {result['nll']:.3f}" in capsys.readouterr().out
    assert main([*command, *options[:2]]) == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_a_summary_is_one_line_whatever_the_name(tmp_path):
    line = summary(load_dataset(save(tmp_path / "two\nlines\x1b[31m.npy", COUNTS)))
    assert line.isprintable()


@pytest.mark.parametrize("x", [COUNTS % 2, COUNTS / 6, COUNTS, COUNTS - 1])
def test_the_range_is_that_of_the_file(tmp_path, x):
    seen = describe(load_dataset(save(tmp_path / "a.npy", x[x[:, 0] > x.min()])))
    kept = x[x[:, 0] > x.min()]
    assert (seen["least"], seen["greatest"]) == (kept.min(), kept.max())


def test_hand_made_data_sets_are_described():
    parts = [torch.arange(6.0).view(2, 3) + i for i in range(3)]
    seen = describe(data.Dataset("mine", *parts, "gaussian", None, None, False))
    assert (seen["least"], seen["greatest"], seen["source"], seen["why"]) == (0, 7, "memory", "given")


def test_every_kind_of_number_is_read(tmp_path):
    kinds = ["?", "u1", "i1", ">i2", "u8", "f2", ">f4", "f8", np.longdouble]
    for kind, order in itertools.product(kinds, "CF"):
        x = np.asarray(COUNTS % 2, dtype=kind, order=order)
        assert load_dataset(save(tmp_path / "a.npy", x)).likelihood == "bernoulli"
