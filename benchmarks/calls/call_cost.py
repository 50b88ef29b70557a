"""The cost of a call without the kernels, on the CPU: python -m benchmarks.calls.call_cost [rounds]

It times forward + backward in one thread: by the Function in Python, by the node in C++ if it is available, and by the
no-op, a Python autograd Function that computes nothing. Then it compares the backward of a frozen flow, whose
parameters need no gradient, with that of a trained flow. The contestants take turns, with a block of calls each. It
prints medians over the rounds of a block's median call, in microseconds, and the median ratio of a round.
"""

import contextlib
import gc
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

import vvae_fast
from benchmarks.calls.turns import in_turn, quiet, ratio
from benchmarks.flow.cases import Case
from benchmarks.flow.contestants import no_op
from benchmarks.flow.measure import make_gradients, make_inputs
from vvae_fast import node, shapes
from vvae_fast.backends import cpp

CASES = [Case(1, 1, 1), Case(100, 2, 8), Case(100, 40, 16), Case(128, 40, 80)]
FROZEN = Case(4096, 64, 32)
BLOCK_SECONDS = 0.02
WARM_UP = 3  # rounds


@contextlib.contextmanager
def by_function() -> Iterator[None]:
    """Inside the block, ordinary calls use the Function in Python."""
    with_node = node.is_ordinary, node.serves
    node.is_ordinary, node.serves = shapes.is_ordinary, False
    try:
        yield
    finally:
        node.is_ordinary, node.serves = with_node


def measure(calls: dict[str, tuple[Callable, Callable]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call in each round, by name; each value of `calls` is (call, the context to call it in)."""
    timed, contexts = ({name: pair[i] for name, pair in calls.items()} for i in range(2))
    return in_turn(timed, rounds, WARM_UP, BLOCK_SECONDS, contexts)


def contestants(case: Case) -> dict[str, tuple[Callable, Callable]]:
    leaves, grads = [t.requires_grad_() for t in make_inputs(case)], make_gradients(case)

    def both_passes(flow: Callable) -> Callable:
        return lambda: torch.autograd.grad(flow(*leaves), leaves, grads)

    fast = both_passes(vvae_fast.planar_flow)
    found = {"no-op": (both_passes(no_op), contextlib.nullcontext), "Function": (fast, by_function)}
    return found if node.load_error else found | {"node": (fast, contextlib.nullcontext)}


def frozen_and_trained(case: Case) -> dict[str, tuple[Callable, Callable]]:
    grads = make_gradients(case)

    def backward(trained: bool) -> Callable:
        leaves = [t.requires_grad_(trained or i == 0) for i, t in enumerate(make_inputs(case))]
        outputs, wanted = vvae_fast.planar_flow(*leaves), [t for t in leaves if t.requires_grad]
        return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    return {name: (backward(name == "trained"), contextlib.nullcontext) for name in ("trained", "frozen")}


def title(case: Case) -> str:
    return f"{case.rows} x {case.dim}, K = {case.num_steps}"


def row(times: dict[str, list[float]]) -> str:
    """The microseconds of each; for all but the first also the ratio to the first."""
    first, *others = times
    text = f"{first} {1e6 * statistics.median(times[first]):.1f} us"
    for name in others:
        text += f", {name} {1e6 * statistics.median(times[name]):.1f} us ({ratio(times, name, first):.2f}x)"
    return text


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 41
    quiet()
    print(f"torch {torch.__version__}, {cpp.isa()}, one thread; node: {node.load_error or 'available'}")
    for case in CASES:
        print(f"forward + backward, {title(case)}: {row(measure(contestants(case), rounds))}", flush=True)
    gc.collect()
    print(f"backward, {title(FROZEN)}: {row(measure(frozen_and_trained(FROZEN), rounds))}")


if __name__ == "__main__":
    main()
