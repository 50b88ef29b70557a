"""Checks of the outputs of a VAE's modules. A message names the module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from vvae_fast.nn.likelihoods import Likelihood
from vvae_fast.shapes import untraced


@untraced
def check_encoded(encoded: object, x: Tensor, latent_dim: int, feature_dim: int) -> None:
    """Accepts features [B, F], the pair (mean, log_var) of [B, D] each, or (mean, log_var, features [B, *]).

    Raises ValueError for anything else, and TypeError for dtypes that are not floating.
    """
    wanted, pair = (x.shape[0], feature_dim), (x.shape[0], latent_dim)
    if isinstance(encoded, Tensor) and feature_dim > 0:
        if encoded.shape != wanted:
            raise ValueError(
                f"encoder must give features of shape {wanted} for x of shape {tuple(x.shape)}, "
                f"got {tuple(encoded.shape)}; pass feature_dim= to the VAE if that is what it should give"
            )
        _check_kind("encoder", encoded, x)
        return
    if not _are_tensors(encoded, (2, 3)):
        features = f"features of shape {wanted} or " if feature_dim else "no features, as feature_dim=0 said, but "
        raise ValueError(
            f"encoder must give {features}the pair (mean, log_var) of shape {pair} each for x of shape "
            f"{tuple(x.shape)}, got {describe(encoded)}"
        )
    for name, tensor in zip(("mean", "log_var", "features"), encoded, strict=False):
        _check_kind("encoder", tensor, x)
        if tensor.shape != (pair if name != "features" else tensor.shape) or tensor.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"encoder must give (mean, log_var) of shape {pair} each, and features of as many rows "
                f"where it gives three, got {name} {tuple(tensor.shape)}"
            )


@untraced
def check_params(params: Tensor, x: Tensor, likelihood: Likelihood) -> None:
    """Raises the likelihood's error if the decoder returned too many or too few numbers for each row of x."""
    wanted = likelihood.num_params * math.prod(x.shape[1:])
    if params.shape[-1] != wanted:
        raise ValueError(
            f"decoder's params must be [*samples, {x.shape[0]}, {wanted}] for x of shape {tuple(x.shape)} "
            f"({likelihood.name}: {likelihood.num_params} a data dimension), got {tuple(params.shape)}"
        )


@untraced
def check_channels(params: Tensor, likelihood: Likelihood) -> None:
    if params.shape[1] % likelihood.num_params:
        raise ValueError(
            f"decoder must give [N, {likelihood.num_params} x channels, *] for the {likelihood.name} likelihood, "
            f"got {tuple(params.shape)}"
        )


@untraced
def check_flowed(flowed: object, z: Tensor) -> None:
    """Raises ValueError or TypeError unless a flow returned z_K with z's shape [*batch, D], and log_det [*batch]."""
    if not _are_tensors(flowed, (2,)) or flowed[0].shape != z.shape or flowed[1].shape != z.shape[:-1]:
        two = " and ".join(describe(t) for t in flowed) if _are_tensors(flowed, (2,)) else describe(flowed)
        raise ValueError(f"flow must give z_K {tuple(z.shape)} and log_det {tuple(z.shape[:-1])}, got {two}")
    for tensor in flowed:
        _check_kind("flow", tensor, z)


@untraced
def check_proposed(proposed: object, like: Tensor) -> None:
    """Raises ValueError or TypeError unless a proposal gave z [1, B, D] and log_q [1, B] for `like` [B, D]."""
    z, log_q = (1, *like.shape), (1, *like.shape[:-1])
    if not _are_tensors(proposed, (2,)) or (proposed[0].shape, proposed[1].shape) != (z, log_q):
        raise ValueError(f"proposal must give one sample z {z} and its log_q {log_q}, got {describe(proposed)}")
    for tensor in proposed:
        _check_kind("proposal", tensor, like)


@untraced
def check_decoded(decoded: object, rows: Tensor) -> None:
    """Raises ValueError or TypeError unless a decoder returned one tensor [N, *] for rows [N, D]."""
    if not isinstance(decoded, Tensor) or decoded.ndim < 2 or decoded.shape[0] != rows.shape[0]:
        hint = ": join them with torch.cat, means first for the gaussian" if isinstance(decoded, (tuple, list)) else ""
        raise ValueError(
            f"decoder must give [{rows.shape[0]}, *] for z of shape {tuple(rows.shape)}, got {describe(decoded)}{hint}"
        )
    _check_kind("decoder", decoded, rows)


def describe(value: object) -> str:
    """Describes a value for a message: shapes of tensors, types of anything else."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: ({', '.join(describe(v) for v in value)})"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value))}"
    return type(value).__name__


def _are_tensors(value: object, numbers: tuple[int, ...]) -> TypeGuard[Sequence[Tensor]]:
    """Whether value is a tuple or list of tensors whose length is one of `numbers`."""
    return isinstance(value, (tuple, list)) and len(value) in numbers and all(isinstance(v, Tensor) for v in value)


def _check_kind(module: str, tensor: Tensor, like: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{module} must give floating numbers such as {torch.float32}, got {tensor.dtype}: convert it")
    if tensor.device != like.device:
        raise ValueError(f"{module} must give tensors on {like.device} like its input, got {tensor.device}: move it")
