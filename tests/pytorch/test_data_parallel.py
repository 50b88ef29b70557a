"""DistributedDataParallel: two processes, each with half of the rows, have the gradients of one with all of them."""

import os

import pytest
import torch
import torch.distributed as dist
from test_modules import away_from_identity
from torch import nn

from vvae_fast import AmortizedPlanarFlow, PlanarFlow

ROWS = 12


class Loss(nn.Module):
    """What needs every map of both modules: forward and inverse, shared and amortized, of two activations."""

    def __init__(self):
        super().__init__()
        self.shared = PlanarFlow(3, 4)
        self.amortized = AmortizedPlanarFlow(3, 4, 5, activation="leaky_relu")

    def forward(self, z, context):
        z_K, log_det = self.shared(z)
        z_0, inverse_log_det = self.amortized.inverse(z_K, context)
        y, _ = self.amortized(z, context)
        x, _ = self.shared.inverse(y)
        return (z_0.square().sum(-1) + x.sin().sum(-1) - log_det - inverse_log_det.square()).mean()


def model_and_inputs():
    torch.manual_seed(0)
    model = away_from_identity(Loss()).double()
    return model, torch.randn(ROWS, 3).double(), torch.randn(ROWS, 5).double()


def gradients(model, *inputs):
    model(*inputs).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def worker(rank, folder):
    """One of two processes: its half of the rows, the gradients into a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, *inputs = model_and_inputs()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)  # what DDP undoes: it sends the first process's parameters to the others
    parallel = nn.parallel.DistributedDataParallel(model)
    torch.save(gradients(parallel, *(t[rank::2] for t in inputs)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")
def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)  # a fork would break OpenMP's threads
    wanted = gradients(*model_and_inputs())
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted)
    halves = [gradients(model_and_inputs()[0], *(t[r::2] for t in model_and_inputs()[1:])) for r in (0, 1)]
    assert not torch.allclose(halves[0]["shared.u"], halves[1]["shared.u"])
