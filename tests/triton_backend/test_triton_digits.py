"""tests/core/test_digits.py for the Triton kernels, and the memory that z takes on the way back."""

import digits
import problems
import pytest
import torch
from problems import oracle, random_problem, relative_errors, run
from torch import Tensor
from triton_device import DEVICE, TRITON, each_parameters

import vvae_fast
from vvae_fast import reference
from vvae_fast.reference import activations
from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics, direct_backward
from vvae_fast.triton.launch import Launch

# NumPy's, which interprets: what is selected against may divide by 0.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


@pytest.fixture(params=["direct", "compact"])
def form(request, monkeypatch):
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: request.param == "compact")
    return request.param


def answer(problem: digits.Problem) -> tuple[Tensor, ...]:
    moved = problem._replace(tensors=problem.tensors.to(DEVICE))
    return tuple(t.cpu() for t in digits.run(moved, "triton"))


def one_step(alpha: float, rows: int, amortized: bool, dtype: torch.dtype = torch.float32) -> problems.Problem:
    """z along w, so that a > 0."""
    p = digits.one_step(alpha, rows, dtype)
    p = p._replace(z=p.w * p.z[:, :1].abs())
    return digits.with_sets(p, rows) if amortized else p


@pytest.mark.parametrize("problem", digits.inverse_of_one_step(), ids=digits.name_of)
def test_gradients_of_an_inverse_step_that_stretches(problem):
    digits.assert_digits(problem, answer(problem), "triton")


# The interpreter is slow: each kind of parameters once. tests/core/test_digits.py has the others.
STRETCHING = [problem for problem in digits.inverse_of_many_steps() if problem.name.startswith("elu")]


@pytest.mark.parametrize("problem", STRETCHING, ids=digits.name_of)
def test_gradients_of_an_inverse_of_many_steps(problem):
    digits.assert_digits(problem, answer(problem), "triton")


GROWING = [problem for problem in digits.growing_flows() if problem.name.startswith("leaky_relu-8")]


@pytest.mark.parametrize("problem", GROWING, ids=digits.name_of)
def test_gradients_where_z_grows(problem):
    digits.assert_digits(problem, answer(problem), "triton")


@pytest.mark.parametrize("problem", digits.huge_slopes(), ids=digits.name_of)
def test_inverse_of_tanh_with_a_huge_c(problem):
    z_0, log_det, *_ = answer(problem)
    digits.assert_inverts(problem, z_0, log_det, "triton")


@pytest.mark.parametrize("c", [2e19, 1e30])
@pytest.mark.parametrize("activation", ["sigmoid", "elu"])
def test_other_roots_with_a_huge_c(activation, c):
    R = c * torch.tensor([0.25, 1.5] if activation == "sigmoid" else [0.25, -0.25, 1.5, -1.5, -1e-20])
    one = torch.ones(len(R), 1, 1)
    inputs = (t.to(DEVICE) for t in (R[:, None], c * one, one, torch.zeros(len(R), 1)))
    formulas = FlowSpec(activation=activation).arguments(inverse=True)
    _, log_det, a = (t.cpu() for t in TRITON.planar_inverse(*inputs, *formulas, True))
    at = reference.constrain(c * one.double(), one.double(), "softplus")
    x = activations.solve(R.double(), at.c.squeeze(), at.s.squeeze(), activation, 1.0)
    act = activations.activate(x, activation, 1.0)
    exact = -activations.log_abs_determinant(act, at.c.squeeze(), at.s.squeeze(), at.sunk.squeeze())
    torch.testing.assert_close(a[0].double(), x, rtol=2e-6, atol=0)
    torch.testing.assert_close(log_det.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("alpha", "dtype"), [(-100.0, torch.float32), (-1000.0, torch.float32), (-720.0, torch.float64)]
)
@pytest.mark.parametrize(
    ("activation", "constraint"),
    [("linear", "log_softplus"), *((name, "softplus") for name in ("linear", "leaky_relu", "elu"))],
)
@pytest.mark.usefixtures("form")
def test_log_det_below_the_range_of_s(activation, constraint, alpha, dtype):
    """Where h' = 1 it is w . u itself, with its gradients; 1 / s times a row's gradient of 100 would be infinite."""
    p = one_step(alpha, 3, False, dtype)
    p = p._replace(grad_z=torch.zeros_like(p.z), grad_log_det=100 + p.grad_log_det)
    z_K, *got = run(p.to(DEVICE), constraint, "triton", activation=activation)
    assert z_K.isfinite().all()
    total, exact = p.grad_log_det.sum(), (p.w.double() * p.u.double()).sum().expand(3)
    wanted = exact, torch.zeros_like(p.z), total * p.w, total * p.u, 0 * p.b
    errors = relative_errors(tuple(t.cpu() for t in got), tuple(t.double() for t in wanted))
    assert max(errors) < 20 * torch.finfo(dtype).eps


@each_parameters
def test_log_det_of_the_inverse_below_the_range_of_s(amortized):
    p = one_step(-100.0, 3, amortized)
    p = p._replace(z=1e-3 * p.z, b=1e-3 * p.b, grad_z=torch.zeros_like(p.z))  # a root of float32's range
    got = answer(digits.Problem(p, {"activation": "linear"}, True, ""))[1:]
    over = -p.grad_log_det[:, None, None] if amortized else -p.grad_log_det.sum()
    exact = -(p.w.double() * p.u.double()).sum(-1).flatten().expand(3)
    wanted = exact, torch.zeros_like(p.z), over * p.w, over * p.u, 0 * p.b
    assert max(relative_errors(got, tuple(t.double() for t in wanted))) < 2e-6


@each_parameters
def test_gradients_of_rows_on_either_side_of_elu(amortized):
    """Where h' = 1 log_det is w . u; where h' < 1, s is lost beside 1 - h'."""
    p = one_step(-100.0, 6, amortized)
    p = p._replace(z=p.z * torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None], b=torch.zeros_like(p.b))
    wanted, loop = oracle(p.to(torch.float64), activation="elu"), run(p, backend="reference", activation="elu")
    got = run(p.to(DEVICE), backend="triton", activation="elu")
    for ours, theirs in zip(relative_errors(got, wanted), relative_errors(loop, wanted), strict=True):
        assert ours <= max(digits.MOST_RATIO * theirs, digits.FLOOR)


@each_parameters
def test_gradients_of_a_round_trip_cancel_where_w_is_zero(amortized):
    p = random_problem((4,), 3, 3, (4,) if amortized else (), dtype=torch.float64)
    p.w[..., 1, :] = 0
    inputs = [t.requires_grad_() for t in p.to(DEVICE).inputs]
    z_K, log_det = vvae_fast.planar_flow(*inputs, backend="triton")
    z_0, inverse_log_det = vvae_fast.planar_flow_inverse(z_K, *inputs[1:], backend="triton")
    outputs, grads = (z_0, log_det + inverse_log_det), (p.grad_z.to(DEVICE), p.grad_log_det.to(DEVICE))
    for t in torch.autograd.grad(outputs, inputs, grads)[1:]:
        torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rows", "sets", "wanted"),
    [
        (torch.float32, 6, 6, None),
        (torch.bfloat16, 6, 6, (6, 5, 4)),
        (torch.float32, 6, 3, (3, 5, 4)),
        (torch.float32, 10**6, 1, (1024, 5, 64, 4)),
    ],
    ids=["dw itself", "half precision", "sets of two rows", "shared"],
)
def test_memory_of_the_z_that_the_way_back_takes(monkeypatch, dtype, rows, sets, wanted):
    """dw's own where a step's gradient can take its z's place; else it does not grow with the rows of a set."""
    launched = []
    monkeypatch.setattr(Launch, "__call__", lambda planned, *tensors: launched.append(tensors))
    new = {"dtype": dtype, "device": "meta"}
    z, u, b = torch.empty(rows, 4, **new), torch.empty(sets, 5, 4, **new), torch.empty(sets, 5, **new)
    u, b = (u, b) if sets > 1 else (u[0], b[0])
    a = torch.empty(5, rows, dtype=torch.float32, device="meta")
    du, dw, db = torch.empty_like(u), torch.empty_like(u), torch.empty_like(b)
    direct_backward.launch_direct_backward((z, a[0], z, u, u), a, torch.empty_like(z), (du, dw, db), FlowSpec())
    kept = launched[0][10]
    assert kept is dw if wanted is None else kept.shape == wanted
    assert kept.dtype == torch.float32
