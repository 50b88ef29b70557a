"""The products of an amortized flow's head, by PyTorch and by oneDNN:

    python -m benchmarks.calls.head_products [rounds] [threads]

A product is timed right after a training step of a VAE without a flow, which leaves little of it in the caches, neither
numbers nor instructions. So it is in training; in a loop of its own a call to oneDNN is much cheaper.
It prints medians over the rounds in microseconds, for B = 100: y = x W^T + b, dx = dy W and dW = dy^T x with W [M, F],
and which of the two `vvae_fast.nn.linear` chooses, by the number of multiply-adds B M F. The dW of a head with a rank
is PyTorch's in any case.
"""

import statistics
import sys
from collections.abc import Callable

import torch

from benchmarks.calls.turns import quiet
from benchmarks.flow.bench_training import BATCH, GROUPS, HIDDEN, LATENT, make_data, make_model, step_of
from benchmarks.flow.measure import seconds_of
from vvae_fast.nn import linear

SIZES = [(k * (2 * LATENT + 1), width) for k in (16, 80) for width in (8, 32, 128, HIDDEN)]  # (M, F): ranks, and full
WARM_UPS = 3


def products(outputs: int, width: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Of each product the call of PyTorch's library and oneDNN's."""
    x, grad = torch.randn(BATCH, width), torch.randn(BATCH, outputs)
    weight, bias = torch.randn(outputs, width), torch.randn(outputs)
    plain, onednn = torch.nn.functional.linear, linear._product
    return {
        "y": (lambda: plain(x, weight, bias), lambda: onednn(x, weight, bias)),
        "dx": (lambda: plain(grad, weight.t()), lambda: onednn(grad, weight.t())),
        "dW": (lambda: plain(grad.t(), x.t()), lambda: onednn(grad.t(), x.t())),
    }


def after_steps(step: Callable[[], object], call: Callable[[], object], rounds: int) -> float:
    """The median call in microseconds, each after a step."""
    times = []
    for _ in range(WARM_UPS + rounds):
        step()
        with torch.no_grad():
            times.append(seconds_of(call))
    return 1e6 * statistics.median(times[WARM_UPS:])


def rounds_and_threads() -> tuple[int, int]:
    """As the command line says them."""
    rounds, threads = (int(given) for given in (sys.argv[1:] + ["25", "2"][len(sys.argv) - 1 :]))
    return rounds, threads


def vanilla_step() -> Callable[[], object]:
    """A training step of the VAE without a flow, on the CPU."""
    return step_of(make_model(lambda: None, torch.device("cpu")), make_data(torch.device("cpu")), GROUPS[-1])


def main() -> None:
    rounds, threads = rounds_and_threads()
    if linear._onednn is None:
        raise SystemExit("this PyTorch has no entry to oneDNN: the head's products are all PyTorch's own")
    quiet(threads)
    torch.manual_seed(0)
    step = vanilla_step()
    print(f"torch {torch.__version__}, {threads} threads; PyTorch / oneDNN, microseconds")
    for outputs, width in SIZES:
        found = {
            name: [after_steps(step, call, rounds) for call in pair] for name, pair in products(outputs, width).items()
        }
        work = BATCH * outputs * width
        chosen = "oneDNN" if work >= linear._LEAST_WORK else "PyTorch"
        times = "   ".join(f"{name} {plain:5.0f} / {onednn:5.0f}" for name, (plain, onednn) in found.items())
        print(f"M = {outputs:5}, F = {width:3}, {work / 1e6:6.1f} M multiply-adds: {times}   {chosen}", flush=True)


if __name__ == "__main__":
    main()
