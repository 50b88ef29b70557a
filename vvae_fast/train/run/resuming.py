"""Prepares a checkpoint for Lightning to continue from. It is checked first, since Lightning itself checks nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast.nn.vae import VAE
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import RunError
from vvae_fast.train.run.module import CHECKPOINT_KEY
from vvae_fast.train.run.networks import build_optimizer
from vvae_fast.train.run.runconfig import RunConfig

callbacks = require("lightning.pytorch.callbacks")

LOOPS = ("fit", "validate", "test", "predict")
PATH_KEYS = ("best_model_path", "kth_best_model_path", "last_model_path")  # in a ModelCheckpoint's state
REMARK = "stopping_reason_message"  # in EarlyStopping's state: None or a text, without effect


def for_lightning(checkpoint: dict, path: Path, model: nn.Module, config: RunConfig, trainer: Any) -> dict:
    """The checkpoint at `path`, in the form from which Lightning's trainer can continue in the same folder.

    Args:
        checkpoint: see `load_checkpoint`; it is not changed.
        model: the run's model.
        trainer: the one that will continue.

    Raises:
        RunError: a part of it has another structure than this trainer's checkpoints.
    """
    checkpoint = _migrated(copy.copy(checkpoint), path)
    problem = _problem(checkpoint, model, config, trainer)
    if problem is not None:
        raise RunError(
            f"{path} cannot be gone on from: {problem}; it is damaged or of another version of Lightning: remove it or "
            "use --fresh"
        )
    states = checkpoint["callbacks"]
    kept = [callback for callback in trainer.callbacks if callback.state_key in states]
    return {**checkpoint, "callbacks": {c.state_key: _of_this_run(states[c.state_key], c) for c in kept}}


def after_cut(checkpoint: dict, vae: VAE, cut: Callable[[], None], config: RunConfig, trainer: Any) -> dict:
    """What `for_lightning` gave, after the head has been cut: the optimizer knows nothing of the new head, and early
    stopping and the best epoch nothing of the epochs before.

    Args:
        checkpoint: the last one before, whose weights `vae` has; it is not changed.
        cut: gives `vae` another flow.
        trainer: the one that will continue.
    """
    before = build_optimizer(config, vae)
    before.load_state_dict(copy.deepcopy(checkpoint["optimizer_states"][0]))
    cut()
    after = _stepped(config, vae)
    for parameter, state in after.state.items():
        state.update(before.state.get(parameter) or {name: torch.zeros_like(value) for name, value in state.items()})
    return {
        **checkpoint,
        "state_dict": {f"vae.{name}": value for name, value in vae.state_dict().items()},
        "optimizer_states": [after.state_dict()],
        "callbacks": {c.state_key: _forgetful(checkpoint["callbacks"][c.state_key], c) for c in trainer.callbacks},
    }


def differs(wanted: object, got: object, where: str) -> str | None:
    """The first place where `got` has another structure than `wanted`; None if the structures are the same.

    Dictionaries must have the same keys, lists the same length, tensors the same shape and dtype, other values the same
    type. None allows None or one number in a tensor; an empty dictionary allows a dictionary of these.
    """
    if isinstance(wanted, dict):
        if not isinstance(got, dict) or (wanted and got.keys() != wanted.keys()):
            return where
        if not wanted:
            return None if all(isinstance(key, str) and _is_number(value) for key, value in got.items()) else where
        pairs = [(wanted[key], got[key], f"{where}.{key}") for key in wanted]
    elif isinstance(wanted, (list, tuple)):
        if not isinstance(got, type(wanted)) or len(got) != len(wanted):
            return where
        pairs = [(*pair, f"{where}[{number}]") for number, pair in enumerate(zip(wanted, got, strict=True))]
    elif isinstance(wanted, Tensor):
        traits = ("shape", "dtype", "layout")
        alike = isinstance(got, Tensor) and all(getattr(got, trait) == getattr(wanted, trait) for trait in traits)
        return None if alike else where
    else:
        return None if type(got) is type(wanted) or (wanted is None and _is_number(got)) else where
    return next((found for pair in pairs if (found := differs(*pair)) is not None), None)


def _is_number(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _migrated(checkpoint: dict, path: Path) -> dict:
    """The checkpoint after Lightning's own changes, for one from an older version of Lightning."""
    version = checkpoint["pytorch-lightning_version"]
    parse = require("packaging.version")
    try:
        newer = parse.Version(version) > parse.Version(require("lightning").__version__)
    except (parse.InvalidVersion, TypeError) as error:
        raise RunError(f"{path}: '{version}' is no version of Lightning; remove it or use --fresh") from error
    if newer:
        raise RunError(f"{path} was written by Lightning {version}; update Lightning or use --fresh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        migrated, _ = require("lightning.pytorch.utilities.migration").migrate_checkpoint(checkpoint)
    return migrated


def _problem(checkpoint: dict, model: nn.Module, config: RunConfig, trainer: Any) -> str | None:
    """The problem with a checkpoint, in words; None if there is none."""
    history, epoch = checkpoint[CHECKPOINT_KEY]["history"], checkpoint["epoch"]
    if len(history) != epoch + 1 or [record["epoch"] for record in history] != list(range(epoch + 1)):
        return f"it is of epoch {epoch + 1}, and its history has {len(history)} epochs"
    if not isinstance(checkpoint["callbacks"], dict):
        return "callbacks is not what it should be"
    wanted, got = _structure(model, config, trainer), {key: checkpoint[key] for key in ("global_step", "lr_schedulers")}
    for callback in trainer.callbacks:
        wanted[callback.state_key] = _without_remark(callback.state_dict())
        got[callback.state_key] = _without_remark(checkpoint["callbacks"].get(callback.state_key, {}))
    got |= {
        "loops": checkpoint["loops"],
        "optimizer_states": _with_known_settings(checkpoint["optimizer_states"], wanted),
    }
    place = differs(wanted, got, "")
    if place is not None:
        return f"{place.removeprefix('.')} is not what it should be"
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return None if done == len(history) else f"its loop has run {done} epochs, and its history has {len(history)}"


def _structure(model: nn.Module, config: RunConfig, trainer: Any) -> dict:
    """The structure of this trainer's checkpoints after a step."""
    return {
        "global_step": 0,
        "lr_schedulers": [],
        "loops": {f"{name}_loop": getattr(trainer, f"{name}_loop").state_dict() for name in LOOPS},
        "optimizer_states": [_stepped(config, copy.deepcopy(model)).state_dict()],
    }


def _stepped(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The model's optimizer after a step along gradients of zero, which moves nothing."""
    optimizer = build_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _with_known_settings(states: Any, wanted: dict) -> object:
    """The optimizers' states with all settings that this PyTorch has in a parameter group: defaults for those that an
    older PyTorch did not write."""
    known = wanted["optimizer_states"][0]["param_groups"]
    try:
        (state,) = states
        groups = [
            {**group, **{key: value for key, value in came.items() if key in group}, "params": came["params"]}
            for group, came in zip(known, state["param_groups"], strict=True)
        ]
        return [{**state, "param_groups": groups}]
    except (TypeError, ValueError, LookupError, AttributeError):
        return states  # not a state; `differs` will report it


def _without_remark(state: object) -> object:
    return {key: value for key, value in state.items() if key != REMARK} if isinstance(state, dict) else state


def _forgetful(state: dict, callback: Any) -> dict:
    """A callback's state in which any finite score is the best so far."""
    if isinstance(callback, callbacks.EarlyStopping):
        return callback.state_dict()
    if callback.monitor is None:
        return state
    worst = torch.tensor(torch.inf)
    models = dict.fromkeys(state["best_k_models"], worst)  # not none: then a score that is NaN would be the best
    return {**state, "best_model_score": worst, "kth_value": worst, "best_k_models": models}


def _of_this_run(state: dict, callback: Any) -> dict:
    """A callback's state with the current folder and patience: Lightning would forget the best of a moved folder."""
    if isinstance(callback, callbacks.EarlyStopping):
        return {**state, "patience": callback.patience}
    if not isinstance(callback, callbacks.ModelCheckpoint):
        return state

    def moved(path: str) -> str:
        return str(Path(callback.dirpath) / Path(path).name) if path else path

    models = {moved(path): score for path, score in state["best_k_models"].items()}
    paths = {key: moved(state[key]) for key in PATH_KEYS}
    return {**state, **paths, "dirpath": callback.dirpath, "best_k_models": models}
