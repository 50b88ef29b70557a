"""The VAE of a run's configuration, and the optimiser that trains it."""

from __future__ import annotations

import torch
from torch import nn

from vvae_fast.nn.gated import (
    CONV_FEATURES,
    CONV_IMAGE,
    gated_conv_decoder,
    gated_conv_encoder,
    gated_mlp_decoder,
    gated_mlp_encoder,
)
from vvae_fast.nn.likelihoods import make_likelihood
from vvae_fast.nn.mlp import mlp_decoder, mlp_encoder
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.vae import VAE
from vvae_fast.train.data import Dataset
from vvae_fast.train.files import RunError
from vvae_fast.train.runconfig import ADAMAX, GATED_CONV, GATED_MLP, SHARED, VANILLA, RunConfig


def build_vae(config: RunConfig, dataset: Dataset) -> VAE:
    """The VAE of a configuration, freshly initialised from torch's global generator.

    Raises RunError where the network does not fit the data.
    """
    likelihood = make_likelihood(dataset.likelihood, total_count=dataset.total_count)
    encoder, decoder, feature_dim = _networks(config, dataset, likelihood.num_params)
    encoder = nn.Sequential(_Rescale(*_data_scale(dataset)), *encoder)
    flow = _build_flow(config, feature_dim)
    return VAE(encoder, decoder, config.latent_dim, flow, likelihood, feature_dim)


def _networks(config: RunConfig, dataset: Dataset, num_params: int) -> tuple[nn.Sequential, nn.Module, int]:
    """(encoder, decoder, the encoder's number of features)."""
    data_dim = dataset.train[0].numel()
    if config.network == GATED_CONV:
        if dataset.image_shape != CONV_IMAGE:
            raise RunError(
                f"network {GATED_CONV} wants grey images of {CONV_IMAGE[0]} x {CONV_IMAGE[1]}, {dataset.name} has rows "
                f"of shape {list(dataset.train.shape[1:])}; choose {GATED_MLP} or other data"
            )
        return gated_conv_encoder(), gated_conv_decoder(config.latent_dim, num_params), CONV_FEATURES
    gated = config.network == GATED_MLP
    make_encoder, make_decoder = (gated_mlp_encoder, gated_mlp_decoder) if gated else (mlp_encoder, mlp_decoder)
    encoder = make_encoder(data_dim, *config.hidden)
    decoder = make_decoder(config.latent_dim, *reversed(config.hidden), num_params * data_dim)
    return encoder, decoder, config.hidden[-1]


def _build_flow(config: RunConfig, feature_dim: int) -> nn.Module | None:
    if config.model == VANILLA:
        return None
    if config.model == SHARED:
        return PlanarFlow(config.latent_dim, config.num_steps)
    return AmortizedPlanarFlow(config.latent_dim, config.num_steps, feature_dim)


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or Adamax (Kingma & Ba 2015) with torch's defaults and the learning rate of the first epoch."""
    optimizer = torch.optim.Adamax if config.optimizer == ADAMAX else torch.optim.Adam
    return optimizer(model.parameters(), lr=config.lr)


def _data_scale(dataset: Dataset) -> tuple[float, float]:
    """(shift, scale) that bring the encoder's inputs to the size that linear layers are initialised for."""
    if dataset.likelihood == "binomial":
        return 0.0, float(dataset.total_count)
    if dataset.likelihood == "gaussian":
        return dataset.train.mean().item(), dataset.train.std().item() or 1.0
    return 0.0, 1.0


class _Rescale(nn.Module):
    """x -> (x - shift) / scale."""

    def __init__(self, shift: float, scale: float):
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.scale if (self.shift, self.scale) != (0.0, 1.0) else x
