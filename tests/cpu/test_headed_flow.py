"""A flow and its linear head in one pass: the fused kernels against the float64 oracle, and who takes them."""

import functools
import itertools
import math
import re

import pytest
import torch
from problems import DRAWS, assert_as_accurate, on_each_isa, relative_errors
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import vvae_fast
from vvae_fast import autograd, node, reference, shapes
from vvae_fast.backends import headed
from vvae_fast.functional import headed_planar_flow, packed_planar_flow
from vvae_fast.shapes import unpack
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, DEFAULT, FlowSpec

NODE = "vvae::HeadedPlanarFlow"
# R, K, D, F: tiles and vectors that are full or not, spans of one step and of eight, slices of several tiles.
SIZES = [
    (1, 1, 1, 1),
    (3, 17, 2, 5),
    (16, 8, 4, 16),
    (33, 16, 40, 32),
    (64, 3, 65, 7),
    (100, 9, 10, 33),
    (129, 5, 3, 70),
    (150, 2, 600, 3),
    (2100, 4, 3, 2),
    (5, 3, 4, 63),
    (18, 9, 5, 31),
    (20, 3, 2, 300),
]

needs_node = pytest.mark.skipif(node.load_error is not None, reason=str(node.load_error))


def problem(sizes, dtype=torch.float64, seed=0, scale=0.5):
    """z, context, weight, bias, and the gradients of z_K and log_det."""
    rows, num_steps, dim, features = sizes
    g = torch.Generator().manual_seed(seed)
    u, w = scale * dim**-0.5 * torch.randn(2, num_steps * dim, 1 + features, generator=g, dtype=torch.float64)
    b = scale * torch.randn(num_steps, 1 + features, generator=g, dtype=torch.float64)
    bias, weight = torch.cat([u, w, b]).split([1, features], 1)
    sizes = (rows, dim), (rows, features), (rows, dim), (rows,)
    z, context, grad_z, grad_log_det = (torch.randn(s, generator=g, dtype=torch.float64) for s in sizes)
    tensors = z, context, weight / math.sqrt(features), bias[:, 0], grad_z, grad_log_det
    return [t.to(dtype).contiguous() for t in tensors]


def oracle(z, context, weight, bias, grad_z, grad_log_det, spec=DEFAULT):
    """z_K, log_det, dz, dcontext, dweight, dbias from the reference, in the problem's dtype."""
    dim = z.shape[1]
    params = unpack(nn.functional.linear(context, weight, bias), len(weight) // (2 * dim + 1), dim)
    z_K, log_det, _ = reference.planar_forward(z, *params, spec)
    dz, du, dw, db = reference.planar_backward(grad_z, grad_log_det, z, *params, spec)
    gradient = torch.cat([du.flatten(1), dw.flatten(1), db], 1)
    return z_K, log_det, dz, gradient @ weight, gradient.t() @ context, gradient.sum(0)


def run(z, context, weight, bias, grad_z, grad_log_det, spec=DEFAULT, params=True):
    """The same of the operators, which take any number of rows."""
    z_K, log_det, saved = headed.headed_forward(z, context, weight, bias, *spec.arguments(), True)
    rest = headed.headed_backward(grad_z, grad_log_det, z, context, weight, bias, saved, *spec.arguments(), params)
    return z_K, log_det, *rest


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sizes", SIZES)
def test_float64_is_the_oracle(isa, sizes):
    p = problem(sizes)
    assert max(relative_errors(run(*p), oracle(*p))) < 1e-10


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("log_det_eps", [0.0, 1e-3])
def test_every_formula(isa, activation, constraint, log_det_eps):
    p, spec = problem((37, 10, 5, 6)), FlowSpec(constraint, activation, 0.3, log_det_eps)
    assert max(relative_errors(run(*p, spec), oracle(*p, spec))) < 1e-10


@pytest.mark.parametrize("size_of_weight", [1.0, 0.2])
@pytest.mark.parametrize("sizes", [(64, 16, 40, 32), (32, 80, 40, 8), (32, 5, 300, 100), (64, 8, 8, 2048)])
def test_accuracy_rule(sizes, size_of_weight):
    """Also of long sums, and where the bias is most of a parameter."""
    ours, loop = {}, []
    for seed in range(DRAWS):
        p = problem(sizes, torch.float32, seed)
        p[2] *= size_of_weight
        wanted = oracle(*(t.double() for t in p))
        loop.append(relative_errors(oracle(*p), wanted))
        for level, got in on_each_isa(lambda p=p: run(*p)).items():
            ours.setdefault(level, []).append(relative_errors(got, wanted))
    for level, errors in ours.items():
        assert_as_accurate(torch.tensor(errors).double(), torch.tensor(loop).double(), level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_strangers(isa, dtype):
    """The bits of a row are those that it has among others, or in another order; NaN stays in its row."""
    z, context, weight, bias, grad_z, grad_log_det = problem((150, 11, 6, 9), dtype)
    whole, order = run(z, context, weight, bias, grad_z, grad_log_det)[:4], torch.randperm(150)
    for keep in (order, order[:1], order[:63], torch.arange(77, 140)):
        some = run(z[keep], context[keep], weight, bias, grad_z[keep], grad_log_det[keep])[:4]
        assert all(torch.equal(x, y[keep]) for x, y in zip(some, whole, strict=True))
    context[149] = math.nan
    ruined = run(z, context, weight, bias, grad_z, grad_log_det)[:4]
    assert all(torch.equal(x[:149], y[:149]) for x, y in zip(ruined, whole, strict=True))
    assert all(t[149].isnan().all() for t in ruined)


@pytest.mark.parametrize("alpha", [-88.0, -1000.0, 1e4])
def test_determinants_that_sink_and_parameters_of_no_size(isa, alpha):
    """w . u far from 0; w = 0 in one step; and where no row is, a determinant of 0 that must not be seen."""
    rows, dim = 21, 2
    w, u = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.1]]), torch.tensor([[alpha, 0.3], [0.5, 0.5], [0.1, 0.2]])
    bias = torch.cat([u.flatten(), w.flatten(), torch.zeros(3)])
    g = torch.Generator().manual_seed(0)
    z, grad_z = torch.randn(2, rows, dim, generator=g)
    p = [z, torch.zeros(rows, 3), torch.zeros(15, 3), bias, grad_z, torch.randn(rows, generator=g)]
    for activation in ("tanh", "linear"):
        spec = FlowSpec("softplus", activation)
        got, wanted = run(*p, spec), oracle(*(t.double() for t in p), spec)
        assert max(relative_errors(got, wanted)) < 1e-4, (
            activation
        )  # h u and h rho / n w are of alpha's size, and cancel
    none = [t.double() for t in (z[:5, :1], torch.zeros(5, 2), torch.zeros(3, 2), torch.tensor([-1.0, 1.0, 0.0]))]
    z_1 = none[0] + 2  # 1 + w . u h' = tanh(z)^2, which is 0 in lanes of zeros alone
    p = [z_1, *none[1:], grad_z[:5, :1].double(), torch.ones(5).double()]
    spec = FlowSpec("none")
    assert max(relative_errors(run(*p, spec), oracle(*p, spec))) < 1e-10


def test_the_bits_do_not_depend_on_threads(isa):
    """Few threads take whole tiles, many take parts of them."""
    before = torch.get_num_threads()
    for rows in (40, 700):
        p, answers = problem((rows, 60, 12, 20), torch.float32), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                answers.append(run(*p))
        finally:
            torch.set_num_threads(before)
        for others in answers[1:]:
            assert all(map(torch.equal, answers[0], others))


def test_dz_alone_has_the_same_bits(isa):
    for sizes in SIZES:
        p = problem(sizes, torch.float32)
        dz, *others = run(*p, params=False)[2:]
        assert torch.equal(dz, run(*p)[2])
        assert all(t.shape == (0,) for t in others)


@pytest.mark.usefixtures("poisoned")
def test_strides():
    p = problem((50, 9, 6, 20), torch.float32)
    wanted = run(*p)
    for i in range(len(p)):
        t = p[i]
        wide = t.new_full((*t.shape, 3), math.nan)
        wide[..., 1] = t
        for strided in (wide[..., 1], t.t().contiguous().t()):
            got = run(*p[:i], strided, *p[i + 1 :])
            assert all(map(torch.equal, got, wanted)), i
    z, context, weight, bias, grad_z, grad_log_det = p
    one = grad_log_det[:1].expand(50)
    got = run(z, context, weight, bias, grad_z, one)
    assert all(map(torch.equal, got, run(z, context, weight, bias, grad_z, one.contiguous())))


@pytest.mark.parametrize("sizes", [(0, 3, 2, 4), (5, 0, 2, 4), (5, 3, 2, 0), (0, 0, 1, 0)])
def test_nothing_to_do(isa, sizes):
    p = problem((max(sizes[0], 1), sizes[1], sizes[2], max(sizes[3], 1)))
    p = [t[: sizes[0]] if i in (0, 1, 4, 5) else t for i, t in enumerate(p)]
    p[1], p[2] = (t[:, : sizes[3]] for t in p[1:3])
    got = run(*p)
    for x, y in zip(got, oracle(*p), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dim", [2, 40, 64, 65, 100, 600])
def test_opcheck(dim):
    *tensors, grad_z, grad_log_det = problem((20, 20, dim, 5), torch.float32)
    arguments = FlowSpec().arguments()
    for save in (True, False):
        torch.library.opcheck(headed.headed_forward, (*tensors, *arguments, save))
    saved = headed.headed_forward(*tensors, *arguments, True)[2]
    spans = {2: 3, 40: 3, 64: 3, 65: 3, 100: 4, 600: 20}[dim]
    assert saved.shape == (20 + (spans - 1) * dim, 20), "a, and z where each span but the first one starts"
    for params in (True, False):
        given = (grad_z, grad_log_det, *tensors, saved, *arguments, params)
        torch.library.opcheck(headed.headed_backward, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(5)}, "z must have rank 2"),
        ({"z": torch.zeros(5, 0)}, "D > 0"),
        ({"z": torch.zeros(5, 3)}, r"weight must have K \(2 D \+ 1\) rows"),
        ({"z": torch.zeros(5, 2).double()}, "context must have z's dtype"),
        ({"z": torch.zeros(5, 2, dtype=torch.int64)}, "float32 or float64"),
        ({"context": torch.zeros(4, 6)}, "context must have size 5 in dimension 0"),
        ({"context": torch.zeros(5, 7)}, "weight must have size 7 in dimension 1"),
        ({"weight": torch.zeros(14, 6)}, r"weight must have K \(2 D \+ 1\) rows"),
        ({"weight": torch.zeros(10, 6)}, "bias must have size 10"),
        ({"bias": torch.zeros(14)}, "bias must have size 15"),
        ({"bias": torch.zeros(15, 1)}, "bias must have rank 1"),
        ({"grad_z": torch.zeros(5, 3)}, "grad_z must have size 2"),
        ({"grad_log_det": torch.zeros(4)}, "grad_log_det must have size 5"),
        ({"grad_log_det": torch.zeros(5).double()}, "grad_log_det must have z's dtype"),
        ({"saved": torch.zeros(2, 5)}, "saved must have size 3"),
        ({"saved": torch.zeros(3, 4)}, "saved must have size 5"),
        ({"saved": torch.zeros(5, 3).t()}, "saved must be contiguous"),
    ],
)
def test_operators_refuse_what_they_would_read_past(change, message):
    sizes = {"grad_z": (5, 2), "grad_log_det": (5,), "z": (5, 2), "context": (5, 6), "weight": (15, 6), "bias": (15,)}
    tensors = {**{name: torch.zeros(shape) for name, shape in sizes.items()}, "saved": torch.zeros(3, 5), **change}
    operator, given = headed.headed_backward, [*tensors.values(), *FlowSpec().arguments()]
    with pytest.raises(RuntimeError, match=message):
        operator(*given)
    if not {"grad_z", "grad_log_det", "saved"} & set(change):
        with pytest.raises(RuntimeError, match=message):
            headed.headed_forward(*given[2:6], *FlowSpec().arguments(), True)


@needs_node
def test_the_function_is_the_operators():
    *tensors, grad_z, grad_log_det = problem((20, 9, 4, 6), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    outputs = headed_planar_flow(*leaves)
    assert {t.grad_fn.name() for t in outputs} == {NODE}
    got = *outputs, *torch.autograd.grad(outputs, leaves, (grad_z, grad_log_det))
    with torch.no_grad():
        assert all(map(torch.equal, got, run(*tensors, grad_z, grad_log_det)))
        assert all(t.grad_fn is None for t in headed_planar_flow(*leaves))
    for i, grads in enumerate(((grad_z, torch.zeros(20)), (torch.zeros(20, 4), grad_log_det))):
        got = torch.autograd.grad(headed_planar_flow(*leaves)[i], leaves, grads[i])
        with torch.no_grad():
            assert all(map(torch.equal, got, run(*tensors, *grads)[2:])), "one output of the two is used"
    frozen = headed_planar_flow(leaves[0], *(t.detach() for t in leaves[1:]))
    assert torch.equal(torch.autograd.grad(frozen[1], leaves[0], grad_log_det)[0], got[0])


def test_gradients_and_their_gradients():
    leaves = [t.requires_grad_() for t in problem((16, 2, 2, 3))[:4]]
    assert gradcheck(headed_planar_flow, leaves)
    assert gradgradcheck(headed_planar_flow, leaves)


def test_tangents_of_incoming_gradients_are_not_lost():
    *tensors, grad_z, grad_log_det = problem((20, 3, 2, 4))
    answers = []
    for backend in (None, "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outputs = headed_planar_flow(*leaves, backend=backend)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(g, g.flip(0)) for g in (grad_z, grad_log_det)]
            answers.append([forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(outputs, leaves, duals)])
    for got, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(got, wanted)


@needs_node
def test_what_a_forward_saves():
    """Its inputs, and for each row K numbers, and D more a span of 8 steps: not K (2 D + 1)."""
    leaves, sizes = [t.requires_grad_() for t in problem((64, 80, 40, 8), torch.float32)[:4]], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        outputs = headed_planar_flow(*leaves)
    assert sorted(sizes) == sorted([*(t.numel() for t in leaves), 64 * (80 + 9 * 40)])
    del outputs


def same(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def apart(z, context, weight, bias, **options):
    dim = z.shape[-1]
    packed = nn.functional.linear(context, weight, bias)
    return packed_planar_flow(z, packed, len(weight) // (2 * dim + 1), dim, **options)


def test_what_it_does_not_take_is_a_head_of_its_own():
    """More dimensions, few rows, halves, autocast, transforms, another backend: the same values."""
    z, context, weight, bias = problem((24, 5, 3, 7), torch.float32)[:4]
    inputs = z, context, weight, bias
    many = z.view(2, 12, 3), context[:12], weight, bias
    few, enough = ((z[:rows], context[:rows], weight.requires_grad_(), bias) for rows in (15, 16))
    for given in (many, (z[0], context[0], weight, bias), few, enough):
        same(headed_planar_flow(*given), apart(*given))
    if node.serves:
        assert [headed_planar_flow(*given)[0].grad_fn.name() == NODE for given in (few, enough)] == [False, True]
    weight.requires_grad_(False)
    same(headed_planar_flow(*inputs, backend="reference"), apart(*inputs))
    halves = [t.bfloat16() for t in inputs]
    same(headed_planar_flow(*halves), apart(*halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(headed_planar_flow(*inputs), apart(*inputs))
    stacked = torch.func.vmap(lambda z: headed_planar_flow(z, context, weight, bias))(torch.stack([z, -z]))
    same([t[1] for t in stacked], apart(-z, context, weight, bias))
    tangents = torch.func.jvp(headed_planar_flow, inputs, inputs)[1]
    same(tangents, torch.func.jvp(apart, inputs, inputs)[1])
    with vvae_fast.use_backend("reference"):
        assert headed_planar_flow(z.requires_grad_(), *inputs[1:])[0].grad_fn.name() != NODE


def test_under_torch_compile_it_has_the_same_bits():
    *tensors, grad_z, grad_log_det = problem((20, 9, 4, 6), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(headed_planar_flow, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*leaves), headed_planar_flow(*leaves)
    assert all(map(torch.equal, got, wanted))
    gradients = [torch.autograd.grad(outputs, leaves, (grad_z, grad_log_det)) for outputs in (got, wanted)]
    assert all(map(torch.equal, *gradients))


@needs_node
def test_without_the_node_it_has_the_same_bits(monkeypatch):
    """Twins: shapes.is_ordinary_headed says what the node's says."""
    *tensors, grad_z, grad_log_det = problem((20, 9, 4, 6), torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    outputs = headed_planar_flow(*leaves)
    wanted = *outputs, *torch.autograd.grad(outputs, leaves, (grad_z, grad_log_det))
    monkeypatch.setattr(autograd, "headed_call", lambda *given: autograd.Call.headed(*given)._replace(node=None))
    outputs = headed_planar_flow(*leaves)
    assert outputs[0].grad_fn.name() == "PlanarFlowFunctionBackward"
    got = *outputs, *torch.autograd.grad(outputs, leaves, (grad_z, grad_log_det), retain_graph=True)
    assert all(map(torch.equal, got, wanted))
    assert gradgradcheck(headed_planar_flow, [t.requires_grad_() for t in problem((16, 1, 2, 2))[:4]])

    class Subclass(torch.Tensor):
        pass

    others = [
        [0.0, None, torch.zeros(()), torch.zeros(20), torch.zeros(20, 4).double(), torch.zeros(20, 4).half()],
        [torch.zeros(20, 0), torch.zeros(4, 5, 4), torch.zeros(20, 4).to_sparse(), torch.zeros(20, 4, device="meta")],
        [torch.zeros(19, 6), torch.zeros(20, 7), torch.zeros(82, 6), torch.zeros(80, 6), torch.zeros(82), tensors[1]],
        [torch.zeros(20, 4).as_subclass(Subclass), nn.Parameter(tensors[0].detach()), tensors[0][::2]],
    ]
    answers = []
    for i, other in itertools.product(range(4), itertools.chain.from_iterable(others)):
        given = [*tensors[:i], other, *tensors[i + 1 :]]
        answers.append(node.is_ordinary_headed(*given))
        assert answers[-1] is shapes.is_ordinary_headed(*given), (i, other)
    assert {*answers} == {True, False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not node.is_ordinary_headed(*tensors)
        assert not shapes.is_ordinary_headed(*tensors)


@needs_node
def test_under_compiled_autograd():
    leaves = [t.requires_grad_() for t in problem((20, 9, 4, 6), torch.float32)[:4]]
    wanted = torch.autograd.grad(sum(t.sum() for t in headed_planar_flow(*leaves)), leaves)
    with compiled_autograd._enable(functools.partial(torch.compile, backend="eager")):
        sum(t.sum() for t in headed_planar_flow(*leaves)).backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(leaves, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": [1.0]}, TypeError, "z must be a torch.Tensor, got list"),
        ({"z": torch.tensor(1.0)}, ValueError, "z must have shape [*batch, D] with D >= 1, got ()"),
        ({"z": torch.zeros(5, 3)}, ValueError, "weight must be [K (2 D + 1), F] with 2 D + 1 = 7"),
        ({"z": torch.zeros(5, 2).double()}, TypeError, "must share one dtype outside torch.autocast, got z"),
        ({"context": torch.zeros(5, 7)}, ValueError, "F as context (5, 7) has, got (15, 6)"),
        ({"context": torch.zeros(4, 6)}, ValueError, "context's leading dimensions must be the trailing batch"),
        ({"context": torch.zeros(5, 6).int()}, TypeError, "context must be float32"),
        ({"weight": torch.zeros(14, 6)}, ValueError, "got (14, 6)"),
        ({"weight": torch.zeros(15)}, ValueError, "got (15,)"),
        ({"bias": None}, TypeError, "bias must be a torch.Tensor, got NoneType"),
        ({"bias": torch.zeros(1)}, ValueError, "bias must be [K (2 D + 1)] = (15,), as weight has rows, got (1,)"),
        ({"activation": "relu"}, ValueError, "activation must be one of"),
        ({"activation": ["tanh"]}, ValueError, "activation must be one of"),
        ({"log_det_eps": -1.0}, ValueError, "log_det_eps must be"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_refused_arguments(change, error, message):
    given = {"z": torch.zeros(5, 2), "context": torch.zeros(5, 6), "weight": torch.zeros(15, 6)}
    with pytest.raises(error, match=re.escape(message)):
        headed_planar_flow(**{**given, "bias": torch.zeros(15), **change})
