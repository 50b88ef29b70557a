"""The oracle against autograd, finite differences and the full Jacobian, all in float64."""

import math

import pytest
import torch
from problems import random_problem
from torch.autograd import gradcheck, gradgradcheck

from vvae_fast import reference
from vvae_fast.spec import FlowSpec

BATCHES = [((5,), ()), ((5,), (5,)), ((2, 1, 2), (1, 2)), ((2, 3), ()), ((), ())]


def float64_inputs(batch, params, num_steps=4, dim=3, scale=1.0, seed=0):
    p = random_problem(batch, num_steps, dim, params, scale, torch.float64, seed)
    return p, [t.requires_grad_() for t in p.inputs]


@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize(("batch", "params"), BATCHES)
def test_adjoint_is_autograds(batch, params, constraint):
    p, inputs = float64_inputs(batch, params)
    outputs = reference.planar_forward(*inputs, FlowSpec(constraint))[:2]
    wanted = torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))
    got = reference.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, FlowSpec(constraint))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("constraint", ["softplus", "none"])
def test_adjoint_at_the_edges_of_the_constraint(constraint):
    for alpha in (-80.0, -20.0, 0.0, math.log(math.e - 1), 30.0, 100.0):
        p, inputs = float64_inputs((6,), ())
        with torch.no_grad():
            inputs[1] += (alpha - (inputs[1] * inputs[2]).sum(-1, True)) * inputs[2] / inputs[2].square().sum(-1, True)
        outputs = reference.planar_forward(*inputs, FlowSpec(constraint))[:2]
        wanted = torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))
        got = reference.planar_backward(p.grad_z, p.grad_log_det, *inputs, FlowSpec(constraint))
        for x, y in zip(got, wanted, strict=True):
            assert (x - y).norm() <= 1e-9 * y.norm()


@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_log_det_is_the_jacobians(constraint, scale):
    p, _ = float64_inputs((6,), (), num_steps=7, dim=5, scale=scale)
    _, log_det, _ = reference.planar_forward(*p.inputs, FlowSpec(constraint))
    for row, got in zip(p.z, log_det, strict=True):
        jacobian = torch.func.jacrev(lambda x: reference.planar_forward(x, *p.inputs[1:], FlowSpec(constraint))[0])(row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, got, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize(("batch", "params"), BATCHES)
def test_derivatives_to_second_order(batch, params, constraint):
    _, inputs = float64_inputs(batch, params, num_steps=2)

    def flow(*tensors):
        return reference.planar_forward(*tensors, FlowSpec(constraint))[:2]

    assert gradcheck(flow, inputs)
    assert gradgradcheck(flow, inputs)


def test_second_derivative_at_zero_pre_activation():
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    u, w = torch.tensor([[0.5, -1.0]], dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert gradgradcheck(lambda z: reference.planar_forward(z, u, w, torch.zeros(1, dtype=torch.float64))[:2], (z,))


def test_constraint_keeps_every_step_invertible():
    p = random_problem((1,), 200, 3, scale=4.0, dtype=torch.float64)
    at = reference.constrain(p.u, p.w, "softplus")
    assert (at.s > 0).all()
    assert (at.alpha < -5).any()
    torch.testing.assert_close((p.w * at.u_hat).sum(-1), at.c, rtol=1e-9, atol=1e-9)


def test_zero_w_is_a_shift_with_finite_gradients():
    p, inputs = float64_inputs((4,), (), num_steps=2)
    inputs[2] = torch.zeros_like(inputs[2]).requires_grad_()
    z_K, log_det, _ = reference.planar_forward(*inputs)
    torch.testing.assert_close(z_K, p.z + (inputs[1] * torch.tanh(inputs[3])[:, None]).sum(0))
    assert (log_det == 0).all()
    wanted = torch.autograd.grad((z_K, log_det), inputs, (p.grad_z, p.grad_log_det))
    got = reference.planar_backward(p.grad_z, p.grad_log_det, *inputs)
    for x, y in zip(got, wanted, strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("batch", "params"), BATCHES)
def test_inverse_round_trip_and_derivatives(batch, params):
    p, inputs = float64_inputs(batch, params)
    z_K, log_det, _ = reference.planar_forward(*p.inputs)
    z_0, inverse_log_det = reference.planar_inverse(z_K, *p.inputs[1:])
    torch.testing.assert_close(z_0, p.z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-10, atol=1e-10)
    assert gradcheck(reference.planar_inverse, inputs)


def test_inverse_second_derivatives():
    _, inputs = float64_inputs((3,), (), num_steps=2)
    assert gradgradcheck(reference.planar_inverse, inputs)


def test_inverse_far_from_initialisation():
    p, _ = float64_inputs((500,), (), num_steps=3, scale=3.0)
    z_K, _, _ = reference.planar_forward(*p.inputs)
    again, _, _ = reference.planar_forward(reference.planar_inverse(z_K, *p.inputs[1:])[0], *p.inputs[1:])
    torch.testing.assert_close(again, z_K, rtol=1e-9, atol=1e-9)
