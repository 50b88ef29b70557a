"""Problems on which formulas that look right lose the digits that float32 has: against float64, on every instruction
set; tests/cuda/test_cuda_digits.py and tests/triton_backend/test_triton_digits.py have the same for other backends."""

import digits
import pytest
import torch
from problems import on_each_isa


def answers_of(problem: digits.Problem, backend: str = "cpp") -> dict[str, tuple[torch.Tensor, ...]]:
    """Of each instruction set, or of the reference."""
    if backend == "cpp":
        return on_each_isa(lambda: digits.run(problem, "cpp"))
    return {backend: digits.run(problem, backend)}


@pytest.mark.parametrize("problem", digits.inverse_of_one_step(), ids=digits.name_of)
def test_gradients_of_an_inverse_step_that_stretches(problem):
    """z_0 is larger than z_K by up to 1/s: gradients made from it are the small difference of large numbers."""
    digits.assert_digits_of_each(problem, answers_of(problem))


@pytest.mark.parametrize("problem", digits.inverse_of_many_steps(), ids=digits.name_of)
def test_gradients_of_an_inverse_of_many_steps(problem):
    digits.assert_digits_of_each(problem, answers_of(problem))


@pytest.mark.parametrize("problem", digits.growing_flows(), ids=digits.name_of)
def test_gradients_where_z_grows(problem):
    """Walking z back by subtraction would round at the size of the largest z."""
    digits.assert_digits_of_each(problem, answers_of(problem))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("problem", digits.sunken_determinants(), ids=digits.name_of)
def test_log_det_below_the_range_of_s(problem, backend):
    """Where h' = 1 the determinant is softplus(w.u), whose logarithm is w.u itself however small it is."""
    for level, got in answers_of(problem, backend).items():
        digits.assert_sunken(problem, got, level)
    for level, (_, _, _, du, _, _) in answers_of(digits.of_log_det_alone(problem), backend).items():
        digits.assert_slope_of_sunken(problem, du, level)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("problem", digits.huge_slopes(), ids=digits.name_of)
def test_inverse_of_tanh_with_a_huge_c(problem, backend):
    """det^2 would overflow in float32 from |c| = 2e19 on."""
    for level, (z_0, log_det, *_) in answers_of(problem, backend).items():
        digits.assert_inverts(problem, z_0, log_det, level)
