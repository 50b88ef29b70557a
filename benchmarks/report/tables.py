"""A run's tables and the sentences that are read from its rows, as the pages of report.py and front.py put them."""

from benchmarks.flow.cases import PASSES
from benchmarks.flow.loops import PLAIN, REFERENCE
from benchmarks.report.captions import LEAST_FLOOR, NOISY, on_gpu
from benchmarks.report.results import Results, Row

OURS = "vvae_fast"  # the column of the fastest backend
PEERS = (PLAIN, "torch.compile", REFERENCE, "normflows", "Pyro", "pythae", "flowjax")
FLOOR_CASES = (
    *(f"shared-B{B}-D64-K32" for B in (4096, 16384, 65536, 262144)),
    "amortized-B1000-D40-K16",
)
GPU_FLOOR_CASES = (
    *(f"shared-B{B}-D64-K32" for B in (4096, 65536, 262144)),
    *("shared-B4096-D512-K64", "shared-B4096-D1024-K32", "shared-B4096-D64-K256"),
    *("amortized-B1000-D40-K16", "amortized-B4096-D40-K16"),
)


def table(columns: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, text left and numbers right."""
    rule = "|".join(["---", *["---:"] * (len(columns) - 1)])
    return "\n".join(["| " + " | ".join(columns) + " |", f"|{rule}|", *("| " + " | ".join(x) + " |" for x in lines)])


def duration(seconds: float | None) -> str:
    """Three digits in us or ms."""
    if seconds is None:
        return "-"
    value, unit = (1e6 * seconds, "us") if seconds < 1e-3 else (1e3 * seconds, "ms")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def size(count: int | None) -> str:
    """Bytes in kB or MB."""
    if count is None:
        return "-"
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def ratio(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}x" if x < 9.95 else f"{x:.0f}x"


def pick(run: Results, pass_: str, case: str) -> dict[str, Row]:
    """The rows of one pass of one case, by contestant; the fastest backend also under "vvae_fast"."""
    found = {row.contestant: row for row in run.rows if row.pass_ == pass_ and row.case == case}
    backends = [row for row in found.values() if row.role == "ours"]
    if backends:
        found[OURS] = min(backends, key=lambda row: (row.status != "ok", row.wall or float("inf")))
    return found


def cases(run: Results, pass_: str) -> list[str]:
    return list(dict.fromkeys(row.case for row in run.rows if row.pass_ == pass_))


def title(row: Row) -> str:
    """1,000 x 40, K = 16, amortized."""
    kinds = ["amortized"] * bool(row.amortized) + [row.dtype] * (row.dtype != "float32")
    return ", ".join([f"{row.rows:,} x {row.dim}", f"K = {row.num_steps}", *kinds])


def cell(row: Row | None) -> str:
    """Time, how many times as fast as the plain loop in the same rounds, and ~ if the rounds disagree."""
    if row is None:
        return ""
    if row.median is None:
        return row.status.split(":")[0]
    return f"{duration(row.wall)}{speedup(row)}" + "~" * noisy(row.wall_rounds)


def speedup(row: Row) -> str:
    """How many times as fast as the base; empty for the base itself, and if the base was not timed."""
    return "" if row.to_base is None or row.base == row.contestant else f" ({ratio(1 / row.to_base)})"


def noisy(rounds: list[float]) -> bool:
    return bool(rounds) and max(rounds) > NOISY * min(rounds)


def floor_ratio(row: Row) -> str:
    """Time over the floor, if the floor is more than a function call."""
    return ratio(row.to_floor) if row.floor and row.floor >= LEAST_FLOOR else "-"


def where_from(run: Results) -> str:
    """The machine, versions and commit that printed the numbers."""
    h = run.header
    threads = "" if on_gpu(run) else f", {h['threads']} threads, {h['isa']}"
    dirty = " with uncommitted changes" if h["dirty"] else ""
    return f"{h['machine']}{threads}, torch {h['torch']}, commit {h['commit']}{dirty}, {h['date'][:10]}"


def time_table(run: Results, pass_: str, names: tuple[str, ...] | list[str]) -> str:
    """A line for each case: ours, the no-op, the peers, and our time over the floor."""
    others = ["no-op", *PEERS]
    others = [name for name in others if any(name in pick(run, pass_, case) for case in names)]
    lines = []
    for case in names:
        found = pick(run, pass_, case)
        if OURS in found:
            mine = found[OURS]
            start = [title(mine), cell(mine), *(cell(found.get(name)) for name in others)]
            lines.append([*start, duration(mine.floor), floor_ratio(mine)])
    return table(["B x D, K", OURS, *others, "floor", "vvae_fast / floor"], lines)


def training_table(run: Results) -> str:
    """A line for each flow, a column for each optimizer."""
    groups = cases(run, "step")
    if not groups:
        return ""
    lines = []
    for name in dict.fromkeys(row.contestant for row in run.rows if row.pass_ == "step"):
        found = [pick(run, "step", group).get(name) for group in groups]
        lines.append([name, *(_step_cell(row) for row in found)])
    return table(["flow", *(group.removeprefix("VAE-step-") for group in groups)], lines)


def _step_cell(row: Row | None) -> str:
    if row is None or row.median is None:
        return row.status if row else ""
    if row.role == "base" or not row.base_ratios:
        return duration(row.median)
    return f"{row.to_base:.2f}x ({min(row.base_ratios):.2f} to {max(row.base_ratios):.2f})"


def backend_table(run: Results) -> str:
    """A line for each case, three columns for each backend and form that was timed; "" if there is only one."""
    timed = [row for row in run.rows if row.role in ("ours", "form") and row.median and row.pass_ in PASSES]
    names = list(dict.fromkeys(row.contestant for row in timed))
    if len(names) < 2:
        return ""
    lines = []
    for case in cases(run, "forward+backward"):
        cells, both = [], pick(run, "forward+backward", case)
        for name in names:
            rows = [found.get(name) for found in (both, *(pick(run, pass_, case) for pass_ in PASSES[:2]))]
            cells += [duration(rows[0] and rows[0].wall), *(duration(row and row.median) for row in rows[1:])]
        lines.append([title(next(iter(both.values()))), *cells])
    parts = ("both", "forward", "backward")
    columns = [f"{name.removeprefix('vvae_fast ')}, {part}" for name in names for part in parts]
    return table(["B x D, K", *columns], lines)


def memory_table(run: Results) -> str:
    """Bytes saved for the backward beside the inputs, and the peak of a forward and backward."""
    names = [OURS, *(name for name in PEERS if any(name in pick(run, "memory", case) for case in cases(run, "memory")))]
    lines = []
    for case in cases(run, "memory"):
        found = pick(run, "memory", case)
        if OURS in found:
            mine = [size(found[OURS].saved_bytes)]
            rest = [found.get(name) for name in names]
            saved = [size(row.saved_beside_inputs_bytes) if row else "" for row in rest]
            lines.append([title(found[OURS]), *mine, *saved, *(size(row.peak_bytes) if row else "" for row in rest)])
    columns = [f"{what}, {name}" for what in ("saved", "peak") for name in names]
    return table(["B x D, K", f"saved with inputs, {OURS}", *columns], lines)


def where_not_fastest(run: Results) -> str:
    """One sentence on the comparisons in which some peer is faster than the fastest backend."""
    compared, lost, timed = 0, [], {row.contestant for row in run.rows if row.median}
    for pass_ in PASSES:
        for case in cases(run, pass_):
            mine = pick(run, pass_, case).get(OURS)
            if mine is None or mine.to_fastest_peer is None:
                continue
            compared += 1
            if mine.to_fastest_peer > 1:
                lost.append(
                    f"{title(mine)}, {pass_} ({mine.fastest_peer} takes {1 / mine.to_fastest_peer:.2f} of its time)"
                )
    if not compared:
        return ""
    missing = [name for name in PEERS if name not in timed]
    but = f" Not timed at all in it: {', '.join(missing)}." if missing else ""
    if not lost:
        return (
            f"vvae_fast is the fastest in all {compared} comparisons of that run (a pass of a case with a peer).{but}"
        )
    return f"vvae_fast is not the fastest in {len(lost)} of {compared} comparisons of that run: {'; '.join(lost)}.{but}"


def floor_table(run: Results) -> str:
    """A line for each large case: how far forward and backward are from their floors, and the bytes saved."""
    lines = []
    for case in GPU_FLOOR_CASES if on_gpu(run) else FLOOR_CASES:
        passes = [pick(run, pass_, case).get(OURS) for pass_ in PASSES[:2]]
        if all(passes):
            lines.append([title(passes[0]), *(_floor_cell(row) for row in passes)])
    return table(["B x D, K", "forward", "backward"], lines) if lines else ""


def _floor_cell(row: Row) -> str:
    """The ratio and the time; on a GPU those of the device alone."""
    return f"{floor_ratio(row)} ({duration(row.median)}{'~' * noisy(row.round_medians)})" if row.median else cell(row)


def memory_sentence(run: Results) -> str:
    """The bytes that the forward saves, in the largest case and in one that the plain loop ran too."""
    found = [pick(run, "memory", case) for case in cases(run, "memory")]
    found = [rows for rows in found if OURS in rows and rows[OURS].saved_bytes and not rows[OURS].amortized]
    if not found:
        return ""
    largest = max((rows[OURS] for rows in found), key=lambda row: row.saved_bytes)
    text = f"The forward saves {size(largest.saved_bytes)} for the backward at {title(largest)}, inputs included."
    for rows in found:
        loop = rows.get(PLAIN)
        if loop and loop.saved_bytes and loop.num_steps == largest.num_steps:
            mine, other = (size(row.saved_beside_inputs_bytes) for row in (rows[OURS], loop))
            return f"{text} Beside its inputs it saves {mine} at {title(loop)}, the plain loop {other}."
    return text
