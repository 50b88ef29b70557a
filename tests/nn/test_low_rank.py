"""AmortizedPlanarFlow with a head of low rank."""

import copy
import pickle
import re

import pytest
import torch
from test_modules import away_from_identity
from torch import nn

from vvae_fast import VAE, AmortizedPlanarFlow
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
