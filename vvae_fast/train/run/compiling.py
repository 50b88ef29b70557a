"""A VAE whose calls are compiled while it trains: by torch.compile, on a GPU into CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from vvae_fast.nn.vae import VAE
from vvae_fast.train.base.files import RunError
from vvae_fast.train.base.memory import is_out_of_memory
from vvae_fast.train.run import processes

DEFAULT, CUDA_GRAPHS = "default", "reduce-overhead"  # torch.compile's modes
WITHOUT = "leave --compile out to train without it"
LONGEST = 300  # characters of what torch says


def mode() -> str:
    """torch.compile's mode on this process's device."""
    return CUDA_GRAPHS if processes.device().type == "cuda" else DEFAULT


@contextmanager
def compiled(vae: VAE, wanted: bool) -> Iterator[None]:
    """Inside, where it is wanted, each call of the VAE runs one compiled graph, and its backward another.

    The VAE stays the module that it is: so do the names in its state_dict. Nothing falls back to eager calls: a graph
    break, or more shapes of batches than torch.compile keeps graphs for, is an error. The graphs are dropped at the
    end, with the memory that they hold.

    Raises:
        RunError: torch.compile is turned off, has no compiler, or fails.
    """
    with _compiled(vae) if wanted else nullcontext():
        yield


@contextmanager
def _compiled(vae: VAE) -> Iterator[None]:
    if torch._dynamo.config.disable:
        raise RunError(f"torch.compile is turned off (TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE); {WITHOUT}")
    torch.compiler.reset()  # graphs of a run before count towards the limit of those of this one
    try:
        _compile(vae)
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"torch.compile failed ({_first_words(error)}); mend that, or {WITHOUT}") from error
    finally:
        vae._compiled_call_impl = None
        torch.compiler.reset()


def _compile(vae: VAE) -> None:
    try:
        vae.compile(fullgraph=True, dynamic=False, mode=mode())  # an epoch has at most four shapes of batches
    except RuntimeError as error:  # a Python or a system that this torch does not compile for
        raise RunError(f"torch.compile cannot be used here ({_first_words(error)}); {WITHOUT}") from error


def _first_words(error: BaseException) -> str:
    """The first line of what torch says."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
