"""The accuracy rule of tests/problems.py itself, and a quick part of the sweep that benchmarks/accuracy.py makes."""

import math
import re

import pytest
import torch
from accuracy_table import breaches, table
from problems import DRAWS, NAMES, assert_as_accurate
from sweep import FLOOR, Counts, Finding, Package, sweep
from sweep_inputs import Input, inputs

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
