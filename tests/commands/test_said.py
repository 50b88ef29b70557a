"""What the commands say of options and files that are not what they seem."""

import numpy as np
import pytest
from test_cli import data, one_line_and_exit_2, small  # noqa: F401  # data is a fixture

from vvae_fast.train.base.output import make_console, print_lines
from vvae_fast.train.cli import main

FEW = ["--epochs", "1", "--batch-size", "40", "--latent-dim", "2", "--hidden", "5", "--num-samples", "5"]


def test_values_given_twice_are_told_and_taken_once(data, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    options = [*FEW, "--data", data, "--out", str(out), "--steps", "1", "1", "--seeds", "0", "2", "0"]
    assert main(["compare", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "vvae-fast: warning: --steps has 1, 1: each is taken once\n"
        "vvae-fast: warning: --seeds has 0, 2, 0: each is taken once\n"
    )
    assert "[4/4]" in captured.out
    rows = [number for number, line in enumerate(captured.out.splitlines()) if line.startswith("|")]
    lines = captured.out.splitlines()
    assert (lines[rows[0] - 1], lines[rows[-1] + 1]) == ("", "")
    assert not any(line.endswith(" ") for line in lines)


def test_a_table_stands_between_empty_lines(capsys):
    rich = pytest.importorskip("rich.table")
    table = rich.Table(box=pytest.importorskip("rich.box").MARKDOWN)
    table.add_column("K")
    table.add_row("16")
    print_lines(make_console(), table)
    assert capsys.readouterr().out == "\n| K  |\n|----|\n| 16 |\n\n"


@pytest.mark.parametrize("command", ["compare", "train", "encode", "density"])
def test_an_unknown_option_shows_the_usage_of_its_command(capsys, command):
    required = ["run", "--out", "of.npz"] if command == "encode" else []
    with pytest.raises(SystemExit, match="2"):
        main([command, *required, "--frobnicate"])
    said = capsys.readouterr().err
    assert said.startswith(f"usage: vvae-fast {command} [-h]")
    assert said.endswith(f"vvae-fast {command}: error: unrecognized arguments: --frobnicate\n")


def test_splits_of_one_row_are_told(tmp_path, capsys):
    np.save(tmp_path / "ten.npy", np.random.default_rng(0).integers(0, 2, (10, 16)))
    assert main(small("--data", str(tmp_path / "ten.npy"), "--out", str(tmp_path / "run"))) == 0
    said = "val and test of ten.npy have one row: a score of one row says little; give more rows"
    assert capsys.readouterr().err == f"vvae-fast: warning: {said}\n"


def test_files_that_are_no_arrays(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("1,2\n")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "folder.npy").mkdir()
    for name, words in (
        (
            "t.csv",
            "got 't.csv'; check the name, or save the file's numbers by numpy.save: numpy.save('t.npy', numpy.loadtxt(",
        ),
        ("u.csv", "got 'u.csv'; check the name\n"),
        ("empty.npy", "(it is empty); save it again"),
        ("folder.npy", "folder.npy: wanted an array file, got a folder; give a file as numpy.save writes it"),
    ):
        assert words in one_line_and_exit_2(capsys, small("--data", name, "--out", "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_network_that_does_not_fit_the_data_makes_no_folder(data, tmp_path, capsys, command):  # noqa: F811
    out = tmp_path / "out"
    said = one_line_and_exit_2(capsys, [command, "--data", data, "--network", "gated-conv", "--out", str(out)])
    assert "network gated-conv wants grey images of 28 x 28, bits.npy has rows of shape [16]" in said
    assert not out.exists()


def test_fresh_deletes_no_run_for_one_that_cannot_be(data, tmp_path, capsys):  # noqa: F811
    command = small("--data", data, "--out", str(tmp_path / "run"))
    assert main(command) == 0
    capsys.readouterr()
    assert "the rank must be at most" in one_line_and_exit_2(capsys, [*command, "--fresh", "--rank", "99"])
    assert (tmp_path / "run" / "result.json").is_file()
