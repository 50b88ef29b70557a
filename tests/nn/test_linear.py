"""The head's linear layer: the same values and gradients as nn.Linear's, whichever library computes them, and in a
headed flow."""

import copy
import itertools

import pytest
import torch
from torch import nn

from vvae_fast import AmortizedPlanarFlow
from vvae_fast.functional import packed_planar_flow
from vvae_fast.nn import linear

SIZES = ((100, 400), (7, 300, 90))  # x; each is above and below the least work with the two widths below
WIDTHS = (3, 1296)


class NarrowLinear(linear.Linear):
    narrow = True


def both(shape, width, dtype=torch.float32, kind=linear.Linear):
    g = torch.Generator().manual_seed(0)
    layer = kind(shape[-1], width, dtype=dtype)
    plain = nn.Linear(shape[-1], width, dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    return layer, plain, torch.randn(shape, generator=g, dtype=dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("kind", [linear.Linear, NarrowLinear])
def test_is_nn_linear(shape, width, kind):
    layer, plain, x = both(shape, width, kind=kind)
    results = []
    for module in (layer, plain):
        inputs = (x.clone().requires_grad_(), module.weight, module.bias)
        y = module(inputs[0])
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        results.append([y, *first, *torch.autograd.grad(first[0].square().sum(), inputs[:2])])
    for got, wanted in zip(*results, strict=True):
        assert got.stride() == wanted.stride()
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.skipif(linear._onednn is None, reason="this PyTorch has no entry to oneDNN")
def test_large_products_go_to_onednn(monkeypatch):
    layer, _, x = both((100, 400), 1296)
    assert "OneDnnLinear" in type(layer(x).grad_fn).__name__
    assert "Addmm" in type(layer(x[:1]).grad_fn).__name__
    narrow, _, few = both((100, 32), 1296)  # K = 16 of rank 32: the call would cost more than the products
    assert "Addmm" in type(narrow(few).grad_fn).__name__
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert "Addmm" in type(layer(x).grad_fn).__name__


@pytest.mark.skipif(linear._onednn is None, reason="this PyTorch has no entry to oneDNN")
@pytest.mark.parametrize(("kind", "calls"), [(linear.Linear, 3), (NarrowLinear, 2)])
def test_a_narrow_layers_gradient_is_not_copied_for_onednn(monkeypatch, kind, calls):
    """Forward, the gradient of x and, if the layer is not narrow, that of the weight."""
    layer, _, x = both((1000, 32), 1296, kind=kind)
    counted, product = [], linear._product
    monkeypatch.setattr(linear, "_product", lambda *given: counted.append(given) or product(*given))
    layer(x.requires_grad_()).sum().backward()
    assert len(counted) == calls


def test_what_onednn_does_not_serve_is_nn_linear():
    layer, plain, x = both((100, 400), 1296)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), plain(x))
    params = dict(layer.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(layer, p, x).sum())(params)
    torch.testing.assert_close(jacobian["bias"], torch.full((1296,), 100.0))
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangent, x @ layer.weight.t(), rtol=1e-4, atol=1e-4)
    layer, plain, x = both((100, 400), 1296, torch.float64)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("bias", [None, torch.randn(2592)[::2], torch.randn(1).expand(1296), torch.randn(1)])
def test_biases_that_onednn_does_not_take(bias):
    layer, _, x = both((100, 400), 1296)
    layer.bias = None if bias is None else nn.Parameter(bias)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, bias))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.new_empty(100, 800)[:, ::2].copy_(x),
        lambda x: x[:1].expand(100, 400),
        lambda x: x.flatten()[:2000].unfold(0, 400, 16),
        lambda x: x.flip(0)[::1],
    ],
    ids=["transposed", "strided", "expanded", "overlapping", "flipped"],
)
def test_layouts(layout):
    """Of the input, the weight and the incoming gradient."""
    layer, plain, x = both((100, 400), 1296)
    x, weight = layout(x), plain.weight.detach().t().contiguous().t()
    for module in (layer, plain):
        module.weight = nn.Parameter(weight)
    answers = []
    for module in (layer, plain):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        answers.append([y, *torch.autograd.grad(y, (leaf, module.weight, module.bias), torch.ones(()).expand_as(y))])
    for got, wanted in zip(*answers, strict=True):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("shape", [(100, 400), (4, 30, 400)])
def test_the_output_may_be_changed_in_place(shape):
    layer, _, x = both(shape, 1296)
    layer(x).mul_(2).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((1296,), 2.0 * x[..., 0].numel()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_tracing():
    layer, plain, x = both((100, 400), 1296)
    assert torch.equal(torch.jit.trace(layer, (x,))(x), plain(x))


def test_only_what_is_needed_is_computed():
    layer, _, x = both((100, 400), 1296)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((1296,), 100.0))


class MeanOfRows(nn.Module):
    def forward(self, x):
        return x.mean(0)


class Halved(nn.Module):
    def forward(self, x):
        return x.bfloat16()


def headed(flow, width=12):
    """Whether the flow computes its head's last layer itself: the layer's weight goes into the flow's node."""
    z, context = (torch.randn(20, size, dtype=next(flow.parameters()).dtype) for size in (3, width))
    z_K, _ = flow(z, context)
    parameters = {id(p) for p in flow.parameters()}
    return any(id(getattr(edge, "variable", None)) in parameters for edge, _ in z_K.grad_fn.next_functions)


def same(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def flows():
    for rank, normalise, layer_norm in itertools.product((None, 4), (False, True), (False, True)):
        if rank or not layer_norm:
            yield AmortizedPlanarFlow(3, 5, 12, rank=rank, normalise=normalise, layer_norm=layer_norm)


def test_modules_take_it_with_every_kind_of_head():
    z, context = torch.randn(20, 3).double(), torch.randn(20, 12).double().requires_grad_()
    for flow in flows():
        flow.double()
        nn.init.normal_(flow._last().weight, std=0.3)
        apart = copy.deepcopy(flow)
        apart._last().register_forward_hook(lambda *given: None)
        answers = []
        for module in (flow, apart):
            outputs = module(z, context)
            gradients = torch.autograd.grad(sum(t.sum() for t in outputs), [context, *module.parameters()])
            answers.append([*outputs, *gradients])
        assert headed(flow)
        assert not headed(apart)
        same(*answers)


def test_a_wide_layer_is_a_product_of_its_own():
    """One of a rank is not, however wide its context."""
    assert headed(AmortizedPlanarFlow(3, 5, 192).double(), 192)
    assert not headed(AmortizedPlanarFlow(3, 5, 193).double(), 193)
    assert headed(AmortizedPlanarFlow(3, 5, 193, rank=4).double(), 193)


@pytest.mark.parametrize("width", [12, 193])
def test_a_usual_call_is_checked_once(monkeypatch, width):
    asked, is_usual = [], AmortizedPlanarFlow._is_usual
    monkeypatch.setattr(AmortizedPlanarFlow, "_is_usual", lambda *given: asked.append(given) or is_usual(*given))
    AmortizedPlanarFlow(3, 5, width)(torch.randn(20, 3), torch.randn(20, width))
    assert len(asked) == 1


def test_a_head_that_does_more_than_its_product_is_called():
    """Hooks, a forward of one's own, a parametrization or another module see every call; a wrong size is refused."""
    z, context = torch.randn(20, 3).double(), torch.randn(20, 12).double()

    def changed(change, rank=None):
        flow = AmortizedPlanarFlow(3, 5, 12, rank=rank)
        change(flow)
        return flow.double()

    def global_hook(flow):
        handles.append(nn.modules.module.register_module_forward_hook(lambda *given: None))

    def forward(flow):
        flow.head.forward = flow.head.forward

    handles = []
    kinds = [
        lambda flow: flow.head.register_forward_hook(lambda *given: None),
        lambda flow: flow.head.register_forward_pre_hook(lambda *given: None),
        lambda flow: flow.head.register_full_backward_hook(lambda *given: None),
        lambda flow: flow.head.register_full_backward_pre_hook(lambda *given: None),
        lambda flow: nn.utils.parametrizations.weight_norm(flow.head),
        lambda flow: setattr(flow, "head", nn.Linear(12, 35, bias=False)),
        lambda flow: setattr(flow, "head", nn.Sequential(nn.Linear(12, 35), nn.Tanh())),
        lambda flow: flow.head.compile(backend="eager"),
        forward,
        global_hook,
    ]
    for change in kinds:
        flow = changed(change)
        assert not headed(flow)
        for handle in handles:
            handle.remove()
    inner = changed(lambda flow: flow.head.register_forward_hook(lambda *given: None), rank=2)
    assert not headed(inner)
    own = changed(lambda flow: setattr(flow, "head", nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 35))))
    assert headed(own), "a head of one's own that ends in a linear layer"
    same(own(z, context), packed_planar_flow(z, own.head(context), 5, 3))
    calls = []
    down = changed(lambda flow: flow.head.down.register_forward_hook(lambda *given: calls.append(given)), rank=2)
    assert headed(down)
    assert len(calls) == 1, "the first layer is called as ever"
    wrong = changed(lambda flow: setattr(flow, "head", AmortizedPlanarFlow(3, 6, 12).head))
    fewer = changed(lambda flow: setattr(flow, "head", nn.Sequential(MeanOfRows(), nn.Linear(12, 35))))
    half = changed(lambda flow: setattr(flow, "head", nn.Sequential(nn.Linear(12, 8), Halved(), nn.Linear(8, 35))))
    half.float().head[2].bfloat16()
    many = half(z.float().expand(2, 20, 3), context.float())
    torch.testing.assert_close([t[0] for t in many], list(half(z.float(), context.float())), rtol=1e-2, atol=1e-2)
    broadcast = changed(lambda flow: setattr(flow.head, "bias", nn.Parameter(torch.ones(1))))
    assert not headed(broadcast)
    for flow in (wrong, fewer):
        with pytest.raises(ValueError, match="head must give"):
            flow(z, context)
