"""Every example of docs/interop.md is run as it stands."""

import re
import warnings
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parent.parent / "docs" / "interop.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own, as they are imported
        for name in re.findall(r"^(?:import|from) (normflows|pyro|pythae)\b", block, re.M):
            pytest.importorskip(name)
        names = {}
        exec(block, names)
    results = [value for name, value in names.items() if name in ("log_prob", "log_q")]
    assert all(torch.isfinite(value).all() for value in results)


def test_every_public_name_is_there():
    for name in re.findall(r"`(?:stack\.)?((?:from|to|load)_\w+|Planar\w*|ConditionalPlanar)\(", TEXT):
        assert any(
            name in path.read_text() for path in sorted((Path(__file__).parent.parent / "vvae_fast").rglob("*.py"))
        )
