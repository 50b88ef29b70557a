"""What a call costs beside the kernels, on the CPU: python benchmarks/call_cost.py [rounds]

Forward + backward in one thread, against the no-op, which is a Python autograd Function that computes nothing: by the
Function in Python, and by the node in C++ where it is there. Then what the backward of a frozen flow, whose parameters
need no gradient, takes of a trained one's. The contestants take turns, a block of calls each; printed are the medians
over the rounds, in microseconds, and the median ratio of a round.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from contestants import no_op
from torch import Tensor

import vvae_fast
from vvae_fast import autograd, node, ops

CASES = [(1, 1, 1), (100, 2, 8), (100, 40, 16), (128, 40, 80)]  # rows, D, K
FROZEN = (4096, 64, 32)
BLOCK_SECONDS = 0.02
WARM_UP = 3  # rounds


@contextlib.contextmanager
def by_function() -> Iterator[None]:
    """Ordinary calls take the Function in Python."""
    with_node = node.is_ordinary, autograd.ordinary_planar_flow
    node.is_ordinary, autograd.ordinary_planar_flow = None, autograd.planar_flow
    try:
        yield
    finally:
        node.is_ordinary, autograd.ordinary_planar_flow = with_node


def measure(calls: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call in each round, by name: of (call, the context that it is made in)."""
    times = {name: [] for name in calls}
    counts = {name: max(3, int(BLOCK_SECONDS / _seconds(call, 5))) for name, (call, _) in calls.items()}
    for _ in range(WARM_UP + rounds):
        for name, (call, context) in calls.items():
            with context():
                times[name].append(1e6 * _seconds(call, counts[name]))
    return {name: of_rounds[WARM_UP:] for name, of_rounds in times.items()}


def _seconds(call: Callable, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def inputs(rows: int, dim: int, num_steps: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """z, u, w, b and the gradients of z_K and log_det."""
    g = torch.Generator().manual_seed(0)
    u, w = (torch.randn(num_steps, dim, generator=g) * dim**-0.5 for _ in range(2))
    z, grad_z = (torch.randn(rows, dim, generator=g) for _ in range(2))
    return [z, u, w, torch.randn(num_steps, generator=g)], (grad_z, torch.randn(rows, generator=g))


def contestants(rows: int, dim: int, num_steps: int) -> dict[str, tuple[Callable, Callable]]:
    tensors, grads = inputs(rows, dim, num_steps)
    leaves = [t.requires_grad_() for t in tensors]

    def both_passes(flow: Callable) -> Callable:
        return lambda: torch.autograd.grad(flow(*leaves), leaves, grads)

    fast = both_passes(vvae_fast.planar_flow)
    found = {"no-op": (both_passes(no_op), contextlib.nullcontext), "Function": (fast, by_function)}
    return found if node.load_error else found | {"node": (fast, contextlib.nullcontext)}


def frozen_and_trained() -> dict[str, tuple[Callable, Callable]]:
    found = {}
    for name in ("trained", "frozen"):
        (z, *params), grads = inputs(*FROZEN)
        leaves = [z.requires_grad_(), *(params if name == "frozen" else [t.requires_grad_() for t in params])]
        outputs, wanted = vvae_fast.planar_flow(*leaves), [t for t in leaves if t.requires_grad]
        found[name] = (_backward(outputs, wanted, grads), contextlib.nullcontext)
    return found


def _backward(outputs: tuple[Tensor, Tensor], wanted: list[Tensor], grads: tuple[Tensor, Tensor]) -> Callable:
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def row(times: dict[str, list[float]]) -> str:
    """Of the first, its microseconds; of the others, also the ratio to it."""
    first, *others = times
    text = f"{first} {statistics.median(times[first]):.1f} us"
    for name in others:
        ratio = statistics.median(t / base for t, base in zip(times[name], times[first], strict=True))
        text += f", {name} {statistics.median(times[name]):.1f} us ({ratio:.2f}x)"
    return text


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 41
    torch.set_num_threads(1)
    gc.disable()
    print(f"torch {torch.__version__}, {ops.isa()}, one thread; node: {node.load_error or 'available'}")
    for case in CASES:
        print("B x D, K = {} x {}, {}: ".format(*case) + row(measure(contestants(*case), rounds)), flush=True)
    gc.collect()
    print("backward, {} x {}, K = {}: ".format(*FROZEN) + row(measure(frozen_and_trained(), rounds)))


if __name__ == "__main__":
    main()
