"""Gated networks, fully connected and convolutional: each layer is a(x) * sigmoid(g(x)) with a and g affine.

The MLP is that of Tomczak & Welling (2018), 784-300-300-40, the convolutional one that of van den Berg et al. (2018).
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vvae_fast.nn.mlp import MLP, check_widths
from vvae_fast.shapes import check_size

CONV_IMAGE = (28, 28)  # height and width that the convolutional networks are made for
CONV_FEATURES = 256
BOTTLENECK = 7  # height and width of the smallest feature maps


class GatedLinear(nn.Module):
    """x [*batch, in_features] -> a(x) * sigmoid(g(x)) [*batch, out_features]; one product computes both a and g."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.linear(x), -1)


class GatedConv2d(nn.Module):
    """Images [B, in_channels, H, W] -> a(x) * sigmoid(g(x)) [B, out_channels, H', W']; sizes as nn.Conv2d's."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2 * out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x), 1)


class GatedConvTranspose2d(nn.Module):
    """Images [B, in_channels, H, W] -> a(x) * sigmoid(g(x)) [B, out_channels, H', W']; as nn.ConvTranspose2d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        output_padding: int = 0,
    ):
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, 2 * out_channels, kernel_size, stride, padding, output_padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x), 1)


def gated_mlp_encoder(*widths: int) -> MLP:
    """x [B, *data] -> features [B, widths[-1]]: flattens, then a gated layer for each width after the first.

    Raises:
        ValueError, TypeError: if widths (data dimensions, hidden widths) are not at least two positive ints.
    """
    widths = check_widths("gated_mlp_encoder", widths)
    layers = [GatedLinear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths)]
    return MLP(nn.Flatten(), *layers, in_features=widths[0], out_features=widths[-1])


def gated_mlp_decoder(*widths: int) -> MLP:
    """z [N, widths[0]] -> likelihood parameters [N, widths[-1]]: gated layers, and a plain linear one at the end.

    Raises:
        ValueError, TypeError: if widths are not at least two positive ints.
    """
    widths = check_widths("gated_mlp_decoder", widths)
    *hidden, last = pairwise(widths)
    layers = [GatedLinear(fan_in, fan_out) for fan_in, fan_out in hidden]
    return MLP(*layers, nn.Linear(*last), in_features=widths[0], out_features=widths[-1])


def gated_conv_encoder() -> MLP:
    """x [B, 784] or [B, 28, 28] -> features [B, 256]: five 5x5 gated convolutions, then one over the whole 7x7 map."""
    layers = [
        nn.Flatten(),
        nn.Unflatten(1, (1, *CONV_IMAGE)),
        GatedConv2d(1, 32, 5, padding=2),
        GatedConv2d(32, 32, 5, stride=2, padding=2),
        GatedConv2d(32, 64, 5, padding=2),
        GatedConv2d(64, 64, 5, stride=2, padding=2),
        GatedConv2d(64, 64, 5, padding=2),
        GatedConv2d(64, CONV_FEATURES, BOTTLENECK),
        nn.Flatten(),
    ]
    return MLP(*layers, in_features=CONV_IMAGE[0] * CONV_IMAGE[1], out_features=CONV_FEATURES)


def gated_conv_decoder(latent_dim: int, num_params: int = 1) -> MLP:
    """z [N, latent_dim] -> likelihood parameters [N, num_params * 784]: gated transposed convolutions, a plain 1x1 one.

    Raises:
        ValueError, TypeError: if latent_dim or num_params is not a positive int.
    """
    latent_dim, num_params = check_size("latent_dim", latent_dim, 1), check_size("num_params", num_params, 1)
    layers = [
        nn.Unflatten(1, (latent_dim, 1, 1)),
        GatedConvTranspose2d(latent_dim, 64, BOTTLENECK),
        GatedConvTranspose2d(64, 64, 5, padding=2),
        GatedConvTranspose2d(64, 32, 5, stride=2, padding=2, output_padding=1),
        GatedConvTranspose2d(32, 32, 5, padding=2),
        GatedConvTranspose2d(32, 32, 5, stride=2, padding=2, output_padding=1),
        GatedConvTranspose2d(32, 32, 5, padding=2),
        nn.Conv2d(32, num_params, 1),
        nn.Flatten(),
    ]
    return MLP(*layers, in_features=latent_dim, out_features=num_params * CONV_IMAGE[0] * CONV_IMAGE[1])
