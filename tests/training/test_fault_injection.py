"""Every file that a run reads, damaged; every file that it writes, refused by the disk: one line, and nothing lost."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from vvae_fast.train.base import files
from vvae_fast.train.cli import main

SMALL = "--epochs 2 --batch-size 40 --latent-dim 2 --hidden 3 --steps 1 --num-samples 2"
OPTIONS = ["train", *SMALL.split()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "bits.npy", np.random.default_rng(0).integers(0, 2, (60, 9)))
    command = [*OPTIONS, "--data", str(folder / "bits.npy")]
    assert main([*command, "--out", str(folder / "run")]) == 0
    return folder / "run", command


def one_line(capsys, code: int) -> None:
    error = capsys.readouterr().err
    assert (code, error.count("\n")) in ((0, 0), (2, 1)), error
    assert error == "" or error.startswith("vvae-fast: error: ")


def scores(folder: Path) -> dict:
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("seconds_per_epoch", "history")}


@pytest.mark.parametrize("name", ["config.json", "environment.json", "result.json"])
def test_damaged_json(finished, tmp_path, capsys, name):
    whole, command = finished
    good, generator = (whole / name).read_bytes(), random.Random(0)
    damaged = [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"9" * 9999,
        b'{"a": ' * 9999,
        good[: len(good) // 2],
        good + b"}",
    ]
    for _ in range(40):
        position = generator.randrange(len(good))
        damaged.append(good[:position] + bytes([generator.randrange(256)]) + good[position + 1 :])
    out = shutil.copytree(whole, tmp_path / "run")
    for content in damaged:
        (out / name).write_bytes(content)
        one_line(capsys, main([*command, "--out", str(out)]))


def test_wrong_types_in_a_result(finished, tmp_path, capsys):
    whole, command = finished
    out = shutil.copytree(whole, tmp_path / "run")
    good = json.loads((out / "result.json").read_text())
    for key in good:
        for value in (None, "x", [], {}, [1], {"a": 1}, True, 1e400, -1):
            (out / "result.json").write_text(json.dumps({**good, key: value}))
            code = main([*command, "--out", str(out)])
            assert code in (0, 2, 3)
            assert "Traceback" not in capsys.readouterr().err


def test_a_disk_that_is_full_at_any_moment(finished, tmp_path, capsys, monkeypatch):
    """The k-th file that a run puts into its place fails; the same command then ends as if nothing had been."""
    whole, command = finished
    replace, failed = os.replace, 0
    for k in range(99):
        out, calls = tmp_path / str(k), []

        def full(source, target, calls=calls, k=k):
            calls.append(target)
            if len(calls) == k + 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", full)
            code = main([*command, "--out", str(out)])
        if code == 0:
            break
        failed += 1
        one_line(capsys, code)
        assert main([*command, "--out", str(out)]) == 0
        capsys.readouterr()
        assert scores(out) == scores(whole)
    assert failed >= 6, "config, environment, two of best and last, result"


def test_a_folder_that_cannot_be_written(finished, tmp_path, capsys, monkeypatch):
    _, command = finished

    def deny(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", deny)
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "cannot be made a folder (Permission denied); choose another --out" in capsys.readouterr().err
