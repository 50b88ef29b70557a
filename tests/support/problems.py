"""Random problems, the oracle's answer to them, and the accuracy rule."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

import vvae_fast
from vvae_fast import reference
from vvae_fast.backends import cpp
from vvae_fast.spec import FlowSpec

T = TypeVar("T")

NAMES = ("z_K", "log_det", "dz", "du", "dw", "db")
# The accuracy rule, see assert_as_accurate.
DRAWS = 16
MEAN, STANDARD_ERRORS = 1.6, 3.0
ROOT_MEAN_SQUARE = 4.0
ERROR_FLOOR = 2e-7  # an error of the loop below half a unit of float32's last place counts as this


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


def invert(p: Problem, backend: str, **formulas) -> tuple[Tensor, ...]:
    """z_0, log_det, dz, du, dw, db of the package's inverse, with autograd's gradients."""
    inputs = [t.detach().clone().requires_grad_() for t in p.inputs]
    outputs = vvae_fast.planar_flow_inverse(*inputs, backend=backend, **formulas)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))


def oracle(p: Problem, constraint: str = "softplus", **others) -> tuple[Tensor, ...]:
    """The same from the reference's forward and hand-written adjoint, in the problem's own dtype."""
    spec = FlowSpec(constraint, **others)
    z_K, log_det, _ = reference.planar_forward(*p.inputs, spec)
    return z_K, log_det, *reference.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, spec)


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
    previous, answers = cpp.isa(), {}
    for level in cpp.isa_levels():
        cpp.set_isa(level)
        answers[level] = answer()
    cpp.set_isa(previous)
    return answers


def errors_over_draws(
    problems: list[Problem], backend: str = "cpp", device: str = "cpu", inverse: bool = False, **formulas
) -> dict[str, Tensor]:
    """[draws, 6] relative errors in float32 against float64 on the CPU: those of "loop", the reference on the device,
    and of each instruction set, or of another backend."""
    answer, truth = (invert, partial(invert, backend="reference")) if inverse else (run, oracle)
    rows = {}
    for p in problems:
        wanted, p = truth(p.to(torch.float64), **formulas), p.to(device)
        ours = partial(answer, p, backend=backend, **formulas)
        answers = on_each_isa(ours) if backend == "cpp" else {backend: ours()}
        for name, got in {"loop": answer(p, backend="reference", **formulas), **answers}.items():
            rows.setdefault(name, []).append(relative_errors(got, wanted))
    return {name: torch.tensor(errors, dtype=torch.float64) for name, errors in rows.items()}


def assert_as_accurate(ours: Tensor, loop: Tensor, about: object = "") -> None:
    """The accuracy rule, on the errors [draws, 6] of ours and of the reference: the geometric mean of ours is at most
    MEAN times the loop's, and the root mean square, which one bad draw raises, ROOT_MEAN_SQUARE times; both but for
    STANDARD_ERRORS of what the draws scatter. No single draw decides: in one or another the loop is exact by luck, and
    in which one, the processor's order of sums says."""
    loop = loop.clamp(min=ERROR_FLOOR)
    logarithms = (ours / loop).clamp(min=1e-3).log()
    scatter = logarithms.std(0) / math.sqrt(len(logarithms))
    means = logarithms.mean(0).exp()
    squares = (ours.square().mean(0) / loop.square().mean(0)).sqrt()
    slack = (STANDARD_ERRORS * scatter).exp()
    columns = zip(NAMES, means.tolist(), squares.tolist(), slack.tolist(), strict=False)
    report = "; ".join(f"{n}: mean {mean:.2f}, squares {square:.2f}, slack {by:.2f}" for n, mean, square, by in columns)
    assert (means <= slack * MEAN).all(), f"{about} {report}"  # a NaN is no less
    assert (squares <= slack * ROOT_MEAN_SQUARE).all(), f"{about} {report}"


def assert_accuracy_rule(
    case: tuple[int, int, int, float, tuple[int, ...]],
    backend: str = "cpp",
    device: str = "cpu",
    inverse: bool = False,
    **formulas,
) -> None:
    """The rule for DRAWS problems of a case, rows, K, D, scale, params; half of them in Triton's interpreter, which is
    slow: the rule allows for the scatter of as many as there are."""
    draws = DRAWS // 2 if (backend, device) == ("triton", "cpu") else DRAWS
    rows, num_steps, dim, scale, params = case
    problems = [random_problem((rows,), num_steps, dim, params, scale, seed=seed) for seed in range(draws)]
    errors = errors_over_draws(problems, backend, device, inverse, **formulas)
    loop = errors.pop("loop")
    for name, ours in errors.items():
        assert_as_accurate(ours, loop, name)


def assert_close_to_oracle(
    p: Problem, constraint: str, tolerance: float, backend: str = "cpp", device: str = "cpu", **others
) -> None:
    """The oracle runs on the CPU."""
    wanted = oracle(p.to(torch.float64), constraint, **others)
    errors = relative_errors(run(p.to(device), constraint, backend, **others), wanted)
    assert max(errors) < tolerance, dict(zip(NAMES, errors, strict=True))


def assert_float64_is_the_oracle(
    batch: tuple[int, ...],
    num_steps: int,
    dim: int,
    params: tuple[int, ...] = (),
    constraint: str = "softplus",
    tolerance: float = 1e-10,
    **others,
) -> None:
    """On a random problem; `others` are those of `assert_close_to_oracle`."""
    p = random_problem(batch, num_steps, dim, params, scale=0.5, dtype=torch.float64)
    assert_close_to_oracle(p, constraint, tolerance, **others)


def assert_right_at_an_edge(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """float32 against float64; log_det has its own bound: at alpha = log(e - 1) it is a rounding error itself."""
    assert all(t.isfinite().all() for t in got)
    log_det, exact = got[1].to(wanted[1].device).double(), wanted[1]
    assert ((log_det - exact).abs() <= 1e-5 * exact.abs().clamp(min=1)).all()
    names = [name for name in NAMES if name != "log_det"]
    errors = relative_errors((got[0], *got[2:]), (wanted[0], *wanted[2:]))
    assert max(errors) < 1e-5, dict(zip(names, errors, strict=True))


def assert_same_of_strides(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], p: Problem, about: str = "") -> None:
    """The answers of a backend to p in float32, behind other strides and densely: bits, but on a GPU, where Triton
    compiles other strides to a kernel that may add a row in another order: there both are the oracle's."""
    if not p.z.is_cuda:
        assert all(map(torch.equal, got, wanted)), about
        return
    exact = oracle(p.to("cpu").to(torch.float64))
    for answer in (got, wanted):
        errors = relative_errors(answer, exact)
        assert max(errors) < 1e-5, (about, dict(zip(NAMES, errors, strict=True)))


def opchecked(forward: Callable, p: Problem, formulas: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """z, log_det and a of a raw forward or inverse that has passed opcheck, with and without saving a."""
    for save in (True, False):
        torch.library.opcheck(forward, (*p.inputs, *formulas, save))
    return forward(*p.inputs, *formulas, True)


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


def assert_rows_are_strangers(flow: Callable, amortized: bool, dtype: torch.dtype) -> None:
    """The bits of a row of 150 are those that it has alone, among others, or in another order."""
    rows = 150
    p = random_problem((rows,), 37, 10, (rows,) if amortized else (), dtype=dtype)
    whole, order = flow(*p.inputs, backend="cpp"), torch.randperm(rows)
    for keep in (order, order[:1], order[:63], torch.arange(77, 140)):
        params = tuple(t[keep] if amortized else t for t in p.inputs[1:])
        for x, y in zip(flow(p.z[keep], *params, backend="cpp"), whole, strict=True):
            assert torch.equal(x, y[keep])
