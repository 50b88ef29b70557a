"""One training step of the 784-400-40 VAE (B = 100, Adam) with and without a flow. Run with `make bench`."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from contestants import eager_loop, no_op
from torch import Tensor, nn

from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn import mlp_decoder, mlp_encoder

LATENT, HIDDEN, BATCH = 40, 400, 100


class OtherFlow(PlanarFlow):
    """A shared flow of 80 steps that another contestant computes."""

    def __init__(self, flow: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__(LATENT, 80)
        self.compute = flow

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute(z, self.u, self.w, self.b)


FLOWS: dict[str, Callable[[], nn.Module | None]] = {
    "vanilla": lambda: None,
    "no-op flow": lambda: OtherFlow(no_op),
    "shared K=80": lambda: PlanarFlow(LATENT, 80),
    "amortized K=16": lambda: AmortizedPlanarFlow(LATENT, 16, HIDDEN),
    "eager loop K=80": lambda: OtherFlow(eager_loop),
}


@cache
def training_step(name: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = VAE(mlp_encoder(784, HIDDEN), mlp_decoder(LATENT, HIDDEN, 784), LATENT, FLOWS[name]())
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.bernoulli(torch.full((BATCH, 784), 0.3))

    def step() -> None:
        optimizer.zero_grad()
        model(x).neg_elbo.mean().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("name", FLOWS)
def bench_vae_step(name, timed):
    timed("VAE step 784-400-40, B=100, Adam", name, training_step(name), base="vanilla")
