"""The error of each formula of csrc/planar, against mpmath, in each instruction set."""

import functools
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
ISAS = ("baseline", "avx2", "avx512")
LEAST = {"float32": -87, "float64": -708}  # exp_least
DIGITS = {dtype: 30 - least // 2 for dtype, least in LEAST.items()}  # log1p of the least e^x is exact to 30 digits

# The table of docs/math.md: a row for each column of formulas.cpp, in its order.
PAGE = (Path(__file__).parents[2] / "docs" / "math.md").read_text().partition("### Errors of the C++ formulas")[2]
ROWS = re.findall(r"^\| (\w+) \| (.*) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
BARS = {name: float(roundings) for name, _, roundings in ROWS}
CITED = re.compile(r"Errors: ([a-z_0-9, ]+)\.")
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


def exact(x: mpf, alpha: mpf, dtype: str) -> list[mpf]:
    e, h, c = mp.exp(-2 * abs(x)), mp.tanh(x), mp.log1p(mp.exp(alpha)) - 1
    slope, p = mp.sech(x) ** 2, 1 / (1 + mp.exp(-x))
    det = 1 + c * slope
    up, down = 1 / (1 + mp.exp(-alpha)), 1 / (1 + mp.exp(alpha))
    below, nothing = mp.exp(min(x, 0)), mpf(0)
    softplus, log_s = c + 1, mp.log1p(c + 1)
    leaky_slope, eps = (mpf(float(np.array(number, dtype))) for number in (0.2, 1e-3))
    return [e, mp.expm1(-2 * abs(x)), mp.log(abs(x)), h, slope, h * h, -2 * h * slope, p, p / (1 + mp.exp(x)),
            c, 1 + c, c - alpha, det, 1 / det, mp.log(det), mp.log(det),
            1 - p / (1 + mp.exp(x)), p / (1 + mp.exp(x)) * -mp.tanh(x / 2),
            x if x > 0 else mp.expm1(x), below, -mp.expm1(min(x, 0)), below if x < 0 else nothing,
            x if x > 0 else leaky_slope * x,
            up / softplus, down, log_s - 1, log_s, log_s - 1 - alpha,
            up / (1 + softplus) / log_s, (down + softplus) / (1 + softplus), mp.log(det + eps)]  # fmt: skip


def flags_of(isa: str) -> list[str]:
    """What csrc/cpu/isa_*.cpp says in pragmas and macros."""
    source = (CSRC / "cpu" / f"isa_{isa}.cpp").read_text()
    (size,) = re.findall(r"#define PLANAR_VECTOR_BYTES (\d+)", source)
    targets = re.findall(r'#pragma GCC target\("(.+)"\)', source)
    return [f"-DPLANAR_VECTOR_BYTES={size}", *(f"-m{name}" for names in targets for name in names.split(","))]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")

    def build(isa: str) -> Path:
        out = tmp_path_factory.getbasetemp() / f"formulas-{isa}"
        if not out.exists():
            source = Path(__file__).with_name("formulas.cpp")
            flags = ["-std=c++20", "-O2", "-ffp-contract=fast", "-Wno-psabi", *flags_of(isa), f"-I{CSRC}"]
            subprocess.run(["g++", *flags, source, "-o", out], check=True)
        return out

    return build


@functools.cache
def exact_at_points(dtype: str) -> list[list[mpf]]:
    with mp.workdps(DIGITS[dtype]):
        return [exact(*map(mpf, pair), dtype) for pair in points(dtype).tolist()]


def errors(program: Path, dtype: str) -> dict[str, float]:
    pairs = points(dtype)
    done = subprocess.run([program, dtype], input=pairs.tobytes(), capture_output=True, check=True)
    found = np.frombuffer(done.stdout, dtype).reshape(len(pairs), len(BARS))
    eps = torch.finfo(getattr(torch, dtype)).eps
    worst = dict.fromkeys(BARS, 0.0)
    with mp.workdps(DIGITS[dtype]):
        for wanted, row in zip(exact_at_points(dtype), found.tolist(), strict=True):
            for name, value, want in zip(BARS, row, wanted, strict=True):
                size = max(abs(want), 1) if name in CROSSES else abs(want) or 1  # elu's zeros are exact
                worst[name] = max(worst[name], float(abs(mpf(value) - want) / size / eps))
    return worst


@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("isa", ISAS)
def test_each_formula_is_within_its_bar(program: Callable[[str], Path], isa: str, dtype: str) -> None:
    if isa not in cpp.isa_levels():
        pytest.skip(f"this processor has no {isa}")
    worst = errors(program(isa), dtype)
    assert len(BARS) == 31
    assert all(worst[name] <= bar for name, bar in BARS.items()), worst


def results(program: Path, dtype: str, pairs: list[tuple[float, float]]) -> list[dict[str, np.floating]]:
    done = subprocess.run([program, dtype], input=np.array(pairs, dtype).tobytes(), capture_output=True, check=True)
    return [dict(zip(BARS, row, strict=True)) for row in np.frombuffer(done.stdout, dtype).reshape(len(pairs), -1)]


def expect(row: dict[str, np.floating], **wanted: float) -> None:
    assert {name: float(row[name]) for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("isa", ISAS)
def test_the_ends_of_the_ranges(program: Callable[[str], Path], isa: str, dtype: str) -> None:
    if isa not in cpp.isa_levels():
        pytest.skip(f"this processor has no {isa}")
    inf, tiny = np.inf, float(np.finfo(dtype).smallest_subnormal) * 12345
    ends = [(0, -1000), (inf, inf), (-inf, 0), (np.nan, np.nan), (tiny, 0), (-tiny, 0)]
    zero, infinite, negative, nan, small, negative_small = results(program(isa), dtype, ends)
    least = float(mp.exp(LEAST[dtype]))
    expect(zero, log=-inf, s=least, tanh=0, tanh_slope=1, sigmoid=0.5, elu=0, elu_slope=1, leaky_relu=0)
    expect(infinite, log=inf, tanh=1, tanh_slope=0, sigmoid=1, elu=inf, elu_slope=1, exp=least, c=inf, s=inf, rho=-1)
    expect(negative, tanh=-1, tanh_slope=0, elu=-1, elu_second=least, leaky_relu=-inf)
    stays_nan = ("exp", "log", "tanh", "sigmoid", "elu", "leaky_relu", "c", "log_s", "log_det")
    assert np.isnan([nan[name] for name in stays_nan]).all()
    for row, x in ((small, tiny), (negative_small, -tiny)):
        assert [row[name] for name in ("tanh", "elu")] == [np.array(x, dtype)] * 2
        assert row["log"] == pytest.approx(float(mp.log(tiny)), rel=1e-6)


def test_the_formulas_name_their_rows() -> None:
    """Each row stands once beside the formula that it is about."""
    headers = [*CSRC.glob("planar/*.h"), CSRC / "cpu" / "simd" / "vector.h"]
    cited = [name for path in headers for found in CITED.findall(path.read_text()) for name in found.split(", ")]
    assert sorted(cited) == sorted(BARS)
