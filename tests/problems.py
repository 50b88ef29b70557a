"""Random problems, the oracle's answer to them, and the accuracy rule."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

import vvae_fast
from vvae_fast import ops, reference

T = TypeVar("T")

NAMES = ("z_K", "log_det", "dz", "du", "dw", "db")
ERROR_FLOOR = 2e-7  # where the eager loop is exact by luck, this is what its error counts as


class Problem(NamedTuple):
    z: Tensor  # [*batch, D]
    u: Tensor  # [*params, K, D]
    w: Tensor  # [*params, K, D]
    b: Tensor  # [*params, K]
    grad_z: Tensor  # [*batch, D]
    grad_log_det: Tensor  # [*batch]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(t.detach().to(dtype) for t in self))


def random_problem(
    batch: tuple[int, ...],
    num_steps: int,
    dim: int,
    params: tuple[int, ...] = (),
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """w.u and w.z have standard deviation scale^2 and scale for any D."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    matrix = (*params, num_steps, dim)
    u, w = (scale * dim**-0.25 * randn(*matrix) for _ in range(2))
    w = w * dim**-0.25
    tensors = (randn(*batch, dim), u, w, scale * randn(*params, num_steps), randn(*batch, dim), randn(*batch))
    return Problem(*(t.to(dtype) for t in tensors))


def run(p: Problem, constraint: str = "softplus", backend: str | None = None) -> tuple[Tensor, ...]:
    """z_K, log_det, dz, du, dw, db of the package."""
    inputs = [t.detach().requires_grad_() for t in p.inputs]
    outputs = vvae_fast.planar_flow(*inputs, constraint=constraint, backend=backend)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))


def oracle(p: Problem, constraint: str = "softplus") -> tuple[Tensor, ...]:
    """The same from the reference's forward and hand-written adjoint, in the problem's own dtype."""
    z_K, log_det, _ = reference.planar_forward(*p.inputs, constraint)
    return z_K, log_det, *reference.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, constraint)


def relative_errors(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    """The relative L2 error of each tensor, in float64; 0 where both are zero or empty, inf where either has a NaN."""
    errors = []
    for x, y in zip(got, wanted, strict=True):
        difference, size = (x.double() - y).norm().item(), y.norm().item()
        error = difference / size if size > 0 else difference
        errors.append(math.inf if math.isnan(error) else error)  # max() would pass over a NaN
    return errors


def on_each_isa(answer: Callable[[], T]) -> dict[str, T]:
    """The answer on each instruction set that this machine has."""
    previous, answers = ops.isa(), {}
    for level in ops.isa_levels():
        ops.set_isa(level)
        answers[level] = answer()
    ops.set_isa(previous)
    return answers


def error_ratios(problems: list[Problem]) -> dict[str, Tensor]:
    """[draws, 6] of each instruction set: float32 errors against the float64 oracle, over those of the eager loop."""
    rows = {}
    for p in problems:
        wanted = oracle(p.to(torch.float64))
        eager = relative_errors(run(p, backend="reference"), wanted)
        for level, got in on_each_isa(partial(run, p, backend="cpp")).items():
            ours = relative_errors(got, wanted)
            rows.setdefault(level, []).append([x / max(y, ERROR_FLOOR) for x, y in zip(ours, eager, strict=True)])
    return {level: torch.tensor(ratios, dtype=torch.float64) for level, ratios in rows.items()}


def assert_close_to_oracle(p: Problem, constraint: str, tolerance: float) -> None:
    errors = relative_errors(run(p, constraint, "cpp"), oracle(p.to(torch.float64), constraint))
    assert max(errors) < tolerance, dict(zip(NAMES, errors, strict=True))
