"""What the C++ kernels promise of their digits, whatever is drawn; the float64 oracle decides.

In float32 every output and gradient is within 10 times the float32 reference's error, or 2e-6 (relative, L2), whichever
is larger. The reference's error is taken over the problem and neighbours of it, whose inputs differ by one rounding: a
problem in which the reference happens to be exact is no harder than its neighbours. In float64 the same bound holds in
float64's roundings.

The range: one step with w . u from -20 to 100, or up to 32 steps whose entries are up to 2 N(0, 1), D from 2 to 40, for
each activation, constraint and form, forward and inverse.
"""

import math

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import drawn
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from problems import NAMES, Problem, on_each_isa, relative_errors
from test_properties import answers
from torch import Tensor

from vvae_fast import reference
from vvae_fast.spec import ACTIVATIONS, FlowSpec

FACTOR, FLOOR = 10, 2e-6
NEIGHBOURS = 7
ROUNDINGS = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps

ranks = st.sampled_from([1, 2, 5, 16, 17, 33])
entries = st.floats(0.05, 2.0)


def one_step(alpha: float, dim: int, rows: int, amortized: bool, seed: int) -> Problem:
    """w . u = alpha, to a rounding of float32."""
    p = drawn.problem(
        drawn.Size(1 if amortized else rows, rows if amortized else None, 1, dim), seed, drawn.Scales(params=1.0)
    )
    u = p.u + ((alpha - (p.w * p.u).sum(-1)) / (p.w * p.w).sum(-1))[..., None] * p.w
    return p._replace(u=u.float().double())


@st.composite
def problems(draw, most_steps: int = 32) -> Problem:
    """In float64, of numbers that float32 holds."""
    rows, dim, seed = draw(ranks), draw(st.sampled_from([2, 3, 4, 7, 8, 9, 16, 17, 40])), draw(drawn.seeds)
    sets = draw(st.sampled_from(["shared", "each", "sets"]))
    if draw(st.booleans()):
        return one_step(draw(st.floats(-20, 100)), dim, rows, sets != "shared", seed)
    steps, scale = draw(st.sampled_from([k for k in (1, 2, 4, 8, 17, 32) if k <= most_steps])), draw(entries)
    g = torch.Generator().manual_seed(seed)
    params = {"shared": (), "each": (rows,), "sets": (2,)}[sets]
    batch = (rows, 2) if sets == "sets" else (rows,)

    def randn(factor: float, *shape: int) -> Tensor:
        return (factor * torch.randn(shape, generator=g)).double()

    matrix = (*params, steps, dim)
    inputs = randn(1, *batch, dim), randn(scale, *matrix), randn(scale, *matrix), randn(scale, *matrix[:-1])
    return Problem(*inputs, randn(1, *batch, dim), randn(1, *batch))


def neighbours(p: Problem, seed: int) -> Problem:
    """The problem and others beside it, each as parameter sets of their own: z [*samples, 1 + N, *params, D]."""
    g = torch.Generator().manual_seed(seed)
    rank = len(p.u.shape) - 2  # of *params, which end *batch

    def moved(t: Tensor, at: int) -> Tensor:
        signs = torch.randint(-1, 2, (NEIGHBOURS, *t.shape), generator=g)
        signs = torch.cat([torch.zeros_like(signs[:1]), signs]) * torch.finfo(torch.float32).eps
        return (t * (1 + signs)).movedim(0, at)

    at = len(p.z.shape) - 1 - rank
    z, grad_z, grad_log_det = moved(p.z, at), moved(p.grad_z, at), moved(p.grad_log_det, at)
    return Problem(z, *(moved(t, 0) for t in p.inputs[1:]), grad_z, grad_log_det)


def expected(p: Problem, formulas: FlowSpec, inverse: bool) -> tuple[tuple[Tensor, ...], list[float]]:
    """The oracle's answer in float64, and for each tensor the largest error of the float32 reference beside it."""
    exact = reference_answers(p, formulas, inverse)
    many = neighbours(p, 0)
    got = reference_answers(Problem(*(t.float() for t in many)), formulas, inverse)
    at = len(p.z.shape) - 1 - (len(p.u.shape) - 2)
    errors = []
    for i in range(1 + NEIGHBOURS):
        one = [t.select(at if j < 3 else 0, i) for j, t in enumerate(got)]
        errors.append(relative_errors(one, exact))
    return exact, [max(column) for column in zip(*errors, strict=True)]


def reference_answers(p: Problem, formulas: FlowSpec, inverse: bool) -> tuple[Tensor, ...]:
    if inverse:
        return answers(p, formulas, True, "reference")
    z_K, log_det, _ = reference.planar_forward(*p.inputs, formulas)
    return z_K, log_det, *reference.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, formulas)


def assert_promise(p: Problem, formulas: FlowSpec, inverse: bool) -> None:
    exact, reference_errors = expected(p, formulas, inverse)
    for dtype, roundings in ((torch.float32, 1.0), (torch.float64, ROUNDINGS)):
        q = p.to(dtype)
        for level, got in on_each_isa(lambda q=q: answers(q, formulas, inverse)).items():
            for name, error, beside in zip(NAMES, relative_errors(got, exact), reference_errors, strict=True):
                # the oracle is in float64 itself: in that dtype its own error is one of the two
                bound = max(FACTOR * beside, FLOOR) / roundings * (1 if dtype == torch.float32 else 2)
                note(f"{level} {dtype} {name}: {error:.1e}, the reference in float32 {beside:.1e}")
                assert error <= bound or math.isinf(beside), (level, dtype, name, error, beside)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(p=problems(), constraint=st.sampled_from(["softplus", "log_softplus"]), slope=drawn.slopes)
def test_forward_and_gradients(activation, p, constraint, slope):
    assert_promise(p, FlowSpec(constraint, activation, slope), inverse=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(p=problems(most_steps=8), constraint=st.sampled_from(["softplus", "log_softplus"]), slope=drawn.slopes)
def test_inverse_and_gradients(activation, p, constraint, slope):
    assert_promise(p, FlowSpec(constraint, activation, slope), inverse=True)
