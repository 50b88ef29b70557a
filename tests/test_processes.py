"""Training in several processes, which torchrun starts."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from vvae_fast.train import processes
from vvae_fast.train.cli import main

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
