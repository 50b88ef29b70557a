"""Prepares, checks and times blocks of calls. bench_*.py choose what runs, conftest.py the order."""

import contextlib
import math
import resource
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.flow import ceilings, gpu_clock
from benchmarks.flow.cases import Case
from benchmarks.flow.contestants import Contestant, Prepared, Unavailable
from vvae_fast import reference
from vvae_fast.spec import FlowSpec

COPY = "copy"  # the contestant that clones z
TOLERANCES = {"float32": 1e-4, "float64": 1e-11}
ORACLE_ROWS = 1024  # rows at a time in the oracle, because its float64 loop saves every step


class Refused(Exception):
    """The contestant is not timed in this case; the message is the status of its row."""


@dataclass(frozen=True)
class Block:
    """Calls of one contestant that are timed together, in one round of one pass of a group (a case)."""

    group: object
    pass_: str
    contestant: str
    round: int

    def __str__(self) -> str:
        return f"{self.group}-{self.pass_}-{self.contestant}-{self.round}".replace(" ", "_")


@dataclass
class Timing:
    """The times of all rounds of one contestant in one pass of a case, in seconds."""

    rounds: list[list[float]] = field(default_factory=list)  # device events on a GPU, else the clock
    host_rounds: list[list[float]] = field(default_factory=list)  # the clock; on a GPU over blocks of calls in a row
    page_faults: list[float] = field(default_factory=list)  # per call; not counted on a GPU
    status: str = "ok"


@dataclass
class Run:
    """Everything that one session measured."""

    device: torch.device
    timings: dict[tuple[object, str, str], Timing] = field(default_factory=lambda: defaultdict(Timing))
    compile_seconds: dict[tuple[object, str], float] = field(default_factory=dict)
    unit_rates: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  # flops/s, by dtype
    copy_bytes: dict[object, int] = field(default_factory=dict)  # read and written by a call of COPY
    memory: dict[tuple[object, str], dict[str, int | None]] = field(default_factory=dict)
    calls: dict[tuple[object, str, str], int] = field(default_factory=dict)  # of a block

    @property
    def rates(self) -> dict[str, float]:
        """flops/s of the best matrix product of each dtype."""
        return {dtype: max(rates.values()) for dtype, rates in self.unit_rates.items()}

    def time_block(
        self,
        block: Block,
        call: Callable,
        benchmark,
        setup: Callable | None,
        seconds: float,
        wall_only: bool = False,  # no device events on a GPU
    ) -> None:
        """Two unrecorded calls, then recorded ones for about `seconds`, 3 to 200 of them."""
        key = (block.group, block.pass_, block.contestant)
        timing = self.timings[key]
        if self.device.type == "cuda":
            self._time_on_gpu(key, call, setup, seconds, wall_only)
            return
        if key not in self.calls:
            call_seconds = min(seconds_of(call, setup) for _ in range(2))  # the first may initialise
            self.calls[key] = calls_of_block(seconds, call_seconds)
        count = self.calls[key]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        benchmark.pedantic(call, setup=setup, rounds=count, warmup_rounds=2)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        host = list(benchmark.stats.stats.data)
        timing.host_rounds.append(host)
        timing.rounds.append(host)
        timing.page_faults.append(faults / (count + 2))

    def _time_on_gpu(self, key, call: Callable, setup: Callable | None, seconds: float, wall_only: bool) -> None:
        """Clock and device events in separate blocks: else the clock's time would contain waiting for events."""
        timing = self.timings[key]
        if key not in self.calls:
            gpu_clock.wall_seconds(call, setup, 2)
            self.calls[key] = calls_of_block(seconds, gpu_clock.wall_seconds(call, setup, 3))
        count = self.calls[key]
        host = [gpu_clock.wall_seconds(call, setup, max(1, count // 3)) for _ in range(3)]
        timing.host_rounds.append(host)
        timing.rounds.append(host if wall_only else gpu_clock.device_seconds(call, setup, seconds, min(host)))

    def refuse(self, block: Block, status: str) -> None:
        """Sets the status in the row of this contestant."""
        self.timings[block.group, block.pass_, block.contestant].status = status

    def measure_rate(self, dtype: str) -> None:
        """Keeps the best matrix-product rate of the session."""
        kept = self.unit_rates[dtype]
        for unit, rate in ceilings.matrix_product_rates(getattr(torch, dtype), self.device).items():
            kept[unit] = max(rate, kept.get(unit, 0.0))


def settle_allocator() -> None:
    """Brings glibc's malloc to the state of a long-running process, whatever case comes first.

    Its thresholds for returning memory to the system grow with the largest block freed so far, up to 32 MB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def calls_of_block(seconds: float, call_seconds: float) -> int:
    """The number of calls in about `seconds`, from 3 to 200."""
    return int(min(200, max(3, seconds / call_seconds)))


def seconds_of(call: Callable, setup: Callable | None = None) -> float:
    """Seconds of one call, after its setup."""
    start = time.perf_counter()
    call(*(setup()[0] if setup else ()))
    return time.perf_counter() - start


class Stage:
    """One case on one device: its inputs, the oracle's answers, and the contestants that agreed with them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.inputs = make_inputs(case, device)
        self.grads = make_gradients(case, device)
        self.copy_source = ceilings.copy_source(self.inputs[0])
        self.compile_seconds: dict[str, float] = {}
        self._answers: dict[str, tuple[Tensor, ...]] = {}
        self._prepared: dict[str, Prepared | Refused] = {}

    def prepared(self, contestant: Contestant, seconds: float = math.inf) -> Prepared:
        """The contestant, built and checked once. Raises Refused if it is missing, fails, gives another answer or takes
        longer than `seconds`."""
        if contestant.name not in self._prepared:
            try:
                with time_limit(seconds):
                    self._prepared[contestant.name] = self._prepare(contestant)
            except Refused as refusal:
                self._prepared[contestant.name] = refusal
        prepared = self._prepared[contestant.name]
        if isinstance(prepared, Refused):
            raise prepared
        return prepared

    def _prepare(self, contestant: Contestant) -> Prepared:
        with failures_refused():
            prepared = contestant.build([t.detach().requires_grad_() for t in self.inputs])
            start = time.perf_counter()
            got = self.answer(prepared)
            if contestant.compiled:  # it compiles at its first call
                seconds = time.perf_counter() - start
                self.compile_seconds[contestant.name] = seconds - seconds_of(lambda: self.answer(prepared))
            if contestant.role != "no-op":  # the no-op has no answer to check
                self._check(contestant, got)
        return prepared

    def answer(self, prepared: Prepared) -> tuple[Tensor, ...]:
        """z_K, log_det, dz, du, dw, db."""
        outputs = prepared.forward()
        grads = torch.autograd.grad(outputs, prepared.leaves, self.grads)
        return *(t.detach() for t in outputs), *prepared.gradients(grads)

    def _check(self, contestant: Contestant, got: tuple[Tensor, ...]) -> None:
        tolerance = contestant.tolerance or TOLERANCES[self.case.dtype]
        slack = contestant.log_det_slack * self.case.num_steps * math.sqrt(self.case.rows)
        names = ("z_K", "log_det", "dz", "du", "dw", "db")
        for name, x, y in zip(names, got, self._oracle(contestant.constraint), strict=True):
            if x.shape != y.shape:
                raise Refused(f"wrong: {name} has shape {tuple(x.shape)}, not {tuple(y.shape)}")
            error = (x.double() - y).norm().item() - (slack if name == "log_det" else 0)
            if not error <= tolerance * y.norm().item():  # true for NaN too
                raise Refused(f"wrong: {name} is off by {error / y.norm().item():.1e} of its norm")

    def _oracle(self, constraint: str) -> tuple[Tensor, ...]:
        """The float64 reference's z_K, log_det and hand-written adjoint, some rows at a time."""
        if constraint not in self._answers:
            self._answers[constraint] = oracle(self.inputs, self.grads, constraint)
        return self._answers[constraint]

    def calls(self, prepared: Prepared, pass_: str) -> tuple[Callable, Callable | None]:
        """The timed call of a pass, and the untimed setup before each call. Outputs are freed in the call."""
        leaves, grads, forward = prepared.leaves, self.grads, prepared.forward

        def run_forward() -> None:
            forward()

        def run_backward(outputs: tuple[Tensor, Tensor]) -> None:
            torch.autograd.grad(outputs, leaves, grads)

        def run_both() -> None:
            torch.autograd.grad(forward(), leaves, grads)

        def before_backward() -> tuple[tuple, dict]:
            return (forward(),), {}

        if pass_ == "backward":
            return run_backward, before_backward
        return (run_forward if pass_ == "forward" else run_both), None

    def copy_calls(self) -> tuple[Callable, None]:
        """The copy ceiling: z into new memory, freed in the call like the contestants' outputs."""

        def run() -> None:
            self.copy_source.clone()

        return run, None


class TimeUp(BaseException):
    """The time is up. It is not an Exception, because torch.compile replaces those by others."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp if the main thread takes longer inside the block."""
    if seconds == math.inf:
        yield
        return

    def interrupt(*_) -> None:
        raise TimeUp

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)  # repeated, because a destructor swallows the error
    try:
        yield
    except TimeUp:
        raise Refused(f"not run: not ready after {max(seconds, 0):.0f} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def failures_refused():
    """Turns every error of a contestant into Refused with a one-line status."""
    try:
        yield
    except Refused:
        raise
    except Unavailable as reason:
        raise Refused(str(reason)) from reason
    except Exception as error:  # contestants are foreign code: the row says what happened
        message = (str(error).splitlines() or [""])[0][:200]
        raise Refused(f"failed: {type(error).__name__}: {message}") from error


def make_inputs(case: Case, device: torch.device | str = "cpu") -> list[Tensor]:
    """z [B, D], u, w [*B, K, D], b [*B, K]; w.u is so small that |det| > 0.5 even without a constraint."""
    g = torch.Generator().manual_seed(0)
    sets = (case.rows,) if case.amortized else ()
    shapes = [(case.rows, case.dim), *2 * [(*sets, case.num_steps, case.dim)], (*sets, case.num_steps)]
    scales = [1.0, 0.1, case.dim**-0.5, 0.5]
    dtype = getattr(torch, case.dtype)
    return [(s * torch.randn(n, generator=g)).to(device, dtype) for s, n in zip(scales, shapes, strict=True)]


def make_gradients(case: Case, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """dL/dz_K [B, D] and dL/dlog_det [B]."""
    g = torch.Generator().manual_seed(1)
    dtype = getattr(torch, case.dtype)
    return tuple(torch.randn(n, generator=g).to(device, dtype) for n in ((case.rows, case.dim), (case.rows,)))


def oracle(inputs: list[Tensor], grads: tuple[Tensor, Tensor], constraint: str) -> tuple[Tensor, ...]:
    """z_K, log_det, dz, du, dw, db in float64."""
    z, u, w, b = (t.double() for t in inputs)
    spec, amortized, parts = FlowSpec(constraint), u.dim() > 2, []
    with torch.no_grad():
        for rows in torch.arange(len(z), device=z.device).split(ORACLE_ROWS):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            at = (z[rows], *(t[rows] if amortized else t for t in (u, w, b)))
            incoming = (t[rows].double() for t in grads)
            parts.append([*reference.planar_forward(*at, spec)[:2], *reference.planar_backward(*incoming, *at, spec)])
    columns = list(zip(*parts, strict=True))
    return *(torch.cat(c) for c in columns[:3]), *(torch.cat(c) if amortized else sum(c) for c in columns[3:])
