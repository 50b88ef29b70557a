"""Ways to orthonormal columns: python -m benchmarks.calls.orthonormal_columns [rounds]

It times forward + backward of each way from free numbers to Q [*, D, M] in float32, in one thread, and says how far
Q^T Q is from the identity. `ours` is `vvae_fast.nn.orthonormal`. The ways take turns, with a block of calls each. It
prints medians over the rounds of a block's median call, in milliseconds, the median ratio of a round to ours, and the
largest |Q^T Q - I|, for vectors drawn from N(0, 1) and for vectors that are parallel but for 1e-4.
"""

import functools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.calls.turns import in_turn, quiet, ratio
from vvae_fast.nn import orthonormal

SHAPES = [(1600, 64, 16), (800, 64, 32), (16, 64, 16)]  # of Q: a batch of 100 with 16 or 8 layers, and 16 shared layers
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
    quiet()
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
        times = in_turn(calls, rounds)
        print(f"Q [{sets}, {dim}, {count}]")
        for name, way in WAYS.items():
            print(
                f"  {name:20} {1e3 * statistics.median(times[name]):9.2f} ms {ratio(times, name, 'ours'):6.2f}x   "
                f"|Q^T Q - I| {error(way, v):.1e}, parallel {error(way, parallel):.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
