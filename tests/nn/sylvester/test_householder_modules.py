"""HouseholderFlow and AmortizedHouseholderFlow."""

import copy
import pickle
import re

import pytest
import torch
from test_modules import away_from_identity
from torch.func import functional_call, vmap

from vvae_fast import AmortizedHouseholderFlow, HouseholderFlow
from vvae_fast.nn import orthonormal

DIM, COUNT, FEATURES, ROWS = 5, 4, 6, 7
both = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])


def make(amortized, count=COUNT, dtype=torch.float64, **options):
    torch.manual_seed(0)
    if amortized:
        return AmortizedHouseholderFlow(DIM, count, FEATURES, **options).to(dtype)
    return HouseholderFlow(DIM, count, **options).to(dtype)


def inputs(amortized, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    z, context = torch.randn(ROWS, DIM, generator=g).to(dtype), torch.randn(ROWS, FEATURES, generator=g).to(dtype)
    return (z, context) if amortized else (z,)


@both
@pytest.mark.parametrize("backend", ["cpp", "reference", None])
def test_values_are_those_of_the_paper(amortized, backend):
    flow, (z, *context) = away_from_identity(make(amortized, backend=backend)), inputs(amortized)
    v = flow.params(*context)
    got, log_det = flow(z, *context)
    for row in range(ROWS):
        wanted, vectors = z[row], v[row] if amortized else v
        for x in vectors:
            wanted = wanted - 2 * x * x.dot(wanted) / x.dot(x)
        torch.testing.assert_close(got[row], wanted, rtol=0, atol=1e-13)
        torch.testing.assert_close(orthonormal(vectors.flip(0), DIM) @ z[row], wanted, rtol=0, atol=1e-13)
    assert torch.equal(log_det, torch.zeros(ROWS).double())
    torch.testing.assert_close(got.norm(dim=-1), z.norm(dim=-1), rtol=0, atol=1e-13)


@both
def test_inverse_and_trajectory(amortized):
    flow, (z, *context) = away_from_identity(make(amortized)), inputs(amortized)
    points = flow.trajectory(z, *context)
    z_K, _ = flow(z, *context)
    assert points.shape == (COUNT + 1, ROWS, DIM)
    torch.testing.assert_close(points[-1], z_K)
    z_0, log_det = flow.inverse(z_K, *context)
    torch.testing.assert_close(z_0, z, rtol=0, atol=1e-13)
    assert torch.equal(log_det, torch.zeros(ROWS).double())


@both
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 17])
def test_starts_as_the_identity_but_for_an_odd_one(amortized, rank, count):
    if amortized and rank and count == 0:
        return  # there is no rank from 1 to 0
    options = {"rank": rank} if amortized else {}
    flow, (z, *context) = make(amortized, count, torch.float32, **options), inputs(amortized, torch.float32)
    context = [10 * c for c in context]
    z_K, _ = flow(z, *context)
    v = flow.params(*context)
    if count % 2:
        last = v[..., -1:, :] / v[..., -1:, :].norm(dim=-1, keepdim=True)
        z = z - 2 * (last * (last * z[:, None]).sum(-1, keepdim=True))[:, 0]
    torch.testing.assert_close(z_K, z, rtol=0, atol=2e-5)
    if amortized and count:
        assert v.std(0).min() > 0.1, "the vectors depend on the context"


@both
def test_the_start_can_be_left(amortized):
    flow, given = make(amortized), inputs(amortized)
    flow(*given)[0][:, 0].square().sum().backward()
    for name, p in flow.named_parameters():
        assert p.grad.abs().max() > 1e-3, name
    v = flow.v.grad if not amortized else flow.head.bias.grad.view(COUNT, DIM)
    assert (v[0] - v[1]).norm() > v[0].norm(), "the two of a pair part"


@both
def test_derivatives(amortized):
    flow = away_from_identity(make(amortized, 3))
    given = [t[:2].requires_grad_() for t in inputs(amortized)]
    names = [name for name, _ in flow.named_parameters()]
    leaves = (*(p.detach().clone().requires_grad_() for p in flow.parameters()), *given)

    def call(*tensors):
        return functional_call(flow, dict(zip(names, tensors, strict=False)), tensors[len(names) :])[0]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    params = dict(zip(names, (p.detach() for p in flow.parameters()), strict=True))
    per_sample = vmap(
        torch.func.grad(lambda params, *one: functional_call(flow, params, one)[0].sin().sum()),
        in_dims=(None, *[0] * len(given)),
    )(params, *(t.detach() for t in given))
    flow(*given)[0].sin().sum().backward()
    for name, p in flow.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)


def test_lengths_do_not_matter_and_zeros_reflect_nothing():
    flow, (z,) = away_from_identity(make(False)), inputs(False)
    wanted = flow(z)[0]
    with torch.no_grad():
        flow.v.mul_(torch.tensor([1e-6, -3.0, 1e6, 1.0])[:, None])
    torch.testing.assert_close(flow(z)[0], wanted)
    with torch.no_grad():
        flow.v.zero_()
    assert torch.equal(flow(z)[0], z)


@both
def test_pickle_deepcopy_and_state_dict(amortized):
    flow, given = away_from_identity(make(amortized)), inputs(amortized)
    fresh = make(amortized)
    fresh.load_state_dict(flow.state_dict())
    for other in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow), fresh):
        assert torch.equal(other(*given)[0], flow(*given)[0])


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(amortized, dtype):
    half, (z, *context) = away_from_identity(make(amortized, dtype=dtype)), inputs(amortized, dtype)
    wide = copy.deepcopy(half).float()
    for z_in in (z, z.float()):
        z_K, log_det = half(z_in, *context)
        assert (z_K.dtype, log_det.dtype) == (z_in.dtype, torch.float32)
        assert half.trajectory(z_in, *context).dtype == half.inverse(z_in, *context)[0].dtype == z_in.dtype
        wanted = wide(z.float(), *(c.float() for c in context))[0]
        torch.testing.assert_close(z_K.float(), wanted, rtol=0, atol=0.1)
    if not amortized:
        torch.testing.assert_close(z_K, wanted)


@both
def test_compile_and_autocast(amortized):
    flow, given = away_from_identity(make(amortized, dtype=torch.float32)), inputs(amortized, torch.float32)
    wanted = flow(*given)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_K, log_det = flow(*given)
    assert (z_K.dtype, log_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(z_K, wanted[0], rtol=0.1, atol=0.1)


def test_several_samples_of_each_data_point():
    flow, (_, context) = away_from_identity(make(True)), inputs(True)
    z = torch.randn(4, ROWS, DIM).double()
    z_K, log_det = flow(z, context)
    assert log_det.shape == (4, ROWS)
    for s in range(4):
        torch.testing.assert_close(z_K[s], flow(z[s], context)[0])


def test_repr():
    assert repr(HouseholderFlow(4, 2)) == "HouseholderFlow(dim=4, num_reflections=2)"
    assert "dim=4, num_reflections=2, context_dim=6, rank=2\n" in repr(AmortizedHouseholderFlow(4, 2, 6, rank=2))


@pytest.mark.parametrize(
    ("error", "message", "sizes", "options"),
    [
        (ValueError, "dim must be at least 1, got 0", (0, 3), {}),
        (ValueError, "num_reflections must be at least 0, got -1", (4, -1), {}),
        (TypeError, "num_reflections must be an int, got bool", (4, True), {}),
        (ValueError, "backend must be one of", (4, 3), {"backend": "tpu"}),
    ],
)
def test_refused_arguments(error, message, sizes, options):
    with pytest.raises(error, match=re.escape(message)):
        HouseholderFlow(*sizes, **options)
    with pytest.raises(error, match=re.escape(message)):
        AmortizedHouseholderFlow(*sizes, 6, **options)


@pytest.mark.parametrize("way", ["forward", "inverse", "trajectory"])
def test_refused_inputs(way):
    flow, amortized, (z, context) = make(False), make(True), inputs(True)
    for call, others in ((getattr(flow, way), ()), (getattr(amortized, way), (context,))):
        with pytest.raises(ValueError, match=r"z must be \[\*batch, D\] with the flow's D = 5, got \(7, 4\)"):
            call(z[:, :4], *others)
        with pytest.raises(TypeError, match=r"z must be torch\.float64 like the flow, got torch\.float32"):
            call(z.float(), *others)
    with pytest.raises(ValueError, match=r"rank must be at most min\(F, K D\) = 6, got 7"):
        AmortizedHouseholderFlow(DIM, COUNT, FEATURES, rank=7)
    with pytest.raises(ValueError, match=r"context's leading dimensions .*\(7,\), got \(6,\)"):
        getattr(amortized, way)(z, context[:6])
