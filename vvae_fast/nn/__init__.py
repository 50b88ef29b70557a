"""Modules: planar flows, the VAE, its likelihoods and MLP builders."""

from vvae_fast.nn.gaps import FittedPosterior, InferenceGaps, inference_gaps
from vvae_fast.nn.importance import Importance, Proposal
from vvae_fast.nn.likelihoods import Bernoulli, Binomial, Gaussian, Likelihood, Standardised, make_likelihood
from vvae_fast.nn.mlp import mlp_decoder, mlp_encoder
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.vae import VAE, ElboTerms, Posterior, PosteriorSample

__all__ = [
    "VAE",
    "AmortizedPlanarFlow",
    "Bernoulli",
    "Binomial",
    "ElboTerms",
    "FittedPosterior",
    "Gaussian",
    "Importance",
    "InferenceGaps",
    "Likelihood",
    "PlanarFlow",
    "Posterior",
    "PosteriorSample",
    "Proposal",
    "Standardised",
    "inference_gaps",
    "make_likelihood",
    "mlp_decoder",
    "mlp_encoder",
]
