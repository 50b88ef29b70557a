"""Modules: planar, Sylvester and Householder flows, the VAE, its likelihoods and MLP builders."""

from vvae_fast.nn.gaps import FittedFlow, FittedPosterior, InferenceGaps, inference_gaps
from vvae_fast.nn.importance import Importance, Proposal
from vvae_fast.nn.likelihoods import Bernoulli, Binomial, Gaussian, Likelihood, Standardised, make_likelihood
from vvae_fast.nn.mlp import mlp_decoder, mlp_encoder
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.sylvester.flows import AmortizedSylvesterFlow, SylvesterFlow, SylvesterParams
from vvae_fast.nn.sylvester.householder import AmortizedHouseholderFlow, HouseholderFlow
from vvae_fast.nn.sylvester.orthonormal import orthonormal
from vvae_fast.nn.vae import VAE, ElboTerms, Posterior, PosteriorSample

__all__ = [
    "VAE",
    "AmortizedHouseholderFlow",
    "AmortizedPlanarFlow",
    "AmortizedSylvesterFlow",
    "Bernoulli",
    "Binomial",
    "ElboTerms",
    "FittedFlow",
    "FittedPosterior",
    "Gaussian",
    "HouseholderFlow",
    "Importance",
    "InferenceGaps",
    "Likelihood",
    "PlanarFlow",
    "Posterior",
    "PosteriorSample",
    "Proposal",
    "Standardised",
    "SylvesterFlow",
    "SylvesterParams",
    "inference_gaps",
    "make_likelihood",
    "mlp_decoder",
    "mlp_encoder",
    "orthonormal",
]
