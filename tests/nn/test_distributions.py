"""PlanarTransform beside the functional interface and torch's own conventions for transforms."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from problems import random_problem
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    IndependentTransform,
    Normal,
    StackTransform,
    TransformedDistribution,
    constraints,
)

import vvae_fast
from vvae_fast.distributions import PlanarTransform

STEPS, DIM = 11, 3
caches = pytest.mark.parametrize("cache_size", [0, 1])


def transform_of(params=(), cache_size=0, seed=0, grad=True, **options):
    p = random_problem(params or (1,), STEPS, DIM, params, scale=0.8, seed=seed, dtype=torch.float64)
    tensors = [t.clone().requires_grad_(grad) for t in (p.u, p.w, p.b)]
    return PlanarTransform(*tensors, cache_size=cache_size, **options)


def normal(*batch):
    return Independent(Normal(torch.zeros(*batch, DIM, dtype=torch.float64), 1.0), 1)


def points(*batch):
    return torch.randn(*batch, DIM, dtype=torch.float64)


@caches
@pytest.mark.parametrize("batch", [(), (7,), (4, 7)])
@pytest.mark.parametrize("params", [(), (7,), (1,)])
def test_call_inverse_and_log_det(batch, params, cache_size):
    transform, x = transform_of(params, cache_size), points(*batch)
    y = transform(x)
    wide = torch.broadcast_shapes(batch, params)
    wanted = transform.forward_shape(x.shape)
    assert y.shape == wanted == transform.inverse_shape(x.shape) == (*wide, DIM)
    sets = [t.reshape(-1, *t.shape[len(params) :]) for t in transform_params(transform)]
    rows = x.expand(wanted).reshape(-1, DIM)
    for r, row in enumerate(rows):
        z_K, log_det = vvae_fast.planar_flow(row, *(t[r % len(t)] for t in sets))
        torch.testing.assert_close(y.reshape(-1, DIM)[r], z_K)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y).reshape(-1)[r], log_det)
    other = y.clone()
    torch.testing.assert_close(transform.inv(other), x.expand(wanted))
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), -transform.inv.log_abs_det_jacobian(y, x))


def transform_params(transform):
    return transform.u, transform.w, transform.b


def test_log_det_is_the_jacobians():
    transform, x = transform_of(grad=False), points()
    jacobian = torch.autograd.functional.jacobian(transform, x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, transform(x)), torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("activation", ["tanh", "leaky_relu", "elu", "sigmoid", "linear"])
@pytest.mark.parametrize("constraint", ["softplus", "log_softplus", "none"])
def test_options_reach_the_flow(activation, constraint):
    transform = transform_of(activation=activation, constraint=constraint, slope=0.1)
    x = points(5)
    z_K, log_det = vvae_fast.planar_flow(
        x, *transform_params(transform), activation=activation, slope=0.1, constraint=constraint
    )
    assert torch.equal(transform(x), z_K)
    assert torch.equal(transform.log_abs_det_jacobian(x, z_K), log_det)
    assert transform.bijective == transform.inv.bijective == (constraint != "none")
    if transform.bijective:
        torch.testing.assert_close(transform.inv(z_K.detach()), x)


@caches
def test_log_prob_integrates_to_one(cache_size):
    u, w, b = (t.to(torch.float64) for t in random_problem((1,), 4, 2, scale=0.6)[1:4])
    base = Independent(Normal(torch.zeros(2, dtype=torch.float64), 1.0), 1)
    distribution = TransformedDistribution(base, PlanarTransform(u, w, b, cache_size=cache_size))
    line = torch.linspace(-9, 9, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    mass = distribution.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


@caches
@pytest.mark.parametrize("params", [(), (5,)])
def test_in_a_transformed_distribution(cache_size, params):
    transform = transform_of(params, cache_size)
    distribution = TransformedDistribution(Normal(torch.zeros(DIM, dtype=torch.float64), 1.0), [transform])
    assert (distribution.batch_shape, distribution.event_shape) == (params, (DIM,))
    samples = distribution.rsample((4,))
    assert samples.shape == (4, *params, DIM)
    assert distribution.log_prob(samples).shape == (4, *params)
    torch.testing.assert_close(distribution.log_prob(samples), distribution.log_prob(samples.clone()))
    assert not distribution.sample((4,)).requires_grad
    assert distribution.support is constraints.real_vector
    expanded = distribution.expand((6, 5))
    assert expanded.rsample((2,)).shape == (2, 6, 5, DIM)
    assert expanded.log_prob(points(6, 5)).shape == (6, 5)


@caches
def test_composes(cache_size):
    flow, affine = transform_of(cache_size=cache_size), AffineTransform(1.0, 2.0, event_dim=1)
    both = ComposeTransform([flow, affine], cache_size=cache_size)
    x = points(6)
    y = both(x)
    torch.testing.assert_close(both.inv(y.clone()), x)
    wanted = flow.log_abs_det_jacobian(x, flow(x)) + DIM * math.log(2)
    torch.testing.assert_close(both.log_abs_det_jacobian(x, y), wanted)
    assert both.bijective
    independent = IndependentTransform(flow, 1)
    assert independent.log_abs_det_jacobian(x, independent(x)).shape == ()
    torch.testing.assert_close(independent.inv(independent(x).clone()), x)
    stacked = StackTransform([flow, transform_of(seed=1)], dim=0)
    assert stacked.inv(stacked(points(2, 6))).shape == (2, 6, DIM)
    torch.testing.assert_close((flow._call(x), flow._inverse(flow._call(x))), (flow(x), x))
    inverse = TransformedDistribution(normal(), [flow.inv])
    torch.testing.assert_close(inverse.log_prob(x), normal().log_prob(flow(x)) + flow.log_abs_det_jacobian(x, flow(x)))


def test_torchs_conventions():
    transform = transform_of()
    assert transform.domain is transform.codomain is constraints.real_vector
    assert transform.event_dim == 1
    assert transform.inv.inv is transform
    assert transform.with_cache(0) is transform
    cached = transform.with_cache(1)
    assert cached._cache_size == 1
    assert cached == transform
    assert cached.u is transform.u
    same = PlanarTransform(*(t.detach().clone() for t in transform_params(transform)))
    assert same == transform
    assert same.inv == transform.inv
    assert transform != transform_of(seed=1)
    assert transform != transform_of(constraint="none")
    assert transform != AffineTransform(0.0, 1.0)
    with pytest.raises(ValueError, match="cache_size"):
        transform.with_cache(2)
    assert repr(transform) == "PlanarTransform(u=(11, 3), activation='tanh', slope=0.2, constraint='softplus')"
    x = points(2)
    y = cached(x)
    assert cached(x) is y
    assert cached.inv(y) is x
    for other in (copy.deepcopy(same.with_cache(1)), pickle.loads(pickle.dumps(same))):
        assert other == same
    copy.copy(cached)(x)


def test_a_cached_transform_that_was_called_can_be_copied():
    transform = transform_of(cache_size=1)
    x = points(2)
    y = transform(x)
    other = copy.deepcopy(transform)
    assert torch.equal(other(x), y)
    assert other == transform


def test_a_call_inverts_and_computes_once(monkeypatch):
    """The log_prob of a sample runs nothing; of another point, the inverse once."""
    calls = []
    for name in ("planar_flow", "planar_flow_inverse"):
        function = getattr(vvae_fast.distributions, name)
        monkeypatch.setattr(
            vvae_fast.distributions, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k)
        )
    distribution = TransformedDistribution(normal(), transform_of(cache_size=1))
    calls.clear()
    samples = distribution.rsample((4,))
    distribution.log_prob(samples)
    assert calls == ["planar_flow"]
    distribution.log_prob(points(4))
    assert calls == ["planar_flow", "planar_flow_inverse"]


@pytest.mark.parametrize("name", ["u", "w", "b", "x", "y"])
def test_the_cache_sees_changes_in_place(name):
    transform = transform_of(cache_size=1, grad=False)
    x = points(5)
    y = transform(x)
    transform.log_abs_det_jacobian(x, y)
    {"x": x, "y": y}.get(name, getattr(transform, name, None)).add_(0.1)
    fresh = transform.with_cache(0)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x, y))
    transform.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(transform.inv(y), fresh.inv(y))
    torch.testing.assert_close(transform(x), fresh(x))


def test_the_cache_sees_other_tensors():
    transform = transform_of(cache_size=1, grad=False)
    x = points(5)
    y = transform(x)
    transform.u = transform.u + 0.5
    assert not torch.equal(transform(x), y)
    square = PlanarTransform(torch.randn(3, 3), torch.randn(3, 3), torch.randn(3), cache_size=1)
    x = torch.randn(5, 3)
    y = square(x)
    square.u = square.u.t()  # the same memory and version
    assert not torch.equal(square(x), y)


def test_the_cache_sees_an_optimizers_step():
    """The same x in every step: neither old values nor a graph that is freed."""
    transform = transform_of(cache_size=1)
    optimizer = torch.optim.Adam(transform_params(transform), 0.05)
    x, losses = points(64), []
    for _ in range(5):
        y = transform(x)
        loss = (0.5 * y.square().sum(-1) - transform.log_abs_det_jacobian(x, y)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5


@caches
@pytest.mark.parametrize("draw", ["sample", "rsample"])
def test_gradients_of_a_samples_log_prob(draw, cache_size):
    """Those of log q at the point that was drawn: a sample without a graph is no constant for its log_prob."""
    transform = transform_of(cache_size=cache_size)
    distribution = TransformedDistribution(normal(), transform)
    samples = getattr(distribution, draw)((6,))
    point = samples if draw == "rsample" else samples.clone()
    got = torch.autograd.grad(distribution.log_prob(samples).sum(), transform_params(transform), retain_graph=True)
    fresh = TransformedDistribution(normal(), transform.with_cache(0))
    wanted = torch.autograd.grad(fresh.log_prob(point).sum(), transform_params(transform))
    for g, v in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, v)


def test_inference_mode():
    transform = transform_of(cache_size=1)
    distribution = TransformedDistribution(normal(), transform)
    with torch.inference_mode():
        samples = distribution.sample((3,))
        value = distribution.log_prob(samples)
    torch.testing.assert_close(value, distribution.log_prob(samples.clone()).detach())


def test_without_a_constraint_only_samples_are_known():
    transform = transform_of(cache_size=1, constraint="none", grad=False)
    distribution = TransformedDistribution(normal(), transform)
    samples = distribution.sample((3,))
    assert distribution.log_prob(samples).isfinite().all()
    with pytest.raises(NotImplementedError, match=r'constraint must be .* to invert, got "none"'):
        distribution.log_prob(samples.clone())


def test_without_a_constraint_a_samples_log_prob_has_gradients_where_the_sample_has():
    distribution = TransformedDistribution(normal(), transform_of(cache_size=1, constraint="none"))
    samples = distribution.sample((3,))
    with torch.no_grad():
        assert distribution.log_prob(samples).isfinite().all()
    with pytest.raises(NotImplementedError, match="draw it with rsample"):
        distribution.log_prob(samples)
    assert distribution.log_prob(distribution.rsample((3,))).requires_grad


def test_leaky_relu_steeper_below_zero_guarantees_no_inverse():
    assert not transform_of(activation="leaky_relu", slope=1.5).bijective
    assert transform_of(activation="leaky_relu", slope=1.0).bijective
    assert transform_of(activation="tanh", slope=1.5).bijective


def test_the_cache_sees_what_wants_gradients():
    transform = transform_of(cache_size=1, grad=False)
    x = points(5)
    assert not transform(x).requires_grad
    assert transform(x.requires_grad_()).requires_grad
    transform = transform_of(cache_size=1, grad=False)
    transform(x.requires_grad_(False))
    transform.u.requires_grad_()
    assert transform(x).requires_grad


def test_the_cache_sees_new_data():
    transform = transform_of(cache_size=1)
    x = points(5)
    y = transform(x)
    transform.u.data = transform.u.data + 0.5
    assert not torch.equal(transform(x), y)


@caches
def test_under_transforms_and_compile(cache_size):
    transform, x = transform_of(cache_size=cache_size), points(5)

    def log_prob(x):
        y = transform(x)
        return y.square().sum() - transform.log_abs_det_jacobian(x, y).sum()

    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(log_prob(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(log_prob)(x), wanted)
    torch.testing.assert_close(torch.vmap(torch.func.grad(log_prob))(x), wanted)
    compiled = torch.compile(log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), log_prob(x))


def test_gradcheck():
    transform, x = transform_of((2,)), points(3, 2).requires_grad_()
    tensors = [t.detach()[:, :2].clone().requires_grad_() for t in transform_params(transform)]

    def both_ways(x, u, w, b):
        flow = PlanarTransform(u, w, b)
        y = flow(x)
        return y, flow.log_abs_det_jacobian(x, y), flow.inv(x)

    assert torch.autograd.gradcheck(both_ways, (x, *tensors))


def test_eleven_steps_of_flowjax_formula():
    """flowjax is no package of torch's: its planar step from its documentation, w . u > -1 by log(1 + softplus)."""
    p = random_problem((50,), STEPS, 4, scale=0.8, dtype=torch.float64)
    z, log_det = p.z, torch.zeros(50, dtype=torch.float64)
    for u, w, b in zip(p.u, p.w, p.b, strict=True):
        alpha = w @ u
        u = u + (torch.log1p(F.softplus(alpha)) - 1 - alpha) * w / (w @ w)
        h = torch.tanh(z @ w + b)
        log_det = log_det + torch.log(torch.abs(1 + (1 - h**2) * (w @ u)))
        z = z + u * h[:, None]
    transform = PlanarTransform(p.u, p.w, p.b, constraint="log_softplus")
    torch.testing.assert_close(transform(p.z), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transform.log_abs_det_jacobian(p.z, z), log_det, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transform.inv(z), p.z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("error", "message", "params", "options"),
    [
        (ValueError, r"u must have shape \[K, D\] or \[\*params, K, D\], got \(3,\)", [(3,), (3,), ()], {}),
        (ValueError, r"w must have u's shape \(2, 3\), got \(2, 4\)", [(2, 3), (2, 4), (2,)], {}),
        (ValueError, r"b must have u's shape without", [(2, 3), (2, 3), (3,)], {}),
        (ValueError, r"activation must be one of", [(2, 3), (2, 3), (2,)], {"activation": "relu"}),
        (ValueError, r"constraint must be one of", [(2, 3), (2, 3), (2,)], {"constraint": "exp"}),
        (ValueError, r"cache_size must be 0 or 1", [(2, 3), (2, 3), (2,)], {"cache_size": 2}),
        (ValueError, r"u must have shape .* with D >= 1, got \(2, 0\)", [(2, 0), (2, 0), (2,)], {}),
    ],
)
def test_errors(error, message, params, options):
    with pytest.raises(error, match=message):
        PlanarTransform(*(torch.zeros(shape) for shape in params), **options)


def test_errors_of_samples():
    with pytest.raises(TypeError, match=r"u must be a torch.Tensor, got list"):
        PlanarTransform([1.0], torch.zeros(1), torch.zeros(1))
    with pytest.raises(TypeError, match=r"u must be float32, .* got torch.int64"):
        PlanarTransform(torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(2))
    transform = transform_of((7,))
    for name, calls in (
        ("x", [transform, transform._call, lambda x: transform.log_abs_det_jacobian(x, x)]),
        ("y", [transform.inv, transform._inverse]),
    ):
        for call in calls:
            with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
                call([0.0] * DIM)
    for name, calls in (
        ("x", [transform, lambda x: transform.forward_shape(x.shape)]),
        ("y", [transform.inv, lambda y: transform.inverse_shape(y.shape)]),
    ):
        for call in calls:
            with pytest.raises(ValueError, match=rf"{name} must be \[\*batch, D\] .* D = 3, got \(7, 2\)"):
                call(torch.zeros(7, 2))
            with pytest.raises(ValueError, match=rf"{name} must be .* D = 3, got \(\)"):
                call(torch.zeros(()))
            with pytest.raises(ValueError, match=rf"{name}'s batch dimensions must broadcast .*, \(7,\), got \(5,\)"):
                call(torch.zeros(5, DIM))
