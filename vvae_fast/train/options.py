"""The options of the command line: their types, and the groups that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vvae_fast.train.base.files import RunError
from vvae_fast.train.base.numbers import MOST_SEED, as_int, as_positive_float
from vvae_fast.train.base.paths import resolve, resolve_out
from vvae_fast.train.data.sets import LIKELIHOODS, SPLITS
from vvae_fast.train.run.runconfig import AMORTIZED, CHOICES, is_sylvester

EXIT_CODES = """exit codes:
  0    all is done
  2    bad input, or files, the disk or memory failed
  3    a run diverged, and what there is of it is evaluated and kept
  130  interrupted
  141  the output's reader has gone, and all is done"""
Read = TypeVar("Read")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None and those of switches, and each example on a line of its own."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help
            if action.default in (None, argparse.SUPPRESS) or action.nargs == 0
            else super()._get_help_string(action)
        )


def command(
    commands: Any, name: str, handler: Callable[[argparse.Namespace], int | None], summary: str, *examples: str
) -> argparse.ArgumentParser:
    lines = [f"  vvae-fast {' '.join(filter(None, (name, example)))}" for example in examples]
    epilog = "\n".join([*(["examples:", *lines, ""] if lines else []), EXIT_CODES])
    parser = commands.add_parser(name, help=summary, description=summary, epilog=epilog, formatter_class=_Help)
    parser.set_defaults(handler=handler, command=name, parser=parser, config=None, study=None)
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Where the data of a trained run are."""
    parser.add_argument("--data", type=text, help="where the run was trained on an array file: its path")
    parser.add_argument("--root", type=path, help="the folder of MNIST or FashionMNIST")


def add_array_options(parser: argparse.ArgumentParser) -> None:
    """Of the commands that write arrays of a trained run."""
    parser.add_argument("run", type=path, help="a run's folder, with best.ckpt")
    parser.add_argument("--out", type=array_path, required=True, metavar="FILE.npz", help="the file to write")
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn")
    add_source_options(parser)


def add_split_option(parser: argparse.ArgumentParser) -> None:
    rows = "the rows to take; all: of the three splits, in the file's order"
    parser.add_argument("--split", choices=(*SPLITS, "all"), default=SPLITS[-1], help=rows)


def add_units_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--units", type=positive, metavar="M", help="of a Sylvester layer (default: the latent's D)")


def check_units(units: int | None, flows: Sequence[str]) -> None:
    """Raises RunError if --units is given and no flow has units."""
    if units is not None and not any(map(is_sylvester, flows)):
        raise RunError(f"--units is of Sylvester flows, and --flow is {', '.join(flows)}; leave --units out")


def add_head_options(parser: argparse.ArgumentParser) -> None:
    rank = "of an amortized flow's head: a small one trains faster (default: a full head)"
    parser.add_argument("--rank", type=positive, metavar="R", help=rank)
    parser.add_argument("--layer-norm", action="store_true", help="between the two layers of a head with a rank")
    full = "epochs in which a head with a rank is still full; then it is cut"
    parser.add_argument("--full-epochs", type=natural, default=0, metavar="N", help=full)


def check_head(arguments: argparse.Namespace) -> None:
    """Raises RunError if --rank, --layer-norm, --full-epochs or --normalise is given and the model has no such head. A
    study's file may have all but the first for other models."""
    study = {} if arguments.study is None else arguments.study.settings
    if arguments.rank is not None and arguments.model != AMORTIZED:
        raise RunError(f"--rank is of an {AMORTIZED} flow's head, and --model is {arguments.model}; leave --rank out")
    if arguments.layer_norm and not study.get("layer_norm", False) and arguments.rank is None:
        raise RunError("--layer-norm is of a head with a rank, and there is no --rank; give one, or leave it out")
    if arguments.full_epochs and not study.get("full_epochs", 0) and arguments.rank is None:
        raise RunError("--full-epochs are of a head with a rank, and there is no --rank; give one, or leave them out")
    if arguments.normalise and not study.get("normalise", False) and arguments.model != AMORTIZED:
        flow = f"an {AMORTIZED} flow's features"
        raise RunError(f"--normalise is of {flow}, and --model is {arguments.model}; leave --normalise out")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Of the commands that score a checkpoint."""
    add_source_options(parser)
    parser.add_argument("--num-samples", type=positive, default=1000, help="importance samples of the NLL")
    parser.add_argument("--config", type=path, help="a study's YAML file: its data and importance samples")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=path, help="a study's YAML file, see configs/: its settings replace these options' defaults")
    add("--data", type=text, default="digits", help="digits, mnist, fashion-mnist or the path of a .npz or .npy file")
    add("--array", type=text, metavar="NAME", help="the array of a .npz file to split, where it holds several")
    add("--likelihood", choices=LIKELIHOODS, help="of the data (default: what their values say)")
    add("--root", type=path, help="the folder with the original .gz files of MNIST or FashionMNIST")
    add("--epochs", type=positive, default=200, help="a run in --out that has fewer goes on to so many")
    add("--batch-size", type=positive, default=100, help="rows of a training step")
    add("--latent-dim", type=positive, default=8, help="D, the numbers in a latent z")
    add("--network", choices=CHOICES["network"], default=CHOICES["network"][0], help="of encoder and decoder")
    hidden = "widths of an MLP's encoder, which the decoder mirrors (default: 100)"
    add("--hidden", type=positive, nargs="+", metavar="WIDTH", help=hidden)
    add("--normalise", action="store_true", help="the features an amortized flow gets, if their size is unknown")
    add("--optimizer", choices=CHOICES["optimizer"], default=CHOICES["optimizer"][0], help="of the training")
    add("--lr", type=positive_float, default=3e-3, help="the learning rate of the first epoch")
    add("--schedule", choices=CHOICES["schedule"], default=CHOICES["schedule"][0], help="of the learning rate")
    add("--warmup-epochs", type=natural, default=0, help="epochs in which the weight of the KL grows to 1")
    add("--patience", type=natural, default=0, help="stop after so many epochs without improvement; 0: never")
    add("--num-samples", type=positive, default=1000, help="importance samples of the NLL")
    add("--out", type=out_path, help="folder of results (default: runs/COMMAND, with -NAME for data other than digits)")
    add(
        "--compile", action="store_true", help="torch.compile the VAE, on a GPU into CUDA graphs; the results are alike"
    )
    add("--fresh", action="store_true", help="delete earlier runs of this command in --out instead of resuming them")


def natural(text: str) -> int:
    return _number(as_int, text, 0)


def positive(text: str) -> int:
    return _number(as_int, text, 1)


def seed(text: str) -> int:
    return _number(as_int, text, 0, MOST_SEED)


def positive_float(text: str) -> float:
    return _number(as_positive_float, text)


def _number(read: Callable[..., Read], text: str, *bounds: int) -> Read:
    try:
        return read(text, *bounds)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be {error}, got {text}") from error


def text(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must be neither empty nor contain a null character")
    return text


def path(text: str) -> Path:
    return _resolved(resolve, text)


def out_path(text: str) -> Path:
    return _resolved(resolve_out, text)


def array_path(text: str) -> Path:
    if not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"must end with .npz, got {text}")
    return out_path(text)


def _resolved(read: Callable[[str], Path], text: str) -> Path:
    try:
        return read(text)
    except RunError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
