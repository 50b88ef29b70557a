"""What a user could run instead: every contestant maps (z, u, w, b) to (z_K, log_det), constraint included."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

import vvae_fast
from vvae_fast import reference

Flow = Callable[..., tuple[Tensor, Tensor]]


class _NoOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, u, w, b)
        return z.clone(), z.new_empty(z.shape[:-1])

    @staticmethod
    def backward(ctx, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor, ...]:
        _, u, w, b = ctx.saved_tensors
        return grad_z, torch.empty_like(u), torch.empty_like(w), torch.empty_like(b)


def fused(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """This package."""
    return vvae_fast.planar_flow(z, u, w, b)


def eager_loop(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over steps that everyone writes, with the stable constraint and determinant."""
    return reference.planar_forward(z, u, w, b)[:2]


def no_op(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Clones z: what the autograd machinery costs by itself."""
    return _NoOp.apply(z, u, w, b)


def compiled_loop() -> Flow:
    """torch.compile's version of the eager loop, compiled at its first call."""
    torch._dynamo.reset()
    return torch.compile(eager_loop, dynamic=False)


CONTESTANTS: dict[str, Callable[[], Flow]] = {
    "vvae_fast": lambda: fused,
    "no-op": lambda: no_op,
    "torch.compile": compiled_loop,
    "eager loop": lambda: eager_loop,
}
CHECKED = ("vvae_fast", "torch.compile", "eager loop")  # the no-op has no answer to check


def forward_backward(flow: Flow, inputs: list[Tensor]) -> list[Tensor]:
    """z_K, log_det and the four gradients of z_K.sum() + log_det.sum()."""
    z_K, log_det = flow(*inputs)
    grads = torch.autograd.grad((z_K, log_det), inputs, (torch.ones_like(z_K), torch.ones_like(log_det)))
    return [z_K, log_det, *grads]


def first_call_seconds(flow: Flow, inputs: list[Tensor]) -> float:
    """How long the first forward and backward take: the compile time, where there is one."""
    start = time.perf_counter()
    forward_backward(flow, inputs)
    return time.perf_counter() - start


def check(flow: Flow, inputs: list[Tensor]) -> None:
    """AssertionError where outputs or gradients differ from the float64 oracle's: a wrong answer is not timed."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for got, wanted in zip(forward_backward(flow, inputs), forward_backward(eager_loop, exact), strict=True):
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        assert error < 1e-4, f"relative error {error:.1e}"
