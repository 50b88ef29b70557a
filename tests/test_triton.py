"""The Triton kernels against the float64 oracle: on the GPU where there is one, interpreted on the CPU where not."""

import pytest
import torch
from problems import oracle, random_problem, relative_errors, run

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize(("batch", "params"), [((7,), ()), ((70,), ()), ((5,), (5,)), ((3, 17), (17,))])
def test_float64_is_the_oracle(batch, params, constraint):
    p = random_problem(batch, 5, 3, params, scale=0.5, dtype=torch.float64)
    on_device = type(p)(*(t.to(DEVICE) for t in p))
    got = run(on_device, constraint, "triton")
    assert max(relative_errors([t.cpu() for t in got], oracle(p, constraint))) < 1e-12
