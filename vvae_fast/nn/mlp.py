"""Fully connected networks: `mlp_encoder(784, 400)` and `mlp_decoder(40, 400, 784)` are the 784-400-40 VAE."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import nn

from vvae_fast.shapes import check_size


class MLP(nn.Sequential):
    """Linear layers with activations between them; `in_features` and `out_features` are their sizes at both ends."""

    def __init__(self, *layers: nn.Module, in_features: int, out_features: int):
        super().__init__(*layers)
        self.in_features = in_features
        self.out_features = out_features


def mlp_encoder(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> MLP:
    """x [B, *data] -> features [B, widths[-1]]: flattens, then a linear layer and an activation for each width.

    Args:
        widths: the number of data dimensions, then the hidden widths, at least one.
        activation: makes one activation module, such as nn.ReLU or nn.Tanh.

    Raises:
        ValueError, TypeError: if widths are not at least two positive ints.
    """
    widths = check_widths("mlp_encoder", widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return MLP(*layers, in_features=widths[0], out_features=widths[-1])


def mlp_decoder(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> MLP:
    """z [N, widths[0]] -> likelihood parameters [N, widths[-1]], with no activation after the last layer.

    Args:
        widths: the latent dimension, the hidden widths (any number), the number of data dimensions times
            the likelihood's num_params.
        activation: makes one activation module, such as nn.ReLU or nn.Tanh.

    Raises:
        ValueError, TypeError: if widths are not at least two positive ints.
    """
    widths = check_widths("mlp_decoder", widths)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return MLP(*layers[:-1], in_features=widths[0], out_features=widths[-1])


def check_widths(name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    """The widths as ints. Raises ValueError or TypeError if they are not at least two positive ones."""
    if len(widths) < 2:
        raise ValueError(f"{name} needs at least two widths, got {widths}")
    return tuple(check_size(f"{name}: each width", width, 1) for width in widths)
