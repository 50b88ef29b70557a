"""The inverse of every activation and constraint that guarantee one."""

import itertools
import math

import pytest
import torch
from problems import random_problem
from torch.autograd import gradcheck, gradgradcheck

import vvae_fast
from vvae_fast import reference
from vvae_fast.reference import activations
from vvae_fast.spec import ACTIVATIONS, FlowSpec

SLOPE = 0.3
CONSTRAINTS = ("softplus", "log_softplus")
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_pair = pytest.mark.parametrize(("activation", "constraint"), list(itertools.product(ACTIVATIONS, CONSTRAINTS)))


@pytest.mark.parametrize(("batch", "params"), [((5,), ()), ((2, 3), (3,))])
@each_pair
def test_round_trip_and_derivatives(activation, constraint, batch, params):
    p = random_problem(batch, 2, 3, params, dtype=torch.float64)
    options = {"activation": activation, "slope": SLOPE, "constraint": constraint}
    z_K, log_det = vvae_fast.planar_flow(*p.inputs, **options)
    z_0, inverse_log_det = vvae_fast.planar_flow_inverse(z_K, *p.inputs[1:], **options)
    torch.testing.assert_close(z_0, p.z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-10, atol=1e-10)

    def inverse(*tensors):
        return reference.planar_inverse(*tensors, FlowSpec(constraint, activation, SLOPE))

    inputs = [t.requires_grad_() for t in p.inputs]
    assert gradcheck(inverse, inputs, check_forward_ad=True, fast_mode=True)
    if params == ():
        assert gradgradcheck(inverse, inputs, fast_mode=True)


@each_activation
def test_a_million_points(activation):
    p = random_problem((1_000_000,), 1, 2, dtype=torch.float64)
    options = {"activation": activation, "slope": SLOPE}
    z_K, log_det = vvae_fast.planar_flow(*p.inputs, **options)
    z_0, inverse_log_det = vvae_fast.planar_flow_inverse(z_K, *p.inputs[1:], **options)
    torch.testing.assert_close(z_0, p.z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@each_pair
def test_residual_over_the_promised_range(activation, constraint, dtype, bound):
    """The residual of what comes back, computed in float64, for w.u from -80 to 100 and |R| from 0 to 150."""
    alpha = torch.cat([torch.linspace(-80, 100, 91), torch.tensor([math.log(math.e - 1)])]).to(dtype)
    small = torch.logspace(-30, 1, 63, dtype=torch.float64)
    rhs = torch.cat([torch.linspace(-150, 150, 151, dtype=torch.float64), small, -small]).to(dtype)
    at = reference.constrain(alpha[:, None], torch.ones_like(alpha)[:, None], constraint)
    rhs, c, s = rhs.expand(len(alpha), -1), at.c[:, None], at.s[:, None]
    x = activations.solve(rhs, c, s, activation, SLOPE)
    assert x.isfinite().all()
    x, s, rhs = x.double(), s.double(), rhs.double()
    h = activations.activate(x, activation, SLOPE).h
    residual = (x - h) + s * h - rhs
    assert (residual.abs() / rhs.abs().clamp(min=1)).max() <= bound


@pytest.mark.parametrize(("alpha", "rhs"), [(9.5, -6.75), (25.5, -23.0), (100.0, 2.75)])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "elu"])
def test_newton_alone_would_not_converge(activation, alpha, rhs):
    """Inside its bracket Newton can go on for long without shrinking either the bracket or the residual."""
    s = reference.softplus(torch.tensor(alpha, dtype=torch.float64))
    x = activations.solve(torch.tensor(rhs, dtype=torch.float64), s - 1, s, activation, SLOPE)
    torch.testing.assert_close(x + (s - 1) * activations.activate(x, activation, SLOPE).h, torch.tensor(rhs).double())


def test_the_last_steps_leave_the_value():
    """s and the slope at the root are tiny: rounding divided by them would be anything."""
    rhs = torch.logspace(-38, -1, 500)
    s = reference.softplus(torch.tensor(-80.0))
    for activation in ("tanh", "elu"):
        x = activations.solve(-rhs, s - 1, s, activation, SLOPE)
        assert (x.abs() <= 3).all()


@each_activation
def test_density_integrates_to_one(activation):
    """q_K over a grid: what the inverse and its log_det are for."""
    p = random_problem((1,), 3, 2, scale=0.8, dtype=torch.float64, seed=3)
    line = torch.linspace(-15, 15, 251, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    for constraint in CONSTRAINTS:
        z_0, log_det = vvae_fast.planar_flow_inverse(
            grid, *p.inputs[1:], activation=activation, slope=SLOPE, constraint=constraint
        )
        log_q = -z_0.square().sum(-1) / 2 - math.log(2 * math.pi) + log_det
        total = log_q.exp().sum() * (line[1] - line[0]) ** 2
        assert abs(total.item() - 1) < 0.005


@each_activation
def test_inverse_under_transforms(activation):
    p = random_problem((5,), 2, 3, dtype=torch.float64)
    options = {"activation": activation, "slope": SLOPE, "constraint": "log_softplus"}

    def inverse(z):
        return vvae_fast.planar_flow_inverse(z, *p.inputs[1:], **options)

    z_0, log_det = inverse(p.z)
    rows = torch.vmap(inverse)(p.z)
    torch.testing.assert_close(rows, (z_0, log_det))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        jacobians = torch.vmap(jacobian(lambda z: inverse(z)[0]))(p.z)
        torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, log_det)
    forward = torch.func.hessian(lambda z: inverse(z)[1].sum())(p.z)
    reverse = torch.func.jacrev(torch.func.jacrev(lambda z: inverse(z)[1].sum()))(p.z)
    torch.testing.assert_close(forward, reverse)


@each_activation
def test_no_constraint_no_inverse(activation):
    p = random_problem((2,), 1, 2)
    with pytest.raises(ValueError, match='"softplus" or "log_softplus" to invert, got "none"'):
        vvae_fast.planar_flow_inverse(*p.inputs, activation=activation, constraint="none")


def test_steep_slope_no_inverse():
    p = random_problem((2,), 1, 2)
    options = {"activation": "leaky_relu", "slope": 1.5, "constraint": "log_softplus"}
    with pytest.raises(ValueError, match=r"slope must be at most 1 to invert leaky_relu, got 1.5: .*flowjax accepts"):
        vvae_fast.planar_flow_inverse(*p.inputs, **options)
    vvae_fast.planar_flow_inverse(*p.inputs, **options | {"slope": 1.0})
    vvae_fast.planar_flow_inverse(*p.inputs, **options | {"activation": "elu"})  # which ignores it
