"""The operators of Sylvester flows of the Triton backend: arguments checked, outputs made, kernels launched.

Shapes as in backends/sylvester.py. With no rows or no layers there is nothing to launch.
"""

import functools

from torch import Tensor

from vvae_fast.spec import ACTIVATIONS, FlowSpec
from vvae_fast.triton.sylvester.backward import plan_backward
from vvae_fast.triton.sylvester.calls import Call, check
from vvae_fast.triton.sylvester.forward import launch_forward
from vvae_fast.triton.sylvester.gradients import Gradients, Room
from vvae_fast.triton.sylvester.inverse import launch_inverse
from vvae_fast.triton.sylvester.inverse_backward import plan_inverse_backward
from vvae_fast.triton.sylvester.passed import launch_passed
from vvae_fast.triton.sylvester.sums import launch_sums

Maybe = Tensor | None


def sylvester_forward(
    z: Tensor,
    columns: Maybe,
    r: Tensor,
    r_tilde: Maybe,
    d: Tensor,
    d_tilde: Tensor,
    b: Tensor,
    s: Tensor,
    activation: int,
    slope: float,
    save: bool,
    inverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """z_L [R, D], log_det [R] and, if `save`, p [L, R, M]. Of the inverse z_0, its log_det and the roots a."""
    call, spec = Call(z, columns, r, r_tilde, d, d_tilde, b, s), _spec(activation, slope)
    z_out, log_det = z.new_empty(z.shape), z.new_empty(z.shape[0])
    saved = z.new_empty((call.layers, call.rows, call.units) if save else (0,))
    if not call.is_launched:
        z_out.copy_(z)
        log_det.zero_()
    else:
        launch = launch_inverse if inverse else launch_forward
        launch(call, z_out, log_det, saved, spec, save)
    return z_out, log_det, saved


def sylvester_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    columns: Maybe,
    r: Tensor,
    r_tilde: Maybe,
    d: Tensor,
    d_tilde: Tensor,
    b: Tensor,
    s: Tensor,
    saved: Tensor,
    activation: int,
    slope: float,
    inverse: bool = False,
) -> tuple[Tensor, ...]:
    """dz [R, D] and the gradients of the parameters, contiguous, as these; empty where there is none."""
    call, spec = Call(z, columns, r, r_tilde, d, d_tilde, b, s), _spec(activation, slope)
    check("grad_z", grad_z, (call.rows, call.dim), z)
    check("grad_log_det", grad_log_det, (call.rows,), z)
    check("saved", saved, (call.layers, call.rows, call.units), z)
    dz, to = z.new_empty(z.shape), Gradients.of(call)
    if not call.is_launched:
        dz.copy_(grad_z)
        for t in to:
            t.zero_()
        return dz, *to
    grad_z, grad_log_det, saved = grad_z.contiguous(), grad_log_det.contiguous(), saved.contiguous()
    # The triangular kind's adjoint has no use for z.
    passed = launch_passed(call, saved, spec, inverse) if inverse or columns is not None else z
    plan = (plan_inverse_backward if inverse else plan_backward)(call.sizes, z.device, spec)
    inputs = grad_z, grad_log_det, *call.params, saved, passed, dz
    if call.sizes.rows_per_set == 1:
        plan(*inputs, *to, z, z)
    else:
        room = Room.of(call)
        plan(*inputs, z, z, z, *room.vectors, room.parts, room.of_z)
        launch_sums(call, room, passed[1:] if inverse else passed[:-1], to)
    return dz, *to


sylvester_inverse = functools.partial(sylvester_forward, inverse=True)
sylvester_inverse_backward = functools.partial(sylvester_backward, inverse=True)


def _spec(activation: int, slope: float) -> FlowSpec:
    if not 0 <= activation < len(ACTIVATIONS):
        raise ValueError(f"activation must be in [0, {len(ACTIVATIONS) - 1}], got {activation}: {ACTIVATIONS}")
    return FlowSpec("none", ACTIVATIONS[activation], slope)
