"""Importance sampling from any proposal, and the inference gaps, against a VAE whose log p(x) is known."""

import math
from typing import NamedTuple

import pytest
import torch
from test_vae import AffineFlow, bits, linear_gaussian_vae, make_vae, seeded
from torch import Tensor, nn
from torch import distributions as dist

from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow, inference_gaps
from vvae_fast.nn import Gaussian, Importance
from vvae_fast.nn.importance import from_weights

DIM, HIDDEN = 4, 10  # of make_vae
WRONG = torch.tensor([0.4, -0.3, 0.3, -0.4]).double()  # added to the encoder's means and log-variances


class Known(NamedTuple):
    """A linear-Gaussian VAE with a wrong encoder, x [B, 3], and the true values, [B] each."""

    vae: VAE
    x: Tensor
    log_likelihood: Tensor
    approximation_gap: Tensor
    amortization_gap: Tensor


def known() -> Known:
    """p(x) = N(0, W W' + s^2 I). The posterior has the precision P = I + W' W / s^2, and the best diagonal
    Gaussian has its mean and the precisions P_ii. Its importance weights have a finite variance for a correlation below
    1/2, and here it is 0.42."""
    weight, variance = torch.tensor([[1.2, 0.3], [0.3, 1.0], [0.4, 0.4]]).double(), 0.5
    precision = torch.eye(2).double() + weight.T @ weight / variance
    to_mean = torch.linalg.solve(precision, weight.T) / variance  # [2, 3]
    vae = VAE(nn.Identity(), nn.Linear(3, 2), 2, None, Gaussian(log_var=math.log(variance)), feature_dim=3).double()
    vae.decoder = nn.Linear(2, 3).double()
    with torch.no_grad():
        vae.decoder.weight.copy_(weight)
        vae.decoder.bias.zero_()
        vae.posterior_head.weight.copy_(torch.cat([to_mean, torch.zeros(2, 3)]))
        vae.posterior_head.bias.copy_(torch.cat([torch.zeros(2).double(), -precision.diagonal().log()]) + WRONG)
    marginal = dist.MultivariateNormal(torch.zeros(3).double(), weight @ weight.T + variance * torch.eye(3).double())
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, -0.5], [-2.0, 1.0, 0.3], [0.7, -1.2, 2.0]]).double()
    posterior = dist.MultivariateNormal(x @ to_mean.T, precision_matrix=precision)
    approximation = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    mean, log_var, _ = vae.encode(x)
    q = dist.MultivariateNormal(mean.detach(), torch.diag_embed(log_var.detach().exp()))
    to_posterior = dist.kl_divergence(q, posterior)
    return Known(vae, x, marginal.log_prob(x), approximation.expand(len(x)), to_posterior - approximation)


def assert_within(values: Tensor, expected: Tensor, nats: float) -> None:
    torch.testing.assert_close(values, expected, rtol=0.0, atol=nats)


ACCURATE = {"iterations": 200, "num_samples": 10_000, "chunk_size": 40_000}


def test_gaps_are_the_analytic_ones():
    truth = known()
    assert truth.approximation_gap.min() > 0.09
    assert truth.amortization_gap.min() > 0.3
    more = {**ACCURATE, "num_samples": 20_000, "chunk_size": 80_000}
    gaps = inference_gaps(truth.vae, truth.x, generator=seeded(), **more)
    assert_within(gaps.log_likelihood, truth.log_likelihood, 0.02)
    assert_within(gaps.approximation_gap, truth.approximation_gap, 0.03)
    assert_within(gaps.amortization_gap, truth.amortization_gap, 0.05)
    assert (gaps.effective_sample_size > gaps.plain.effective_sample_size).all()


def test_data_points_are_fitted_each_for_itself():
    """Two at once, with few samples, as all at once."""
    truth = known()
    few = {**ACCURATE, "num_samples": 500, "chunk_size": 32}
    proposal = inference_gaps(truth.vae, truth.x, generator=seeded(), **few).proposal
    best = truth.vae.importance(truth.x, 10_000, chunk_size=40_000, generator=seeded(), proposal=proposal)
    assert_within(truth.log_likelihood - best.elbo, truth.approximation_gap, 0.03)


def test_planar_steps_make_the_family_no_worse():
    truth = known()
    planar = inference_gaps(truth.vae, truth.x, num_steps=4, generator=seeded(), **ACCURATE)
    assert (planar.elbo_optimal > truth.log_likelihood - truth.approximation_gap - 0.02).all()
    assert_within(planar.log_likelihood, truth.log_likelihood, 0.02)
    assert planar.proposal.u.shape == (4, 4, 2)


def test_the_parts_add_up_and_carry_no_graph():
    truth = known()
    gaps = inference_gaps(truth.vae, truth.x, iterations=2, num_samples=50, generator=seeded())
    whole = gaps.approximation_gap + gaps.amortization_gap
    torch.testing.assert_close(whole, gaps.log_likelihood - gaps.elbo)
    assert torch.equal(gaps.plain.elbo, gaps.elbo)
    plain = truth.vae.importance(truth.x, 50, generator=seeded())
    assert all(map(torch.equal, gaps.plain, plain))
    again = truth.vae.importance(truth.x, 50, generator=seeded(5), proposal=gaps.proposal)
    assert again.log_likelihood.shape == gaps.effective_sample_size.shape == (4,)
    assert not any(t.requires_grad for t in (*gaps[:6], *gaps.plain, *gaps.proposal.params))


FLOWS = {
    "vanilla": lambda: None,
    "shared": lambda: PlanarFlow(DIM, 3, activation="leaky_relu", slope=0.3),
    "amortized": lambda: AmortizedPlanarFlow(DIM, 3, HIDDEN, constraint="log_softplus"),
    "low rank": lambda: AmortizedPlanarFlow(DIM, 3, HIDDEN, rank=2),
}


def moved_vae(flow: str) -> VAE:
    """A VAE with a wrong encoder and a flow that is not the identity."""
    vae = make_vae(FLOWS[flow]())
    torch.manual_seed(4)
    nn.init.constant_(vae.posterior_head.bias, 1.0)
    for parameter in vae.flow.parameters() if vae.flow is not None else ():
        nn.init.normal_(parameter, std=0.5)
    return vae


@pytest.mark.parametrize("num_steps", [None, 5])
@pytest.mark.parametrize("flow", FLOWS)
def test_q_starts_as_the_vaes_own_posterior(flow, num_steps):
    """A learning rate near 0 leaves it there: its densities, at the points that the VAE draws, are the VAE's."""
    vae, x = moved_vae(flow), bits()
    fitted = inference_gaps(vae, x, num_steps=num_steps, iterations=1, lr=1e-300, num_samples=2).proposal
    drawn = vae.posterior_sample(x, 3, seeded())
    z, log_q = fitted.sample(3, seeded())
    torch.testing.assert_close(z, drawn.z_K)
    torch.testing.assert_close(log_q, drawn.log_q)
    assert fitted.u.shape == (len(x), num_steps or (0 if flow == "vanilla" else 3), DIM)


@pytest.mark.parametrize("flow", FLOWS)
def test_fitting_raises_the_elbo(flow):
    gaps = inference_gaps(moved_vae(flow), bits(), iterations=100, num_samples=500, generator=seeded())
    assert (gaps.amortization_gap > 0.1).all()
    assert (gaps.effective_sample_size > gaps.plain.effective_sample_size).all()


@pytest.mark.parametrize("batch", [0, 1])
def test_no_data_and_a_single_data_point(batch):
    gaps = inference_gaps(moved_vae("amortized"), bits(batch), iterations=2, num_samples=3)
    assert {t.shape for t in gaps[:6]} == {(batch,)}


def test_the_vae_stays_as_it_was():
    vae, x = make_vae(AmortizedPlanarFlow(DIM, 2, HIDDEN)), bits()
    vae.decoder.eval()
    vae.encoder[1].weight.requires_grad_(False)
    vae.decoder[0].bias.grad = torch.ones_like(vae.decoder[0].bias)
    before = {name: (p.clone(), p.requires_grad) for name, p in vae.named_parameters()}
    modes = [module.training for module in vae.modules()]
    with torch.no_grad():
        inference_gaps(vae, x, iterations=3, num_samples=2)
    assert [module.training for module in vae.modules()] == modes
    for name, parameter in vae.named_parameters():
        value, requires_grad = before[name]
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == requires_grad
        assert (parameter.grad is None) == (parameter is not vae.decoder[0].bias)
    assert torch.equal(vae.decoder[0].bias.grad, torch.ones_like(vae.decoder[0].bias))
    with pytest.raises(KeyboardInterrupt):
        inference_gaps(vae, x, iterations=3, num_samples=2, progress=interrupt)
    assert [module.training for module in vae.modules()] == modes


def test_inference_mode_changes_nothing():
    vae, options = moved_vae("amortized"), {"iterations": 3, "num_samples": 2}
    expected = inference_gaps(vae, bits(), generator=seeded(), **options)
    with torch.inference_mode():
        found = inference_gaps(vae, bits(), generator=seeded(), **options)
    assert all(map(torch.equal, found.proposal.params, expected.proposal.params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flow", FLOWS)
def test_half_precision_is_fitted_in_float32(flow, dtype):
    vae, x = moved_vae(flow).to(dtype), bits().to(dtype)
    gaps = inference_gaps(vae, x, iterations=5, num_samples=20, generator=seeded())
    assert {t.dtype for t in (*gaps[:6], *gaps.proposal.params)} == {torch.float32}
    assert all(t.isfinite().all() for t in gaps[:6])


def test_an_amortized_flow_without_features_is_refused():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :DIM], x[:, :DIM]

    vae = VAE(Pair(), nn.Linear(DIM, 12), DIM, AmortizedPlanarFlow(DIM, 2, HIDDEN), feature_dim=HIDDEN).double()
    with pytest.raises(ValueError, match=f"flow takes features of width {HIDDEN}, and the encoder gave none"):
        inference_gaps(vae, bits(), iterations=1, num_samples=2)


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_what_is_no_vae_is_refused():
    for other in (torch.nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match=f"vae must be a VAE of this package, got {type(other).__name__}"):
            inference_gaps(other, torch.zeros(3, 2))


def test_progress_and_memory():
    vae, x, told, rows = make_vae(), bits(5), [], []
    vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    inference_gaps(vae, x, iterations=3, num_samples=7, chunk_size=32, progress=lambda *counts: told.append(counts))
    assert told == [(done, 9) for done in range(1, 10)]  # two data points at once
    assert max(rows) <= 32


def test_a_generator_decides_what_is_drawn():
    vae, x = make_vae(PlanarFlow(DIM, 2)), bits()
    first, same, other = (
        inference_gaps(vae, x, num_steps=3, iterations=2, num_samples=3, generator=seeded(seed)).log_likelihood
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_effective_sample_size_by_hand(most):
    """Weights 1, 1, 2 and, for another data point, 5, 5, 5, both times e^1000."""
    weights = torch.tensor([[1.0, 5.0], [1.0, 5.0], [2.0, 5.0]]).double()
    drawn = iter((weights.log() + 1000).split(most))
    found = from_weights(lambda count: next(drawn), 3, most)
    expected = Importance(*torch.tensor([[4 / 3, 5.0], [2 ** (1 / 3), 5.0], [16 / 6, 3.0]]).double())
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood.log() + 1000)
    torch.testing.assert_close(found.elbo, expected.elbo.log() + 1000)
    torch.testing.assert_close(found.effective_sample_size, expected.effective_sample_size)


class Own:
    """The VAE's posterior as a proposal."""

    def __init__(self, vae: VAE, x: Tensor):
        self.vae, self.x = vae, x

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        drawn = self.vae.posterior_sample(self.x, num_samples, generator)
        return drawn.z_K, drawn.log_q


@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_the_posterior_as_a_proposal_changes_nothing(chunk_size):
    vae, x = moved_vae("amortized"), bits()
    plain = vae.importance(x, 23, generator=seeded())
    proposed = vae.importance(x, 23, chunk_size=chunk_size, generator=seeded(), proposal=Own(vae, x))
    torch.testing.assert_close(proposed, plain)
    assert torch.equal(vae.log_likelihood(x, 23, generator=seeded()), plain.log_likelihood)
    assert torch.equal(vae.log_likelihood(x, 23, chunk_size, seeded(), Own(vae, x)), proposed.log_likelihood)


def test_the_elbo_is_that_of_elbo_terms():
    vae, x, _ = linear_gaussian_vae(AffineFlow(2, 1.6, 0.3))
    elbo = vae.importance(x, 20_000, generator=seeded()).elbo
    assert_within(elbo, -vae.elbo_terms(x, 20_000, seeded(7)).neg_elbo.detach(), 0.1)


def test_log_joint_is_the_sum_of_its_parts():
    vae, x = make_vae(), bits()
    z = torch.randn(3, len(x), DIM, generator=seeded(), dtype=torch.float64)
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected = dist.Bernoulli(logits=vae.decode(z)).log_prob(x).sum(-1) + log_prior
    torch.testing.assert_close(vae.log_joint(x, z), expected)


class Wrong(Own):
    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        z, log_q = super().sample(num_samples, generator)
        return z, log_q[0]


def test_a_proposal_that_does_not_fit_is_refused():
    vae, x = make_vae(), bits()
    with pytest.raises(ValueError, match=r"proposal must give one sample z \(1, 6, 4\) and its log_q \(1, 6\), got "):
        vae.importance(x, 3, proposal=Wrong(vae, x))
    with pytest.raises(ValueError, match="proposal must give one sample"):
        vae.importance(x, 3, proposal=Own(vae, x[:2]))
    with pytest.raises(TypeError, match=r"proposal must have a method sample\(num_samples, generator\), .* got int"):
        vae.importance(x, 3, proposal=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"num_samples": 1.0}, TypeError, "num_samples must be an int, got float"),
        ({"lr": 0}, ValueError, "lr must be finite and above 0, got 0.0"),
        ({"lr": "1"}, TypeError, "lr must be a float, got str"),
        ({"num_steps": 2}, ValueError, "num_steps must be at least 3, got 2"),
        ({"x": bits() + 1.0}, ValueError, r"values in \[0, 1\] for the bernoulli"),
        ({"vae": make_vae(AffineFlow(DIM))}, TypeError, "flow must be one of vvae_fast's or None"),
    ],
)
def test_gaps_refuse(arguments, error, message):
    defaults = {"vae": make_vae(PlanarFlow(DIM, 3)), "x": bits()}
    arguments = defaults | arguments
    with pytest.raises(error, match=message):
        inference_gaps(arguments.pop("vae"), arguments.pop("x"), **arguments)
