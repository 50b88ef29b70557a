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

    def to(self, where: torch.dtype | torch.device | str) -> "Problem":
        return Problem(*(t.detach().to(where) for t in self))


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


def run(p: Problem, constraint: str = "softplus", backend: str | None = None, **others) -> tuple[Tensor, ...]:
    """z_K, log_det, dz, du, dw, db of the package; `others` are more of `planar_flow`'s options."""
    inputs = [t.detach().requires_grad_() for t in p.inputs]
    outputs = vvae_fast.planar_flow(*inputs, constraint=constraint, backend=backend, **others)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))


def oracle(p: Problem, constraint: str = "softplus", **others) -> tuple[Tensor, ...]:
    """The same from the reference's forward and hand-written adjoint, in the problem's own dtype."""
    z_K, log_det, _ = reference.planar_forward(*p.inputs, constraint, **others)
    return z_K, log_det, *reference.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, constraint, **others)


def relative_errors(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    """The relative L2 error of each tensor, in float64; 0 where both are zero or empty, inf where either has a NaN."""
    errors = []
    for x, y in zip(got, wanted, strict=True):
        difference, size = (x.to(y.device).double() - y).norm().item(), y.norm().item()
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


def error_ratios(problems: list[Problem], backend: str = "cpp", device: str = "cpu", **formulas) -> dict[str, Tensor]:
    """[draws, 6] of each instruction set, or of another backend: float32 errors against the float64 oracle on the CPU,
    over those of the eager loop on the device."""
    rows = {}
    for p in problems:
        wanted, p = oracle(p.to(torch.float64), **formulas), p.to(device)
        eager = relative_errors(run(p, backend="reference", **formulas), wanted)
        answer = partial(run, p, backend=backend, **formulas)
        for level, got in (on_each_isa(answer) if backend == "cpp" else {backend: answer()}).items():
            ours = relative_errors(got, wanted)
            rows.setdefault(level, []).append([x / max(y, ERROR_FLOOR) for x, y in zip(ours, eager, strict=True)])
    return {level: torch.tensor(ratios, dtype=torch.float64) for level, ratios in rows.items()}


def assert_accuracy_rule(
    case: tuple[int, int, int, float, tuple[int, ...]],
    mean: float,
    most: float,
    draws: int = 8,
    backend: str = "cpp",
    device: str = "cpu",
    **formulas,
) -> None:
    """`case` is rows, K, D, scale, params: the ratios' geometric mean over the draws, and the largest of them."""
    rows, num_steps, dim, scale, params = case
    problems = [random_problem((rows,), num_steps, dim, params, scale, seed=seed) for seed in range(draws)]
    for level, ratios in error_ratios(problems, backend, device, **formulas).items():
        means = ratios.clamp(min=1e-3).log().mean(0).exp()
        worst = ratios.max(0).values
        report = {n: f"{m:.2f} {w:.2f}" for n, m, w in zip(NAMES, means.tolist(), worst.tolist(), strict=True)}
        assert (means <= mean).all(), (level, report)
        assert (worst <= most).all(), (level, report)


def assert_close_to_oracle(
    p: Problem, constraint: str, tolerance: float, backend: str = "cpp", device: str = "cpu", **others
) -> None:
    """The oracle runs on the CPU."""
    wanted = oracle(p.to(torch.float64), constraint, **others)
    errors = relative_errors(run(p.to(device), constraint, backend, **others), wanted)
    assert max(errors) < tolerance, dict(zip(NAMES, errors, strict=True))


def assert_right_at_an_edge(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """float32 against float64; log_det has its own bound: at alpha = log(e - 1) it is a rounding error itself."""
    assert all(t.isfinite().all() for t in got)
    log_det, exact = got[1].to(wanted[1].device).double(), wanted[1]
    assert ((log_det - exact).abs() <= 1e-5 * exact.abs().clamp(min=1)).all()
    names = [name for name in NAMES if name != "log_det"]
    errors = relative_errors((got[0], *got[2:]), (wanted[0], *wanted[2:]))
    assert max(errors) < 1e-5, dict(zip(names, errors, strict=True))


def saved_for_backward(p: Problem, backend: str) -> int:
    """Bytes of the storages that a forward saves."""
    inputs = [t.detach().requires_grad_() for t in p.inputs]
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = vvae_fast.planar_flow(*inputs, backend=backend)  # kept: a freed storage's address may come again
    del outputs
    return sum(saved.values())
