"""One training step of the 784-400-40 VAE (B = 100, on a GPU 512 too) with or without a flow. Run with `make bench`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from contestants import eager_loop, no_op
from measure import Block, Refused, failures_refused
from torch import Tensor, nn

from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn import mlp_decoder, mlp_encoder

LATENT, HIDDEN, BATCH, GPU_BATCH = 40, 400, 100, 512
ROUNDS, QUICK_ROUNDS = 31, 5  # the ratios are near 1 and machines are noisy: many short rounds
GPU_ROUNDS = 9
BLOCK_SECONDS = 0.08
PASS = "step"
NO_OP = partial(no_op, like=torch.zeros_like)


@dataclass(frozen=True)
class Training:
    """The steps of one optimizer; each is compared with the vanilla VAE's in the same round."""

    optimizer: str
    options: tuple[tuple[str, object], ...] = ()
    rows: int = BATCH
    dim: int = LATENT
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"VAE-step-{self.optimizer}" + ("" if self.rows == BATCH else f"-B{self.rows}")

    def takes(self, name: str) -> bool:
        """Whether the contestant is timed: of the larger batch the flows with shared parameters that are no loops."""
        return self.rows == BATCH or not ("amortized" in name or "loop" in name)


GROUPS = [Training("Adam"), Training("fused-Adam", (("fused", True),))]
GPU_GROUPS = [*(replace(group, rows=GPU_BATCH) for group in GROUPS), *GROUPS]


class OtherSharedFlow(PlanarFlow):
    """A flow with shared parameters that another contestant computes."""

    def __init__(self, num_steps: int, flow: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__(LATENT, num_steps)
        self.compute = flow

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute(z, self.u, self.w, self.b)


class OtherAmortizedFlow(AmortizedPlanarFlow):
    """An amortized flow that another contestant computes."""

    def __init__(self, num_steps: int, flow: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__(LATENT, num_steps, HIDDEN)
        self.compute = flow

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute(z, *self.params(context))


def flows(backends: list[str]) -> dict[str, Callable[[], nn.Module | None]]:
    """The flow of each contestant: None for the vanilla VAE."""
    return {
        "vanilla": lambda: None,
        "no-op K=80": lambda: OtherSharedFlow(80, NO_OP),
        **{f"vvae_fast {name} K=80": partial(PlanarFlow, LATENT, 80, backend=name) for name in backends},
        "eager loop K=80": lambda: OtherSharedFlow(80, eager_loop),
        "no-op amortized K=16": lambda: OtherAmortizedFlow(16, NO_OP),
        **{
            f"vvae_fast {name} amortized K=16": partial(AmortizedPlanarFlow, LATENT, 16, HIDDEN, backend=name)
            for name in backends
        },
        "eager loop amortized K=16": lambda: OtherAmortizedFlow(16, eager_loop),
    }


def make_model(flow: Callable[[], nn.Module | None], device: torch.device) -> VAE:
    torch.manual_seed(0)
    return VAE(mlp_encoder(784, HIDDEN), mlp_decoder(LATENT, HIDDEN, 784), LATENT, flow()).to(device)


def make_data(device: torch.device, rows: int = BATCH) -> Tensor:
    return torch.bernoulli(torch.full((rows, 784), 0.3), generator=torch.Generator().manual_seed(0)).to(device)


@cache
def training_step(name: str, group: Training, device: torch.device, backends: tuple[str, ...]) -> Callable[[], None]:
    """One Adam step of a checked model; raises Refused where the flow's loss or gradients differ from the loop's."""
    flow = flows(list(backends))[name]
    model, x = make_model(flow, device), make_data(device, group.rows)
    if name.startswith("vvae_fast"):
        with failures_refused():
            check(model, x)
    optimizer = torch.optim.Adam(model.parameters(), **dict(group.options))

    def step() -> None:
        optimizer.zero_grad()
        model(x).neg_elbo.mean().backward()
        optimizer.step()

    return step


def check(model: VAE, x: Tensor) -> None:
    """The loss and every gradient against the reference backend's, for the same noise."""
    trial = copy.deepcopy(model)
    with torch.no_grad():  # a flow starts as the identity: away from there
        for parameter in trial.flow.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    answers = []
    for backend in (trial.flow.backend, "reference"):
        trial.flow.backend = backend
        torch.manual_seed(1)
        loss = trial(x).neg_elbo.mean()
        answers.append([loss.detach(), *torch.autograd.grad(loss, list(trial.parameters()))])
    for got, wanted in zip(*answers, strict=True):
        error = ((got - wanted).norm() / wanted.norm()).item()
        if not error < 1e-4:
            raise Refused(f"wrong: loss or gradient is off by {error:.1e} of its norm")


def pytest_generate_tests(metafunc):
    bench = metafunc.config.bench
    rounds = QUICK_ROUNDS if bench.quick else GPU_ROUNDS if bench.on_gpu else ROUNDS
    groups = GPU_GROUPS if bench.on_gpu else GROUPS
    names = {group: [name for name in flows(bench.backends) if group.takes(name)] for group in groups}
    blocks = [Block(group, PASS, name, r) for group in groups for r in range(rounds) for name in names[group]]
    metafunc.parametrize("block", blocks, ids=str)


def bench_vae_step(block, bench, benchmark):
    with bench.recording(block):
        step = training_step(block.contestant, block.group, bench.run.device, tuple(bench.backends))
        bench.run.time_block(block, step, benchmark, None, BLOCK_SECONDS, wall_only=True)
