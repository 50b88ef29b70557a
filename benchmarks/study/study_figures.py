"""The figures of a study: -ELBO and NLL, and the gap between them, against the flow's length; the inference gaps."""

import itertools
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report import svg
from benchmarks.study import study_gaps
from benchmarks.study.study_results import OURS, VANILLA_MODEL, Results
from vvae_fast.train.run.runconfig import AMORTIZED, SHARED, VANILLA

COLORS = {AMORTIZED: "#c0392b", SHARED: "#2471a3"}
RANK_COLORS = ("#e67e22", "#b7950b", "#8e44ad", "#1e8449")  # of heads with a rank, in turn
VANILLA_COLOR = "#7f8c8d"
STYLES = {"neg_elbo": ("-ELBO", "--", "s"), "nll": ("NLL", "-", "o"), "gap": ("gap", "-", "o")}


GAP_COLORS = {study_gaps.APPROXIMATION: "#2471a3", study_gaps.AMORTIZATION: "#e67e22"}
GAP_LABELS = {
    study_gaps.APPROXIMATION: "approximation: the family",
    study_gaps.AMORTIZATION: "amortization: the encoder",
}


def write_all(results: Results, folder: Path) -> list[Path]:
    """Writes SVGs, and returns their paths; the same results give the same bytes."""
    figures = {"": _draw_lengths(results)}
    if study_gaps.measured(results):
        figures["_gaps"] = _draw_gaps(results)
    if ranks(results):
        figures["_ranks"] = _draw_ranks(results)
    paths = [folder / f"{results.study.name}{suffix}.svg" for suffix in figures]
    for figure, path in zip(figures.values(), paths, strict=True):
        svg.save(figure, path, svg_fonttype="none")  # text stays text
    return paths


def ranks(results: Results) -> list[str]:
    """The families of amortized flows, if some have a rank."""
    families = [family for family in results.families if results.flows(family)[0].kind == AMORTIZED]
    return families if len(families) > 1 else []


def _draw_ranks(results: Results) -> Figure:
    """NLL against parameters, and against seconds of an epoch if they were measured: a line for each family, a point
    for each length."""
    costs = {"parameters": lambda model: results.runs[model][0]["num_parameters"]}
    if all(results.seconds(model, OURS) for family in ranks(results) for model in results.flows(family)):
        costs["seconds of an epoch"] = lambda model: results.seconds(model, OURS)
    figure = Figure(figsize=(4.5 * len(costs), 3.8), layout="constrained")
    for axes, (cost, of) in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs.items(), strict=True):
        mean, deviation = results.score(VANILLA_MODEL, "nll")
        axes.axhline(mean, color=VANILLA_COLOR, label="vanilla")
        axes.axhspan(mean - deviation, mean + deviation, color=VANILLA_COLOR, alpha=0.15, linewidth=0)
        for family, color in _colors(results, ranks(results)).items():
            models = results.flows(family)
            means, deviations = zip(*(results.score(model, "nll") for model in models), strict=True)
            x = [of(model) for model in models]
            axes.errorbar(x, means, yerr=deviations, color=color, marker="o", markersize=4, capsize=2, label=family)
            for model, place in zip(models, zip(x, means, strict=True), strict=True):
                label = model.length
                axes.annotate(label, place, (4, 4), textcoords="offset points", fontsize="x-small", color=color)
        axes.set(xscale="log", xlabel=cost, ylabel="NLL, nats")
    figure.axes[0].legend(fontsize="small")
    return figure


def _colors(results: Results, families: list[str]) -> dict[str, str]:
    """The same color for a family in all figures of a study."""
    others = itertools.cycle(RANK_COLORS)
    colors = {family: COLORS.get(family) or next(others) for family in results.families}
    return {family: colors[family] for family in families}


def _draw_gaps(results: Results) -> Figure:
    """A bar for each model, split in its two gaps, with the seeds' deviations of each."""
    models = study_gaps.measured(results)[::-1]  # the first on top
    figure = Figure(figsize=(6.5, 0.8 + 0.3 * len(models)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(models)
    for key, color in GAP_COLORS.items():
        means, deviations = zip(*(results.score(model, key) for model in models), strict=True)
        bars = {"color": color, "label": GAP_LABELS[key], "height": 0.7, "capsize": 2}
        axes.barh([model.label for model in models], means, left=left, xerr=deviations, **bars)
        left = [start + mean for start, mean in zip(left, means, strict=True)]
    axes.set(xlabel="log p(x) - ELBO, nats", ylim=(-0.6, len(models) - 0.4))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _draw_lengths(results: Results) -> Figure:
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, keys, title in ((left, ("neg_elbo", "nll"), "-ELBO and NLL"), (right, ("gap",), "gap = -ELBO - NLL")):
        for key in keys:
            _draw_score(axes, results, key, named=axes is right or key == "nll")
        axes.set(
            xscale="log",
            xlabel="K, steps of the flow" if results.is_planar else "steps or layers of the flow",
            ylabel="nats",
            title=title,
        )
        lengths = sorted({model.num_steps for model in results.runs if model.kind != VANILLA})
        axes.set_xticks(lengths, [str(k) for k in lengths])
        axes.minorticks_off()
    left.plot([], [], color="black", linestyle="--", marker="s", label="-ELBO")
    left.plot([], [], color="black", linestyle="-", marker="o", label="NLL")
    left.legend(fontsize="small")
    return figure


def _draw_score(axes, results: Results, key: str, named: bool) -> None:
    """A line for each family of flows with the seeds' deviations, and the vanilla VAE's level."""
    _, line, marker = STYLES[key]
    mean, deviation = results.score(VANILLA_MODEL, key)
    axes.axhline(mean, color=VANILLA_COLOR, linestyle=line, label="vanilla" if named else None)
    axes.axhspan(mean - deviation, mean + deviation, color=VANILLA_COLOR, alpha=0.15, linewidth=0)
    for family, color in _colors(results, results.families).items():
        models = results.flows(family)
        means, deviations = zip(*(results.score(model, key) for model in models), strict=True)
        style = {"color": color, "linestyle": line, "marker": marker, "markersize": 4, "capsize": 2}
        label = family if named else None
        axes.errorbar([model.num_steps for model in models], means, yerr=deviations, label=label, **style)
