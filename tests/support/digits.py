"""The problems of tests/core/test_digits.py, and what float32 owes to each."""

from typing import NamedTuple

import problems
import torch
from problems import NAMES, random_problem, relative_errors
from torch import Tensor

import vvae_fast

FLOOR = 2e-6  # of relative errors; above it the float32 reference decides
MOST_RATIO = 10.0
DRAWS = 5


class Problem(NamedTuple):
    tensors: problems.Problem
    formulas: dict[str, object]
    inverse: bool
    name: str


def name_of(problem: Problem) -> str:
    return problem.name


def run(problem: Problem, backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """z_K or z_0, log_det, dz, du, dw and db."""
    p = problem.tensors if dtype is None else problem.tensors.to(dtype)
    inputs = [t.detach().clone().requires_grad_() for t in p.inputs]
    flow = vvae_fast.planar_flow_inverse if problem.inverse else vvae_fast.planar_flow
    outputs = flow(*inputs, backend=backend, **problem.formulas)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))


def with_sets(p: problems.Problem, rows: int) -> problems.Problem:
    """The shared parameters as a set for each row."""
    return p._replace(**{name: getattr(p, name).expand(rows, *getattr(p, name).shape).clone() for name in "uwb"})


def one_step(alpha: float, rows: int = 50, dtype: torch.dtype = torch.float32) -> problems.Problem:
    p = random_problem((rows,), 1, 2, dtype=dtype)
    w = torch.tensor([[0.6, -0.8]], dtype=dtype)
    return p._replace(w=w, u=alpha * w + torch.tensor([[0.3, 0.1]], dtype=dtype), b=torch.tensor([0.1], dtype=dtype))


def inverse_of_one_step() -> list[Problem]:
    kinds = [
        ("leaky_relu", -5.0),
        ("leaky_relu", -10.0),
        ("leaky_relu", -15.0),
        ("leaky_relu", -20.0),
        ("leaky_relu", -40.0),
    ]
    kinds += [("linear", -15.0), ("elu", -10.0), ("tanh", -5.0), ("sigmoid", -15.0)]
    found = []
    for activation, alpha in kinds:
        for sets in (False, True):
            p = one_step(alpha)
            name = f"{activation}{alpha:g}-{'amortized' if sets else 'shared'}"
            found.append(Problem(with_sets(p, 50) if sets else p, {"activation": activation}, True, name))
    return found


def wide(rows: int, num_steps: int, dim: int, scale: float, params: tuple[int, ...], seed: int) -> problems.Problem:
    """Entries of u, w and b of standard deviation `scale`, whatever D."""
    batch = (rows // params[0], *params) if params else (rows,)
    p = random_problem(batch, num_steps, dim, params, seed=seed)
    unit = dim**0.25
    return p._replace(u=scale * unit * p.u, w=scale * unit * unit * p.w, b=scale * p.b)


def inverse_of_many_steps() -> list[Problem]:
    return [
        Problem(wide(40, 16, 2, 1.2, params, seed=0), {"activation": activation}, True, f"{activation}-{len(params)}")
        for activation in ("elu", "leaky_relu", "linear")
        for params in ((), (40,))
    ]


def growing_flows() -> list[Problem]:
    return [
        Problem(
            wide(40, 32, dim, 2.0, params, seed=1), {"activation": activation}, False, f"{activation}-{dim}-{params}"
        )
        for activation in ("leaky_relu", "elu", "linear")
        for dim in (2, 8)
        for params in ((), (40,), (8,))
    ]


def assert_digits_of_each(problem: Problem, answers: dict[str, tuple[Tensor, ...]]) -> None:
    """Within 10 times the error of the reference in float32 or 2e-6, against the reference in float64. The reference
    counts with its worst error over the problem and neighbours that differ in the last places: it can be exact by luck.
    """
    exact = run(problem, "reference", torch.float64)
    allowed = [FLOOR] * len(exact)
    for p in neighbours(problem):
        errors = relative_errors(run(p, "reference"), run(p, "reference", torch.float64))
        allowed = [max(most, MOST_RATIO * error) for most, error in zip(allowed, errors, strict=True)]
    for level, got in answers.items():
        found = dict(zip(NAMES, zip(relative_errors(got, exact), allowed, strict=True), strict=True))
        assert all(error <= most for error, most in found.values()), (problem.name, level, found)


def assert_digits(problem: Problem, got: tuple[Tensor, ...], level: str) -> None:
    assert_digits_of_each(problem, {level: got})


def neighbours(problem: Problem) -> list[Problem]:
    g = torch.Generator().manual_seed(0)
    moved = [problem]
    for _ in range(DRAWS - 1):
        tensors = (t * (1 + 4e-6 * torch.randn(t.shape, generator=g).to(t.dtype)) for t in problem.tensors)
        moved.append(problem._replace(tensors=problems.Problem(*tensors)))
    return moved


def sunken_determinants() -> list[Problem]:
    """Many rows: each has a gradient of the size of 1/s for c, which overflows in float32 but for (39)."""
    found = []
    for dtype, alphas in ((torch.float32, (-88.0, -100.0, -200.0, -1000.0)), (torch.float64, (-720.0, -2000.0))):
        for alpha in alphas:
            for activation, constraint, z in (
                ("linear", "softplus", -0.5),
                ("leaky_relu", "log_softplus", 0.5),
                ("elu", "softplus", 0.5),
                ("tanh", "softplus", 0.0),
            ):
                for sets in (False, True):
                    p = one_step(alpha, 200, dtype)
                    w = torch.tensor([[1.0, 0.0]], dtype=dtype)
                    p = p._replace(w=w, u=torch.tensor([[alpha, 0.3]], dtype=dtype), b=torch.zeros(1, dtype=dtype))
                    p = p._replace(z=torch.full_like(p.z, z), grad_log_det=p.grad_log_det.abs() + 1)
                    formulas = {"activation": activation, "constraint": constraint}
                    name = f"{activation}{alpha:g}-{'amortized' if sets else 'shared'}-{str(dtype)[6:]}"
                    found.append(Problem(with_sets(p, 200) if sets else p, formulas, False, name))
    return found


def of_log_det_alone(problem: Problem) -> Problem:
    return problem._replace(tensors=problem.tensors._replace(grad_z=torch.zeros_like(problem.tensors.grad_z)))


def assert_sunken(problem: Problem, got: tuple[Tensor, ...], level: str) -> None:
    """log_det is w.u, and the gradients are finite."""
    log_det, eps = got[1], torch.finfo(got[1].dtype).eps
    alpha = (problem.tensors.u * problem.tensors.w).sum(-1).flatten()[0]
    assert ((log_det - alpha).abs() <= 4 * eps * alpha.abs()).all(), (level, log_det[:3])
    assert all(t.isfinite().all() for t in got[2:]), level


def assert_slope_of_sunken(problem: Problem, du: Tensor, level: str) -> None:
    """`of_log_det_alone`'s du is that of w.u."""
    p = problem.tensors
    total = p.grad_log_det if p.u.dim() > 2 else p.grad_log_det.sum()  # dL/dalpha
    torch.testing.assert_close(du, (total[..., None, None] * p.w).expand_as(p.u), rtol=1e-5, atol=1e-6, msg=level)


def huge_slopes() -> list[Problem]:
    """One dimension, w = 1: c is u, and R is z. Roots down to R / c are normal numbers."""
    found = []
    for c in (1e10, 2e19, 1e25, 1e30, 1e34):
        z = torch.tensor([1e-3, 1.0, -5.0, 0.3]).outer(torch.tensor([1.0, c**0.5, 0.9 * c])).reshape(-1, 1)
        like = torch.ones_like(z)
        tensors = problems.Problem(z, torch.tensor([[c]]), torch.ones(1, 1), torch.zeros(1), like, like[:, 0])
        found.append(Problem(tensors, {}, True, f"{c:g}"))
    return found


def assert_inverts(problem: Problem, z_0: Tensor, log_det: Tensor, level: str) -> None:
    """In float64 the flow takes z_0 to z, as far as float32 holds z_0 = z - u h."""
    z, u, w, b, *_ = (t.double() for t in problem.tensors)
    exact, exact_log_det = vvae_fast.planar_flow_inverse(z, u, w, b, backend="reference")
    assert ((z_0.double() - exact).abs() <= 2e-7 * z.abs()).all(), (level, z_0.flatten(), exact.flatten())
    well_posed = z[:, 0].abs() < 0.5 * u.item()  # where tanh saturates the root is that of R - c
    error = (log_det.double() - exact_log_det).abs() / exact_log_det.abs()
    assert (error[well_posed] <= 1e-6).all(), (level, log_det, exact_log_det)
