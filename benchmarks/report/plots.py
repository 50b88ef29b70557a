"""The plots of a run as SVG: time against K and B, distance to the floor, memory against K."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.report import svg
from benchmarks.report.results import Results, Row

FB = "forward+backward"
NO_OP = "no-op (does no work)"
COLORS = {  # in the legends' order
    "vvae_fast": "#c0392b",
    NO_OP: "#7f8c8d",
    "torch.compile": "#2471a3",
    "plain loop": "#1e8449",
    "reference": "#7dcea0",
    "normflows": "#b9770e",
    "Pyro": "#7d3c98",
    "pythae": "#d16ba5",
    "flowjax": "#117a8b",
    "floor": "#000000",
    "vvae_fast triton": "#e67e22",  # beside another backend of ours; alone it is vvae_fast
}
MARKERS = dict(zip(COLORS, ["o", "X", "s", "^", "<", "D", "v", "P", "*", "", "h"], strict=True))
Points = dict[str, list[tuple[float, float]]]  # (x, y) of each label


def lines(run: Results, chosen: Callable[[Row], bool], x: str, y: str) -> Points:
    """The points (x, y) of each contestant among the rows chosen, in order."""
    backends = {row.contestant for row in run.rows if (row.role, row.status) == ("ours", "ok") and row.pass_ != "step"}
    labels = {"no-op": NO_OP} | ({name: "vvae_fast" for name in backends} if len(backends) == 1 else {})
    found: Points = {}
    for row in run.rows:
        if row.role != "copy" and chosen(row) and getattr(row, y) is not None:
            label = labels.get(row.contestant, row.contestant)
            found.setdefault(label, []).append((getattr(row, x), getattr(row, y)))
    return {label: sorted(points) for label, points in found.items()}


def key(label: str) -> str:
    """The key of a label's colour, marker and place."""
    return "vvae_fast" if label.startswith("vvae_fast") and label not in COLORS else label


def draw(ax: Axes, found: Points, scale: float, hollow: bool = False) -> None:
    """One line for each contestant, on logarithmic axes."""
    for name, points in found.items():
        ours = key(name).startswith("vvae_fast")
        style = {"color": COLORS.get(key(name)), "linewidth": 2.4 if ours else 1.3}
        style |= {"marker": MARKERS.get(key(name)), "markersize": 5.5}
        style |= {"markerfacecolor": "white"} if hollow else {}
        if name == "floor":
            style |= {"linestyle": ":", "marker": ""}
        ax.plot([x for x, _ in points], [scale * y for _, y in points], label=name, zorder=3 if ours else 2, **style)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({x for line in ax.lines for x in line.get_xdata()})
    ax.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    ax.minorticks_off()
    ax.tick_params(axis="x", labelrotation=45 if len(ticks) > 7 else 0)
    ax.grid(True, color="#e5e7e9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def time_against_steps(ax: Axes, run: Results) -> None:
    def chosen(row: Row) -> bool:
        return (row.pass_, row.rows, row.dim, row.dtype, row.amortized) == (FB, 128, 40, "float32", False)

    draw(ax, lines(run, chosen, "num_steps", "wall") | _floor(run, chosen, "num_steps"), 1e6)
    ax.set(xlabel="steps K", ylabel="forward + backward, us", title="Time against K at B = 128, D = 40")


def time_against_rows(ax: Axes, run: Results) -> None:
    def chosen(row: Row) -> bool:
        return row.pass_ == FB and _of_the_batch_series(row)

    draw(ax, lines(run, chosen, "rows", "wall") | _floor(run, chosen, "rows"), 1e6)
    ax.set(xlabel="rows B", ylabel="forward + backward, us", title="Time against B at D = 64, K = 32")


def distance_to_floor(ax: Axes, run: Results) -> None:
    for pass_ in ("forward", "backward"):

        def chosen(row: Row, pass_: str = pass_) -> bool:
            return row.pass_ == pass_ and row.role != "no-op" and _of_the_batch_series(row)

        draw(ax, lines(run, chosen, "rows", "to_floor"), 1.0, hollow=pass_ == "backward")
    if ax.lines:
        ends = [f(x for line in ax.lines for x in line.get_xdata()) for f in (min, max)]
        draw(ax, {"floor": [(x, 1.0) for x in ends]}, 1.0)
    ax.set(xlabel="rows B", ylabel="time / floor: forward filled, backward hollow")
    ax.set_title("Distance to the floor at D = 64, K = 32")


def memory_against_steps(ax: Axes, run: Results) -> None:
    def chosen(row: Row) -> bool:
        return row.pass_ == "memory" and (row.rows, row.dim, row.amortized) == (4096, 64, False)

    draw(ax, lines(run, chosen, "num_steps", "peak_bytes"), 1e-6)
    ax.set(xlabel="steps K", ylabel="peak of forward + backward, MB", title="Memory against K at B = 4,096, D = 64")


def _of_the_batch_series(row: Row) -> bool:
    return (row.dim, row.num_steps, row.dtype, row.amortized) == (64, 32, "float32", False)


def _floor(run: Results, chosen: Callable[[Row], bool], x: str) -> dict[str, list[tuple[float, float]]]:
    points = {(getattr(row, x), row.floor) for row in run.rows if chosen(row) and row.floor}
    return {"floor": sorted(points)} if points else {}


def write(run: Results, folder: Path) -> None:
    """time.svg and floor-and-memory.svg; the same results give the same bytes."""
    matplotlib.use("Agg")
    pages = {
        "time.svg": (time_against_steps, time_against_rows),
        "floor-and-memory.svg": (distance_to_floor, memory_against_steps),
    }
    h = run.header
    threads = "" if h["device"] == "cuda" else f", {h['threads']} threads"
    for name, panels in pages.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 5.1), layout="constrained")
        for ax, panel in zip(axes, panels, strict=True):
            panel(ax, run)
            if len({x for line in ax.lines for x in line.get_xdata()}) < 2:
                ax.remove()  # one point is in the tables
        found = {line.get_label(): line for ax in figure.axes for line in reversed(ax.lines)}  # filled markers win
        order = list(COLORS)
        labels = sorted(found, key=lambda label: (order.index(key(label)), label))
        figure.suptitle(f"{h['machine']}{threads}, float32")
        if labels:
            handles = [found[label] for label in labels]
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        svg.save(figure, folder / name)
        plt.close(figure)
