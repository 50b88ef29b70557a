"""The inverse of the Triton kernels against the reference's in float64."""

import pytest
import torch
from problems import Problem, assert_accuracy_rule, opchecked, random_problem, relative_errors
from test_fused_inverse import edge_points
from test_fused_inverse import run as run_inverse
from test_planar_flow import EDGES, strided_views
from triton_device import (
    DEVICE,
    ON_DEVICE,
    TRITON,
    assert_nothing_is_launched,
    assert_same_bits_where_a_barrier_orders_nothing,
    each_parameters,
    without_rows_or_steps,
)

import vvae_fast
from vvae_fast import reference, shapes
from vvae_fast.backends import selection
from vvae_fast.reference import activations
from vvae_fast.spec import ACTIVATIONS, FlowSpec
from vvae_fast.triton import _heuristics

INVERTIBLE = FlowSpec().arguments(inverse=True)

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def answer(p: Problem, **formulas) -> tuple[torch.Tensor, ...]:
    """z_0, log_det, dz, du, dw, db."""
    return tuple(t.cpu() for t in run_inverse(p.to(DEVICE), "triton", **formulas))


def assert_close_to_reference(p: Problem, tolerance: float, **formulas) -> None:
    errors = relative_errors(answer(p, **formulas), run_inverse(p.to(torch.float64), "reference", **formulas))
    assert max(errors) < tolerance, errors


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("batch", "params"), [((1,), ()), ((17,), ()), ((), ()), ((5,), (5,)), ((3, 7), (7,)), ((8, 2), (2,))]
)
def test_float64_is_the_reference(batch, params):
    for num_steps, dim in ((1, 1), (3, 5)):
        assert_close_to_reference(random_problem(batch, num_steps, dim, params, 0.5, torch.float64), 1e-11)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("constraint", ["softplus", "log_softplus"])
@pytest.mark.parametrize(("batch", "params"), [((9,), ()), ((2, 3), (3,))])
@each_activation
def test_each_activation(activation, batch, params, constraint):
    p = random_problem(batch, 3, 4, params, 0.5, torch.float64)
    assert_close_to_reference(p, 1e-11, activation=activation, slope=0.3, constraint=constraint)


def test_the_inverse_is_direct_whatever_the_flow_is(monkeypatch):
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: True)
    assert_close_to_reference(random_problem((5,), 3, 20, (), 0.5, torch.float64), 1e-11)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("params", [(), (3,)])
def test_a_launch_for_each_block_where_a_barrier_orders_nothing(monkeypatch, params):
    assert_same_bits_where_a_barrier_orders_nothing(answer, random_problem((4, 3), 3, 6, params), monkeypatch)


@pytest.mark.parametrize("params", [(), (16,)])
def test_float32_accuracy(params):
    """As the forward's rule, against the reference's inverse in float32."""
    assert_accuracy_rule((16, 6, 5, 0.5, params), **ON_DEVICE, inverse=True)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize(
    ("activation", "constraint"), [*((name, "softplus") for name in ACTIVATIONS), ("tanh", "log_softplus")]
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of 0 / 0 at a root of 0
def test_residual_at_the_edges_of_the_constraint(activation, constraint, dtype, bound):
    """One step in one dimension, w = 1 and b = 0: R is z, a set for each row. The bound is relative to max(1, |R|)."""
    formulas, points = FlowSpec(constraint, activation), edge_points(dtype)
    R, alpha = points.repeat(len(EDGES)), torch.tensor(EDGES, dtype=dtype).repeat_interleave(len(points))
    u, w = alpha[:, None, None], torch.ones(len(R), 1, 1, dtype=dtype)
    inputs = (t.to(DEVICE) for t in (R[:, None], u, w, torch.zeros(len(R), 1, dtype=dtype)))
    z_0, log_det, a = (t.cpu() for t in TRITON.planar_inverse(*inputs, *formulas.arguments(inverse=True), True))
    s = reference.constrain(u.double(), w.double(), constraint).s.squeeze()
    x, h = a[0].double(), activations.activate(a[0].double(), activation, formulas.slope).h
    residual = (x - h) + s * h - R.double()
    assert (residual.abs() <= bound * R.double().abs().clamp(min=1)).all()
    assert z_0[h.abs() * 100 < torch.finfo(dtype).max].isfinite().all()  # h is x where it is not bounded
    assert log_det.isfinite().all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("params", [(), (200,)])
def test_round_trip(params, dtype, bound):
    p = random_problem((200,), 4, 4, params, scale=0.5, dtype=dtype).to(DEVICE)
    z_K, log_det = vvae_fast.planar_flow(*p.inputs, backend="triton")
    z_0, inverse_log_det = vvae_fast.planar_flow_inverse(z_K, *p.inputs[1:], backend="triton")
    assert ((z_0 - p.z).abs() / p.z.abs().clamp(min=1)).max() < bound
    assert (inverse_log_det + log_det).abs().max() < bound


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_parameters
@pytest.mark.parametrize("activation", ["tanh", "elu", "sigmoid"])
def test_bits_of_a_row_depend_on_nothing_else(activation, amortized, dtype):
    """Nor on how long the search of its neighbours takes: some have their root at once, or none that is a number."""
    p = random_problem((40,), 6, 5, (40,) if amortized else (), dtype=dtype)
    p.z[:10] *= 1e3
    p.z[20] = float("nan")
    options = {"activation": activation, "backend": "triton"}
    whole = vvae_fast.planar_flow_inverse(*p.to(DEVICE).inputs, **options)
    assert torch.equal(whole[0].isnan().any(-1).nonzero().flatten().cpu(), torch.tensor([20]))
    for keep in (torch.randperm(40), torch.arange(1), torch.arange(15, 40)):
        part = (p.z[keep], *(t[keep] if amortized else t for t in p.inputs[1:]))
        for x, y in zip(vvae_fast.planar_flow_inverse(*(t.to(DEVICE) for t in part), **options), whole, strict=True):
            torch.testing.assert_close(x.cpu(), y.cpu()[keep], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("params", [(), (6,), (3,)])
def test_strides(params):
    p = random_problem((2, 3) if params == (3,) else (6,), 3, 5, params)
    wanted = answer(p)
    for name, view in strided_views(p).items():
        assert all(map(torch.equal, answer(view), wanted)), name


@pytest.mark.parametrize("params", [(), (5,)])
def test_zero_w(params):
    """c is 0 there, and du and dw what undoes the forward's; the reference's dw is another, docs/math.md (40)."""
    p = random_problem((5,), 2, 3, params)
    p = p._replace(w=torch.zeros_like(p.w))
    got, wanted = answer(p), run_inverse(p.to(torch.float64), "reference")
    assert (got[1] == 0).all()
    errors = relative_errors(got, wanted)
    assert max(errors[:4] + errors[5:]) < 1e-6
    assert got[4].isfinite().all()


@pytest.mark.parametrize("params", [(), (5,)])
@each_activation
def test_gradients_of_a_round_trip_cancel(activation, params):
    p = random_problem((5,), 3, 4, params, dtype=torch.float64).to(DEVICE)
    inputs, options = [t.requires_grad_() for t in p.inputs], {"activation": activation, "backend": "triton"}
    z_K, log_det = vvae_fast.planar_flow(*inputs, **options)
    z_0, inverse_log_det = vvae_fast.planar_flow_inverse(z_K, *inputs[1:], **options)
    dz, *others = torch.autograd.grad((z_0, log_det + inverse_log_det), inputs, (p.grad_z, p.grad_log_det))
    torch.testing.assert_close(dz, p.grad_z)
    for t in others:
        torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-11)


@pytest.mark.parametrize("activation", ["tanh", pytest.param("sigmoid", marks=pytest.mark.long)])
def test_gradients_of_every_order(activation):
    p = random_problem((2,), 2, 2, scale=0.5, dtype=torch.float64).to(DEVICE)
    inputs = [t.requires_grad_() for t in p.inputs]

    def inverse(*tensors):
        return vvae_fast.planar_flow_inverse(*tensors, activation=activation, backend="triton")

    assert torch.autograd.gradcheck(inverse, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(inverse, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_compute_in_float32(dtype):
    p = random_problem((6,), 4, 5).to(dtype).to(DEVICE)
    z_0, log_det = vvae_fast.planar_flow_inverse(*p.inputs, backend="triton")
    wanted = vvae_fast.planar_flow_inverse(*p.to(torch.float32).inputs, backend="triton")
    assert (z_0.dtype, log_det.dtype) == (dtype, torch.float32)
    assert torch.equal(z_0, wanted[0].to(dtype))
    assert torch.equal(log_det, wanted[1])
    raw = TRITON.planar_inverse(*p.inputs, *INVERTIBLE, False)  # the operator converts on the way
    torch.testing.assert_close(raw[0], z_0, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("poisoned")
@without_rows_or_steps
@each_parameters
def test_nothing_to_do_launches_nothing(monkeypatch, batch, num_steps, amortized):
    assert_nothing_is_launched(answer, batch, num_steps, amortized, monkeypatch)


@pytest.mark.parametrize("params", [(), (3,)])
def test_the_raw_operators_pass_opcheck(params):
    p = random_problem((3,), 2, 4, params).to(DEVICE)
    a = opchecked(TRITON.planar_inverse, p, INVERTIBLE)[2]
    arguments = (p.grad_z, p.grad_log_det, *p.inputs, a, *INVERTIBLE)
    torch.library.opcheck(TRITON.planar_inverse_backward, arguments)


def test_the_raw_operators_refuse_what_does_not_fit():
    p = random_problem((4,), 2, 2).to(DEVICE)
    a = TRITON.planar_inverse(*p.inputs, *INVERTIBLE, True)[2]
    with pytest.raises(ValueError, match=r"z must be \[R, D\]"):
        TRITON.planar_inverse(p.z, p.u, p.w, p.b[:1], *INVERTIBLE, True)
    with pytest.raises(ValueError, match="as the forward returned them"):
        TRITON.planar_inverse_backward(p.grad_z, p.grad_log_det, *p.inputs, a[:1], *INVERTIBLE)
    wide = random_problem((1,), 1, 2049).to(DEVICE)
    with pytest.raises(ValueError, match=r"D up to 2048 for the inverse in torch\.float32"):
        TRITON.planar_inverse(*wide.inputs, *INVERTIBLE, True)


def test_what_has_too_many_columns_is_refused_with_the_reason():
    problem = shapes.Problem(5, 2049, 4, 1, False, torch.float32, "cuda", inverse=True)
    unsupported = selection._BACKENDS["triton"].unsupported
    assert unsupported(problem) == ["the triton backend inverts D up to 2048, got 2049"]
    assert unsupported(problem._replace(dim=2048)) == []
    assert unsupported(problem._replace(dim=1025, compute_dtype=torch.float64)) == [
        "the triton backend inverts D up to 1024, got 1025"
    ]
    assert unsupported(problem._replace(inverse=False)) == []


def test_torch_compile():
    p = random_problem((4,), 3, 2).to(DEVICE)
    compiled = torch.compile(lambda *inputs: vvae_fast.planar_flow_inverse(*inputs, backend="triton"), fullgraph=True)
    for x, y in zip(compiled(*p.inputs), vvae_fast.planar_flow_inverse(*p.inputs, backend="triton"), strict=True):
        assert torch.equal(x, y)
