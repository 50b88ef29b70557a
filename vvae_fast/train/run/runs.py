"""One run: a model trained with one seed, continued after an interruption, and evaluated on the test set."""

from __future__ import annotations

import logging
import math
import signal
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vvae_fast.nn.vae import VAE
from vvae_fast.train.base import outcome
from vvae_fast.train.base.environment import describe_environment
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import RunError, make_folder, write_json
from vvae_fast.train.base.memory import telling_memory
from vvae_fast.train.base.paths import resolve_data
from vvae_fast.train.data.sets import Dataset, LikelihoodError, describe, load_dataset, make_loaders
from vvae_fast.train.run import compiling, processes
from vvae_fast.train.run.checkpoints import (
    BEST,
    AtomicCheckpointIO,
    advice_to_a_reader,
    best_of,
    checkpoint_callbacks,
    load_checkpoint,
    load_last,
    origin,
)
from vvae_fast.train.run.evaluation import evaluate
from vvae_fast.train.run.folder import (
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
from vvae_fast.train.run.module import CHECKPOINT_KEY, MONITOR, Report, VAEModule
from vvae_fast.train.run.networks import build_vae, check_fits, cut_head
from vvae_fast.train.run.resuming import after_cut, differs, for_lightning
from vvae_fast.train.run.runconfig import COSINE, OWN_SETTINGS, SCORES, RunConfig, data_digest

lightning = require("lightning.pytorch")
loggers = require("lightning.pytorch.loggers")
environments: Any = require("lightning.pytorch.plugins.environments")

THREADS_FROM = 32_768  # numbers in a batch: torch's grain size for elementwise operations


def run(
    config: RunConfig, dataset: Dataset, folder: Path, report: Report | None = None, compile_: bool = False
) -> dict:
    """Trains, or continues to train, and evaluates the best epoch; a finished run is read from its folder.

    `compile_` compiles the VAE's calls in training and validation, see `compiling`. The results are the same up to
    rounding, and a run may continue with or without it.

    Returns:
        the result: OWN_SETTINGS; the scores of `evaluate`; num_parameters;
        seconds_per_epoch (the median time of a training epoch, after the head's cut if there is one); how it ended (see
        `outcome`); best_epoch, num_samples, earlier_plans and history (see VAEModule); and dataset (see data.describe).
        The scores of a run that diverged are those of its best epoch; if it has none, they and best_epoch are None.

    Raises:
        RunError: if the network does not fit the data, the rank is too large, the folder holds another run, another
            process works in it, memory runs out, or torch.compile fails.
        KeyboardInterrupt: on Ctrl-C; the next call continues after the last finished epoch.
    """
    check_fits(config, dataset)
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
                write_json(folder / ENVIRONMENT, describe_environment(compiling.mode() if compile_ else None))
            result = _fit_and_evaluate(config, dataset, folder, report, compile_)
        if processes.is_first():
            write_json(folder / RESULT, result)
        processes.wait_for_all()
    return result


def _fit_and_evaluate(config: RunConfig, dataset: Dataset, folder: Path, report: Report | None, compile_: bool) -> dict:
    with telling_memory("training", "lower --batch-size, --hidden, --latent-dim or --steps"):
        training = fit(config, dataset, folder, report, compile_)
    history = training.history
    ended = outcome.of_training(history, training.planned, training.stopped, config.full_epochs)
    if outcome.best_epoch(history) is None:
        vae, best_epoch = build_vae(config, dataset), None
        scores: dict[str, Any] = dict.fromkeys(SCORES)
    else:
        if report is not None:
            report("evaluating", history)
        with telling_memory("evaluating", "its batches are fixed: lower --hidden or --latent-dim, or free memory"):
            vae, best_epoch = load_best(config, dataset, folder)
            scores = evaluate(vae, dataset, config.num_samples, config.seed)
        ended = outcome.with_scores(ended, scores)
    return {
        **{name: getattr(config, name) for name in OWN_SETTINGS},
        **{name: value if value is not None and math.isfinite(value) else None for name, value in scores.items()},
        "num_parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "seconds_per_epoch": statistics.median(r["seconds"] for r in history[config.full_epochs :] or history),
        **ended,
        "best_epoch": best_epoch,
        "num_samples": config.num_samples,
        "earlier_plans": training.plans,
        "history": history,
        "dataset": describe(dataset),
    }


class Training(NamedTuple):
    """The outcome of a training: history and earlier plans (see VAEModule), and whether it stopped early."""

    history: list[dict]
    stopped: bool
    planned: int  # epochs
    plans: list[dict]


def fit(
    config: RunConfig, dataset: Dataset, folder: Path, report: Report | None = None, compile_: bool = False
) -> Training:
    """Trains from the folder's last checkpoint, or from the start, to the end; see `run` for its arguments.

    A run that had fewer planned epochs continues to those of `config`, with the learning rates of `config`. One whose
    head is cut is trained in two parts, each as if it went on after an interruption.
    """
    last = load_last(folder)
    if last is not None and _is_finished(config, last[1]):
        return _training_of(last[1])
    while not config.is_cut(1 + _epochs_done(last)):
        training = _fit_until(config.full_epochs, config, dataset, folder, last, report, compile_)
        if training.stopped:
            return training
        processes.wait_for_all()
        last = load_last(folder)
    return _fit_until(config.epochs, config, dataset, folder, last, report, compile_)


def _epochs_done(last: tuple[Path, dict] | None) -> int:
    return 0 if last is None else len(last[1][CHECKPOINT_KEY]["history"])


def _fit_until(
    epochs: int,
    config: RunConfig,
    dataset: Dataset,
    folder: Path,
    last: tuple[Path, dict] | None,
    report: Report | None,
    compile_: bool,
) -> Training:
    """Trains from `last`, what `load_last` gave, until so many epochs are done."""
    lightning.seed_everything(config.seed, verbose=False)
    done = _epochs_done(last)
    vae = build_vae(config if config.is_cut(done) else config.uncut(), dataset)
    checkpoint_io, plans = AtomicCheckpointIO(), []
    trainer = _make_trainer(config, epochs, folder, checkpoint_io, compile_)
    if last is not None:
        path, checkpoint = last
        stage = _resuming(config, checkpoint, path)
        _load_weights(vae, checkpoint, path)  # Lightning loads them again; here the message for a misfit is clear
        resumed = for_lightning(checkpoint, path, vae, config, trainer)
        if not config.is_cut(done) and config.is_cut(epochs):
            resumed = after_cut(resumed, vae, lambda: cut_head(vae, config, dataset), config, trainer)
            stage = f"its head is cut to rank {config.rank}, {stage}"
        checkpoint_io.resumed = resumed
        plans = _earlier_plans(config, checkpoint)
        if report is not None:
            report(stage, checkpoint[CHECKPOINT_KEY]["history"])
    module = VAEModule(vae, config, report, plans, compile_)
    train, val, _ = make_loaders(dataset, config.batch_size, config.seed)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with compiling.compiled(vae, compile_):
            trainer.fit(module, train, val, ckpt_path=None if last is None else last[0], weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        # Lightning turns Ctrl-C into an exit and ignores the signal from then on.
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from None
    if not module.stopped and len(module.history) < epochs:
        raise RunError(f"{folder}: training ended after {len(module.history)} of {epochs} epochs; use --fresh")
    return Training(module.history, module.stopped, config.epochs, plans)


def _training_of(checkpoint: dict) -> Training:
    ours = checkpoint[CHECKPOINT_KEY]
    return Training(ours["history"], ours["stopped"], ours["config"]["epochs"], ours.get("plans", []))


def _earlier_plans(config: RunConfig, checkpoint: dict) -> list[dict]:
    """The plans, before that of `config`, of a run that continues from a checkpoint."""
    ours = checkpoint[CHECKPOINT_KEY]
    plans, planned = ours.get("plans", []), ours["config"]["epochs"]
    return plans if planned == config.epochs else [*plans, {"epochs": planned, "until": len(ours["history"])}]


def _resuming(config: RunConfig, checkpoint: dict, path: Path) -> str:
    """The stage, for progress, of a run that continues from a checkpoint."""
    ours = checkpoint[CHECKPOINT_KEY]
    stage, planned = f"resuming after epoch {len(ours['history'])}{origin(path)}", ours["config"]["epochs"]
    if planned == config.epochs:
        return stage
    if config.schedule == COSINE:
        rate = (
            f"from here on its learning rate is that of {config.epochs} epochs, so it is not a run of {config.epochs}"
        )
    else:
        rate = f"it ends as a run of {config.epochs} does"
    return f"{stage}, with {config.epochs} epochs in place of {planned}: {rate}"


def load_best(config: RunConfig, dataset: Dataset, folder: Path) -> tuple[VAE, int]:
    """The VAE of the epoch with the best validation -ELBO, in evaluation mode on the CPU, and that epoch."""
    path = folder / BEST
    if not path.is_file():
        raise RunError(f"{path} is missing, the finished run cannot be evaluated; use --fresh to repeat it")
    checkpoint = load_checkpoint(path)
    check_same(config, checkpoint[CHECKPOINT_KEY]["config"], path)
    return vae_of_checkpoint(checkpoint, path, config, dataset), checkpoint["epoch"]


def vae_of_checkpoint(
    checkpoint: dict, path: Path, config: RunConfig, dataset: Dataset, advice: str | None = None
) -> VAE:
    """The VAE that the checkpoint read from `path` holds, in evaluation mode on the CPU, with the configuration's rank
    also where the checkpoint's head is still full."""
    is_cut = config.is_cut(checkpoint["epoch"] + 1)
    vae = build_vae(config if is_cut else config.uncut(), dataset)
    _load_weights(vae, checkpoint, path, advice)
    if not is_cut:
        cut_head(vae, config, dataset)
    return vae.eval()


class Trained(NamedTuple):
    """What a checkpoint holds: the epoch from 0, the run's configuration, its data, and the VAE as it was then."""

    epoch: int
    config: RunConfig
    dataset: Dataset
    vae: VAE


def load_trained(path: Path, data: str | None, root: Path | None) -> Trained:
    """The VAE of a run's folder or checkpoint with its data: `data`, if given, in place of the name or path it tells.

    Raises RunError if there is no checkpoint of this package or it was trained on other data.
    """
    path = best_of(path)
    advice = advice_to_a_reader(path)
    checkpoint = load_checkpoint(path, advice)
    config = RunConfig.from_json(checkpoint[CHECKPOINT_KEY]["config"])
    choices = {"array": config.array or None, "likelihood": config.likelihood or None}
    came = "now there" if data is None else f"in {data}"
    other = (
        f"{path} was trained on other data ({config.data}) than those {came}; pass the run's own with --data, --root; "
        "for new rows call the VAE that load_run gives: docs/arrays.md"
    )
    try:
        dataset = load_dataset(resolve_data(data or config.data, root), root, **choices)
    except LikelihoodError as error:
        raise RunError(other) from error
    if data_digest(dataset) != config.data_digest:
        raise RunError(other)
    return Trained(checkpoint["epoch"], config, dataset, vae_of_checkpoint(checkpoint, path, config, dataset, advice))


def _load_weights(vae: VAE, checkpoint: dict, path: Path, advice: str | None = None) -> None:
    weights = {key.removeprefix("vae."): value for key, value in checkpoint["state_dict"].items()}
    if differs(dict(vae.state_dict()), weights, "") is not None:
        raise RunError(f"{path} is a checkpoint of another model; {advice or 'remove it or use --fresh'}")
    vae.load_state_dict(weights)


def _is_finished(config: RunConfig, checkpoint: dict) -> bool:
    ours = checkpoint[CHECKPOINT_KEY]
    return len(ours["history"]) > 0 and (ours["stopped"] or len(ours["history"]) >= config.epochs)


def _make_trainer(
    config: RunConfig, epochs: int, folder: Path, checkpoint_io: AtomicCheckpointIO, compile_: bool
) -> Any:
    callbacks = require("lightning.pytorch.callbacks")
    # Without a patience it stops at the first validation -ELBO that is not finite; so it does before a head is cut.
    patience = config.patience if config.patience and config.is_cut(epochs) else config.epochs
    stopping = callbacks.EarlyStopping(MONITOR, patience=patience, check_on_train_epoch_end=False)
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=processes.local_count(),
        num_nodes=processes.count() // processes.local_count(),
        strategy="ddp" if processes.count() > 1 else "auto",
        use_distributed_sampler=False,  # each process takes its share of every batch, see VAEModule
        callbacks=[stopping, *checkpoint_callbacks(folder)],
        logger=[
            loggers.CSVLogger(folder, name=CSV),  # each start has a new version, since it would delete the old rows
            loggers.TensorBoardLogger(folder, name=TENSORBOARD, version=""),
        ],
        plugins=[checkpoint_io, _cluster()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=not compile_,  # else torch.no_grad, which torch.compile needs
        log_every_n_steps=0,  # only the means of epochs are logged
    )


class _OneProcess(environments.LightningEnvironment):
    """Ignores what the environment says about other processes: `processes` has found that there are none."""

    creates_processes_externally = False

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        """Lightning's removes WORLD_SIZE from the environment."""


def _cluster() -> Any:
    if processes.count() > 1:
        return environments.TorchElasticEnvironment()
    cluster = _OneProcess()
    cluster.set_global_rank(0)  # Lightning takes the rank from the environment when it is imported
    return cluster


@contextmanager
def _few_threads(config: RunConfig, dataset: Dataset) -> Iterator[None]:
    """Inside the block, torch uses one thread if a training step is small: then waiting for a busy core costs more."""
    threads = torch.get_num_threads()
    if config.batch_size * dataset.train[0].numel() < THREADS_FROM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hides Lightning's advice and device reports, which it logs at level INFO, inside the block."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # The folder also has config and logs, and, when a run continues, checkpoints.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            # Every process logs what `processes.sum_over_all` made the same for all.
            warnings.filterwarnings("ignore", "It is recommended to use `self.log.* sync_dist=True")
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # inductor's, on a GPU
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning 2.6 under torch 2.13
            yield
    finally:
        logger.setLevel(level)
