"""The errors of the float32 kernels and of the float32 reference on the sweep's inputs, both against the reference in
float64 with autograd's gradients. accuracy.py makes a table of them."""

import contextlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from unittest import mock

import torch
from problems import NAMES, Problem, on_each_isa
from torch import Tensor

import vvae_fast
from benchmarks.accuracy.sweep_inputs import Input
from vvae_fast.backends import cuda
from vvae_fast.functional import packed_planar_flow
from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics

Answer = tuple[Tensor, ...]  # the tensors of NAMES

MOST_RATIO = 10.0  # of an error to the reference's, if the error is above
FLOOR = 2e-6
NEIGHBOURS = 8
DISTANCE = 2.0**-18  # of a neighbour, relative: close enough to be as hard, far enough for all roundings to differ
LARGEST = 2.0**-13 * torch.finfo(torch.float32).max  # larger entries do not count: intermediate sums need room above
HALF_A_PLACE = 2.0**-25  # the relative change when the inputs are rounded to float32
LEAST_GRADIENT = 1e-8  # relative to the incoming gradients; smaller ones do not count
LOST = 0.1  # if the reference's error is larger, no backend is judged


class Backend(Protocol):
    """A judged backend: it returns several answers to a problem, by name, each the six tensors of NAMES."""

    def answers(self, inputs: list[Input], problems: list[Problem]) -> list[dict[str, Answer]]: ...


class Finding(NamedTuple):
    """An error above the floor."""

    backend: str
    input: Input
    name: str  # of the output or gradient
    error: float
    reference: float

    @property
    def ratio(self) -> float:
        return self.error / self.reference if self.reference > 0 else math.inf

    def is_breach(self) -> bool:
        return self.ratio > MOST_RATIO and self.error > FLOOR


@dataclass
class Counts:
    """Counts of inputs, and of outputs and gradients, summed over the answers of a backend."""

    inputs: int = 0
    judged_again: int = 0  # together with their neighbours
    compared: int = 0
    above: int = 0  # above the floor
    partly: int = 0  # compared without some entries
    left_out: int = 0  # without any entry that counts
    lost: int = 0  # the reference has no digit right


def run(p: Problem, it: Input, backend: str) -> Answer:
    """z, log_det, dz, du, dw, db from the package."""
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
    """A backend of the package: the C++ backend on each instruction set of this machine, the GPU backends also in the
    compact form where it is possible."""

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
            with mock.patch.object(_heuristics, "is_compact", return_value=True):
                yield
        else:
            cuda.set_form("compact")
            yield
            cuda.set_form("automatic")


class CudaOnHost:
    """The CUDA kernels on the host, as tests/cuda/cuda_host.py runs them without a GPU."""

    def __init__(self) -> None:
        import cuda_host

        self.host, self.program = cuda_host, cuda_host.build("plain")

    def answers(self, inputs: list[Input], problems: list[Problem]) -> list[dict[str, Answer]]:
        cases, names = [], []
        for i, (it, p) in enumerate(zip(inputs, problems, strict=True)):
            case = self.host.Case(p, FlowSpec(**it.formulas), packed=it.kind == "packed", inverse=it.inverse)
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
    """cpp, triton or cuda, on a GPU if there is one."""
    return CudaOnHost() if name == "cuda" and not torch.cuda.is_available() else Package(name)


class Truth:
    """The float64 answer to a problem, which entries count, and the float32 reference's errors.

    An entry counts if the truth fits float32 and the float32 reference, with all its intermediate values, is finite. A
    gradient does not count if it is so small, relative to the incoming ones, that autograd's own 1 - h^2, in a
    saturated tanh, rounds its digits away in float64.
    """

    def __init__(self, it: Input, p: Problem) -> None:
        self.wanted, loop = run(p.to(torch.float64), it, "reference"), run(p, it, "reference")
        least = LEAST_GRADIENT * math.hypot(p.grad_z.norm(), p.grad_log_det.norm())
        self.counts = []
        for name, x, y in zip(NAMES, loop, self.wanted, strict=True):
            counts = y.isfinite() & (y.abs() <= LARGEST) & x.isfinite()
            is_gradient = name.startswith("d")
            self.counts.append(counts & (not is_gradient or y[counts].norm().item() >= least))
        self.reference = self.errors(loop)

    def errors(self, got: Answer) -> list[float | None]:
        """Relative L2 errors over the entries that count: inf if one is not finite, None if no entry counts."""
        return [_error(x, y, counts) for x, y, counts in zip(got, self.wanted, self.counts, strict=True)]


def _error(got: Tensor, wanted: Tensor, counts: Tensor) -> float | None:
    if not counts.any():
        return None
    x, y = got[counts].double(), wanted[counts]
    difference, size = (x - y).norm().item(), y.norm().item()
    error = difference / size if size > 0 else difference
    return error if math.isfinite(error) else math.inf


def sweep(backends: list[Backend], inputs: list[Input], counts: Counts, batch: int = 200) -> Iterator[Finding]:
    """The errors above the floor. If one would be a breach, the errors of `judge_again` replace it."""
    for start in range(0, len(inputs), batch):
        some = inputs[start : start + batch]
        problems = [it.problem() for it in some]
        truths = [Truth(it, p) for it, p in zip(some, problems, strict=True)]
        counts.inputs += len(some)
        for backend in backends:
            answers = backend.answers(some, problems)
            for it, p, truth, named in zip(some, problems, truths, answers, strict=True):
                found = [finding for name, got in named.items() for finding in _look(name, it, truth, got, counts)]
                doubtful = any(finding.is_breach() for finding in found)
                yield from judge_again(backend, it, p, found, counts) if doubtful else found


def _look(backend: str, it: Input, truth: Truth, got: Answer, counts: Counts) -> Iterator[Finding]:
    for name, ours, loop, mask in zip(NAMES, truth.errors(got), truth.reference, truth.counts, strict=True):
        if ours is None or loop >= LOST:
            counts.left_out += ours is None
            counts.lost += ours is not None
            continue
        counts.compared += 1
        counts.partly += not mask.all().item()
        if ours > FLOOR:
            counts.above += 1
            yield Finding(backend, it, name, ours, loop)


def judge_again(backend: Backend, it: Input, p: Problem, found: list[Finding], counts: Counts) -> Iterator[Finding]:
    """The findings with the lower quartiles of both errors over the input and its neighbours. A single error can be
    small by luck, or large if a row lies at a kink of the activation and falls to the wrong side.

    For the inverse, the image of a flow is harder than its neighbours. There the reference's error counts as at least
    the change in float64 when the input changes by half a last place.
    """
    counts.judged_again += 1
    problems = [p, *(neighbour(p, seed) for seed in range(NEIGHBOURS))]
    truths = [Truth(it, q) for q in problems]
    answers = backend.answers([it] * len(problems), problems)
    moved = [neighbour(p.to(torch.float64), seed, HALF_A_PLACE) for seed in range(3)]
    rounded = [truths[0].errors(run(q, it, "reference")) for q in moved]
    for finding in found:
        at = NAMES.index(finding.name)
        ours = [truth.errors(named[finding.backend])[at] for truth, named in zip(truths, answers, strict=True)]
        loop = _quartile([truth.reference[at] for truth in truths])
        reference = max(loop, statistics.median(errors[at] for errors in rounded)) if it.image else loop
        if reference < LOST:
            yield finding._replace(error=_quartile(ours), reference=reference)
        else:
            counts.lost += 1


def neighbour(p: Problem, seed: int, distance: float = DISTANCE) -> Problem:
    """The problem with every entry of z, u, w and b moved by the relative distance, up or down equally often."""
    g = torch.Generator().manual_seed(seed)
    moved = (t * (1 + distance * torch.randn(t.shape, generator=g, dtype=torch.float64)) for t in p.inputs)
    return p._replace(**{name: t.to(p.z.dtype) for name, t in zip("zuwb", moved, strict=True)})


def _quartile(errors: list[float | None]) -> float:
    """The lower quartile."""
    there = sorted(error for error in errors if error is not None)
    return there[len(there) // 4]
