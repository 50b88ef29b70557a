"""The record of a benchmark run: rows, a header that says where they come from, JSON and CSV.

A full run is benchmarks/results/<machine>/torch-<version>-<commit>.json, <commit>-dirty with uncommitted changes; quick
and partial ones say so at the start of their name, and git ignores them. Times are in seconds, sizes in bytes.
"""

import csv
import dataclasses
import json
import math
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles

import torch

import vvae_fast
from benchmarks.flow import memory
from benchmarks.flow.contestants import COMPILED, GRAPH, Contestant
from benchmarks.flow.loops import PLAIN
from benchmarks.flow.measure import COPY, Run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"
HEADER = (  # the entries that the report needs
    *("kind", "date", "seconds", "device", "machine", "threads", "isa", "torch", "commit", "dirty", "compiled"),
    *("matrix_product_flops_per_second", "peak_bytes_method", "versions"),
)


class Unreadable(Exception):
    """A file of results is cut short, or of another version; the message names it."""


@dataclass(frozen=True)
class Row:
    """One contestant in one pass of a case. A status other than "ok" says why there are no numbers."""

    case: str
    pass_: str  # forward, backward, forward+backward, step, memory
    contestant: str
    role: str  # ours, form, peer, no-op, copy, base
    status: str
    rows: int
    dim: int
    num_steps: int | None
    amortized: bool | None
    dtype: str
    median: float | None = None  # of the rounds' medians; by device events on a GPU, except for a training step
    p10: float | None = None  # over all calls, like p90
    p90: float | None = None
    host_median: float | None = None  # by the clock; on a GPU for calls in a row, until the device is done
    calls: int | None = None
    page_faults: float | None = None  # per call
    round_medians: list[float] = field(default_factory=list)
    host_round_medians: list[float] = field(default_factory=list)  # if they differ from round_medians
    floor: float | None = None
    to_floor: float | None = None
    fastest_peer: str | None = None
    to_fastest_peer: float | None = None  # host_median over the fastest peer's: below 1 is faster
    base: str | None = None  # the vanilla step, or the plain loop
    base_ratios: list[float] = field(default_factory=list)  # each round's time by the clock over the base's
    to_base: float | None = None  # their median
    compile_seconds: float | None = None
    saved_bytes: int | None = None
    saved_beside_inputs_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def wall(self) -> float | None:
        """Time by the clock: how long a user waits."""
        return self.host_median or self.median

    @property
    def wall_rounds(self) -> list[float]:
        """The same of each round."""
        return self.host_round_medians or self.round_medians


@dataclass(frozen=True)
class Results:
    """One run."""

    header: dict[str, object]
    rows: list[Row]


def rows(run: Run, contestants: dict[str, Contestant]) -> list[Row]:
    """The rows of a run, each with its ratios."""
    groups: dict[tuple[object, str], list[str]] = {}
    for group, pass_, name in run.timings:
        groups.setdefault((group, pass_), []).append(name)
    for group, name in run.memory:
        groups.setdefault((group, "memory"), []).append(name)
    found = []
    for (group, pass_), names in groups.items():
        plain = [_row(run, group, pass_, name, _role(name, contestants)) for name in dict.fromkeys(names)]
        found += _with_ratios(plain, _floor(run, group, pass_, plain))
    return found


def _role(name: str, contestants: dict[str, Contestant]) -> str:
    if name in contestants:
        return contestants[name].role
    if name.endswith(GRAPH):
        return "form"
    if name in (COPY, "vanilla"):
        return "copy" if name == COPY else "base"
    for role, start in (("ours", "vvae_fast"), ("no-op", "no-op")):
        if name.startswith(start):
            return role
    return "peer"


def _row(run: Run, group, pass_: str, name: str, role: str) -> Row:
    timing = run.timings.get((group, pass_, name))
    row = Row(
        *(str(group), pass_, name, role, timing.status if timing else "ok", group.rows, group.dim),
        *(getattr(group, "num_steps", None), getattr(group, "amortized", None), group.dtype),
        compile_seconds=_rounded(run.compile_seconds.get((group, name))),
        **(run.memory.get((group, name), {}) if pass_ == "memory" else {}),
    )
    if timing is None or not timing.rounds or timing.status != "ok":
        return row
    times = [seconds for block in timing.rounds for seconds in block]
    deciles = quantiles(times, n=10, method="inclusive")
    round_medians = [median(block) for block in timing.rounds]
    host_round_medians = [median(block) for block in timing.host_rounds]
    return dataclasses.replace(
        row,
        median=_rounded(median(round_medians)),
        p10=_rounded(deciles[0]),
        p90=_rounded(deciles[-1]),
        host_median=_rounded(median(host_round_medians)),
        calls=len(times),
        page_faults=_rounded(median(timing.page_faults)) if timing.page_faults else None,
        round_medians=[_rounded(seconds) for seconds in round_medians],
        host_round_medians=[_rounded(x) for x in host_round_medians] if host_round_medians != round_medians else [],
    )


def _floor(run: Run, group, pass_: str, found: list[Row]) -> float | None:
    """Seconds of the floor; the copy was timed in the same rounds."""
    copies = [row.median for row in found if row.contestant == COPY and row.median]
    if not copies or group.dtype not in run.rates:
        return None
    return group.floor(pass_, run.copy_bytes[group] / copies[0], run.rates[group.dtype])


def _with_ratios(found: list[Row], floor: float | None) -> list[Row]:
    timed = [row for row in found if row.median]
    peer = min((row for row in timed if row.role == "peer"), key=lambda row: row.wall, default=None)
    base = next((row for row in timed if row.role == "base" or row.contestant == PLAIN), None)
    return [_with_its_ratios(row, floor, peer, base) if row.median else row for row in found]


def _with_its_ratios(row: Row, floor: float | None, peer: Row | None, base: Row | None) -> Row:
    ratios = [x / y for x, y in zip(row.wall_rounds, base.wall_rounds, strict=False)] if base else []
    return dataclasses.replace(
        row,
        floor=_rounded(floor),
        to_floor=_rounded(row.median / floor) if floor and row.role != "copy" else None,
        fastest_peer=peer.contestant if peer else None,
        to_fastest_peer=_rounded(row.wall / peer.wall if peer else None),
        base=base.contestant if base else None,
        base_ratios=[_rounded(ratio) for ratio in ratios],
        to_base=_rounded(median(ratios) if ratios else None),
    )


def _rounded(x: float | None) -> float | None:
    """Five significant digits: more would be noise."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.5g}")


def header(run: Run, kind: str, seconds: float, commit: str | None = None) -> dict[str, object]:
    """Where, when and with what the run was made. kind is full, quick or partial. `commit` is the output of
    `git describe --always --dirty`, for a copy that has no .git."""
    cuda = run.device.type == "cuda"
    info = vvae_fast.info()
    status = _git("status", "--porcelain", "--untracked-files=no")
    head, dirty = _git("rev-parse", "--short=10", "HEAD") or "unknown", status is None or bool(status)
    if status is None and commit:
        head, dirty = commit.removesuffix("-dirty").replace("/", "-"), commit.endswith("-dirty")
    return {
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "device": run.device.type,
        "machine": torch.cuda.get_device_name(run.device) if cuda else cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": info["isa"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vvae_fast": vvae_fast.__version__,
        "commit": head,
        "dirty": dirty,
        "compiled": COMPILED,  # what torch.compile was given
        "matrix_product_flops_per_second": {dtype: _rounded(rate) for dtype, rate in run.rates.items()},
        "matrix_product_units": {
            dtype: {unit: _rounded(rate) for unit, rate in rates.items()} for dtype, rates in run.unit_rates.items()
        },
        **({"copy_bytes_per_second": _copy_bandwidth(run)} if cuda else {}),
        "peak_bytes_method": memory.GPU_METHOD if cuda else memory.CPU_METHOD,
        "versions": _versions("normflows", "pyro-ppl", "pythae", "flowjax", "jax", *["triton"] * cuda),
    }


def _copy_bandwidth(run: Run) -> float | None:
    """The best of the run; on a GPU every case copies the same number of bytes."""
    found = [
        run.copy_bytes[group] / median(median(block) for block in timing.rounds)
        for (group, _, name), timing in run.timings.items()
        if name == COPY and timing.rounds
    ]
    return _rounded(max(found, default=None))


def cpu_name() -> str:
    """The processor as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _git(*arguments: str) -> str | None:
    """The output of git in this checkout; None if git fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def slug(header: dict[str, object]) -> str:
    """The machine's folder: the GPU's name, or the CPU's and the threads used."""
    name = header["machine"] if header["device"] == "cuda" else f"{header['machine']} {header['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(run: Results, folder: Path = FOLDER) -> Path:
    """Writes JSON and CSV and returns the JSON's path."""
    h = run.header
    prefix = "" if h["kind"] == "full" else f"{h['kind']}-"
    version = str(h["torch"]).replace("+", "-")
    path = folder / slug(h) / f"{prefix}torch-{version}-{h['commit']}{'-dirty' * bool(h['dirty'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(
        json.dumps(_compact(row)) for row in run.rows
    )  # one line for each row, so that diffs stay readable
    path.write_text(f'{{"header": {json.dumps(h, indent=1)},\n"rows": [\n{body}\n]}}\n')
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in asdict(r).items()} for r in run.rows
        )
    return path


def _compact(row: Row) -> dict[str, object]:
    return {name: value for name, value in asdict(row).items() if value is not None and value != []}


def read(path: Path) -> Results:
    """A run that `write` wrote; raises Unreadable for any other file."""
    try:
        found = json.loads(path.read_text())
        header = {name: found["header"][name] for name in HEADER} | found["header"]
        return Results(header, [Row(**{"num_steps": None, "amortized": None, **row}) for row in found["rows"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        shown = path.resolve()
        shown = shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else path
        raise Unreadable(
            f"cannot read {shown} (truncated, or of another version): delete it or run `make bench` again"
        ) from error


def committed(folder: Path = FOLDER) -> list[Path]:
    """The full runs that git tracks; without git, all that are there."""
    listed = _git("ls-files", "--full-name", "results")
    found = sorted(folder.glob("*/torch-*.json"))
    return found if listed is None else [path for path in found if path.as_posix().endswith(tuple(listed.split()))]


def newest(paths: list[Path] | None = None, folder: Path = FOLDER) -> dict[str, Path]:
    """The newest run of each machine, by machine folder, among `paths`: by default all full runs."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*/torch-*.json")) if paths is None else paths:
        candidate = (read(path).header["date"], path)
        found[path.parent.name] = max(candidate, found.get(path.parent.name, candidate))
    return {machine: path for machine, (_, path) in sorted(found.items())}
