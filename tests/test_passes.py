"""What decides how a pass runs: the samples that share parameters, the range of the determinants."""

import pytest
import torch
from problems import assert_close_to_oracle, random_problem

import vvae_fast
from vvae_fast import reference


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("samples", [2, 15, 16, 80])
def test_samples_that_share_a_set(isa, samples):
    """Few samples of each parameter set run the direct recursion, many the compact form."""
    for sets, num_steps, dim in ((1, 18, 6), (3, 5, 20), (19, 33, 3), (3, 0, 4)):
        p = random_problem((samples, sets), num_steps, dim, (sets,), scale=0.5, dtype=torch.float64)
        assert_close_to_oracle(p, "softplus", 1e-10)


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
        wanted = reference.planar_forward(*(t.double() for t in (z, *sets)), constraint)[1]
        torch.testing.assert_close(log_det.double(), wanted, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-5)
        alone = vvae_fast.planar_flow(z[-1:], *(t[-1:] if amortized else t for t in sets), constraint=constraint)
        assert torch.equal(alone[1], log_det[-1:])
