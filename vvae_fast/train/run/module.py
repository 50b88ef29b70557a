"""The VAE as a Lightning module."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast.nn.vae import VAE, ElboTerms
from vvae_fast.train.base.extras import require
from vvae_fast.train.run import processes
from vvae_fast.train.run.networks import build_optimizer
from vvae_fast.train.run.objective import free_energy, kl_weight, lr_factor
from vvae_fast.train.run.runconfig import RunConfig

lightning: Any = require("lightning.pytorch")

Report = Callable[[str, list[dict]], None]  # called with the stage and the finished epochs' records

MONITOR = "val/neg_elbo"
CHECKPOINT_KEY = "vvae_fast"  # our part of a checkpoint: {"config", "history", "stopped", "plans"}


class Share(NamedTuple):
    """This process's rows of a batch, x [B, P], which start at row `first` of the batch's `batch_size`."""

    x: Tensor
    first: int
    batch_size: int


class VAEModule(lightning.LightningModule):
    """Trains a VAE by its configuration.

    The random numbers of an epoch depend only on (seed, epoch), so that a resumed run repeats them.

    A validation -ELBO that is not finite is logged as NaN, because -inf would count as the best.

    Args:
        vae: the model.
        config: the optimiser, its learning rate and schedule, the KL warm-up and the seed of the noise, which reseeds
            torch's global generators at the start of each epoch. It is saved in every checkpoint.
        report: called with "training" and the history after each epoch, before its checkpoint is written.
        plans: the earlier planned numbers of epochs, and until which epoch each held; saved in every checkpoint.
        compiled: whether calls of the VAE are compiled. Then a call that is not compiled comes first, for the VAE's
            check of the first batch, which cannot be part of a graph.

    Attributes:
        history: a record for each finished epoch: epoch, beta, seconds (of training), and in nats train_neg_elbo,
            val_neg_elbo, val_reconstruction and val_kl.
        stopped: whether early stopping has ended the training.
    """

    def __init__(
        self,
        vae: VAE,
        config: RunConfig,
        report: Report | None = None,
        plans: Sequence[dict] = (),
        compiled: bool = False,
    ):
        super().__init__()
        self.vae, self.config, self.report, self.plans = vae, config, report, list(plans)
        self.compiled, self._is_checked = compiled, False
        self.history: list[dict[str, float]] = []
        self.stopped = False
        self._record: dict[str, float] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.config, self)

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Share:
        rows = processes.share(len(batch), processes.rank(), processes.count())
        return Share(batch[rows], rows.start, len(batch))

    def training_step(self, batch: Share, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self._start_epoch()
        terms = self._terms(batch)
        self._train_mean.add(terms[:1], len(batch.x))
        # Gradients are averaged over the processes: summed over the batch's rows, divided by the number of processes.
        return free_energy(terms, self._record["beta"], batch.batch_size) * processes.count()

    def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
        if batch_idx + 1 == self.trainer.num_training_batches:
            (self._record["train_neg_elbo"],) = self._train_mean.items()  # waits for the device
            self._record["seconds"] = time.perf_counter() - self._started

    def on_validation_epoch_start(self) -> None:
        # The same noise in every epoch, so that only the model differs between epochs.
        self._val_generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self._val_mean = _RunningMean()

    def validation_step(self, batch: Share, batch_idx: int) -> None:
        self._val_mean.add(self._terms(batch, self._val_generator), len(batch.x))

    def on_validation_epoch_end(self) -> None:
        values = dict(zip(ElboTerms._fields, self._val_mean.items(), strict=True))
        self._record.update({f"val_{name}": value for name, value in values.items()})
        logged = {name: value if math.isfinite(value) else math.nan for name, value in values.items()}
        self.log_dict({f"val/{name}": value for name, value in logged.items()})

    def on_train_epoch_end(self) -> None:
        record = self._record
        self.log_dict(
            {"train/neg_elbo": record["train_neg_elbo"], "beta": record["beta"], "seconds": record["seconds"]}
        )
        self.history.append(record)
        if self.report is not None:
            self.report("training", self.history)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.stopped = self.trainer.should_stop
        checkpoint[CHECKPOINT_KEY] = {
            "config": self.config.to_json(),
            "history": self.history,
            "stopped": self.stopped,
            "plans": self.plans,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = checkpoint[CHECKPOINT_KEY]["history"]

    def _terms(self, batch: Share, generator: torch.Generator | None = None) -> ElboTerms:
        """The terms of this process's rows, with these rows' part of the noise for the whole batch."""
        noise = torch.randn(batch.batch_size, self.vae.latent_dim, generator=generator, device=self.device)
        noise = noise[batch.first : batch.first + len(batch.x)]
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs have been read
            if self.training and not self._is_checked:
                self.vae.elbo_terms(batch.x, noise=noise)  # no call of the module: not compiled
                self._is_checked = len(batch.x) > 0
        return self.vae(batch.x, noise=noise)

    def _start_epoch(self) -> None:
        epoch, config = self.current_epoch, self.config
        self._started = time.perf_counter()
        torch.manual_seed(zlib.crc32(f"{config.seed} {epoch}".encode()))
        for group in self.optimizers().param_groups:
            share = group.get("lr_share", 1.0)  # an older version's checkpoint has one group without it
            group["lr"] = config.lr * lr_factor(epoch, config.epochs, config.schedule) * share
        self._record = {"epoch": epoch, "beta": kl_weight(epoch, config.warmup_epochs)}
        self._train_mean = _RunningMean()


class _RunningMean:
    """Means over data points of [B] tensors, kept on their device: reading a number would wait for the GPU."""

    def __init__(self) -> None:
        self.sums = torch.zeros(())
        self.count = 0

    def add(self, terms: tuple[Tensor, ...], count: int) -> None:
        self.sums = self.sums + torch.stack([term.detach().sum() for term in terms])
        self.count += count

    def items(self) -> list[float]:
        """Over all processes' data points."""
        count = torch.tensor(float(self.count), dtype=torch.float64)
        return (processes.sum_over_all(self.sums) / processes.sum_over_all(count).item()).tolist()
