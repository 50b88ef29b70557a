"""A study in a YAML file: the data, everything that decides its runs, the models, the seeds: nothing has a default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vvae_fast.train.compare import Model
from vvae_fast.train.data import SPLITS, Dataset
from vvae_fast.train.extras import require
from vvae_fast.train.files import RunError
from vvae_fast.train.runconfig import CHOICES, GATED_CONV, MODELS, VANILLA, RunConfig, data_digest, is_number

MODELS_EXAMPLE = "models: {vanilla: [0], amortized: [4, 16]}"
# The settings of a file, each as the command line's option of that name: what it holds, and how it is told.
SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("epochs", "batch_size", "latent_dim", "num_samples"), (lambda x: _is_int(x, 1), "a positive int")),
    **dict.fromkeys(("warmup_epochs", "patience"), (lambda x: _is_int(x, 0), "an int of at least 0")),
    "data": (lambda x: isinstance(x, str) and x != "", "a name or a path"),
    "lr": (lambda x: is_number(x) and 0 < x < float("inf"), "a positive number"),
    "hidden": (lambda x: _is_list(x, 1), "a list of positive ints"),
    **{
        name: (lambda x, name=name: isinstance(x, str) and x in CHOICES[name], f"one of {', '.join(CHOICES[name])}")
        for name in ("network", "optimizer", "schedule")
    },
}
OTHERS = {"protocol", "splits", "models", "seeds"}


@dataclass(frozen=True)
class Study:
    """What a file says.

    Attributes:
        name: the file's, without its suffix.
        protocol: one line in words, for reports.
        settings: values of SETTINGS, no hidden for the convolutional network.
        splits: rows of train, val and test, or None.
        models: the table's rows.
        seeds: at least one.
    """

    name: str
    protocol: str
    settings: dict[str, object]
    splits: dict[str, int] | None
    models: list[Model]
    seeds: list[int]

    def base(self, dataset: Dataset) -> RunConfig:
        """The configuration of the vanilla VAE with the first seed; the other runs differ in model and seed alone."""
        settings = {**self.settings, "hidden": tuple(self.settings.get("hidden", ())), "data": dataset.name}
        return RunConfig(VANILLA, 0, self.seeds[0], data_digest=data_digest(dataset), **settings)

    def check_splits(self, dataset: Dataset) -> None:
        """Raises RunError where the data set's splits are not those of the file."""
        came = {name: len(getattr(dataset, name)) for name in SPLITS}
        if self.splits is not None and self.splits != came:
            raise RunError(f"{self.name}: splits are {self.splits}, {dataset.name} has {came}; correct the file")


def load_study(path: Path) -> Study:
    """Reads a study's file. Raises RunError where it cannot be read, lacks something or has something unknown."""
    content = _read(path)
    unknown = content.keys() - SETTINGS.keys() - OTHERS
    if unknown:
        raise RunError(f"{path}: unknown setting {min(unknown)}; known are {', '.join(sorted({*SETTINGS, *OTHERS}))}")
    if content.get("network") == GATED_CONV and "hidden" in content:
        raise RunError(f"{path}: {GATED_CONV} has its own widths; remove hidden")
    names = [name for name in SETTINGS if name != "hidden" or content.get("network") != GATED_CONV]
    settings = {name: content.get(name) for name in names}
    for name, value in settings.items():
        is_valid, wanted = SETTINGS[name]
        _check(is_valid(value), path, name, wanted, value)
    protocol, splits = content.get("protocol", ""), content.get("splits")
    _check(isinstance(protocol, str), path, "protocol", "a line of text", protocol)
    _check(splits is None or _are_splits(splits), path, "splits", f"rows of {', '.join(SPLITS)}", splits)
    seeds = content.get("seeds")
    _check(_is_list(seeds, 0) and max(seeds) < 2**32, path, "seeds", "a list of ints from 0 to 2^32 - 1", seeds)
    models = _models(path, content.get("models"))
    return Study(path.stem, " ".join(protocol.split()), settings, splits, models, list(dict.fromkeys(seeds)))


def _read(path: Path) -> dict:
    yaml = require("yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read ({' '.join(str(error).split())}); correct the file") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RunError(f"{path} holds no settings; see configs/ for examples")
    return content


def _models(path: Path, content: object) -> list[Model]:
    wanted = f"a list of flow lengths for each kind, such as {MODELS_EXAMPLE}"
    is_valid = isinstance(content, dict) and len(content) > 0
    _check(is_valid and content.keys() <= set(MODELS), path, "models", wanted, content)
    for kind, lengths in content.items():
        _check(lengths == [0] if kind == VANILLA else _is_list(lengths, 1), path, "models", wanted, content)
    return [Model(kind, num_steps) for kind, lengths in content.items() for num_steps in dict.fromkeys(lengths)]


def _check(is_valid: bool, path: Path, name: str, wanted: str, value: object) -> None:
    if not is_valid:
        raise RunError(f"{path}: {name} must be {wanted}, got {value!r}; correct the file")


def _are_splits(content: object) -> bool:
    return isinstance(content, dict) and set(content) == set(SPLITS) and _is_list(list(content.values()), 1)


def _is_list(content: object, least: int) -> bool:
    return isinstance(content, list) and len(content) > 0 and all(_is_int(item, least) for item in content)


def _is_int(value: object, least: int) -> bool:
    return type(value) is int and value >= least
