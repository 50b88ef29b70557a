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
LONGEST = 300  # characters of torch's message


def mode() -> str:
    """torch.compile's mode on this process's device."""
    return CUDA_GRAPHS if processes.device().type == "cuda" else DEFAULT


@contextmanager
def compiled(vae: VAE, wanted: bool) -> Iterator[None]:
    """Inside the block, if `wanted`, each call of the VAE runs one compiled graph, and its backward another.

    The VAE stays the same module, with the same names in its state_dict. Nothing falls back to eager calls: a graph
    break is an error, and so are more batch shapes than torch.compile keeps graphs for. At the end the graphs and
    their memory are freed.

    Raises:
        RunError: if torch.compile is turned off, has no compiler, or fails.
    """
    with _compiled(vae) if wanted else nullcontext():
        yield


@contextmanager
def _compiled(vae: VAE) -> Iterator[None]:
    if torch._dynamo.config.disable:
        raise RunError(f"torch.compile is turned off (TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE); {WITHOUT}")
    torch.compiler.reset()  # else the graphs of earlier runs count towards this run's limit
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
        vae.compile(fullgraph=True, dynamic=False, mode=mode())  # an epoch has at most four batch shapes
    except RuntimeError as error:  # this torch does not compile for this Python or system
        raise RunError(f"torch.compile cannot be used here ({_first_words(error)}); {WITHOUT}") from error


def _first_words(error: BaseException) -> str:
    """The first line of torch's message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
