"""Inputs from ordinary to extreme, and what float32 makes of them: the errors of the kernels beside those of the
float32 reference, both against the reference in float64 with autograd's gradients. accuracy.py prints the table."""

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol
from unittest import mock

import torch
from problems import NAMES, Problem, on_each_isa
from torch import Tensor

import vvae_fast
from vvae_fast import ops
from vvae_fast.functional import packed_planar_flow
from vvae_fast.kernels import _heuristics
from vvae_fast.shapes import ACTIVATIONS, Formulas

Answer = tuple[Tensor, ...]  # the tensors of NAMES

MOST_RATIO = 10.0  # of an error to the reference's, where the error is above
FLOOR = 2e-6
NEIGHBOURS = 8
DISTANCE = 2.0**-18  # of a neighbour, relative: near enough to be as hard, far enough for all roundings to differ
LARGEST = torch.finfo(torch.float32).max

CONSTRAINTS = ("softplus", "log_softplus")  # those that can be inverted
ALPHAS = (-20.0, -15.0, -10.0, -5.0, -2.0, -1.0, 0.0, 0.5413, 1.0, 3.0, 10.0, 30.0, 60.0, 100.0)
ROWS = 6
KINDS = {  # of parameters: the shapes of z's batch and of theirs
    "shared": ((ROWS,), ()),
    "sets": ((ROWS // 2, 2), (2,)),
    "amortized": ((ROWS,), (ROWS,)),
    "packed": ((ROWS,), (ROWS,)),
}


class Input(NamedTuple):
    """One problem, which its numbers determine."""

    activation: str
    constraint: str
    inverse: bool
    kind: str
    num_steps: int
    dim: int
    alpha: float | None  # w.u of the only step; without it the entries of u, w and b are scale N(0, 1)
    scale: float  # with alpha, of z
    image: bool  # z is what the float32 reference makes of a normal z
    seed: int

    def __str__(self) -> str:
        direction = "inverse" if self.inverse else "forward"
        what = f"scale {self.scale:g}" if self.alpha is None else f"w.u {self.alpha:g}, z {self.scale:g} N(0, 1)"
        where = ", z an image" if self.image else ""
        size = f"K {self.num_steps} D {self.dim}"
        return f"{self.activation} {self.constraint} {direction} {self.kind} {size} {what}{where} seed {self.seed}"

    def problem(self) -> Problem:
        g = torch.Generator().manual_seed(self.seed)
        batch, params = KINDS[self.kind]

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        z, grad_z, grad_log_det = randn(*batch, self.dim), randn(*batch, self.dim), randn(*batch)
        u, w = (randn(*params, self.num_steps, self.dim) for _ in range(2))
        b = randn(*params, self.num_steps)
        if self.alpha is None:
            u, w, b = self.scale * u, self.scale * w, self.scale * b
        else:
            z = self.scale * z
            direction = w / w.norm(dim=-1, keepdim=True)
            size = torch.exp2(2 * torch.rand(b.shape, generator=g, dtype=torch.float64) - 1)[..., None]  # 1/2 to 2
            u = u - (u * direction).sum(-1, keepdim=True) * direction + self.alpha / size * direction
            w = size * direction
        p = Problem(z, u, w, b, grad_z, grad_log_det).to(torch.float32)
        if self.image:
            p = p._replace(z=vvae_fast.planar_flow(*p.inputs, backend="reference", **self.formulas)[0])
        return p

    @property
    def formulas(self) -> dict[str, str]:
        return {"activation": self.activation, "constraint": self.constraint}

    @property
    def size(self) -> tuple:
        """By which one input is smaller than another."""
        return self.num_steps, self.dim, abs(self.alpha or 0), self.scale, self.image, self.seed


class Backend(Protocol):
    """What is judged: several answers to a problem, by name, each the six tensors of NAMES."""

    def answers(self, inputs: list[Input], problems: list[Problem]) -> list[dict[str, Answer]]: ...


class Finding(NamedTuple):
    """An error that is above the floor."""

    backend: str
    input: Input
    name: str  # of the output or gradient
    error: float
    reference: float
    ratio: float


class Counts:
    """How many outputs and gradients were compared, were above the floor, had entries left out or nothing else."""

    def __init__(self) -> None:
        self.inputs = self.compared = self.above = self.partly = self.empty = self.judged_again = 0


def steps(activations: Iterable[str], dims: Iterable[int], alphas: Iterable[float], draws: int) -> Iterator[Input]:
    """One step whose w.u is given, at ordinary and at large z."""
    for activation in activations:
        for constraint in CONSTRAINTS:
            for inverse, kind in passes():
                for dim in dims:
                    for alpha in alphas:
                        for scale in (1.0, 30.0):
                            for seed in range(draws):
                                yield Input(activation, constraint, inverse, kind, 1, dim, alpha, scale, False, seed)


def flows(activations: Iterable[str], sizes: Iterable[tuple[int, int]], scales: Iterable[float], draws: int):
    """K steps of ordinary to large entries; the inverse of ordinary z and of images."""
    for activation in activations:
        for constraint in CONSTRAINTS:
            for inverse, kind in passes():
                for num_steps, dim in sizes:
                    for scale in scales:
                        for image in (False, True) if inverse else (False,):
                            for seed in range(draws):
                                yield Input(
                                    activation, constraint, inverse, kind, num_steps, dim, None, scale, image, seed
                                )


def passes() -> list[tuple[bool, str]]:
    """Whether it is the inverse, and the kind of parameters; the inverse takes none that are packed."""
    return [(inverse, kind) for inverse in (False, True) for kind in KINDS if not (inverse and kind == "packed")]


def inputs(size: str) -> list[Input]:
    """`size` is "full", "quick" or "least"."""
    if size == "full":
        sizes = [(steps, dim) for steps in (2, 8, 16, 32) for dim in (2, 8, 40)]
        return [*steps(ACTIVATIONS, (2, 8, 40), ALPHAS, 2), *flows(ACTIVATIONS, sizes, (0.5, 1.0, 1.4, 2.0), 2)]
    if size == "quick":
        few = (-20.0, -10.0, -5.0, 0.0, 1.0, 10.0, 100.0)
        return [*steps(ACTIVATIONS, (2, 40), few, 1), *flows(ACTIVATIONS, [(8, 2), (32, 8)], (1.0, 2.0), 1)]
    return [*steps(ACTIVATIONS, (2,), (-10.0, 1.0, 100.0), 1), *flows(ACTIVATIONS, [(8, 3)], (2.0,), 1)]


def run(p: Problem, it: Input, backend: str) -> Answer:
    """z, log_det, dz, du, dw, db of the package."""
    if it.kind == "packed" and backend != "reference":
        return _run_packed(p, it, backend)
    flow = vvae_fast.planar_flow_inverse if it.inverse else vvae_fast.planar_flow
    leaves = [t.detach().requires_grad_() for t in p.inputs]
    outputs = flow(*leaves, backend=backend, **it.formulas)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, (p.grad_z, p.grad_log_det))


def _run_packed(p: Problem, it: Input, backend: str) -> Answer:
    packed = torch.cat([p.u.flatten(-2), p.w.flatten(-2), p.b], -1)
    leaves = [t.detach().requires_grad_() for t in (p.z, packed)]
    outputs = packed_planar_flow(*leaves, it.num_steps, it.dim, backend=backend, **it.formulas)
    dz, dpacked = torch.autograd.grad(outputs, leaves, (p.grad_z, p.grad_log_det))
    du, dw, db = dpacked.split([p.u[0].numel(), p.w[0].numel(), p.b[0].numel()], -1)
    return *(t.detach() for t in outputs), dz, du.reshape(p.u.shape), dw.reshape(p.w.shape), db


class Package:
    """A backend of the package: the C++ one on each instruction set that this machine has, those for GPUs in the compact
    form too where they may take it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name != "cpp" and torch.cuda.is_available() else "cpu"

    def answers(self, inputs: list[Input], problems: list[Problem]) -> list[dict[str, Answer]]:
        return [self._answer(it, p.to(self.device)) for it, p in zip(inputs, problems, strict=True)]

    def _answer(self, it: Input, p: Problem) -> dict[str, Answer]:
        if self.name == "cpp":
            return {f"cpp {isa}": got for isa, got in on_each_isa(lambda: run(p, it, "cpp")).items()}
        named = {self.name: run(p, it, self.name)}
        if may_be_compact(it):
            with self._compact():
                named[f"{self.name} compact"] = run(p, it, self.name)
        return {name: tuple(t.cpu() for t in got) for name, got in named.items()}

    @contextlib.contextmanager
    def _compact(self) -> Iterator[None]:
        if self.name == "triton":
            with mock.patch.object(_heuristics, "is_compact", lambda *shape: True):
                yield
        else:
            ops.set_cuda_form("compact")
            yield
            ops.set_cuda_form("automatic")


class CudaOnHost:
    """The CUDA kernels as tests/cuda_host.py runs them where there is no GPU."""

    def __init__(self) -> None:
        import cuda_host

        self.host, self.program = cuda_host, cuda_host.build(("plain",))["plain"]

    def answers(self, inputs: list[Input], problems: list[Problem]) -> list[dict[str, Answer]]:
        cases, names = [], []
        for i, (it, p) in enumerate(zip(inputs, problems, strict=True)):
            case = self.host.Case(p, Formulas(**it.formulas), packed=it.kind == "packed", inverse=it.inverse)
            forms = ("direct", "compact") if may_be_compact(it) else ("direct",)
            cases += [case._replace(form=form) for form in forms]
            names += [(i, form) for form in forms]
        done = self.host.run(self.program, cases)
        named = [{} for _ in inputs]
        for (i, form), answer in zip(names, done.answers, strict=True):
            if answer.error:
                raise RuntimeError(f"{inputs[i]}: {answer.error}")
            named[i]["cuda" if form == "direct" else f"cuda {form}"] = answer.tensors
        return named


def may_be_compact(it: Input) -> bool:
    """Whether a problem with more rows would take the compact form on a GPU."""
    return it.kind in ("shared", "sets") and not it.inverse and it.dim >= 32 and it.num_steps <= it.dim


def backend_of(name: str) -> Backend:
    """cpp, triton or cuda, on a GPU where there is one."""
    return CudaOnHost() if name == "cuda" and not torch.cuda.is_available() else Package(name)


class Truth:
    """The float64 answer to a problem, the entries of it that count, and the float32 reference's errors.

    An entry counts where the truth fits float32 and the float32 reference, with all that it computes on the way, is
    finite; a tensor counts where an entry does.
    """

    def __init__(self, it: Input, p: Problem) -> None:
        self.wanted = run(p.to(torch.float64), it, "reference")
        loop = run(p, it, "reference")
        self.counts = [
            y.isfinite() & (y.abs() <= LARGEST) & x.isfinite() for x, y in zip(loop, self.wanted, strict=True)
        ]
        self.reference = self.errors(loop)

    def errors(self, got: Answer) -> list[float | None]:
        """Relative L2 of the entries that count, inf where one is not finite, None where there are none."""
        return [_error(x, y, counts) for x, y, counts in zip(got, self.wanted, self.counts, strict=True)]


def _error(got: Tensor, wanted: Tensor, counts: Tensor) -> float | None:
    if not counts.any():
        return None
    x, y = got[counts].double(), wanted[counts]
    difference, size = (x - y).norm().item(), y.norm().item()
    error = difference / size if size > 0 else difference
    return error if math.isfinite(error) else math.inf


def sweep(backends: list[Backend], inputs: list[Input], counts: Counts, batch: int = 200) -> Iterator[Finding]:
    """What is above the floor; a ratio above MOST_RATIO is that of `judge_again`."""
    for start in range(0, len(inputs), batch):
        some = inputs[start : start + batch]
        problems = [it.problem() for it in some]
        truths = [Truth(it, p) for it, p in zip(some, problems, strict=True)]
        counts.inputs += len(some)
        for backend in backends:
            answers = backend.answers(some, problems)
            for it, p, truth, named in zip(some, problems, truths, answers, strict=True):
                found = [finding for name, got in named.items() for finding in _look(name, it, truth, got, counts)]
                doubtful = any(finding.ratio > MOST_RATIO for finding in found)
                yield from judge_again(backend, it, p, found, counts) if doubtful else found


def _look(backend: str, it: Input, truth: Truth, got: Answer, counts: Counts) -> Iterator[Finding]:
    for name, ours, loop, mask in zip(NAMES, truth.errors(got), truth.reference, truth.counts, strict=True):
        counts.empty += ours is None
        counts.partly += ours is not None and not bool(mask.all())
        if ours is None:
            continue
        counts.compared += 1
        if ours > FLOOR:
            counts.above += 1
            yield Finding(backend, it, name, ours, loop, ours / loop if loop > 0 else math.inf)


def judge_again(backend: Backend, it: Input, p: Problem, found: list[Finding], counts: Counts) -> Iterator[Finding]:
    """The findings with the medians over the input and its neighbours: a single error can be small by luck, or large where
    a row lies at a kink; near it all inputs are equally hard."""
    counts.judged_again += 1
    problems = [p, *(neighbour(p, seed) for seed in range(NEIGHBOURS))]
    truths = [Truth(it, q) for q in problems]
    answers = backend.answers([it] * len(problems), problems)
    for finding in found:
        at = NAMES.index(finding.name)
        ours = [truth.errors(named[finding.backend])[at] for truth, named in zip(truths, answers, strict=True)]
        ours, loop = (_median(errors) for errors in (ours, [truth.reference[at] for truth in truths]))
        yield finding._replace(error=ours, reference=loop, ratio=ours / loop if loop > 0 else math.inf)


def neighbour(p: Problem, seed: int) -> Problem:
    """The problem with every entry of z, u, w and b moved by a few units of the last bits."""
    g = torch.Generator().manual_seed(seed)
    moved = (t * (1 + DISTANCE * torch.randn(t.shape, generator=g, dtype=torch.float64)) for t in p.inputs)
    return p._replace(**{name: t.float() for name, t in zip("zuwb", moved, strict=True)})


def _median(errors: list[float | None]) -> float:
    return statistics.median(error for error in errors if error is not None)
