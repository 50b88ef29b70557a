"""Importance sampling: log p(x), the ELBO and the effective sample size from log-weights, and what may propose z."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vvae_fast.nn.outputs import check_proposed
from vvae_fast.shapes import compute_dtype


class Importance(NamedTuple):
    """What importance weights w = p(x, z) / q(z) say of each data point, [B] each.

    log_likelihood is the log of their mean, and elbo the mean of their logs, both in nats. In expectation both are at
    most log p(x). effective_sample_size, docs/math.md (53), is between 1 and the number of samples. Where it is near 1,
    a single sample decides, and log_likelihood is too low by an unknown amount.
    """

    log_likelihood: Tensor
    elbo: Tensor
    effective_sample_size: Tensor


class Proposal(Protocol):
    """A density q(z) for each of B data points, such as `inference_gaps` fits."""

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """num_samples draws of z for each data point, and log q(z) in nats: [S, B, D] and [S, B]."""


def from_weights(draw: Callable[[int], Tensor], num_samples: int, most: int) -> Importance:
    """The estimates from num_samples log-weights of each data point; draw(s) gives [s, B] new ones, with s <= most."""
    sums: tuple[Tensor, ...] | None = None
    for first in range(0, num_samples, most):
        log_w = draw(min(most, num_samples - first))
        new = log_w.logsumexp(0), (2.0 * log_w).logsumexp(0), log_w.sum(0)
        sums = new if sums is None else (*map(torch.logaddexp, sums[:2], new[:2]), sums[2] + new[2])
    assert sums is not None, "num_samples is at least 1"
    total, squares, logs = sums
    return Importance(total - math.log(num_samples), logs / num_samples, (2.0 * total - squares).exp())


def draw_from(proposal: Proposal, count: int, like: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """z [count, B, D] and log q(z) [count, B] for B data points, in the dtype of `like` [B, D].

    One call for each sample: randn's stream depends on the size of a draw, and chunks must not change it.
    """
    if not hasattr(proposal, "sample"):
        raise TypeError(
            "proposal must have a method sample(num_samples, generator), like `inference_gaps(...).proposal`, "
            f"got {type(proposal).__name__}"
        )
    drawn = [proposal.sample(1, generator) for _ in range(count)]
    for one in drawn:
        check_proposed(one, like)
    z, log_q = (torch.cat(parts).to(like.dtype) for parts in zip(*drawn, strict=True))
    return z, log_q


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard-normal numbers on the device of `like`, in its dtype, or in float32 for a half precision."""
    # torch.export does not allow sizes together with a generator
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.randn(shape, **options, dtype=compute_dtype(like.dtype), device=like.device)
