"""Paths mean one thing to every library that is given them, and no run writes over another's files."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from vvae_fast.train.base import paths
from vvae_fast.train.base.files import RunError
from vvae_fast.train.cli import main

SMALL = "--epochs 1 --batch-size 40 --latent-dim 2 --hidden 3 --steps 1 --num-samples 2"
OPTIONS = ["train", *SMALL.split()]
RUN = {"best.ckpt", "config.json", "csv", "environment.json", "last.ckpt", "lock", "result.json", "tensorboard"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder and, beside it, the current one with bits.npy."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "here")
    np.save("bits.npy", np.random.default_rng(0).integers(0, 2, (60, 9)))
    return tmp_path / "home"


def refused(capsys, command: list[str]) -> str:
    """The error's one line, whether argparse gives it or the command."""
    try:
        code = main(command)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


# What a shell, fsspec, Lightning's loggers, its format of file names or a glob would read in them.
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "~/mine", "../home/./mine", "a/b/", "link/mine", "-x=y,z", "a b", "a[0-9]*?", "a{epoch}", "a%sb"),
        *("a#b", "file:a", "a:b", "a$", "ü", "a\u3000b"),
    ],
)
def test_an_out_is_one_folder(home, name):
    (Path.cwd() / "link").symlink_to(home)
    assert main([*OPTIONS, "--data", "bits.npy", f"--out={name}"]) == 0
    folder = Path(os.path.expanduser(name)).resolve()
    assert {path.name for path in folder.iterdir()} == RUN
    assert list(folder.glob("csv/*/metrics.csv"))
    assert list(folder.glob("tensorboard/events*"))
    others = {path for root in (home, Path.cwd()) for path in root.rglob("*") if path.is_file()}
    assert {path for path in others if folder not in path.resolve().parents} == {Path.cwd() / "bits.npy"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a::b", "'::' in a path is read as more"),
        ("$PLACE/x", r"'\$PLACE' in a path is read as more"),
        ("x/${PLACE}", r"'\${PLACE}' in a path is read as more"),
        ("s3://bucket/x", "is an address"),
        ("file:///tmp/x", "is an address"),
        ("~nobody-of-this-name/x", "no such user's home folder"),
        ("loop/x", "in a loop of symbolic links"),
        ("a\nb", "has a control character"),
        (os.fsdecode(b"\xff"), "has a control character or one that is no UTF-8"),
        ("bits.npy", "cannot be made a folder"),
        ("bits.npy/x", "cannot be made a folder"),
    ],
)
def test_what_is_read_in_two_ways_is_refused(home, capsys, name, message):
    Path("loop").symlink_to("loop")
    before = sorted(path.name for path in Path.cwd().iterdir())
    for command in (OPTIONS, ["compare", *OPTIONS[1:]], ["density"]):
        data = [] if command == ["density"] else ["--data", "bits.npy"]
        error = refused(capsys, [*command, *data, "--out", name])
        assert re.search(message, error), error
    assert sorted(path.name for path in Path.cwd().iterdir()) == before


def test_a_folder_of_the_working_directory_is_read_as_it_is(tmp_path, home, monkeypatch, capsys):
    """The name may come from the current folder's own."""
    (tmp_path / "a$PLACE").mkdir()
    monkeypatch.chdir(tmp_path / "a$PLACE")
    np.save("bits.npy", np.zeros((60, 9)))
    assert "choose another --out" in refused(capsys, [*OPTIONS, "--data", "bits.npy"])
    assert main([*OPTIONS, "--data", "bits.npy", "--out", str(home / "x")]) == 0


def test_data_root_config_and_checkpoints_are_paths_too(home, capsys):
    (home / "bits.npy").write_bytes(Path("bits.npy").read_bytes())
    Path("bits.npy").unlink()
    assert main([*OPTIONS, "--data", "~/bits.npy", "--out", "~/a"]) == 0
    assert main([*OPTIONS, "--data", "bits.npy", "--root", "~", "--out", "~/b"]) == 0
    assert main(["evaluate", "~/a/best.ckpt", "--data", "~/bits.npy", "--num-samples", "2"]) == 0
    for option in ("--config", "--root", "--data"):
        assert "is an address" in refused(capsys, [*OPTIONS, option, "https://x/y.npy"])
    Path("loop.npy").symlink_to("loop.npy")
    assert "loop of symbolic links" in refused(capsys, [*OPTIONS, "--data", "loop.npy"])
    assert "loop of symbolic links" in refused(capsys, ["evaluate", "loop.npy"])


def test_a_relative_path_in_a_study_starts_at_its_file(home, tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    from vvae_fast.train.study.studies import load_study

    text = (Path(__file__).parents[2] / "configs/digits.yaml").read_text()
    Path("study.yaml").write_text(text.replace("data: digits", "data: data/x.npy"))
    (home / "study.yaml").write_text(text.replace("data: digits", "data: ~/x.npy"))
    monkeypatch.chdir(tmp_path)
    assert load_study(Path("here/study.yaml")).settings["data"] == str(tmp_path / "here/data/x.npy")
    assert load_study(Path("here/study.yaml"), home).settings["data"] == str(home / "data/x.npy")
    assert load_study(home / "study.yaml").settings["data"] == str(home / "x.npy")


def test_a_current_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RunError, match="the current directory is gone"):
        paths.resolve("x")


def test_no_command_writes_over_anothers_files(home, capsys):
    """Each into the folder of each other, and of a stranger."""
    train, compare = [*OPTIONS, "--data", "bits.npy"], ["compare", *OPTIONS[1:], "--data", "bits.npy", "--seeds", "0"]
    density = ["density", "--energies", "U1", "--steps", "1", "--iterations", "2", "--restarts", "1"]
    for name, content in (("results.json", '{"mine": 1}'), ("elbo.png", "mine"), ("figure.png", "mine")):
        folder = Path(f"with-{name}")
        folder.mkdir()
        (folder / name).write_text(content)
        for command in (compare, density):
            if name not in ("elbo.png", "figure.png") or (name == "elbo.png") == (command is compare):
                for fresh in ([], ["--fresh"]):
                    assert name in refused(capsys, [*command, "--out", str(folder), *fresh])
        assert (folder / name).read_text() == content
    for name in ("best.ckpt", "csv", "result.json", "tensorboard"):
        folder = Path(f"stranger-{name}")
        (folder / name).mkdir(parents=True)
        assert name in refused(capsys, [*train, "--out", str(folder)])
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_comparisons_results_are_not_overwritten_by_another(home, capsys):
    command = ["compare", *OPTIONS[1:], "--data", "bits.npy", "--out", "out"]
    assert main([*command, "--seeds", "0"]) == 0
    before = Path("out/results.json").read_bytes()
    assert "lr is 0.003 there, 0.01 here" in refused(capsys, [*command, "--seeds", "1", "--lr", "0.01"])
    assert Path("out/results.json").read_bytes() == before
    small = "--energies U1 --steps 1 --iterations 2 --restarts 1 --out out --fresh"
    density = ["density", *small.split()]
    assert "not a result of vvae-fast density" in refused(capsys, density)
    assert Path("out/results.json").read_bytes() == before
    assert main([*command, "--seeds", "0", "1"]) == 0
    assert len(json.loads(Path("out/results.json").read_text())["runs"]) == 4


@pytest.mark.parametrize("name", ["config.json", "result.json", "lock", "last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "unreadable"])
def test_a_run_s_files_of_another_kind_are_one_line(home, capsys, monkeypatch, name, kind):
    command = [*OPTIONS, "--data", "bits.npy", "--out", "out"]
    assert main(command) == 0
    path = Path("out") / name
    if name == "best.ckpt":
        Path("out/result.json").unlink()
    if kind == "unreadable":  # a folder's or a file's mode stops no superuser

        def deny(self, *arguments, open_=Path.open, **options):
            if self.name == name:
                raise PermissionError(13, "Permission denied", str(self))
            return open_(self, *arguments, **options)

        monkeypatch.setattr(Path, "open", deny)
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    code = main(command)
    captured = capsys.readouterr().err
    assert code in (0, 2), "a last.ckpt that a finished run needs no more may be left alone"
    assert (code == 2) == (captured != "")
    assert captured.count("\n") == (code == 2)
    if code == 2:
        assert name in captured


def test_a_temporary_pipe_is_not_waited_for(home):
    Path("out").mkdir()
    os.mkfifo("out/config.json.tmp")
    assert main([*OPTIONS, "--data", "bits.npy", "--out", "out"]) == 0
