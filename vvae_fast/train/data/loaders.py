"""Batches from tensors kept in memory: whole batches by index, no per-sample collation.

Order and bits of the training set are pure functions of (seed, epoch, batch number): a resumed run draws exactly
what the uninterrupted run would have drawn, and no global random state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vvae_fast.train.base.extras import require

# These separate the streams of random numbers of one seed.
ORDER_STREAM, BITS_STREAM = 0, 1
LEVELS = 65535  # thresholds are 16-bit: 257 * 255, so the 256 grey levels of a byte are exact multiples


class Draw(NamedTuple):
    """The values that determine a batch."""

    epoch: int
    number: int
    rows: Tensor  # int64 [B]


class EpochSampler:
    """The rows of every batch of an epoch, shuffled by (seed, epoch); the last batch may be smaller.

    Lightning calls ``set_epoch`` on a loader's ``sampler`` before each epoch. It may call ``iter`` before that, so the
    epoch is read only at the first batch. An epoch without ``set_epoch`` repeats the last one.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        np, epoch = require("numpy"), self.epoch
        order = np.random.default_rng((self.seed, ORDER_STREAM, epoch)).permutation(self.num_rows)
        for number, rows in enumerate(torch.from_numpy(order).split(self.batch_size)):
            yield Draw(epoch, number, rows)


class StaticRows:
    """Batches of fixed rows x, float32 [N, *shape]."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.flatten(1)  # [N, prod(shape)]

    def __call__(self, draw: Draw) -> Tensor:
        return self.x.index_select(0, draw.rows)  # [B, prod(shape)]


class BinarizedRows:
    """Batches of new bits drawn from probabilities p, float32 [N, *shape] in [0, 1].

    Random 16-bit words are compared with thresholds round(65535 p): a third of the time of uniform floats.
    Probabilities 0 and 1 are certain; any other is off by less than 2.4e-5.
    """

    def __init__(self, p: Tensor, seed: int) -> None:
        self.seed = seed
        levels = p.flatten(1).numpy() * require("numpy").float32(LEVELS)  # [N, prod(shape)]
        self.thresholds = levels.round(out=levels).astype("uint16")

    def __call__(self, draw: Draw) -> Tensor:
        np = require("numpy")
        thresholds = self.thresholds.take(draw.rows.numpy(), axis=0)  # [B, prod(shape)]
        source = np.random.SFC64((self.seed, BITS_STREAM, draw.epoch, draw.number))
        words = source.random_raw(math.ceil(thresholds.size / 4)).view(np.uint16)[: thresholds.size]
        # The word 65535 is not below any threshold: the second term makes probability 1 certain.
        bits = (words.reshape(thresholds.shape) < thresholds) | (thresholds == LEVELS)
        return torch.from_numpy(bits.astype(np.float32))  # [B, prod(shape)]


class TrainLoader:
    """Each iteration is one epoch of the training set, float32 [B, prod(shape)]; no rows are dropped.

    Usable as Lightning's ``train_dataloaders``. Outside Lightning call ``set_epoch`` before each epoch.
    """

    def __init__(self, rows: Callable[[Draw], Tensor], sampler: EpochSampler) -> None:
        self.rows, self.sampler = rows, sampler

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.rows, self.sampler)


class EvalLoader:
    """The rows of x, float32 [N, *shape], in order: batches [B, prod(shape)] that are views, not copies."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        self.x, self.batch_size = x.flatten(1), batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x.split(self.batch_size))
