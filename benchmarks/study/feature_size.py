"""What an amortized flow gains on digits, fed to the encoder as 0 to 1 and as 0 to 16, with and without `normalise`.

    python -m benchmarks.study.feature_size [seeds]

It trains the vanilla VAE and the amortized flow of 16 steps of configs/digits.yaml, keeps the last epoch, and prints
the NLL of the test set by importance sampling and the gain over the vanilla VAE, in nats a data point: means and
standard deviations over the seeds. A run takes about 20 s on one core; with 3 seeds there are 18.
"""

import sys

import torch
from torch import nn

from benchmarks.study.study_results import CONFIGS
from vvae_fast import VAE, AmortizedPlanarFlow
from vvae_fast.train.data.sets import Dataset, load_dataset, make_loaders
from vvae_fast.train.run.networks import build_optimizer, build_vae
from vvae_fast.train.run.objective import free_energy, lr_factor
from vvae_fast.train.run.runconfig import VANILLA, RunConfig
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.spread import Spread
from vvae_fast.train.study.studies import load_study

STEPS = 16
SIZES = {"0 to 1": 1, "0 to 16": 16}


def make(config: RunConfig, dataset: Dataset, size: int, normalise: bool | None) -> VAE:
    """The configuration's VAE with pixels up to `size`, and no flow where `normalise` is None."""
    torch.manual_seed(config.seed)
    vanilla = build_vae(config, dataset)
    _, *layers = vanilla.encoder  # the first one divides the pixels by their largest value
    encoder = nn.Sequential(*layers) if size != 1 else vanilla.encoder
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
            free_energy(vae(x), 1.0).backward()
            optimizer.step()
    vae.eval()
    generator = torch.Generator().manual_seed(config.seed)
    return -vae.log_likelihood(dataset.test, config.num_samples, generator=generator).mean().item()


def main() -> None:
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    torch.set_num_threads(1)
    study = load_study(CONFIGS / "digits.yaml")
    dataset = load_dataset(study.settings["data"])
    base, vanilla = study.base(dataset), Model(VANILLA, 0)
    for title, size in SIZES.items():
        nll = {}
        for name, normalise in (("vanilla", None), ("amortized", False), ("amortized, normalise", True)):
            configs = [vanilla.config(base, seed, dataset) for seed in seeds]
            nll[name] = [trained_nll(make(config, dataset, size, normalise), config, dataset) for config in configs]
            gains = [before - after for before, after in zip(nll["vanilla"], nll[name], strict=True)]
            gain = f", gain {Spread.of(gains).text()}" if normalise is not None else ""
            print(f"digits fed as {title}, {name}: NLL {Spread.of(nll[name]).text()}{gain}", flush=True)


if __name__ == "__main__":
    main()
