"""The problems that the benchmarks run."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One flow: z [rows, dim], K = num_steps, parameters shared or a set for each row."""

    rows: int
    dim: int
    num_steps: int
    amortized: bool = False

    def __str__(self) -> str:
        kind = "amortized" if self.amortized else "shared"
        return f"{kind}-B{self.rows}-D{self.dim}-K{self.num_steps}"

    def inputs(self) -> list[Tensor]:
        """z [B, D], u, w [*B, K, D], b [*B, K], float32 leaves that require gradients."""
        g = torch.Generator().manual_seed(0)
        sets = (self.rows,) if self.amortized else ()
        shapes = [(self.rows, self.dim), *2 * [(*sets, self.num_steps, self.dim)], (*sets, self.num_steps)]
        scales = [1.0, 0.5, self.dim**-0.5, 0.5]
        return [(s * torch.randn(n, generator=g)).requires_grad_() for s, n in zip(scales, shapes, strict=True)]


VAE_CASES = [
    Case(100, 2, 8),
    Case(100, 40, 16),
    Case(128, 40, 80),
    Case(1000, 64, 32),
    Case(100, 8, 16, amortized=True),
    Case(100, 40, 16, amortized=True),
    Case(1000, 40, 16, amortized=True),
]
