"""The accuracy rule of problems.py itself, and a quick part of the sweep that accuracy.py of the benchmarks makes."""

import importlib.util
import math
import re

import pytest
import torch
from problems import DRAWS, NAMES, assert_as_accurate, on_each_isa
from torch import Tensor

import vvae_fast
from benchmarks.accuracy.accuracy_table import breaches, table
from benchmarks.accuracy.sweep import FLOOR, Counts, Finding, Package, sweep
from benchmarks.accuracy.sweep_inputs import Input, inputs
from vvae_fast import reference
from vvae_fast.spec import FlowSpec

WITH_TRITON = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="Triton's interpreter is not used"
)
ORDINARY = Input("tanh", "softplus", False, "shared", 3, 4, None, 0.5, False, 0)


def errors(seed: int, scatter: float = 0.5) -> torch.Tensor:
    """Of rounding [draws, 6], about 5e-7."""
    g = torch.Generator().manual_seed(seed)
    return 5e-7 * torch.exp(scatter * torch.randn(DRAWS, len(NAMES), generator=g, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(50))
def test_the_rule_passes_rounding_whatever_the_luck(seed):
    """A draw in which the loop is exact, and one in which it is nearly so, change nothing."""
    ours, loop = errors(seed), errors(1000 + seed)
    assert_as_accurate(ours, loop)
    loop[3], loop[7] = 0, 1e-8
    assert_as_accurate(ours, loop)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scatter", [0.1, 0.5])
def test_the_rule_sees_errors_that_are_larger_in_every_draw(name, scatter):
    ours, loop = errors(0, scatter), errors(1, scatter)
    ours[:, NAMES.index(name)] *= 2 if scatter == 0.1 else 4
    with pytest.raises(AssertionError, match=name):
        assert_as_accurate(ours, loop)


@pytest.mark.parametrize("bad", [1e-4, math.inf])
def test_the_rule_sees_one_bad_draw(bad):
    ours, loop = errors(0), errors(1)
    ours[5, 4] = bad
    with pytest.raises(AssertionError, match="dw"):
        assert_as_accurate(ours, loop)


class Spoiled:
    """The reference in float32, with one of its tensors made wrong."""

    def __init__(self, name: str, change) -> None:
        self.at, self.change, self.reference = NAMES.index(name), change, Package("reference")

    def answers(self, inputs, problems):
        answers = self.reference.answers(inputs, problems)
        for named in answers:
            got = list(named["reference"])
            got[self.at] = self.change(got[self.at])
            named["reference"] = tuple(got)
        return answers


def found(backend, some: list[Input]) -> tuple[list[Finding], Counts]:
    counts = Counts()
    return list(sweep([backend], some, counts)), counts


def test_a_sweep_of_the_reference_finds_nothing():
    findings, counts = found(Package("reference"), inputs("least"))
    assert breaches(findings) == []
    assert counts.compared > 0
    assert counts.lost + counts.left_out < 0.1 * counts.compared
    assert all(f.ratio == 1 and f.error > FLOOR for f in findings)


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_finds_what_loses_digits(name):
    findings, _ = found(Spoiled(name, lambda t: t * (1 + 1e-5)), [ORDINARY])
    (line,) = breaches(findings)
    said, error = re.match(r"(breach, reference: \w+) (\S+), ", line).groups()
    assert said == f"breach, reference: {name}"
    assert float(error) == pytest.approx(1e-5, rel=0.05)
    assert line.endswith("tanh softplus forward shared K 3 D 4 scale 0.5 seed 0")
    assert any("reference        tanh" in row and name in row for row in table(findings))


def test_a_sweep_finds_what_is_not_finite():
    findings, _ = found(Spoiled("dw", lambda t: t * torch.inf), [ORDINARY])
    assert len(breaches(findings)) == 1


def test_a_sweep_lets_pass_what_is_within_the_floor():
    """Whatever the reference's own error."""
    findings, _ = found(Spoiled("z_K", lambda t: t * (1 + 1.5e-6)), [ORDINARY])
    assert findings == []


def test_every_digit_that_the_reference_keeps():
    """The promise, on each instruction set, at the inputs that a few seconds allow."""
    findings, _ = found(Package("cpp"), inputs("least"))
    assert breaches(findings) == []


BESIDE_THE_LOOP = [pytest.param("cpp", id="cpp"), pytest.param("triton", id="triton", marks=WITH_TRITON)]
both_kinds = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])


def one_dimension(z: Tensor, u: float, num_steps: int, amortized: bool) -> list[Tensor]:
    """z, u, w, b with w = 1 and b = 0; amortized, each row has its own."""
    params = [torch.full((num_steps, 1), u), torch.ones(num_steps, 1), torch.zeros(num_steps)]
    params = [t.expand(len(z), *t.shape).clone() for t in params] if amortized else params
    return [t.requires_grad_() for t in (z[:, None], *params)]


@pytest.mark.parametrize("backend", BESIDE_THE_LOOP)
@both_kinds
def test_tanh_keeps_the_digits_of_its_derivative_where_it_saturates(backend, amortized):
    """Row by row: autograd's 1 - h^2 loses them, so that the loop is no measure, and other rows hide them."""
    a = torch.tensor([1.0, -3.0, 5.0, -7.0, 9.0, 12.0, -16.0, 20.0])
    a = a if amortized else a[2:]  # the first two would hide the others in their sum
    inputs = one_dimension(a, 1.0, 1, amortized)
    for answer in each_isa_of(backend, lambda: vvae_fast.planar_flow(*inputs, constraint="none", backend=backend)[0]):
        (dz,) = torch.autograd.grad(answer.sum(), inputs[0], retain_graph=True)
        wanted = 1 / a.double().cosh().square()
        db = torch.autograd.grad(answer.sum(), inputs[3])[0].double().flatten()
        got = db if amortized else db[None]
        exact = wanted if amortized else wanted.sum()[None]
        assert ((got - exact).abs() <= 2e-6 * exact).all()
        assert ((dz[:, 0].double() - 1 - wanted).abs() <= 2e-7 * (1 + wanted)).all()


@pytest.mark.parametrize("backend", BESIDE_THE_LOOP)
@both_kinds
def test_log_det_keeps_the_digits_of_steps_near_the_identity(backend, amortized):
    """w.u = 1e-4: a product of determinants without what rounding takes from it has 3 digits of the sum's 7."""
    inputs = one_dimension(torch.linspace(-1, 1, 12), 1e-4, 24, amortized)
    z, u, w, b = (t.detach().double() for t in inputs)
    _, wanted, _ = reference.planar_forward(z, u, w, b, FlowSpec("none"))
    for answer in each_isa_of(backend, lambda: vvae_fast.planar_flow(*inputs, constraint="none", backend=backend)[1]):
        assert ((answer.double() - wanted).abs() <= 2e-6 * wanted.abs()).all()


def each_isa_of(backend: str, answer) -> list[Tensor]:
    return list(on_each_isa(answer).values()) if backend == "cpp" else [answer()]
