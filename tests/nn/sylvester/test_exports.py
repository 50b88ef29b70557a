"""Sylvester flows as traces and exported programs."""

import pytest
import torch

from vvae_fast import SylvesterFlow


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["orthogonal", "householder", "triangular"])
def test_traces_and_exports(kind):
    flow = SylvesterFlow(5, 3, kind=kind)
    z = torch.randn(7, 5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    wanted = flow(z)
    for other in (torch.jit.trace(flow, (z,)), torch.export.export(flow, (z,)).module()):
        for one, right in zip(other(z), wanted, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)
