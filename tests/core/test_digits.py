"""Problems on which formulas that look right lose the digits that float32 has: against float64, on every backend that
runs here without Triton's interpreter; tests/triton_backend/test_triton_digits.py has the same for Triton."""

import cuda_host
import digits
import pytest
import torch
from cuda_host import Case
from problems import on_each_isa

from vvae_fast.spec import FlowSpec


def answers_of(problem: digits.Problem, backend: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """Of each instruction set, or of the CUDA kernels on the host."""
    if backend == "cpp":
        return on_each_isa(lambda: digits.run(problem, "cpp"))
    if backend == "reference":
        return {backend: digits.run(problem, backend)}
    if problem.tensors.u.dim() > 2:  # a set for each row
        cases = [Case(problem.tensors, FlowSpec(**problem.formulas), inverse=problem.inverse)]
    else:
        cases = [
            Case(problem.tensors, FlowSpec(**problem.formulas), form, inverse=problem.inverse)
            for form in ("direct", "compact")[: 1 if problem.inverse else 2]
        ]
    found = cuda_host.run(cuda_host.program("plain"), cases)
    assert found.report == ""
    assert [answer.error for answer in found.answers] == [""] * len(cases)
    return {f"cuda {case.form}": answer.tensors for case, answer in zip(cases, found.answers, strict=True)}


BACKENDS = ["cpp", "cuda"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", digits.inverse_of_one_step(), ids=digits.name_of)
def test_gradients_of_an_inverse_step_that_stretches(problem, backend):
    """z_0 is larger than z_K by up to 1/s: gradients made from it are the small difference of large numbers."""
    for level, got in answers_of(problem, backend).items():
        digits.assert_digits(problem, got, level)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", digits.inverse_of_many_steps(), ids=digits.name_of)
def test_gradients_of_an_inverse_of_many_steps(problem, backend):
    for level, got in answers_of(problem, backend).items():
        digits.assert_digits(problem, got, level)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", digits.growing_flows(), ids=digits.name_of)
def test_gradients_where_z_grows(problem, backend):
    """Walking z back by subtraction would round at the size of the largest z."""
    for level, got in answers_of(problem, backend).items():
        digits.assert_digits(problem, got, level)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("problem", digits.sunken_determinants(), ids=digits.name_of)
def test_log_det_below_the_range_of_s(problem, backend):
    """Where h' = 1 the determinant is softplus(w.u), whose logarithm is w.u itself however small it is."""
    for level, got in answers_of(problem, backend).items():
        digits.assert_sunken(problem, got, level)
    for level, (_, _, _, du, _, _) in answers_of(digits.of_log_det_alone(problem), backend).items():
        digits.assert_slope_of_sunken(problem, du, level)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("problem", digits.huge_slopes(), ids=digits.name_of)
def test_inverse_of_tanh_with_a_huge_c(problem, backend):
    """det^2 would overflow in float32 from |c| = 2e19 on."""
    for level, (z_0, log_det, *_) in answers_of(problem, backend).items():
        digits.assert_inverts(problem, z_0, log_det, level)
