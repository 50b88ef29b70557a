"""The README's numbers: its promise, and its section of tables."""

import re

from benchmarks.flow.loops import PLAIN, REFERENCE
from benchmarks.report import tables
from benchmarks.report.captions import NO_GPU, SHORT_STEP_CAPTION, on_gpu
from benchmarks.report.results import Results, Row
from benchmarks.report.tables import OURS, duration, pick, ratio, table, title, where_from, where_not_fastest

START, END = "<!-- bench -->\n", "<!-- /bench -->"
PROMISE_START, PROMISE_END = "<!-- promise -->\n", "<!-- /promise -->"
TORCH_COMPILE = "torch.compile"
PEERS = tuple(name for name in tables.PEERS if name != REFERENCE)
HEADLINE = ("shared-B100-D2-K8", "shared-B128-D40-K80", "shared-B4096-D64-K32", "amortized-B1000-D40-K16")
STEP = "VAE-step-fused-Adam"
FLOWS = ("K=80", "amortized K=16", "amortized K=16 rank 32", "amortized K=80 rank 32")


def speed_table(run: Results) -> str:
    """A line for each case: our time forward and backward, and how many times as long each peer takes."""
    timed = [found for case in HEADLINE if OURS in (found := pick(run, "forward+backward", case))]
    peers = [name for name in PEERS if any(name in found for found in timed)]
    lines = []
    for found in timed:
        mine = found[OURS]
        lines.append([title(mine), duration(mine.wall), *(_times(found.get(name), mine) for name in peers)])
    return table(["B x D, K", OURS, *peers], lines)


def _times(peer: Row | None, mine: Row) -> str:
    """Of the ratios to the base in the same rounds; the base itself has none."""
    if peer is None or not mine.to_base:
        return ""
    if peer.median is None:
        return "-"
    return ratio((peer.to_base or 1.0) / mine.to_base)


def steps(run: Results, flow: str) -> list[Row | None]:
    """A VAE's step with this flow: by our fastest backend, by the plain loop, by the compiled one."""
    found = pick(run, "step", STEP)
    ours = [row for name, row in found.items() if re.fullmatch(rf"{OURS} \w+ {flow}", name) and row.to_base]
    fastest = min(ours, key=lambda row: row.to_base or 0, default=None)
    return [fastest, *(found.get(f"{name} {flow}") for name in (PLAIN, TORCH_COMPILE))]


def step_table(run: Results) -> str:
    """A line for each flow: a VAE's step as a ratio to the vanilla one."""
    lines = [[flow.replace("=", " = "), *(ratio(row and row.to_base) for row in steps(run, flow))] for flow in FLOWS]
    return table(["flow", OURS, PLAIN, TORCH_COMPILE], lines)


def promise(run: Results) -> str:
    """The README's first number, or "" if the run has none."""
    ours, loop, _ = steps(run, FLOWS[0])
    if ours is None or loop is None or loop.to_base is None:
        return ""
    num_steps = FLOWS[0].removeprefix("K=")
    return (
        f"{num_steps} steps with shared parameters lengthen a VAE's training step by {ours.to_base - 1:.0%}; as a "
        f"Python loop, {loop.to_base - 1:.0%}.\n"
    )


def readme_section(run: Results, machine: str) -> str:
    """The text between the README's markers, for one machine."""
    folder = f"benchmarks/results/{machine}"
    parts = [
        f"{where_from(run)}. Forward and backward, float32, and how many times as long the others take:",
        speed_table(run),
        where_not_fastest(run),
    ]
    if any(row for flow in FLOWS for row in steps(run, flow)):
        parts += [SHORT_STEP_CAPTION, step_table(run)]
    parts.append(f"All cases, floors, memory and plots: [{folder}]({folder}/README.md).")
    return "\n\n".join(filter(None, parts)) + "\n"


def with_section(readme: str, runs: dict[str, Results]) -> str:
    """The README with its section written from the newest run of each machine, and its promise from a CPU's."""
    parts = [readme_section(run, machine) for machine, run in runs.items()]
    if not any(on_gpu(run) for run in runs.values()):
        parts.append(f"{NO_GPU}\n")
    readme = between(START, END, "\n".join(parts), readme)
    promises = [text for run in runs.values() if not on_gpu(run) and (text := promise(run))]
    return between(PROMISE_START, PROMISE_END, promises[0], readme) if promises else readme


def between(start: str, end: str, text: str, page: str) -> str:
    """The page with the text put between two markers."""
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}{text}{end}", page, flags=re.S)
