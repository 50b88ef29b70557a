"""Times the inverse against the forward pass on the CPU: python -m benchmarks.calls.inverse [rounds]

Calls take turns. The numbers are medians and minima, in milliseconds; minima are steadier on a busy machine. w.u and
w.z have standard deviation 1.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

import vvae_fast
from vvae_fast.backends import cpp

CASES = [  # rows, D, K, amortized
    (10_000, 16, 32, False),
    (1_000, 64, 32, False),
    (128, 40, 80, False),
    (1_000, 40, 16, True),
]


def measure(calls: list[Callable], rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of each call: the median and the minimum."""
    times = [[] for _ in calls]
    for _ in range(3 + rounds):
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            of_call.append(1e3 * (time.perf_counter() - start))
    return [(statistics.median(of_call[3:]), min(of_call[3:])) for of_call in times]


def ratio(of: tuple[float, float], to: tuple[float, float]) -> str:
    return " | ".join(f"{y:.3f} {x:.3f} {x / y:.2f}x" for x, y in zip(of, to, strict=True))


def calls(rows: int, dim: int, num_steps: int, amortized: bool, dtype: torch.dtype) -> list[Callable]:
    """Forward and inverse without gradients, then both with their backward."""
    g = torch.Generator().manual_seed(0)
    params = (rows,) if amortized else ()
    z = torch.randn(rows, dim, generator=g, dtype=dtype)
    u, w = (torch.randn(*params, num_steps, dim, generator=g, dtype=dtype) * dim**-0.25 for _ in range(2))
    w, b = w * dim**-0.25, torch.randn(*params, num_steps, generator=g, dtype=dtype)
    z_K = vvae_fast.planar_flow(z, u, w, b, backend="cpp")[0]
    leaves = [t.clone().requires_grad_() for t in (u, w, b)]

    def with_backward(flow: Callable, start: torch.Tensor) -> None:
        end, log_det = flow(start, *leaves, backend="cpp")
        torch.autograd.grad((end, log_det), leaves, (end.detach(), log_det.detach()))

    return [
        lambda: vvae_fast.planar_flow(z, u, w, b, backend="cpp"),
        lambda: vvae_fast.planar_flow_inverse(z_K, u, w, b, backend="cpp"),
        lambda: with_backward(vvae_fast.planar_flow, z),
        lambda: with_backward(vvae_fast.planar_flow_inverse, z_K),
    ]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 51
    print(f"{cpp.isa()}: forward, inverse and their ratio as median | least; the same with the backward")
    for dtype in (torch.float32, torch.float64):
        for rows, dim, num_steps, amortized in CASES:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                times = measure(calls(rows, dim, num_steps, amortized, dtype), rounds)
                kind = "amortized" if amortized else "shared"
                print(f"{kind} B={rows} D={dim} K={num_steps} {dtype}, {threads} threads:")
                print(f"  {ratio(times[1], times[0])}; {ratio(times[3], times[2])}")


if __name__ == "__main__":
    main()
