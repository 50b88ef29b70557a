"""The table of a sweep, and the errors that break its rule."""

from collections import defaultdict

from benchmarks.accuracy.sweep import FLOOR, Counts, Finding


def table(findings: list[Finding]) -> list[str]:
    """The worst ratio of each backend, activation and direction, and which output or gradient has it."""
    worst = defaultdict(dict)
    for f in findings:
        row, column = worst[f.backend, f.input.activation], f.input.direction
        if column not in row or f.ratio > row[column].ratio:
            row[column] = f
    lines = [f"{'backend':16} {'activation':12} {'forward':>18} {'inverse':>18}   worst ratio to the reference"]
    for (backend, activation), row in worst.items():
        cells = (f"{row[c].ratio:.2g} {row[c].name:8}" if c in row else "none above" for c in ("forward", "inverse"))
        lines.append(f"{backend:16} {activation:12} " + " ".join(f"{cell:>18}" for cell in cells))
    return lines


def summary(counts: Counts, seconds: float) -> str:
    parts = [
        f"{counts.inputs} inputs",
        f"{counts.compared} outputs and gradients",
        f"{counts.above} of them above {FLOOR:g}",
        f"{counts.partly} without some entries",
        f"{counts.left_out} left out",
        f"{counts.lost} of which the reference has no digit",
        f"{counts.judged_again} inputs judged again",
        f"{seconds:.0f} s",
    ]
    return ", ".join(parts)


def breaches(findings: list[Finding]) -> list[str]:
    """The smallest input for each kind of breach."""
    kinds = defaultdict(list)
    for f in findings:
        if f.is_breach():
            kinds[f.backend, f.input.activation, f.input.direction, f.name].append(f)
    lines = []
    for found in kinds.values():
        f = min(found, key=lambda f: f.input.size)
        errors = f"{f.name} {f.error:.1e}, reference {f.reference:.1e}"
        lines.append(f"breach, {f.backend}: {errors}, first of {len(found)} inputs: {f.input}")
    return lines
