"""One flow of one backend with its gradient: the autograd Function around the operators, or the node in its place.

A `Call` was checked, and so were the tensors: by `shapes.check`, or for an ordinary call by the operators alone.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vvae_fast import node, shapes
from vvae_fast.backends import REFERENCE
from vvae_fast.backends.base import Backend
from vvae_fast.backends.operators import PREFIXES, Operator
from vvae_fast.spec import FlowSpec

_is_compiling = torch.compiler.is_dynamo_compiling
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
    node: Operator | None  # what serves an ordinary call in their place, called with the tensors and these arguments
    node_arguments: tuple[int | float | str | None, ...]

    @classmethod
    def of(cls, backend: Backend, spec: FlowSpec, inverse: bool = False, num_steps: int | None = None) -> "Call":
        """The call of a spec that was checked."""
        names = ("planar_inverse", "planar_inverse_backward") if inverse else ("planar_forward", "planar_backward")
        forward, backward = names if num_steps is None else ("planar_forward", "planar_backward_packed")
        arguments, prefix = spec.arguments(inverse), PREFIXES.get(backend.name)
        by_node = node.planar_flow if num_steps is None else node.packed_planar_flow
        return cls(
            backend,
            getattr(backend.operators, forward),
            getattr(backend.operators, backward),
            getattr(REFERENCE.operators, backward),
            arguments,
            num_steps,
            None if inverse or prefix is None else by_node,
            (*arguments, prefix) if num_steps is None else (num_steps, *arguments, prefix),
        )

    @classmethod
    def headed(cls, backend: Backend, *spec: Any) -> "Call | None":
        """The same of a flow with its head, whose parameters are context, weight and bias; None of a backend that does
        not compute one. The spec is unchecked."""
        if backend.headed is None:
            return None
        forward, backward = backend.headed
        arguments = FlowSpec(*spec).checked().arguments()
        by_node = node.headed_planar_flow
        return cls(backend, forward, backward, _differentiable_headed, arguments, None, by_node, arguments)


def _differentiable_headed(*args: Any) -> tuple[Tensor, ...]:
    """`reference_headed_backward` with the operator's arguments."""
    grad_z, grad_log_det, z, context, weight, bias, _saved, *numbers, _params = args
    return reference_headed_backward(grad_z, grad_log_det, z, context, weight, bias, tuple(numbers))


@functools.lru_cache(maxsize=256, typed=True)  # typed: True equals 1.0 and is no number
def ordinary_call(backend: Backend, inverse: bool, num_steps: int | None, *spec: Any) -> Call:
    """The call of an unchecked spec, which is checked once for all equal arguments. Raises a TypeError, too,
    for what cannot be a key."""
    return Call.of(backend, FlowSpec(*spec).checked(inverse), inverse, num_steps)


headed_call = functools.lru_cache(maxsize=256, typed=True)(Call.headed)


class PlanarFlowFunction(torch.autograd.Function):
    """The forward and the backward operator of a call, saving its tensors and what the forward gives for that: the
    pre-activations a [K, rows], and in a headed flow some z."""

    @staticmethod
    def forward(ctx: Any, call: Call, z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        z_out, log_det, a = _forward(call, z, params, save=True)
        ctx.save_for_backward(z, *params, a)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return z_out, log_det

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        call, with_params = ctx.call, True in ctx.needs_input_grad[2:]
        if grad_z is None and grad_log_det is None:
            return (None,) * len(ctx.needs_input_grad)
        z, *params, a = ctx.saved_tensors
        if grad_z is None:
            grad_z = torch.zeros_like(z)
        if grad_log_det is None:
            grad_log_det = z.new_zeros(z.shape[:-1], dtype=shapes.compute_dtype(z.dtype))
        differentiable = torch.is_grad_enabled() or forward_ad._current_level >= 0  # create_graph=True; tangents
        backward = call.differentiable_backward if differentiable else call.backward
        if differentiable or (z.dim() == 2 and params[0].dim() > 1):
            dz, *gradients = backward(grad_z, grad_log_det, z, *params, a, *call.arguments, with_params)
        else:
            rows = grad_z.reshape(-1, z.shape[-1]), grad_log_det.reshape(-1), z.reshape(-1, z.shape[-1])
            dz, *gradients = backward(*rows, *_flat_params(params), a, *call.arguments, with_params)
            dz = dz.view(z.shape)
            if with_params:
                gradients = [gradient.view(t.shape) for gradient, t in zip(gradients, params, strict=True)]
        return None, dz, *(gradients if with_params else (None,) * len(params))


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


def reference_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: tuple[int | float, ...]
) -> tuple[Tensor, ...]:
    """The reference's, differentiable: csrc/autograd/node.cpp calls it."""
    return REFERENCE.operators.planar_backward(grad_z, grad_log_det, z, u, w, b, None, *numbers, True)


def reference_headed_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    numbers: tuple[int | float, ...],
) -> tuple[Tensor, ...]:
    """The same of a headed flow, docs/math.md (67): (dz, dcontext, dweight, dbias)."""
    dim = z.shape[1]
    params = shapes.unpack(nn.functional.linear(context, weight, bias), shapes.num_steps_of(weight, dim), dim)
    dz, du, dw, db = reference_backward(grad_z, grad_log_det, z, *params, numbers)
    dpacked = shapes.pack(du, dw, db)
    return dz, dpacked @ weight, dpacked.t() @ context, dpacked.sum(0)


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
