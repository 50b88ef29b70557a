"""What a call costs beside the kernels: an ordinary one is checked by the operators alone, and is refused in the words
of the checks all the same."""

import itertools

import numpy as np
import pytest
import torch
from problems import Problem, random_problem

import vvae_fast
from vvae_fast import autograd, node, shapes
from vvae_fast.backends import operators
from vvae_fast.functional import packed_planar_flow
from vvae_fast.spec import FlowSpec


def packed_flow(z, u, w, b, **options):
    """planar_flow of parameters that lie in one tensor."""
    packed = torch.cat([u.flatten(-2), w.flatten(-2), b], -1)
    return packed_planar_flow(z, packed, *u.shape[-2:], **options)


FLOWS = [vvae_fast.planar_flow, vvae_fast.planar_flow_inverse, packed_flow]


@pytest.fixture
def no_checks(monkeypatch):
    def check(*args):
        raise AssertionError("shapes.check was called")

    monkeypatch.setattr(shapes, "check", check)


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("flow", "params"), [*itertools.product(FLOWS[:2], [(), (6,)]), (packed_flow, (6,))])
def test_an_ordinary_call_is_checked_by_the_operators_alone(flow, params, dtype):
    p = random_problem((6,), 4, 3, params, dtype=dtype)
    inputs = [p.z.requires_grad_(), *(torch.nn.Parameter(t) for t in p.inputs[1:])]
    outputs = flow(*inputs)
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det)))
    for options in ({"activation": "leaky_relu", "slope": 0.5}, {"constraint": "log_softplus", "backend": "cpp"}):
        flow(*inputs, **options)
    with torch.no_grad(), vvae_fast.use_backend("cpp"):
        flow(*inputs)


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("flow", FLOWS)
def test_any_other_call_is_checked(flow):
    ordinary = random_problem((6,), 4, 3, (6,)).inputs
    halves = [t.bfloat16() for t in ordinary]
    deep = random_problem((2, 6), 4, 3, (6,)).inputs
    for inputs, options in ((halves, {}), (deep, {}), (ordinary, {"backend": "reference"})):
        with pytest.raises(AssertionError, match="was called"):
            flow(*inputs, **options)
    with pytest.raises(AssertionError, match="was called"):
        torch.func.vmap(flow)(*(t[None] for t in ordinary))


def outcome(flow, *args, **options):
    """The results, or the error as a user sees it."""
    try:
        return tuple(flow(*args, **options))
    except Exception as error:
        return type(error), str(error), error.__suppress_context__ or error.__context__ is None


Z = {
    "good": torch.randn(6, 3),
    "list": [1.0],
    "array": np.zeros((6, 3), np.float32),
    "rank 0": torch.zeros(()),
    "rank 1": torch.randn(3),
    "rank 3": torch.randn(2, 6, 3),
    "no rows": torch.zeros(0, 3),
    "no columns": torch.zeros(6, 0),
    "narrow": torch.randn(6, 2),
    "float64": torch.randn(6, 3, dtype=torch.float64),
    "half": torch.randn(6, 3).half(),
    "int": torch.zeros(6, 3, dtype=torch.int64),
    "sparse": torch.zeros(6, 3).to_sparse(),
    "meta": torch.zeros(6, 3, device="meta"),
}


def drawn(*sets, steps=4, dim=3):
    return torch.randn(*sets, steps, dim), torch.randn(*sets, steps, dim), torch.randn(*sets, steps)


PARAMS = {
    "shared": drawn(),
    "amortized": drawn(6),
    "one set": drawn(1),
    "three sets": drawn(3),
    "samples": drawn(2, 6),
    "no steps": drawn(steps=0),
    "no columns": drawn(dim=0),
    "float64": tuple(t.double() for t in drawn()),
    "mixed": (*drawn()[:2], torch.randn(4, dtype=torch.float64)),
    "narrow w": (drawn()[0], torch.ones(1, 3), torch.randn(4)),
    "wide b": (*drawn()[:2], torch.randn(4, 1)),
    "flat": tuple(t.flatten() for t in drawn()),
    "none": (None, None, None),
    "meta w": (drawn()[0], torch.ones(4, 3, device="meta"), torch.randn(4)),
    "sparse u": (torch.zeros(4, 3).to_sparse(), *drawn()[1:]),
}
OPTIONS = [
    {},
    {"activation": "relu"},
    {"activation": []},
    {"activation": "leaky_relu", "slope": 0},
    {"activation": "leaky_relu", "slope": 2},
    {"activation": "leaky_relu", "slope": np.float32(0.5)},
    {"slope": True},
    {"slope": 1},
    {"slope": torch.tensor(0.2)},
    {"slope": float("nan")},
    {"constraint": None},
    {"constraint": "none"},
    {"backend": "tpu"},
    {"backend": "cuda"},
    {"backend": []},
    {"backend": "auto"},
]


@pytest.mark.parametrize("flow", FLOWS[:2])
def test_refusals_and_results_are_those_of_checked_calls(flow, monkeypatch):
    cases = [*itertools.product(Z, PARAMS, OPTIONS[:1]), *itertools.product(("good",), ("shared",), OPTIONS)]
    cases += itertools.product(("narrow", "no columns"), ("shared", "narrow w"), OPTIONS)
    cases += [("good", "shared", {"slope": 1.0}), ("good", "shared", {"slope": True})]  # equal, and one is no number
    quick = [outcome(flow, Z[z], *PARAMS[params], **options) for z, params, options in cases]
    monkeypatch.setattr(node, "is_ordinary", lambda *args: False)
    for (z, params, options), got in zip(cases, quick, strict=True):
        wanted = outcome(flow, Z[z], *PARAMS[params], **options)
        if isinstance(wanted[0], torch.Tensor) and wanted[0].device.type != "meta":
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)), (z, params, options)
        else:
            assert str(got) == str(wanted), (z, params, options)


def test_packed_refusals_and_results_are_those_of_checked_calls(monkeypatch):
    packed = {
        "good": torch.randn(6, 28),
        "one set": torch.randn(1, 28),
        "shared": torch.randn(28),
        "wide": torch.randn(6, 29),
        "float64": torch.randn(6, 28).double(),
        "meta": torch.zeros(6, 28, device="meta"),
        "strided": torch.randn(28, 6).t(),
    }
    sizes = [(4, 3), (3, 4), (4.0, 3), (-1, 3)]
    cases = [*itertools.product(Z, packed, sizes[:1], OPTIONS[:1])]
    cases += itertools.product(("good", "rank 3"), ("good",), sizes, [{}, {"activation": "relu"}])
    cases += itertools.product(("good", "narrow"), ("good",), sizes[:1], OPTIONS)
    quick = [outcome(packed_planar_flow, Z[z], packed[p], *size, **options) for z, p, size, options in cases]
    monkeypatch.setattr(node, "is_ordinary_packed", lambda *args: False)
    for (z, p, size, options), got in zip(cases, quick, strict=True):
        wanted = outcome(packed_planar_flow, Z[z], packed[p], *size, **options)
        if isinstance(wanted[0], torch.Tensor) and wanted[0].device.type != "meta":
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)), (z, p, size, options)
        else:
            assert str(got) == str(wanted), (z, p, size, options)


def test_a_refusal_of_the_operators_own_is_passed_on(monkeypatch):
    """Where the checks find nothing, memory that ran out, say, what the operator said is what the user sees."""

    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(node, "serves", False)
    monkeypatch.setattr(autograd, "run", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        vvae_fast.planar_flow(*random_problem((6,), 4, 3).inputs)


def test_a_spec_is_checked_once(monkeypatch):
    p, counted, check = random_problem((6,), 4, 3), [], FlowSpec.checked
    monkeypatch.setattr(FlowSpec, "checked", lambda *args: counted.append(args) or check(*args))
    for _ in range(3):
        vvae_fast.planar_flow(*p.inputs, activation="leaky_relu", slope=0.3125)
    assert len(counted) == 1


def test_gradients_of_a_tensor_that_left_a_transform():
    """The Function is applied without torch.func's own way of doing so, which unwraps these."""
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(torch.randn(6, 3))
    params = [t.requires_grad_() for t in random_problem((6,), 4, 3).inputs[1:]]
    outputs = vvae_fast.planar_flow(left[0], *params)
    assert "PlanarFlow" in outputs[0].grad_fn.name()
    assert all(g.isfinite().all() for g in torch.autograd.grad([x.sum() for x in outputs], params))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("params", [(), (2,)])
def test_without_columns_b_has_its_gradient_still(params, inverse):
    """u and w have no memory then, which must not pass for a frozen flow's."""
    p = Problem(*(torch.randn(s) for s in ((2, 0), (*params, 3, 0), (*params, 3, 0), (*params, 3), (2, 0), (2,))))
    numbers = FlowSpec().arguments(inverse)
    forward, backward = (
        (operators.planar_inverse, operators.planar_inverse_backward)
        if inverse
        else (operators.planar_forward, operators.planar_backward)
    )
    a = forward(*p.inputs, *numbers, True)[2]
    for junk in (float("nan"), 7.0):
        left = [torch.full_like(p.b, junk) for _ in range(8)]
        del left  # what new memory holds
        db = backward(p.grad_z, p.grad_log_det, *p.inputs, a, *numbers)[3]
        assert torch.equal(db, torch.zeros_like(p.b))
