"""Most of a GPU's memory, for one process of a test run at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import cuda_host
import pytest
import torch
from filelock import FileLock  # which PyTorch installs


def lock() -> FileLock:
    """One for all processes of a test run."""
    return FileLock(Path(os.environ[cuda_host.FOLDER]) / "gpu_memory.lock")


@contextlib.contextmanager
def alone(free: float) -> Iterator[None]:
    """Skips the test where fewer bytes are free; a process that asks next waits, and finds free what this one took."""
    with lock():
        torch.cuda.empty_cache()  # PyTorch keeps what a test has freed
        if torch.cuda.mem_get_info()[0] < free:
            pytest.skip(f"less than {free / 1e9:.0f} GB free on the GPU")
        try:
            yield
        finally:
            torch.cuda.empty_cache()
