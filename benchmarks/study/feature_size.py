"""What an amortized flow gains on a study's data, fed to the encoder as 0 to 1 or larger, with and without `normalise`.

    python -m benchmarks.study.feature_size --sizes 1 16
    python -m benchmarks.study.feature_size --study mnist_mlp_cpu --root FOLDER

It trains the vanilla VAE and the amortized flow of 16 steps by configs/STUDY.yaml on one thread, keeps the last epoch,
and prints the NLL of the test set by importance sampling and the gain over the vanilla VAE, in nats a data point: means
and standard deviations over the seeds. A run takes about 20 s on digits, and 3 minutes on MNIST.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.study.study_results import CONFIGS
from vvae_fast import VAE, AmortizedPlanarFlow
from vvae_fast.train.data.sets import Dataset, load_dataset, make_loaders
from vvae_fast.train.run.networks import Rescale, build_optimizer, build_vae
from vvae_fast.train.run.objective import free_energy, kl_weight, lr_factor
from vvae_fast.train.run.runconfig import VANILLA, RunConfig
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.spread import Spread
from vvae_fast.train.study.studies import load_study

STEPS = 16
FLOWS = {"vanilla": None, "amortized": False, "amortized, normalise": True}


def make(config: RunConfig, dataset: Dataset, size: int, normalise: bool | None) -> VAE:
    """The configuration's VAE with pixels up to `size`, and no flow where `normalise` is None."""
    torch.manual_seed(config.seed)
    vanilla = build_vae(config, dataset)
    rescale, *layers = vanilla.encoder  # to pixels from 0 to 1
    encoder = nn.Sequential(rescale, Rescale(1 / size), *layers)
    dim, features = config.latent_dim, vanilla.feature_dim
    flow = None if normalise is None else AmortizedPlanarFlow(dim, STEPS, features, normalise=normalise)
    return VAE(encoder, vanilla.decoder, dim, flow, vanilla.likelihood, features)


def trained_nll(vae: VAE, config: RunConfig, dataset: Dataset) -> float:
    """The NLL of the test set after all epochs, in nats."""
    optimizer = build_optimizer(config, vae)
    loader, _, _ = make_loaders(dataset, config.batch_size, config.seed)
    for epoch in range(config.epochs):
        loader.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_share"] * lr_factor(epoch, config.epochs, config.schedule)
        for x in loader:
            optimizer.zero_grad()
            free_energy(vae(x), kl_weight(epoch, config.warmup_epochs)).backward()
            optimizer.step()
    vae.eval()
    generator = torch.Generator().manual_seed(config.seed)
    return -vae.log_likelihood(dataset.test, config.num_samples, generator=generator).mean().item()


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options by which `load` finds the study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits", help="of configs/")
    parser.add_argument("--root", type=Path, help="the folder of MNIST")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    return parser


def load(arguments: argparse.Namespace) -> tuple[Dataset, list[RunConfig]]:
    """The study's data, and the configuration of its vanilla VAE for each seed."""
    study = load_study(CONFIGS / f"{arguments.study}.yaml")
    dataset = load_dataset(study.settings["data"], arguments.root)
    base, vanilla = study.base(dataset), Model(VANILLA, 0)
    return dataset, [vanilla.config(base, seed, dataset) for seed in range(arguments.seeds)]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1], help="the largest pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset, configs = load(arguments)
    for size in arguments.sizes:
        nll: dict[str, list[float]] = {}
        for name, normalise in FLOWS.items():
            nll[name] = [trained_nll(make(config, dataset, size, normalise), config, dataset) for config in configs]
            gains = [before - after for before, after in zip(nll["vanilla"], nll[name], strict=True)]
            gain = f", gain {Spread.of(gains).text()}" if normalise is not None else ""
            fed = f"{dataset.name} fed as 0 to {size}"
            print(f"{fed}, {name}: NLL {Spread.of(nll[name]).text()}{gain}", flush=True)


if __name__ == "__main__":
    main()
