"""Several processes that train one model: torchrun starts them, and each takes its share of every batch's rows.

Every process draws the random numbers of the whole batch, and keeps those of its own rows. So a run's losses and scores
do not depend on the number of processes, up to rounding. Only the first process writes files and prints. The others
read the files, so all machines need one shared folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vvae_fast import config
from vvae_fast.train.base.files import RunError

T = TypeVar("T")


@contextmanager
def connected() -> Iterator[None]:
    """Inside the block, the processes that torchrun started are a group: over nccl on GPUs, else over gloo.

    Without torchrun there is one process, and nothing to do: see `config.launch`.

    Raises:
        RunError: if torchrun's variables are not valid.
    """
    if not (dist.is_available() and is_launched()):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(config.local_rank())
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except dist.DistError as error:
        raise RunError(
            f"torchrun's processes do not find each other ({str(error).splitlines()[0]}); start all of them, or unset "
            "what torchrun has left in the environment"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if _is_group() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _is_group() else 0


def is_launched() -> bool:
    """Whether torchrun has started this process. Raises RunError if the environment's variables are not valid."""
    return _sound(config.is_launched)


def leftovers() -> list[str]:
    """Variables of the environment, as NAME=value, that wrongly say that this process is one of several.

    Raises RunError if they are not valid. Lightning reads them when it is imported: call this before.
    """
    return _sound(config.leftovers)


def _sound(read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError as error:
        raise RunError(str(error)) from error


def local_count() -> int:
    """The number of processes on this machine."""
    return config.local_processes() if _is_group() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def share(num_rows: int, rank: int, count: int) -> slice:
    """The rows of a batch for one of `count` processes; there may be none."""
    return slice(rank * num_rows // count, (rank + 1) * num_rows // count)


def sum_over_all(x: Tensor) -> Tensor:
    """The sum of the processes' tensors, with the same bits in each process; x itself if there is one process."""
    if count() == 1:
        return x
    total = x.to(device())
    dist.all_reduce(total)
    return total.to(x.device)


def wait_for_all() -> None:
    """Returns when every process has called it."""
    if count() > 1:
        dist.barrier()


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized()
