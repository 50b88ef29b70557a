"""The fused inverse against the reference's in float64: roots, shapes, strides, accuracy, derivatives, bits."""

import pytest
import torch
from problems import (
    Problem,
    assert_accuracy_rule,
    assert_rows_are_strangers,
    on_each_isa,
    opchecked,
    random_problem,
    relative_errors,
)
from problems import invert as run
from test_autograd import CASES, float64_inputs
from test_planar_flow import BATCHES, EDGES, EMPTY_OR_SMALL, strided_views
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import jvp, vmap

import vvae_fast
from vvae_fast import reference
from vvae_fast.backends import operators
from vvae_fast.reference import activations
from vvae_fast.spec import ACTIVATIONS, FlowSpec

INVERTIBLE = FlowSpec().arguments(inverse=True)
STEPS_AND_DIMS = [(1, 1), (3, 2), (5, 8), (17, 5), (1, 300)]  # few: the reference's search is slow


def assert_close_to_reference(p: Problem, tolerance: float, **formulas) -> None:
    """On each instruction set."""
    wanted = run(p.to(torch.float64), "reference", **formulas)
    for level, got in on_each_isa(lambda: run(p, "cpp", **formulas)).items():
        errors = relative_errors(got, wanted)
        assert max(errors) < tolerance, (level, errors)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("batch", "params"), BATCHES)
def test_float64_is_the_reference(batch, params):
    for num_steps, dim in STEPS_AND_DIMS:
        assert_close_to_reference(random_problem(batch, num_steps, dim, params, 0.5, torch.float64), 1e-10)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("constraint", ["softplus", "log_softplus"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation, constraint):
    formulas = {"activation": activation, "constraint": constraint, "slope": 0.3}
    for batch, params in (((131,), ()), ((33,), (33,)), ((40, 2), (2,)), ((), ())):
        for num_steps, dim in ((1, 1), (17, 5)):
            p = random_problem(batch, num_steps, dim, params, 0.5, torch.float64)
            assert_close_to_reference(p, 1e-10, **formulas)


@pytest.mark.parametrize(
    ("batch", "params"), [((2500,), ()), ((2500,), (2500,)), ((25, 100), (100,)), ((1250, 2), (2,))]
)
def test_many_rows(batch, params):
    """Tiles that are not full, a set for each row, sets of few rows and of many."""
    assert_close_to_reference(random_problem(batch, 18, 6, params, 0.5, torch.float64), 1e-10)


@pytest.mark.parametrize("params", [(), (21,)])
def test_many_steps(params):
    for num_steps, dim in ((33, 40), (80, 40)):
        assert_close_to_reference(random_problem((21,), num_steps, dim, params, 0.5, torch.float64), 1e-10)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("params", [(), (200,)])
@pytest.mark.parametrize(("num_steps", "dim"), [(8, 4), (20, 5), (32, 64)])
@pytest.mark.parametrize("scale", [0.3, 0.7])
def test_float32_accuracy(params, num_steps, dim, scale):
    """As the forward's rule, against the reference's inverse in float32."""
    assert_accuracy_rule((200, num_steps, dim, scale, params), inverse=True)


@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "sigmoid", "linear"])
def test_float32_accuracy_of_each_activation(activation):
    assert_accuracy_rule((200, 20, 5, 0.3, ()), inverse=True, activation=activation)


@pytest.mark.parametrize("params", [(), pytest.param((200,), marks=pytest.mark.long)])
def test_amplifying_flows(params):
    """Many more steps than dimensions: rounding grows fifty times."""
    assert_accuracy_rule((200, 100, 4, 0.7, params), inverse=True)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_round_trip_of_a_million_points(dtype, bound):
    p = random_problem((1_000_000,), 8, 4, scale=0.5, dtype=dtype)
    z_K, log_det = vvae_fast.planar_flow(*p.inputs, backend="cpp")
    z_0, inverse_log_det = vvae_fast.planar_flow_inverse(z_K, *p.inputs[1:], backend="cpp")
    assert ((z_0 - p.z).abs() / p.z.abs().clamp(min=1)).max() < bound
    assert (inverse_log_det + log_det).abs().max() < bound


def edge_points(dtype: torch.dtype) -> torch.Tensor:
    small = torch.logspace(-30, 2.5, 300, dtype=torch.float64)
    return torch.cat([torch.linspace(-3, 3, 201, dtype=torch.float64), small, -small]).to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alpha", EDGES)
def test_residual_at_the_edges_of_the_constraint(isa, alpha, activation, amortized, dtype, bound):
    """One step in one dimension: w = 1, b = 0, so that R is z itself and c follows from alpha exactly."""
    formulas = FlowSpec(activation=activation)
    R = edge_points(dtype)
    params = [torch.full((1, 1), alpha), torch.ones(1, 1), torch.zeros(1)]
    params = [t.to(dtype).expand(len(R), *t.shape) if amortized else t.to(dtype) for t in params]
    z_0, log_det, a = operators.planar_inverse(R[:, None], *params, *formulas.arguments(inverse=True), True)
    at = reference.constrain(*(t.double() for t in params[:2]), "softplus")
    x, R = a[0].double(), R.double()
    h = activations.activate(x, activation, formulas.slope).h
    residual = (x - h) + at.s.squeeze() * h - R
    assert (residual.abs() <= bound * R.abs().clamp(min=1)).all()
    assert z_0[h.abs() * 100 < torch.finfo(dtype).max].isfinite().all()  # h is x where it is not bounded
    assert log_det.isfinite().all()


@pytest.mark.parametrize("params", [(), (150,)])
def test_log_det_is_the_forwards(isa, params):
    p = random_problem((150,), 37, 10, params, dtype=torch.float64)
    z_0, log_det, a = operators.planar_inverse(*p.inputs, *INVERTIBLE, True)
    z_K, forward_log_det, forward_a = operators.planar_forward(z_0, *p.inputs[1:], *FlowSpec().arguments(), True)
    for x, y in ((z_K, p.z), (forward_log_det, -log_det), (forward_a, a)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("params", [(), (70,)])
def test_strides_are_taken_as_they_are(isa, params):
    p = random_problem((70,), 18, 6, params)
    wanted = run(p, "cpp")
    for name, view in strided_views(p).items():
        inputs = [t.detach().requires_grad_() for t in view.inputs]
        outputs = vvae_fast.planar_flow_inverse(*inputs, backend="cpp")
        grads = torch.autograd.grad(outputs, inputs, (view.grad_z, view.grad_log_det))
        for x, y in zip((*outputs, *grads), wanted, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_compute_in_float32(dtype):
    p = random_problem((20,), 10, 6).to(dtype)
    z_0, log_det = vvae_fast.planar_flow_inverse(*p.inputs, backend="cpp")
    wanted = vvae_fast.planar_flow_inverse(*p.to(torch.float32).inputs, backend="cpp")
    assert (z_0.dtype, log_det.dtype) == (dtype, torch.float32)
    assert torch.equal(z_0, wanted[0].to(dtype))
    assert torch.equal(log_det, wanted[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("batch", "params"), EMPTY_OR_SMALL)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_no_steps_and_empty_batches(batch, params, num_steps):
    p = random_problem(batch, num_steps, 4, params, dtype=torch.float64)
    got = run(p, "cpp")
    if num_steps:
        for x, y in zip(got, run(p, "reference"), strict=True):
            torch.testing.assert_close(x, y)
    else:
        for x, y in zip(got, (p.z, torch.zeros(batch).double(), p.grad_z, p.u, p.w, p.b), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("params", [(), (9,)])
def test_zero_w(isa, params):
    p = random_problem((9,), 3, 4, params)
    p = p._replace(w=torch.zeros_like(p.w))
    got, wanted = run(p, "cpp"), run(p.to(torch.float64), "reference")
    assert (got[1] == 0).all()
    errors = relative_errors(got, wanted)
    assert max(errors[:4] + errors[5:]) < 1e-6


@pytest.mark.parametrize("params", [(), (9,)])
@pytest.mark.parametrize("scale_of_w", [0.0, 1.0])
def test_gradients_of_a_round_trip_cancel(params, scale_of_w):
    """At w = 0 too, where the reference holds c = 0 against w and its dw does not undo the forward's."""
    p = random_problem((9,), 3, 4, params, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in p._replace(w=scale_of_w * p.w).inputs]
    z_K, log_det = vvae_fast.planar_flow(*inputs, backend="cpp")
    z_0, inverse_log_det = vvae_fast.planar_flow_inverse(z_K, *inputs[1:], backend="cpp")
    outputs = (z_0, log_det + inverse_log_det)
    dz, *others = torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))
    torch.testing.assert_close(dz, p.grad_z)
    for t in others:
        torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_a_row_depend_on_nothing_else(isa, amortized, dtype):
    """Nor on how long the search of its neighbours takes."""
    assert_rows_are_strangers(vvae_fast.planar_flow_inverse, amortized, dtype)


@pytest.mark.parametrize("params", [(), (1000,)])
def test_same_bits_on_any_number_of_threads(params):
    p = random_problem((3, 1000), 33, 20, params, scale=0.5)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(p, "cpp"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_a_bad_row_stays_alone(isa, amortized, bad):
    p = random_problem((70,), 20, 6, (70,) if amortized else ())
    clean = run(p, "cpp")
    z = p.z.clone()
    z[13, 2] = bad
    got = run(p._replace(z=z), "cpp")
    others = torch.arange(70) != 13
    assert not got[0][13].isfinite().all()
    for x, y in zip(got[: 6 if amortized else 3], clean, strict=False):
        assert torch.equal(x[others], y[others])


@pytest.mark.parametrize(("batch", "params"), CASES)
def test_gradcheck_and_gradgradcheck(batch, params):
    _, inputs = float64_inputs(batch, params, num_steps=2)

    def inverse(*tensors):
        return vvae_fast.planar_flow_inverse(*tensors, backend="cpp")

    assert gradcheck(inverse, inputs)
    assert gradgradcheck(inverse, inputs)


@pytest.mark.parametrize("params", [(), (5,)])
@pytest.mark.parametrize("needed", range(4))
def test_derivatives_of_one_input_alone(needed, params):
    """To second order, of one output at a time; u is computed from z, which must not enter twice."""

    def derivatives(backend, output):
        p, _ = float64_inputs((5,), params)
        inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate(p.inputs)]
        z, u, w, b = inputs
        u = u + z.mean() if needed == 0 else u
        out = vvae_fast.planar_flow_inverse(z, u, w, b, backend=backend)[output]
        (first,) = torch.autograd.grad(out.sin().sum(), inputs[needed], create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), inputs[needed])[0]

    for output in (0, 1):
        for x, y in zip(derivatives("cpp", output), derivatives("reference", output), strict=True):
            torch.testing.assert_close(x, y)


def test_transforms_see_the_reference():
    p, inputs = float64_inputs((6,), ())
    wanted = vvae_fast.planar_flow_inverse(*p.inputs)
    got = vmap(lambda z: vvae_fast.planar_flow_inverse(z, *p.inputs[1:]))(p.z)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    primals = tuple(t.detach() for t in inputs)
    grads = torch.autograd.grad(wanted, inputs, (p.grad_z, p.grad_log_det))
    total = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    _, (dz, dlog_det) = jvp(vvae_fast.planar_flow_inverse, primals, tangents)
    torch.testing.assert_close((dz * p.grad_z).sum() + (dlog_det * p.grad_log_det).sum(), total)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(vvae_fast.planar_flow_inverse(*duals)[0]).tangent
    torch.testing.assert_close(tangent, dz)


@pytest.mark.parametrize("params", [(), (9,)])
def test_compile_fullgraph(params):
    p = random_problem((9,), 4, 3, params)
    inputs = [t.requires_grad_() for t in p.inputs]

    def loss(*tensors):
        z_0, log_det = vvae_fast.planar_flow_inverse(*tensors)
        return (z_0 * p.grad_z).sum() + (log_det * p.grad_log_det).sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for x, y in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("rows", "params"), [(6, ()), (6, (6,)), (6, (3,)), (0, ())])
def test_opcheck(rows, params):
    p = random_problem((rows,), 4, 3, params)
    z_0, _, a = opchecked(operators.planar_inverse, p, INVERTIBLE)
    torch.library.opcheck(
        operators.planar_inverse_backward, (p.grad_z, p.grad_log_det, z_0, *p.inputs[1:], a, *INVERTIBLE)
    )


def test_raw_operators_refuse_what_would_read_out_of_bounds():
    p = random_problem((6,), 4, 3)
    with pytest.raises(RuntimeError, match="w must have size 4"):
        operators.planar_inverse(p.z, p.u, torch.zeros(5, 3), p.b, *INVERTIBLE, True)
    with pytest.raises(RuntimeError, match="a must have size 6"):
        operators.planar_inverse_backward(p.grad_z, p.grad_log_det, *p.inputs, torch.zeros(4, 5), *INVERTIBLE)


def test_instruction_sets_agree():
    p = random_problem((70,), 18, 6, scale=0.5, dtype=torch.float64)
    results = list(on_each_isa(lambda: run(p, "cpp")).values())
    for other in results[1:]:
        assert max(relative_errors(other, results[0])) < 1e-12
