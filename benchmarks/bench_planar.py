"""planar_flow, forward and backward, against what a user could run instead. Run with `make bench`."""

from functools import cache

import pytest
from cases import VAE_CASES, Case
from contestants import CHECKED, CONTESTANTS, Flow, check, first_call_seconds, forward_backward


@cache
def contestant(case: Case, name: str) -> tuple[Flow, float]:
    """The contestant, checked against the oracle, and the seconds of its first call."""
    flow = CONTESTANTS[name]()
    seconds = first_call_seconds(flow, case.inputs())
    if name in CHECKED:
        check(flow, case.inputs())
    return flow, seconds


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("case", VAE_CASES, ids=str)
def bench_forward_backward(case, name, timed, benchmark):
    flow, first_call = contestant(case, name)
    if name == "torch.compile":
        benchmark.extra_info["compile_seconds"] = first_call
    inputs = case.inputs()
    timed(f"forward+backward {case}", name, lambda: forward_backward(flow, inputs), base="vvae_fast")
