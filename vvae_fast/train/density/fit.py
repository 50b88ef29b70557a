"""Planar flows fitted to 2-D energies, and their KL to the target by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vvae_fast.nn.planar import PlanarFlow
from vvae_fast.train.base.files import DivergedError
from vvae_fast.train.density.energies import ENERGIES, Energy

BOX, POINTS = 8.0, 1024  # for the quadrature: z in [-8, 8]^2, points on each side
MASS_ERROR = 1e-3  # if the integral of q is off by more, the grid does not resolve q
FIRST_BETA, ANNEALED = 0.01, 0.4  # the energy's first weight, and the share of the iterations after which it is 1
REPORT_EVERY = 100  # iterations


@dataclass(frozen=True)
class FitConfig:
    """The settings of one fit. Its restarts have the seeds `seed`, `seed` + 1, ..."""

    energy: str
    num_steps: int
    iterations: int = 5000
    restarts: int = 8
    seed: int = 0
    batch_size: int = 1024
    lr: float = 0.01

    @property
    def label(self) -> str:
        return f"{self.energy} K={self.num_steps}"

    def to_json(self) -> dict:
        return asdict(self)


class Grid(NamedTuple):
    """The midpoints of a square's cells."""

    points: Tensor  # [n * n, 2], float64
    cell: float  # a cell's area


class Divergence(NamedTuple):
    """The divergence of a flow's q from a target p = e^-U / Z, by the midpoint rule."""

    kl: float  # KL(q || p), nats
    mass: float  # the integral of q, 1 if the grid resolves q
    log_normalizer: float  # log Z


class Restart(NamedTuple):
    """A trained flow and its divergence."""

    seed: int
    flow: PlanarFlow
    divergence: Divergence


def make_grid(half_width: float = BOX, num: int = POINTS) -> Grid:
    """The midpoints of num x num cells of [-half_width, half_width]^2, the second coordinate varying fastest."""
    side = 2 * half_width / num
    centres = (torch.arange(num, dtype=torch.float64) + 0.5) * side - half_width
    return Grid(torch.cartesian_prod(centres, centres), side**2)


def log_density(flow: PlanarFlow, z: Tensor) -> Tensor:
    """log q_K(z) [*batch] in nats for z [*batch, 2], exactly: N(0, I) at the flow's inverse, docs/math.md (3)."""
    z_0, log_det = flow.inverse(z)
    return -0.5 * z_0.square().sum(-1) - math.log(2 * math.pi) + log_det


@torch.no_grad()
def divergence(flow: PlanarFlow, energy: Energy, grid: Grid) -> Divergence:
    """KL(q_K || p), with p's normalizer from the same grid, for a float64 flow."""
    log_q, minus_u = log_density(flow, grid.points), -energy(grid.points)
    log_normalizer = minus_u.logsumexp(0) + math.log(grid.cell)
    q = log_q.exp() * grid.cell
    kl = (q * (log_q - minus_u + log_normalizer)).sum()
    return Divergence(kl.item(), q.sum().item(), log_normalizer.item())


def train(config: FitConfig, seed: int, report: Callable[[int], None] | None = None) -> PlanarFlow:
    """A float64 flow that Adam trained from the identity; `report` is called with the number of finished iterations.

    The loss is KL(q_K || p) up to constants, E[beta U(z_K) - log_det] over z_0 ~ N(0, I). beta rises to 1 as in
    Rezende & Mohamed (2015), section 6, and a cosine takes the learning rate to 0.
    """
    energy = ENERGIES[config.energy]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = PlanarFlow(2, config.num_steps)
        optimizer = torch.optim.Adam(flow.parameters(), config.lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
        for iteration in range(config.iterations):
            beta = min(1.0, FIRST_BETA + iteration / (ANNEALED * config.iterations))
            z_K, log_det = flow(torch.randn(config.batch_size, 2))
            loss = (beta * energy(z_K) - log_det).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if report is not None and (iteration + 1) % REPORT_EVERY == 0:
                report(iteration + 1)
    return flow.double().requires_grad_(False)


def fit(config: FitConfig, grid: Grid, report: Callable[[int], None] | None = None) -> list[Restart]:
    """All restarts, the smallest KL first.

    Raises DivergedError if the grid resolves none: for each, q's integral is off by more than MASS_ERROR.
    """
    energy, restarts = ENERGIES[config.energy], []
    for number in range(config.restarts):

        def report_all(iterations: int, done: int = number * config.iterations) -> None:
            if report is not None:
                report(done + iterations)

        flow = train(config, config.seed + number, report_all)
        restarts.append(Restart(config.seed + number, flow, divergence(flow, energy, grid)))
    restarts.sort(key=_order)
    if not _is_resolved(restarts[0]):
        raise DivergedError(
            f"{config.label}: the quadrature's grid does not resolve the flow, q's integral is "
            f"{restarts[0].divergence.mass:g}; take other --iterations, --restarts or --seed"
        )
    return restarts


def _is_resolved(restart: Restart) -> bool:
    return abs(restart.divergence.mass - 1) <= MASS_ERROR  # false for nan


def _order(restart: Restart) -> tuple[bool, float]:
    return not _is_resolved(restart), restart.divergence.kl
