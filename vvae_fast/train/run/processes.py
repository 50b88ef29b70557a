"""Several processes that train one model: torchrun starts them, and each takes its share of every batch's rows.

What is drawn is drawn for the whole batch by every process, which then keeps its own rows: a run's losses and scores do
not depend on the number of processes, beyond rounding. The first process alone writes files and prints; the others
read them: all machines need one folder.
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
    """Inside, the processes that torchrun started are a group, over nccl where there are GPUs and gloo elsewhere.

    Without torchrun there is one process, and nothing to do: see `config.launch`.

    Raises:
        RunError: if what torchrun has set is not sound.
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
    """Whether torchrun has started this process. Raises RunError if the environment's variables are not sound."""
    return _sound(config.is_launched)


def leftovers() -> list[str]:
    """The environment's variables, as NAME=value, that name this process one of several, which it is not.

    Raises RunError if they are not sound. Lightning reads them when it is imported: call this before.
    """
    return _sound(config.leftovers)


def _sound(read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError as error:
        raise RunError(str(error)) from error


def local_count() -> int:
    """The number of processes of this machine."""
    return config.local_processes() if _is_group() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def share(num_rows: int, rank: int, count: int) -> slice:
    """The rows of a batch that one of `count` processes takes; it may be none."""
    return slice(rank * num_rows // count, (rank + 1) * num_rows // count)


def sum_over_all(x: Tensor) -> Tensor:
    """The sum of the processes' tensors, the same bits in each process; x itself where there is one."""
    if count() == 1:
        return x
    total = x.to(device())
    dist.all_reduce(total)
    return total.to(x.device)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if count() > 1:
        dist.barrier()


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized()
