"""The objectives of training: the ELBO with a weight on its KL, and the importance-weighted bound, with gradients."""

import itertools
import math

import pytest
import torch
from test_vae import BATCH, HIDDEN, LATENT, AffineFlow, bits, linear_gaussian_vae, make_vae, seeded
from torch import Tensor

from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.vae import VAE
from vvae_fast.train.run.objective import free_energy

FLOWS = {
    "vanilla": lambda: None,
    "planar": lambda: PlanarFlow(LATENT, 3),
    "amortized": lambda: AmortizedPlanarFlow(LATENT, 3, HIDDEN),
}
each_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)


def noise_of(samples: int, batch: int = BATCH, dim: int = LATENT) -> Tensor:
    shape = (batch, dim) if samples == 1 else (samples, batch, dim)
    return torch.randn(shape, dtype=torch.float64, generator=seeded())


def log_weights(vae: VAE, x: Tensor, noise: Tensor) -> Tensor:
    """(55)'s log w, [S, B], by its definition."""
    mean, log_var, features = vae.encode(x)
    z = mean + (0.5 * log_var).exp() * noise
    log_q = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(z).sum(-1)
    if vae.flow is not None:
        z, log_det = vae.flow(z, features) if isinstance(vae.flow, AmortizedPlanarFlow) else vae.flow(z)
        log_q = log_q - log_det
    return vae.log_joint(x, z) - log_q


def gradients(value: Tensor, vae: VAE) -> list[Tensor]:
    return list(torch.autograd.grad(value.sum(), [*vae.parameters()]))


@each_flow
@pytest.mark.parametrize("samples", [1, 5])
def test_iwae_is_the_log_of_the_mean_weight_and_so_are_its_gradients(flow, samples):
    vae, x, noise = make_vae(flow()), bits(), noise_of(samples)
    got = vae.iwae(x, samples, noise=noise)
    wanted = log_weights(vae, x, noise.reshape(samples, BATCH, LATENT)).exp().mean(0).log()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(got, vae), gradients(wanted, vae), rtol=1e-10, atol=1e-12)


@each_flow
def test_iwaes_gradient_is_the_normalised_weights_mean_of_those_of_log_w(flow):
    vae, x, noise = make_vae(flow()), bits(), noise_of(5)
    log_w = log_weights(vae, x, noise)
    surrogate = (log_w.softmax(0).detach() * log_w).sum(0)
    torch.testing.assert_close(
        gradients(vae.iwae(x, 5, noise=noise), vae), gradients(surrogate, vae), rtol=1e-10, atol=1e-12
    )


def test_with_one_sample_iwae_is_the_elbo():
    vae, x, noise = make_vae(FLOWS["planar"]()), bits(), noise_of(1)
    torch.testing.assert_close(vae.iwae(x, 1, noise=noise), vae.elbo(x, noise=noise), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make_flow", [lambda: None, lambda: AffineFlow(2, 1.6, 0.3)], ids=["vanilla", "affine"])
def test_iwae_converges_to_log_p_where_it_is_known(make_flow):
    vae, x, log_p = linear_gaussian_vae(make_flow())
    torch.testing.assert_close(vae.iwae(x, 20_000, seeded()), log_p, rtol=0.0, atol=0.05)


def test_iwae_is_between_the_elbo_and_log_p():
    vae, x, log_p = linear_gaussian_vae()
    x, log_p = x.repeat(2000, 1), log_p.repeat(2000)
    with torch.no_grad():
        vae.posterior_head.bias += 0.5
        bounds = [vae.elbo(x, generator=seeded()), *(vae.iwae(x, count, seeded()) for count in (5, 50)), log_p]
    means = [bound.mean().item() for bound in bounds]
    assert all(low + 0.01 < high for low, high in itertools.pairwise(means)), means


def test_training_by_iwae_learns():
    vae, x = make_vae(FLOWS["amortized"]()), bits()
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    losses = []
    for seed in range(60):
        loss = -vae.iwae(x, 5, seeded(seed)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) - 10.0


@each_flow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("samples", [1, 3])
def test_beta_weighs_the_kl_alone(flow, beta, samples):
    vae, x, noise = make_vae(flow()), bits(), noise_of(samples)
    terms = vae.elbo_terms(x, samples, noise=noise)
    elbo = vae.elbo(x, beta, samples, noise=noise)
    torch.testing.assert_close(elbo, -terms.reconstruction - beta * terms.kl, rtol=1e-12, atol=1e-12)
    assert elbo.requires_grad
    torch.testing.assert_close(-elbo.mean(), free_energy(terms, beta), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_a_beta_that_is_no_weight_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be a finite number from 0 on, got"):
        make_vae().elbo(bits(), beta)


def test_a_beta_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match="beta must be a number, got str: 'a'"):
        make_vae().elbo(bits(), "a")


def test_iwae_refuses_what_elbo_terms_refuses():
    vae, x = make_vae(), bits()
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        vae.iwae(x, 0)
    with pytest.raises(ValueError, match=r"noise must be \(5, 6, 4\), got"):
        vae.iwae(x, 5, noise=noise_of(3))
    with pytest.raises(TypeError, match=r"x must be torch\.float64"):
        vae.iwae(x.float(), 5)
