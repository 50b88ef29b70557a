"""The command line `vvae-fast`: `--help` lists its commands."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import vvae_fast
from vvae_fast.train.about import check_backend, print_info
from vvae_fast.train.array_commands import add_array_commands
from vvae_fast.train.base.files import RunError
from vvae_fast.train.base.memory import is_out_of_memory, telling_memory
from vvae_fast.train.base.output import guarded
from vvae_fast.train.base.paths import resolve_data, resolve_out
from vvae_fast.train.data.idx import DataError
from vvae_fast.train.data.sets import Dataset, summary
from vvae_fast.train.density.energies import ENERGIES
from vvae_fast.train.density.fit import FitConfig
from vvae_fast.train.options import (
    EXIT_CODES,
    add_data_options,
    add_head_options,
    add_run_options,
    add_units_option,
    check_head,
    check_units,
    command,
    out_path,
    path,
    positive,
    seed,
)
from vvae_fast.train.run.runconfig import (
    ALL_UNITS,
    AMORTIZED,
    FLOWS,
    FULL,
    GATED_CONV,
    MODELS,
    PLANAR,
    VANILLA,
    RunConfig,
)

BAD_INPUT, DIVERGED, INTERRUPTED, OUTPUT_CLOSED = 2, 3, 130, 141  # exit codes
DESCRIPTION = "Planar flows and variational autoencoders."
EPILOG = f"""examples:
  vvae-fast compare
  vvae-fast train --data counts.npy --out runs/counts
  vvae-fast encode runs/counts --data counts.npy --out latents.npz
  vvae-fast COMMAND --help

{EXIT_CODES}"""
STEPS = [4, 16]  # compare's flow lengths, if neither options nor a file give any
HIDDEN = [100]
LENGTH = 16  # train's
Value = TypeVar("Value")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, or one of EXIT_CODES."""
    with guarded() as output:
        code = _run(argv)
        output.flush()
        if output.error is None or code != 0:
            return code
        if isinstance(output.error, BrokenPipeError):
            return OUTPUT_CLOSED
        return _fail(f"the output cannot be written ({output.error.strerror}); all else is done")


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = _parsed(parser, argv)
    try:
        if arguments.command != "info":
            _tell_leftovers()
        if arguments.config is not None:
            arguments = _with_study(parser, arguments, argv)
        return arguments.handler(arguments) or 0
    except (DataError, RunError, ModuleNotFoundError) as error:
        return _fail(str(error))
    except (OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _fail("out of memory; free some, or take less data or a smaller model")
        if not isinstance(error, OSError):
            raise
        return _fail(f"{error}; check the path and the disk, or choose another --out")
    except KeyboardInterrupt:
        print("vvae-fast: interrupted; the same command goes on after the last finished epoch or fit", file=sys.stderr)
        return INTERRUPTED


def _with_study(
    parser: argparse.ArgumentParser, first: argparse.Namespace, argv: Sequence[str] | None
) -> argparse.Namespace:
    """The arguments parsed again, with the study's file in place of the options' defaults."""
    from vvae_fast.train.study.studies import load_study

    study = load_study(first.config, first.root)
    first.parser.set_defaults(study=study, seeds=study.seeds, **study.settings)
    return _parsed(parser, argv)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; an unknown one is refused with the usage of its command."""
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def _tell_leftovers() -> None:
    from vvae_fast.train.run import processes

    found = processes.leftovers()
    if found:
        said = f"{', '.join(found)} in the environment, but torchrun has not started this: it runs as one process"
        _warn(said)


def _warn(message: str) -> None:
    print(f"vvae-fast: warning: {message}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"vvae-fast: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return BAD_INPUT


def _diverged(count: int, total: int) -> int:
    if count == 0:
        return 0
    print(f"vvae-fast: {count} of {total} runs diverged, see below the table", file=sys.stderr)
    return DIVERGED


def _info(arguments: argparse.Namespace) -> None:
    print_info()
    check_backend()


def _compare(arguments: argparse.Namespace) -> int:
    from vvae_fast.train.base import outcome
    from vvae_fast.train.run import processes
    from vvae_fast.train.study.compare import MATCHED, compare, models_to_compare

    check_backend()
    if arguments.study is not None and (arguments.steps or arguments.shared):
        raise RunError(f"{arguments.config} says which models to compare; leave --steps and --shared out")
    if arguments.study is not None and (arguments.flow or arguments.units):
        raise RunError(f"{arguments.config} says which models to compare; leave --flow and --units out")
    flows = list(dict.fromkeys(arguments.flow or [PLANAR]))
    check_units(arguments.units, flows)
    if arguments.study is not None and arguments.matched is not None:
        raise RunError(f"{arguments.config} says which models to compare; write {MATCHED}: [K] there for --matched")
    base, dataset = _configuration(arguments, arguments.seeds[0])
    steps = _unique(arguments.steps or STEPS, "--steps")
    wider = [] if arguments.matched is None else _unique(arguments.matched or steps, "--matched")
    families = flows, arguments.units or ALL_UNITS
    models = arguments.study.models if arguments.study else models_to_compare(steps, arguments.shared, wider, *families)
    with processes.connected():
        seeds, out = _unique(arguments.seeds, "--seeds"), _out(arguments)
        gaps = None if arguments.study is None else arguments.study.gaps
        content = compare(base, dataset, models, seeds, out, arguments.fresh, arguments.compile, gaps)
    return _diverged(sum(run["status"] == outcome.DIVERGED for run in content["runs"]), len(content["runs"]))


def _train(arguments: argparse.Namespace) -> int:
    from vvae_fast.train.base import outcome
    from vvae_fast.train.base.progress import Progress
    from vvae_fast.train.run import processes
    from vvae_fast.train.run.folder import remove_run
    from vvae_fast.train.run.networks import check_fits
    from vvae_fast.train.run.runs import run
    from vvae_fast.train.study.compare import Model, print_table

    check_backend()
    check_head(arguments)
    if arguments.steps is not None and arguments.model == VANILLA:
        raise RunError(f"--steps is a flow's length, and --model is {VANILLA}; leave --steps out")
    check_units(arguments.units, [arguments.flow])
    if arguments.model == VANILLA and arguments.flow != PLANAR:
        raise RunError(f"--flow is {arguments.flow}, and a {VANILLA} VAE has no flow; leave --flow out")
    steps = 0 if arguments.model == VANILLA else arguments.steps or LENGTH
    units = arguments.units or ALL_UNITS
    model = Model(arguments.model, steps, arguments.rank or FULL, flow=arguments.flow, units=units)
    base, dataset = _configuration(arguments, arguments.seed)
    config = model.config(base, arguments.seed, dataset)
    check_fits(config, dataset)  # before --fresh deletes a run
    out = _out(arguments)
    with processes.connected():
        first = processes.is_first()
        if arguments.fresh and first:
            remove_run(out)
        processes.wait_for_all()
        if first:
            print(summary(dataset), flush=True)
        with Progress(1, config.epochs, quiet=not first) as progress:
            progress.start(f"{model.label}, seed {config.seed}")
            result = run(config, dataset, out, progress.update, arguments.compile)
            progress.finish(result)
    if first:
        print_table({model: [result]})
        print(f"wrote {out}")
    return _diverged(int(result["status"] == outcome.DIVERGED), 1)


def _evaluate(arguments: argparse.Namespace) -> int:
    from vvae_fast.train.run import processes
    from vvae_fast.train.run.runs import evaluate, load_trained

    check_backend()
    epoch, config, dataset, vae = load_trained(arguments.checkpoint, arguments.data, arguments.root)
    with processes.connected():
        with telling_memory("evaluating", "free some, its batches are fixed"):
            scores = evaluate(vae, dataset, arguments.num_samples, config.seed)
        first = processes.is_first()
    finite = all(map(math.isfinite, scores.values()))
    if not first:
        return 0 if finite else DIVERGED
    print(f"{config.name} after epoch {epoch + 1}, nats a data point of the test set of {dataset.name}:")
    for name, value in scores.items():
        print(f"  {name + ':':16}{value if isinstance(value, int) else format(value, '.3f')}")
    return _diverged(int(not finite), 1)


def _gaps(arguments: argparse.Namespace) -> int:
    from vvae_fast.train.run import processes
    from vvae_fast.train.run.checkpoints import best_of
    from vvae_fast.train.run.gaps import GapSettings, gaps
    from vvae_fast.train.run.runs import load_trained

    check_backend()
    if processes.is_launched():
        raise RunError("gaps runs in one process; start it without torchrun")
    trained = load_trained(arguments.run, arguments.data, arguments.root)
    settings = GapSettings(arguments.num_points, arguments.steps, arguments.iterations, arguments.num_samples)
    scores = gaps(trained, settings, arguments.out or best_of(arguments.run).parent)["scores"]
    return _diverged(int(not all(math.isfinite(score["mean"]) for score in scores.values())), 1)


def _density(arguments: argparse.Namespace) -> int:
    from vvae_fast.train.density.runs import density

    check_backend()
    options = {name: getattr(arguments, name) for name in ("iterations", "restarts", "seed")}
    energies, steps = _unique(arguments.energies, "--energies"), _unique(arguments.steps, "--steps")
    configs = [FitConfig(energy, k, **options) for energy in energies for k in steps]
    _, diverged = density(configs, arguments.out, arguments.fresh)
    return _diverged(len(diverged), len(configs))


def _configuration(arguments: argparse.Namespace, seed: int) -> tuple[RunConfig, Dataset]:
    """The vanilla VAE's RunConfig for the arguments, and its data."""
    from vvae_fast.train.data.sets import load_dataset
    from vvae_fast.train.run.runconfig import data_digest

    data = resolve_data(arguments.data, arguments.root)
    dataset = load_dataset(data, arguments.root, array=arguments.array, likelihood=arguments.likelihood)
    if arguments.study is not None and arguments.data == arguments.study.settings.get("data", arguments.data):
        arguments.study.check_splits(dataset)
    few = [name for name in ("val", "test") if len(getattr(dataset, name)) == 1]
    if few:
        have = "have" if len(few) > 1 else "has"
        _warn(f"{' and '.join(few)} of {dataset.name} {have} one row: a score of one row says little; give more rows")
    if arguments.network == GATED_CONV and arguments.hidden:
        raise RunError(f"--network {GATED_CONV} has its own widths; leave --hidden out")
    names: tuple[str, ...] = ("epochs", "batch_size", "latent_dim", "lr", "warmup_epochs", "patience", "num_samples")
    names += ("network", "optimizer", "schedule", "normalise", "layer_norm", "full_epochs")
    settings = {name: getattr(arguments, name) for name in names}
    config = RunConfig(
        model=VANILLA,
        num_steps=0,
        seed=seed,
        data=dataset.name,
        data_digest=data_digest(dataset),
        likelihood=dataset.likelihood,
        array=arguments.array or "",
        hidden=() if arguments.network == GATED_CONV else tuple(arguments.hidden or HIDDEN),
        **settings,
    )
    return config, dataset


def _out(arguments: argparse.Namespace) -> Path:
    """--out, or the default folder for the command and the study or data set."""
    if arguments.out is not None:
        return arguments.out
    if arguments.study is not None:
        return resolve_out(f"runs/{arguments.command}-{arguments.study.name}")
    name = "" if arguments.data == "digits" else f"-{Path(arguments.data).stem}"
    return resolve_out(f"runs/{arguments.command}{name}")


def _unique(values: Sequence[Value], option: str) -> list[Value]:
    """The values without repetitions, of which a warning tells."""
    unique = list(dict.fromkeys(values))
    if len(unique) < len(values):
        _warn(f"{option} has {', '.join(map(str, values))}: each is taken once")
    return unique


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vvae-fast", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"vvae-fast {vvae_fast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = command(
        commands,
        "compare",
        _compare,
        "train the vanilla VAE and flow VAEs, print one table",
        "",
        "--data counts.npy --epochs 50 --seeds 0 1",
        "--data counts.npy --steps 16 --matched",
        "--config configs/digits.yaml --out runs/digits",
    )
    compare.add_argument("--steps", type=positive, nargs="+", metavar="K", help="flow lengths (default: 4 16)")
    families = "families of flows (default: planar)"
    compare.add_argument("--flow", choices=FLOWS, nargs="+", metavar="FLOW", help=f"{families}, of {', '.join(FLOWS)}")
    add_units_option(compare)
    compare.add_argument("--seeds", type=seed, nargs="+", default=[0, 1, 2], metavar="SEED", help="a run each")
    compare.add_argument("--shared", action="store_true", help="also flows whose parameters all data points share")
    matched = "also vanilla VAEs with as many parameters as the amortized flow VAEs of these lengths (default: --steps)"
    compare.add_argument("--matched", type=positive, nargs="*", metavar="K", help=matched)
    add_run_options(compare)
    compare.set_defaults(layer_norm=False, full_epochs=0)  # only a study's file has models with a rank

    train = command(
        commands,
        "train",
        _train,
        "train and evaluate one model",
        "--model amortized --steps 16 --out runs/one",
        "--data counts.npy --model vanilla",
    )
    train.add_argument("--model", choices=MODELS, default=AMORTIZED, help="of the posterior")
    train.add_argument("--steps", type=positive, metavar="K", help=f"the flow's length (default: {LENGTH})")
    add_head_options(train)
    train.add_argument("--flow", choices=FLOWS, default=PLANAR, help="the family of the flow")
    add_units_option(train)
    train.add_argument("--seed", type=seed, default=0, help="of weights, order and noise")
    add_run_options(train)

    evaluate = command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate a trained run on its test set",
        "runs/one --num-samples 5000",
    )
    evaluate.add_argument("checkpoint", type=path, metavar="run", help="a run's folder, or its best.ckpt or last.ckpt")
    add_data_options(evaluate)

    lacks = "split a trained model's log p(x) - ELBO into what family and encoder lack"
    gaps = command(commands, "gaps", _gaps, lacks, "runs/one --num-points 50")
    gaps.add_argument("run", type=path, help="a run's folder, with best.ckpt")
    gaps.add_argument("--num-points", type=positive, default=200, metavar="N", help="of the test set, from its start")
    gaps.add_argument("--steps", type=positive, metavar="K", help="of q*, at least the model's (default: the model's)")
    gaps.add_argument("--iterations", type=positive, default=600, help="of Adam, for each data point")
    gaps.add_argument("--out", type=out_path, help="folder of gaps.json (default: the run's)")
    add_data_options(gaps)

    add_array_commands(commands)

    density = command(
        commands,
        "density",
        _density,
        "fit planar flows to 2-D energies, print their KL, draw them",
        "--energies U1 --steps 8 --restarts 1",
    )
    density.add_argument("--energies", choices=ENERGIES, nargs="+", default=list(ENERGIES), help="to fit")
    density.add_argument("--steps", type=positive, nargs="+", default=[2, 8, 32], metavar="K", help="flow lengths")
    density.add_argument("--iterations", type=positive, default=FitConfig.iterations, help="of Adam, for each restart")
    density.add_argument("--restarts", type=positive, default=FitConfig.restarts, help="seeds from --seed on")
    density.add_argument("--seed", type=seed, default=FitConfig.seed, help="the first restart's")
    density.add_argument("--out", type=out_path, default="runs/density", help="folder of results")
    density.add_argument("--fresh", action="store_true", help="replace the results in --out instead of going on")

    command(commands, "info", _info, "say which backends are available, and why not")
    return parser


if __name__ == "__main__":
    sys.exit(main())
