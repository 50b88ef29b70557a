"""The VAE of a run's configuration, and its optimizer."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from vvae_fast.nn.base import AmortizedFlow
from vvae_fast.nn.gated import (
    CONV_FEATURES,
    CONV_IMAGE,
    gated_conv_decoder,
    gated_conv_encoder,
    gated_mlp_decoder,
    gated_mlp_encoder,
)
from vvae_fast.nn.likelihoods import Likelihood, Standardised, make_likelihood
from vvae_fast.nn.mlp import mlp_decoder, mlp_encoder
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow, largest_rank
from vvae_fast.nn.sylvester.flows import AmortizedSylvesterFlow, SylvesterFlow
from vvae_fast.nn.sylvester.householder import AmortizedHouseholderFlow, HouseholderFlow
from vvae_fast.nn.vae import VAE
from vvae_fast.train.base.files import RunError
from vvae_fast.train.data.sets import GAUSSIAN, Dataset, make_loaders
from vvae_fast.train.data.statistics import statistics
from vvae_fast.train.run.runconfig import (
    ADAMAX,
    AMORTIZED,
    FULL,
    GATED_CONV,
    GATED_MLP,
    HOUSEHOLDER,
    PLANAR,
    SHARED,
    SYLVESTER,
    VANILLA,
    RunConfig,
    is_sylvester,
)

# The shared and the amortized module of each family.
_FLOWS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    PLANAR: (PlanarFlow, AmortizedPlanarFlow),
    SYLVESTER.rstrip("-"): (SylvesterFlow, AmortizedSylvesterFlow),
    HOUSEHOLDER: (HouseholderFlow, AmortizedHouseholderFlow),
}
FAN_IN = 1024  # a linear layer with more inputs has a smaller learning rate
CUT_ROWS = 4096  # of the training set, for which a cut head is to move points as before


def build_vae(config: RunConfig, dataset: Dataset) -> VAE:
    """The VAE of a configuration, initialised from torch's global generator.

    Raises RunError as `check_fits` does, DataError if Gaussian data cannot be standardised.
    """
    check_fits(config, dataset)
    likelihood, rescale = _likelihood(dataset)
    encoder, decoder = _networks(config, dataset, likelihood.num_params)
    feature_dim = _feature_dim(config)
    flow = _build_flow(config, feature_dim)
    return VAE(nn.Sequential(rescale, *encoder), decoder, config.latent_dim, flow, likelihood, feature_dim)


def _likelihood(dataset: Dataset) -> tuple[Likelihood, nn.Module]:
    """The data's likelihood, and the module that scales the encoder's inputs to the size that layers expect."""
    if dataset.likelihood == GAUSSIAN:
        mean, std = (torch.as_tensor(x, dtype=torch.float32) for x in statistics(dataset.train.numpy(), dataset.name))
        return Standardised(mean, std), _Standardise(mean, std)
    return make_likelihood(dataset.likelihood, total_count=dataset.total_count), Rescale(dataset.total_count or 1)


def _feature_dim(config: RunConfig) -> int:
    """How many features the encoder gives."""
    return CONV_FEATURES if config.network == GATED_CONV else config.hidden[-1]


def _networks(config: RunConfig, dataset: Dataset, num_params: int) -> tuple[nn.Sequential, nn.Module]:
    """(encoder, decoder)."""
    data_dim = dataset.train[0].numel()
    if config.network == GATED_CONV:
        return gated_conv_encoder(), gated_conv_decoder(config.latent_dim, num_params)
    gated = config.network == GATED_MLP
    make_encoder, make_decoder = (gated_mlp_encoder, gated_mlp_decoder) if gated else (mlp_encoder, mlp_decoder)
    encoder = make_encoder(data_dim, *config.hidden)
    decoder = make_decoder(config.latent_dim, *reversed(config.hidden), num_params * data_dim)
    return encoder, decoder


def check_fits(config: RunConfig, dataset: Dataset) -> None:
    """Raises RunError if the network does not fit the data, there is no such flow, or its head cannot have the
    configuration's rank, before anything is built or written."""
    if config.network == GATED_CONV and dataset.image_shape != CONV_IMAGE:
        raise RunError(
            f"network {GATED_CONV} wants grey images of {CONV_IMAGE[0]} x {CONV_IMAGE[1]}, {dataset.name} has rows "
            f"of shape {list(dataset.train.shape[1:])}; choose {GATED_MLP} or other data"
        )
    if config.layer_norm and config.rank == 1:
        raise RunError(f"{config.name}: a layer norm wants a rank of at least 2, got 1; leave the layer norm out")
    if config.full_epochs and config.rank == FULL:
        raise RunError(f"{config.name}: full epochs are of a head with a rank, and it has none; leave them out")
    if config.full_epochs >= config.epochs:
        raise RunError(
            f"{config.name}: its head is to be cut after {config.full_epochs} epochs, and it has {config.epochs}; give "
            "fewer full epochs"
        )
    if config.layer_norm and config.full_epochs:
        raise RunError(f"{config.name}: a head that is cut has no layer norm; leave it or the full epochs out")
    if config.flow != PLANAR:
        try:
            with torch.device("meta"):
                _build_flow(config, _feature_dim(config))
        except ValueError as error:
            raise RunError(f"{config.name}: {error}") from error
        return
    most = largest_rank(config.latent_dim, config.num_steps, _feature_dim(config))
    if config.rank > most:
        raise RunError(
            f"{config.name}: the rank must be at most min(features, K (2 D + 1)) = {most}, got {config.rank}; leave it "
            "out for a full head, which costs less"
        )


def _build_flow(config: RunConfig, feature_dim: int) -> nn.Module | None:
    if config.model == VANILLA:
        return None
    sizes = [config.latent_dim, config.num_steps]
    options: dict[str, Any] = {}
    shared, amortized = _FLOWS[config.flow.partition("-")[0]]
    if is_sylvester(config.flow):
        sizes.append(config.units or config.latent_dim)
        options["kind"] = config.flow.removeprefix(SYLVESTER)
    if config.model == SHARED:
        return shared(*sizes, **options)
    rank = None if config.rank == FULL else config.rank
    return amortized(
        *sizes, feature_dim, rank=rank, normalise=config.normalise, layer_norm=config.layer_norm, **options
    )


def cut_head(vae: VAE, config: RunConfig, dataset: Dataset) -> None:
    """Cuts the full head of the VAE's flow to the configuration's rank, for the CUT_ROWS rows of the training set that
    its first epoch begins with. The other parameters stay as they are. All on the CPU.

    Raises RunError if something is not finite.
    """
    loader, _, _ = make_loaders(dataset, config.batch_size, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        encoded = [vae.encode(x) for x in islice(loader, -(-CUT_ROWS // config.batch_size))]
        parts = [torch.cat(part)[:CUT_ROWS] for part in zip(*encoded, strict=True)]
        mean, log_var, features = parts  # [N, D], [N, D], [N, F]
        z_0 = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator)
        try:
            vae.flow = cast(AmortizedFlow, vae.flow).with_rank(config.rank, z_0, features)
        except ValueError as error:
            raise RunError(f"{config.name}: its head cannot be cut: {error}; lower --lr, with --fresh") from error


def matched(config: RunConfig, num_steps: int, dataset: Dataset) -> RunConfig:
    """`config`, of a vanilla VAE, with as many parameters as the amortized flow VAE of num_steps has, or a few more.

    Every hidden layer gets the same number of further units, the smallest that is enough. Raises RunError for a network
    whose widths are fixed.
    """
    if config.network == GATED_CONV:
        raise RunError(f"network {GATED_CONV} has its own widths, no vanilla VAE of it can match; leave it out")
    wanted = _num_parameters(replace(config, model=AMORTIZED, flow=PLANAR, num_steps=num_steps), dataset)

    def wider(more: int) -> RunConfig:
        return replace(config, hidden=tuple(width + more for width in config.hidden), matched=num_steps)

    enough = 1
    while _num_parameters(wider(enough), dataset) < wanted:
        enough *= 2
    return wider(bisect_left(range(enough), wanted, key=lambda more: _num_parameters(wider(more), dataset)))


def _num_parameters(config: RunConfig, dataset: Dataset) -> int:
    with torch.random.fork_rng(devices=[]):  # the caller's numbers stay as they are
        return sum(parameter.numel() for parameter in build_vae(config, dataset).parameters())


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or Adamax (Kingma & Ba 2015) with torch's defaults and the learning rate of the first epoch.

    Both move every weight by about the learning rate, and so a linear layer's outputs by that times the sum of its
    inputs' sizes. With more than FAN_IN inputs, the weight's learning rate is smaller in proportion, so that a step
    moves the outputs for a large image no further than for a small one. A group's "lr_share" is this factor.
    """
    optimizer = torch.optim.Adamax if config.optimizer == ADAMAX else torch.optim.Adam
    groups: dict[float, list[nn.Parameter]] = {}
    wide = {
        layer.weight: FAN_IN / layer.in_features
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer.in_features > FAN_IN
    }
    for parameter in model.parameters():
        groups.setdefault(wide.get(parameter, 1.0), []).append(parameter)
    return optimizer(
        [
            {"params": parameters, "lr": config.lr * share, "lr_share": share}
            for share, parameters in sorted(groups.items(), reverse=True)
        ]
    )


class Rescale(nn.Module):
    """x -> x / scale."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = float(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.scale if self.scale != 1.0 else x


class _Standardise(nn.Module):
    """x [B, P] -> (x - shift) / scale; shift and scale, [P] or [], belong to its state_dict."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shift: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.scale
