"""The bars that a GPU run must meet, and the short table that `make gpu` ends with."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from benchmarks.flow.contestants import GRAPH
from benchmarks.flow.loops import PLAIN, REFERENCE
from benchmarks.report.results import Results, Row
from benchmarks.report.tables import OURS, cases, duration, pick, ratio, size, speedup, title, where_from

FB = "forward+backward"


@dataclass(frozen=True)
class Bar:
    """A lower or upper bound on a number of a run. `measured` finds the number, or None if the run does not have it."""

    text: str
    bound: float
    measured: Callable[[Results], float | None]
    at_most: bool = False

    def verdict(self, run: Results) -> str:
        value = self.measured(run)
        if value is None:
            return f"{self.text}: not measured"
        met = value <= self.bound if self.at_most else value >= self.bound
        return f"{self.text}: {'met' if met else 'not met'}, {value:.2f}"


def _times_faster(case: str, peer: str, ours: str) -> Callable[[Results], float | None]:
    """How many times as long the peer takes for a forward and backward, by the clock: the rounds' median."""

    def measured(run: Results) -> float | None:
        found = pick(run, FB, case)
        rounds = [found[name].wall_rounds if name in found else [] for name in (peer, ours)]
        return median(x / y for x, y in zip(*rounds, strict=False)) if all(rounds) else None

    return measured


def _of_the_floor(case: str, pass_: str, ours: str) -> Callable[[Results], float | None]:
    """The floor over the time on the device. If memory sets the floor, that is the fraction of the copy's bandwidth."""

    def measured(run: Results) -> float | None:
        mine = pick(run, pass_, case).get(ours)
        return 1 / mine.to_floor if mine and mine.to_floor else None

    return measured


def _device_us(case: str, pass_: str, ours: str) -> Callable[[Results], float | None]:
    def measured(run: Results) -> float | None:
        mine = pick(run, pass_, case).get(ours)
        return 1e6 * mine.median if mine and mine.median else None

    return measured


def _times_faster_in_a_graph(group: str, ours: str) -> Callable[[Results], float | None]:
    """How many times as long a step takes as the same step in one CUDA graph, by the clock: the rounds' median."""

    def measured(run: Results) -> float | None:
        found = pick(run, "step", group)
        rounds = [found[name].wall_rounds if name in found else [] for name in (ours, f"{ours}{GRAPH}")]
        return median(x / y for x, y in zip(*rounds, strict=False)) if all(rounds) else None

    return measured


def _step(group: str, ours: str) -> Callable[[Results], float | None]:
    """A step's time over the vanilla step's by the clock, in the same rounds."""

    def measured(run: Results) -> float | None:
        mine = pick(run, "step", group).get(ours)
        return mine.to_base if mine else None

    return measured


LONG, MANY, WIDE = "shared-B128-D40-K80", "shared-B65536-D64-K32", "shared-B4096-D512-K64"
TRITON, CUDA = "vvae_fast triton", "vvae_fast cuda"

# Predicted, not measured: on a GPU a loop takes as long as its launches. At LONG the plain loop has a ninth of the
# reference's launches (test_loops.py counts them): 6 and 11 times the plain loop are 50 and 100 times the reference.
BARS = (
    Bar("128 x 40, K = 80, triton, times the plain loop, 6 wanted", 6, _times_faster(LONG, PLAIN, TRITON)),
    Bar("128 x 40, K = 80, triton, times the reference, 50 wanted", 50, _times_faster(LONG, REFERENCE, TRITON)),
    Bar("128 x 40, K = 80, triton, times torch.compile, 3 wanted", 3, _times_faster(LONG, "torch.compile", TRITON)),
    Bar("65,536 x 64, K = 32, triton, forward, floor / time, 0.5 wanted", 0.5, _of_the_floor(MANY, "forward", TRITON)),
    Bar(
        "65,536 x 64, K = 32, triton, backward, floor / time, 0.33 wanted",
        1 / 3,
        _of_the_floor(MANY, "backward", TRITON),
    ),
    Bar(
        "4,096 x 40, K = 16, amortized, triton, forward, part of the copy's bandwidth, 0.6 wanted",
        0.6,
        _of_the_floor("amortized-B4096-D40-K16", "forward", TRITON),
    ),
    Bar(
        "128 x 40, K = 80, cuda, forward on the device, us, at most 12 wanted",
        12,
        _device_us(LONG, "forward", CUDA),
        at_most=True,
    ),
    Bar("128 x 40, K = 80, cuda, times the Triton backend, 1.3 wanted", 1.3, _times_faster(LONG, TRITON, CUDA)),
    Bar("128 x 40, K = 80, cuda, times the plain loop, 11 wanted", 11, _times_faster(LONG, PLAIN, CUDA)),
    Bar("128 x 40, K = 80, cuda, times the reference, 100 wanted", 100, _times_faster(LONG, REFERENCE, CUDA)),
    Bar("65,536 x 64, K = 32, cuda, forward, floor / time, 0.67 wanted", 1 / 1.5, _of_the_floor(MANY, "forward", CUDA)),
    Bar("65,536 x 64, K = 32, cuda, backward, floor / time, 0.5 wanted", 0.5, _of_the_floor(MANY, "backward", CUDA)),
    Bar("4,096 x 512, K = 64, cuda, times its direct form, 2 wanted", 2, _times_faster(WIDE, f"{CUDA} direct", CUDA)),
    *(
        Bar(
            f"{optimizer} step, B = 512, K = 80, cuda, over the vanilla step, at most 1.10 wanted",
            1.10,
            _step(f"VAE-step-{optimizer}-B512", f"{CUDA} K=80"),
            at_most=True,
        )
        for optimizer in ("Adam", "fused-Adam")
    ),
    Bar(
        "fused-Adam step, B = 512, K = 80, cuda, times itself in a CUDA graph, 1.5 wanted",
        1.5,
        _times_faster_in_a_graph("VAE-step-fused-Adam-B512", f"{CUDA} K=80"),
    ),
)


def table(run: Results) -> str:
    """For each case, forward and backward together by the clock, in parentheses how many times as fast as the plain
    loop, and each alone on the device over its floor; then steps, memory, bars."""
    ours = [name for name in (CUDA, TRITON) if any(row.contestant == name and row.median for row in run.rows)]
    short = [name.removeprefix("vvae_fast ") for name in ours]
    columns = ["forward + backward, clock", *short, "plain", "reference", "compile"]
    columns += [f"{pass_}, {name}" for pass_ in ("device: forward", "backward") for name in short]
    lines = [columns, *(_line(run, case, ours) for case in cases(run, FB))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    by_dtype = run.header.get("matrix_product_units", {}).values()
    units = {unit: rate for rates in by_dtype for unit, rate in rates.items()}
    ceilings = [f"{rate / 1e12:.1f} Tflop/s {unit}" for unit, rate in units.items()]
    if copied := run.header.get("copy_bytes_per_second"):
        ceilings.insert(0, f"copy {copied / 1e12:.2f} TB/s")
    steps = [_steps(run, group) for group in cases(run, "step")]
    memory = [_memory(run, case) for case in cases(run, "memory")]
    bars = [bar.verdict(run) for bar in BARS]
    parts = [f"{where_from(run)}, {run.header['kind']}", "; ".join(ceilings), *text, *steps, *memory, *bars]
    return "\n".join(filter(None, parts))


def _line(run: Results, case: str, ours: list[str]) -> list[str]:
    both = pick(run, FB, case)
    peers = [_peer(both.get(name)) for name in (PLAIN, REFERENCE, "torch.compile")]
    alone = [_over_floor(pick(run, pass_, case).get(name)) for pass_ in ("forward", "backward") for name in ours]
    return [title(next(iter(both.values()))), *(_clock(both.get(name)) for name in ours), *peers, *alone]


def _clock(row: Row | None) -> str:
    return f"{duration(row.wall)}{speedup(row)}" if row and row.median else "-"


def _peer(row: Row | None) -> str:
    if row is None:
        return ""
    return _clock(row) if row.median else row.status.split(":")[0]


def _over_floor(row: Row | None) -> str:
    return f"{duration(row.median)} ({ratio(row.to_floor)})" if row and row.median else "-"


def _steps(run: Results, group: str) -> str:
    """One optimizer's VAE steps, as ratios to the vanilla step."""
    rows = pick(run, "step", group)
    shown = [f"{name} {ratio(row.to_base)}" for name, row in rows.items() if row.median and name != OURS]
    return f"{group}: " + ", ".join(shown)


def _memory(run: Results, case: str) -> str:
    mine, loop = (pick(run, "memory", case).get(name) for name in (OURS, PLAIN))
    saved, peak = (
        [size(getattr(row, field)) if row else "-" for row in (mine, loop)] for field in ("saved_bytes", "peak_bytes")
    )
    return f"memory {case}: saved {saved[0]} ({PLAIN} {saved[1]}), peak {peak[0]} ({PLAIN} {peak[1]})"
