"""The inputs of accuracy.py's sweep: from ordinary to extreme, each determined by a few numbers."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from problems import Problem
from torch import Tensor

import vvae_fast
from vvae_fast.spec import ACTIVATIONS

CONSTRAINTS = ("softplus", "log_softplus")  # those that can be inverted
ALPHAS = (-20.0, -15.0, -10.0, -5.0, -2.0, -1.0, 0.0, 0.5413, 1.0, 3.0, 10.0, 30.0, 60.0, 100.0)
ROWS = 6
KINDS = {  # of parameters: the shapes of z's batch and of theirs
    "shared": ((ROWS,), ()),
    "sets": ((ROWS // 2, 2), (2,)),
    "amortized": ((ROWS,), (ROWS,)),
    "packed": ((ROWS,), (ROWS,)),
}


class Input(NamedTuple):
    """The numbers that determine one problem."""

    activation: str
    constraint: str
    inverse: bool
    kind: str
    num_steps: int
    dim: int
    alpha: float | None  # w.u of the only step; without it the entries of u, w and b are scale N(0, 1)
    scale: float  # with alpha, the scale of z
    image: bool  # z is the float32 reference's output for a normal z
    seed: int

    @property
    def direction(self) -> str:
        return "inverse" if self.inverse else "forward"

    def __str__(self) -> str:
        what = f"scale {self.scale:g}" if self.alpha is None else f"w.u {self.alpha:g}, z {self.scale:g} N(0, 1)"
        where = ", z an image" if self.image else ""
        size = f"K {self.num_steps} D {self.dim}"
        return f"{self.activation} {self.constraint} {self.direction} {self.kind} {size} {what}{where} seed {self.seed}"

    def problem(self) -> Problem:
        g = torch.Generator().manual_seed(self.seed)
        batch, params = KINDS[self.kind]

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        z, grad_z, grad_log_det = randn(*batch, self.dim), randn(*batch, self.dim), randn(*batch)
        u, w = (randn(*params, self.num_steps, self.dim) for _ in range(2))
        b = randn(*params, self.num_steps)
        if self.alpha is None:
            u, w, b = self.scale * u, self.scale * w, self.scale * b
        else:
            z = self.scale * z
            direction = w / w.norm(dim=-1, keepdim=True)
            size = torch.exp2(2 * torch.rand(b.shape, generator=g, dtype=torch.float64) - 1)[..., None]  # 1/2 to 2
            u = u - (u * direction).sum(-1, keepdim=True) * direction + self.alpha / size * direction
            w = size * direction
        p = Problem(z, u, w, b, grad_z, grad_log_det).to(torch.float32)
        if self.image:
            p = p._replace(z=vvae_fast.planar_flow(*p.inputs, backend="reference", **self.formulas)[0])
        return p

    @property
    def formulas(self) -> dict[str, str]:
        return {"activation": self.activation, "constraint": self.constraint}

    @property
    def size(self) -> tuple:
        """The sort key: which input is smaller than another."""
        return self.num_steps, self.dim, abs(self.alpha or 0), self.scale, self.image, self.seed


def steps(activations: Iterable[str], dims: Iterable[int], alphas: Iterable[float], draws: int) -> Iterator[Input]:
    """One step with a given w.u, at ordinary and at large z."""
    for activation in activations:
        for constraint in CONSTRAINTS:
            for inverse, kind in passes():
                for dim in dims:
                    for alpha in alphas:
                        for scale in (1.0, 30.0):
                            for seed in range(draws):
                                yield Input(activation, constraint, inverse, kind, 1, dim, alpha, scale, False, seed)


def flows(activations: Iterable[str], sizes: Iterable[tuple[int, int]], scales: Iterable[float], draws: int):
    """K steps of ordinary to large entries; the inverse of ordinary z and of images."""
    for activation in activations:
        for constraint in CONSTRAINTS:
            for inverse, kind in passes():
                for num_steps, dim in sizes:
                    for scale in scales:
                        for image in (False, True) if inverse else (False,):
                            for seed in range(draws):
                                yield Input(
                                    activation, constraint, inverse, kind, num_steps, dim, None, scale, image, seed
                                )


def passes() -> list[tuple[bool, str]]:
    """Whether it is the inverse, and the kind of parameters; the inverse takes no packed parameters."""
    return [(inverse, kind) for inverse in (False, True) for kind in KINDS if not (inverse and kind == "packed")]


def inputs(size: str) -> list[Input]:
    """`size` is "full", "quick" or "least"."""
    if size == "full":
        sizes = [(steps, dim) for steps in (2, 8, 16, 32) for dim in (2, 8, 40)]
        return [*steps(ACTIVATIONS, (2, 8, 40), ALPHAS, 2), *flows(ACTIVATIONS, sizes, (0.5, 1.0, 1.4, 2.0), 2)]
    if size == "quick":
        few = (-20.0, -10.0, -5.0, 0.0, 1.0, 10.0, 100.0)
        return [*steps(ACTIVATIONS, (2, 40), few, 1), *flows(ACTIVATIONS, [(8, 2), (32, 8)], (1.0, 2.0), 1)]
    return [*steps(ACTIVATIONS, (2,), (-10.0, 1.0, 100.0), 1), *flows(ACTIVATIONS, [(8, 3)], (2.0,), 1)]
