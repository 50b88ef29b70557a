"""What decides how a pass runs: the samples that share parameters, the range of the determinants."""

import pytest
import torch
from problems import assert_float64_is_the_oracle, random_problem, relative_errors, run

import vvae_fast
from vvae_fast import reference
from vvae_fast.backends import operators
from vvae_fast.spec import FlowSpec


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("samples", [2, 15, 16, 80])
def test_samples_that_share_a_set(isa, samples):
    """Few samples of each parameter set run the direct recursion, many the compact form."""
    for sets, num_steps, dim in ((1, 18, 6), (3, 5, 20), (19, 33, 3), (3, 0, 4)):
        assert_float64_is_the_oracle((samples, sets), num_steps, dim, (sets,))


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_determinants_whose_product_leaves_the_range(isa, amortized, dtype):
    """A row whose 100 determinants multiply to 2^593, 2^-865 or 2^413 beside rows that must not notice."""
    num_steps, dim = 100, 3
    w = torch.eye(dim, dtype=dtype)[:1].expand(num_steps, dim)
    u = torch.where(torch.arange(num_steps)[:, None] % 2 == 0, 60.0, -6.0) * w  # w . u = 60 and -6 at every other step
    b = torch.zeros(num_steps, dtype=dtype)
    for constraint, params in (("softplus", (60 * w, w, b)), ("softplus", (-6 * w, w, b)), ("none", (u, w, b))):
        z = torch.zeros(40, dim, dtype=dtype)
        z[1:] = torch.cat([torch.linspace(-300, -200, 20), torch.linspace(200, 300, 19)])[:, None]  # h' stays 0 there
        sets = tuple(t.expand(40, *t.shape) for t in params) if amortized else params
        _, log_det = vvae_fast.planar_flow(z, *sets, constraint=constraint, backend="cpp")
        wanted = reference.planar_forward(*(t.double() for t in (z, *sets)), FlowSpec(constraint))[1]
        torch.testing.assert_close(log_det.double(), wanted, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-5)
        alone = vvae_fast.planar_flow(z[-1:], *(t[-1:] if amortized else t for t in sets), constraint=constraint)
        assert torch.equal(alone[1], log_det[-1:])


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_steps_near_the_identity_keep_relative_accuracy(isa, amortized):
    """Every determinant is within 1e-3 of 1: what rounding takes from their product is carried along."""
    w, b = torch.randn(40, 6) / 6**0.5, torch.randn(40)
    z, params = torch.randn(64, 6), (1e-4 * torch.randn(40, 6).abs() * w.sign(), w, b)
    sets = (t.expand(64, *t.shape) if amortized else t for t in params)
    log_det = operators.planar_forward(z, *sets, *FlowSpec("none").arguments(), False)[1]
    wanted = reference.planar_forward(*(t.double() for t in (z, *params)), FlowSpec("none"))[1]
    torch.testing.assert_close(log_det.double(), wanted, rtol=2e-6, atol=0)


def test_an_overflowing_determinant_has_an_infinite_logarithm(isa):
    w = torch.tensor([[1e19, 0.0]])
    for params in ((30 * w, w, torch.zeros(1)), tuple(t[None] for t in (30 * w, w, torch.zeros(1)))):
        assert vvae_fast.planar_flow(torch.zeros(1, 2), *params, backend="cpp")[1].item() == float("inf")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sets", [(), (16,)])
@pytest.mark.parametrize("dim", [16, 17])
def test_outputs_larger_than_the_caches(isa, dim, sets):
    """They are written past the caches where their addresses are aligned: rows of 17 are not."""
    p = random_problem((130_000,) if not sets else (8125, 16), 2, dim, sets, scale=0.5)
    exact = p.to(torch.float64)
    got, wanted = run(p, backend="cpp"), run(exact, backend="cpp")  # whose double outputs are as large
    assert max(relative_errors(got, wanted)) < 1e-4
    few = tuple(t[:50] if t.shape[:1] == p.z.shape[:1] else t for t in exact.inputs)
    for x, y in zip(wanted, reference.planar_forward(*few)[:2], strict=False):
        torch.testing.assert_close(x[:50], y)
