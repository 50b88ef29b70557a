"""vvae_fast.interop.zuko in zuko's flows."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributions import Distribution

from vvae_fast import distributions

zuko = pytest.importorskip("zuko")

from vvae_fast.interop.zuko import PlanarTransform, SylvesterTransform  # noqa: E402

DIM, CONTEXT = 3, 2
KINDS = {
    "planar": lambda context=0: PlanarTransform(DIM, context, 5, (16,)),
    "leaky_relu": lambda context=0: PlanarTransform(DIM, context, 5, (16,), activation="leaky_relu"),
    "orthogonal": lambda context=0: SylvesterTransform(DIM, context, 3, (16,), 2),
    "triangular": lambda context=0: SylvesterTransform(DIM, context, 3, (16,), kind="triangular"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _zukos_validation(monkeypatch):
    """zuko switches torch's validation off for the whole process when it is imported; tests/conftest.py undoes it."""
    monkeypatch.setattr(Distribution, "_validate_args", False)
    monkeypatch.setattr(Distribution, "arg_constraints", {})


def normal(dim=DIM, dtype=None):
    zeros, ones = torch.zeros(dim, dtype=dtype), torch.ones(dim, dtype=dtype)
    return zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, ones, buffer=True)


def moved(transform, seed=0):
    """Away from the identity, in float64."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return transform.double()


def ladj_of(transform, x):
    """By autograd, at each row."""
    jacobians = [torch.autograd.functional.jacobian(transform, row) for row in x]
    return torch.linalg.slogdet(torch.stack(jacobians)).logabsdet


@each_kind
def test_log_prob_is_the_bases_and_ladj(kind):
    transform = moved(KINDS[kind]())
    flow = zuko.flows.Flow(transform, normal(dtype=torch.float64))
    x = torch.randn(7, DIM, dtype=torch.float64)
    z, ladj = transform().call_and_ladj(x)
    torch.testing.assert_close(z, transform()(x))
    torch.testing.assert_close(ladj, ladj_of(transform(), x))
    torch.testing.assert_close(transform().log_abs_det_jacobian(x, z), ladj)
    torch.testing.assert_close(flow().log_prob(x), flow.base().log_prob(z) + ladj)
    assert flow().event_shape == (DIM,)
    flow().log_prob(x).sum().backward()
    assert all(p.grad is not None for p in transform.parameters())


@each_kind
def test_samples_come_by_the_inverse(kind):
    transform = moved(KINDS[kind]())
    flow = zuko.flows.Flow(transform, normal(dtype=torch.float64))()
    x, log_prob = flow.rsample_and_log_prob((9,))
    torch.testing.assert_close(log_prob, flow.log_prob(x))
    torch.testing.assert_close(transform().inv(transform()(x)), x)
    back, minus = transform().inv.call_and_ladj(transform()(x))
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -transform().call_and_ladj(x)[1])
    assert flow.sample((4, 5)).shape == (4, 5, DIM)


@each_kind
def test_inv_samples_by_the_forward_pass(kind):
    transform = moved(KINDS[kind]())
    flow = zuko.flows.Flow(transform.inv, normal(dtype=torch.float64))
    torch.manual_seed(5)
    x, log_prob = flow().rsample_and_log_prob((9,))
    torch.manual_seed(5)
    z = flow.base().rsample((9,))
    torch.testing.assert_close(x, transform()(z))
    torch.testing.assert_close(log_prob, flow().log_prob(x))


@each_kind
def test_a_context_of_each_row(kind):
    transform = moved(KINDS[kind](CONTEXT))
    flow = zuko.flows.Flow(transform, normal(dtype=torch.float64))
    c, x = torch.randn(6, CONTEXT, dtype=torch.float64), torch.randn(4, 6, DIM, dtype=torch.float64)
    assert flow(c).event_shape == (DIM,)
    log_prob = flow(c).log_prob(x)
    assert log_prob.shape == (4, 6)
    for k in range(6):
        torch.testing.assert_close(flow(c[k]).log_prob(x[:, k]), log_prob[:, k])
    torch.testing.assert_close(flow(c[:1]).log_prob(x[0]), flow(c[0]).log_prob(x[0]))  # broadcast
    samples, of_samples = flow(c).rsample_and_log_prob((5,))
    assert samples.shape == (5, 6, DIM)
    torch.testing.assert_close(of_samples, flow(c).log_prob(samples))
    log_prob.sum().backward()
    assert all(p.grad is not None for p in transform.parameters())
    with pytest.raises(ValueError, match=r"c must be a context \[\*, C\].* got None"):
        flow()


@each_kind
@pytest.mark.parametrize("context", [0, CONTEXT])
def test_starts_as_the_identity(kind, context):
    x = torch.randn(6, DIM)
    z, ladj = KINDS[kind](context)(torch.randn(6, CONTEXT)).call_and_ladj(x)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(ladj, torch.zeros(6), rtol=0, atol=1e-5)


def test_beside_zukos_own_transforms():
    spline = zuko.flows.coupling.GeneralCouplingTransform(DIM, CONTEXT)
    flow = zuko.flows.Flow([spline, PlanarTransform(DIM, CONTEXT), SylvesterTransform(DIM, CONTEXT)], normal())
    c = torch.randn(6, CONTEXT)
    x, log_prob = flow(c).rsample_and_log_prob()
    torch.testing.assert_close(flow(c).log_prob(x), log_prob, rtol=1e-3, atol=1e-3)


def test_torchs_transform_in_an_unconditional_one():
    """`vvae_fast.distributions.PlanarTransform` needs no class of interop there."""
    u, w, b = torch.randn(4, DIM), torch.randn(4, DIM), torch.randn(4)
    lazy = zuko.lazy.UnconditionalTransform(distributions.PlanarTransform, u, w, b)
    x = torch.randn(6, DIM)
    z, ladj = lazy().call_and_ladj(x)
    torch.testing.assert_close(z, distributions.PlanarTransform(u, w, b)(x))
    torch.testing.assert_close(zuko.flows.Flow(lazy, normal())().log_prob(x), normal()().log_prob(z) + ladj)
    assert len(list(lazy.parameters())) == 3


@pytest.mark.parametrize("context", [0, 1])
def test_a_density_is_fitted(context):
    """A sheared normal, by a number that the context is if there is one. The bound is its entropy."""
    torch.manual_seed(0)

    def draw(n):
        a, c = torch.randn(n, 2), torch.randn(n, 1)
        bend = c[:, 0] if context else torch.ones(n)
        return torch.stack([a[:, 0], 0.5 * a[:, 1] + bend * a[:, 0]], -1), c

    flow = zuko.flows.Flow([PlanarTransform(2, context, 4, (16,)), SylvesterTransform(2, context, 2, (16,))], normal(2))
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-2)
    losses = []
    for _ in range(150):
        x, c = draw(128)
        loss = -flow(c if context else None).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    entropy = 1 + torch.log(torch.tensor(2 * torch.pi)).item() + torch.tensor(0.5).log().item()
    assert sum(losses[-30:]) / 30 < entropy + 0.2 < losses[0], (entropy, losses[0], losses[-1])


def test_state_dicts_and_errors():
    other, transform = (SylvesterTransform(DIM, CONTEXT) for _ in range(2))
    other.load_state_dict(transform.state_dict())
    c, x = torch.randn(6, CONTEXT), torch.randn(6, DIM)
    assert torch.equal(other(c)(x), transform(c)(x))
    assert "SylvesterTransform(r=(6, 3, 3, 3), activation='tanh'" in repr(transform(c))
    assert isinstance(transform.hyper, nn.Sequential)
    with pytest.raises(ValueError, match="context"):
        PlanarTransform(DIM, -1)
    with pytest.raises(ValueError, match="hidden_features' sizes"):
        PlanarTransform(DIM, 1, hidden_features=(0,))
    with pytest.raises(ValueError, match="x must be"):
        PlanarTransform(DIM)()(torch.zeros(4, 2))


def test_zuko_is_not_needed():
    code = """
import sys
sys.modules["zuko"] = None
import torch
from vvae_fast.interop.zuko import PlanarTransform
z, ladj = PlanarTransform(3, 2)(torch.zeros(5, 2)).call_and_ladj(torch.zeros(5, 3))
assert ladj.shape == (5,)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
