"""`vvae-fast sample`, `reconstruct` and `encode`: arrays out of a trained run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vvae_fast.train.about import check_backend
from vvae_fast.train.base.files import RunError
from vvae_fast.train.options import add_array_options, add_split_option, command, positive


def add_array_commands(commands: Any) -> None:
    sample = command(
        commands,
        "sample",
        _sample,
        "draw data from a trained model into a .npz file",
        "runs/train --num-samples 100 --out samples.npz",
    )
    sample.add_argument("--num-samples", type=positive, default=64, metavar="N", help="draws of x")
    add_array_options(sample)

    reconstruct = command(
        commands,
        "reconstruct",
        _reconstruct,
        "write a trained model's reconstructions of a split to a .npz file",
        "runs/train --split test --out reconstructions.npz",
    )
    add_split_option(reconstruct)
    add_array_options(reconstruct)

    encode = command(
        commands,
        "encode",
        _encode,
        "write the posteriors of a split, and samples of them, to a .npz file",
        "runs/train --split train --num-samples 10 --out latents.npz",
        "runs/train-counts --data counts.npy --out latents.npz",
    )
    add_split_option(encode)
    encode.add_argument("--num-samples", type=positive, default=1, metavar="S", help="posterior samples of each row")
    add_array_options(encode)


def _sample(arguments: argparse.Namespace) -> None:
    _write(arguments, lambda trained, run: trained.sample(run, arguments.num_samples, arguments.seed))


def _reconstruct(arguments: argparse.Namespace) -> None:
    _write(arguments, lambda trained, run: trained.reconstruct(run, arguments.split, arguments.seed))


def _encode(arguments: argparse.Namespace) -> None:
    _write(
        arguments,
        lambda trained, run: trained.encode(run, arguments.split, arguments.num_samples, arguments.seed),
    )


def _write(arguments: argparse.Namespace, arrays: Callable[[Any, Any], dict]) -> None:
    """Writes to --out what `arrays`, given the module and the run of the arguments, returns."""
    from vvae_fast.train import trained
    from vvae_fast.train.run import processes

    check_backend()
    if processes.is_launched():
        raise RunError(f"{arguments.command} runs in one process; start it without torchrun")
    run = trained.load_run(arguments.run, arguments.data, arguments.root)
    held = trained.write_arrays(arguments.out, arrays(trained, run))
    print(f"wrote {arguments.out}: {held}")
