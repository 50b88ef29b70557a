"""Seconds of a training epoch of each model of a study: with this package's flow, and with a loop in its place.

    python -m benchmarks.study.epochs --config configs/digits.yaml
    python -m benchmarks.study.epochs --config configs/mnist_mlp_cpu.yaml --root DIR

A step draws the batch and its bits, and runs forward, backward and the optimizer, as in training. The loops over the
flow's steps are the plain loop and the reference of loops.py. Blocks of steps of all models alternate, round by round,
in one process. An epoch's time is the median of the rounds' median steps times the number of batches. On the CPU one
thread runs, and its CPU time counts, so that other programs on a busy machine do not change it.
"""

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.flow.loops import PLAIN, REFERENCE, Loop, Looped, plain_loop, reference_loop
from benchmarks.study.study_results import EPOCHS, FOLDER, OURS, model_of
from vvae_fast.train.base.environment import describe_environment
from vvae_fast.train.base.files import make_folder, write_json
from vvae_fast.train.data.sets import Dataset, load_dataset, make_loaders
from vvae_fast.train.run import processes
from vvae_fast.train.run.networks import build_optimizer, build_vae
from vvae_fast.train.run.objective import free_energy
from vvae_fast.train.run.runconfig import PLANAR, VANILLA, RunConfig
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.studies import load_study

LOOPS = {OURS: None, PLAIN: plain_loop, REFERENCE: reference_loop}


class Contestant:
    """One model trained with this package's flow, or with a loop in its place; `block` times steps of it."""

    def __init__(self, config: RunConfig, dataset: Dataset, loop: Loop | None) -> None:
        torch.manual_seed(config.seed)
        self.device = processes.device()
        self.vae = build_vae(config, dataset).to(self.device)
        if loop is not None:
            self.vae.flow = Looped(self.vae.flow, loop)
        self.optimizer = build_optimizer(config, self.vae)
        loader, _, _ = make_loaders(dataset, config.batch_size, config.seed)
        self.batches = _endless(loader)
        self.medians: list[float] = []

    def block(self, num_steps: int) -> None:
        """Trains for some steps and keeps the median of their seconds."""
        self.medians.append(statistics.median(self._step() for _ in range(num_steps)))

    def _step(self) -> float:
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        start = clock()
        x = next(self.batches).to(self.device)
        loss = free_energy(self.vae(x), 1.0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def _endless(loader) -> Iterator[Tensor]:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def measure(base: RunConfig, dataset: Dataset, models: list[Model], rounds: int, num_steps: int) -> dict:
    """The content of EPOCHS: seconds of an epoch for each model and loop, and in the best and the worst round."""
    contestants = {
        (model, name): Contestant(model.config(base, base.seed, dataset), dataset, loop)
        for model in models
        for name, loop in LOOPS.items()
        if name == OURS or (model.kind != VANILLA and model.flow == PLANAR)  # the loops are over planar steps
    }
    for contestant in contestants.values():
        contestant.block(num_steps)  # the first steps allocate memory, and compile on a GPU
        contestant.medians.clear()
    for _ in range(rounds):
        for contestant in contestants.values():
            contestant.block(num_steps)
    batches = len(make_loaders(dataset, base.batch_size, base.seed)[0])
    rows = []
    for (model, name), contestant in contestants.items():
        times = [batches * seconds for seconds in contestant.medians]
        spread = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
        about = {"model": model.kind, "num_steps": model.num_steps, "rank": model.rank}
        about |= {"matched": model.matched, "flow": model.flow, "units": model.units, "backend": name}
        rows.append({**about, **spread})
    return {"rounds": rounds, "steps": num_steps, "environment": describe_environment(), "epochs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--root", type=Path, help="the folder of MNIST or FashionMNIST")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=15, help="in a block")
    parser.add_argument("--out", type=Path, help=f"folder of {EPOCHS} (default: docs/results/STUDY)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = load_study(arguments.config)
    choices = {name: study.settings.get(name) for name in ("array", "likelihood")}
    dataset = load_dataset(study.settings["data"], arguments.root, **choices)
    content = measure(study.base(dataset), dataset, study.models, arguments.rounds, arguments.steps)
    out = arguments.out or FOLDER / study.name
    make_folder(out)
    write_json(out / EPOCHS, content)
    for row in content["epochs"]:
        print(f"{model_of(row).label:30} {row['backend']:10} {row['seconds']:.3f} s")
    print(f"{out / EPOCHS} is written.")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
