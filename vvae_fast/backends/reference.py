"""The reference as a backend: what operators compute, in plain PyTorch on z [*batch, D].

Its outputs are functions of every input, as a kernel's are: a derivative that is zero everywhere, as those of no steps
or of the log-determinant of linear ones, is a gradient of zeros and not None. Its gradients are differentiable once
more, and serve every backend for that.
"""

import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vvae_fast import reference, shapes
from vvae_fast.backends import operators
from vvae_fast.backends.base import Backend
from vvae_fast.spec import FlowSpec


def planar_forward(z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec, save: bool) -> tuple[Tensor | None, ...]:
    """z_K [*batch, D] and log_det [*batch]; nothing is saved."""
    return _differentiable(reference.planar_forward, z, u, w, b, spec)


def planar_inverse(z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec, save: bool) -> tuple[Tensor | None, ...]:
    """z_0 [*batch, D] and log_det [*batch]; nothing is saved."""
    return _differentiable(reference.planar_inverse, z, u, w, b, spec)


def _differentiable(
    flow: Callable[..., tuple[Tensor, ...]], z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec
) -> tuple[Tensor | None, ...]:
    if torch._C._get_tracing_state() is not None:
        with warnings.catch_warnings():  # the trace holds these K steps, and is warned of as if they were data
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return *flow(z, u, w, b, spec)[:2], None
    z_out, log_det = flow(z, u, w, b, spec)[:2]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (z, u, w, b)):
        return (z.clone() if z_out is z else z_out), log_det, None  # no steps give no new tensor by themselves
    zero = sum(t[..., :0].sum() for t in (z, u, w, b))
    return z_out - zero, log_det - zero, None  # and not plus: -0.0 stays


def planar_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor | None,
    spec: FlowSpec,
    params: bool = True,
) -> tuple[Tensor, ...]:
    """dz [*batch, D], du, dw and db as u, w and b, computed in the dtype of log_det."""
    dtype, z_dtype = grad_log_det.dtype, z.dtype
    grad_z, z, u, w, b = (t.to(dtype) for t in (grad_z, z, u, w, b))
    return tuple(t.to(z_dtype) for t in reference.planar_backward(grad_z, grad_log_det, z, u, w, b, spec))


def planar_backward_packed(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    packed: Tensor,
    a: Tensor,
    spec: FlowSpec,
    params: bool = True,
) -> tuple[Tensor, Tensor]:
    """dz [*batch, D] and dpacked as packed [*params, K (2 D + 1)]."""
    unpacked = shapes.unpack(packed, a.shape[0], z.shape[-1])
    dz, du, dw, db = planar_backward(grad_z, grad_log_det, z, *unpacked, a, spec)
    return dz, torch.cat([du.flatten(-2), dw.flatten(-2), db], -1)


def planar_inverse_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor | None,
    spec: FlowSpec,
    params: bool = True,
) -> tuple[Tensor, ...]:
    """The derivatives of the reference's inverse."""
    # Aliases: where one argument was computed from another, its gradient must not run on into that one.
    inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (z, u, w, b)]
    z, u, w, b = inputs
    z_0, log_det = reference.planar_inverse(z, u, w, b, spec)
    weighted = (z_0 * grad_z).sum() + (log_det * grad_log_det).sum()
    return torch.autograd.grad(weighted, inputs, create_graph=True, allow_unused=True, materialize_grads=True)


REFERENCE = Backend(
    "reference",
    operators.in_python(lambda: sys.modules[__name__]),
    unavailable=lambda: [],
    unsupported=lambda problem: [],
    is_plain=True,
)
