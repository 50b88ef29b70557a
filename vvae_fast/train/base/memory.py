"""Tells in one line that memory ran out, and what to lower."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vvae_fast.train.base.files import RunError

# Messages of torch's CPU allocator, of C++, and of the kernels' outputs: each comes in a plain RuntimeError.
PHRASES = ("allocate memory", "bad_alloc", "aoti_torch_empty_strided", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the errors that a failed allocation becomes."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)
    )


@contextmanager
def telling_memory(what: str, advice: str) -> Iterator[None]:
    """Raises RunError if memory runs out inside the block. `what` is the work done there, `advice` what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory while {what}; {advice}") from error
