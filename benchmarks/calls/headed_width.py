"""An amortized flow whose head's last layer is computed inside it, and with that layer as a product of its own:

    python -m benchmarks.calls.headed_width [rounds] [threads]

Forward and backward are timed right after a training step of a VAE without a flow, as in head_products. It prints
medians over the rounds in microseconds, for D = 40 and a layer that reads F numbers, and which of the two
`AmortizedPlanarFlow` chooses.
"""

import torch

from benchmarks.calls.head_products import after_steps, rounds_and_threads, vanilla_step
from benchmarks.calls.turns import quiet
from benchmarks.flow.bench_training import BATCH, LATENT
from vvae_fast import AmortizedPlanarFlow
from vvae_fast.nn import base

WIDTHS = 32, 64, 128, 192, 256, 400
STEPS = 16, 80


class Contestant:
    """A flow of K steps with a full head of F numbers, trained alone; `most` is the widest layer that it computes."""

    def __init__(self, num_steps: int, width: int, most: int) -> None:
        self.flow, self.most = AmortizedPlanarFlow(LATENT, num_steps, width), most
        z, context = torch.randn(BATCH, LATENT), torch.rand(BATCH, width)
        self.inputs = z.requires_grad_(), context.requires_grad_()
        self.grads = torch.randn(BATCH, LATENT), torch.randn(BATCH)

    def __call__(self) -> None:
        base._MOST_HEADED = self.most
        with torch.enable_grad():
            outputs = self.flow(*self.inputs)
            torch.autograd.grad(outputs, [*self.inputs, *self.flow.parameters()], self.grads)


def main() -> None:
    rounds, threads = rounds_and_threads()
    quiet(threads)
    torch.manual_seed(0)
    chosen_up_to = base._MOST_HEADED
    step = vanilla_step()
    print(f"torch {torch.__version__}, {threads} threads, B = {BATCH}; microseconds")
    for num_steps in STEPS:
        for width in WIDTHS:
            inside, apart = (
                after_steps(step, Contestant(num_steps, width, most), rounds) for most in (width, width - 1)
            )
            chosen = "inside" if width <= chosen_up_to else "apart"
            ratio = inside / apart
            print(f"K = {num_steps:2}, F = {width:3}: inside {inside:6.0f}, apart {apart:6.0f}, {ratio:.2f}   {chosen}")


if __name__ == "__main__":
    main()
