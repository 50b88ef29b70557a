"""AmortizedPlanarFlow with a head of low rank."""

import copy
import pickle
import re

import pytest
import torch
from test_modules import away_from_identity
from torch import nn

from vvae_fast import VAE, AmortizedHouseholderFlow, AmortizedPlanarFlow, AmortizedSylvesterFlow
from vvae_fast.nn import mlp_decoder, mlp_encoder, planar

DIM, STEPS, FEATURES, RANK, ROWS = 3, 5, 12, 4, 7
SMALLEST = DIM * 2 + 1  # the outputs of one step


def make(rank=RANK, **options):
    torch.manual_seed(0)
    return AmortizedPlanarFlow(DIM, STEPS, FEATURES, rank=rank, **options)


def inputs(dtype=torch.float32, requires_grad=False):
    g = torch.Generator().manual_seed(1)
    shapes = ((ROWS, DIM), (ROWS, FEATURES))
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def product_of(flow):
    """A flow with a full head, whose weight is the product of the two."""
    full = AmortizedPlanarFlow(flow.dim, flow.num_steps, flow.context_dim).to(flow.head.up.weight.dtype)
    full.load_state_dict(
        {"head.weight": flow.head.up.weight @ flow.head.down.weight, "head.bias": flow.head.up.bias.detach()}
    )
    return full


@pytest.mark.parametrize("constraint", ["softplus", "log_softplus", "none"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_starts_as_the_identity_for_every_context(size, constraint):
    flow = make(constraint=constraint)
    z, context = inputs()
    z_K, log_det = flow(z, size * context)
    torch.testing.assert_close(z_K, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(ROWS), rtol=0, atol=1e-5)
    assert flow.params(size * context)[2].std(0).min() > 0.01 * size, "the hyperplanes depend on the context"


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_how_far_b_varies(rank):
    """Its root mean square over contexts and heads: 1 / 3 for contexts of unit variance, 1 / sqrt(3) a layer."""
    g = torch.Generator().manual_seed(0)
    context = torch.randn(200, 300, generator=g)
    torch.manual_seed(0)
    squares = []
    for _ in range(40):
        flow = AmortizedPlanarFlow(2, 64, 300, rank=rank)
        _, _, b = flow.params(context)
        squares.append((b - flow.head.up.bias[-64:]).square().mean().item())
    assert 0.9 < 3 * (sum(squares) / len(squares)) ** 0.5 < 1.1


def test_a_full_head_draws_what_it_always_drew():
    flow = make(rank=None)
    torch.manual_seed(0)
    w = torch.empty(STEPS, DIM).normal_(std=DIM**-0.5)
    b = torch.randn(STEPS)
    of_b = torch.empty(STEPS, FEATURES).uniform_(-(FEATURES**-0.5), FEATURES**-0.5)
    assert list(flow.state_dict()) == ["head.weight", "head.bias"]
    assert torch.equal(flow.head.bias[STEPS * DIM :], torch.cat([w.flatten(), b]))
    assert torch.equal(flow.head.weight[2 * STEPS * DIM :], of_b)
    assert not flow.head.weight[: 2 * STEPS * DIM].any()


def test_the_start_can_be_left():
    """head.down has no gradient in the first step, where only b's rows of head.up are not zero; then everything has."""
    flow = make()
    for _ in range(2):
        flow.zero_grad()
        z_K, log_det = flow(*inputs())
        (z_K.square().sum() - log_det.sum()).backward()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter -= 0.1 * parameter.grad
    for name, parameter in flow.named_parameters():
        assert parameter.grad.abs().max() > 1e-3, name


@pytest.mark.parametrize("samples", [(), (6,)])
def test_is_a_full_head_whose_weight_is_the_product(samples):
    flow = away_from_identity(make().double())
    full, (z, context) = product_of(flow), inputs(torch.float64)
    z = torch.randn(*samples, ROWS, DIM, dtype=torch.float64)
    results = []
    for module in (flow, full):
        leaves = [z.clone().requires_grad_(), context.clone().requires_grad_()]
        z_K, log_det = module(*leaves)
        (z_K.square().sum() - log_det.sum()).backward()
        results.append([z_K, log_det, *module.inverse(z, context), *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
    up, down, weight = flow.head.up.weight, flow.head.down.weight, full.head.weight
    torch.testing.assert_close(up.grad, weight.grad @ down.t())
    torch.testing.assert_close(down.grad, up.t() @ weight.grad)
    torch.testing.assert_close(flow.head.up.bias.grad, full.head.bias.grad)
    for way in ("u_hat", "params"):
        torch.testing.assert_close(getattr(flow, way)(context), getattr(full, way)(context))


def test_the_flow_takes_the_heads_output_as_it_is(monkeypatch):
    flow, outputs, taken = make(), [], []
    flow.head.up.register_forward_hook(lambda module, given, output: outputs.append(output))
    call = planar.packed_planar_flow
    monkeypatch.setattr(
        planar, "packed_planar_flow", lambda z, packed, *a, **k: taken.append(packed) or call(z, packed, *a, **k)
    )
    _, context = inputs()
    flow(*inputs())
    u, w, b = flow.params(context)
    assert taken[0] is outputs[0]
    assert {t.untyped_storage().data_ptr() for t in (u, w, b)} == {outputs[1].untyped_storage().data_ptr()}


def test_state_dicts_pickles_and_copies():
    flow = away_from_identity(make())
    assert {name: tuple(x.shape) for name, x in flow.state_dict().items()} == {
        "head.down.weight": (RANK, FEATURES),
        "head.up.weight": (STEPS * SMALLEST, RANK),
        "head.up.bias": (STEPS * SMALLEST,),
    }
    fresh = make()
    fresh.load_state_dict(flow.state_dict())
    for other in (fresh, pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        for got, wanted in zip(other(*inputs()), flow(*inputs()), strict=True):
            assert torch.equal(got, wanted)
    full = make(rank=None)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.down\.weight"):
        fresh.load_state_dict(full.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*head\.down\.weight"):
        full.load_state_dict(flow.state_dict())


def test_pickles_that_name_the_heads_old_home():
    assert planar._Head is type(make(rank=None).head)
    pickled = pickle.dumps(make(rank=None), protocol=2)
    old = pickle.loads(pickled.replace(b"cvvae_fast.nn.base\nHead\n", b"cvvae_fast.nn.planar\n_Head\n"))
    assert torch.equal(old(*inputs())[0], make(rank=None)(*inputs())[0])


def test_modules_from_before_there_was_a_rank():
    """Those that were pickled as a whole have no such attribute."""
    flow = make(rank=None)
    del flow.__dict__["rank"]
    old = pickle.loads(pickle.dumps(flow))
    assert repr(old) == repr(make(rank=None))
    old.reset_parameters()
    assert old(*inputs())[0].shape == (ROWS, DIM)


@pytest.mark.parametrize(
    ("error", "message", "rank", "steps"),
    [
        (ValueError, "rank must be at least 1, got 0", 0, STEPS),
        (TypeError, "rank must be an int, got float", 4.0, STEPS),
        (TypeError, "rank must be an int, got bool", True, STEPS),
        (ValueError, "rank must be at most min(F, K (2 D + 1)) = 12, got 13: use rank=None", FEATURES + 1, STEPS),
        (ValueError, "rank must be at most min(F, K (2 D + 1)) = 7, got 8: use rank=None", SMALLEST + 1, 1),
        (ValueError, "rank must be at most min(F, K (2 D + 1)) = 0, got 1: use rank=None", 1, 0),
    ],
)
def test_refused_ranks(error, message, rank, steps):
    with pytest.raises(error, match=re.escape(message)):
        AmortizedPlanarFlow(DIM, steps, FEATURES, rank=rank)


@pytest.mark.parametrize(("steps", "rank"), [(STEPS, FEATURES), (1, SMALLEST)])
def test_the_largest_ranks(steps, rank):
    assert AmortizedPlanarFlow(DIM, steps, FEATURES, rank=rank)(*inputs())[0].shape == (ROWS, DIM)


def test_repr_names_the_rank():
    assert repr(make()).startswith("AmortizedPlanarFlow(\n  dim=3, num_steps=5, context_dim=12, rank=4\n")
    assert "dim=3, num_steps=5, context_dim=12\n" in repr(make(rank=None))
    assert "context_dim=12, rank=4, activation='elu'" in repr(make(activation="elu"))


def test_a_head_of_ones_own_in_its_place():
    flow = make()
    flow.head = nn.Linear(FEATURES, STEPS * SMALLEST)
    assert flow(*inputs())[0].shape == (ROWS, DIM)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision(dtype, digits):
    half = away_from_identity(make()).to(dtype)
    wide = copy.deepcopy(half).float()
    z, context = inputs(dtype)
    for z_in in (z, z.float()):
        z_K, log_det = half(z_in, context)
        assert (z_K.dtype, log_det.dtype) == (z_in.dtype, torch.float32)
        wanted = wide(z.float(), context.float())
        torch.testing.assert_close(z_K.float(), wanted[0], rtol=0.0, atol=2.0 ** (5 - digits))
        torch.testing.assert_close(log_det, wanted[1], rtol=0.0, atol=2.0 ** (5 - digits))


def test_autocast_and_compile():
    flow = away_from_identity(make())
    wanted = flow(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_K, log_det = flow(*inputs())
    assert (z_K.dtype, log_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(z_K, wanted[0], rtol=0.1, atol=0.1)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs()), wanted)


def test_in_a_vae():
    torch.manual_seed(0)
    flow = AmortizedPlanarFlow(DIM, STEPS, FEATURES, rank=RANK)
    vae = VAE(mlp_encoder(16, FEATURES), mlp_decoder(DIM, FEATURES, 16), DIM, flow)
    plain = VAE(copy.deepcopy(vae.encoder), copy.deepcopy(vae.decoder), DIM, product_of(flow))
    plain.load_state_dict({**vae.state_dict(), **plain.flow.state_dict(prefix="flow.")}, strict=False)
    x, noise = torch.randint(0, 2, (ROWS, 16)).float(), torch.randn(ROWS, DIM)
    torch.testing.assert_close(vae(x, noise=noise), plain(x, noise=noise))


NORMED = {"layer_norm": True}


def layer_normed(h):
    """docs/math.md (66)."""
    h = h - h.mean(-1, keepdim=True)
    return 32 / h.shape[-1] * h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("rank", [2, RANK, FEATURES])
def test_up_reads_rows_of_mean_0_and_one_size(rank):
    flow, (_, context) = away_from_identity(make(rank, **NORMED).double()), inputs(torch.float64)
    head = flow.head
    wanted = layer_normed(context @ head.down.weight.t()) @ head.up.weight.t() + head.up.bias
    torch.testing.assert_close(torch.cat([t.flatten(1) for t in flow.params(context)], -1), wanted)
    torch.testing.assert_close(flow.params(1e6 * context), flow.params(1e3 * context), rtol=1e-7, atol=1e-7)


def test_a_layer_norm_is_in_the_repr_and_not_in_the_state_dict():
    assert list(make(**NORMED).state_dict()) == list(make().state_dict())
    assert (make(**NORMED).layer_norm, make().layer_norm) == (True, False)
    assert "rank=4, layer_norm=True" in repr(make(**NORMED))
    assert "layer_norm" not in repr(make()) + repr(make(None))


def test_how_far_b_varies_with_a_layer_norm():
    """As without one: a root mean square of 1 / 3."""
    torch.manual_seed(0)
    context = torch.randn(200, 300)
    flow = AmortizedPlanarFlow(2, 2048, 300, rank=64, **NORMED)
    b = flow.params(context)[2] - flow.head.up.bias[-2048:]
    assert 0.95 < 3 * b.square().mean().sqrt() < 1.05


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e9])
def test_normed_heads_start_as_the_identity(size):
    flow, (z, context) = make(**NORMED), inputs()
    z_K, log_det = flow(z, size * context)
    torch.testing.assert_close(z_K, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(ROWS), rtol=0, atol=1e-5)
    if size >= 1:
        assert flow.params(size * context)[2].std(0).min() > 0.01, "the hyperplanes depend on the context"


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_state_dict_of_the_other_kind_is_refused(layer_norm):
    """An older version's, too, which had no layer norm. A plain dict does not say of which kind it is."""
    flow = away_from_identity(make(layer_norm=layer_norm))
    make(layer_norm=layer_norm).load_state_dict(flow.state_dict())
    other = make(layer_norm=not layer_norm)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"head.up is of a flow with layer_norm={layer_norm}: make the flow"):
            other.load_state_dict(flow.state_dict(), strict=strict)
    other.load_state_dict(dict(flow.state_dict()))


def test_normed_heads_have_all_gradients():
    flow, (z, context) = away_from_identity(make(**NORMED).double()), inputs(torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flow, (z, context))
    context = torch.zeros(ROWS, FEATURES, requires_grad=True)
    sum(x.sum() for x in make(**NORMED)(inputs()[0], context)).backward()
    assert torch.isfinite(context.grad).all()


def test_normed_heads_in_half_precision_autocast_and_compile():
    flow, (z, context) = away_from_identity(make(**NORMED)), inputs()
    wanted = flow(z, context)
    half = copy.deepcopy(flow).to(torch.bfloat16)
    torch.testing.assert_close(half(z, context.bfloat16())[0], wanted[0], rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_K, log_det = flow(z, context)
    assert (z_K.dtype, log_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(z_K, wanted[0], rtol=0.1, atol=0.1)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, context), wanted)


def test_modules_from_before_there_was_a_layer_norm():
    flow = away_from_identity(make())
    wanted = flow(*inputs())
    del flow.__dict__["layer_norm"]
    torch.testing.assert_close(pickle.loads(pickle.dumps(flow))(*inputs()), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("error", "message", "rank", "layer_norm"),
    [
        (ValueError, "layer_norm=True wants a rank of at least 2, got rank=None: leave layer_norm out", None, True),
        (ValueError, "layer_norm=True wants a rank of at least 2, got rank=1: leave layer_norm out", 1, True),
        (TypeError, "layer_norm must be a bool, got int", 4, 1),
        (TypeError, "layer_norm must be a bool, got NoneType", 4, None),
    ],
)
def test_refused_layer_norms(error, message, rank, layer_norm):
    with pytest.raises(error, match=re.escape(message)):
        make(rank, layer_norm=layer_norm)


@pytest.mark.parametrize("family", [AmortizedSylvesterFlow, AmortizedHouseholderFlow])
def test_other_families_have_it_too(family):
    torch.manual_seed(0)
    sizes = (DIM, 2, 2) if family is AmortizedSylvesterFlow else (DIM, 4)
    flow, (z, context) = family(*sizes, FEATURES, rank=RANK, **NORMED), inputs()
    assert "rank=4, layer_norm=True" in repr(flow)
    torch.testing.assert_close(flow(z, context)[0], z, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    torch.testing.assert_close(flow(z, 1e3 * context), flow(z, 1e2 * context), rtol=1e-3, atol=1e-3)
    assert not torch.equal(flow(z, context)[0], z)
