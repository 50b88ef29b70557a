"""AmortizedPlanarFlow(normalise=True): the size of a context does not matter, and state_dicts know their kind."""

import copy
import pickle

import pytest
import torch

from vvae_fast import AmortizedPlanarFlow
from vvae_fast.nn.planar import NORMAL_SIZE

DIM, STEPS, FEATURES, ROWS = 3, 5, 24, 7
RANKS = pytest.mark.parametrize("rank", [None, 4])


def make(rank=None, normalise=True, dtype=torch.float32):
    """A flow away from the identity."""
    torch.manual_seed(0)
    flow = AmortizedPlanarFlow(DIM, STEPS, FEATURES, rank=rank, normalise=normalise).to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, DIM, generator=g).to(dtype), torch.randn(ROWS, FEATURES, generator=g).to(dtype)


@RANKS
def test_the_head_gets_rows_of_one_root_mean_square(rank):
    flow, (_, context) = make(rank, dtype=torch.float64), inputs(torch.float64)
    scaled = NORMAL_SIZE * context / (context.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # math.md (56)
    plain = make(rank, normalise=False, dtype=torch.float64)
    for got, wanted in zip(flow.params(context), plain.params(scaled), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@RANKS
@pytest.mark.parametrize("size", [1e-1, 16.0, 1e4, 1e15])
def test_the_size_of_a_context_does_not_matter(size, rank):
    flow, (z, context) = make(rank), inputs()
    for got, wanted in zip(flow(z, size * context), flow(z, context), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_contexts_in_half_precision(dtype):
    _, context = inputs(dtype)
    flow = make().to(dtype)
    for got, wanted in zip(flow.params(1e4 * context), make().params(context.float()), strict=True):
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
