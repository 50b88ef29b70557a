"""The variational autoencoder, with or without a flow on its posterior."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vvae_fast.nn.arguments import (
    check_agreement,
    check_beta,
    check_modules,
    check_noise,
    find_feature_dim,
    first_parameter,
    run_module,
    trains_eagerly,
)
from vvae_fast.nn.base import Flow
from vvae_fast.nn.importance import Importance, Proposal, draw_from, from_weights, standard_normal
from vvae_fast.nn.likelihoods import Likelihood, make_likelihood
from vvae_fast.nn.outputs import check_channels, check_decoded, check_encoded, check_flowed, check_params
from vvae_fast.shapes import HALVES, autocasts, check_size, compute_dtype, full_precision, untraced


class ElboTerms(NamedTuple):
    """-ELBO = reconstruction + kl for each data point, [B] each, in nats, averaged over the posterior samples.

    All three are costs: reconstruction is -E_q[log p(x | z)].
    """

    neg_elbo: Tensor
    reconstruction: Tensor
    kl: Tensor

    def weighted(self, beta: float) -> Tensor:
        """reconstruction + beta kl of each data point, [B], in nats: docs/math.md (54); -ELBO if beta = 1."""
        return self.neg_elbo if beta == 1.0 else self.reconstruction + beta * self.kl


class Posterior(NamedTuple):
    """The diagonal Gaussian q_0(z_0 | x), mean, log_var [B, D], and the encoder's features [B, F]. features is None if
    the encoder returned only mean and log_var."""

    mean: Tensor
    log_var: Tensor
    features: Tensor | None


class PosteriorSample(NamedTuple):
    """Posterior samples before and after the flow, and log q_K(z_K | x) in nats: z_0, z_K [S, B, D], log_q [S, B]."""

    z_0: Tensor
    z_K: Tensor
    log_q: Tensor


class VAE(nn.Module):
    """A VAE: Kingma & Welling's (2014) with flow=None, Rezende & Mohamed's (2015) with a flow on the posterior.

    The prior is N(0, I). The VAE owns one linear head, features -> (mean, log-variance) of q_0(z_0 | x).

    Args:
        encoder: x [B, *data] -> features [B, F]. It may also return (mean, log_var) [B, D] each, which leaves the head
            unused, or (mean, log_var, features), which a flow with a `context_dim` needs.
        decoder: z [N, D] -> the likelihood's parameters [N, *], num_params for each data dimension. Data and
            parameters are paired in flattened order, so only their numbers of elements must fit.
        latent_dim: D.
        flow: flow(z) -> (z_K, log_det), or flow(z, features) if it has a `context_dim`, with z [S, B, D]
            or [B, D]; log_det = +log|det dz_K/dz_0|. None for the diagonal Gaussian posterior.
        likelihood: a name for `make_likelihood` or a Likelihood.
        feature_dim: F; by default flow.context_dim, else encoder.out_features. 0 makes no head, for an encoder that
            returns mean and log_var itself.

    Raises:
        ValueError: if F cannot be found, or the dimensions of encoder, flow and latent_dim disagree.
        TypeError: if encoder, decoder or flow is not a module, or a dimension is not an int.

    In half precision, `vae.bfloat16()` or `vae.half()`, x, the features, and the outputs of `sample` and `reconstruct`
    have that dtype. mean, log_var, noise, z, the likelihood's parameters and all values in nats are float32. Each
    module is called in the dtype of its own parameters.

    Methods that draw samples take a `generator` on the module's device, by default torch's global one.

    Outside torch.compile, `Likelihood.check_batch` checks the first training batch. It raises ValueError if the
    likelihood cannot have these values, or if it takes logits and the decoder ends with a sigmoid.
    """

    _is_checked = False  # also an attribute of the class, for pickles of older versions

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        flow: nn.Module | None = None,
        likelihood: str | Likelihood = "bernoulli",
        feature_dim: int | None = None,
    ):
        super().__init__()
        check_modules(encoder=encoder, decoder=decoder, flow=flow)
        latent_dim = check_size("latent_dim", latent_dim, 1)
        check_agreement("flow.dim", getattr(flow, "dim", None), "latent_dim", latent_dim)
        self.encoder = encoder
        self.decoder = decoder
        self.flow = flow
        self.likelihood = make_likelihood(likelihood)
        self.latent_dim = latent_dim
        self.feature_dim = find_feature_dim(encoder, flow, feature_dim)
        self.posterior_head = nn.Linear(self.feature_dim, 2 * latent_dim) if self.feature_dim else None
        self._flow_takes_features = getattr(flow, "context_dim", None) is not None

    def forward(
        self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> ElboTerms:
        """The same as `elbo_terms`."""
        return self.elbo_terms(x, num_samples, generator, noise)

    def elbo_terms(
        self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> ElboTerms:
        """-ELBO, reconstruction -E_q[log p(x | z)] and KL(q(z | x) || p(z)) of each data point, in nats.

        The KL is exact without a flow (Kingma & Welling 2014, appendix B), and with one the Monte Carlo estimate of
        E_q0[log q_0(z_0) - log_det - log p(z_K)] (Rezende & Mohamed 2015, eq. 15).

        Args:
            x: data, [B, *data].
            num_samples: posterior samples of each data point, over which the terms are averaged.
            noise: standard-normal numbers to use instead of drawing: [B, D], or [num_samples, B, D] for more than one.

        Returns:
            ElboTerms of [B] each.

        Raises:
            ValueError, TypeError: if x, or an output of encoder or decoder, has the wrong shape, dtype or device.
        """
        num_samples = check_size("num_samples", num_samples, 1)
        posterior = self.encode(x)
        noise = self._noise_for(posterior, num_samples, generator, noise)  # [B, D] or [S, B, D]
        if self.flow is None:
            std = (0.5 * posterior.log_var).exp()  # [B, D]
            z = torch.addcmul(posterior.mean, std, noise)  # as noise
            kl = 0.5 * (posterior.mean.square() + std.square() - posterior.log_var - 1.0).sum(-1)  # [B]
        else:
            _, z, log_det = self._push(posterior, noise)
            kl = 0.5 * (z.square() - noise.square() - posterior.log_var).sum(-1) - log_det  # [B] or [S, B]
        reconstruction = -self._log_likelihood_of(x, z)  # [B] or [S, B]
        if num_samples > 1:
            reconstruction = reconstruction.mean(0)
            kl = kl if self.flow is None else kl.mean(0)
        return ElboTerms(reconstruction + kl, reconstruction, kl)

    def elbo(
        self,
        x: Tensor,
        beta: float = 1.0,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The ELBO of each data point with beta as the weight of its KL, docs/math.md (54): [B], in nats.

        beta > 1 is the beta-VAE's (Higgins et al. 2017), and a beta that grows to 1 is a KL warm-up. The loss of a
        training step is `-vae.elbo(x, beta).mean()`. `elbo_terms` has the other arguments and the errors.

        Raises:
            ValueError: also if beta is negative, infinite or NaN.
        """
        check_beta(beta)
        return -self.elbo_terms(x, num_samples, generator, noise).weighted(beta)

    def iwae(
        self, x: Tensor, num_samples: int, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The importance-weighted bound on log p(x) of each data point, docs/math.md (55): [B], in nats, for training.

        It is Burda et al.'s (2016, eq. 8) with k = num_samples: in expectation never below the ELBO and never above
        log p(x). Its gradient is that of the reparameterised samples; the loss of a training step is
        `-vae.iwae(x, num_samples).mean()`. All num_samples B rows are in memory at once, unlike `log_likelihood`'s,
        which has no gradient. `elbo_terms` has the other arguments and the errors.
        """
        num_samples = check_size("num_samples", num_samples, 1)
        posterior = self.encode(x)
        noise = self._noise_for(posterior, num_samples, generator, noise).reshape(num_samples, *posterior.mean.shape)
        return from_weights(
            lambda count: self._log_weights(x, posterior, noise, slice(None)), num_samples, num_samples
        ).log_likelihood

    def encode(self, x: Tensor) -> Posterior:
        """q_0(z_0 | x): mean and log-variance [B, D] and the encoder's features [B, F], for x [B, *data]."""
        self._check_x(x)
        encoded = run_module(self.encoder, "encoder", "x", self._as_taken_by(self.encoder, x))
        check_encoded(encoded, x, self.latent_dim, self.feature_dim)
        dtype = compute_dtype(self._like.dtype)
        if isinstance(encoded, Tensor) and self.posterior_head is not None:
            statistics = self.posterior_head(self._as_taken_by(self.posterior_head, encoded)).to(dtype)
            mean, log_var = statistics.chunk(2, -1)  # views [B, D]
            return Posterior(mean, log_var, encoded)
        mean, log_var, features = (*encoded, None)[:3]
        return Posterior(mean.to(dtype), log_var.to(dtype), features)

    def posterior_sample(
        self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None
    ) -> PosteriorSample:
        """num_samples draws of q(z | x) for each row of x [B, *data], before and after the flow (equal without one)."""
        num_samples = check_size("num_samples", num_samples, 1)
        posterior = self.encode(x)
        noise = standard_normal((num_samples, *posterior.mean.shape), posterior.mean, generator)  # [S, B, D]
        z_0, z_K, log_det = self._push(posterior, noise)
        log_q_0 = -0.5 * (noise.square() + posterior.log_var + math.log(2.0 * math.pi)).sum(-1)  # [S, B]
        return PosteriorSample(z_0, z_K, log_q_0 - log_det)

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameters [*batch, *], the decoder's output, for z [*batch, D], any leading dims."""
        self._check_z(z)
        rows = self._as_taken_by(self.decoder, z.reshape(-1, self.latent_dim))  # [N, D]
        params = run_module(self.decoder, "decoder", "z", rows)
        check_decoded(params, rows)
        return full_precision(params).reshape(*z.shape[:-1], *params.shape[1:])

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) = log p(x | z) + log p(z) in nats, [*S, B], for x [B, *data] and z [*S, B, D]."""
        self._check_x(x)
        log_likelihood = self._log_likelihood_of(x, z)
        return log_likelihood - 0.5 * (z.square() + math.log(2.0 * math.pi)).sum(-1)

    def log_likelihood(
        self,
        x: Tensor,
        num_samples: int = 1000,
        chunk_size: int = 4096,
        generator: torch.Generator | None = None,
        proposal: Proposal | None = None,
    ) -> Tensor:
        """log p(x) [B] in nats, without gradient: that of `importance`, which has the arguments and the errors."""
        return self.importance(
            x, num_samples, chunk_size=chunk_size, generator=generator, proposal=proposal
        ).log_likelihood

    @torch.no_grad()
    def importance(
        self,
        x: Tensor,
        num_samples: int = 1000,
        *,
        chunk_size: int = 4096,
        generator: torch.Generator | None = None,
        proposal: Proposal | None = None,
    ) -> Importance:
        """log p(x) by importance sampling, in nats: Burda et al. 2016, eq. 8 with k = num_samples.

        A lower bound in expectation, never looser than the ELBO, exact as num_samples grows. How fast is a matter of
        the proposal, and the effective sample size tells it.

        Args:
            x: data, [B, *data].
            num_samples: importance samples of each data point.
            chunk_size: decoder rows in memory at a time. It does not change which samples are drawn.
            proposal: draws z for the rows of x in place of the posterior q(z | x), such as that of `inference_gaps`.

        Returns:
            Importance of [B] each, without gradient.

        Raises:
            ValueError: also where x holds values of zero probability under the likelihood, or the proposal's samples
                do not fit.
        """
        num_samples = check_size("num_samples", num_samples, 1)
        chunk_size = check_size("chunk_size", chunk_size, 1)
        posterior = self.encode(x)
        self.likelihood.check_data(x)
        batch = len(x)
        blocks = [slice(row, row + chunk_size) for row in range(0, max(1, batch), chunk_size)]

        def draw(count: int) -> Tensor:
            """New log-weights, [count, B]."""
            if proposal is not None:
                z, log_q = draw_from(proposal, count, posterior.mean, generator)
                return torch.cat([self.log_joint(x[rows], z[:, rows]) for rows in blocks], -1) - log_q
            # One draw for each sample: randn's stream depends on the size of a draw, and chunks must not change it.
            noise = torch.stack(
                [standard_normal(posterior.mean.shape, posterior.mean, generator) for _ in range(count)]
            )
            return torch.cat([self._log_weights(x, posterior, noise, rows) for rows in blocks], -1)

        return from_weights(draw, num_samples, max(1, chunk_size // max(1, batch)))

    @torch.no_grad()
    def sample(self, num_samples: int, mean: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """num_samples draws of x, [num_samples, *data] in the decoder's shape; with mean=True their means E[x | z]."""
        num_samples = check_size("num_samples", num_samples, 1)
        params = self.decode(standard_normal((num_samples, self.latent_dim), self._like, generator))  # [N, *]
        check_channels(params, self.likelihood)
        rows = params.flatten(1)  # [N, num_params * P]
        x = self.likelihood.mean(rows) if mean else self.likelihood.sample(rows, generator)
        shape = (num_samples, params.shape[1] // self.likelihood.num_params, *params.shape[2:])
        return x.reshape(shape).to(self._like.dtype)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """E[x | z] for one posterior sample z of each row, in the shape of x [B, *data]."""
        z = self.posterior_sample(x, 1, generator).z_K[0]  # [B, D]
        return self.likelihood.mean(self._params_for(x, z)).reshape(x.shape).to(x.dtype)

    def _noise_for(
        self, posterior: Posterior, num_samples: int, generator: torch.Generator | None, noise: Tensor | None
    ) -> Tensor:
        """Checked noise, or new noise if it is None: [B, D], or [num_samples, B, D] for more than one sample."""
        mean = posterior.mean
        if noise is None:
            return standard_normal(mean.shape if num_samples == 1 else (num_samples, *mean.shape), mean, generator)
        check_noise(noise, mean, num_samples)
        return noise.to(mean.dtype)

    def _push(self, posterior: Posterior, noise: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """z_0 = mean + std * noise and its image: z_0, z_K [*S, B, D] and log_det [*S, B] (0.0 without a flow)."""
        z_0 = torch.addcmul(posterior.mean, (0.5 * posterior.log_var).exp(), noise)
        flow = self.flow
        if flow is None:
            return z_0, z_0, 0.0
        inputs = [self._as_taken_by(flow, z_0)]
        if inputs[0].dtype in HALVES and isinstance(flow, Flow):
            inputs = [z_0]  # this package's flows take float32 in half precision too, so z keeps its digits
        if self._flow_takes_features:
            if posterior.features is None:
                raise ValueError(
                    f"flow takes features of width {flow.context_dim}, and the encoder gave none: it must give "
                    "features, or (mean, log_var, features), got (mean, log_var)"
                )
            inputs.append(self._as_taken_by(flow, posterior.features))
        flowed = flow(*inputs)
        check_flowed(flowed, z_0)
        z_K, log_det = flowed
        return z_0, z_K.to(z_0.dtype), log_det.to(z_0.dtype)

    def _params_for(self, x: Tensor, z: Tensor) -> Tensor:
        """The likelihood's parameters [*S, B, num_params * P] for x [B, *data] and z [*S, B, D]."""
        params = self.decode(z).flatten(z.ndim - 1)
        check_params(params, x, self.likelihood)
        return params

    def _log_likelihood_of(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), [*S, B], for x [B, *data] and z [*S, B, D]."""
        params, x = self._params_for(x, z), x.flatten(1)  # [*S, B, num_params * P], [B, P]
        if not torch.compiler.is_compiling() and not self._is_checked and self.training and trains_eagerly(x):
            self.likelihood.check_batch(x, params)
            self._is_checked = len(x) > 0
        return self.likelihood.log_prob(x, params)

    def _log_weights(self, x: Tensor, posterior: Posterior, noise: Tensor, rows: slice) -> Tensor:
        """log p(x, z_K) - log q_K(z_K | x) of some rows of x, [S, rows], for noise [S, B, D]."""
        mean, log_var, features = posterior
        posterior = Posterior(mean[rows], log_var[rows], None if features is None else features[rows])
        noise = noise[:, rows]
        _, z, log_det = self._push(posterior, noise)
        log_ratio = 0.5 * (noise.square() + posterior.log_var - z.square()).sum(-1) + log_det  # log p(z_K) - log q_K
        return self._log_likelihood_of(x[rows], z) + log_ratio

    @property
    def _like(self) -> Tensor:
        """A tensor of the VAE's dtype and device: the head's weight, or without a head the first parameter."""
        weight = getattr(self.posterior_head, "weight", None)  # a quantized head's is a method
        return weight if isinstance(weight, Tensor) else next(self.parameters(), torch.empty(0))

    def _as_taken_by(self, module: nn.Module, t: Tensor) -> Tensor:
        """t in the dtype of the module's parameters, or in the VAE's if it has none; autocast converts by itself."""
        if autocasts(t):
            return t
        parameter = first_parameter(module)
        return t.to(self._like.dtype if parameter is None else parameter.dtype)

    @untraced
    def _check_x(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        if x.ndim < 2:
            raise ValueError(f"x must be [B, *data], got shape {tuple(x.shape)}; for one data point pass x[None]")
        self._check_like("x", x)

    @untraced
    def _check_z(self, z: Tensor) -> None:
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a Tensor, got {type(z).__name__}")
        if z.ndim == 0 or z.shape[-1] != self.latent_dim:
            raise ValueError(f"z must be [*batch, {self.latent_dim}], got {tuple(z.shape)}")
        self._check_like("z", z, compute_dtype(self._like.dtype))

    def _check_like(self, name: str, tensor: Tensor, *others: torch.dtype) -> None:
        """Raises where a tensor is not on the VAE's device, or has neither its dtype nor one of `others`."""
        like = self._like
        if tensor.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like the VAE, got {tensor.device}; move one of them")
        if autocasts(tensor) and like.dtype != torch.float64:  # autocast leaves float64 alone
            others = (*others, torch.float32, *HALVES)
        if tensor.dtype not in (like.dtype, *others):
            raise TypeError(f"{name} must be {like.dtype} like the VAE, got {tensor.dtype}; convert one of them")
