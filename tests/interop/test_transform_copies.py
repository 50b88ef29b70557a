"""Every transform of the package: its inverse, its copies, and a cache that no writer of parameters leaves stale.

Each test runs with Pyro imported, which replaces methods of torch's Transform, and one in a process without it.
"""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    IndependentTransform,
    Normal,
    TransformedDistribution,
    constraints,
)

from vvae_fast.distributions import PlanarTransform
from vvae_fast.interop.pyro import ConditionalPlanar, Planar, PlanarStack

pyro_optim = pytest.importorskip("pyro.optim.clipped_adam")
pyro_distributions = pytest.importorskip("pyro.distributions")
DIM = 3


def planar_transform(cache_size=1):
    u, w, b = (nn.Parameter(0.8 * torch.randn(shape)) for shape in ((4, DIM), (4, DIM), (4,)))
    return PlanarTransform(u, w, b, cache_size=cache_size)


def conditioned(cache_size=1):
    return ConditionalPlanar(Hypernet()).condition(torch.randn(2)).with_cache(cache_size)


class Hypernet(nn.Module):
    """bias, u and w of a context, and noise on them in training."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 1 + 2 * DIM), nn.Dropout(0.5)
        self.eval()

    def forward(self, context):
        return self.dropout(self.linear(context)).split([1, DIM, DIM], -1)


KINDS = {
    "PlanarTransform": planar_transform,
    "PlanarStack": lambda cache_size=1: PlanarStack(DIM, 4, cache_size=cache_size),
    "Planar": lambda cache_size=1: Planar(DIM, cache_size=cache_size),
    "ConditionedPlanar": conditioned,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def parameters(transform):
    return [t for t in transform._sources() if t.requires_grad]


def is_inverse_pair(transform):
    assert transform.inv.inv is transform
    assert transform.inv is transform.inv
    assert transform.inv.inv.inv is transform.inv


@kinds
def test_a_cached_copy_has_its_own_inverse(kind):
    transform = kind(0)
    inverse = transform.inv
    cached = transform.with_cache(1)
    x = torch.randn(2, DIM)
    y = cached(x)
    assert cached.inv(y) is x
    is_inverse_pair(cached)
    is_inverse_pair(transform)
    assert transform.inv is inverse
    assert inverse.with_cache(1).inv(x) is not x
    uncached = cached.with_cache(0)
    assert uncached.inv(y) is not x
    assert uncached._cached_call is None
    is_inverse_pair(uncached)
    assert cached.with_cache(1) is cached
    assert type(cached) is type(transform)
    for one, other in zip(parameters(cached), parameters(transform), strict=True):
        assert one is other
    with pytest.raises(ValueError, match="cache_size must be 0 or 1, got 2"):
        transform.with_cache(2)


def saved(transform):
    stream = io.BytesIO()
    torch.save(transform, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda transform: pickle.loads(pickle.dumps(transform)),
    "save": saved,
}


@kinds
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_a_called_transform_and_of_its_inverse(kind, copied):
    transform = kind()
    x = torch.randn(2, DIM)
    y = transform(x)
    transform.inv(y)
    other = copied(transform)
    assert other._cached_call is None
    assert torch.equal(other(x), y)
    assert other.inv(other(x)) is x
    is_inverse_pair(other)
    inverse = copied(transform.inv)
    assert inverse is not transform.inv
    is_inverse_pair(inverse)
    torch.testing.assert_close(inverse(y.detach().clone()), x, rtol=1e-4, atol=1e-4)
    assert transform.inv(y) is x  # the copies took nothing away
    if copied is not copy.copy:
        one, both = copied([transform, transform.inv])
        assert both.inv is one


@kinds
def test_torchs_interface(kind):
    transform, x = kind(), torch.randn(2, DIM)
    assert transform.domain is transform.codomain is constraints.real_vector
    assert transform.inv.domain is transform.inv.codomain is constraints.real_vector
    assert transform.event_dim == transform.inv.event_dim == 1
    assert transform.bijective
    assert transform.forward_shape(x.shape) == transform.inv.forward_shape(x.shape) == x.shape
    assert transform == transform
    assert transform.inv == transform.inv
    assert transform != kind()
    assert transform.inv != kind().inv
    assert transform != transform.inv
    assert type(transform).__name__ in repr(transform)
    assert "Inverse" in repr(transform.inv)
    affine = AffineTransform(1.0, 2.0, event_dim=1)
    for cache_size in (0, 1):
        both = ComposeTransform([transform, affine, kind().inv], cache_size=cache_size)
        assert both.inv.inv is both
        again = copy.deepcopy(both)  # not yet called: torch's own transforms keep their graphs
        torch.testing.assert_close(both.inv(both(x).detach().clone()), x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(x), both(x))
        torch.testing.assert_close(again.inv(both(x).detach().clone()), x, rtol=1e-4, atol=1e-4)
    independent = IndependentTransform(transform, 1)
    assert independent.with_cache(0).log_abs_det_jacobian(x, independent(x)).shape == ()
    base = Independent(Normal(torch.zeros(DIM), 1.0), 1)
    for steps in ([transform], [transform.inv], [transform, affine, transform.inv]):
        for each in (TransformedDistribution(base, steps), copy.deepcopy(TransformedDistribution(base, steps))):
            assert each.expand((5,)).rsample((2,)).shape == (2, 5, DIM)
            assert each.log_prob(each.rsample((2,))).isfinite().all()


def fused_adam(tensors):
    return torch.optim.Adam(tensors, 0.1, fused=True)


def foreach_sgd(tensors):
    return torch.optim.SGD(tensors, 0.1, foreach=True)


def clipped_adam(tensors):
    return pyro_optim.ClippedAdam(tensors, 0.1)


def adagrad_rmsprop(tensors):
    return __import__("pyro.optim.adagrad_rmsprop", fromlist=["_"]).AdagradRMSProp(tensors)


def by_data(tensors):
    for t in tensors:
        t.data.mul_(1.5)


def by_numpy(tensors):
    for t in tensors:
        t.detach().numpy()[:] *= 1.5


def in_place(tensors):
    with torch.no_grad():
        for t in tensors:
            t.mul_(1.5)


def step_of(make):
    def write(tensors):
        for t in tensors:
            t.grad = torch.ones_like(t)
        make(tensors).step()

    return write


WRITERS = {
    **{make.__name__: step_of(make) for make in (fused_adam, foreach_sgd, clipped_adam, adagrad_rmsprop)},
    **{write.__name__: write for write in (by_data, by_numpy, in_place)},
}


@kinds
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("grad", [False, True])
def test_no_writer_of_parameters_leaves_a_stale_cache(kind, write, grad):
    """PyTorch's fused optimizers, Pyro's and numpy write without a trace in the tensors' versions."""
    transform, x = kind(), torch.randn(2, DIM)
    with torch.set_grad_enabled(grad):
        y = transform(x)
        write(parameters(transform))
        fresh = transform.with_cache(0)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x, y))
        torch.testing.assert_close(transform.inv(y), fresh.inv(y))
        assert not torch.allclose(fresh(x), y)
        torch.testing.assert_close(transform(x), fresh(x))


@kinds
def test_the_cache_serves_while_nothing_changes(kind):
    transform, x = kind(), torch.randn(2, DIM)
    y = transform(x)
    assert transform(x) is y
    assert transform.inv(y) is x
    assert transform.log_abs_det_jacobian(x, y) is transform.log_abs_det_jacobian(x, y)


def test_the_cache_sees_the_mode_of_a_hypernetwork():
    transform, x = conditioned(), torch.randn(2, DIM)
    y = transform(x)
    transform.nn.train()
    assert transform(x) is not y


def test_the_cache_sees_other_options():
    transform, x = planar_transform(), torch.randn(2, DIM)
    y = transform(x)
    transform.options["activation"] = "elu"
    assert not torch.equal(transform(x), y)


def test_modules_are_pyros():
    """What asks for Pyro's classes finds them, and every public name of theirs."""
    transforms = pyro_distributions.transforms
    for ours in (Planar(DIM), PlanarStack(DIM, 2)):
        assert isinstance(ours, pyro_distributions.TransformModule)
        assert not {name for name in dir(transforms.Planar(DIM)) if name[0] != "_"} - set(dir(ours))
        assert isinstance(hash(ours), int)
    conditional = ConditionalPlanar(Hypernet())
    theirs = transforms.ConditionalPlanar(Hypernet())
    assert not {name for name in dir(theirs) if name[0] != "_"} - set(dir(conditional))
    context = torch.randn(2)
    names = {name for name in dir(theirs.condition(context)) if name[0] != "_"}
    assert not names - set(dir(conditional.condition(context)))
    assert conditional.inv.inv is conditional
    x = torch.randn(5, DIM)
    y = conditional.condition(context)(x).detach().clone()
    torch.testing.assert_close(conditional.inv.condition(context)(y), x, rtol=1e-4, atol=1e-4)
    u, w = torch.randn(7, DIM), torch.randn(7, DIM)
    torch.testing.assert_close(Planar(DIM).u_hat(u, w), transforms.Planar(DIM).u_hat(u, w))


def test_without_pyro():
    code = """
import sys
sys.modules["pyro"] = None
import copy, pickle, torch
from vvae_fast.distributions import PlanarTransform
from vvae_fast.interop.pyro import PlanarStack
for t in (PlanarTransform(torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)), PlanarStack(3, 4, cache_size=0)):
    t.inv
    c, x = t.with_cache(1), torch.randn(5, 3)
    y = c(x)
    assert c.inv(y) is x
    for copied in (copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        other = copied(c.inv)
        assert other.inv.inv is other
        assert torch.allclose(other(y.detach().clone()), x, atol=1e-3)
        assert copied(c).inv.inv is not c
"""
    subprocess.run([sys.executable, "-c", code], check=True)
