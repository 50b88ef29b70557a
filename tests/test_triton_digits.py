"""Where numbers would lose their digits: far ends of w . u, z that grows, c to the end of float32's range. Against
float64, and against the reference in the same dtype: no worse than ten times its error, or than 2e-6."""

import pytest
import torch
from problems import Problem, oracle, random_problem, relative_errors, run
from test_fused_inverse import run as run_inverse

import vvae_fast
from vvae_fast import activations, ops, reference
from vvae_fast.shapes import Formulas

pytest.importorskip("triton", reason="Triton is not installed")

from vvae_fast.kernels import _heuristics, direct_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = ops.OPERATORS["triton"]

# NumPy's, which interprets: what is selected against may divide by 0.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

each_parameters = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])


@pytest.fixture(params=["direct", "compact"])
def form(request, monkeypatch):
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: request.param == "compact")
    return request.param


def assert_keeps_digits(got: tuple, loop: tuple, wanted: tuple) -> None:
    ours, loop = relative_errors(got, wanted), relative_errors(loop, wanted)
    assert all(x <= max(10 * y, 2e-6) for x, y in zip(ours, loop, strict=True)), (ours, loop)


def step_along_w(alpha: float, rows: int, amortized: bool, dtype: torch.dtype, aside: bool = True) -> Problem:
    """One step with w = (0.6, -0.8) and u = alpha w, with a part aside of w if asked for."""
    w = torch.tensor([[0.6, -0.8]])
    u = alpha * w + aside * torch.tensor([[0.3, 0.1]])
    p = random_problem((rows,), 1, 2, (rows,) if amortized else ())
    u, w = (t.expand(rows, 1, 2) if amortized else t for t in (u, w))
    return p._replace(u=u, w=w, b=torch.zeros_like(p.b)).to(dtype)


def grown(params: tuple[int, ...]) -> Problem:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 8), (*params, 32, 8), (*params, 32, 8), (*params, 32), (3, 8), (3,))
    return Problem(*(2 * torch.randn(shape, generator=g) for shape in shapes))


@each_parameters
def test_gradients_where_z_grows(amortized):
    """z grows to many times its size; z_K walked back would be noise."""
    p, options = grown((3,) if amortized else ()), {"activation": "leaky_relu"}
    wanted, loop = oracle(p.to(torch.float64), **options), run(p, backend="reference", **options)
    got = run(p.to(DEVICE), backend="triton", **options)
    assert_keeps_digits(tuple(t.cpu() for t in got), loop, wanted)


@each_parameters
@pytest.mark.parametrize(
    ("activation", "alpha"),
    [*(("leaky_relu", alpha) for alpha in (-5.0, -10.0, -15.0)), ("tanh", -5.0), ("elu", -5.0), ("elu", -15.0)],
)
def test_gradients_of_the_inverse_where_it_magnifies(activation, alpha, amortized):
    p = step_along_w(alpha, 4, amortized, torch.float32)
    wanted, loop = (
        run_inverse(p.to(dtype), "reference", activation=activation) for dtype in (torch.float64, torch.float32)
    )
    got = run_inverse(p.to(DEVICE), "triton", activation=activation)
    assert_keeps_digits(tuple(t.cpu() for t in got), loop, wanted)


@pytest.mark.parametrize(
    ("alpha", "dtype"), [(-100.0, torch.float32), (-200.0, torch.float32), (-720.0, torch.float64)]
)
@pytest.mark.parametrize(
    ("activation", "constraint"),
    [("linear", "log_softplus"), *((name, "softplus") for name in ("linear", "leaky_relu", "elu"))],
)
@pytest.mark.usefixtures("form")
def test_log_det_below_the_range_of_s(activation, constraint, dtype, alpha):
    """Where h' = 1 it is w . u itself, with its gradients; 1 / s times a row's gradient of 100 would be infinite."""
    p = step_along_w(alpha, 3, False, dtype, aside=False)
    p = p._replace(z=p.w * p.z[:, :1].abs(), grad_z=torch.zeros_like(p.z), grad_log_det=100 + p.grad_log_det)
    z_K, log_det, dz, du, dw, db = run(p.to(DEVICE), constraint, "triton", activation=activation)
    assert z_K.isfinite().all()
    total, exact = p.grad_log_det.sum(), (p.w.double() * p.u.double()).sum().expand(3)
    wanted = exact, torch.zeros_like(p.z), total * p.w, total * p.u, 0 * p.b
    got = log_det, dz, du, dw, db
    tolerance = 20 * torch.finfo(dtype).eps
    assert max(relative_errors(tuple(t.cpu() for t in got), tuple(t.double() for t in wanted))) < tolerance


@each_parameters
def test_log_det_of_the_inverse_below_the_range_of_s(amortized):
    p = step_along_w(-100.0, 3, amortized, torch.float32, aside=False)
    p = p._replace(z=p.w[..., 0, :] * p.z[:, :1].abs() * 1e-3, grad_z=torch.zeros_like(p.z))
    _, log_det, dz, du, dw, db = run_inverse(p.to(DEVICE), "triton", activation="linear")
    over = -p.grad_log_det[:, None, None] if amortized else -p.grad_log_det.sum()
    wanted = torch.full((3,), 100.0), torch.zeros_like(p.z), over * p.w, over * p.u, 0 * p.b
    got = log_det, dz, du, dw, db
    assert max(relative_errors(tuple(t.cpu() for t in got), tuple(t.double() for t in wanted))) < 2e-6


@each_parameters
def test_gradients_where_half_of_the_rows_have_nothing_else_of_the_determinant(amortized):
    """elu's sides: h' = 1, where log_det is w . u, and h' < 1, where s is lost beside 1 - h'."""
    p = step_along_w(-100.0, 6, amortized, torch.float32, aside=False)
    p = p._replace(z=p.w[..., 0, :] * torch.tensor([1.0, 0.3, 2.0, -1.0, -0.3, -2.0])[:, None])
    wanted, loop = oracle(p.to(torch.float64), activation="elu"), run(p, backend="reference", activation="elu")
    got = run(p.to(DEVICE), backend="triton", activation="elu")
    assert_keeps_digits(tuple(t.cpu() for t in got), loop, wanted)


@pytest.mark.parametrize("c", [2e19, 1e30])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "elu"])
def test_roots_where_c_is_huge(activation, c):
    """det^2 is beyond float32."""
    R = c * torch.tensor([0.25, -0.25, 1.5, -1.5, 1e-20, -1e-20])
    R = R[R > 0] if activation == "sigmoid" else R
    one = torch.ones(len(R), 1, 1)
    inputs = (t.to(DEVICE) for t in (R[:, None], c * one, one, torch.zeros(len(R), 1)))
    formulas = Formulas(activation=activation).numbers()[:3]
    _, log_det, a = (t.cpu() for t in TRITON.planar_inverse(*inputs, *formulas, True))
    at = reference.constrain(c * one.double(), one.double(), "softplus")
    x = activations.solve(R.double(), at.c.squeeze(), at.s.squeeze(), activation, 1.0)
    act = activations.activate(x, activation, 1.0)
    exact = -activations.log_abs_determinant(act, at.c.squeeze(), at.s.squeeze(), at.sunk.squeeze())
    torch.testing.assert_close(a[0].double(), x, rtol=2e-6, atol=0)
    torch.testing.assert_close(log_det.double(), exact, rtol=2e-6, atol=2e-6)


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
    monkeypatch.setattr(direct_backward, "launch", lambda *args, **options: launched.append(args[3:]))
    new = {"dtype": dtype, "device": "meta"}
    z, u, b = torch.empty(rows, 4, **new), torch.empty(sets, 5, 4, **new), torch.empty(sets, 5, **new)
    u, b = (u, b) if sets > 1 else (u[0], b[0])
    a = torch.empty(5, rows, dtype=torch.float32, device="meta")
    du, dw, db = torch.empty_like(u), torch.empty_like(u), torch.empty_like(b)
    direct_backward.launch_direct_backward(z, a[0], z, u, u, a, torch.empty_like(z), du, dw, db, Formulas())
    kept = launched[0][10]
    assert kept is dw if wanted is None else kept.shape == wanted
    assert kept.dtype == torch.float32
