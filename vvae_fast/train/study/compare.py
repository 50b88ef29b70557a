"""The main command: the vanilla VAE against flow VAEs on one data set, over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vvae_fast.train.base import outcome
from vvae_fast.train.base.environment import describe_environment
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import RunError, make_folder, read_json, write_json
from vvae_fast.train.base.output import make_console, print_lines
from vvae_fast.train.base.progress import Progress
from vvae_fast.train.data.sets import Dataset, describe, summary
from vvae_fast.train.run import compiling, processes
from vvae_fast.train.run.folder import check_folder, check_same, remove_run
from vvae_fast.train.run.gaps import PERCENT, SHARES, GapSettings, load_gaps, measure
from vvae_fast.train.run.networks import check_fits, matched
from vvae_fast.train.run.runconfig import (
    ALL_UNITS,
    AMORTIZED,
    FULL,
    GATED_CONV,
    HOUSEHOLDER,
    OWN_SETTINGS,
    PLANAR,
    RECORD,
    SHARED,
    SYLVESTER,
    UNMATCHED,
    VANILLA,
    RunConfig,
    is_sylvester,
    length,
)
from vvae_fast.train.run.runs import Trained, load_best, run
from vvae_fast.train.study.plots import plot_curves, plot_reconstructions, plot_samples
from vvae_fast.train.study.posterior import plot_posterior
from vvae_fast.train.study.spread import CLEAR, Spread, in_words

RESULTS = "results.json"
MATCHED = f"{VANILLA}-matched"  # in a study's file: vanilla VAEs with as many parameters as amortized flows of K
CURVES, RECONSTRUCTIONS, SAMPLES, POSTERIOR = "elbo.png", "reconstructions.png", "samples.png", "posterior.png"
CONTENT_KEYS = {"data", "config", "environment", "runs"}  # the keys of results.json in every version
COLUMNS = {  # a result's key: heading, decimals
    "neg_elbo": ("-ELBO", 2),
    "nll": ("NLL", 2),
    "gap": ("gap", 2),
    "kl": ("KL", 2),
    "active_units": ("active", 1),
    "num_parameters": ("parameters", 0),
    "seconds_per_epoch": ("s / epoch", 3),
}
FIXED_BELOW = 1e8  # larger numbers have an exponent, since their digits would not fit on a screen
MANY = 1.2  # a flow VAE with so many times the vanilla VAE's parameters or more has clearly more of them
TABLE_WIDTH = 160  # a narrower terminal breaks lines, so that cells are never cut


@dataclass(frozen=True)
class Model:
    """A row of the table."""

    kind: str
    num_steps: int
    rank: int = FULL  # of an amortized flow's head
    matched: int = UNMATCHED  # for a wider vanilla VAE, K of the amortized flow whose number of parameters it has
    flow: str = PLANAR
    units: int = ALL_UNITS  # M of a Sylvester flow, whose L is num_steps

    @property
    def family(self) -> str:
        return self.kind if self.rank == FULL else f"{self.kind} rank-{self.rank}"

    @property
    def flow_words(self) -> str:
        """As in "orthogonal Sylvester M=16"."""
        if not is_sylvester(self.flow):
            return "Householder" if self.flow == HOUSEHOLDER else self.flow
        units = "" if self.units == ALL_UNITS else f" M={self.units}"
        return f"{self.flow.removeprefix(SYLVESTER)} Sylvester{units}"

    @property
    def series(self) -> str:
        """What models share that differ in length alone: "amortized", "amortized triangular Sylvester"."""
        return self.family if self.flow == PLANAR else f"{self.family} {self.flow_words}"

    @property
    def length(self) -> str:
        """As in "K = 16", or "L = 4" of a Sylvester flow."""
        return length(self.flow, self.num_steps, " = ")

    @property
    def title(self) -> str:
        matched = "" if self.matched == UNMATCHED else f", matched to K = {self.matched}"
        return f"vanilla VAE{matched}" if self.kind == VANILLA else f"{self.family} {self.flow_words}"

    @property
    def label(self) -> str:
        return self.title if self.kind == VANILLA else f"{self.title} {length(self.flow, self.num_steps, '=')}"

    def config(self, base: RunConfig, seed: int, dataset: Dataset) -> RunConfig:
        """The configuration of this model's run with a seed; the other settings are those of `base`, but for the widths
        of a matched model, and for what only some heads have: `normalise` amortized ones, `layer_norm` and
        `full_epochs` those with a rank. Raises RunError as `networks.matched` does."""
        normalise = base.normalise and self.kind == AMORTIZED
        layer_norm, full_epochs = (base.layer_norm, base.full_epochs) if self.rank != FULL else (False, 0)
        own: dict[str, Any] = {name: getattr(self, name) for name in ("flow", "num_steps", "units", "rank")}
        own |= {"normalise": normalise, "layer_norm": layer_norm, "full_epochs": full_epochs}
        config = replace(base, model=self.kind, seed=seed, **own)
        return config if self.matched == UNMATCHED else matched(config, self.matched, dataset)


VANILLA_MODEL = Model(VANILLA, 0)


def models_to_compare(
    steps: Sequence[int],
    shared: bool,
    matched_to: Sequence[int] = (),
    flows: Sequence[str] = (PLANAR,),
    units: int = ALL_UNITS,
) -> list[Model]:
    """The vanilla VAE, and an amortized flow of each of `flows` and length; with `shared` also shared ones. For each
    length in `matched_to` also a vanilla VAE with as many parameters as the amortized planar flow VAE of that length.
    """
    kinds = (AMORTIZED, SHARED) if shared else (AMORTIZED,)
    wider = [Model(VANILLA, 0, matched=num_steps) for num_steps in matched_to]
    families = [(flow, units if is_sylvester(flow) else ALL_UNITS) for flow in flows]
    return [VANILLA_MODEL, *wider] + [
        Model(kind, num_steps, flow=flow, units=of_flow)
        for flow, of_flow in families
        for kind in kinds
        for num_steps in steps
    ]


def compare(
    base: RunConfig,
    dataset: Dataset,
    models: Sequence[Model],
    seeds: Sequence[int],
    out: Path,
    fresh: bool,
    compile_: bool = False,
    gaps: GapSettings | None = None,
) -> dict:
    """Trains every model with every seed, or continues; prints the table, writes the results and plots.

    Args:
        base: the configuration that all runs share; its model, num_steps, rank and seed are replaced.
        out: the folder of the runs' folders, results.json and the plots.
        fresh: delete these runs' folders first.
        compile_: see `runs.run`.
        gaps: measure the inference gaps of each run's best epoch like this, unless its gaps.json has them already.

    Returns:
        {"data", "dataset", "config", "environment", "runs": a record for each run, with its "gaps" where they were
        measured}, as in results.json.

    Raises:
        RunError: before anything is trained, if a folder or results.json belongs to another configuration, the
            network does not fit the data, a rank is too large, or gaps are to be measured by several processes.
        KeyboardInterrupt: on Ctrl-C; the next call continues after the last finished epoch.
    """
    require("matplotlib.figure")  # if it is missing, fail now and not after the training
    if gaps is not None and processes.is_launched():
        raise RunError("gaps are measured in one process; start it without torchrun, or leave gaps out of the file")
    # Once a model: the widths of a matched one take many VAEs to find.
    configs = {model: model.config(base, base.seed, dataset) for model in models}
    for config in configs.values():
        check_fits(config, dataset)
    make_folder(out)
    _check_results(base, out, fresh)
    runs = [(model, replace(configs[model], seed=seed)) for seed in seeds for model in models]
    for _, config in runs:
        if fresh and processes.is_first():
            remove_run(out / config.name)
        processes.wait_for_all()
        check_folder(config, out / config.name)
    if processes.is_first():
        print(summary(dataset), flush=True)
    results: dict[Model, list[dict]] = {model: [] for model in models}
    with Progress(len(runs), base.epochs, quiet=not processes.is_first()) as progress:
        for model, config in runs:
            progress.start(f"{model.label}, seed {config.seed}")
            result = run(config, dataset, out / config.name, progress.update, compile_)
            progress.finish(result)
            results[model].append(result)
    records = {(m, row["seed"]): {key: row[key] for key in RECORD} for m, rows in results.items() for row in rows}
    if gaps is not None:
        _measure_gaps(gaps, [(records[model, config.seed], config) for model, config in runs], dataset, out)
    content = {
        "data": base.data,
        "dataset": describe(dataset),
        "config": _shared_settings(base),
        "environment": describe_environment(compiling.mode() if compile_ else None),
        "runs": list(records.values()),
    }
    if processes.is_first():
        write_json(out / RESULTS, content)
        print_table(results, base.network != GATED_CONV)
        _plot(configs, dataset, results, out)
        print(f"\n{out / RESULTS} and the plots beside it are written.")
    return content


def _measure_gaps(settings: GapSettings, runs: Sequence[tuple[dict, RunConfig]], dataset: Dataset, out: Path) -> None:
    """Adds "gaps" to the records of runs that have a trained VAE: scores and settings, without the points."""
    trained_runs = [(record, config) for record, config in runs if record["nll"] is not None]
    with Progress(len(trained_runs), PERCENT) as progress:
        for record, config in trained_runs:
            folder = out / config.name
            vae, epoch = load_best(config, dataset, folder)
            trained = Trained(epoch, config, dataset, vae)
            content = load_gaps(trained, settings, folder)
            if content is None:
                content = measure(trained, settings, folder, progress)
            else:
                progress.start(config.name)
                progress.conclude("its gaps are measured already")
            record["gaps"] = {key: content[key] for key in ("settings", "scores", "by_samples", *SHARES.values())}


def _check_results(base: RunConfig, out: Path, fresh: bool) -> None:
    """Raises RunError if a file to be written exists and is not from a comparison with these settings."""
    path = out / RESULTS
    if not path.exists():
        in_print = [Path(name).with_suffix(".pdf").name for name in (CURVES, POSTERIOR)]
        names = [CURVES, RECONSTRUCTIONS, SAMPLES, POSTERIOR, *in_print]
        plots = [name for name in names if (out / name).exists()]
        if plots:
            raise RunError(
                f"{out / plots[0]} is there, but no {RESULTS}: it would be overwritten; choose another --out"
            )
        return
    content = read_json(path)
    if not content.keys() >= CONTENT_KEYS or not isinstance(content["config"], dict):
        raise RunError(f"{path} is not a result of vvae-fast compare and will not be overwritten; choose another --out")
    if not fresh:
        check_same(base, {**content["config"], **{key: getattr(base, key) for key in OWN_SETTINGS}}, path)


def _shared_settings(base: RunConfig) -> dict:
    """The configuration without the settings that differ between the runs."""
    return {key: value for key, value in base.to_json().items() if key not in OWN_SETTINGS}


def print_table(results: dict[Model, list[dict]], can_match: bool = True) -> None:
    """One row for each model: means over the seeds that have a score, and their sample standard deviations. Below the
    table it says what the differences are worth, and lists the runs that ended early. `can_match`: whether a vanilla
    VAE of the network can have as many parameters as a flow VAE."""
    box, table_module = (require(f"rich.{name}") for name in ("box", "table"))
    table = table_module.Table(box=box.MARKDOWN)
    table.add_column("model", no_wrap=True)
    table.add_column("K", justify="right", no_wrap=True)
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for model, runs in results.items():
        cells = [_mean_and_spread([result[key] for result in runs], digits) for key, (_, digits) in COLUMNS.items()]
        diverged = sum(result["status"] == outcome.DIVERGED for result in runs)
        title = f"{model.title} ({diverged} of {len(runs)} diverged)" if diverged else model.title
        table.add_row(title, str(model.num_steps), *cells)
    screen = make_console()
    screen.width = max(screen.width, TABLE_WIDTH)
    print_lines(screen, table)
    count = len(next(iter(results.values())))
    spread = f"; mean ± standard deviation over {count} seeds" if count > 1 else ""
    legend = (
        "Test set, nats a data point: -ELBO; NLL by importance sampling; gap = -ELBO - NLL; KL; active: "
        f"latent dimensions whose posterior mean varies{spread}."
    )
    screen.print(legend, soft_wrap=True)
    for line in [*_gains(results), *_more_parameters(results, can_match), *_still_improving(results)]:
        screen.print(line, soft_wrap=True, markup=False)
    for model, runs in results.items():
        for result in runs:
            if result["status"] != outcome.FINISHED:
                ending = f"{model.label}, seed {result['seed']}: {outcome.describe(result)}"
                screen.print(ending, soft_wrap=True, markup=False)


def _gains(results: dict[Model, list[dict]]) -> list[str]:
    """A line for each other model: how much better or worse its NLL is than the vanilla VAE's, seed by seed."""
    nlls = {model: [run["nll"] for run in runs] for model, runs in results.items()}
    vanilla = nlls.pop(VANILLA_MODEL, [])
    if not vanilla or not nlls:
        return []
    lines = [in_words(model.label, values, vanilla) for model, values in nlls.items()]
    for model, values in nlls.items():
        equal = _matched_to(model)
        if equal is not None and equal in nlls:
            lines.append(in_words(model.label, values, nlls[equal], f"the {equal.label}"))
    clear = [f"Clear: more than {CLEAR:g} standard deviations of the seeds' differences."]
    return lines + clear * (len(vanilla) > 1)


def _matched_to(model: Model) -> Model | None:
    """The vanilla VAE with as many parameters as an amortized flow VAE with a full head."""
    is_full = (model.kind, model.flow, model.rank) == (AMORTIZED, PLANAR, FULL)
    return Model(VANILLA, 0, matched=model.num_steps) if is_full else None


def _more_parameters(results: dict[Model, list[dict]], can_match: bool) -> list[str]:
    """A line for each flow VAE that has clearly more parameters than the vanilla VAE, unless a vanilla VAE of as many
    is in the table too."""
    counts = {model: runs[0]["num_parameters"] for model, runs in results.items()}  # every seed's are the same
    of_vanilla = counts.get(VANILLA_MODEL, 0)
    more = {
        model: count / of_vanilla
        for model, count in counts.items()
        if model.kind != VANILLA and _matched_to(model) not in results and count >= MANY * of_vanilla > 0
    }
    lines = [f"{model.label} has {ratio:.1f} times the vanilla VAE's parameters" for model, ratio in more.items()]
    advice = f"; --matched, or {MATCHED} in a study's file, adds a vanilla VAE of as many"
    return [
        line + advice * (can_match and _matched_to(model) is not None) for model, line in zip(more, lines, strict=True)
    ]


def _still_improving(results: dict[Model, list[dict]]) -> list[str]:
    """A line for each model whose best epoch is the last one, by validation -ELBO, in some of its runs."""
    lines = []
    for model, runs in results.items():
        finished = [run for run in runs if run["status"] == outcome.FINISHED]
        late = sum(run["best_epoch"] == run["epochs_done"] - 1 for run in finished)
        if late:
            of = f" ({late} of {len(runs)} seeds)" if len(runs) > 1 else ""
            lines.append(f"{model.label} was still improving at the last epoch{of}: more --epochs go on with it")
    return lines


def _mean_and_spread(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, deviation = Spread.of(known)
    form = f".{digits}f" if abs(mean) < FIXED_BELOW else ".4g"
    is_measured = len(known) > 1 and digits > 0  # other values are the same for every seed
    return f"{mean:{form}} ± {deviation:{form}}" if is_measured else f"{mean:{form}}"


def _plot(configs: dict[Model, RunConfig], dataset: Dataset, results: dict[Model, list[dict]], out: Path) -> None:
    """Plots the curves of all runs, and pictures of each model's first seed that has a trained VAE."""
    vaes = {}
    for model, runs in results.items():
        seeds = [run["seed"] for run in runs if run["best_epoch"] is not None]
        if seeds:
            config = replace(configs[model], seed=seeds[0])
            vaes[model], _ = load_best(config, dataset, out / config.name)
    labelled = {model.label: vae for model, vae in vaes.items()}
    plot_curves({model.label: [run["history"] for run in runs] for model, runs in results.items()}, out / CURVES)
    if vaes:
        plot_reconstructions(labelled, dataset, out / RECONSTRUCTIONS)
        plot_samples(labelled, dataset, out / SAMPLES)
    flows = [model for model in vaes if model.num_steps > 0]
    if flows:
        plot_posterior(vaes[max(flows, key=lambda model: model.num_steps)], dataset, out / POSTERIOR)
