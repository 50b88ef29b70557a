"""Loops over the steps in PyTorch: the plain loop, to which all ratios are, and the reference.

The plain loop is the fastest that was found among loops for one kind of problem, float32 or float64, at the defaults,
in at most twenty lines. These were tried: forward and backward, in turns, ms of CPU time on one thread with AVX2,
medians of 12:

                                        128 x 40, K = 80   4,096 x 64, K = 32
    reference                                       78.9                 79.6
    README's loop                                   30.7                 52.7
    hoisted, w[k], a logarithm a step               25.1                 30.7
    unbind, z @ w + b, addr                          8.9                 24.1
    unbind, addmv, addr                              8.0                 21.1
    the same with tanh_ in place                     8.3                 22.1
    unbind, addmv, addcmul                          16.0                 36.4
    unbind, addmv, addr, z transposed                9.8                 21.2
    products of all steps first                      9.7                 14.9

                                            1,000 x 40, K = 16, amortized
    reference                                                        56.7
    README's loop                                                    85.7
    unbind, sum of products, addcmul                                 18.4
    unbind, linalg.vecdot, addcmul                                   19.2
    unbind, baddbmm, addcmul                                         33.9
    products of all steps first                                      33.7

unbind and one logarithm of all steps gain most: the gradient of each w[k] is a tensor of zeros as large as w. Computing
the products of all steps first, w . z and w . u, takes as long as step by step at 256 and 512 rows. It is faster at
1,000, where memory and not the number of calls limits a step.

Compiled by torch.compile, at 100 x 40, K = 16: the reference 1.01, step by step 0.88, which also compiles in a third of
the time; with sums of products in place of addmv and addr 0.89. So torch.compile compiles the plain loop. The form with
the products of all steps first was not compared compiled.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vvae_fast import reference

Loop = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

PLAIN, REFERENCE = "plain loop", "reference"  # their names as contestants
MANY_ROWS = 512  # with so many rows or more, the products of all steps are computed first
CHUNK = 32  # steps whose products are computed at a time


def plain_loop(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """z_K [B, D], log_det [B] for z [B, D] and u, w [*B, K, D], b [*B, K], shared or amortized: by the fastest loop."""
    if w.dim() > 2:
        return amortized_loop(z, u, w, b)
    return (products_first if len(z) >= MANY_ROWS else step_by_step)(z, u, w, b)


def _constrained(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """u_hat of all steps at once, and w . u_hat."""
    alpha = (w * u).sum(-1)
    u = u + ((F.softplus(-alpha) - 1) / (w * w).sum(-1))[..., None] * w
    return u, F.softplus(alpha) - 1


def step_by_step(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Shared parameters: a matrix-vector product, a tanh and an outer product for each step."""
    u, c = _constrained(u, w)
    h = []
    for u_k, w_k, b_k in zip(u.unbind(), w.unbind(), b.unbind(), strict=True):
        h.append(torch.addmv(b_k, z, w_k).tanh())
        z = torch.addr(z, h[-1], u_k)
    h = torch.stack(h)
    return z, torch.log1p(c[:, None] * (1 - h * h)).sum(0)


def products_first(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Shared parameters, many rows: w . z of a chunk's steps at once, to which each step adds its h times w . u."""
    u, c = _constrained(u, w)
    h = []
    for u_c, w_c, b_c in zip(u.split(CHUNK), w.split(CHUNK), b.split(CHUNK), strict=True):
        a, products = torch.addmm(b_c[:, None], w_c, z.T), u_c @ w_c.T
        start = len(h)
        for k in range(len(b_c)):
            h.append(a[0].tanh())
            a = torch.addr(a[1:], products[k, k + 1 :], h[-1])
        z = torch.addmm(z, torch.stack(h[start:]).T, u_c)
    h = torch.stack(h)
    return z, torch.log1p(c[:, None] * (1 - h * h)).sum(0)


def amortized_loop(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A set of parameters for each row."""
    u, c = _constrained(u, w)
    h = []
    for u_k, w_k, b_k in zip(u.unbind(1), w.unbind(1), b.unbind(1), strict=True):
        h.append(((z * w_k).sum(1) + b_k).tanh())
        z = torch.addcmul(z, h[-1][:, None], u_k)
    h = torch.stack(h, 1)
    return z, torch.log1p(c * (1 - h * h)).sum(1)


def reference_loop(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The backend "reference": any batch shape and input, with the stable constraint and determinant."""
    return reference.planar_forward(z, u, w, b)[:2]


class Looped(nn.Module):
    """A PlanarFlow or AmortizedPlanarFlow that a loop, or another contestant, computes."""

    def __init__(self, flow: nn.Module, loop: Loop) -> None:
        super().__init__()
        self.flow, self.loop = flow, loop
        self.dim, self.context_dim = flow.dim, getattr(flow, "context_dim", None)

    def forward(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        params = self.flow.params(*context) if context else (self.flow.u, self.flow.w, self.flow.b)
        return self.loop(z, *params)
