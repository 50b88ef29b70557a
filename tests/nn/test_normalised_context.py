"""AmortizedPlanarFlow(normalise=True): the size of a context hardly matters, and state_dicts know their kind."""

import copy
import pickle

import pytest
import torch

from vvae_fast import AmortizedPlanarFlow

DIM, STEPS, FEATURES, ROWS = 3, 5, 24, 7
RANKS = pytest.mark.parametrize("rank", [None, 4])


def make(rank=None, normalise=True, dtype=torch.float32, features=FEATURES):
    """A flow away from the identity."""
    torch.manual_seed(0)
    flow = AmortizedPlanarFlow(DIM, STEPS, features, rank=rank, normalise=normalise).to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def inputs(dtype=torch.float32, features=FEATURES):
    g = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, DIM, generator=g).to(dtype), torch.randn(ROWS, features, generator=g).to(dtype)


def like_sizes(context):
    """math.md (56)."""
    knee = max(0.03, 3 / context.shape[-1])
    r = context.square().mean(-1, keepdim=True).sqrt() / knee
    return context * torch.log(1 + r) / r


@RANKS
@pytest.mark.parametrize("features", [1, 2, FEATURES, 300])
def test_the_head_gets_rows_of_like_sizes(rank, features):
    rank = rank and min(rank, features)
    flow, (_, context) = make(rank, True, torch.float64, features), inputs(torch.float64, features)
    plain = make(rank, False, torch.float64, features)
    for got, wanted in zip(flow.params(context), plain.params(like_sizes(context)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("features", [1, 300])
def test_a_size_matters_by_its_logarithm_and_is_never_lost(features):
    """Sixteen times the context is far less than sixteen times as large for the head, but larger."""
    _, context = inputs(torch.float64, features)
    head = make(None, True, torch.float64, features).head
    with torch.no_grad():
        torch.nn.init.eye_(head.weight)
        head.bias.zero_()
    small, large = (head(size * context).norm(dim=-1) for size in (1.0, 16.0))
    assert (large > 1.2 * small).all()
    if features == 300:
        assert (large < 2 * small).all()


@RANKS
@pytest.mark.parametrize("size", [1e-1, 16.0, 1e4, 1e15])
def test_contexts_of_any_size(size, rank):
    flow, (_, context) = make(rank), inputs()
    plain, wide = make(rank, normalise=False).double(), context.double()
    for got, wanted in zip(flow.params(size * context), plain.params(like_sizes(size * wide)), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@RANKS
def test_small_contexts_stay_as_they_are(rank):
    flow, plain = (make(rank, normalise, torch.float64) for normalise in (True, False))
    _, context = inputs(torch.float64)
    for got, wanted in zip(flow.params(1e-6 * context), plain.params(1e-6 * context), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_contexts_in_half_precision(dtype):
    _, context = inputs(dtype)
    flow = make().to(dtype)
    for got, wanted in zip(flow.params(1e4 * context), make().params((1e4 * context).float()), strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


def test_a_context_of_zeros_has_finite_gradients():
    flow, z = make(), inputs()[0]
    context = torch.zeros(ROWS, FEATURES, requires_grad=True)
    sum(x.sum() for x in flow(z, context)).backward()
    assert torch.isfinite(context.grad).all()


@RANKS
def test_gradients_against_finite_differences(rank):
    flow, (z, context) = make(rank, dtype=torch.float64), inputs(torch.float64)
    assert torch.autograd.gradcheck(flow, (z[:2].requires_grad_(), context[:2].requires_grad_()))


@RANKS
def test_names_and_start_are_those_of_a_flow_without(rank):
    torch.manual_seed(0)
    normal = AmortizedPlanarFlow(DIM, STEPS, FEATURES, rank=rank, normalise=True).state_dict()
    torch.manual_seed(0)
    plain = AmortizedPlanarFlow(DIM, STEPS, FEATURES, rank=rank).state_dict()
    assert list(normal) == list(plain)
    assert all(torch.equal(normal[name], plain[name]) for name in plain)


@RANKS
@pytest.mark.parametrize("normalise", [False, True])
def test_a_state_dict_of_the_other_kind_is_refused(normalise, rank, tmp_path):
    torch.save(make(rank, normalise).state_dict(), tmp_path / "flow.pt")
    state_dict = torch.load(tmp_path / "flow.pt", weights_only=True)
    z, context = inputs()
    twin = AmortizedPlanarFlow(DIM, STEPS, FEATURES, rank=rank, normalise=normalise)
    twin.load_state_dict(state_dict)
    assert torch.equal(twin(z, context)[0], make(rank, normalise)(z, context)[0])
    other = make(rank, not normalise)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"head.* is of a flow with normalise={normalise}"):
            other.load_state_dict(state_dict, strict=strict)
    other.load_state_dict(dict(state_dict))  # nothing says of which kind it is


@RANKS
def test_copies_and_pickles_keep_it(rank):
    flow, (z, context) = make(rank), inputs()
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin(z, context)[0], flow(z, context)[0])
    assert "normalise=True" in repr(flow)
    assert "normalise" not in repr(make(rank, normalise=False))


@pytest.mark.parametrize("normalise", [1, "yes", None])
def test_only_bools(normalise):
    with pytest.raises(TypeError, match="normalise must be a bool, got"):
        AmortizedPlanarFlow(DIM, STEPS, FEATURES, normalise=normalise)
