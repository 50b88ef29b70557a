"""Results into tables and plots: benchmarks/results/<machine>/README.md, and the README's section. Run `make report`.

Everything here is a function of the newest full run in each machine's folder: the same files give the same text.
"""

import sys
from pathlib import Path

from benchmarks.flow.cases import PASSES
from benchmarks.report import results
from benchmarks.report.captions import (
    BACKEND_CAPTION,
    compile_times,
    floor_caption,
    memory_caption,
    on_gpu,
    step_caption,
    time_caption,
)
from benchmarks.report.front import with_section
from benchmarks.report.results import Results
from benchmarks.report.tables import (
    backend_table,
    cases,
    floor_table,
    memory_sentence,
    memory_table,
    time_table,
    training_table,
    where_from,
    where_not_fastest,
)

ROOT = results.ROOT


def refusals(run: Results) -> str:
    """Which contestants were not timed, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in run.rows:
        if row.status != "ok":
            reasons.setdefault((row.contestant, row.status), []).append(row.case)
    lines = [f"- {name}, {status}: {', '.join(dict.fromkeys(at))}" for (name, status), at in reasons.items()]
    return "Not timed:\n\n" + "\n".join(lines) if lines else ""


def summary(run: Results) -> str:
    """What the session prints at its end."""
    parts = [where_from(run), time_caption(run)]
    parts += [f"{pass_}\n{time_table(run, pass_, cases(run, pass_))}" for pass_ in PASSES if cases(run, pass_)]
    parts += [training_table(run), memory_table(run) if cases(run, "memory") else "", compile_times(run)]
    return "\n\n".join(filter(None, [*parts, where_not_fastest(run), refusals(run), f"{run.header['seconds']} s"]))


def machine_page(run: Results) -> str:
    """benchmarks/results/<machine>/README.md."""
    versions = ", ".join(f"{name} {version}" for name, version in run.header["versions"].items())
    rates = run.header["matrix_product_flops_per_second"]
    if on_gpu(run):
        rates = {unit: rate for units in run.header["matrix_product_units"].values() for unit, rate in units.items()}
    rate = ", ".join(f"{x / 1e9:,.0f} Gflop/s ({dtype})" for dtype, x in rates.items())
    copied = run.header.get("copy_bytes_per_second")
    copy = f" Copy: {copied / 1e12:.2f} TB/s, read and written." if copied else ""
    parts = [
        f"# {run.header['machine']}",
        f"Written by `make report`. {where_from(run)}; {versions}. Best matrix product: {rate}.{copy}",
    ]
    for pass_ in PASSES:
        if cases(run, pass_):
            parts += [f"## {pass_.capitalize()}", time_caption(run), time_table(run, pass_, cases(run, pass_))]
    if floor_table(run):
        parts += ["## Over the floor", floor_caption(run), floor_table(run)]
    if backend_table(run):
        parts += ["## Backends", BACKEND_CAPTION, backend_table(run)]
    parts += [compile_times(run), where_not_fastest(run), refusals(run)]
    parts += ["![Time against K and against B](time.svg)", "![Distance to the floor, memory](floor-and-memory.svg)"]
    parts += [
        "## VAE step",
        step_caption(run),
        training_table(run),
        "## Memory",
        memory_sentence(run),
        memory_caption(run),
        memory_table(run),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def main(folder: Path = results.FOLDER, readme: Path = ROOT / "README.md") -> int:
    """Rewrites the machines' pages and plots and the README's section from the newest full results."""
    from benchmarks.report import plots  # the tables need no matplotlib

    try:
        runs = {machine: results.read(path) for machine, path in results.newest(folder=folder).items()}
    except results.Unreadable as error:
        print(error, file=sys.stderr)
        return 1
    if not runs:
        print(f"no full results under {folder}: run `make bench` first", file=sys.stderr)
        return 1
    pages = {machine: machine_page(run) for machine, run in runs.items()}
    section = with_section(readme.read_text(), runs)
    for machine, run in runs.items():
        (folder / machine / "README.md").write_text(pages[machine])
        plots.write(run, folder / machine)
        print(f"written: {folder.name}/{machine}/README.md, time.svg, floor-and-memory.svg")
    readme.write_text(section)
    print(f"written: {readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
