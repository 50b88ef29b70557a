"""What a GPU run is held to, and the one short table of it that `make gpu` ends with."""

from collections.abc import Callable
from dataclasses import dataclass

from report import OURS, cases, duration, pick, ratio, size, title, where_from
from results import Results, Row

FB = "forward+backward"


@dataclass(frozen=True)
class Bar:
    """At least `least` is wanted of what `measured` finds in a run; None where the run does not have it."""

    text: str
    least: float
    measured: Callable[[Results], float | None]

    def verdict(self, run: Results) -> str:
        value = self.measured(run)
        if value is None:
            return f"{self.text}: not measured"
        return f"{self.text}: {'met' if value >= self.least else 'not met'}, {value:.2f}"


def _times_faster(case: str, peer: str) -> Callable[[Results], float | None]:
    """How many times longer the peer takes for a forward and backward, by the clock, in the same rounds."""

    def measured(run: Results) -> float | None:
        found = pick(run, FB, case)
        return found[peer].to_base if OURS in found and found[OURS].median and peer in found else None

    return measured


def _of_the_floor(case: str, pass_: str) -> Callable[[Results], float | None]:
    """The floor over the time on the device; where memory makes the floor, the part of the copy's bandwidth."""

    def measured(run: Results) -> float | None:
        mine = pick(run, pass_, case).get(OURS)
        return 1 / mine.to_floor if mine and mine.to_floor else None

    return measured


BARS = (
    Bar("128 x 40, K = 80, times the eager loop, 50 wanted", 50, _times_faster("shared-B128-D40-K80", "eager loop")),
    Bar("128 x 40, K = 80, times torch.compile, 3 wanted", 3, _times_faster("shared-B128-D40-K80", "torch.compile")),
    Bar(
        "65,536 x 64, K = 32, forward, floor / time, 0.5 wanted", 0.5, _of_the_floor("shared-B65536-D64-K32", "forward")
    ),
    Bar(
        "65,536 x 64, K = 32, backward, floor / time, 0.33 wanted",
        1 / 3,
        _of_the_floor("shared-B65536-D64-K32", "backward"),
    ),
    Bar(
        "4,096 x 40, K = 16, amortized, forward, part of the copy's bandwidth, 0.6 wanted",
        0.6,
        _of_the_floor("amortized-B4096-D40-K16", "forward"),
    ),
)


def table(run: Results) -> str:
    """Forward and backward together by the clock, each alone on the device over its floor; steps, memory, bars."""
    columns = ["forward + backward, clock", "vvae_fast", "eager", "compile", "device: forward", "backward"]
    lines = [columns, *(_line(run, case) for case in cases(run, FB))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    by_dtype = run.header.get("matrix_product_units", {}).values()
    units = {unit: rate for rates in by_dtype for unit, rate in rates.items()}
    ceilings = [f"{rate / 1e12:.1f} Tflop/s {unit}" for unit, rate in units.items()]
    if copied := run.header.get("copy_bytes_per_second"):
        ceilings.insert(0, f"copy {copied / 1e12:.2f} TB/s")
    steps = [_step(run, group) for group in cases(run, "step")]
    memory = [_memory(run, case) for case in cases(run, "memory")]
    bars = [bar.verdict(run) for bar in BARS]
    parts = [f"{where_from(run)}, {run.header['kind']}", "; ".join(ceilings), *text, *steps, *memory, *bars]
    return "\n".join(filter(None, parts))


def _line(run: Results, case: str) -> list[str]:
    both = pick(run, FB, case)
    peers = [_peer(both.get(name)) for name in ("eager loop", "torch.compile")]
    alone = [_over_floor(pick(run, pass_, case).get(OURS)) for pass_ in ("forward", "backward")]
    mine = both.get(OURS)
    return [title(next(iter(both.values()))), duration(mine.wall) if mine and mine.median else "-", *peers, *alone]


def _peer(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{duration(row.wall)} ({ratio(row.to_base)})" if row.median else row.status.split(":")[0]


def _over_floor(row: Row | None) -> str:
    return f"{duration(row.median)} ({ratio(row.to_floor)})" if row and row.median else "-"


def _step(run: Results, group: str) -> str:
    """One optimizer's VAE steps, as ratios to the vanilla one."""
    rows = pick(run, "step", group)
    shown = [f"{name} {ratio(row.to_base)}" for name, row in rows.items() if row.median and name != OURS]
    return f"{group}: " + ", ".join(shown)


def _memory(run: Results, case: str) -> str:
    mine, eager = (pick(run, "memory", case).get(name) for name in (OURS, "eager loop"))
    saved, peak = (
        [size(getattr(row, field)) if row else "-" for row in (mine, eager)] for field in ("saved_bytes", "peak_bytes")
    )
    return f"memory {case}: saved {saved[0]} (eager {saved[1]}), peak {peak[0]} (eager {peak[1]})"
