"""The four energies of Rezende & Mohamed (2015), table 1, and the taper that makes all of them densities."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Energy = Callable[[Tensor], Tensor]  # z [*batch, 2] -> U(z) [*batch] in nats, with p(z) proportional to e^-U(z)

TAPER_START, TAPER_WIDTH = 4.0, 0.4  # the paper's pictures end at |z_1| = 4


def ring(z: Tensor) -> Tensor:
    """U1: two crescents of a ring of radius 2."""
    z_1 = z[..., 0]
    wells = torch.logaddexp(_log_bell(z_1 - 2, 0.6), _log_bell(z_1 + 2, 0.6))
    return -_log_bell(torch.linalg.vector_norm(z, dim=-1) - 2, 0.4) - wells


def wave(z: Tensor) -> Tensor:
    """U2: a sine, tapered."""
    z_1, z_2 = z.unbind(-1)
    return taper(z_1) - _log_bell(z_2 - _sine(z_1), 0.4)


def bulge(z: Tensor) -> Tensor:
    """U3: a sine that splits in two and joins again, tapered."""
    z_1, z_2 = z.unbind(-1)
    distance = z_2 - _sine(z_1)
    shift = 3 * _log_bell(z_1 - 1, 0.6).exp()
    return taper(z_1) - torch.logaddexp(_log_bell(distance, 0.35), _log_bell(distance + shift, 0.35))


def fork(z: Tensor) -> Tensor:
    """U4: a sine that splits in two and stays split, tapered."""
    z_1, z_2 = z.unbind(-1)
    distance = z_2 - _sine(z_1)
    shift = 3 * torch.sigmoid((z_1 - 1) / 0.3)
    return taper(z_1) - torch.logaddexp(_log_bell(distance, 0.4), _log_bell(distance + shift, 0.35))


ENERGIES: dict[str, Energy] = {"U1": ring, "U2": wave, "U3": bulge, "U4": fork}


def taper(z_1: Tensor) -> Tensor:
    """0 up to |z_1| = 4, then half a Gaussian's energy: without it e^-U2, e^-U3 and e^-U4 have no finite integral."""
    return -_log_bell((z_1.abs() - TAPER_START).clamp_min(0), TAPER_WIDTH)


def _log_bell(x: Tensor, width: float) -> Tensor:
    return -0.5 * (x / width).square()


def _sine(z_1: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * z_1)
