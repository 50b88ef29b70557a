"""SylvesterFlow and AmortizedSylvesterFlow."""

import copy
import pickle
import re

import pytest
import torch
from test_modules import away_from_identity
from torch.func import functional_call, jacrev, vmap

from vvae_fast import AmortizedSylvesterFlow, SylvesterFlow, sylvester_flow
from vvae_fast.nn import SylvesterParams, orthonormal

BACKENDS = ["reference", "cpp"]
DIM, LAYERS, UNITS, FEATURES, ROWS = 5, 3, 4, 6, 7
KINDS = ("orthogonal", "householder", "triangular")
kinds = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
backends = pytest.mark.parametrize("backend", BACKENDS)


def make(kind, amortized, backend=BACKENDS[0], dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    units = None if kind == "triangular" else options.pop("units", UNITS)
    if kind == "householder":
        options = {"num_reflections": 3} | options
    sizes = (DIM, options.pop("layers", LAYERS), units)
    options |= {"kind": kind, "backend": backend}
    if amortized:
        return AmortizedSylvesterFlow(*sizes, FEATURES, **options).to(dtype)
    return SylvesterFlow(*sizes, **options).to(dtype)


def inputs(amortized, dtype=torch.float64, rows=ROWS):
    g = torch.Generator().manual_seed(1)
    z, context = torch.randn(rows, DIM, generator=g).to(dtype), torch.randn(rows, FEATURES, generator=g).to(dtype)
    return (z, context) if amortized else (z,)


def moved(flow, size=0.7):
    """Far from the identity."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(size * torch.randn(p.shape, generator=g).to(p.dtype))
    return flow


def by_the_paper(z, v, mixed, y, b):
    """One row through the layers, van den Berg et al. 2018, equation 13, written out."""
    units = mixed.shape[-1]
    for layer in range(len(mixed)):
        r, r_tilde = torch.zeros(units, units, dtype=z.dtype), torch.zeros(units, units, dtype=z.dtype)
        for i in range(units):
            r[i, i], r_tilde[i, i] = mixed[layer, i, i].tanh(), y[layer, i].tanh()
            for j in range(i + 1, units):
                r[i, j], r_tilde[i, j] = mixed[layer, i, j], mixed[layer, j, i]
        if v is None:
            q = torch.eye(units, dtype=z.dtype)
            q = q.flip(0) if layer % 2 else q
        else:
            q = torch.eye(DIM, dtype=z.dtype)
            for x in v[layer]:
                q = q @ (torch.eye(DIM, dtype=z.dtype) - 2 * torch.outer(x, x) / x.dot(x))
            q = q[:, :units]
        z = z + q @ r @ torch.tanh(r_tilde @ q.T @ z + b[layer])
    return z


@backends
@both
@kinds
@torch.no_grad()
def test_values_are_those_of_the_paper(kind, amortized, backend):
    flow = moved(make(kind, amortized, backend))
    z, *context = inputs(amortized)
    raw = flow._raw(*context) if amortized else (flow.v, flow.mixed, flow.y, flow.b)
    got, log_det = flow(z, *context)
    for row in range(ROWS):
        own = [t if t is None or not amortized else t[row] for t in raw]
        torch.testing.assert_close(got[row], by_the_paper(z[row], *own), rtol=0, atol=1e-12)
        jacobian = torch.autograd.functional.jacobian(lambda one, own=own: by_the_paper(one, *own), z[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-10)


@backends
@both
@kinds
@pytest.mark.parametrize("activation", ["tanh", "elu", "sigmoid", "leaky_relu", "linear"])
def test_log_det_is_that_of_the_jacobian(kind, amortized, activation, backend):
    flow = moved(make(kind, amortized, backend, activation=activation), 0.2 if amortized else 0.4)
    z, *context = inputs(amortized)
    _, log_det = flow(z, *context)
    for row in range(ROWS):
        of_row = [c[row] for c in context]
        jacobian = torch.autograd.functional.jacobian(lambda one, c=of_row: flow(one, *c)[0], z[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-10)


@backends
@both
@kinds
def test_inverse(kind, amortized, backend):
    flow = moved(make(kind, amortized, backend))
    z, *context = inputs(amortized)
    z_L, log_det = flow(z, *context)
    z_0, inverse_log_det = flow.inverse(z_L, *context)
    torch.testing.assert_close(z_0, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-10)


@both
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_identity(kind, amortized, dtype):
    flow, (z, *context) = make(kind, amortized, dtype=dtype, layers=16), inputs(amortized, dtype)
    context = [100 * c for c in context]
    z_L, log_det = flow(z, *context)
    assert torch.equal(z_L, z)
    assert torch.equal(log_det, torch.zeros(ROWS))
    if amortized:
        assert flow.params(*context).b.std(0).min() > 0.1, "b depends on the context"


@both
@kinds
def test_the_start_can_be_left(kind, amortized):
    """In the first step R alone has a gradient; then everything has, v by whole numbers of its size."""
    flow, given = make(kind, amortized), inputs(amortized)
    for _ in range(2):
        flow.zero_grad()
        z_L, log_det = flow(*given)
        (z_L[..., 0] ** 2 + z_L.sin().sum(-1) - log_det).sum().backward()
        with torch.no_grad():
            for p in flow.parameters():
                p -= 0.01 * p.grad
    for name, p in flow.named_parameters():
        assert p.grad.isfinite().all()
        assert p.grad.abs().max() > 1e-4, name


@kinds
def test_how_large_the_start_is(kind):
    """R~'s rows are of about unit length, as a planar flow's w, and Q is orthonormal."""
    q, r, r_tilde, b, s = make(kind, False, layers=200).params()
    assert 0.4 < r_tilde.square().sum(-1).mean() < 1.2
    assert 0.9 < b.std() < 1.1
    assert not r.any()
    assert torch.equal(s, torch.ones_like(s))
    if q is not None:
        torch.testing.assert_close(q.mT @ q, torch.eye(UNITS).double().expand(200, -1, -1))


@kinds
def test_training_lowers_a_loss(kind):
    flow = make(kind, False, dtype=torch.float32)
    z, optimizer, losses = torch.randn(256, DIM), torch.optim.Adam(flow.parameters(), 1e-2), []
    for _ in range(60):
        z_L, log_det = flow(z)
        loss = (2 * (z_L[:, 0] - z_L[:, 1].square()).square() + 0.5 * z_L[:, 1:].square().sum(-1) - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@kinds
def test_params_are_the_functions_arguments(kind):
    for amortized in (False, True):
        flow = moved(make(kind, amortized))
        z, *context = inputs(amortized)
        params = flow.params(*context)
        assert isinstance(params, SylvesterParams)
        q, r, r_tilde, b, s = params
        sets, units = ((ROWS,) if amortized else ()), DIM if kind == "triangular" else UNITS
        assert (q is None) == (kind == "triangular")
        if q is not None:
            assert q.shape == (*sets, LAYERS, DIM, units)
            assert q.mT.is_contiguous(), "as the kernels take it"
        assert r.shape == r_tilde.shape == (*sets, LAYERS, units, units)
        assert b.shape == s.shape == (*sets, LAYERS, units)
        assert not r.tril(-1).any()
        assert not r_tilde.tril(-1).any()
        torch.testing.assert_close(flow(z, *context), sylvester_flow(z, q, r, r_tilde, b, s=s, backend=BACKENDS[0]))


def test_q_of_the_householder_kind():
    flow = make("householder", False, num_reflections=6)
    assert flow.v.shape == (LAYERS, 6, DIM)
    torch.testing.assert_close(flow.params().q, orthonormal(flow.v, UNITS))


@both
@kinds
def test_trajectory(kind, amortized):
    flow = moved(make(kind, amortized))
    z, *context = inputs(amortized)
    points = flow.trajectory(z, *context)
    assert points.shape == (LAYERS + 1, ROWS, DIM)
    assert torch.equal(points[0], z)
    torch.testing.assert_close(points[-1], flow(z, *context)[0])
    if not amortized:
        shorter = make(kind, False, layers=2)
        shorter.load_state_dict({name: t[:2] for name, t in flow.state_dict().items()})
        torch.testing.assert_close(points[2], shorter(z)[0])


@backends
@both
@kinds
def test_derivatives(kind, amortized, backend):
    flow = moved(make(kind, amortized, backend, layers=2))
    given = [t[:2].requires_grad_() for t in inputs(amortized)]
    names = [name for name, _ in flow.named_parameters()]

    def call(*tensors):
        return functional_call(flow, dict(zip(names, tensors, strict=False)), tensors[len(names) :])

    leaves = (*(p.detach().clone().requires_grad_() for p in flow.parameters()), *given)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(flow.inverse, given, fast_mode=True)


@both
@kinds
def test_gradients_of_units_at_their_limit(kind, amortized):
    """c next to -1, and tanh that is 1 in float32: nothing infinite, and log_det's gradient as in float64."""
    wide = moved(make(kind, amortized))
    with torch.no_grad():
        if amortized:
            last = wide._last()
            _, mixed, y, _ = last.bias.split_with_sizes(wide._lengths())
            mixed = mixed.view(LAYERS, wide.num_units, wide.num_units)
            y = y.view(LAYERS, wide.num_units)
        else:
            mixed, y = wide.mixed, wide.y
        for layer, size in enumerate((3.0, 9.0, 80.0)):
            mixed[layer].diagonal().fill_(size if layer != 1 else -size)
            y[layer] = -mixed[layer].diagonal() + 0.3
    flow = copy.deepcopy(wide).float()
    for module in (flow, wide):
        given = inputs(amortized, torch.float64 if module is wide else torch.float32)
        z_L, log_det = module(*given)
        (z_L.sin().sum() + log_det.sum()).backward()
    for (name, p), wanted in zip(flow.named_parameters(), wide.parameters(), strict=True):
        assert p.grad.isfinite().all(), name
        assert (p.grad - wanted.grad).norm() < 1e-3 * wanted.grad.norm(), name


@both
@kinds
def test_pickle_deepcopy_and_state_dict(kind, amortized):
    flow, given = away_from_identity(make(kind, amortized)), inputs(amortized)
    wanted, fresh = flow(*given), make(kind, amortized, seed=5)
    fresh.load_state_dict(flow.state_dict())
    for other in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow), fresh):
        for x, y in zip(other(*given), wanted, strict=True):
            assert torch.equal(x, y)


@both
@kinds
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision(kind, amortized, dtype, digits):
    half = moved(make(kind, amortized, dtype=dtype))
    wide, (z, *context) = copy.deepcopy(half).float(), inputs(amortized, dtype)
    wanted = wide(z.float(), *(c.float() for c in context))
    for z_in in (z, z.float()):
        z_L, log_det = half(z_in, *context)
        z_0, inverse_log_det = half.inverse(z_L, *context)
        assert (z_L.dtype, z_0.dtype, log_det.dtype, inverse_log_det.dtype) == (z_in.dtype,) * 2 + (torch.float32,) * 2
        assert half.trajectory(z_in, *context).dtype == z_in.dtype
        torch.testing.assert_close(z_L.float(), wanted[0], rtol=0, atol=2.0 ** (5 - digits))
        torch.testing.assert_close(log_det, wanted[1], rtol=0, atol=2.0 ** (5 - digits))
    if not amortized:  # nothing but z was rounded
        torch.testing.assert_close(half(z.float()), wanted, rtol=0, atol=1e-5)
    z_L.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in half.parameters())


@both
@kinds
def test_compile_and_autocast(kind, amortized):
    flow, given = moved(make(kind, amortized, dtype=torch.float32), 0.3), inputs(amortized, torch.float32)
    wanted = flow(*given)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flow(*given)
        mixed = flow(given[0].bfloat16(), *given[1:])
        q = flow.params(*given[1:]).q
    assert (got[0].dtype, got[1].dtype) == (torch.float32, torch.float32)
    assert (mixed[0].dtype, mixed[1].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(got[0], wanted[0], rtol=0.1, atol=0.1)
    if not amortized:  # whose head alone autocast makes less accurate
        assert torch.equal(got[0], wanted[0])
    if q is not None:
        torch.testing.assert_close(q.mT @ q, torch.eye(UNITS).expand_as(q.mT @ q), rtol=0, atol=1e-5)


@both
@kinds
def test_transforms_of_torch_func(kind, amortized):
    flow, given = moved(make(kind, amortized)), inputs(amortized)
    params = {name: p.detach() for name, p in flow.named_parameters()}

    def loss(params, *one):
        z_L, log_det = functional_call(flow, params, one)
        return 0.5 * z_L.square().sum() - log_det

    per_sample = vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(given)))(params, *given)
    z_L, log_det = flow(*given)
    (0.5 * z_L.square().sum() - log_det.sum()).backward()
    for name, p in flow.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)
    rows = vmap(jacrev(lambda *one: flow(*one)[0]))(*given)
    torch.testing.assert_close(torch.linalg.slogdet(rows).logabsdet, log_det)


@kinds
def test_several_samples_of_each_data_point(kind):
    flow = moved(make(kind, True))
    _, context = inputs(True)
    z = torch.randn(4, ROWS, DIM).double()
    z_L, log_det = flow(z, context)
    for s in range(4):
        torch.testing.assert_close((z_L[s], log_det[s]), flow(z[s], context))


@both
@kinds
def test_no_rows(kind, amortized):
    assert make(kind, amortized)(*(t[:0] for t in inputs(amortized)))[0].shape == (0, DIM)


def test_a_head_with_a_rank():
    flow = make("orthogonal", True, rank=2, normalise=True)
    outputs = LAYERS * (UNITS * DIM + UNITS**2 + 2 * UNITS)
    assert {name: tuple(t.shape) for name, t in flow.state_dict().items()} == {
        "head.down.weight": (2, FEATURES),
        "head.up.weight": (outputs, 2),
        "head.up.bias": (outputs,),
    }
    assert "context_dim=6, rank=2, normalise=True" in repr(flow)
    flow.head = torch.nn.Linear(FEATURES, outputs).double()
    assert flow(*inputs(True))[0].shape == (ROWS, DIM)
    flow.head = torch.nn.Linear(FEATURES, 7).double()
    with pytest.raises(ValueError, match=re.escape(f"head must give [*params, L (H D + M^2 + 2 M)] = (7, {outputs})")):
        flow(*inputs(True))


def test_repr():
    assert repr(SylvesterFlow(4, 3)) == "SylvesterFlow(dim=4, num_layers=3, num_units=4, kind='orthogonal')"
    assert "kind='householder', num_reflections=8, activation='elu'" in repr(
        SylvesterFlow(4, 3, kind="householder", activation="elu")
    )


@pytest.mark.parametrize(
    ("error", "message", "sizes", "options"),
    [
        (ValueError, "dim must be at least 1, got 0", (0, 3), {}),
        (TypeError, "num_layers must be an int, got float", (4, 3.0), {}),
        (ValueError, "num_layers must be at least 1, got 0", (4, 0), {}),
        (ValueError, "num_units must be at most D = 4, got 5", (4, 3, 5), {}),
        (ValueError, "num_units must be at least 1, got 0", (4, 3, 0), {}),
        (ValueError, "num_units must be D = 4 or None for kind='triangular', got 3", (4, 3, 3), {"kind": "triangular"}),
        (ValueError, "kind must be one of ('orthogonal',", (4, 3), {"kind": "Q"}),
        (ValueError, "num_reflections is for kind='householder' alone, got 4", (4, 3), {"num_reflections": 4}),
        (ValueError, "num_reflections must be at least 1", (4, 3), {"kind": "householder", "num_reflections": 0}),
        (ValueError, "activation must be one of", (4, 3), {"activation": "relu"}),
        (ValueError, "slope must be finite and above 0", (4, 3), {"activation": "leaky_relu", "slope": 0}),
        (ValueError, "backend must be one of", (4, 3), {"backend": "tpu"}),
    ],
)
def test_refused_arguments(error, message, sizes, options):
    with pytest.raises(error, match=re.escape(message)):
        SylvesterFlow(*sizes, **options)
    with pytest.raises(error, match=re.escape(message)):
        AmortizedSylvesterFlow(*(*sizes, None)[:3], 6, **options)


@pytest.mark.parametrize("way", ["forward", "inverse", "trajectory"])
def test_refused_inputs(way):
    flow, amortized = make("orthogonal", False), make("orthogonal", True)
    z, context = inputs(True)
    for call, others in ((getattr(flow, way), ()), (getattr(amortized, way), (context,))):
        with pytest.raises(ValueError, match=r"z must be \[\*batch, D\] with the flow's D = 5, got \(7, 4\)"):
            call(z[:, :4], *others)
        with pytest.raises(TypeError, match=r"z must be torch\.float64 like the flow, got torch.float32"):
            call(z.float(), *others)
    with pytest.raises(ValueError, match=r"context's leading dimensions .*\(7,\), got \(6,\)"):
        getattr(amortized, way)(z, context[:6])
    with pytest.raises(ValueError, match=r"context must be a tensor \[\*params, F\] with F = 6, got \(7, 5\)"):
        getattr(amortized, way)(z, z)
