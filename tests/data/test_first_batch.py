"""The first batch that a VAE trains on is checked: data that its likelihood cannot have, decoders that end wrongly."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from vvae_fast import VAE, PlanarFlow
from vvae_fast.nn import Bernoulli, Binomial, Gaussian, Likelihood, mlp_decoder, mlp_encoder

DATA, LATENT = 12, 2


class Squashed(nn.Module):
    """A decoder [N, 2] -> [N, 3, 4] that ends with a function."""

    def __init__(self, squash):
        super().__init__()
        self.linear, self.squash = nn.Linear(LATENT, DATA), squash

    def forward(self, z: Tensor) -> Tensor:
        return self.squash(self.linear(z)).reshape(-1, 3, 4)


def make(likelihood="bernoulli", decoder: nn.Module | None = None) -> VAE:
    decoder = mlp_decoder(LATENT, DATA) if decoder is None else decoder
    return VAE(mlp_encoder(DATA, 5), decoder, LATENT, PlanarFlow(LATENT, 2), likelihood)


def bits() -> Tensor:
    return torch.rand(6, DATA).round()


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        (
            "bernoulli",
            16 * torch.rand(6, DATA),
            r"x must hold values in \[0, 1\] .*bernoulli.* got values from .*scale",
        ),
        ("bernoulli", 2 * torch.rand(6, DATA) - 1, r"x must hold values in \[0, 1\]"),
        ("bernoulli", torch.full((6, DATA), math.nan), "got NaN; clean them"),
        (Binomial(16), torch.rand(6, DATA), r"whole numbers in \[0, 16\] .*the counts themselves"),
        (Binomial(15), torch.full((6, DATA), 16.0), r"whole numbers in \[0, 15\] .*Binomial\(n\)"),
        (Gaussian(0.0), torch.full((6, DATA), math.inf), "x must hold finite numbers"),
    ],
)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_values_of_no_probability_are_refused(likelihood, x, message, num_samples):
    vae = make(likelihood)
    for _ in range(2):  # a failed check is no check
        with pytest.raises(ValueError, match=message):
            vae(x, num_samples)


@pytest.mark.parametrize(
    ("squash", "name"),
    [
        (nn.Sigmoid(), "sigmoid"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: torch.sigmoid(x)[:, None].squeeze(1).clone(), "sigmoid"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.LogSigmoid(), "logsigmoid"),
        (nn.Softmax(-1), "softmax"),
        (nn.LogSoftmax(-1), "logsoftmax"),
    ],
)
@pytest.mark.parametrize("likelihood", ["bernoulli", Binomial(1)])
def test_decoders_that_end_with_a_sigmoid_are_refused(squash, name, likelihood):
    vae = make(likelihood, Squashed(squash))
    with pytest.raises(ValueError, match=f"decoder must give logits for the .* got the outputs of a {name}; remove it"):
        vae(bits())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="decoder must give logits"):
        vae(bits())


@pytest.mark.parametrize("squash", [nn.Identity(), nn.Tanh(), lambda x: torch.sigmoid(x) * 4 - 2])
def test_other_decoders_are_not(squash):
    make("bernoulli", Squashed(squash))(bits()).neg_elbo.sum().backward()
    make(Gaussian(0.0), Squashed(nn.Sigmoid()))(torch.randn(6, DATA))


def test_one_batch_is_checked(monkeypatch):
    calls = []
    check = Bernoulli.check_batch
    monkeypatch.setattr(Bernoulli, "check_batch", lambda *arguments: calls.append(1) or check(*arguments))
    vae = make()
    vae.eval()(bits())
    with torch.no_grad():
        vae.train()(bits())
        vae.log_likelihood(bits(), 2)
    vae(bits()[:0])
    assert sum(calls) == 1  # rows that are none say nothing
    for _ in range(3):
        vae(bits())
    copy.deepcopy(vae)(bits())
    assert sum(calls) == 2


def test_a_likelihood_of_ones_own_needs_no_check():
    class Mine(Likelihood):
        name, num_params = "mine", 1

        def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
            return -(x - params).square().sum(-1)

    make(Mine())(torch.randn(6, DATA)).neg_elbo.sum().backward()


def test_the_check_leaves_graphs_whole():
    """Under torch.compile, torch.func and torch.export nothing is looked at, and nothing breaks."""
    vae, noise = make(), torch.randn(6, LATENT)

    def step(x: Tensor) -> Tensor:
        return vae(x, noise=noise).neg_elbo.mean()

    x = 16 * torch.rand(6, DATA)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    gradients = torch.func.grad(lambda x: torch.func.functional_call(vae, {}, (x,), {"noise": noise}).neg_elbo.mean())
    assert gradients(x).shape == x.shape
    program = torch.export.export(vae, (bits(), 1, None, noise))
    assert program.module()(bits(), 1, None, noise).kl.shape == (6,)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(vae)
        assert fake(mode.from_tensor(x)).kl.shape == (6,)
    assert not vae._is_checked
    with pytest.raises(ValueError, match="x must hold values"):
        step(x)
