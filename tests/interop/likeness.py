"""A flow of this package beside another's: values, and gradients for z and for parameters under any names."""

from collections.abc import Callable

import torch
from problems import relative_errors
from torch import Tensor

Flow = Callable[[Tensor], tuple[Tensor, Tensor]]


def values_and_gradients(flow: Flow, z: Tensor, params: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """z_K, log_det, dz and a flat gradient for each list of tensors, under weights that depend on the shapes alone."""
    g = torch.Generator().manual_seed(1)
    z = z.detach().requires_grad_()
    outputs = flow(z)
    weights = [torch.randn(t.shape, generator=g).to(t.dtype) for t in outputs]
    dz, *grads = torch.autograd.grad(outputs, [z, *(p for tensors in params for p in tensors)], weights)
    grads = iter(grads)
    flat = [torch.cat([next(grads).flatten() for _ in tensors]) for tensors in params]
    return *(t.detach() for t in outputs), dz, *flat


def assert_alike(
    ours: Flow, theirs: Flow, z: Tensor, our_params: list[list[Tensor]], their_params: list[list[Tensor]]
) -> None:
    """Values to 1e-5 and gradients to 1e-4, relative."""
    got = values_and_gradients(ours, z, our_params)
    wanted = values_and_gradients(theirs, z, their_params)
    assert [t.shape for t in got] == [t.shape for t in wanted]
    errors = relative_errors(got, wanted)
    assert max(errors[:2]) < 1e-5, errors
    assert max(errors[2:]) < 1e-4, errors
