"""tests/core/test_digits.py for the CUDA kernels, run on the host in both forms."""

import itertools

import cuda_host
import digits
import pytest
import torch
from cuda_host import Case

from vvae_fast.spec import FlowSpec


def cases_of(problem: digits.Problem) -> list[Case]:
    """Both forms take one set for all rows, but for an inverse."""
    both = problem.tensors.u.dim() == 2 and not problem.inverse
    forms = ("direct", "compact") if both else ("automatic",)
    spec = FlowSpec(**problem.formulas)
    return [Case(problem.tensors, spec, form, inverse=problem.inverse) for form in forms]


def answers_of(problems: list[digits.Problem]) -> list[dict[str, tuple[torch.Tensor, ...]]]:
    """Of each problem by form."""
    cases = [cases_of(problem) for problem in problems]
    found = cuda_host.run(cuda_host.program("plain"), [*itertools.chain(*cases)])
    assert found.report == ""
    assert {answer.error for answer in found.answers} == {""}
    answers = iter(found.answers)
    return [{case.form: next(answers).tensors for case in some} for some in cases]


@pytest.mark.parametrize(
    "problems",
    [digits.inverse_of_one_step, digits.inverse_of_many_steps, digits.growing_flows],
    ids=lambda f: f.__name__,
)
def test_gradients(problems):
    for problem, answers in zip(problems(), answers_of(problems()), strict=True):
        digits.assert_digits_of_each(problem, answers)


def test_log_det_below_the_range_of_s():
    problems = digits.sunken_determinants()
    alone = [digits.of_log_det_alone(problem) for problem in problems]
    for problem, answers, of_log_det in zip(problems, answers_of(problems), answers_of(alone), strict=True):
        for form, got in answers.items():
            digits.assert_sunken(problem, got, f"{problem.name} {form}")
            digits.assert_slope_of_sunken(problem, of_log_det[form][3], f"{problem.name} {form}")


def test_inverse_of_tanh_with_a_huge_c():
    problems = digits.huge_slopes()
    for problem, answers in zip(problems, answers_of(problems), strict=True):
        for form, (z_0, log_det, *_) in answers.items():
            digits.assert_inverts(problem, z_0, log_det, f"{problem.name} {form}")
