"""What each model of a study learns in the same time: that of the study's epochs of the model that --like names.

    python -m benchmarks.study.epochs --config configs/families/mnist_families_cpu.yaml --root FOLDER
    python -m benchmarks.study.same_seconds --study mnist_families_cpu --root FOLDER --like "amortized planar K=80"

The first command measures the seconds of an epoch. The second one trains each model for the whole epochs that fit into
that time best. Warm-up has the study's share of them, and the learning rate follows the study's schedule over them. The
last epoch counts. Printed are the epochs, and the NLL of the test set by importance sampling in nats a data point:
means and standard deviations over the seeds. Two runs train at once, on one thread each.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.study.feature_size import options, trained_nll
from benchmarks.study.study_results import FOLDER, OURS, Results, config_of, read
from vvae_fast.train.data.sets import Dataset, load_dataset
from vvae_fast.train.run.networks import build_vae
from vvae_fast.train.run.runconfig import RunConfig
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.spread import Spread

AT_ONCE = 2  # runs


def epochs_in(seconds: float, of_epoch: float) -> int:
    """The number of epochs that takes the time best; at least one."""
    return max(1, round(seconds / of_epoch))


def plans(results: Results, dataset: Dataset, like: str) -> dict[Model, RunConfig]:
    """The configuration of each model whose epochs were timed, with its own epochs and warm-up and the first seed.

    Raises ValueError if no timed model has the label `like`.
    """
    base = results.study.base(dataset)
    seconds = {model: results.seconds(model, OURS) for model in results.in_order}
    timed = {model: x for model, x in seconds.items() if x is not None}
    total = next((base.epochs * x for model, x in timed.items() if model.label == like), None)
    if total is None:
        labels = ", ".join(model.label for model in timed)
        raise ValueError(f"--like must be one of the models with measured epochs ({labels}), got {like}")
    found = {}
    for model, of_epoch in timed.items():
        epochs = epochs_in(total, of_epoch)
        warmup = round(epochs * base.warmup_epochs / base.epochs)
        config = model.config(base, base.seed, dataset)
        found[model] = dataclasses.replace(config, epochs=epochs, warmup_epochs=warmup)
    return found


def nll_of(config: RunConfig, dataset: Dataset) -> float:
    """Of a VAE trained by the configuration on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    return trained_nll(build_vae(config, dataset), config, dataset)


def lines(results: Results, found: dict[Model, RunConfig], nlls: Iterable[float], num_seeds: int) -> Iterator[str]:
    """A line for each model as soon as its runs are done; `nlls` are those of each model's seeds in turn."""
    scores = iter(nlls)
    for model, config in found.items():
        own = Spread.of(list(itertools.islice(scores, num_seeds)))
        yield f"{model.label}: {results.seconds(model, OURS):.2f} s an epoch, {config.epochs} epochs, NLL {own.text()}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--like", required=True, help="the model whose epochs give the time")
    arguments = parser.parse_args()
    results = read(FOLDER / arguments.study, config_of(arguments.study))
    dataset = load_dataset(results.study.settings["data"], arguments.root)
    try:
        found = plans(results, dataset, arguments.like)
    except ValueError as error:
        parser.error(str(error))
    seeds = results.study.seeds[: arguments.seeds]
    configs = [dataclasses.replace(config, seed=seed) for config in found.values() for seed in seeds]
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        for line in lines(results, found, pool.map(nll_of, configs, itertools.repeat(dataset)), len(seeds)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
