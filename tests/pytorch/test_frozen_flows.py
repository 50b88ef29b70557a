"""A flow whose parameters nobody trains: its backward gives dz alone, with the bits that a trained one's has."""

import dataclasses
import itertools

import pytest
import torch
from problems import Problem, random_problem

import vvae_fast
from vvae_fast import node
from vvae_fast.backends import cpp, operators, selection
from vvae_fast.functional import packed_planar_flow
from vvae_fast.spec import FlowSpec

# Batch, parameter sets, K and D: one set for all rows, a set a row, few and many rows a set; several chunks and spans.
SHAPES = [
    ((6,), (), 4, 3),
    ((), (), 2, 3),
    ((150,), (), 70, 65),
    ((2, 11), (), 5, 8),
    ((19,), (19,), 5, 19),
    ((3, 7), (7,), 4, 40),
    ((20, 2), (2,), 18, 5),
    ((5,), (), 0, 3),
    ((0,), (), 4, 3),
]
FORMULAS = [FlowSpec(), FlowSpec("log_softplus", "sigmoid"), FlowSpec(activation="elu", log_det_eps=1e-3)]


def packed(u, w, b):
    return torch.cat([u.flatten(-2), w.flatten(-2), b], -1)


def gradients(flow, inputs, needed, grads):
    """What backward leaves in each input's grad."""
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
    torch.autograd.backward(flow(*leaves), grads)
    return [t.grad for t in leaves]


@pytest.fixture
def asked(monkeypatch):
    """The `params` that the C++ operators are asked for by autograd's Functions; by the node: test_node.py."""
    monkeypatch.setattr(node, "serves", False)
    asked = []

    def recording(operator):
        def call(*args):
            asked.append(args[-1])
            return operator(*args)

        return call

    backward = [name for name in operators.Operators._fields if "backward" in name]
    recorded = {name: recording(getattr(cpp.CPP.operators, name)) for name in backward}
    recorder = dataclasses.replace(cpp.CPP, operators=cpp.CPP.operators._replace(**recorded))
    monkeypatch.setitem(selection._BACKENDS, "cpp", recorder)
    return asked


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("batch", "params"), [((6,), ()), ((6,), (6,)), ((2, 6), (6,))])
def test_every_combination_of_gradients(batch, params, inverse, backend, asked):
    p = random_problem(batch, 4, 3, params)
    flow = vvae_fast.planar_flow_inverse if inverse else vvae_fast.planar_flow
    combinations = [needed for needed in itertools.product([True, False], repeat=4) if any(needed)]
    wanted = None
    for needed in combinations:  # all of them first
        got = gradients(lambda *x: flow(*x, backend=backend), p.inputs, needed, (p.grad_z, p.grad_log_det))
        wanted = wanted or got
        for x, y, need in zip(got, wanted, needed, strict=True):
            assert torch.equal(x, y) if need else x is None
    assert asked == ([any(needed[1:]) for needed in combinations] if backend == "cpp" else [])


@pytest.mark.parametrize(("batch", "params"), [((6,), (6,)), ((2, 6), (6,)), ((5,), ())])
def test_every_combination_of_packed_gradients(batch, params, asked):
    p = random_problem(batch, 4, 3, params)
    inputs = p.z, packed(p.u, p.w, p.b)
    wanted = None
    for needed in ((True, True), (True, False), (False, True)):
        got = gradients(lambda *x: packed_planar_flow(*x, 4, 3), inputs, needed, (p.grad_z, p.grad_log_det))
        wanted = wanted or got
        for x, y, need in zip(got, wanted, needed, strict=True):
            assert torch.equal(x, y) if need else x is None
    assert asked == [True, False, True]


def rows_of(p: Problem) -> Problem:
    """With z [R, D], as the operators take it."""
    dim = p.z.shape[-1]
    return p._replace(z=p.z.reshape(-1, dim), grad_z=p.grad_z.reshape(-1, dim), grad_log_det=p.grad_log_det.reshape(-1))


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "params", "num_steps", "dim"), SHAPES)
def test_the_operators_give_the_same_dz(batch, params, num_steps, dim, dtype):
    p = rows_of(random_problem(batch, num_steps, dim, params, dtype=dtype))
    for formulas in FORMULAS:
        numbers = formulas.arguments()
        a = operators.planar_forward(*p.inputs, *numbers, True)[2]
        saved = (p.grad_z, p.grad_log_det, p.z)
        check(operators.planar_backward, *saved, *p.inputs[1:], a, *numbers)
        if params:
            check(operators.planar_backward_packed, *saved, packed(*p.inputs[1:]), a, *numbers)
        a = operators.planar_inverse(*p.inputs, *numbers[:3], True)[2]
        check(operators.planar_inverse_backward, *saved, *p.inputs[1:], a, *numbers[:3])


def check(operator, *args):
    dz, *weights = operator(*args, False)
    assert torch.equal(dz, operator(*args)[0])
    assert torch.equal(dz, operator(*args, True)[0])
    assert [tuple(t.shape) for t in weights] == [(0,)] * len(weights)


def test_opcheck_without_parameters():
    p = random_problem((6,), 4, 3, (6,))
    numbers = FlowSpec().arguments()
    a = operators.planar_forward(*p.inputs, *numbers, True)[2]
    saved = (p.grad_z, p.grad_log_det, p.z)
    torch.library.opcheck(operators.planar_backward, (*saved, *p.inputs[1:], a, *numbers, False))
    torch.library.opcheck(operators.planar_inverse_backward, (*saved, *p.inputs[1:], a, *numbers[:3], False))
    torch.library.opcheck(operators.planar_backward_packed, (*saved, packed(*p.inputs[1:]), a, *numbers, False))


def test_a_frozen_flow_under_the_compiler_and_twice():
    p = random_problem((6,), 4, 3, dtype=torch.float64)
    flow = torch.compile(lambda z: vvae_fast.planar_flow(z, *p.inputs[1:]), fullgraph=True, backend="aot_eager")
    z = p.z.clone().requires_grad_()
    (got,) = torch.autograd.grad(flow(z), z, (p.grad_z, p.grad_log_det))
    (wanted,) = torch.autograd.grad(vvae_fast.planar_flow(z, *p.inputs[1:]), z, (p.grad_z, p.grad_log_det))
    assert torch.equal(got, wanted)
    assert torch.autograd.gradgradcheck(lambda z: vvae_fast.planar_flow(z, *p.inputs[1:]), z)
