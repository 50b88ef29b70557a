"""What a type checker sees of the installed package, whose `py.typed` says that its annotations hold."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vvae_fast

RIGHT = """
import torch
from torch import Tensor, nn

import vvae_fast
from vvae_fast import VAE, PlanarFlow, planar_flow
from vvae_fast.distributions import PlanarTransform
from vvae_fast.nn import ElboTerms, Gaussian, mlp_decoder, mlp_encoder


class Density(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.flow = PlanarFlow(dim, num_steps=8, activation="leaky_relu", slope=0.1)

    def forward(self, z: Tensor) -> Tensor:
        z_K, log_det = self.flow.inverse(z)
        return log_det - 0.5 * z_K.square().sum(-1)


def train(x: Tensor) -> float:
    flow = vvae_fast.AmortizedPlanarFlow(2, 4, context_dim=16)
    vae = VAE(mlp_encoder(6, 16), mlp_decoder(2, 16, 6), 2, flow, Gaussian(log_var=0.0))
    terms: ElboTerms = vae.elbo_terms(x, num_samples=3)
    return terms.neg_elbo.mean().item() + vae.log_likelihood(x, num_samples=10).mean().item()


u, w, b = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3)
with vvae_fast.use_backend("auto"):
    z, log_det = planar_flow(torch.zeros(5, 2), u, w, b, backend="reference")
y: Tensor = PlanarTransform(u, w, b)(z)
version: str = vvae_fast.info()["version"]
"""

WRONG = """
import torch
from vvae_fast import VAE, PlanarFlow, info, planar_flow

z = torch.zeros(5, 2)
planar_flow(z)  # call-arg
planar_flow(z, z, z, z, backend=3)  # arg-type
flow = PlanarFlow("2", 8)  # arg-type
flow.step("first")  # arg-type
shift: int = planar_flow(z, z, z, z)[1]  # assignment
VAE(flow, flow, 2, likelihood=1.0)  # arg-type
info(all=True)  # call-arg
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, set[tuple[int, str]]]:
    """For each program the lines that mypy refuses, and why."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    folder = tmp_path_factory.mktemp("typing")
    programs = {"right": RIGHT, "wrong": WRONG}
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    # From its path and outside of it the package is one that is installed, whose errors are none of the user's.
    paths = [str(Path(vvae_fast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", *(f"{name}.py" for name in programs)]
    run = subprocess.run(mypy, cwd=folder, env=environment, capture_output=True, text=True)
    assert not run.stderr
    errors = re.findall(r"^(\w+)\.py:(\d+): error: .*  \[([a-z-]+)\]$", run.stdout, re.MULTILINE)
    assert f"Found {len(errors)} errors" in run.stdout, run.stdout
    return {name: {(int(line), code) for of, line, code in errors if of == name} for name in programs}


def test_the_right_program_runs():
    names = {}
    exec(RIGHT, names)
    assert names["train"](torch.rand(4, 6)) > 0


def test_the_right_program_is_accepted(found):
    assert found["right"] == set()


def test_the_wrong_program_is_refused_line_by_line(found):
    lines = enumerate(WRONG.splitlines(), start=1)
    assert found["wrong"] == {(number, line.partition("  # ")[2]) for number, line in lines if "  # " in line}
