"""One training step of the 784-400-40 VAE (B = 100, on a GPU 512 too) with or without a flow. Run with `make bench`."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from benchmarks.flow.contestants import COMPILED, GRAPH, LOOPS, no_op
from benchmarks.flow.loops import PLAIN, REFERENCE, Loop, Looped, plain_loop, reference_loop
from benchmarks.flow.measure import Block, Refused, failures_refused
from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn import mlp_decoder, mlp_encoder

LATENT, HIDDEN, BATCH, GPU_BATCH = 40, 400, 100, 512
RANKS = (32, 128)  # of low-rank heads
ROUNDS, QUICK_ROUNDS = 21, 5  # the ratios are near 1 and machines are noisy: many short rounds
GPU_ROUNDS = 9
BLOCK_SECONDS = 0.08
PASS = "step"
COMPILE = "torch.compile"
LOOPED = (PLAIN, COMPILE, REFERENCE)
WARM_UPS = 3
NO_OP = partial(no_op, like=torch.zeros_like)


@dataclass(frozen=True)
class Training:
    """The steps with one optimizer; each is compared with the vanilla VAE's step in the same round."""

    optimizer: str
    options: tuple[tuple[str, object], ...] = ()
    rows: int = BATCH
    dim: int = LATENT
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"VAE-step-{self.optimizer}" + ("" if self.rows == BATCH else f"-B{self.rows}")

    def takes(self, name: str) -> bool:
        """Whether the contestant is timed; for the larger batch only shared flows that are not loops."""
        return self.rows == BATCH or not ("amortized" in name or name.startswith(LOOPED))


GROUPS = [Training("Adam"), Training("fused-Adam", (("fused", True),))]
GPU_GROUPS = [*(replace(group, rows=GPU_BATCH) for group in GROUPS), *GROUPS]


def shared(loop: Loop) -> Looped:
    """80 steps with shared parameters, computed by a loop."""
    return Looped(PlanarFlow(LATENT, 80), loop)


def amortized(loop: Loop) -> Looped:
    """16 steps with parameters for each data point, computed by a loop."""
    return Looped(AmortizedPlanarFlow(LATENT, 16, HIDDEN), loop)


@cache
def compiled() -> Loop:
    """One compiled loop for all steps, so that a shape is compiled once."""
    return torch.compile(LOOPS[COMPILED], dynamic=False)


def flows(backends: list[str]) -> dict[str, Callable[[], nn.Module | None]]:
    """The flow of each contestant: None for the vanilla VAE."""
    return {
        "vanilla": lambda: None,
        "no-op K=80": lambda: shared(NO_OP),
        **{f"vvae_fast {name} K=80": partial(PlanarFlow, LATENT, 80, backend=name) for name in backends},
        f"{PLAIN} K=80": lambda: shared(plain_loop),
        f"{COMPILE} K=80": lambda: shared(compiled()),
        f"{REFERENCE} K=80": lambda: shared(reference_loop),
        "no-op amortized K=16": lambda: amortized(NO_OP),
        **{
            f"vvae_fast {name} amortized K={k}": partial(AmortizedPlanarFlow, LATENT, k, HIDDEN, backend=name)
            for name in backends
            for k in (16, 80)
        },
        **{
            f"vvae_fast {name} amortized K={k} rank {rank}": partial(
                AmortizedPlanarFlow, LATENT, k, HIDDEN, rank=rank, backend=name
            )
            for name in backends
            for k in (16, 80)
            for rank in RANKS
        },
        f"{PLAIN} amortized K=16": lambda: amortized(plain_loop),
        f"{COMPILE} amortized K=16": lambda: amortized(compiled()),
        f"{REFERENCE} amortized K=16": lambda: amortized(reference_loop),
    }


def make_model(flow: Callable[[], nn.Module | None], device: torch.device) -> VAE:
    torch.manual_seed(0)
    return VAE(mlp_encoder(784, HIDDEN), mlp_decoder(LATENT, HIDDEN, 784), LATENT, flow()).to(device)


def make_data(device: torch.device, rows: int = BATCH) -> Tensor:
    return torch.bernoulli(torch.full((rows, 784), 0.3), generator=torch.Generator().manual_seed(0)).to(device)


def in_graphs(group: Training, backends: list[str]) -> list[str]:
    """The contestants whose whole step is one CUDA graph: for the batch size that only GPUs run."""
    plain = ["vanilla", *(f"vvae_fast {name} K=80" for name in backends)]
    return [] if group.rows == BATCH else [f"{name}{GRAPH}" for name in plain]


def step_of(model: VAE, x: Tensor, group: Training, capturable: bool = False) -> Callable[[], Tensor]:
    """A step of the group's optimizer, which returns the loss."""
    optimizer = torch.optim.Adam(model.parameters(), **dict(group.options), capturable=capturable)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).neg_elbo.mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@cache
def training_step(name: str, group: Training, device: torch.device, backends: tuple[str, ...]) -> Callable[[], None]:
    """One Adam step of a checked model; raises Refused if its loss or gradients differ from the reference's."""
    flow, in_graph = flows(list(backends))[name.removesuffix(GRAPH)], name.endswith(GRAPH)
    model, x = make_model(flow, device), make_data(device, group.rows)
    if name.startswith(("vvae_fast", *LOOPED)):
        with failures_refused():
            check(model, x)
    step = step_of(model, x, group, capturable=in_graph and x.is_cuda)
    if not in_graph:
        return step
    with failures_refused():
        _move_away(model)
        replay = captured(step)
        check_graph(replay, model, x)
    return replay


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph, after a warm-up on a separate stream: docs/graphs.md."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def check_graph(replay: Callable[[], Tensor], model: VAE, x: Tensor) -> None:
    """Compares a replay's loss and gradients with the reference's, for the same noise; its parameters must move."""
    before = copy.deepcopy(model)
    torch.manual_seed(1)  # as for the reference's answer
    got = [replay().clone(), *(parameter.grad for parameter in model.parameters())]
    if any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)):
        raise Refused("wrong: a replay leaves parameters as they were")
    _compare(got, _reference_answer(before, x))


def check(model: VAE, x: Tensor) -> None:
    """Compares the loss and every gradient with the reference's, for the same noise."""
    trial = copy.deepcopy(model)
    _move_away(trial)
    _compare(_answer(trial, x), _reference_answer(trial, x))


def _move_away(model: VAE) -> None:
    """Moves the parameters: a flow starts as the identity, where a step tests little."""
    with torch.no_grad():
        for parameter in () if model.flow is None else model.flow.parameters():
            parameter += 0.02 * torch.randn_like(parameter)


def _compare(got: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(got, wanted, strict=True):
        error = ((x - y).norm() / y.norm()).item()
        if not error < 1e-4:
            raise Refused(f"wrong: loss or gradient is off by {error:.1e} of its norm")


def _reference_answer(model: VAE, x: Tensor) -> list[Tensor]:
    """The model's answer with the reference in its flow, which then stays there."""
    if isinstance(model.flow, Looped):
        model.flow.loop = reference_loop
    elif model.flow is not None:
        model.flow.backend = "reference"
    return _answer(model, x)


def _answer(model: VAE, x: Tensor) -> list[Tensor]:
    """The loss and the gradients."""
    torch.manual_seed(1)
    loss = model(x).neg_elbo.mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def names(group: Training, backends: list[str], in_full: bool) -> list[str]:
    """The contestants of a group; the quick run and a GPU run leave out the compiled and the slowest ones."""
    taken = [name for name in flows(backends) if group.takes(name)] + in_graphs(group, backends)
    return [name for name in taken if in_full or not name.startswith((COMPILE, REFERENCE))]


def pytest_generate_tests(metafunc):
    bench = metafunc.config.bench
    rounds = QUICK_ROUNDS if bench.quick else GPU_ROUNDS if bench.on_gpu else ROUNDS
    groups = GPU_GROUPS if bench.on_gpu else GROUPS
    trials = {group: names(group, bench.backends, not (bench.quick or bench.on_gpu)) for group in groups}
    blocks = [Block(group, PASS, name, r) for group in groups for r in range(rounds) for name in trials[group]]
    metafunc.parametrize("block", blocks, ids=str)


def bench_vae_step(block, bench, benchmark):
    with bench.recording(block):
        start = time.perf_counter()
        step = training_step(block.contestant, block.group, bench.run.device, tuple(bench.backends))
        if block.contestant.startswith(COMPILE) and block.contestant not in [x for _, x in bench.run.compile_seconds]:
            bench.run.compile_seconds[block.group, block.contestant] = time.perf_counter() - start
        bench.run.time_block(block, step, benchmark, None, BLOCK_SECONDS, wall_only=True)
