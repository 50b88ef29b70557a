"""The reference as a backend: what operators compute, in plain PyTorch on z [*batch, D].

Its gradients are differentiable once more, and serve every backend for that; it leaves none of them out.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vvae_fast import reference, shapes
from vvae_fast.backends import operators
from vvae_fast.backends.base import Backend
from vvae_fast.spec import FlowSpec


def as_functions_of(inputs: tuple[Tensor, ...], z_out: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs as functions of every input, as a kernel's are: a derivative that is zero everywhere, as those of no
    steps or of the log-determinant of linear ones, is a gradient of zeros and not None. A trace holds neither."""
    if torch._C._get_tracing_state() is not None:
        return z_out, log_det
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return (z_out.clone() if z_out is inputs[0] else z_out), log_det  # no steps give no new tensor by themselves
    zero = sum(t[..., :0].sum() for t in inputs)
    return z_out - zero, log_det - zero  # and not plus: -0.0 stays


def _saving_nothing(flow: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, ...]]:
    def operation(z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec, save: bool) -> tuple[Any, ...]:
        if torch._C._get_tracing_state() is not None:
            with warnings.catch_warnings():  # the trace holds these K steps, and is warned of as if they were data
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                return *flow(z, u, w, b, spec)[:2], None
        return *as_functions_of((z, u, w, b), *flow(z, u, w, b, spec)[:2]), None

    return operation


planar_forward, planar_inverse = _saving_nothing(reference.planar_forward), _saving_nothing(reference.planar_inverse)


def planar_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, a: Any, spec: FlowSpec, *_: bool
) -> tuple[Tensor, ...]:
    """dz [*batch, D], du, dw and db as u, w and b, computed in the dtype of log_det."""
    dtype, z_dtype = grad_log_det.dtype, z.dtype
    grad_z, z, u, w, b = (t.to(dtype) for t in (grad_z, z, u, w, b))
    return tuple(t.to(z_dtype) for t in reference.planar_backward(grad_z, grad_log_det, z, u, w, b, spec))


def planar_backward_packed(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, packed: Tensor, a: Tensor, spec: FlowSpec, *_: bool
) -> tuple[Tensor, Tensor]:
    """dz [*batch, D] and dpacked as packed [*params, K (2 D + 1)]."""
    u, w, b = shapes.unpack(packed, a.shape[0], z.shape[-1])
    dz, du, dw, db = planar_backward(grad_z, grad_log_det, z, u, w, b, a, spec)
    return dz, shapes.pack(du, dw, db)


def planar_inverse_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, a: Any, spec: FlowSpec, *_: bool
) -> tuple[Tensor, ...]:
    """The derivatives of the reference's inverse."""
    # Aliases: where one argument was computed from another, its gradient must not run on into that one.
    inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (z, u, w, b)]
    z, u, w, b = inputs
    z_0, log_det = reference.planar_inverse(z, u, w, b, spec)
    weighted = (z_0 * grad_z).sum() + (log_det * grad_log_det).sum()
    return torch.autograd.grad(weighted, inputs, create_graph=True, allow_unused=True, materialize_grads=True)


_OPERATORS = operators.in_python(lambda: sys.modules[__name__])
REFERENCE = Backend("reference", _OPERATORS, lambda: [], lambda problem: [], is_plain=True)
