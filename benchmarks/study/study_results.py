"""Reads the results of a study, as `vvae-fast compare` wrote them, for the page."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vvae_fast.train.run.runconfig import LATER, PLANAR, VANILLA
from vvae_fast.train.study.compare import RESULTS, VANILLA_MODEL, Model
from vvae_fast.train.study.spread import Spread
from vvae_fast.train.study.studies import Study, load_study

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
CONFIGS = ROOT / "configs"
EPOCHS = "epochs.json"
OURS = "vvae_fast"  # this package's name in EPOCHS, beside the loops


class Unusable(Exception):
    """The results do not belong to the study's file, or lack a run."""


@dataclass(frozen=True)
class Results:
    """A study and its runs: for each model that was run the runs of all seeds, in the order of the study's file."""

    study: Study
    runs: dict[Model, list[dict]]
    environment: dict
    epochs: dict | None  # the content of EPOCHS

    def score(self, model: Model, key: str) -> Spread:
        """Of the number at a path in each run, such as "nll" or "gaps.scores.nll.mean"."""
        return Spread.of([_number(run, key) for run in self.runs[model]])

    def difference(self, model: Model, key: str, other: Model = VANILLA_MODEL) -> Spread:
        """The model's score minus the other's, the vanilla VAE's by default, seed by seed."""
        return self.difference_of(model, lambda run: _number(run, key), other)

    def difference_of(self, model: Model, number: Callable[[dict], float], other: Model = VANILLA_MODEL) -> Spread:
        """The same for a number that is computed from a run."""
        pairs = zip(self.runs[model], self.runs[other], strict=True)
        return Spread.of([number(run) - number(of_other) for run, of_other in pairs])

    @property
    def in_order(self) -> list[Model]:
        """All models as the tables list them: those without a flow, then family by family."""
        without = [model for model in self.runs if model.kind == VANILLA]
        return [*without, *itertools.chain.from_iterable(map(self.flows, self.families))]

    @property
    def families(self) -> list[str]:
        """The families of flows, amortized ones first, by rank, and others than planar ones last."""
        flows = [model for model in self.runs if model.kind != VANILLA]
        flows.sort(key=lambda model: (model.kind, model.rank, model.flow != PLANAR))
        return list(dict.fromkeys(model.series for model in flows))

    @property
    def is_planar(self) -> bool:
        """Whether all its flows are planar."""
        return all(model.flow == PLANAR for model in self.runs)

    def flows(self, family: str) -> list[Model]:
        """The models of a family, the shortest flow first."""
        return sorted((model for model in self.runs if model.series == family), key=lambda model: model.num_steps)

    def has_seconds(self, backend: str) -> bool:
        """Whether any seconds were measured with this backend."""
        return any(row["backend"] == backend for row in (self.epochs or {"epochs": []})["epochs"])

    def seconds(self, model: Model, backend: str) -> float | None:
        """Seconds of an epoch; None if not measured. The vanilla VAE has no flow: its seconds hold for all backends."""
        backend = OURS if model.kind == VANILLA else backend
        rows = [] if self.epochs is None else self.epochs["epochs"]
        return next((x["seconds"] for x in rows if (model_of(x), x["backend"]) == (model, backend)), None)


def _number(run: dict, path: str) -> float:
    value: Any = run
    for name in path.split("."):
        value = value[int(name) if isinstance(value, list) else name]
    return value


def read(folder: Path, config: Path) -> Results:
    """A folder's results for the study in a file, without the models of which no run is there.

    Raises Unusable if they do not belong to it, or lack the vanilla VAE or some seeds of a model, or if the study has
    one seed.
    """
    study = load_study(config)
    if len(study.seeds) < 2:
        raise Unusable(f"{config} has one seed: no difference would be clear, and the page gives their deviations")
    content = json.loads((folder / RESULTS).read_text())
    for name, value in study.settings.items():
        if content["config"][name] != value:
            raise Unusable(f"{folder / RESULTS}: {name} is {content['config'][name]}, in {config} {value}")
    found = {(model_of(run), run["seed"]): run for run in content["runs"]}
    models = [
        model for model in study.models if model == VANILLA_MODEL or any((model, s) in found for s in study.seeds)
    ]
    missing = [f"{m.label}, seed {s}" for m in models for s in study.seeds if (m, s) not in found]
    if missing:
        raise Unusable(f"{folder / RESULTS} lacks {len(missing)} runs of {config}, such as {missing[0]}")
    runs = {model: [found[model, seed] for seed in study.seeds] for model in models}
    check_gaps(study, folder / RESULTS, list(itertools.chain.from_iterable(runs.values())))
    epochs = folder / EPOCHS
    return Results(study, runs, content["environment"], json.loads(epochs.read_text()) if epochs.exists() else None)


def check_gaps(study: Study, path: Path, runs: list[dict]) -> None:
    """Raises Unusable if gaps were measured otherwise than the study's file says. Older results have none."""
    for settings in (run["gaps"]["settings"] for run in runs if "gaps" in run):
        asked = None if study.gaps is None else study.gaps._asdict()
        if asked is None or {**asked, "num_points": min(asked["num_points"], settings["num_points"])} != settings:
            raise Unusable(f"{path}: gaps were measured with {settings}, {study.name}'s file says {asked}")


def model_of(row: dict) -> Model:
    """The model of a run or of an epoch's seconds; files without these keys are older than them."""
    own = {**LATER, **row}
    return Model(own["model"], own["num_steps"], own["rank"], own["matched"], own["flow"], own["units"])


def read_all(folder: Path = FOLDER, configs: Path = CONFIGS) -> list[Results]:
    """The results of every study that has some, sorted by name."""
    return [read(path.parent, config_of(path.parent.name, configs)) for path in sorted(folder.glob(f"*/{RESULTS}"))]


def config_of(name: str, configs: Path = CONFIGS) -> Path:
    """A study's file, in `configs` or in a folder there."""
    return next(iter(sorted(configs.rglob(f"{name}.yaml"))), configs / f"{name}.yaml")
