"""The contestants: this package's backends, the loops of loops.py, and the no-op. peers.py has other packages.

A contestant is prepared for one case: it gets its own copies of the inputs and returns a call without arguments.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import vvae_fast
from benchmarks.flow.loops import PLAIN, REFERENCE, plain_loop, reference_loop
from vvae_fast import backends, shapes
from vvae_fast.autograd import Call, PlanarFlowFunction
from vvae_fast.backends import cuda
from vvae_fast.spec import FlowSpec

LOOPS = {PLAIN: plain_loop, REFERENCE: reference_loop}
COMPILED = PLAIN  # the loop that torch.compile compiles: see loops.py
GRAPH = ", CUDA graph"  # ends the name of a VAE step that is one CUDA graph

# torch.compile reads .grad of each input, which warns for the output of a network: all warnings are errors here.
NO_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning"


class Unavailable(Exception):
    """The contestant cannot run here, or not this case; the message, "missing: ..." or "not run: ...", is its row."""


@dataclass(frozen=True)
class Prepared:
    """One contestant, ready for one case: forward() -> (z_K [B, D], log_det [B]) as a function of the leaves."""

    forward: Callable[[], tuple[Tensor, Tensor]]
    leaves: list[Tensor]
    # (dz, du, dw, db) in the shapes of the case, from the gradients of the leaves
    gradients: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple


@dataclass(frozen=True)
class Contestant:
    """`build` takes z, u, w, b (leaves) and may raise Unavailable; `role` is "ours", "form" (a backend of ours in a
    requested form), "peer" or "no-op"."""

    name: str
    role: str
    build: Callable[[list[Tensor]], Prepared]
    constraint: str = "softplus"
    tolerance: float | None = None  # relative L2 error of each output and gradient; None: measure.TOLERANCES
    log_det_slack: float = 0.0  # nats a step and row that log_det may be off, beyond the tolerance
    compiled: bool = False
    runs: bool = True  # on this device, as far as is known before it is built


class _NoOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, u: Tensor, w: Tensor, b: Tensor, like: Callable) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, u, w, b)
        ctx.like = like
        return z.clone(), like(z[..., 0])

    @staticmethod
    def backward(ctx, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        _, u, w, b = ctx.saved_tensors
        return grad_z, ctx.like(u), ctx.like(w), ctx.like(b), None


def no_op(z: Tensor, u: Tensor, w: Tensor, b: Tensor, like: Callable = torch.empty_like) -> tuple[Tensor, Tensor]:
    """Clones z, with planar_flow's signature: this times the autograd machinery alone.

    `like` makes log_det and the gradients; an optimizer needs numbers in them: torch.zeros_like.
    """
    return _NoOp.apply(z, u, w, b, like)


@contextlib.contextmanager
def cuda_form(name: str) -> Iterator[None]:
    """Inside the block, the cuda backend's kernels use this form for every shape."""
    cuda.set_form(name)
    try:
        yield
    finally:
        cuda.set_form("automatic")


class _CudaDirect(PlanarFlowFunction):
    """Sets the form in each pass, because other contestants run between the passes."""

    @staticmethod
    def forward(ctx, *inputs):
        with cuda_form("direct"):
            return PlanarFlowFunction.forward(ctx, *inputs)

    @staticmethod
    def backward(ctx, *grads):
        with cuda_form("direct"):
            return PlanarFlowFunction.backward(ctx, *grads)


def cuda_direct(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The cuda backend's direct form, the recursion step by step: the compact form is compared with it."""
    return _CudaDirect.apply(Call.of(cuda.CUDA, FlowSpec()), z, u, w, b)


def _function(flow: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> Prepared:
    return Prepared(partial(flow, *inputs), inputs)


def _compiled(inputs: list[Tensor]) -> Prepared:
    torch._dynamo.reset()
    return _function(torch.compile(LOOPS[COMPILED], dynamic=False), inputs)


def _unavailable(status: str, inputs: list[Tensor]) -> Prepared:
    raise Unavailable(status)


def _why_not(name: str, state: dict[str, object], device: torch.device) -> str | None:
    """The status of a backend that is missing on this machine, or does not run on this device; None otherwise."""
    if not state["available"]:
        return f"missing: {'; '.join(state['reasons'])}"
    z, b = torch.zeros(1, 1, device=device), torch.zeros(1, device=device)
    try:
        backends.select(shapes.check(z, z, z, b, FlowSpec()), name)
    except RuntimeError as error:  # only the package's own rejection; a broken kernel is timed, and fails
        return f"not run: {error}"
    return None


def ours(device: torch.device | str = "cpu") -> list[Contestant]:
    """A contestant for each backend of the package except the reference, which is a loop; and the cuda backend's direct
    form."""
    found = []
    for name, state in vvae_fast.info()["backends"].items():
        if name != "reference":
            status = _why_not(name, state, torch.device(device))
            flow = partial(_function, partial(vvae_fast.planar_flow, backend=name))
            build = partial(_unavailable, status) if status else flow
            found.append(Contestant(f"vvae_fast {name}", "ours", build, runs=status is None))
            if name == "cuda":
                build = partial(_unavailable, status) if status else partial(_function, cuda_direct)
                found.append(Contestant("vvae_fast cuda direct", "form", build, runs=status is None))
    return found


def baselines() -> list[Contestant]:
    """The no-op, the loops, and torch.compile's version of one."""
    return [
        Contestant("no-op", "no-op", partial(_function, no_op)),
        *(Contestant(name, "peer", partial(_function, loop)) for name, loop in LOOPS.items()),
        Contestant("torch.compile", "peer", _compiled, compiled=True),
    ]
