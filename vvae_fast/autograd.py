"""The autograd Function around the kernels, and the choice of the differentiable reference where it cannot serve.

Numbers are `shapes.Formulas.numbers()` and the backend a key of `ops.OPERATORS`: both were checked.
"""

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from vvae_fast import node, ops, reference, shapes
from vvae_fast.shapes import Formulas, Numbers

How = tuple[Numbers, str]  # numbers and backend: each argument of a Function costs, be it no tensor

# Asked by every call.
_is_compiling = torch.compiler.is_compiling
_transforms_are_active, _tracing_state = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_unsafe_view = torch.ops.aten._unsafe_view.default  # a Function's outputs that are views allow no change in place


class PlanarFlowFunction(torch.autograd.Function):
    """planar_forward and planar_backward on z [*batch, D], saving z and the pre-activations a [K, rows] only."""

    @staticmethod
    def forward(ctx, z: Tensor, u: Tensor, w: Tensor, b: Tensor, how: How) -> tuple[Tensor, Tensor]:
        z_K, log_det, a = _run_forward(z, u, w, b, *how, save=True)
        ctx.save_for_backward(z, u, w, b, a)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return z_K, log_det

    @staticmethod
    def backward(ctx, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_log_det is None:
            return None, None, None, None, None
        (z, u, w, b, a), (numbers, backend) = ctx.saved_tensors, ctx.how
        if grad_z is None or grad_log_det is None:
            grad_z, grad_log_det = _zeros_for_none(grad_z, grad_log_det, z)
        if torch.is_grad_enabled():  # create_graph=True: the gradients must be differentiable themselves
            return *reference_backward(grad_z, grad_log_det, z, u, w, b, numbers), None
        planar_backward, params = ops.OPERATORS[backend].planar_backward, any(ctx.needs_input_grad[1:])
        return *_run_backward(planar_backward, grad_z, grad_log_det, z, u, w, b, a, numbers, params), None


def planar_flow(z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: Numbers, backend: str) -> tuple[Tensor, Tensor]:
    """z_K [*batch, D] and log_det [*batch] of arguments that share one dtype, which the kernels of `backend` take."""
    if torch.is_grad_enabled() and (z.requires_grad or u.requires_grad or w.requires_grad or b.requires_grad):
        return _apply(PlanarFlowFunction, z, u, w, b, (numbers, backend))
    return _run_forward(z, u, w, b, numbers, backend, save=False)[:2]


class PackedPlanarFlowFunction(torch.autograd.Function):
    """The same for parameters that a linear head packed, [*params, K (2 D + 1)]: one gradient, in the head's layout."""

    @staticmethod
    def forward(
        ctx, z: Tensor, packed: Tensor, num_steps: int, numbers: Numbers, backend: str
    ) -> tuple[Tensor, Tensor]:
        z_K, log_det, a = _run_forward(z, *ops.unpack(packed, num_steps, z.shape[-1]), numbers, backend, save=True)
        ctx.save_for_backward(z, packed, a)
        ctx.num_steps, ctx.numbers, ctx.backend = num_steps, numbers, backend
        ctx.set_materialize_grads(False)
        return z_K, log_det

    @staticmethod
    def backward(ctx, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_log_det is None:
            return None, None, None, None, None
        z, packed, a = ctx.saved_tensors
        if grad_z is None or grad_log_det is None:
            grad_z, grad_log_det = _zeros_for_none(grad_z, grad_log_det, z)
        if torch.is_grad_enabled():
            u, w, b = ops.unpack(packed, ctx.num_steps, z.shape[-1])
            dz, du, dw, db = reference_backward(grad_z, grad_log_det, z, u, w, b, ctx.numbers)
            return dz, torch.cat([du.flatten(-2), dw.flatten(-2), db], -1), None, None, None
        planar_backward, params = ops.OPERATORS[ctx.backend].planar_backward_packed, ctx.needs_input_grad[1]
        if z.dim() == packed.dim() == 2:
            dz, dpacked = planar_backward(grad_z, grad_log_det, z, packed, a, *ctx.numbers, params)
            return dz, dpacked if params else None, None, None, None
        dz, dpacked = planar_backward(
            grad_z.reshape(-1, z.shape[-1]),
            grad_log_det.reshape(-1),
            z.reshape(-1, z.shape[-1]),
            packed.flatten(0, -2) if packed.dim() > 1 else packed[None],
            a,
            *ctx.numbers,
            params,
        )
        return dz.view(z.shape), dpacked.view(packed.shape) if params else None, None, None, None


def packed_planar_flow(
    z: Tensor, packed: Tensor, num_steps: int, numbers: Numbers, backend: str
) -> tuple[Tensor, Tensor]:
    """`planar_flow` with the parameters that `ops.unpack` finds in packed [*params, K (2 D + 1)]."""
    if torch.is_grad_enabled() and (z.requires_grad or packed.requires_grad):
        return _apply(PackedPlanarFlowFunction, z, packed, num_steps, numbers, backend)
    return _run_forward(z, *ops.unpack(packed, num_steps, z.shape[-1]), numbers, backend, save=False)[:2]


# Of an ordinary call.
ordinary_planar_flow, ordinary_packed_planar_flow = (
    (planar_flow, packed_planar_flow) if node.load_error else (node.planar_flow, node.packed_planar_flow)
)


class PlanarInverseFunction(torch.autograd.Function):
    """planar_inverse and planar_inverse_backward on z [*batch, D], saving z and the roots a [K, rows]."""

    @staticmethod
    def forward(ctx, z: Tensor, u: Tensor, w: Tensor, b: Tensor, how: How) -> tuple[Tensor, Tensor]:
        z_0, log_det, a = _run_inverse(z, u, w, b, *how, save=True)
        ctx.save_for_backward(z, u, w, b, a)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return z_0, log_det

    @staticmethod
    def backward(ctx, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_log_det is None:
            return None, None, None, None, None
        (z, u, w, b, a), (numbers, backend) = ctx.saved_tensors, ctx.how
        if grad_z is None or grad_log_det is None:
            grad_z, grad_log_det = _zeros_for_none(grad_z, grad_log_det, z)
        if torch.is_grad_enabled():
            return *_reference_inverse_backward(grad_z, grad_log_det, z, u, w, b, numbers), None
        planar_backward, params = ops.OPERATORS[backend].planar_inverse_backward, any(ctx.needs_input_grad[1:])
        return *_run_backward(planar_backward, grad_z, grad_log_det, z, u, w, b, a, numbers[:3], params), None


def planar_flow_inverse(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: Numbers, backend: str
) -> tuple[Tensor, Tensor]:
    """z_0 [*batch, D] and log_det [*batch] of arguments that share one dtype, which the kernels of `backend` take."""
    if torch.is_grad_enabled() and (z.requires_grad or u.requires_grad or w.requires_grad or b.requires_grad):
        return _apply(PlanarInverseFunction, z, u, w, b, (numbers, backend))
    return _run_inverse(z, u, w, b, numbers, backend, save=False)[:2]


def needs_plain_torch() -> bool:
    """Whether only plain torch operations serve: torch.func and forward-mode AD transform no others, and traces for
    TorchScript and ONNX take no others along."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
    )


def is_ordinary(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> bool:
    """`shapes.are_ordinary`, where neither plain torch operations have to serve nor torch.compile looks on."""
    if _is_compiling() or forward_ad._current_level >= 0:
        return False
    if node.is_ordinary is not None:
        return node.is_ordinary(z, u, w, b)
    return not _transforms_are_active() and _tracing_state() is None and shapes.are_ordinary(z, u, w, b)


def is_ordinary_packed(z: Tensor, packed: Tensor, num_steps: int, dim: int) -> bool:
    """`shapes.is_ordinary_packed`, on the same terms."""
    if _is_compiling() or forward_ad._current_level >= 0:
        return False
    if node.is_ordinary_packed is not None:
        return node.is_ordinary_packed(z, packed, num_steps, dim)
    return (
        not _transforms_are_active()
        and _tracing_state() is None
        and shapes.is_ordinary_packed(z, packed, num_steps, dim)
    )


def _apply(function: type[torch.autograd.Function], *args) -> tuple[Tensor, Tensor]:
    """function.apply without its detour through torch.func, of which `needs_plain_torch` has found none at work."""
    if torch.compiler.is_compiling():  # sees through nothing else
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def _zeros_for_none(grad_z: Tensor | None, grad_log_det: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both outputs, of which one was not used."""
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    if grad_log_det is None:
        grad_log_det = z.new_zeros(z.shape[:-1], dtype=shapes.compute_dtype(z.dtype))
    return grad_z, grad_log_det


def reference_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: Numbers
) -> tuple[Tensor, ...]:
    """The reference's, differentiable, in the dtype of computation."""
    inputs = (t.to(grad_log_det.dtype) for t in (grad_z, grad_log_det, z, u, w, b))
    return tuple(t.to(z.dtype) for t in reference.planar_backward(*inputs, *Formulas.of_numbers(*numbers)))


def _reference_inverse_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: Numbers
) -> tuple[Tensor, ...]:
    """The derivatives of the reference's inverse, differentiable once more."""
    # Aliases: where one argument was computed from another, its gradient must not run on into that one.
    inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (z, u, w, b)]
    z_0, log_det = reference.planar_inverse(*inputs, *Formulas.of_numbers(*numbers)[:3])
    weighted = (z_0 * grad_z).sum() + (log_det * grad_log_det).sum()
    return torch.autograd.grad(weighted, inputs, create_graph=True, allow_unused=True, materialize_grads=True)


def _flat_params(u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[K, D], [K, D], [K] as they are, or [P, K, D], [P, K, D], [P, K]: views wherever the strides allow one."""
    if u.dim() <= 3:
        return u, w, b
    return u.flatten(0, -3), w.flatten(0, -3), b.flatten(0, -2)


def _run_forward(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: Numbers, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    planar_forward = ops.OPERATORS[backend].planar_forward
    if z.dim() == 2:
        return planar_forward(z, u, w, b, *numbers, save)
    z_K, log_det, a = planar_forward(z.reshape(-1, z.shape[-1]), *_flat_params(u, w, b), *numbers, save)
    return _unsafe_view(z_K, z.shape), _unsafe_view(log_det, z.shape[:-1]), a


def _run_inverse(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, numbers: Numbers, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    planar_inverse = ops.OPERATORS[backend].planar_inverse
    if z.dim() == 2:
        return planar_inverse(z, u, w, b, *numbers[:3], save)
    z_0, log_det, a = planar_inverse(z.reshape(-1, z.shape[-1]), *_flat_params(u, w, b), *numbers[:3], save)
    return _unsafe_view(z_0, z.shape), _unsafe_view(log_det, z.shape[:-1]), a


def _run_backward(
    planar_backward: OpOverload,
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    numbers: tuple[int | float, ...],
    params: bool,
) -> tuple[Tensor | None, ...]:
    """dz, and with `params` du, dw and db, by the operator of the flow or of its inverse."""
    if z.dim() == 2:
        gradients = planar_backward(grad_z, grad_log_det, z, u, w, b, a, *numbers, params)
        return gradients if params else (gradients[0], None, None, None)
    dim = z.shape[-1]
    dz, du, dw, db = planar_backward(
        grad_z.reshape(-1, dim),
        grad_log_det.reshape(-1),
        z.reshape(-1, dim),
        *_flat_params(u, w, b),
        a,
        *numbers,
        params,
    )
    if not params:
        return dz.view(z.shape), None, None, None
    return dz.view(z.shape), du.view(u.shape), dw.view(w.shape), db.view(b.shape)
