"""What holds of every call of the C++ operators, whatever is drawn: memory, threads, rows that are strangers.

`make test` draws 200 examples of each, always the same; `make test-long` 2,000 new ones.
"""

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import itertools
import math

import drawn
import guards
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import Problem, on_each_isa
from torch import Tensor

import vvae_fast
from vvae_fast import functional, shapes
from vvae_fast.backends import operators
from vvae_fast.spec import FlowSpec

DTYPES = st.sampled_from([torch.float32, torch.float64])
# From nothing to where z, u and w themselves overflow; between, w . u does and |w|^2 underflows.
ANY_SCALE = st.sampled_from([0.0, 1e-38, 1e-20, 1e-8, 0.1, 0.5, 1.0, 4.0, 1e3, 1e8, 1e19, 1e38])
SCALES = st.builds(drawn.Scales, ANY_SCALE, ANY_SCALE, ANY_SCALE)


def call(p: Problem, formulas: FlowSpec, inverse: bool) -> tuple[Tensor, ...]:
    """z_K, log_det, a, dz, du, dw, db of the operators themselves, for a flat problem."""
    numbers = formulas.arguments()
    if not inverse:
        z_K, log_det, a = operators.planar_forward(*p.inputs, *numbers, True)
        return z_K, log_det, a, *operators.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, a, *numbers)
    z_0, log_det, a = operators.planar_inverse(*p.inputs, *numbers[:3], True)
    grads = operators.planar_inverse_backward(p.grad_z, p.grad_log_det, *p.inputs, a, *numbers[:3])
    return z_0, log_det, a, *grads


def answers(p: Problem, formulas: FlowSpec, inverse: bool, backend: str = "cpp") -> tuple[Tensor, ...]:
    """z_K, log_det, dz, du, dw, db of the package, in the problem's own shapes."""
    inputs = [t.detach().requires_grad_() for t in p.inputs]
    if inverse:
        options = {k: v for k, v in formulas._asdict().items() if k != "log_det_eps"}
        outputs = vvae_fast.planar_flow_inverse(*inputs, **options, backend=backend)
    else:
        outputs = vvae_fast.planar_flow(*inputs, **formulas._asdict(), backend=backend)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))


def bits(t: Tensor) -> Tensor:
    """0 is not -0 here, and all NaNs are one: the sign of a NaN is the compiler's choice."""
    t = torch.where(t.isnan(), math.nan, t.resolve_neg()).contiguous()
    return t.view(torch.int32 if t.element_size() == 4 else torch.int64)


def assert_same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], about: object = None) -> None:
    for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
        assert x.shape == y.shape
        assert torch.equal(bits(x), bits(y)), (about, i)


def memory_of(t: Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def assert_apart(tensors: list[Tensor]) -> None:
    """No two of them share memory."""
    ranges = sorted(memory_of(t) for t in tensors if t.untyped_storage().nbytes())
    for (_, end), (start, _) in itertools.pairwise(ranges):
        assert end <= start


@st.composite
def flows(draw) -> tuple[FlowSpec, bool]:
    """What a step computes, and whether its inverse is asked for."""
    inverse = draw(st.booleans())
    return draw(drawn.formulas(inverse)), inverse


@given(
    case=drawn.sizes().flatmap(lambda size: st.tuples(st.just(size), drawn.placements(size))),
    flow=flows(),
    dtype=DTYPES,
    scales=SCALES,
    seed=drawn.seeds,
)
def test_memory(case, flow, dtype, scales, seed):
    """On each instruction set: nothing around a tensor is written to, no input changes, no two tensors share memory.
    Strides, offsets and expanded dimensions change no bit of what contiguous inputs give."""
    size, layouts = case

    def check():
        p = drawn.flat(drawn.problem(size, seed, scales, dtype))
        placed = [drawn.place(t, layout) for t, layout in zip(p, layouts, strict=True)]
        views = Problem(*(x.view for x in placed))
        plain = Problem(*(t.resolve_neg().clone(memory_format=torch.contiguous_format) for t in views))
        wanted = on_each_isa(lambda: call(plain, *flow))
        for level, got in on_each_isa(lambda: call(views, *flow)).items():
            assert_same_bits(got, wanted[level], level)
            assert_apart([*(x.memory for x in placed), *got])
        assert all(x.is_untouched for x in placed)

    with guards.guarded():
        check()


@given(size=drawn.sizes(), flow=flows(), dtype=DTYPES, scales=SCALES, seed=drawn.seeds)
def test_memory_of_the_package(size, flow, dtype, scales, seed):
    """The same of `planar_flow` and its inverse with their gradients, in batches of any shape, K = 0 included."""
    assume(size.dim > 0)

    def check():
        p = drawn.problem(size, seed, scales, dtype)
        before = [t.clone() for t in p]
        got = answers(p, *flow)
        assert_apart([*p, *got])
        assert_same_bits(tuple(p), tuple(before))

    with guards.guarded():
        check()


@given(size=drawn.sizes(work=3_000_000, most_rows=1025), flow=flows(), dtype=DTYPES, scales=SCALES, seed=drawn.seeds)
def test_threads(size, flow, dtype, scales, seed):
    """The same bits on any number of threads."""
    p = drawn.flat(drawn.problem(size, seed, scales, dtype))
    previous = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = call(p, *flow)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(call(p, *flow), wanted, threads)
    finally:
        torch.set_num_threads(previous)


def of_rows(p: Problem, rows: Tensor, amortized: bool) -> Problem:
    """Some rows of a flat problem with, where each row has parameters of its own, these as well."""
    params = (t[rows] if amortized else t for t in p.inputs[1:])
    return Problem(p.z[rows], *params, p.grad_z[rows], p.grad_log_det[rows])


@given(size=drawn.sizes(dims=(1, 65)), flow=flows(), dtype=DTYPES, scales=SCALES, seed=drawn.seeds, data=st.data())
def test_rows_are_strangers(size, flow, dtype, scales, seed, data):
    """A row's bits are the same alone, in another order, and beside rows of NaN or infinities."""
    size = size._replace(samples=1) if size.sets is not None else size
    assume(size.rows > 0)
    p = drawn.flat(drawn.problem(size, seed, scales, dtype))
    amortized = size.sets is not None
    of_a_row = (0, 1, 3, 4, 5, 6) if amortized else (0, 1, 3)
    wanted = call(p, *flow)
    order = torch.randperm(size.rows)
    some = order[: data.draw(st.integers(1, size.rows))]
    got = call(of_rows(p, some, amortized), *flow)
    assert_same_bits(tuple(got[i] for i in of_a_row), tuple(wanted[i][some] for i in of_a_row))
    bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    spoilt = p._replace(z=p.z.clone(), grad_z=p.grad_z.clone())
    spoilt.z[some[0]] = bad
    spoilt.grad_z[some[0]] = bad
    others = torch.arange(size.rows) != some[0]
    got = call(spoilt, *flow)
    assert_same_bits(tuple(got[i][others] for i in of_a_row), tuple(wanted[i][others] for i in of_a_row))
    if math.isnan(bad) and size.steps:
        assert got[0][some[0]].isnan().all()


@given(size=drawn.sizes(dims=(1, 65)), flow=drawn.formulas(), dtype=DTYPES, scales=SCALES, seed=drawn.seeds)
def test_packed_parameters(size, flow, dtype, scales, seed):
    """The parameters as a head computes them: the bits of separate ones, forward and backward."""
    assume(size.sets is not None)
    p = drawn.problem(size, seed, scales, dtype)
    wanted = answers(p, flow, False)
    packed = torch.cat([p.u.flatten(-2), p.w.flatten(-2), p.b], -1).requires_grad_()
    z = p.z.detach().requires_grad_()
    outputs = functional.packed_planar_flow(z, packed, size.steps, size.dim, **flow._asdict(), backend="cpp")
    dz, dpacked = torch.autograd.grad(outputs, (z, packed), (p.grad_z, p.grad_log_det))
    grads = shapes.unpack(dpacked, size.steps, size.dim)
    assert_same_bits((*(t.detach() for t in outputs), dz, *grads), wanted)


@given(
    size=drawn.sizes(dims=(1, 33)),
    flow=flows(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=drawn.seeds,
)
def test_half_precisions(size, flow, dtype, seed):
    """Computed in float32 and rounded once; log_det stays float32."""
    p = drawn.problem(size, seed, dtype=dtype)
    p = p._replace(grad_log_det=p.grad_log_det.float())
    wanted = answers(Problem(*(t.float() for t in p)), *flow)
    got = answers(p, *flow)
    assert got[1].dtype == torch.float32
    for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(x, y if i == 1 else y.to(dtype)), i


@pytest.mark.parametrize("element", [3, 40, -1, -40])
def test_a_broken_guard_is_found(element):
    """Behind a tensor's end and before its start."""
    with pytest.raises(AssertionError, match="memory around 1 tensors"), guards.guarded():
        guards.write_past(torch.zeros(3), element)


def test_whole_guards_are_no_fault():
    before = guards.count_blocks()
    with guards.guarded():
        guards.write_past(torch.zeros(3), 2)
    assert guards.count_blocks() > before


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_a_changed_input_is_found(gap):
    placed = drawn.place(torch.zeros(4, 3), drawn.Layout((1, 0), (gap, 2), 3, False))
    assert placed.is_untouched
    placed.view[2, 1] = 1e-30
    assert not placed.is_untouched
