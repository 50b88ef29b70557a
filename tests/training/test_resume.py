"""A training run killed in the middle of an epoch goes on from its checkpoint and ends as an uninterrupted one."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from vvae_fast.train.cli import main

OPTIONS = "train --epochs 5 --warmup-epochs 2 --batch-size 20 --latent-dim 3 --hidden 6 --num-samples 9 --seed 7"
# The process kills itself before the second of an epoch's four batches.
PROGRAM = """
import os, signal, sys
from vvae_fast.train.run import module
from vvae_fast.train.cli import main

step = module.VAEModule.training_step

def killed(self, batch, batch_idx):
    if self.current_epoch == 3 and batch_idx == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

module.VAEModule.training_step = killed
sys.exit(main(sys.argv[1:]))
"""
# The process dies in epoch 3, counted from 0. In "cut" it is the first one with the new head, whose start has to be
# made again from a checkpoint with the old one.
MODELS = {
    "adam": "--model amortized --steps 3",
    "cut": "--model amortized --steps 3 --rank 2 --full-epochs 3",
    "cut before": "--model amortized --steps 3 --rank 2 --full-epochs 2 --optimizer adamax",
    "still full": "--model amortized --steps 3 --rank 2 --full-epochs 4",
    "adamax": "--model shared --steps 5 --network gated-mlp --optimizer adamax --schedule constant --patience 2",
}


def without_times(content: object) -> object:
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if "seconds" not in key}
    return list(map(without_times, content)) if isinstance(content, list) else content


@pytest.mark.parametrize(
    "model", ["adamax", "cut", *(pytest.param(m, marks=pytest.mark.long) for m in ("adam", "cut before", "still full"))]
)
def test_sigkill_within_an_epoch(tmp_path, model):
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).random((100, 16)))  # dynamic: bits are drawn anew
    command = f"{OPTIONS} {MODELS[model]} --data {tmp_path / 'grey.npy'} --out".split()
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.run([sys.executable, "-c", PROGRAM, *command, str(killed)], stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    assert len(torch.load(killed / "last.ckpt", weights_only=True)["vvae_fast"]["history"]) == 3
    assert not (killed / "result.json").exists()
    assert main([*command, str(killed)]) == main([*command, str(whole)]) == 0
    results = [without_times(json.loads((out / "result.json").read_text())) for out in (killed, whole)]
    assert len(results[0]["history"]) >= 4
    assert results[0] == results[1]
    states = [torch.load(out / "last.ckpt", weights_only=True)["state_dict"] for out in (killed, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
