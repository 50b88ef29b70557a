"""One run: a model trained with one seed, resumed where it was interrupted, and evaluated on the test set."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from vvae_fast.config import local_processes
from vvae_fast.nn.vae import VAE
from vvae_fast.train import processes
from vvae_fast.train.checkpoints import BEST, AtomicCheckpointIO, checkpoint_callbacks, load_checkpoint, load_last
from vvae_fast.train.data import Dataset, describe, make_loaders
from vvae_fast.train.environment import describe_environment
from vvae_fast.train.evaluation import evaluate
from vvae_fast.train.extras import require
from vvae_fast.train.files import RunError, make_folder, write_json
from vvae_fast.train.folder import (
    CONFIG,
    CSV,
    ENVIRONMENT,
    RESULT,
    TENSORBOARD,
    check_folder,
    check_same,
    load_result,
    locked,
)
from vvae_fast.train.module import CHECKPOINT_KEY, MONITOR, Report, VAEModule
from vvae_fast.train.networks import build_vae
from vvae_fast.train.runconfig import RunConfig

lightning = require("lightning.pytorch")
loggers = require("lightning.pytorch.loggers")
environments = require("lightning.pytorch.plugins.environments")

THREADS_FROM = 32_768  # numbers in a batch, torch's grain size of elementwise operations


def run(config: RunConfig, dataset: Dataset, folder: Path, report: Report | None = None) -> dict:
    """Trains, or goes on training, and evaluates the best epoch; a finished run is read from its folder.

    Returns:
        the result: model, num_steps, seed; the scores of `evaluate`; num_parameters;
        seconds_per_epoch (the median time of a training epoch), best_epoch, history (see VAEModule) and dataset, what
        was understood of the data (see data.describe).

    Raises:
        RunError: where the folder holds another run or another process works in it, and where training diverged.
        KeyboardInterrupt: on Ctrl-C; the next call goes on after the last finished epoch.
    """
    check_folder(config, folder)
    result = load_result(config, folder)
    if result is not None:
        if report is not None:
            report("already finished", result["history"])
        return result
    make_folder(folder)
    with locked(folder) if processes.is_first() else nullcontext():
        check_folder(config, folder)  # again: another process may have come first
        with _quiet_lightning(), _few_threads(config, dataset):
            if processes.is_first():
                write_json(folder / CONFIG, config.to_json())
                write_json(folder / ENVIRONMENT, describe_environment())
            result = _fit_and_evaluate(config, dataset, folder, report)
        if processes.is_first():
            write_json(folder / RESULT, result)
        processes.wait_for_all()
    return result


def _fit_and_evaluate(config: RunConfig, dataset: Dataset, folder: Path, report: Report | None) -> dict:
    history = fit(config, dataset, folder, report)
    if not any(math.isfinite(record["val_neg_elbo"]) for record in history):
        raise _diverged(folder, "the validation -ELBO", len(history))
    if report is not None:
        report("evaluating", history)
    vae, best_epoch = load_best(config, dataset, folder)
    scores = evaluate(vae, dataset, config.num_samples, config.seed)
    if not all(map(math.isfinite, scores.values())):
        raise _diverged(folder, "a score on the test set", best_epoch + 1)
    return {
        "model": config.model,
        "num_steps": config.num_steps,
        "seed": config.seed,
        **scores,
        "num_parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "seconds_per_epoch": statistics.median(record["seconds"] for record in history),
        "best_epoch": best_epoch,
        "history": history,
        "dataset": describe(dataset),
    }


def _diverged(folder: Path, what: str, epoch: int) -> RunError:
    return RunError(f"{folder}: training diverged, {what} is not finite after epoch {epoch}; lower --lr, with --fresh")


def fit(config: RunConfig, dataset: Dataset, folder: Path, report: Report | None = None) -> list[dict]:
    """Trains from the folder's last checkpoint, or from the start, to the end; returns the history (see VAEModule)."""
    last = load_last(folder)
    if last is not None and _is_finished(config, last[1]):
        return last[1][CHECKPOINT_KEY]["history"]
    lightning.seed_everything(config.seed, verbose=False)
    vae = build_vae(config, dataset)
    if last is not None:
        _load_weights(vae, last[1], last[0])  # Lightning loads them again; here a misfit has a clear message
        if report is not None:
            history = last[1][CHECKPOINT_KEY]["history"]
            report(f"resuming after epoch {len(history)}", history)
    module = VAEModule(vae, config, report)
    trainer = _make_trainer(config, folder)
    train, val, _ = make_loaders(dataset, config.batch_size, config.seed)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, train, val, ckpt_path=None if last is None else last[0], weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        # Lightning turns Ctrl-C into an exit and ignores the signal from then on.
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from None
    return module.history


def load_best(config: RunConfig, dataset: Dataset, folder: Path) -> tuple[VAE, int]:
    """The VAE of the epoch with the best validation -ELBO, in evaluation mode on the CPU, and that epoch."""
    path = folder / BEST
    if not path.is_file():
        raise RunError(f"{path} is missing, the finished run cannot be evaluated; use --fresh to repeat it")
    checkpoint = load_checkpoint(path)
    check_same(config, checkpoint[CHECKPOINT_KEY]["config"], path)
    return vae_of_checkpoint(checkpoint, path, config, dataset), checkpoint["epoch"]


def vae_of_checkpoint(checkpoint: dict, path: Path, config: RunConfig, dataset: Dataset) -> VAE:
    """The VAE that the checkpoint read from `path` holds, in evaluation mode on the CPU."""
    vae = build_vae(config, dataset)
    _load_weights(vae, checkpoint, path)
    return vae.eval()


def _load_weights(vae: VAE, checkpoint: dict, path: Path) -> None:
    try:
        vae.load_state_dict({key.removeprefix("vae."): value for key, value in checkpoint["state_dict"].items()})
    except RuntimeError as error:
        raise RunError(f"{path} is a checkpoint of another model; remove it or use --fresh") from error


def _is_finished(config: RunConfig, checkpoint: dict) -> bool:
    ours = checkpoint[CHECKPOINT_KEY]
    return len(ours["history"]) > 0 and (ours["stopped"] or len(ours["history"]) >= config.epochs)


def _make_trainer(config: RunConfig, folder: Path):
    callbacks = require("lightning.pytorch.callbacks")
    # Without a patience it stops at the first validation -ELBO that is not finite.
    patience = config.patience or config.epochs
    stopping = callbacks.EarlyStopping(MONITOR, patience=patience, check_on_train_epoch_end=False)
    environment = environments.TorchElasticEnvironment if processes.count() > 1 else environments.LightningEnvironment
    return lightning.Trainer(
        max_epochs=config.epochs,
        accelerator="auto",
        devices=local_processes(),
        num_nodes=processes.count() // local_processes(),
        strategy="ddp" if processes.count() > 1 else "auto",
        use_distributed_sampler=False,  # each process takes its share of every batch, see VAEModule
        callbacks=[stopping, *checkpoint_callbacks(folder)],
        logger=[
            loggers.CSVLogger(folder, name=CSV),  # a new version for each start: it would delete the old one's rows
            loggers.TensorBoardLogger(folder, name=TENSORBOARD, version=""),
        ],
        plugins=[AtomicCheckpointIO(), environment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=0,  # the means of epochs are logged, nothing within one
    )


@contextmanager
def _few_threads(config: RunConfig, dataset: Dataset) -> Iterator[None]:
    """Inside, torch runs one thread where a training step is too small to share: waiting for a busy core costs more."""
    threads = torch.get_num_threads()
    if config.batch_size * dataset.train[0].numel() < THREADS_FROM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Inside, Lightning's advice and device reports, which it logs at level INFO, are not shown."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Config and logs lie there too, and so do the checkpoints when a run goes on.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            # Every process logs what `processes.sum_over_all` made the same for all.
            warnings.filterwarnings("ignore", "It is recommended to use `self.log.* sync_dist=True")
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning 2.6 under torch 2.13
            yield
    finally:
        logger.setLevel(level)
