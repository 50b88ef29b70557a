"""A study in a YAML file: the data, all settings that decide its runs, models and seeds. Nothing has a default."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import RunError, read_text
from vvae_fast.train.base.numbers import MOST_SEED, TooLarge, as_int, as_ints, as_positive_float
from vvae_fast.train.base.paths import resolve_data
from vvae_fast.train.data.sets import LIKELIHOODS, SPLITS, Dataset
from vvae_fast.train.run.gaps import GapSettings
from vvae_fast.train.run.runconfig import (
    ALL_UNITS,
    AMORTIZED,
    CHOICES,
    FLOWS,
    FULL,
    GATED_CONV,
    HOUSEHOLDER,
    MODELS,
    OWN_SETTINGS,
    PLANAR,
    VANILLA,
    RunConfig,
    data_digest,
)
from vvae_fast.train.study.compare import MATCHED, Model

Read = TypeVar("Read")

MODELS_EXAMPLE = "models: {vanilla: [0], amortized: [4, 16], amortized-rank32: [16]}"
# A key of models: amortized, amortized-rank32, amortized-sylvester-triangular, shared-sylvester-orthogonal-units16.
_FLOWS = "|".join(FLOWS[1:])
_MODEL = re.compile(rf"({'|'.join(MODELS)})(?:-({_FLOWS})(?:-units(\d+))?)?(?:-rank(\d+))?")


def _text(value: object, least: int = 1) -> str:
    if not isinstance(value, str) or len(value) < least or "\0" in value:
        raise ValueError
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _one_of(value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError
    return value


# The settings of a file, named like the command line's options: the function that reads each, which raises ValueError,
# and the words for what it expects.
SETTINGS: dict[str, tuple[Callable[[object], Any], str]] = {
    **dict.fromkeys(
        ("epochs", "batch_size", "latent_dim", "num_samples"), (lambda value: as_int(value, 1), "a positive int")
    ),
    **dict.fromkeys(
        ("warmup_epochs", "patience", "full_epochs"), (lambda value: as_int(value, 0), "an int of at least 0")
    ),
    "data": (_text, "a name or a path"),
    "array": (_text, "the name of an archive's array"),
    "lr": (as_positive_float, "a positive number"),
    **dict.fromkeys(("normalise", "layer_norm"), (_flag, "true or false")),
    "hidden": (lambda value: as_ints(value, 1), "a list of positive ints"),
    **{
        name: (partial(_one_of, choices=choices), f"one of {', '.join(choices)}")
        for name, choices in {**CHOICES, "likelihood": LIKELIHOODS}.items()
        if name not in OWN_SETTINGS
    },
}
# Left out, the data decide; the others are false or 0.
OPTIONAL = {"array", "likelihood", "normalise", "layer_norm", "full_epochs"}
ALWAYS = {  # what else every file has
    "models": f"a list of flow lengths for each kind, such as {MODELS_EXAMPLE}",
    "seeds": "a list of ints from 0 to 2^32 - 1",
}
OTHERS = {"protocol", "splits", "gaps", *ALWAYS}
GAP_KEYS = ("num_points", "iterations", "num_samples")  # q* has the model's own number of steps


@dataclass(frozen=True)
class Study:
    """The content of a file.

    Attributes:
        name: the file's name without its suffix.
        protocol: one line in words, for reports.
        settings: values of SETTINGS, without hidden for the convolutional network.
        splits: rows of train, val and test, or None.
        models: the table's rows.
        seeds: at least one.
        gaps: how the inference gaps of every run are measured, or None.
    """

    name: str
    protocol: str
    settings: dict[str, Any]
    splits: dict[str, int] | None
    models: list[Model]
    seeds: list[int]
    gaps: GapSettings | None = None

    def base(self, dataset: Dataset) -> RunConfig:
        """The configuration of the vanilla VAE with the first seed; the other runs differ only in model and seed."""
        hidden = tuple(self.settings.get("hidden", ()))
        settings = {**self.settings, "hidden": hidden, "data": dataset.name, "likelihood": dataset.likelihood}
        return RunConfig(VANILLA, 0, self.seeds[0], data_digest=data_digest(dataset), **settings)

    def check_splits(self, dataset: Dataset) -> None:
        """Raises RunError if the data set's splits are not those of the file."""
        came = {name: len(getattr(dataset, name)) for name in SPLITS}
        if self.splits is not None and self.splits != came:
            raise RunError(f"{self.name}: splits are {self.splits}, {dataset.name} has {came}; correct the file")


def load_study(path: Path, root: Path | None = None) -> Study:
    """Reads a study's file. Raises RunError if it cannot be read, lacks a key or has an unknown one.

    Args:
        path: the file.
        root: where the relative path of an array file starts; by default the file's folder.
    """
    content = _read(path)
    unknown = content.keys() - SETTINGS.keys() - OTHERS
    if unknown:
        raise RunError(f"{path}: unknown setting {min(unknown)}; known are {', '.join(sorted({*SETTINGS, *OTHERS}))}")
    conv = content.get("network") == GATED_CONV
    if conv and "hidden" in content:
        raise RunError(f"{path}: {GATED_CONV} has its own widths; remove hidden")
    left_out = {name for name in OPTIONAL if name not in content} | ({"hidden"} - content.keys() if conv else set())
    wanted = {**{name: words for name, (_, words) in SETTINGS.items() if name not in left_out}, **ALWAYS}
    missing = [f"{name} ({words})" for name, words in sorted(wanted.items()) if name not in content]
    if missing:
        raise RunError(f"{path} lacks settings; add {', '.join(missing)}")
    settings = {name: _read_as(*SETTINGS[name], path, name, content[name]) for name in SETTINGS if name not in left_out}
    settings["data"] = resolve_data(settings["data"], path.absolute().parent if root is None else root)
    protocol, splits = content.get("protocol", ""), content.get("splits")
    _read_as(lambda value: _text(value, least=0), "a line of text", path, "protocol", protocol)
    splits = None if splits is None else _read_as(_splits, f"rows of {', '.join(SPLITS)}", path, "splits", splits)
    seeds = _read_as(lambda value: as_ints(value, 0, MOST_SEED), ALWAYS["seeds"], path, "seeds", content["seeds"])
    models = _read_as(_models, ALWAYS["models"], path, "models", content["models"])
    gaps = content.get("gaps")
    if gaps is not None:
        gaps = _read_as(_gaps, f"positive ints {', '.join(GAP_KEYS)}", path, "gaps", gaps)
    return Study(path.stem, " ".join(protocol.split()), settings, splits, models, list(dict.fromkeys(seeds)), gaps)


def _read(path: Path) -> dict:
    yaml = require("yaml")
    try:
        content = yaml.safe_load(read_text(path))
    except FileNotFoundError as error:
        raise RunError(f"{path} cannot be read (No such file or directory); check the path of --config") from error
    except UnicodeDecodeError as error:
        raise RunError(
            f"{path} cannot be read (no text in UTF-8); give a YAML file, see configs/ for examples"
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read ({' '.join(str(error).split())}); correct the file") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RunError(f"{path} holds no settings; see configs/ for examples")
    return content


def _read_as(read: Callable[[object], Read], wanted: str, path: Path, name: str, value: object) -> Read:
    """The value as `read` reads it. Raises RunError if `read` raises ValueError."""
    try:
        return read(value)
    except TooLarge as error:
        wanted = f"{wanted}, each {error}" if isinstance(value, (list, dict)) else str(error)
    except ValueError:
        pass
    raise RunError(f"{path}: {name} must be {wanted}, got {value!r}; correct the file")


def _models(content: object) -> list[Model]:
    if not isinstance(content, dict) or not content:
        raise ValueError
    models = [model for name, lengths in content.items() for model in _models_of(name, lengths)]
    return list(dict.fromkeys(models))


def _models_of(name: object, lengths: object) -> list[Model]:
    if name == MATCHED:
        return [Model(VANILLA, 0, matched=num_steps) for num_steps in as_ints(lengths, 1)]
    found = _MODEL.fullmatch(_text(name))
    if found is None:
        raise ValueError
    kind, flow, units, rank = found.groups()
    if (rank and kind != AMORTIZED) or (flow and kind == VANILLA) or (units and flow == HOUSEHOLDER):
        raise ValueError
    read = as_ints(lengths, 0, 0) if kind == VANILLA else as_ints(lengths, 1)
    of_head, of_layer = as_int(rank, 1) if rank else FULL, as_int(units, 1) if units else ALL_UNITS
    return [Model(kind, num_steps, of_head, flow=flow or PLANAR, units=of_layer) for num_steps in read]


def _gaps(content: object) -> GapSettings:
    if not isinstance(content, dict) or content.keys() != set(GAP_KEYS):
        raise ValueError
    return GapSettings(num_steps=None, **{name: as_int(content[name], 1) for name in GAP_KEYS})


def _splits(content: object) -> dict[str, int]:
    if not isinstance(content, dict) or content.keys() != set(SPLITS):
        raise ValueError
    return {name: as_int(count, 1) for name, count in content.items()}
