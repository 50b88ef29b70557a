"""One flow of one backend with its gradient: the autograd Function around the operators, or the node in its place.

A `Call` was checked, and so were the tensors: by `shapes.check`, or for an ordinary call by the operators alone.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vvae_fast import node, shapes
from vvae_fast.backends import REFERENCE
from vvae_fast.backends.base import Backend
from vvae_fast.backends.operators import PREFIXES, Operator
from vvae_fast.spec import FlowSpec

_is_compiling = torch.compiler.is_dynamo_compiling  # asked by every call
_unsafe_view = torch.ops.aten._unsafe_view.default  # a Function's outputs that are views allow no change in place


class Call(NamedTuple):
    """A call but for its tensors: z [*batch, D], and the parameters u, w [*params, K, D] and b [*params, K], or the one
    tensor packed [*params, K (2 D + 1)]."""

    backend: Backend
    forward: Operator  # the backend's
    backward: Operator
    differentiable_backward: Operator  # the reference's
    arguments: tuple[int | float, ...]  # of the operators, `FlowSpec.arguments`
    num_steps: int | None  # K where the parameters are packed

    @classmethod
    def of(cls, backend: Backend, spec: FlowSpec, inverse: bool = False, num_steps: int | None = None) -> "Call":
        """The call of a spec that was checked."""
        names = ("planar_inverse", "planar_inverse_backward") if inverse else ("planar_forward", "planar_backward")
        forward, backward = names if num_steps is None else ("planar_forward", "planar_backward_packed")
        return cls(
            backend,
            getattr(backend.operators, forward),
            getattr(backend.operators, backward),
            getattr(REFERENCE.operators, backward),
            spec.arguments(inverse),
            num_steps,
        )


@functools.lru_cache(maxsize=256, typed=True)  # typed: True equals 1.0 and is no number
def ordinary_call(
    backend: Backend,
    constraint: str,
    activation: str,
    slope: float,
    log_det_eps: float,
    inverse: bool = False,
    num_steps: int | None = None,
) -> Call:
    """The call of a spec that nobody has checked: it is, once for all equal arguments. Raises a TypeError, too,
    for what cannot be a key."""
    spec = FlowSpec(constraint, activation, slope, log_det_eps).checked(inverse)
    return Call.of(backend, spec, inverse, num_steps)


class PlanarFlowFunction(torch.autograd.Function):
    """The forward and the backward operator of a call, saving its tensors and the pre-activations a [K, rows] only."""

    @staticmethod
    def forward(ctx: Any, call: Call, z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        z_out, log_det, a = _forward(call, z, params, save=True)
        ctx.save_for_backward(z, *params, a)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return z_out, log_det

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, *needed = ctx.needs_input_grad
        nothing = [None] * len(needed)
        if grad_z is None and grad_log_det is None:
            return None, None, *nothing
        call, (z, *params, a) = ctx.call, ctx.saved_tensors
        if grad_z is None:
            grad_z = torch.zeros_like(z)
        if grad_log_det is None:
            grad_log_det = z.new_zeros(z.shape[:-1], dtype=shapes.compute_dtype(z.dtype))
        with_params, differentiable = any(needed), torch.is_grad_enabled()  # create_graph=True: and once more
        backward = call.differentiable_backward if differentiable else call.backward
        if differentiable or (z.dim() == 2 and params[0].dim() > 1):
            dz, *gradients = backward(grad_z, grad_log_det, z, *params, a, *call.arguments, with_params)
            return None, dz, *(gradients if with_params else nothing)
        rows = grad_z.reshape(-1, z.shape[-1]), grad_log_det.reshape(-1), z.reshape(-1, z.shape[-1])
        dz, *gradients = backward(*rows, *_flat_params(params), a, *call.arguments, with_params)
        if with_params:
            gradients = [gradient.view(t.shape) for gradient, t in zip(gradients, params, strict=True)]
        return None, dz.view(z.shape), *(gradients if with_params else nothing)


# PlanarFlowFunction.apply without its detour through torch.func, of which `needs_plain_torch` has found none at work.
_apply = super(torch.autograd.Function, PlanarFlowFunction).apply


def run(call: Call, z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """z_K or z_0 [*batch, D] and log_det [*batch] of arguments that share one dtype, which the backend takes."""
    if torch.is_grad_enabled() and not call.backend.is_plain:
        for t in (z, *params):
            if t.requires_grad:
                # torch.compile sees through nothing else.
                return (PlanarFlowFunction.apply if _is_compiling() else _apply)(call, z, *params)
    z_out, log_det, _ = _forward(call, z, params, save=False)
    return z_out, log_det


def run_by_node(call: Call, z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """`run` of an ordinary call, and no inverse: z_K [R, D] and log_det [R]."""
    prefix = PREFIXES[call.backend.name]
    if call.num_steps is None:
        return node.extension.planar_flow(z, *params, *call.arguments, prefix)
    return node.extension.packed_planar_flow(z, *params, call.num_steps, *call.arguments, prefix)


run_ordinary = run if node.load_error else run_by_node


def is_ordinary(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> bool:
    """`shapes.are_ordinary`, where neither plain torch operations have to serve nor torch.compile looks on."""
    return not (_is_compiling() or forward_ad._current_level >= 0) and node.is_ordinary(z, u, w, b)


def is_ordinary_packed(z: Tensor, packed: Tensor, num_steps: int, dim: int) -> bool:
    """`shapes.is_ordinary_packed`, on the same terms."""
    return not (_is_compiling() or forward_ad._current_level >= 0) and node.is_ordinary_packed(
        z, packed, num_steps, dim
    )


def reference_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: tuple[int | float, ...]
) -> tuple[Tensor, ...]:
    """The reference's, differentiable: csrc/autograd/node.cpp calls it."""
    return REFERENCE.operators.planar_backward(grad_z, grad_log_det, z, u, w, b, None, *numbers, True)


def _forward(call: Call, z: Tensor, params: tuple[Tensor, ...], save: bool) -> tuple[Tensor, Tensor, Tensor]:
    if call.num_steps is not None:
        params = shapes.unpack(params[0], call.num_steps, z.shape[-1])
    if z.dim() == 2 or call.backend.is_plain:
        return call.forward(z, *params, *call.arguments, save)
    z_out, log_det, a = call.forward(z.reshape(-1, z.shape[-1]), *_flat_params(params), *call.arguments, save)
    return _unsafe_view(z_out, z.shape), _unsafe_view(log_det, z.shape[:-1]), a


def _flat_params(params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[K, D], [K, D], [K] as they are, or [P, K, D], [P, K, D], [P, K], or packed [P, K (2 D + 1)]: views wherever the
    strides allow one."""
    if len(params) == 1:
        return (torch.atleast_2d(params[0]).flatten(0, -2),)
    u, w, b = params
    if u.dim() <= 3:
        return params
    return u.flatten(0, -3), w.flatten(0, -3), b.flatten(0, -2)
