"""The training objective, which is the free energy with a KL warm-up, and the learning rate's schedule."""

from __future__ import annotations

import math

from torch import Tensor

from vvae_fast.nn.vae import ElboTerms
from vvae_fast.train.run.runconfig import COSINE


def kl_weight(epoch: int, warmup_epochs: int) -> float:
    """The weight beta of the KL in an epoch (counted from 0): below 1 for warmup_epochs epochs, in equal steps, then 1.

    Rezende & Mohamed 2015, eq. 20, anneal the inverse temperature beta_t of their free energy for the same purpose.
    """
    return min(1.0, (epoch + 1) / (warmup_epochs + 1))


def lr_factor(epoch: int, epochs: int, schedule: str = COSINE) -> float:
    """The learning rate's factor in an epoch, counted from 0: 1, or half a cosine that falls from 1 towards 0."""
    return 0.5 * (1.0 + math.cos(math.pi * epoch / epochs)) if schedule == COSINE else 1.0


def free_energy(terms: ElboTerms, beta: float, count: int | None = None) -> Tensor:
    """`ElboTerms.weighted`, summed over the rows and divided by `count`, in nats: -ELBO if beta = 1.

    The default of count is the number of rows, which gives the mean.
    """
    return terms.weighted(beta).sum() / (len(terms.kl) if count is None else count)
