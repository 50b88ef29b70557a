"""Every activation with every constraint on the reference: against autograd, textbook formulas and the Jacobian."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import random_problem
from torch.autograd import gradcheck, gradgradcheck

import vvae_fast
from vvae_fast import reference
from vvae_fast.reference import activations
from vvae_fast.reference.flow import _constraint_slopes
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, FlowSpec

SLOPE = 0.3
TEXTBOOK = {
    "tanh": torch.tanh,
    "leaky_relu": lambda a: F.leaky_relu(a, SLOPE),
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "linear": lambda a: a,
}
PAIRS = list(itertools.product(ACTIVATIONS, CONSTRAINTS))
each_pair = pytest.mark.parametrize(("activation", "constraint"), PAIRS)
BATCHES = [((5,), ()), ((2, 3), (3,))]


def float64_inputs(batch, params, num_steps=3, dim=3, scale=1.0):
    p = random_problem(batch, num_steps, dim, params, scale, torch.float64)
    return p, [t.requires_grad_() for t in p.inputs]


def textbook_flow(z, u, w, b, activation, constraint, eps):
    """The published formulas, h' from autograd, as they stand."""
    alpha, n = (w * u).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    softplus = torch.log(1 + torch.exp(alpha))
    m = {"softplus": softplus - 1, "log_softplus": torch.log(1 + softplus) - 1, "none": alpha}[constraint]
    u, log_det = u + (m - alpha) * w / n, 0
    for k in range(u.shape[-2]):
        a = (z * w[..., k, :]).sum(-1) + b[..., k]
        h, h_prime = torch.func.jvp(TEXTBOOK[activation], (a,), (torch.ones_like(a),))
        z = z + u[..., k, :] * h[..., None]
        log_det = log_det + torch.log((1 + (w * u)[..., k, :].sum(-1) * h_prime).abs() + eps)
    return z, log_det


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize(("batch", "params"), BATCHES)
@each_pair
def test_values_and_gradients_are_the_textbooks(activation, constraint, batch, params, eps):
    p, inputs = float64_inputs(batch, params)
    wanted = textbook_flow(*inputs, activation, constraint, eps)
    options = {"activation": activation, "constraint": constraint, "slope": SLOPE, "log_det_eps": eps}
    got = vvae_fast.planar_flow(*inputs, **options)
    gradients = [torch.autograd.grad(x, inputs, (p.grad_z, p.grad_log_det)) for x in (got, wanted)]
    adjoint = reference.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, FlowSpec(**options))
    for x, y in zip((*got, *gradients[0], *adjoint), (*wanted, *gradients[1] * 2), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@each_pair
def test_log_det_is_the_jacobians(activation, constraint):
    p, _ = float64_inputs((6,), (), num_steps=5, dim=4, scale=1.5)
    options = {"activation": activation, "constraint": constraint, "slope": SLOPE}
    _, log_det = vvae_fast.planar_flow(*p.inputs, **options)
    jacobians = torch.vmap(torch.func.jacrev(lambda x: vvae_fast.planar_flow(x, *p.inputs[1:], **options)[0]))(p.z)
    torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, log_det, rtol=1e-9, atol=1e-11)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("batch", "params"), BATCHES)
@each_pair
def test_derivatives_to_second_order_in_both_modes(activation, constraint, batch, params):
    _, inputs = float64_inputs(batch, params, num_steps=2)

    def flow(*tensors):
        return reference.planar_forward(*tensors, FlowSpec(constraint, activation, SLOPE, 1e-2 * (params == ())))[:2]

    assert gradcheck(flow, inputs, check_forward_ad=True)
    assert gradgradcheck(flow, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_and_what_is_left_of_one(activation):
    a = torch.tensor([-90.0, -20.0, -3.0, -0.7, -1e-9, 1e-9, 0.4, 2.0, 15.0, 90.0], dtype=torch.float64)
    act = activations.activate(a, activation, SLOPE)
    first = torch.func.grad(lambda a: TEXTBOOK[activation](a).sum())
    torch.testing.assert_close(act.h, TEXTBOOK[activation](a), rtol=1e-14, atol=0)
    torch.testing.assert_close(act.h_prime, first(a), rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(act.rest, 1 - first(a), rtol=1e-12, atol=1e-16)
    wanted = torch.func.grad(lambda a: first(a).sum())(a)
    torch.testing.assert_close(act.h_second, wanted, rtol=1e-12, atol=1e-15)  # the textbook's 1 - h^2 has rounded
    single = activations.activate(a.float(), activation, SLOPE)
    for x, y in zip(single, activations.activate(a.float().double(), activation, SLOPE), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-38)


def test_log_softplus_at_the_edges():
    """c and s to full precision, u_hat on the side of it that c says, slopes that add to 1."""
    alpha = torch.linspace(-80, 100, 1801)
    w = torch.ones(len(alpha), 1)
    at = reference.constrain(alpha[:, None], w, "log_softplus")
    exact = torch.log1p(reference.softplus(alpha.double()))
    torch.testing.assert_close(at.s.double(), exact, rtol=5e-7, atol=0)
    assert ((at.u_hat[:, 0].double() - (exact - 1)).abs() <= 1.2e-7 * (1 + alpha.abs())).all()
    up, down = _constraint_slopes(alpha.double(), "log_softplus")
    torch.testing.assert_close(up + down, torch.ones_like(up))
    wanted = torch.func.grad(lambda alpha: torch.log1p(reference.softplus(alpha)).sum())(alpha.double())
    torch.testing.assert_close(up, wanted, rtol=1e-13, atol=0)


@each_pair
def test_zero_w_is_a_shift_with_finite_gradients(activation, constraint):
    p, inputs = float64_inputs((4,), (), num_steps=2)
    inputs[2] = torch.zeros_like(inputs[2]).requires_grad_()
    z_K, log_det = vvae_fast.planar_flow(*inputs, activation=activation, constraint=constraint, slope=SLOPE)
    torch.testing.assert_close(z_K, p.z + (inputs[1] * TEXTBOOK[activation](inputs[3])[:, None]).sum(0))
    assert (log_det == 0).all()
    wanted = torch.autograd.grad((z_K, log_det), inputs, (p.grad_z, p.grad_log_det))
    got = reference.planar_backward(p.grad_z, p.grad_log_det, *inputs, FlowSpec(constraint, activation, SLOPE))
    for x, y in zip(got, wanted, strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype):
    p = random_problem((7,), 4, 3, dtype=dtype)
    options = {"activation": "elu", "constraint": "log_softplus"}
    z_K, log_det = vvae_fast.planar_flow(*p.inputs, **options)
    wanted = vvae_fast.planar_flow(*(t.double() for t in p.inputs), **options)
    assert (z_K.dtype, log_det.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(log_det.double(), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z_K.double(), wanted[0].to(dtype).double(), rtol=1e-2, atol=1e-5)


def test_transforms():
    p, _ = float64_inputs((4,), (), num_steps=2)
    options = {"activation": "sigmoid", "constraint": "log_softplus"}

    def loss(z, w):
        z_K, log_det = vvae_fast.planar_flow(z, p.u, w, p.b, **options)
        return z_K.square().sum() + log_det.sum()

    whole = torch.func.grad(loss, argnums=1)(p.z, p.w)
    rows = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(p.z, p.w)
    torch.testing.assert_close(rows.sum(0), whole)
    _, tangent = torch.func.jvp(lambda w: loss(p.z, w), (p.w,), (torch.ones_like(p.w),))
    torch.testing.assert_close(tangent, whole.sum())


def test_compiles_as_one_graph():
    p = random_problem((6,), 3, 4)

    def flow(*tensors):
        return vvae_fast.planar_flow(*tensors, activation="elu", constraint="log_softplus")

    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*p.inputs), flow(*p.inputs))


@pytest.mark.parametrize("slope", [1.0, 1.7])
def test_forward_takes_a_steep_slope(slope):
    p, _ = float64_inputs((6,), ())
    options = {"activation": "leaky_relu", "slope": slope, "constraint": "log_softplus"}
    _, log_det = vvae_fast.planar_flow(*p.inputs, **options)
    jacobians = torch.vmap(torch.func.jacrev(lambda x: vvae_fast.planar_flow(x, *p.inputs[1:], **options)[0]))(p.z)
    torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, log_det, rtol=1e-9, atol=1e-11)
