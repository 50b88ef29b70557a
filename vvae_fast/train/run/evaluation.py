"""Scores of a trained VAE on the test set."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from vvae_fast.nn.vae import VAE, ElboTerms
from vvae_fast.train.data.sets import Dataset, make_loaders
from vvae_fast.train.run import processes

EVALUATION_BATCH = 100  # rows
ELBO_SAMPLES = 50  # posterior samples per test row for -ELBO, KL, reconstruction and active units
ACTIVE_FROM = 0.01  # variance of an active dimension's posterior mean, at least: Burda et al. 2016, section 5.2


@torch.no_grad()
def evaluate(vae: VAE, dataset: Dataset, num_samples: int, seed: int) -> dict[str, float]:
    """The scores of a VAE on the test set.

    Returns:
        neg_elbo, kl, reconstruction, nll (importance sampling with num_samples) and gap = neg_elbo - nll, averaged
        over the rows, in nats; and active_units, see `_count_active_units`.
    """
    device = processes.device()
    generator = torch.Generator(device).manual_seed(seed)
    # A separate generator, so that active units do not change the other scores.
    active_generator = torch.Generator(device).manual_seed(zlib.crc32(f"active units {seed}".encode()))
    vae.to(device)
    names = (*ElboTerms._fields, "nll")
    sums = torch.zeros(len(names), dtype=torch.float64)
    moments = torch.zeros(3, vae.latent_dim, dtype=torch.float64)
    _, _, test = make_loaders(dataset, EVALUATION_BATCH, seed)
    for number, x in enumerate(test):
        if number % processes.count() != processes.rank():
            _draw_for(vae, len(x), num_samples, generator, active_generator)
            continue
        x = x.to(device)
        terms = vae.elbo_terms(x, ELBO_SAMPLES, generator)
        nll = -vae.log_likelihood(x, num_samples, generator=generator)
        sums += torch.stack([values.double().sum().cpu() for values in (*terms, nll)])
        moments += _moments(vae.posterior_sample(x, ELBO_SAMPLES, active_generator).z_K).cpu()
    vae.cpu()
    means = processes.sum_over_all(sums) / len(dataset.test)
    scores = dict(zip(names, means.tolist(), strict=True))
    moments = processes.sum_over_all(moments) / len(dataset.test)
    return {**scores, "gap": scores["neg_elbo"] - scores["nll"], "active_units": _count_active_units(moments)}


def _draw_for(vae: VAE, num_rows: int, num_samples: int, *generators: torch.Generator) -> None:
    """Draws and discards another process's numbers for its batch, so that the next batch has the same streams."""
    generator, active_generator = generators
    for source in (generator, active_generator):
        torch.randn((ELBO_SAMPLES, num_rows, vae.latent_dim), generator=source, device=source.device)
    for _ in range(num_samples):  # as log_likelihood draws
        torch.randn((num_rows, vae.latent_dim), generator=generator, device=generator.device)


def _moments(z_K: Tensor) -> Tensor:
    """Sums over the rows of a, b and a b, where a and b are means over halves of the samples: float64 [3, D], for z_K
    [S, B, D]."""
    a, b = z_K.double().unflatten(0, (2, -1)).mean(1)  # [B, D]
    return torch.stack([a.sum(0), b.sum(0), (a * b).sum(0)])


def _count_active_units(moments: Tensor) -> int:
    """How many latent dimensions of z_K have a posterior mean whose variance over the data is above ACTIVE_FROM.

    z_K is the decoder's input; without a flow it is z_0. Its posterior mean is only estimated, and the variance of the
    samples would make every dimension active. The covariance of two independent estimates has no such bias.

    Args:
        moments: means over the data of a, b and a b, where a and b are two estimates of the posterior means, [3, D].
    """
    a, b, product = moments
    return int((product - a * b > ACTIVE_FROM).sum())
