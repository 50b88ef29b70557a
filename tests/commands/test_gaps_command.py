"""`vvae-fast gaps`: its table, its file, and what it refuses."""

import json
import statistics

import pytest
from test_cli import data, one_line_and_exit_2, small  # noqa: F401  # data is a fixture

from vvae_fast.train.cli import main
from vvae_fast.train.run.gaps import FEW, HEADINGS, SHARES

FEW_OPTIONS = ["--num-points", "7", "--iterations", "3", "--num-samples", "11"]


@pytest.fixture
def run(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)  # where the checkpoint's data are
    folder = tmp_path / "run"
    assert main(small("--data", data, "--out", str(folder))) == 0
    capsys.readouterr()
    return folder


def test_the_table_is_that_of_the_file(run, capsys):
    assert main(["gaps", str(run), *FEW_OPTIONS]) == 0
    printed = capsys.readouterr().out
    content = json.loads((run / "gaps.json").read_text())
    assert content["settings"] == {"num_points": 7, "num_steps": None, "iterations": 3, "num_samples": 11}
    assert (content["model"], content["num_steps"], content["epoch"]) == ("amortized", 1, 0)
    for name, heading in HEADINGS.items():
        values, scores = content["points"][name], content["scores"][name]
        assert len(values) == 7
        assert scores["mean"] == pytest.approx(statistics.mean(values))
        assert scores["std"] == pytest.approx(statistics.stdev(values))
        assert scores["standard_error"] == pytest.approx(statistics.stdev(values) / 7**0.5)
        assert scores["median"] == pytest.approx(statistics.median(values))
        cells = next(line for line in printed.splitlines() if line.startswith(f"| {heading} ")).split("|")[2:6]
        assert [cell.strip() for cell in cells] == [f"{value:.3f}" for value in scores.values()]
    of = {name: scores["mean"] for name, scores in content["scores"].items()}
    assert of["approximation_gap"] + of["amortization_gap"] == pytest.approx(of["neg_elbo"] - of["nll_optimal"])
    assert "7 data points of the test set, in nats; 11 samples of each" in printed
    for name, share in SHARES.items():
        assert content[share] == pytest.approx(sum(value < FEW for value in content["points"][name]) / 7)
    first, last = content["by_samples"]  # the first 10 of the 11 samples, and all
    assert (first["num_samples"], last["num_samples"]) == (10, 11)
    assert last == {"num_samples": 11, "nll": of["nll"], "nll_optimal": of["nll_optimal"]}
    assert first["nll"] == pytest.approx(last["nll"], abs=0.5)
    assert f"NLL with 10 samples: from q {first['nll']:.3f}, from q* {first['nll_optimal']:.3f}." in printed


def test_the_same_command_gives_the_same_points(run, tmp_path):
    for number in "12":
        assert main(["gaps", str(run), *FEW_OPTIONS, "--steps", "3", "--out", str(tmp_path / number)]) == 0
    first, second = (json.loads((tmp_path / number / "gaps.json").read_text()) for number in "12")
    assert first["points"] == second["points"]
    assert first["settings"]["num_steps"] == 3
    assert not (run / "gaps.json").exists()


def test_a_run_with_gaps_is_still_a_run(run, data):  # noqa: F811
    """It is found finished, and --fresh deletes it."""
    assert main(["gaps", str(run), *FEW_OPTIONS]) == 0
    train = small("--data", data, "--out", str(run))
    assert main(train) == 0
    assert (run / "gaps.json").exists()
    assert main([*train, "--fresh"]) == 0
    assert not (run / "gaps.json").exists()


def test_more_points_than_there_are_are_all_and_one_has_no_spread(run, capsys):
    assert main(["gaps", str(run), *FEW_OPTIONS, "--num-points", "1000"]) == 0
    content = json.loads((run / "gaps.json").read_text())
    assert content["settings"]["num_points"] == content["dataset"]["rows"]["test"] < 1000
    capsys.readouterr()
    assert main(["gaps", str(run), *FEW_OPTIONS, "--num-points", "1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "amortization gap" in line and "|" in line)
    assert [cell.strip() for cell in line.split("|")[3:5]] == ["-", "-"]


def test_what_is_refused(run, tmp_path, capsys, monkeypatch):
    command = ["gaps", str(run), *FEW_OPTIONS]
    assert "no such checkpoint" in one_line_and_exit_2(capsys, ["gaps", str(tmp_path / "none")])
    assert "trained on other data" in one_line_and_exit_2(capsys, [*command, "--data", "digits"])
    longer = tmp_path / "longer"
    assert main(small("--steps", "2", "--data", str(tmp_path / "bits.npy"), "--out", str(longer))) == 0
    capsys.readouterr()
    refused = one_line_and_exit_2(capsys, ["gaps", str(longer), *FEW_OPTIONS, "--steps", "1"])
    assert "--steps must be at least the model's 2, got 1" in refused
    (run / "gaps.json").write_text('{"mine": 1}')
    assert "is not of vvae-fast gaps and will not be overwritten" in one_line_and_exit_2(capsys, command)
    (run / "gaps.json").write_text("[")
    assert "cannot be read" in one_line_and_exit_2(capsys, command)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    assert "gaps runs in one process; start it without torchrun" in one_line_and_exit_2(capsys, command)
