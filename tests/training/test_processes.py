"""Training in several processes, which torchrun starts."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from vvae_fast import config
from vvae_fast.train.cli import main
from vvae_fast.train.run import processes

TOLERANCE = 1e-4  # nats
# 80 training rows: the last batch has 1 row, and one of two processes none of it. 10 rows to validate, 10 to test.
OPTIONS = "train --epochs 3 --warmup-epochs 1 --batch-size 79 --latent-dim 2 --hidden 5 --steps 2 --num-samples 9"


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 100])
def test_each_row_is_in_one_share(num_rows, count):
    rows = list(range(num_rows))
    shares = [rows[processes.share(num_rows, rank, count)] for rank in range(count)]
    assert list(itertools.chain(*shares)) == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group():
    with processes.connected():
        assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
        processes.wait_for_all()


def flat(content: object, path: str = "") -> dict[str, float]:
    """The numbers of a result by their place, without times."""
    if isinstance(content, dict):
        return {k: v for key, item in content.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(content, list):
        return {k: v for number, item in enumerate(content) for k, v in flat(item, f"{path}/{number}").items()}
    return {} if "seconds" in path or isinstance(content, str) else {path: content}


def test_two_processes_train_and_evaluate_what_one_does(tmp_path):
    """With the same global batch: every loss of every epoch, and every score, so that no row is lost or seen twice."""
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)))
    command = [*OPTIONS.split(), "--data", str(tmp_path / "bits.npy"), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vvae_fast"]
    command_of_two = [sys.executable, *launcher, *command, str(tmp_path / "two")]
    started = subprocess.run(command_of_two, capture_output=True, text=True, timeout=200)
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("seed 0: -ELBO") == 1, "one process prints"
    assert "sync_dist" not in started.stderr
    one, two = (flat(json.loads((tmp_path / name / "result.json").read_text())) for name in ("one", "two"))
    assert len(one) > 20
    assert two == pytest.approx(one, abs=TOLERANCE)
    assert any(two[key] != one[key] for key in one), "not bit for bit: two processes sum in another order"
    # one process goes on with what two have begun
    (tmp_path / "two" / "result.json").unlink()
    assert main([*command, str(tmp_path / "two")]) == 0
    again = flat(json.loads((tmp_path / "two" / "result.json").read_text()))
    assert again == pytest.approx(two, abs=TOLERANCE)


SOUND = {
    **{"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29400"},
}


@pytest.fixture
def environment(monkeypatch):
    """Sets these variables and no other of torchrun's."""

    def set_all(variables: dict[str, str]) -> None:
        for name in (*SOUND, "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_a_process_is_one_of_several_where_all_of_torchruns_variables_are_there(environment):
    environment(SOUND)
    assert processes.is_launched()
    assert processes.leftovers() == []
    for name in SOUND:
        environment({key: value for key, value in SOUND.items() if key != name})
        assert not processes.is_launched()
        said = {text.split("=")[0] for text in processes.leftovers()}
        assert said == {key for key in SOUND if key != name} - {"MASTER_ADDR", "MASTER_PORT"}
        assert (config.local_rank(), config.local_processes()) == (0, 1)
    environment({"SLURM_PROCID": "0", "MASTER_ADDR": "here"})  # every job on one of Slurm's machines has them
    assert processes.leftovers() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "one"}, "RANK must be a number, got 'one'; unset it"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a number, got ''"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a number"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID must be a number"),
        ({"RANK": "4"}, "contradict each other"),
        ({"LOCAL_RANK": "2"}, "contradict each other"),
        ({"LOCAL_WORLD_SIZE": "0"}, "contradict each other"),
        ({"LOCAL_WORLD_SIZE": "8"}, "contradict each other"),
        ({"WORLD_SIZE": "3"}, "contradict each other"),
    ],
)
def test_variables_that_are_not_sound(environment, tmp_path, capsys, changes, message):
    environment({**SOUND, **changes})
    assert main([*OPTIONS.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "names",
    [
        ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
        *(pytest.param([name], marks=pytest.mark.long) for name in ("LOCAL_WORLD_SIZE", "SLURM_PROCID")),
    ],
)
def test_leftovers_are_named_and_change_nothing(tmp_path, names):
    """In a process of its own: Lightning takes its rank from them when it is imported; one of 1 saves nothing."""
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)))
    options = [*OPTIONS.split(), "--data", str(tmp_path / "bits.npy"), "--out", str(tmp_path / "out")]
    left = {**SOUND, "SLURM_PROCID": "3"}
    variables = {**os.environ, **{name: left[name] for name in names}}
    command = [sys.executable, "-m", "vvae_fast", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=variables)
    assert done.returncode == 0, done.stderr
    said = ", ".join(f"{name}={left[name]}" for name in names)
    assert done.stderr == (
        f"vvae-fast: warning: {said} in the environment, but torchrun has not started this: it runs as one process\n"
    )
    assert {"best.ckpt", "last.ckpt", "result.json", "csv", "tensorboard"} <= {
        x.name for x in (tmp_path / "out").iterdir()
    }
