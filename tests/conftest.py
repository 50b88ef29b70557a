"""Fixtures of the whole suite."""

import pytest
import torch

from vvae_fast import ops


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty holds NaN: an output element that a kernel leaves out cannot pass for a right one."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ops.isa_levels())
def isa(request):
    """Each instruction set that this machine has, in turn."""
    previous = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(previous)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    previous = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(previous)
