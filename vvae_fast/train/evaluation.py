"""What a trained VAE is worth on the test set."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from vvae_fast.nn.vae import VAE, ElboTerms
from vvae_fast.train.data import Dataset, make_loaders

EVALUATION_BATCH = 100  # rows
ELBO_SAMPLES = 50  # posterior samples a test row for -ELBO, KL, reconstruction and active units
ACTIVE_FROM = 0.01  # of the variance of a latent dimension's posterior mean: Burda et al. 2016, section 5.2


@torch.no_grad()
def evaluate(vae: VAE, dataset: Dataset, num_samples: int, seed: int) -> dict[str, float]:
    """The scores of a VAE on the test set.

    Returns:
        neg_elbo, kl, reconstruction, nll (importance sampling with num_samples) and gap = neg_elbo - nll, averaged
        over the rows, in nats; and active_units, see `count_active_units`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    # Of its own: the other scores are what they were before active units were counted.
    active_generator = torch.Generator(device).manual_seed(zlib.crc32(f"active units {seed}".encode()))
    vae.to(device)
    sums = dict.fromkeys((*ElboTerms._fields, "nll"), 0.0)
    means = []
    _, _, test = make_loaders(dataset, EVALUATION_BATCH, seed)
    for x in test:
        x = x.to(device)
        terms = vae.elbo_terms(x, ELBO_SAMPLES, generator)._asdict()
        terms["nll"] = -vae.log_likelihood(x, num_samples, generator=generator)
        for name, values in terms.items():
            sums[name] += values.double().sum().item()
        means.append(_half_means(vae.posterior_sample(x, ELBO_SAMPLES, active_generator).z_K).cpu())
    vae.cpu()
    scores = {name: value / len(dataset.test) for name, value in sums.items()}
    return {
        **scores,
        "gap": scores["neg_elbo"] - scores["nll"],
        "active_units": count_active_units(torch.cat(means, 1)),
    }


def _half_means(z_K: Tensor) -> Tensor:
    """The posterior means of two independent halves of the samples, float64 [2, B, D], for z_K [S, B, D], S even."""
    return z_K.double().unflatten(0, (2, -1)).mean(1)


def count_active_units(half_means: Tensor) -> int:
    """How many latent dimensions of z_K have a posterior mean whose variance over the data is above ACTIVE_FROM.

    z_K is what the decoder is given; without a flow it is z_0. Its posterior mean is known by samples alone, whose own
    variance would make every dimension active. The covariance of two independent estimates has no such bias.

    Args:
        half_means: two estimates of the means for each of N rows, [2, N, D].
    """
    first, second = half_means - half_means.mean(1, keepdim=True)
    covariance = (first * second).mean(0)  # [D]
    return int((covariance > ACTIVE_FROM).sum())
