"""The README's code is run as it stands."""

import re
from pathlib import Path

import torch
from problems import random_problem

import vvae_fast

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
USAGE, SIGNATURE, EQUIVALENT = re.findall(r"```python\n(.*?)```", TEXT, re.S)
MOST_WORDS, SCREEN = 900, 45  # SCREEN: lines before the first code ends


def test_signature():
    assert "planar_flow(z, u, w, b, *," in SIGNATURE
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
        exec(EQUIVALENT, names)
        for got, wanted in zip((names["z"], names["log_det"]), vvae_fast.planar_flow(*p.inputs), strict=True):
            torch.testing.assert_close(got, wanted)


def test_usage_runs():
    names = {}
    exec(USAGE, names)
    assert names["log_p"].shape == (100,)


def test_it_is_read_in_two_minutes():
    """Words are what has a letter: not the bars and numbers of tables."""
    assert sum(any(c.isalpha() for c in word) for word in TEXT.split()) <= MOST_WORDS
    assert TEXT[: TEXT.index(USAGE) + len(USAGE)].count("\n") <= SCREEN
