"""What heads of low rank learn: as they are, where `head.down` starts larger and `head.up` as much smaller, and with a
layer norm between the two.

    python -m benchmarks.study.head_start --full --layer-norm
    python -m benchmarks.study.head_start --full --layer-norm --rank 128 --study mnist_mlp_cpu --root FOLDER

A step of Adam moves all weights of `head.down` together by the learning rate, and what `head.up` reads by about as much
as it is: from larger weights it changes slowly, and is larger. A layer norm keeps its size. Amortized flows of 16 steps
are trained and measured as in `feature_size`. Printed are NLLs in nats a data point, means and standard deviations over
the seeds.
"""

import torch

from benchmarks.study.feature_size import STEPS, load, options, trained_nll
from vvae_fast import VAE, AmortizedPlanarFlow
from vvae_fast.train.data.sets import Dataset
from vvae_fast.train.run.networks import build_vae
from vvae_fast.train.run.runconfig import RunConfig
from vvae_fast.train.study.spread import Spread


def make(config: RunConfig, dataset: Dataset, rank: int | None, times: float, layer_norm: bool = False) -> VAE:
    """The configuration's VAE with an amortized flow whose `head.down` starts so many times as large."""
    torch.manual_seed(config.seed)
    vanilla = build_vae(config, dataset)
    dim, features = config.latent_dim, vanilla.feature_dim
    flow = AmortizedPlanarFlow(dim, STEPS, features, rank=rank, layer_norm=layer_norm)
    if rank is not None:
        with torch.no_grad():
            flow.head.down.weight *= times
            flow.head.up.weight /= times
    return VAE(vanilla.encoder, vanilla.decoder, dim, flow, vanilla.likelihood, features)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--times", type=float, nargs="*", default=[1, 16], help="how much larger")
    parser.add_argument("--full", action="store_true", help="a full head too")
    parser.add_argument("--layer-norm", action="store_true", help="one with a layer norm too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset, configs = load(arguments)
    rank = arguments.rank
    heads = [("full head", None, 1.0, False)] if arguments.full else []
    heads += [(f"rank {rank}, {times:g} times as large", rank, times, False) for times in arguments.times]
    heads += [(f"rank {rank}, layer norm", rank, 1.0, True)] if arguments.layer_norm else []
    for name, *head in heads:
        nll = [trained_nll(make(config, dataset, *head), config, dataset) for config in configs]
        print(f"{dataset.name}, {name}: NLL {Spread.of(nll).text()}", flush=True)


if __name__ == "__main__":
    main()
