"""What heads of low rank learn where `head.down` starts larger than an nn.Linear, and `head.up` as much smaller.

    python -m benchmarks.study.head_start --rank 64
    python -m benchmarks.study.head_start --rank 128 --study mnist_mlp_cpu --root FOLDER

A step of Adam moves each weight by the learning rate, from an nn.Linear's size by as much as it is: larger weights turn
slower, and `head.up` reads larger numbers. It trains amortized flows of 16 steps by configs/STUDY.yaml on one thread,
with a full head and with one of that rank, keeps the last epoch, and prints the NLL of the test set by importance
sampling, in nats a data point: means and standard deviations over the seeds.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.study.feature_size import STEPS, trained_nll
from benchmarks.study.study_results import CONFIGS
from vvae_fast import VAE, AmortizedPlanarFlow
from vvae_fast.train.data.sets import Dataset, load_dataset
from vvae_fast.train.run.networks import build_vae
from vvae_fast.train.run.runconfig import VANILLA, RunConfig
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.spread import Spread
from vvae_fast.train.study.studies import load_study


def make(config: RunConfig, dataset: Dataset, rank: int | None, times: float) -> VAE:
    """The configuration's VAE with an amortized flow whose `head.down` starts so many times as large."""
    torch.manual_seed(config.seed)
    vanilla = build_vae(config, dataset)
    dim, features = config.latent_dim, vanilla.feature_dim
    flow = AmortizedPlanarFlow(dim, STEPS, features, rank=rank)
    if rank is not None:
        with torch.no_grad():
            flow.head.down.weight *= times
            flow.head.up.weight /= times
    return VAE(vanilla.encoder, vanilla.decoder, dim, flow, vanilla.likelihood, features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits", help="of configs/")
    parser.add_argument("--root", type=Path, help="the folder of MNIST")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--times", type=float, nargs="*", default=[1, 16], help="how much larger")
    parser.add_argument("--full", action="store_true", help="a full head too")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = load_study(CONFIGS / f"{arguments.study}.yaml")
    dataset = load_dataset(study.settings["data"], arguments.root)
    base, vanilla = study.base(dataset), Model(VANILLA, 0)
    heads = [("full head", None, 1.0)] if arguments.full else []
    heads += [(f"rank {arguments.rank}, {times:g} times as large", arguments.rank, times) for times in arguments.times]
    for name, rank, times in heads:
        configs = [vanilla.config(base, seed, dataset) for seed in range(arguments.seeds)]
        nll = [trained_nll(make(config, dataset, rank, times), config, dataset) for config in configs]
        print(f"{dataset.name}, {name}: NLL {Spread.of(nll).text()}", flush=True)


if __name__ == "__main__":
    main()
