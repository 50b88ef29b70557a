"""Where the Triton kernels run, on the GPU if there is one, and what several files of tests ask of them there."""

from collections.abc import Callable
from functools import partial

import problems
import pytest
import torch
from problems import Problem, random_problem

from vvae_fast.backends import operators

pytest.importorskip("triton", reason="Triton is not installed")

from vvae_fast.triton import _heuristics, direct_backward, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_DEVICE = {"backend": "triton", "device": DEVICE}
TRITON = operators.OPERATORS["triton"]

each_parameters = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
without_rows_or_steps = pytest.mark.parametrize(("batch", "num_steps"), [((0,), 3), ((4,), 0), ((0,), 0), ((2, 0), 3)])

Answer = Callable[[Problem], tuple[torch.Tensor, ...]]  # z, log_det, dz, du, dw, db of the flow or of its inverse

assert_float64_is_the_oracle = partial(problems.assert_float64_is_the_oracle, tolerance=1e-12, **ON_DEVICE)


def assert_same_bits_where_a_barrier_orders_nothing(answer: Answer, p: Problem, monkeypatch) -> None:
    """What AMD's GPUs run, a launch for each block of rows: one keeps the z of a block, the next one uses them."""
    monkeypatch.setattr(_heuristics, "num_partials", lambda *shape: 2)
    at_once = answer(p)
    monkeypatch.setattr(direct_backward, "BARRIER_ORDERS_MEMORY", False)
    launch.forget_plans()
    assert all(map(torch.equal, answer(p), at_once))


def assert_nothing_is_launched(
    answer: Answer, batch: tuple[int, ...], num_steps: int, amortized: bool, monkeypatch
) -> None:
    """Without rows, or without steps, z comes back as it is, and the gradients of the parameters are zeros."""

    def refuse(*args, **options):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch.Launch, "__call__", refuse)
    p = random_problem(batch, num_steps, 2, batch if amortized else ())
    z, log_det, dz, du, dw, db = answer(p)
    assert torch.equal(z, p.z)
    assert torch.equal(dz, p.grad_z)
    assert all((t == 0).all() for t in (log_det, du, dw, db))
