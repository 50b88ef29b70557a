"""with_rank: a trained flow's head cut to a rank."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

from vvae_fast import VAE, AmortizedHouseholderFlow, AmortizedPlanarFlow, AmortizedSylvesterFlow, planar_flow
from vvae_fast.nn import mlp_decoder, mlp_encoder
from vvae_fast.nn.linear import nearest_of_rank

DIM, FEATURES, ROWS = 3, 12, 500
FAMILIES = {
    "planar": lambda **options: AmortizedPlanarFlow(DIM, 5, FEATURES, **options),
    "planar, none": lambda **options: AmortizedPlanarFlow(DIM, 5, FEATURES, constraint="none", **options),
    "sylvester": lambda **options: AmortizedSylvesterFlow(DIM, 2, 2, FEATURES, **options),
    "householder": lambda **options: AmortizedHouseholderFlow(DIM, 4, FEATURES, **options),
}
families = pytest.mark.parametrize("family", FAMILIES)


def trained(family="planar", dtype=torch.float64, size=0.3, **options):
    """A flow away from its start, as after a training."""
    torch.manual_seed(0)
    flow = FAMILIES[family](**options).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return flow


def inputs(rows=ROWS, dtype=torch.float64):
    """z, and contexts that are not of mean 0, and vary more in some directions."""
    g = torch.Generator().manual_seed(1)
    z, context = torch.randn(rows, DIM, generator=g), torch.randn(rows, FEATURES, generator=g)
    mixed = context * torch.linspace(0.1, 1.5, FEATURES) @ torch.randn(FEATURES, FEATURES, generator=g)
    return z.to(dtype), (0.3 * mixed + 1.0).to(dtype)


def of_true_rank(rank, **options):
    """A flow with a full head whose weight has this rank."""
    flow = trained(**options)
    with torch.no_grad():
        left, right = torch.randn(len(flow.head.weight), rank).double(), torch.randn(rank, FEATURES).double()
        flow.head.weight.copy_(0.1 * left @ right)
    return flow


def far(flow, other, z, context):
    """The mean squared distance of what two flows make of the same points."""
    with torch.no_grad():
        return sum((a - b).square().mean().item() for a, b in zip(flow(z, context), other(z, context), strict=True))


@families
@pytest.mark.parametrize("options", [{}, {"normalise": True}], ids=["", "normalise"])
def test_a_head_that_has_the_rank_stays_what_it_is(family, options):
    flow, (z, context) = of_true_rank(4, family=family, **options), inputs()
    cut = flow.with_rank(4, z, context)
    torch.testing.assert_close(cut(z, context), flow(z, context))
    torch.testing.assert_close(cut(z, -3 * context), flow(z, -3 * context))  # other contexts, too
    assert (cut.rank, cut.normalise, cut.layer_norm) == (4, flow.normalise, False)
    assert [name for name, _ in cut.named_parameters()] == ["head.down.weight", "head.up.weight", "head.up.bias"]


@families
def test_a_larger_rank_is_nearer(family):
    flow, (z, context) = trained(family, size=0.1), inputs()
    largest = min(FEATURES, len(flow.head.weight))
    distances = [far(flow.with_rank(rank, z, context), flow, z, context) for rank in (1, 3, 6, largest)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-12 < 1e-4 < distances[0]


def test_the_contexts_decide():
    """For contexts that vary in 3 directions of 12 a rank of 3 is nearly exact; a cut of the weight alone is not."""
    flow, (z, context) = trained(), inputs()
    g = torch.Generator().manual_seed(2)
    few = 1.0 + context[:, :3] @ torch.randn(3, FEATURES, generator=g, dtype=torch.float64)
    cut = flow.with_rank(3, z, few)
    plain = copy.deepcopy(flow)
    left, values, right = torch.linalg.svd(flow.head.weight.detach(), full_matrices=False)
    with torch.no_grad():
        plain.head.weight.copy_(left[:, :3] * values[:3] @ right[:3])
    assert far(cut, flow, z, few) < 1e-4 * far(plain, flow, z, few)


def test_the_outputs_that_move_points_decide():
    """Half the steps have u_hat = 0: what their w and b are moves nothing, and takes no rank away from the others."""
    flow = trained("planar, none", size=0.1)
    with torch.no_grad():
        for parameter in (flow.head.weight, flow.head.bias):
            u, w, _ = (part.unflatten(0, (5, -1)) for part in parameter.split([5 * DIM, 5 * DIM, 5]))
            u[:3] = 0.0
            w[:3] *= 10.0
    z, context = inputs()
    by_movement = far(flow.with_rank(4, z, context), flow, z, context)
    factors = nearest_of_rank(*(t.detach() for t in (flow.head.weight, flow.head.bias)), context, 4, torch.ones(35), 1)
    alike = flow.with_rank(4, z, context)
    with torch.no_grad():
        for parameter, values in zip(alike.parameters(), factors, strict=True):
            parameter.copy_(values)
    assert by_movement < 0.5 * far(alike, flow, z, context)


@pytest.mark.parametrize("options", [{}, {"normalise": True}], ids=["", "normalise"])
def test_no_head_of_the_rank_is_nearer(options):
    """The weighted error is the least one: the sum of the squared singular values that are left out, (68)."""
    flow, (z, context) = trained(**options), inputs()
    x = flow.head.inputs(context)
    counts = flow._movement(z, flow.head(context).detach())
    counts = counts + 1e-3 * counts.mean()
    covariance = torch.cov(x.t(), correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.sqrt() @ vectors.t()
    left_out = torch.linalg.svdvals(counts.sqrt()[:, None] * flow.head.weight.detach() @ root)[4:].square().sum()
    cut = flow.with_rank(4, z, context)
    error = ((cut.head(context) - flow.head(context)).detach().square() * counts).sum(1).mean()
    torch.testing.assert_close(error, left_out, rtol=1e-3, atol=0)


@pytest.mark.parametrize("mean", [1.0, 100.0, 1e4])
def test_a_large_mean_hides_nothing(mean):
    """Of contexts that vary in 3 directions."""
    flow, (z, context) = trained(size=0.1), inputs()
    g = torch.Generator().manual_seed(2)
    varying = context[:, :3] @ torch.randn(3, FEATURES, generator=g, dtype=torch.float64)
    with torch.no_grad():
        flow.head.bias -= flow.head.weight.sum(1) * mean
    cut = flow.with_rank(3, z, mean + varying)
    assert far(cut, flow, z, mean + varying) < 1e-4 * far(flow, lambda z, _: (z, torch.zeros(ROWS)), z, mean + varying)


def test_movement_is_the_mean_squared_derivative():
    """docs/math.md (69), by the whole Jacobian of z_K and log_det in place of one direction a row."""
    flow, (z, context) = trained(size=0.02), inputs(8_000)

    def moved(packed, z):
        u, w, b = packed.split([5 * DIM, 5 * DIM, 5])
        z_K, log_det = planar_flow(z[None], u.view(5, DIM), w.view(5, DIM), b, backend="reference")
        return torch.cat([z_K[0], log_det])

    with torch.no_grad():
        packed = flow.head(context)
    wanted = vmap(jacrev(moved))(packed, z).square().sum(1).mean(0)  # of [N, D + 1, outputs]
    assert wanted.max() > 10 * wanted.min()
    torch.testing.assert_close(flow._movement(z, packed), wanted, rtol=0.15, atol=0)


def test_what_up_reads_has_one_size_for_every_rank():
    """(66)'s: so that a step of Adam moves a flow that is trained on by as much."""
    flow, (z, context) = trained(), inputs()
    for rank in (1, 2, 8):
        read = flow.with_rank(rank, z, context).head.down(context)
        torch.testing.assert_close(read.square().mean().sqrt().item(), 32 / rank)


def test_a_rank_can_be_cut_again():
    flow, (z, context) = trained(rank=8), inputs()
    cut = flow.with_rank(5, z, context)
    assert 0 < far(cut, flow, z, context) < far(flow.with_rank(2, z, context), flow, z, context)
    with pytest.raises(ValueError, match=r"rank must be below the flow's own, 8, got 8: a larger one adds nothing"):
        flow.with_rank(8, z, context)


def test_the_flow_stays_as_it_is():
    flow, (z, context) = trained(), inputs()
    flow.head.weight.requires_grad_(False)
    flow.eval()
    before, generator = copy.deepcopy(flow.state_dict()), torch.get_rng_state()
    cut = flow.with_rank(2, z, context)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: x.tolist() for name, x in flow.state_dict().items()} == {n: x.tolist() for n, x in before.items()}
    assert not cut.training
    assert not cut.head.up.training
    assert [p.requires_grad for p in cut.parameters()] == [False, False, True]
    assert all(p.grad is None for p in (*flow.parameters(), *cut.parameters()))
    again = flow.with_rank(2, z, context)
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    flow = of_true_rank(4, dtype=dtype, size=0.1)
    z, context = inputs(dtype=dtype)
    cut = flow.with_rank(4, z.float(), context)
    assert {p.dtype for p in cut.parameters()} == {dtype}
    wide = copy.deepcopy(flow).double()
    z, context = inputs()
    error = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    moved = far(wide, lambda z, _: (z, torch.zeros(ROWS)), z, context)
    assert far(cut.double(), wide, z, context) < error**2 * moved


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows(rows):
    """Fewer than features: what they do not show is taken to vary a little in every direction."""
    flow = trained(size=0.1)
    z, context = inputs(rows)
    cut = flow.with_rank(6, z, context)
    torch.testing.assert_close(cut(z, context), flow(z, context), rtol=1e-2, atol=1e-3)
    z, context = inputs(50)
    assert all(t.isfinite().all() for t in cut(z, context))


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
def test_contexts_that_do_not_vary(value):
    flow, (z, context) = trained(size=0.1), inputs()
    same = torch.full_like(context, value)
    cut = flow.with_rank(3, z, same)
    torch.testing.assert_close(cut(z, same), flow(z, same), rtol=1e-6, atol=1e-6)
    assert all(p.isfinite().all() for p in cut.parameters())


def test_a_new_flow_is_cut_to_a_new_flow():
    """At the start only u moves points, and b alone depends on the context."""
    torch.manual_seed(0)
    flow, (z, context) = AmortizedPlanarFlow(DIM, 5, FEATURES).double(), inputs()
    cut = flow.with_rank(5, z, context)
    torch.testing.assert_close(cut(z, context), (z, torch.zeros(ROWS, dtype=torch.float64)), rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.params(context), flow.params(context))


def test_it_trains_on_and_is_saved():
    flow, (z, context) = trained(dtype=torch.float32), inputs(dtype=torch.float32)
    cut = flow.with_rank(2, z, context)
    optimizer = torch.optim.Adam(cut.parameters(), 1e-3)
    distances = []
    for _ in range(30):
        distances.append(far(cut, flow, z, context))
        optimizer.zero_grad()
        target = flow(z, context)
        loss = sum((a - b.detach()).square().mean() for a, b in zip(cut(z, context), target, strict=True))
        loss.backward()
        optimizer.step()
    assert distances[-1] < 0.9 * distances[0]
    fresh = AmortizedPlanarFlow(DIM, 5, FEATURES, rank=2)
    fresh.load_state_dict(cut.state_dict())
    for other in (fresh, pickle.loads(pickle.dumps(cut))):
        torch.testing.assert_close(other(z, context), cut(z, context), rtol=0, atol=0)
    assert repr(cut) == repr(fresh)


def test_in_a_vae():
    torch.manual_seed(0)
    vae = VAE(mlp_encoder(16, FEATURES), mlp_decoder(DIM, FEATURES, 16), DIM, trained(dtype=torch.float32))
    x, noise = torch.randint(0, 2, (ROWS, 16)).float(), torch.randn(ROWS, DIM)
    posterior = vae.encode(x)
    z = posterior.mean + (0.5 * posterior.log_var).exp() * noise  # with a graph, which is not gone through
    wanted = vae(x, noise=noise).neg_elbo.mean()
    vae.flow = vae.flow.with_rank(FEATURES, z, posterior.features)
    torch.testing.assert_close(vae(x, noise=noise).neg_elbo.mean(), wanted, rtol=1e-4, atol=1e-3)


def test_in_inference_mode():
    flow, (z, context) = trained(), inputs()
    wanted = flow.with_rank(3, z, context)
    with torch.inference_mode():
        cut = flow.with_rank(3, *inputs())
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), wanted.parameters(), strict=True))
    sum(t.sum() for t in cut(z, context)).backward()
    assert cut.head.down.weight.grad.any()


def test_a_flow_that_is_compiled_in_place():
    flow, (z, context) = trained(), inputs()
    wanted = flow.with_rank(3, z, context)
    flow.compile(backend="eager")
    flow(z, context)
    cut = flow.with_rank(3, z, context)
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), wanted.parameters(), strict=True))
    torch.testing.assert_close(cut(z, context), wanted(z, context))


def test_a_flow_that_moves_nothing():
    """No output counts more than another."""
    flow, (z, context) = AmortizedHouseholderFlow(DIM, 4, FEATURES).double(), inputs()
    with torch.no_grad():
        flow.head.weight.zero_()
        flow.head.bias.zero_()
    assert not flow._movement(z, flow.head(context).detach()).any()
    torch.testing.assert_close(flow.with_rank(2, z, context)(z, context), flow(z, context))


def normed():
    return trained(rank=4, layer_norm=True)


def of_ones_own():
    flow = trained()
    flow.head = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 35)).double()
    return flow


def hooked():
    flow = trained(rank=4)
    flow.head.down.register_forward_hook(lambda module, given, output: 2 * output)
    return flow


def without_a_bias():
    flow = trained()
    flow.head.register_parameter("bias", None)
    return flow


def of_other_names():
    flow = trained(rank=4)
    flow.head = nn.Sequential(flow.head.down, nn.Tanh(), flow.head.up)
    return flow


def patched():
    flow = trained()
    flow.head.forward = lambda x: torch.zeros(len(x), 35)
    return flow


def parametrized():
    flow = trained()
    nn.utils.parametrizations.weight_norm(flow.head)
    return flow


def diverged():
    flow = trained()
    with torch.no_grad():
        flow.head.weight[3, 4] = torch.inf
    return flow


Z, CONTEXT = inputs(7)
OTHERS = "of one or two linear layers, without hooks: cut the flow before its head is changed"
REFUSED = [
    (trained, (0, Z, CONTEXT), ValueError, "rank must be at least 1, got 0"),
    (trained, (2.0, Z, CONTEXT), TypeError, "rank must be an int, got float"),
    (trained, (13, Z, CONTEXT), ValueError, "rank must be at most min(F, K (2 D + 1)) = 12, got 13"),
    (trained, (2, Z[:3], CONTEXT), ValueError, "context's leading dimensions must be the trailing batch dimensions"),
    (trained, (2, Z[:0], CONTEXT[:0]), ValueError, "with N of at least 1, got (0, 3) and (0, 12)"),
    (trained, (2, Z[0], CONTEXT[0]), ValueError, "must be [N, D] and [N, F] with N of at least 1, got (3,) and (12,)"),
    (trained, (2, Z[None], CONTEXT), ValueError, "must be [N, D] and [N, F] with N of at least 1, got (1, 7, 3)"),
    (trained, (2, Z, CONTEXT.float()), TypeError, "context must be torch.float64 like the flow"),
    (trained, (2, CONTEXT, Z), ValueError, "context must be a tensor [*params, F] with F = 12"),
    (trained, (2, None, CONTEXT), TypeError, "z must be a torch.Tensor, got NoneType"),
    (trained, (2, Z, CONTEXT * torch.nan), ValueError, "context must be finite, got infinities or NaN: leave such"),
    (trained, (2, Z * torch.inf, CONTEXT), ValueError, "what the flow makes of z must be finite"),
    (diverged, (2, Z, CONTEXT), ValueError, "the flow's head must be finite"),
    (normed, (2, Z, CONTEXT), TypeError, "of one or two linear layers, without hooks: leave layer_norm out"),
    *((make, (2, Z, CONTEXT), TypeError, OTHERS) for make in (of_ones_own, hooked, without_a_bias, of_other_names)),
    *((make, (2, Z, CONTEXT), TypeError, OTHERS) for make in (patched, parametrized)),
    (lambda: trained(dtype=torch.float16), (2, Z.half(), 1e-6 * CONTEXT.half()), ValueError, "scale it, or cut in"),
]


@pytest.mark.parametrize(("make", "arguments", "error", "message"), REFUSED)
def test_what_is_refused(make, arguments, error, message):
    flow = make()
    with pytest.raises(error, match=re.escape(message)):
        flow.with_rank(*arguments)
