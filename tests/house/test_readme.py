"""The README's code is run as it stands."""

import re
from pathlib import Path

import torch
from problems import random_problem

import vvae_fast

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_signature():
    assert "planar_flow(z, u, w, b, *," in BLOCKS[0]
    assert vvae_fast.planar_flow.__kwdefaults__ == {
        "activation": "tanh",
        "slope": 0.2,
        "constraint": "softplus",
        "log_det_eps": 0.0,
        "backend": None,
    }


def test_equivalent_code_is_equivalent():
    for batch, params in (((6,), ()), ((6,), (6,)), ((2, 6), (6,))):
        p = random_problem(batch, 5, 3, params, dtype=torch.float64)
        names = dict(zip("zuwb", p.inputs, strict=True), torch=torch)
        exec(BLOCKS[1], names)
        for got, wanted in zip((names["z"], names["log_det"]), vvae_fast.planar_flow(*p.inputs), strict=True):
            torch.testing.assert_close(got, wanted)


def test_usage_runs():
    names = {}
    exec(BLOCKS[2], names)
    assert names["log_p"].shape == (100,)
