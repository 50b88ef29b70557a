"""Ways to orthonormal columns: python -m benchmarks.calls.orthonormal_columns [rounds]

It times forward + backward of each way from free numbers to Q [*, D, M] in float32, in one thread, and says how far
Q^T Q is from the identity. `ours` is `vvae_fast.nn.orthonormal`. The ways take turns, with a block of calls each. It
prints medians over the rounds of a block's median call, in milliseconds, the median ratio of a round to ours, and the
largest |Q^T Q - I|, for vectors drawn from N(0, 1) and for vectors that are parallel but for 1e-4.
"""

import functools
import gc
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.flow.measure import calls_of_block, seconds_of, settle_allocator
from vvae_fast.nn import orthonormal

SHAPES = [(1600, 64, 16), (800, 64, 32), (16, 64, 16)]  # of Q: a batch of 100 with 16 or 8 layers, and 16 shared layers
BLOCK_SECONDS = 0.05
WARM_UP = 1  # round
BJORCK_ITERATIONS, BJORCK_TOLERANCE = 100, 1e-6


def by_qr(v: Tensor) -> Tensor:
    return torch.linalg.qr(v.mT)[0]


def by_householder_product(v: Tensor) -> Tensor:
    """LAPACK's form: the vector of reflection k begins with k zeros and a one."""
    a = v.mT.tril(-1) + torch.eye(v.shape[-1], v.shape[-2])
    return torch.linalg.householder_product(a, 2 / a.square().sum(-2))


def by_matrix_exp(v: Tensor) -> Tensor:
    """The exponential of the antisymmetric D x D matrix whose first columns are v."""
    count, dim = v.shape[-2:]
    a = torch.nn.functional.pad(v.mT, (0, dim - count)).tril(-1)
    return torch.matrix_exp(a - a.mT)[..., :count]


def by_bjorck(v: Tensor) -> Tensor:
    """van den Berg et al. 2018, equation 14: until orthonormal to 1e-6, or for 100 iterations."""
    q = v.mT / torch.linalg.matrix_norm(v.mT)[..., None, None]
    identity = torch.eye(v.shape[-2])
    for _ in range(BJORCK_ITERATIONS):
        rest = identity - q.mT @ q
        if rest.detach().abs().amax() < BJORCK_TOLERANCE:
            break
        q = q + 0.5 * q @ rest
    return q


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "ours": orthonormal,
    "qr": by_qr,
    "householder_product": by_householder_product,
    "matrix_exp": by_matrix_exp,
    "Bjorck": by_bjorck,
}


def error(way: Callable[[Tensor], Tensor], v: Tensor) -> float:
    q = way(v).double()
    return (q.mT @ q - torch.eye(v.shape[-2])).abs().max().item()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    torch.set_num_threads(1)
    gc.disable()
    settle_allocator()
    print(f"torch {torch.__version__}, one thread")
    for sets, dim, count in SHAPES:
        torch.manual_seed(0)
        v = torch.randn(sets, count, dim)
        parallel = torch.randn(sets, 1, dim) + 1e-4 * v
        grad = torch.randn(sets, dim, count)
        leaf = v.clone().requires_grad_()

        def both_passes(way: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> Tensor:
            return torch.autograd.grad(way(leaf), leaf, grad)

        calls = {name: functools.partial(both_passes, way, leaf, grad) for name, way in WAYS.items()}
        counts = {name: calls_of_block(BLOCK_SECONDS, min(map(seconds_of, 2 * [call]))) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(WARM_UP + rounds):
            for name, call in calls.items():
                times[name].append(1e3 * statistics.median(seconds_of(call) for _ in range(counts[name])))
        print(f"Q [{sets}, {dim}, {count}]")
        for name, way in WAYS.items():
            kept = times[name][WARM_UP:]
            ratio = statistics.median(t / ours for t, ours in zip(kept, times["ours"][WARM_UP:], strict=True))
            print(
                f"  {name:20} {statistics.median(kept):9.2f} ms {ratio:6.2f}x   |Q^T Q - I| {error(way, v):.1e}, "
                f"parallel {error(way, parallel):.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
