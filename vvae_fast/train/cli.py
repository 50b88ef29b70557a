"""The command line: `vvae-fast compare`, `train`, `evaluate` and `info`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import vvae_fast
from vvae_fast import config as environment
from vvae_fast.train.files import RunError
from vvae_fast.train.idx import DataError

BAD_INPUT = 2  # exit codes
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.handler(arguments)
    except (DataError, RunError, ModuleNotFoundError) as error:
        print(f"vvae-fast: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("vvae-fast: interrupted; the same command goes on after the last finished epoch", file=sys.stderr)
        return INTERRUPTED
    return 0


def _info(arguments: argparse.Namespace) -> None:
    info = vvae_fast.info()
    backends = info.pop("backends")
    for key, value in info.items():
        print(f"{key + ':':12}{_one_line(value)}")
    print("backends:")
    for name, backend in backends.items():
        print(f"  {name + ':':12}{'available' if backend['available'] else '; '.join(backend['reasons'])}")


def _one_line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _compare(arguments: argparse.Namespace) -> None:
    from vvae_fast.train.compare import compare, models_to_compare

    _check_backend()
    base, dataset = _configuration(arguments, model="vanilla", num_steps=0, seed=arguments.seeds[0])
    models = models_to_compare(_unique(arguments.steps), arguments.shared)
    compare(base, dataset, models, _unique(arguments.seeds), arguments.out, arguments.fresh)


def _train(arguments: argparse.Namespace) -> None:
    from vvae_fast.train.compare import Model, print_table
    from vvae_fast.train.progress import Progress
    from vvae_fast.train.runs import remove_run, run

    _check_backend()
    model = Model(arguments.model, 0 if arguments.model == "vanilla" else arguments.steps)
    config, dataset = _configuration(arguments, model=model.kind, num_steps=model.num_steps, seed=arguments.seed)
    if arguments.fresh:
        remove_run(arguments.out)
    with Progress(1, config.epochs) as progress:
        progress.start(f"{model.label}, seed {config.seed}")
        result = run(config, dataset, arguments.out, progress.update)
        progress.finish(result)
    print_table({model: [result]})


def _evaluate(arguments: argparse.Namespace) -> None:
    from vvae_fast.train.checkpoints import load_checkpoint
    from vvae_fast.train.data import load_dataset
    from vvae_fast.train.module import CHECKPOINT_KEY
    from vvae_fast.train.runs import RunConfig, data_digest, evaluate, vae_of_checkpoint

    _check_backend()
    checkpoint = load_checkpoint(arguments.checkpoint)
    config = RunConfig.from_json(checkpoint[CHECKPOINT_KEY]["config"])
    dataset = load_dataset(arguments.data or config.data, arguments.root)
    if data_digest(dataset) != config.data_digest:
        raise RunError(
            f"{arguments.checkpoint} was trained on other data ({config.data}); pass them with --data, --root"
        )
    vae = vae_of_checkpoint(checkpoint, config, dataset)
    print(f"{config.name} after epoch {checkpoint['epoch'] + 1}, nats a data point of the test set of {dataset.name}:")
    for name, value in evaluate(vae, dataset, arguments.num_samples, config.seed).items():
        print(f"  {name + ':':16}{value:.3f}")


def _configuration(arguments: argparse.Namespace, model: str, num_steps: int, seed: int):
    """The RunConfig that the arguments ask for, and its data."""
    from vvae_fast.train.data import load_dataset
    from vvae_fast.train.runs import RunConfig, data_digest

    dataset = load_dataset(arguments.data, arguments.root)
    names = ("epochs", "batch_size", "latent_dim", "lr", "warmup_epochs", "patience", "num_samples")
    settings = {name: getattr(arguments, name) for name in names}
    config = RunConfig(
        model=model,
        num_steps=num_steps,
        seed=seed,
        data=dataset.name,
        data_digest=data_digest(dataset),
        hidden=tuple(arguments.hidden),
        **settings,
    )
    return config, dataset


def _check_backend() -> None:
    """Raises RunError, with the reasons, where VVAE_FAST_BACKEND asks for a backend that cannot run."""
    try:
        with vvae_fast.use_backend(environment.backend()):
            pass
    except (ValueError, RuntimeError) as error:
        raise RunError(f"VVAE_FAST_BACKEND: {error}; unset it or choose another") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vvae-fast", description="Planar flows and variational autoencoders.")
    parser.add_argument("--version", action="version", version=f"vvae-fast {vvae_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = _command(commands, "compare", _compare, "train the vanilla VAE and flow VAEs, print one table")
    compare.add_argument("--steps", type=_positive, nargs="+", default=[4, 16], metavar="K", help="flow lengths")
    compare.add_argument("--seeds", type=_natural, nargs="+", default=[0, 1, 2], metavar="SEED")
    compare.add_argument("--shared", action="store_true", help="also flows whose parameters all data points share")
    _add_run_options(compare, Path("runs/compare"))

    train = _command(commands, "train", _train, "train and evaluate one model")
    train.add_argument("--model", choices=["vanilla", "amortized", "shared"], default="amortized")
    train.add_argument("--steps", type=_positive, default=16, metavar="K", help="the flow's length")
    train.add_argument("--seed", type=_natural, default=0)
    _add_run_options(train, Path("runs/train"))

    evaluate = _command(commands, "evaluate", _evaluate, "evaluate a checkpoint on its test set")
    evaluate.add_argument("checkpoint", type=Path, help="a best.ckpt or last.ckpt")
    evaluate.add_argument("--data", help="where the checkpoint was trained on an array file: its path")
    evaluate.add_argument("--root", type=Path, help="MNIST's folder")
    evaluate.add_argument("--num-samples", type=_positive, default=1000, help="importance samples of the NLL")

    _command(commands, "info", _info, "say which backends are available, and why not")
    return parser


def _command(commands, name: str, handler, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_run_options(parser: argparse.ArgumentParser, out: Path) -> None:
    add = parser.add_argument
    add("--data", default="digits", help="digits, mnist or the path of a .npz or .npy file")
    add("--root", type=Path, help="MNIST's folder, with the four original .gz files")
    add("--epochs", type=_positive, default=200)
    add("--batch-size", type=_positive, default=100)
    add("--latent-dim", type=_positive, default=8, help="D")
    add(
        "--hidden",
        type=_positive,
        nargs="+",
        default=[100],
        help="hidden widths of the encoder; the decoder mirrors it",
    )
    add("--lr", type=_positive_float, default=3e-3, help="Adam's first learning rate; a cosine takes it to 0")
    add("--warmup-epochs", type=_natural, default=0, help="epochs in which the weight of the KL grows to 1")
    add("--patience", type=_natural, default=0, help="stop after so many epochs without improvement; 0: never")
    add("--num-samples", type=_positive, default=1000, help="importance samples of the NLL")
    add("--out", type=Path, default=out, help="folder of checkpoints, results and plots")
    add("--fresh", action="store_true", help="delete earlier runs of this command in --out instead of resuming them")


def _unique(values: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(values))


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
