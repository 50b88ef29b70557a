"""The error of each formula of csrc/planar, against mpmath, in what every processor runs and in AVX2 with FMA."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from vvae_fast.backends import cpp

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = {"baseline": ["-DPLANAR_VECTOR_BYTES=16"], "avx2": ["-DPLANAR_VECTOR_BYTES=32", "-mavx2", "-mfma"]}
LEAST = {"float32": -87, "float64": -708}  # exp_least

# The table of docs/math.md: a row for each column of formulas.cpp, in its order.
PAGE = (Path(__file__).parents[2] / "docs" / "math.md").read_text().partition("### Errors of the C++ formulas")[2]
ROWS = re.findall(r"^\| (\w+) \| (.*) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
BARS = {name: float(roundings) for name, _, roundings in ROWS}
CROSSES = {name for name, result, _ in ROWS if "crosses zero" in result}


def points(dtype: str) -> np.ndarray:
    """Pairs (x, alpha): |x| from 1e-15 to nearly where e^(-2|x|) is least, |alpha| to nearly twice that."""
    least = -LEAST[dtype]
    g = np.random.default_rng(0)
    n = 250
    small = 10 ** g.uniform(-15, 0, n) * g.choice([-1, 1], n)
    x = np.concatenate([small, g.uniform(-4, 4, n), g.uniform(-0.49, 0.49, n) * least])
    alpha = np.concatenate([g.uniform(-4, 4, n), g.uniform(-0.99, 0.99, n) * least, small])
    return np.stack([x, alpha], -1).astype(dtype)


def exact(x: mpf, alpha: mpf) -> list[mpf]:
    e, h, c = mp.exp(-2 * abs(x)), mp.tanh(x), mp.log1p(mp.exp(alpha)) - 1
    slope, p = mp.sech(x) ** 2, 1 / (1 + mp.exp(-x))
    det = 1 + c * slope
    return [e, mp.expm1(-2 * abs(x)), mp.log(abs(x)), h, slope, h * h, -2 * h * slope, p, p / (1 + mp.exp(x)),
            c, 1 + c, c - alpha, det, 1 / det, mp.log(det), mp.log(det)]  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")

    def build(isa: str) -> Path:
        out = tmp_path_factory.getbasetemp() / f"formulas-{isa}"
        if not out.exists():
            source = Path(__file__).with_name("formulas.cpp")
            flags = ["-std=c++20", "-O2", "-ffp-contract=fast", "-Wno-psabi", *FLAGS[isa], f"-I{CSRC}"]
            subprocess.run(["g++", *flags, source, "-o", out], check=True)
        return out

    return build


def errors(program: Path, dtype: str) -> dict[str, float]:
    pairs = points(dtype)
    done = subprocess.run([program, dtype], input=pairs.tobytes(), capture_output=True, check=True)
    found = np.frombuffer(done.stdout, dtype).reshape(len(pairs), len(BARS))
    eps = torch.finfo(getattr(torch, dtype)).eps
    worst = dict.fromkeys(BARS, 0.0)
    with mp.workdps(30 - LEAST[dtype] // 2):  # log1p of the least e^x is exact to 30 digits
        for pair, row in zip(pairs.tolist(), found.tolist(), strict=True):
            for name, value, want in zip(BARS, row, exact(*map(mpf, pair)), strict=True):
                size = max(abs(want), 1) if name in CROSSES else abs(want)
                worst[name] = max(worst[name], float(abs(mpf(value) - want) / size / eps))
    return worst


@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("isa", FLAGS)
def test_each_formula_is_within_its_bar(program: Callable[[str], Path], isa: str, dtype: str) -> None:
    if isa not in cpp.isa_levels():
        pytest.skip(f"this processor has no {isa}")
    worst = errors(program(isa), dtype)
    assert len(BARS) == 16
    assert all(worst[name] <= bar for name, bar in BARS.items()), worst


@pytest.mark.parametrize("dtype", LEAST)
def test_the_ends_of_the_ranges(program: Callable[[str], Path], dtype: str) -> None:
    pairs = np.array([(0, -1000), (np.inf, 0)], dtype)
    done = subprocess.run([program("baseline"), dtype], input=pairs.tobytes(), capture_output=True, check=True)
    zero, infinite = (dict(zip(BARS, row, strict=True)) for row in np.frombuffer(done.stdout, dtype).reshape(2, -1))
    assert zero["log"] == -np.inf
    assert infinite["log"] == np.inf
    assert (infinite["tanh"], infinite["tanh_slope"]) == (1, 0)
    assert float(infinite["exp"]) == pytest.approx(float(mp.exp(LEAST[dtype])), rel=1e-6)
    assert float(zero["s"]) == pytest.approx(float(mp.exp(LEAST[dtype])), rel=1e-6)
