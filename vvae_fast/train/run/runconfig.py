"""The settings that decide a run's result, as files record them."""

from __future__ import annotations

import json
import zlib
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from vvae_fast.nn.sylvester.flows import KINDS
from vvae_fast.train.base import outcome
from vvae_fast.train.data.sets import SPLITS, Dataset

VANILLA, AMORTIZED, SHARED = "vanilla", "amortized", "shared"
MODELS = (VANILLA, AMORTIZED, SHARED)
FULL = 0  # the rank that stands for a full head in files
UNMATCHED = 0  # a vanilla VAE with the requested widths
PLANAR, HOUSEHOLDER = "planar", "householder"
SYLVESTER = "sylvester-"  # and the kind
FLOWS = (PLANAR, *(SYLVESTER + kind for kind in KINDS), HOUSEHOLDER)
ALL_UNITS = 0  # M = D, and for flows that have no units


def is_sylvester(flow: str) -> bool:
    """Whether num_steps are the L layers of the flow, of M units each, and not K steps."""
    return flow.startswith(SYLVESTER)


def length(flow: str, num_steps: int, joined: str = "") -> str:
    """K16, or L4 of a Sylvester flow, with `joined` in between."""
    return f"{'L' if is_sylvester(flow) else 'K'}{joined}{num_steps}"


MLP, GATED_MLP, GATED_CONV = "mlp", "gated-mlp", "gated-conv"
ADAM, ADAMAX = "adam", "adamax"
COSINE, CONSTANT = "cosine", "constant"
CHOICES = {
    "model": MODELS,
    "network": (MLP, GATED_MLP, GATED_CONV),
    "optimizer": (ADAM, ADAMAX),
    "schedule": (COSINE, CONSTANT),
}
# Keys of a result and of an epoch's record in its history.
SCORES = ("neg_elbo", "nll", "gap", "kl", "reconstruction", "active_units")
OWN_SETTINGS = ("model", "flow", "num_steps", "units", "rank", "matched", "seed")  # that differ between a table's runs
RECORD = (
    *OWN_SETTINGS,
    *SCORES,
    "num_parameters",
    "seconds_per_epoch",
    *outcome.OUTCOME,
)
RESULT_KEYS = {*RECORD, "best_epoch", "history", "dataset", "num_samples", "earlier_plans"}
# The first versions' results lack these keys. Their values are defaults; a finished run is evaluated again for them.
LATER = {"flow": PLANAR, "units": ALL_UNITS, "rank": FULL, "matched": UNMATCHED}  # of results without these keys
ADDED: dict[str, Any] = {
    **dict.fromkeys(("gap", "active_units", "num_parameters", "epochs_done", "epochs_planned", "num_samples"), 0),
    **{"dataset": {}, "status": outcome.FINISHED, "reason": None, "earlier_plans": []},
}
PLAN_KEYS = {"epochs", "until"}
EPOCH_KEYS = {"epoch", "beta", "seconds", "train_neg_elbo", "val_neg_elbo", "val_reconstruction", "val_kl"}


@dataclass(frozen=True)
class RunConfig:
    """All settings that decide a run's result. `data` names the data set; `data_digest` is its content's checksum.

    A field with a default was added later: files of older versions lack it, and the default is the value they used.
    """

    model: str
    num_steps: int
    seed: int
    data: str
    data_digest: str
    epochs: int
    batch_size: int
    latent_dim: int
    hidden: tuple[int, ...]  # the encoder's widths; empty for gated-conv, which has fixed ones
    lr: float
    warmup_epochs: int
    patience: int  # stop after so many epochs without a better validation -ELBO; 0 for never
    num_samples: int  # importance samples for the NLL
    network: str = MLP
    optimizer: str = ADAM
    schedule: str = COSINE  # of the learning rate
    likelihood: str = ""  # of the data; an older version left it to the digest
    array: str = ""  # the requested array of an archive
    rank: int = FULL  # of an amortized flow's head; FULL for the one without a rank
    matched: int = UNMATCHED  # K of the amortized flow whose parameters the widths of this vanilla VAE are to match
    normalise: bool = False  # an amortized flow's features, whatever their size
    flow: str = PLANAR  # of FLOWS; num_steps is K, or L layers of a Sylvester flow
    units: int = ALL_UNITS  # M of a Sylvester flow
    layer_norm: bool = False  # between the two layers of a head with a rank
    full_epochs: int = 0  # in which a head with a rank is still full; then it is cut

    @property
    def name(self) -> str:
        """The run's folder."""
        flow = "" if self.flow == PLANAR else f"-{self.flow}"
        units = "" if self.units == ALL_UNITS else f"-M{self.units}"
        steps = length(self.flow, self.num_steps)
        model = self.model if self.model == VANILLA else f"{self.model}{flow}-{steps}{units}"
        full = f"-full{self.full_epochs}" if self.full_epochs else ""
        rank = "" if self.rank == FULL else f"-rank{self.rank}{full}"
        matched = "" if self.matched == UNMATCHED else f"-matched{self.matched}"
        normalise = ("-layer-norm" if self.layer_norm else "") + ("-normalised" if self.normalise else "")
        return f"{model}{rank}{normalise}{matched}-seed{self.seed}"

    def uncut(self) -> RunConfig:
        """The configuration of the VAE of the first `full_epochs` epochs."""
        return replace(self, rank=FULL, full_epochs=0) if self.full_epochs else self

    def is_cut(self, epochs_done: int) -> bool:
        """Whether the head has its rank after so many epochs."""
        return epochs_done > self.full_epochs or not self.full_epochs

    def to_json(self) -> dict:
        return {**asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_json(cls, content: dict) -> RunConfig:
        return cls(**{**content, "hidden": tuple(content["hidden"])})


def with_defaults(content: dict) -> dict:
    """A configuration's JSON object, with defaults for the fields that an older version did not write."""
    defaults = {field.name: field.default for field in fields(RunConfig) if field.default is not MISSING}
    return {**defaults, **content}


def is_config(content: object) -> bool:
    """Whether RunConfig.to_json of this version or an older one can return this, by keys and types."""
    kinds = {field.name: str(field.type) for field in fields(RunConfig)}
    if not isinstance(content, dict) or (content := with_defaults(content)).keys() != kinds.keys():
        return False
    if not all(_has_type(content[name], kind) for name, kind in kinds.items()):
        return False
    has_widths = len(content["hidden"]) > 0
    return has_widths != (content["network"] == GATED_CONV) and all(
        content[name] in choices for name, choices in {**CHOICES, "flow": FLOWS}.items()
    )


def differing_only_in_length(config: RunConfig, content: dict) -> dict:
    """`content`, a run's recorded configuration, with the fields that may differ taken from `config`.

    More epochs than the run had planned make it longer, and importance samples do not change the training.
    """
    planned = content.get("epochs")
    epochs = config.epochs if type(planned) is int and planned <= config.epochs else planned
    return {**content, "epochs": epochs, "num_samples": config.num_samples}


def are_plans(content: object) -> bool:
    """Whether this is a list of a run's earlier plans: a planned number of epochs, and until which epoch it held."""
    return isinstance(content, list) and all(
        isinstance(plan, dict) and plan.keys() == PLAN_KEYS and all(type(value) is int for value in plan.values())
        for plan in content
    )


def is_history(content: object) -> bool:
    """Whether this is a list of records of epochs."""
    return isinstance(content, list) and all(
        isinstance(record, dict) and record.keys() == EPOCH_KEYS and all(map(is_number, record.values()))
        for record in content
    )


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def _has_type(value: object, kind: str) -> bool:
    if kind == "tuple[int, ...]":
        return isinstance(value, list) and all(type(item) is int for item in value)
    kinds = {"str": str, "bool": bool, "int": int}
    return is_number(value) if kind == "float" else type(value) is kinds[kind]


def data_digest(dataset: Dataset) -> str:
    """A checksum of the three splits, their shapes, and the facts that the model uses."""
    splits = {name: getattr(dataset, name) for name in SPLITS}
    shapes = {name: list(x.shape) for name, x in splits.items()}
    header = [shapes, dataset.likelihood, dataset.total_count, dataset.dynamic]
    checksum = zlib.crc32(json.dumps(header).encode())
    for x in splits.values():
        checksum = zlib.crc32(x.contiguous().numpy(), checksum)
    return f"{checksum:08x}"
