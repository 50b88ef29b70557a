import math

import pytest
import torch
from torch import distributions as dist

from vvae_fast.nn.likelihoods import Bernoulli, Binomial, Gaussian, make_likelihood

SAMPLES, BATCH, DIM = 3, 5, 7


def logits(scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(SAMPLES, BATCH, DIM, dtype=torch.float64, generator=torch.manual_seed(0))


def test_bernoulli_is_torchs():
    x = torch.randint(0, 2, (BATCH, DIM)).double()
    expected = dist.Bernoulli(logits=logits()).log_prob(x).sum(-1)
    torch.testing.assert_close(Bernoulli().log_prob(x, logits()), expected)


@pytest.mark.parametrize("n", [1, 16, 255])
def test_binomial_is_torchs_and_includes_the_coefficient(n):
    x = torch.randint(0, n + 1, (BATCH, DIM)).double()
    expected = dist.Binomial(n, logits=logits()).log_prob(x).sum(-1)
    torch.testing.assert_close(Binomial(n).log_prob(x, logits()), expected)


def test_binomial_probabilities_sum_to_one():
    counts = torch.arange(17.0, dtype=torch.float64)[:, None]  # [17, 1]
    log_p = Binomial(16).log_prob(counts, torch.full_like(counts, 0.7))
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_binomial_of_one_trial_is_bernoulli():
    x = torch.randint(0, 2, (BATCH, DIM)).double()
    torch.testing.assert_close(Binomial(1).log_prob(x, logits()), Bernoulli().log_prob(x, logits()))


def test_gaussian_with_learned_log_variances_is_torchs():
    x, mean, log_var = torch.randn(BATCH, DIM).double(), logits(), logits(1.0).flip(0)
    expected = dist.Normal(mean, (0.5 * log_var).exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(Gaussian().log_prob(x, torch.cat([mean, log_var], -1)), expected)


def test_gaussian_with_a_fixed_log_variance_is_torchs():
    x = torch.randn(BATCH, DIM).double()
    expected = dist.Normal(logits(), math.exp(-0.6)).log_prob(x).sum(-1)
    torch.testing.assert_close(Gaussian(log_var=-1.2).log_prob(x, logits()), expected)


def test_gaussian_log_variance_has_a_floor():
    x, params = torch.zeros(1, 1), torch.tensor([[0.0, -1000.0]])
    expected = -0.5 * (Gaussian.MIN_LOG_VAR + math.log(2 * math.pi))
    assert Gaussian().log_prob(x, params).item() == pytest.approx(expected)


@pytest.mark.parametrize(("likelihood", "top"), [(Bernoulli(), 1), (Binomial(16), 16)], ids=["bernoulli", "binomial"])
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_logits_stay_exact(likelihood, top, size):
    """At x = 0 and x = n the log-probability is n log sigmoid(-+l): tiny where right, -n l where wrong, never inf."""
    x = torch.tensor([[0.0], [top], [0.0], [top]])
    params = torch.tensor([[-size], [size], [size], [-size]], requires_grad=True)
    log_p = likelihood.log_prob(x, params)
    right = -top * math.log1p(math.exp(-size))
    torch.testing.assert_close(log_p, torch.tensor([right, right, -top * size, -top * size]), rtol=1e-6, atol=1e-11)
    log_p.sum().backward()
    assert params.grad.isfinite().all()


LIKELIHOODS = [Bernoulli(), Binomial(16), Gaussian(), Gaussian(log_var=-1.0)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_mean_and_samples_agree(likelihood):
    generator = torch.Generator().manual_seed(1)
    params = torch.linspace(-1.0, 1.0, 3 * likelihood.num_params).repeat(40_000, 1)
    draws = likelihood.sample(params, generator)
    assert draws.shape == (40_000, 3)
    likelihood.check_data(draws)
    error = 5 * draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - likelihood.mean(params)[0]).abs() < error).all()


def test_gaussian_samples_have_its_variance():
    params = torch.tensor([[0.0, 3.0, -2.0, 1.0]]).repeat(40_000, 1)
    draws = Gaussian().sample(params, torch.Generator().manual_seed(2))
    torch.testing.assert_close(draws.var(0), torch.tensor([-2.0, 1.0]).exp(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
def test_the_same_generator_gives_the_same_draws(likelihood):
    params = torch.zeros(4, 6 * likelihood.num_params)
    first, second = (likelihood.sample(params, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
@pytest.mark.parametrize("shape", [(BATCH, 1), (1, DIM), (DIM,), (BATCH, SAMPLES, DIM), (BATCH, 3 * DIM), ()])
def test_shapes_that_do_not_fit_are_refused(likelihood, shape):
    with pytest.raises(ValueError, match=r"params must be .*5, (7|14)\] .*got"):
        likelihood.log_prob(torch.zeros(BATCH, DIM), torch.zeros(shape))


@pytest.mark.parametrize(
    ("likelihood", "value"),
    [
        (Bernoulli(), 1.5),
        (Bernoulli(), -0.1),
        (Bernoulli(), math.nan),
        (Binomial(16), 17.0),
        (Binomial(16), 2.5),
        (Binomial(16), math.nan),
        (Gaussian(), math.inf),
    ],
)
def test_data_of_zero_probability_are_refused(likelihood, value):
    x = torch.zeros(2, 3)
    likelihood.check_data(x)
    x[1, 2] = value
    with pytest.raises(ValueError, match=f"x must hold .* for the {likelihood.name} likelihood, got"):
        likelihood.check_data(x)


def test_names():
    assert make_likelihood("bernoulli") == Bernoulli()
    assert make_likelihood("binomial", total_count=16) == Binomial(16)
    assert make_likelihood("gaussian") == Gaussian()
    custom = Gaussian(log_var=0.0)
    assert make_likelihood(custom) is custom


@pytest.mark.parametrize(
    ("name", "total_count", "error", "message"),
    [
        ("poisson", None, ValueError, '"bernoulli", "binomial", "gaussian", got "poisson"'),
        ("binomial", None, ValueError, "needs total_count"),
        ("bernoulli", 16, ValueError, "total_count belongs"),
        ("binomial", 0, ValueError, "at least 1, got 0"),
        ("binomial", 2.0, TypeError, "total_count must be an int, got float"),
        (3, None, TypeError, "got int"),
    ],
)
def test_names_that_are_none(name, total_count, error, message):
    with pytest.raises(error, match=message):
        make_likelihood(name, total_count=total_count)
