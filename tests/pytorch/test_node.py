"""The extension vvae_fast._C_node: the bits of autograd's Functions, for ordinary calls and for one torch alone."""

import functools
import gc
import itertools
import re
import sys
import threading

import pytest
import torch
from problems import random_problem
from test_backends import python
from test_host_path import PARAMS, Z
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad, gradgradcheck

import vvae_fast
from benchmarks.calls import call_cost
from benchmarks.flow.cases import Case
from vvae_fast import node, shapes
from vvae_fast.functional import packed_planar_flow
from vvae_fast.spec import FlowSpec

NODES = ("vvae::PlanarFlow", "vvae::PackedPlanarFlow")
STEPS, DIM = 4, 3

pytestmark = pytest.mark.skipif(node.load_error is not None, reason=str(node.load_error))


def shared(inputs, **options):
    return vvae_fast.planar_flow(*inputs, **options)


def packed(inputs, **options):
    return packed_planar_flow(*inputs, STEPS, DIM, **options)


def problem(amortized, dtype=torch.float32):
    p = random_problem((6,), STEPS, DIM, (6,) if amortized else (), dtype=dtype)
    return list(p.inputs), (p.grad_z, p.grad_log_det)


def packed_problem(dtype=torch.float32):
    (z, u, w, b), grads = problem(True, dtype)
    return [z, torch.cat([u.flatten(1), w.flatten(1), b], 1)], grads


CASES = {
    "shared": (shared, lambda dtype: problem(False, dtype)),
    "amortized": (shared, lambda dtype: problem(True, dtype)),
    "packed": (packed, packed_problem),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def functions(monkeypatch):
    """A call makes the same calls take autograd's Functions."""

    def use():
        monkeypatch.setattr(node, "serves", False)

    return use


def leaves(inputs, needed=None):
    return [t.detach().clone().requires_grad_(needed is None or i in needed) for i, t in enumerate(inputs)]


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_values_and_gradients_are_the_functions_bits(case, dtype, used, functions):
    flow, make = CASES[case]
    inputs, grads = make(dtype)
    options = {"activation": "leaky_relu", "slope": 0.25, "constraint": "log_softplus", "log_det_eps": 1e-3}

    def results():
        found = []
        for chosen in ({}, options, {"activation": "elu", "slope": float("nan")}):
            x = leaves(inputs)
            outputs = flow(x, **chosen)
            found += [*outputs, *torch.autograd.grad([outputs[i] for i in used], x, [grads[i] for i in used])]
        return found, outputs[0].grad_fn.name()

    got, name = results()
    functions()
    wanted, other_name = results()
    assert name in NODES
    assert other_name == "PlanarFlowFunctionBackward"
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, wanted, strict=True))


@cases
def test_calls_that_differ_in_one_number_are_told_apart(case, functions):
    """The node looks up what was asked for before."""
    flow, make = CASES[case]
    inputs, grads = make(torch.float32)
    options = {"activation": "leaky_relu", "slope": 0.25, "constraint": "softplus", "log_det_eps": 0.0}
    others = {"activation": "elu", "slope": 0.5, "constraint": "none", "log_det_eps": 0.5}
    asked = [options, *({**options, name: value} for name, value in others.items())]

    def results():
        found = []
        for chosen in (*asked, *asked):
            x = leaves(inputs)
            outputs = flow(x, **chosen)
            found += [*outputs, *torch.autograd.grad(outputs, x, grads)]
        return found

    got = results()
    functions()
    assert all(torch.equal(x, y) for x, y in zip(got, results(), strict=True))


@cases
def test_what_needs_no_gradient_gets_none(case, functions):
    flow, make = CASES[case]
    inputs, grads = make(torch.float32)
    for needed in ({0}, {1}, {len(inputs) - 1}, set(range(1, len(inputs)))):
        x = leaves(inputs, needed)
        torch.autograd.backward(flow(x), grads)
        assert {i for i, t in enumerate(x) if t.grad is not None} == needed
    assert flow(inputs)[0].grad_fn is None
    with torch.no_grad():
        assert flow(leaves(inputs))[0].grad_fn is None
    z_K, log_det = flow(inputs)
    functions()
    assert all(torch.equal(x, y) for x, y in zip((z_K, log_det), flow(inputs), strict=True))


@cases
@pytest.mark.parametrize("needed", [None, {0}, {0, 1}, {1}])
def test_a_frozen_flow_asks_the_operator_for_dz_alone(case, needed):
    """What that leaves out: test_frozen_flows.py."""
    flow, make = CASES[case]
    inputs, grads = make(torch.float32)
    outputs = flow(leaves(inputs, needed))
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.autograd.backward(outputs, grads)
    (call,) = [e for e in profile.events() if e.name.startswith("vvae_fast::planar_backward")]
    assert call.concrete_inputs[-1] is (needed != {0})


@cases
def test_second_derivatives(case):
    flow, make = CASES[case]
    inputs, _ = make(torch.float64)
    assert gradgradcheck(lambda *x: flow(x), leaves(inputs))
    x = leaves(inputs)
    (dz,) = torch.autograd.grad(flow(x)[1].sum(), x[:1], create_graph=True)
    assert dz.requires_grad


@pytest.mark.parametrize(("rows", "steps"), [(0, 4), (6, 0), (0, 0)])
def test_no_rows_or_no_steps(rows, steps, functions):
    p = random_problem((rows,), steps, DIM)
    found = []
    for _ in range(2):
        x = leaves(p.inputs)
        outputs = shared(x)
        found.append([*outputs, *torch.autograd.grad(outputs, x, (p.grad_z, p.grad_log_det))])
        functions()
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_saved_tensor_that_changed_is_an_error():
    inputs, grads = problem(False)
    x = leaves(inputs)
    outputs = shared(x)
    with torch.no_grad():
        x[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, grads)


def test_the_graph_is_freed_and_its_tensors_can_be_packed():
    inputs, grads = problem(False)
    x, seen = leaves(inputs), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t)[1], lambda t: t):
        outputs = shared(x)
    assert seen == [(6, DIM), (STEPS, DIM), (STEPS, DIM), (STEPS,), (STEPS, 6)]
    torch.autograd.backward(outputs, grads)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(outputs, grads)


@cases
@pytest.mark.parametrize("needed", [None, {0}, {1}])
def test_compiled_autograd_gives_the_same_bits(case, needed):
    """It takes the whole backward as one graph, of which a node is a call: twice, since the second one is cached."""
    flow, make = CASES[case]
    for number in (0.0, 1e-3):
        inputs, grads = make(torch.float32)
        x = leaves(inputs, needed)

        def gradients(x=x, grads=grads, number=number):
            torch.autograd.backward(flow(x, log_det_eps=number), grads)
            found = [t.grad for t in x]
            for t in x:
                t.grad = None
            return found

        wanted = gradients()
        for _ in range(2):
            with compiled_autograd._enable(functools.partial(torch.compile, backend="eager")):
                got = gradients()
            pairs = zip(got, wanted, strict=True)
            assert all(g is None if w is None else torch.equal(g, w) for g, w in pairs)


@cases
@pytest.mark.parametrize("by_function", [False, True])
def test_tangents_of_incoming_gradients_are_not_lost(case, by_function, functions):
    """Forward mode over reverse: the graph is built before, and the backward meets a tangent."""
    flow, make = CASES[case]
    inputs, grads = make(torch.float64)
    if by_function:
        functions()
    answers = []
    for options in ({}, {"backend": "reference"}):
        x = leaves(inputs)
        outputs = flow(x, **options)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(g, g.flip(0)) for g in grads]
            gradients = torch.autograd.grad(outputs, x, duals)
            answers.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    for got, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(got, wanted)


def test_exceptions_of_hooks_and_of_pytorch_pass_as_they_are():
    """A checkpoint ends its recomputation by one; and out of memory is not any RuntimeError."""
    inputs, _ = problem(False)
    x = leaves(inputs)

    def pack(t):
        raise LookupError("of a hook")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(LookupError, match="of a hook"):
        shared(x)
    with pytest.raises(NotImplementedError, match="Could not run 'vvae_fast::cuda_planar_forward'"):
        node.planar_flow(*x, *FlowSpec().arguments(), "cuda_")


def test_outputs_may_be_changed_in_place():
    inputs, _ = problem(False)
    x = leaves(inputs)
    z_K, log_det = shared(x)
    ((z_K.mul_(2)).sum() + log_det.add_(1).sum()).backward()
    assert all(t.grad.isfinite().all() for t in x)


def test_threads():
    inputs, grads = problem(False)
    x = leaves(inputs)
    wanted, found = torch.autograd.grad(shared(x), x, grads), []

    def work():
        for slope in (0.125, 0.25, 0.5):
            shared(x, activation="leaky_relu", slope=slope)
        found.append(torch.autograd.grad(shared(x), x, grads))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, wanted, strict=True))


def test_ordinary_calls_are_those_of_the_checks():
    """Twins: shapes.is_ordinary says the same of every call of test_host_path."""
    for z, params in itertools.product(Z, PARAMS):
        arguments = (Z[z], *PARAMS[params])
        assert node.is_ordinary(*arguments) is shapes.is_ordinary(*arguments), (z, params)
    tensors = [*Z.values(), torch.randn(6, 28), torch.randn(1, 28), torch.randn(6, 29), torch.randn(6, 28).double()]
    sizes = [(4, 3), (3, 4), (4.0, 3), (4, True), (-1, 3), (0, 3), (2**70, 3), (4, 2**70), (4, 0), (None, "3")]
    for z, t, size in itertools.product(Z.values(), tensors, sizes):
        assert node.is_ordinary_packed(z, t, *size) is shapes.is_ordinary_packed(z, t, *size), (z, t, size)
    assert node.is_ordinary_packed(Z["good"], tensors[-4], 4, 3)


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_a_call_that_something_looks_at_is_not_ordinary(monkeypatch):
    inputs, answers, ask = problem(False)[0], [], node.is_ordinary
    monkeypatch.setattr(node, "is_ordinary", lambda *args: answers.append(ask(*args)) or answers[-1])
    shared(inputs)
    shared([inputs[0], *map(torch.nn.Parameter, inputs[1:])])
    assert answers == [True, True]
    answers.clear()
    looks = []

    def look(z):
        looks.append(shared([z, *inputs[1:]]))
        return z.sum()

    look(inputs[0].as_subclass(Subclass))
    torch.func.grad(look)(inputs[0])
    torch.func.vmap(lambda i: look(inputs[0]) + i)(torch.zeros(2))
    torch.jit.trace(look, inputs[0], check_trace=False)
    with forward_ad.dual_level():
        look(inputs[0])
    with torch.device("cpu"):  # a torch function mode
        look(inputs[0])
    torch.compile(look, backend="eager")(inputs[0])
    assert len(looks) == 7
    assert not any(answers)


def test_under_torch_compile_it_is_the_function_that_is_traced():
    inputs, grads = problem(False)
    x, y = leaves(inputs), leaves(inputs)
    compiled = torch.compile(vvae_fast.planar_flow, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*x), x, grads)
    assert all(torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(shared(y), y, grads), strict=True))


def test_it_serves_the_torch_that_it_was_built_for(monkeypatch):
    assert node._load() == (node.extension, None)
    assert vvae_fast.info()["node"] == {"available": True, "reasons": []}
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    extension, reason = node._load()
    assert extension is None
    assert reason.startswith("vvae_fast._C_node was built for torch 2.")
    assert reason.endswith("here is 2.99.0")


def test_the_environment_leaves_it_out():
    code = (
        "import torch, vvae_fast; from vvae_fast import PlanarFlow; print(vvae_fast.info()['node']);"
        "print(PlanarFlow(2, 3)(torch.zeros(4, 2))[0].grad_fn.name())"
    )
    said, name = python(code, VVAE_FAST_NODE="0").stdout.splitlines()
    assert said == "{'available': False, 'reasons': ['the environment variable VVAE_FAST_NODE is 0']}"
    assert name == "PlanarFlowFunctionBackward"


def test_the_cost_of_a_call_is_printed(monkeypatch, capsys):
    """And afterwards a call is as it was."""
    monkeypatch.setattr(call_cost, "CASES", [Case(3, 2, 1)])
    monkeypatch.setattr(call_cost, "FROZEN", Case(3, 2, 1))
    monkeypatch.setattr(call_cost, "BLOCK_SECONDS", 1e-4)
    monkeypatch.setattr(sys, "argv", ["call_cost.py", "3"])
    threads, before = torch.get_num_threads(), (node.is_ordinary, node.serves)
    try:
        call_cost.main()
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    assert (node.is_ordinary, node.serves) == before
    head, row, frozen = capsys.readouterr().out.splitlines()
    assert head.endswith("one thread; node: available")
    time, ratio = r"[\d.]+ us", r"\([\d.]+x\)"
    case = "3 x 2, K = 1"
    assert re.fullmatch(
        rf"forward \+ backward, {case}: no-op {time}, Function {time} {ratio}, node {time} {ratio}", row
    )
    assert re.fullmatch(rf"backward, {case}: trained {time}, frozen {time} {ratio}", frozen)


def test_what_is_called_the_function_is_the_function():
    with call_cost.by_function():
        x = leaves(problem(False)[0])
        assert shared(x)[0].grad_fn.name() == "PlanarFlowFunctionBackward"
    assert shared(x)[0].grad_fn.name() == "vvae::PlanarFlow"
