"""How far a VAE's posterior is from the true one: the inference gaps of Cremer, Li & Duvenaud (2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast.functional import planar_flow
from vvae_fast.nn.base import Flow
from vvae_fast.nn.importance import Importance, standard_normal
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow, identity_u
from vvae_fast.nn.vae import VAE
from vvae_fast.shapes import check_size
from vvae_fast.spec import DEFAULT, FlowSpec, as_float

FIT_SAMPLES = 16  # of each data point in an iteration


@dataclass(frozen=True)
class _Fitted:
    """q* of B data points: each has its own diagonal Gaussian, mean and log_var [B, D], and its own flow."""

    mean: Tensor
    log_var: Tensor

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """num_samples draws of z for each data point, and log q*(z) in nats: [S, B, D] and [S, B]."""
        num_samples = check_size("num_samples", num_samples, 1)
        noise = standard_normal((num_samples, *self.mean.shape), self.mean, generator)
        z_0 = torch.addcmul(self.mean, (0.5 * self.log_var).exp(), noise)
        z, log_det = self._push(z_0)
        log_q_0 = -0.5 * (noise.square() + self.log_var + math.log(2.0 * math.pi)).sum(-1)
        return z, log_q_0 - log_det

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class FittedPosterior(_Fitted):
    """q* of B data points: each has its own diagonal Gaussian, mean and log_var [B, D], and its own K planar steps, u
    and w [B, K, D], b [B, K]. `options` are the keyword arguments of `planar_flow`."""

    u: Tensor
    w: Tensor
    b: Tensor
    options: dict[str, Any]

    @property
    def params(self) -> tuple[Tensor, ...]:
        return self.mean, self.log_var, self.u, self.w, self.b

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return planar_flow(z, self.u, self.w, self.b, **self.options)

    def _with_params(self, params: Iterable[Tensor]) -> FittedPosterior:
        """The posterior of other data points in the same family."""
        mean, log_var, u, w, b = params
        return FittedPosterior(mean, log_var, u, w, b, self.options)


@dataclass(frozen=True)
class FittedFlow(_Fitted):
    """q* of B data points for a VAE with another flow than a planar one: each has its own diagonal Gaussian, mean and
    log_var [B, D], and its own values of what the flow trains, `own`, [B, *] each. `flow` is the VAE's: only its sizes
    and options are used."""

    own: tuple[Tensor, ...]
    flow: Any

    @property
    def params(self) -> tuple[Tensor, ...]:
        return self.mean, self.log_var, *self.own

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow._run(z, self.own)

    def _with_params(self, params: Iterable[Tensor]) -> FittedFlow:
        """The posterior of other data points in the same family."""
        mean, log_var, *own = params
        return FittedFlow(mean, log_var, tuple(own), self.flow)


class InferenceGaps(NamedTuple):
    """log p(x) - L[q] of each data point and its two parts, [B] each, in nats; docs/math.md (51), (52).

    q is the VAE's own posterior, and q* the best of its family for that data point alone.
    """

    log_likelihood: Tensor  # log p(x), by importance sampling from q*
    elbo: Tensor  # L[q]
    elbo_optimal: Tensor  # L[q*]
    approximation_gap: Tensor  # log p(x) - L[q*]: the family's
    amortization_gap: Tensor  # L[q*] - L[q]: the encoder's
    effective_sample_size: Tensor  # of log_likelihood
    plain: Importance  # the same from q, as `VAE.importance` gives it
    proposal: FittedPosterior | FittedFlow  # q*


def inference_gaps(
    vae: VAE,
    x: Tensor,
    *,
    num_steps: int | None = None,
    iterations: int = 600,
    lr: float = 0.02,
    num_samples: int = 1000,
    chunk_size: int = 4096,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InferenceGaps:
    """The approximation gap and the amortization gap of each data point, by Cremer, Li & Duvenaud (2018).

    q* is of the family of the VAE's posterior: with a flow, each data point has its own values of what the flow trains.
    q* starts as the VAE's own posterior. Adam then maximises its ELBO, with a learning rate that falls to 0 along a
    cosine. The VAE is in evaluation mode meanwhile, and its parameters get no gradient.

    Args:
        vae: its flow is None or one of this package's.
        x: data, [B, *data].
        num_steps: K of q*, by default that of the VAE's flow, 0 without one. The steps beyond the VAE's start as the
            identity. For planar flows and without a flow; other flows keep their number of layers.
        iterations: of Adam, for every data point.
        lr: the learning rate of the first iteration.
        num_samples: posterior samples of each data point for each estimate.
        chunk_size: decoder rows in memory at a time. Data points are fitted chunk_size / 16 at a time.
        generator: on the VAE's device, by default torch's global one.
        progress: called after each iteration with how many are done, and how many there are, over all data points.

    Returns:
        InferenceGaps, without gradient.

    Raises:
        ValueError, TypeError: if the flow is another one, if num_steps is below the flow's or the flow is not planar,
            if a number is out of range, or for x as `VAE.importance`.
    """
    iterations = check_size("iterations", iterations, 1)
    chunk_size = check_size("chunk_size", chunk_size, 1)
    lr = as_float("lr", lr)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be finite and above 0, got {lr}")
    num_steps = _num_steps(vae, num_steps)
    # In inference mode nothing could be fitted, and its tensors could not be saved for a gradient.
    with torch.inference_mode(False), torch.no_grad(), _evaluating(vae):
        x = x.clone() if isinstance(x, Tensor) and x.is_inference() else x
        plain = vae.importance(x, num_samples, chunk_size=chunk_size, generator=generator)
        start = _own_posterior(vae, x, num_steps, generator)
        rows = max(1, chunk_size // FIT_SAMPLES)
        chunks = [slice(row, row + rows) for row in range(0, max(1, len(x)), rows)]
        fitted = []
        for number, chunk in enumerate(chunks):

            def report(done: int, before: int = number * iterations) -> None:
                if progress is not None:
                    progress(before + done, len(chunks) * iterations)

            part = start._with_params(t[chunk] for t in start.params)
            fitted.append(_fit(vae, x[chunk], part, iterations, lr, generator, report))
        proposal = start._with_params(map(torch.cat, zip(*(q.params for q in fitted), strict=True)))
        best = vae.importance(x, num_samples, chunk_size=chunk_size, generator=generator, proposal=proposal)
    return InferenceGaps(
        log_likelihood=best.log_likelihood,
        elbo=plain.elbo,
        elbo_optimal=best.elbo,
        approximation_gap=best.log_likelihood - best.elbo,
        amortization_gap=best.elbo - plain.elbo,
        effective_sample_size=best.effective_sample_size,
        plain=plain,
        proposal=proposal,
    )


def _fit(
    vae: VAE,
    x: Tensor,
    start: FittedPosterior | FittedFlow,
    iterations: int,
    lr: float,
    generator: torch.Generator | None,
    report: Callable[[int], None],
) -> FittedPosterior | FittedFlow:
    """q* of the rows of x. A row's gradient and Adam's state are its own, so all rows are fitted at once."""
    params = [t.detach().clone().requires_grad_() for t in start.params]
    q = start._with_params(params)
    optimizer = torch.optim.Adam(params, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        with torch.enable_grad():
            z, log_q = q.sample(FIT_SAMPLES, generator)
            loss = (log_q - vae.log_joint(x, z)).mean(0).sum()
            gradients = torch.autograd.grad(loss, params)  # of q alone: backward() would reach the VAE's parameters
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        report(iteration + 1)
    return start._with_params(t.detach() for t in params)


def _num_steps(vae: VAE, num_steps: int | None) -> int:
    """K of q*, 0 where its flow is not planar. Raises TypeError for what is no VAE, or a flow that is not this
    package's, ValueError for fewer steps than it has, or for steps where it has none."""
    if not all(hasattr(vae, name) for name in ("flow", "importance", "log_joint", "encode")):  # a compiled VAE has them
        raise TypeError(f"vae must be a VAE of this package, got {type(vae).__name__}")
    flow: Any = vae.flow
    if not isinstance(flow, (Flow, type(None))):
        raise TypeError(
            f"vae's flow must be one of vvae_fast's or None, got {type(flow).__name__}: q* is fitted in the family of "
            "the VAE's posterior"
        )
    if num_steps is not None and not isinstance(flow, (PlanarFlow, AmortizedPlanarFlow, type(None))):
        raise ValueError(f"num_steps is for planar flows, got {num_steps} for {type(flow).__name__}: leave it out")
    own = getattr(flow, "num_steps", 0)
    return own if num_steps is None else check_size("num_steps", num_steps, own)


def _own_posterior(
    vae: VAE, x: Tensor, num_steps: int, generator: torch.Generator | None
) -> FittedPosterior | FittedFlow:
    """The VAE's posterior of the rows of x with their own copies of its parameters, and identity steps up to K."""
    mean, log_var, features = vae.encode(x)
    flow = vae.flow
    if features is not None and flow is not None:
        features = features.to(next(flow.parameters(), features).dtype)
    if isinstance(flow, Flow) and not isinstance(flow, (PlanarFlow, AmortizedPlanarFlow)):
        return FittedFlow(mean, log_var, tuple(t.to(mean.dtype) for t in flow._own(len(x), features)), flow)
    own: Sequence[Tensor] = ()
    options = DEFAULT.options() | {"backend": None}
    if isinstance(flow, (PlanarFlow, AmortizedPlanarFlow)):
        options = FlowSpec(flow.constraint, flow.activation, flow.slope).options() | {"backend": flow.backend}
    if isinstance(flow, PlanarFlow):
        own = [step.expand(len(x), *step.shape) for step in (flow.u, flow.w, flow.b)]
    elif isinstance(flow, AmortizedPlanarFlow) and features is not None:  # else `VAE.importance` has raised
        own = flow.params(features)
    more = num_steps - (own[2].shape[-1] if own else 0)
    w = standard_normal((more, vae.latent_dim), mean, generator) * vae.latent_dim**-0.5  # as a PlanarFlow draws it
    steps = identity_u(w, options["constraint"]), w, standard_normal((more,), mean, generator)
    sets = [step.expand(len(x), *step.shape) for step in steps]
    if own:
        sets = [torch.cat([first.to(mean.dtype), rest], 1) for first, rest in zip(own, sets, strict=True)]
    u, w, b = sets
    return FittedPosterior(mean, log_var, u, w, b, options)


@contextmanager
def _evaluating(vae: VAE) -> Iterator[None]:
    """The VAE in evaluation mode inside the block; after it each module's mode is what it was."""
    modes = [(module, module.training) for module in vae.modules()]
    vae.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
