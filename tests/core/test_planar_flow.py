"""The fused kernels against the float64 oracle: shapes, dtypes, strides, accuracy, bits."""

import itertools

import pytest
import torch
from problems import (
    Problem,
    assert_accuracy_rule,
    assert_float64_is_the_oracle,
    assert_right_at_an_edge,
    assert_rows_are_strangers,
    on_each_isa,
    oracle,
    random_problem,
    relative_errors,
    run,
    saved_for_backward,
)

import vvae_fast
from vvae_fast.backends import operators
from vvae_fast.spec import ACTIVATIONS, FlowSpec

BATCHES = [
    ((1,), ()),
    ((7,), ()),
    ((64,), ()),
    ((131,), ()),
    ((3, 50), ()),
    ((), ()),
    ((1,), (1,)),
    ((5,), (5,)),
    ((33,), (33,)),
    ((3, 17), (17,)),
    ((2, 3, 5), (3, 5)),
    ((40, 2), (2,)),
]
STEPS_AND_DIMS = [(1, 1), (2, 3), (3, 2), (5, 8), (8, 1), (16, 16), (17, 5), (33, 40), (80, 40), (1, 300), (129, 2)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize(("batch", "params"), BATCHES)
def test_float64_is_the_oracle(isa, batch, params, constraint):
    for num_steps, dim in STEPS_AND_DIMS:
        assert_float64_is_the_oracle(batch, num_steps, dim, params, constraint)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("num_steps", "dim"), [(256, 300), (300, 17), (20, 513)])
def test_large_steps_and_dims(isa, num_steps, dim):
    for params in ((), (21,)):
        assert_float64_is_the_oracle((21,), num_steps, dim, params, tolerance=1e-9)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("params", [(), (2500,)])
def test_many_rows(isa, params):
    """More tiles than slices of partial sums, and a tile that is not full."""
    assert_float64_is_the_oracle((2500,), 18, 6, params)


# (rows, K, D, scales). At scale 1.2 the flow itself amplifies rounding, tenfold and, with K well above D, a
# thousandfold: there single draws of any two summation orders scatter.
ACCURACY_CASES = [
    (64, 8, 4, (0.3, 0.7)),
    (100, 16, 8, (0.3, 0.7)),
    (128, 80, 40, (0.3, 0.7, 1.2)),
    (200, 32, 64, (0.3, 0.7, 1.2)),
    (300, 20, 5, (0.3, 0.7, 1.2)),
    (64, 100, 4, (0.3, 1.2)),
    (200, 8, 2, (0.3, 0.7)),
    (128, 128, 2, (0.7,)),
    (100, 32, 3, (0.3, 0.7)),
]


SCALED = [(*sizes, scale) for *sizes, scales in ACCURACY_CASES for scale in scales]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize(("rows", "num_steps", "dim", "scale"), SCALED)
def test_float32_accuracy(rows, num_steps, dim, scale, amortized):
    assert_accuracy_rule((rows, num_steps, dim, scale, (rows,) if amortized else ()))


EDGES = [-80.0, -50.0, -20.0, -5.0, -1.0, 0.0, 0.5413, 1.0, 10.0, 50.0, 89.0, 100.0]


def edge_problem(alpha: float, dtype: torch.dtype, amortized: bool) -> Problem:
    """One step with w.u = alpha and exact pre-activations from 0 to +-50: w has one element, and b = 0."""
    a = torch.tensor([0.0, 1e-4, -1e-2, 0.3, -1.0, 2.0, -5.0, 9.0, -15.0, 30.0, -50.0, 50.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    rows, dim = len(a), 5
    z = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    w = torch.zeros(1, dim, dtype=torch.float64)
    w[0, 2] = 2.0
    u = torch.randn(1, dim, generator=g, dtype=torch.float64)
    z[:, 2], u[0, 2] = a / 2, alpha / 2
    grads = torch.randn(rows, dim, generator=g), torch.randn(rows, generator=g)
    b = torch.zeros(1, dtype=torch.float64)
    if amortized:
        u, w, b = u.expand(rows, 1, dim), w.expand(rows, 1, dim), b.expand(rows, 1)
    return Problem(z, u, w, b, *grads).to(torch.float32).to(dtype)


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize("alpha", EDGES)
def test_edges_of_the_constraint(isa, alpha, amortized):
    """The activations in turn: tests/cpu/test_fused_activations.py tries them on more than an edge."""
    for constraint, activation in itertools.product(("softplus", "log_softplus"), ACTIVATIONS):
        got = run(edge_problem(alpha, torch.float32, amortized), constraint, "cpp", activation=activation)
        wanted = oracle(edge_problem(alpha, torch.float64, amortized), constraint, activation=activation)
        assert_right_at_an_edge(got, wanted)


@pytest.mark.parametrize("params", [(), (9,)])
def test_zero_w(isa, params):
    p = random_problem((9,), 3, 4, params)
    p = p._replace(w=torch.zeros_like(p.w))
    got = run(p, backend="cpp")
    assert (got[1] == 0).all()
    assert max(relative_errors(got, oracle(p.to(torch.float64)))) < 1e-6


@pytest.mark.parametrize("params", [(), (9,)])
def test_w_whose_square_underflows(isa, params):
    p = random_problem((9,), 3, 4, params)
    p = p._replace(w=p.w * 1e-22)
    got = run(p, backend="cpp")
    assert all(t.isfinite().all() for t in got)
    assert (got[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params", [(), (20,)])
def test_half_precisions_compute_in_float32(dtype, params):
    p = random_problem((20,), 10, 6, params).to(dtype)
    got = run(p._replace(grad_log_det=p.grad_log_det.float()), backend="cpp")
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert all(t.dtype == dtype for t in got[2:])
    wanted = run(p.to(torch.float32), backend="cpp")
    assert torch.equal(got[1], wanted[1])
    for x, y in zip(got[2:], wanted[2:], strict=True):
        assert torch.equal(x, y.to(dtype))


@pytest.mark.parametrize("c", [-1.5, -2.0, -2.5, -10.0, -1e3, -1e5])
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_log_det_without_the_constraint_far_below_minus_one(isa, c, amortized):
    a = torch.linspace(-12, 12, 2000)[:, None]
    w, u, b = torch.ones(1, 1), torch.full((1, 1), c), torch.zeros(1)
    if amortized:
        w, u, b = w.expand(2000, 1, 1), u.expand(2000, 1, 1), b.expand(2000, 1)
    _, log_det = vvae_fast.planar_flow(a, u, w, b, constraint="none", backend="cpp")
    det = 1 + c / a.double().cosh().square()[:, 0]
    off_zero = det.abs() > 0.1
    assert (log_det - det.abs().log())[off_zero].abs().max() < 5e-6


@pytest.mark.parametrize("params", [(), (5,)])
def test_lanes_behind_the_last_row_add_nothing(isa, params):
    """w.u = -1 without the constraint: at a = 0, where no row is, the determinant is 0."""
    p = random_problem((5,), 1, 2, params)
    w = torch.tensor([1.0, 0.0]).expand_as(p.w)
    p = p._replace(u=-w, w=w, b=torch.ones_like(p.b))
    assert max(relative_errors(run(p, "none", "cpp"), oracle(p.to(torch.float64), "none"))) < 1e-5


@pytest.mark.parametrize("params", [(), (9,)])
@pytest.mark.parametrize("size", [1e-8, 1e-14, 1e-17])
def test_gradients_of_small_w_fit_float32(params, size):
    p = random_problem((9,), 3, 4, params)
    p = p._replace(w=p.w * size)
    got, wanted = run(p, backend="cpp"), oracle(p.to(torch.float64))
    assert wanted[4].abs().max() < 1e38
    assert max(relative_errors((got[0], *got[2:]), (wanted[0], *wanted[2:]))) < 1e-4


@pytest.mark.parametrize("params", [(), (4,)])
def test_saturated_rows_have_no_derivative(isa, params):
    """h' is 0 and not the smallest float: huge weights or inputs would make something of it."""
    z = torch.tensor([[1e38], [-1e38], [2e3], [-1e4]])
    u, w, b = torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1)
    if params:
        u, w, b = u.expand(4, 1, 1), w.expand(4, 1, 1), b.expand(4, 1)
    p = Problem(z, u, w, b, torch.ones(4, 1), torch.ones(4))
    got, wanted = run(p, backend="cpp"), oracle(p.to(torch.float64))
    assert torch.equal(got[2], torch.ones(4, 1))
    assert (got[5] == 0).all()
    assert max(relative_errors(got, wanted)) < 1e-6


def strided_views(p: Problem) -> dict[str, Problem]:
    """The problem's values behind other strides."""

    def sliced(t):
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = t
        return wide[..., 1::2]

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def offset(t):
        return torch.cat([torch.full_like(t[:1], float("nan")), t])[1:]

    packed = torch.cat([p.u.flatten(-2), p.w.flatten(-2), p.b], -1)  # a head's output
    sizes = [p.u.shape[-2] * p.u.shape[-1]] * 2 + [p.u.shape[-2]]
    u, w, b = packed.split(sizes, -1)
    head = p._replace(u=u.unflatten(-1, p.u.shape[-2:]), w=w.unflatten(-1, p.w.shape[-2:]), b=b)
    views = {f.__name__: Problem(*(f(t) for t in p)) for f in (sliced, transposed, offset)}
    return {"head": head, **views}


@pytest.mark.parametrize("params", [(), (70,)])
def test_strides_are_taken_as_they_are(isa, params):
    p = random_problem((70,), 18, 6, params)
    wanted = run(p, backend="cpp")
    for name, view in strided_views(p).items():
        for x, y in zip(run(view, backend="cpp"), wanted, strict=True):
            assert torch.equal(x, y), name


def test_expanded_inputs():
    p = random_problem((6,), 4, 3, dtype=torch.float64)
    z = p.z[:1].expand(6, 3)
    u, w, b = (t.expand(6, *t.shape) for t in p.inputs[1:])
    expanded = Problem(z, u, w, b, torch.ones(()).double().expand(6, 3), torch.ones(()).double().expand(6))
    assert max(relative_errors(run(expanded, backend="cpp"), oracle(expanded))) < 1e-12


EMPTY_OR_SMALL = [((5,), ()), ((5,), (5,)), ((0,), ()), ((0,), (0,)), ((0, 4), (4,)), ((3, 0), (0,)), ((), ())]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("batch", "params"), EMPTY_OR_SMALL)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_no_steps_and_empty_batches(batch, params, num_steps):
    p = random_problem(batch, num_steps, 4, params, dtype=torch.float64)
    got, wanted = run(p, backend="cpp"), oracle(p)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y)
    if num_steps == 0:
        assert torch.equal(got[0], p.z)
        assert (got[1] == 0).all()


@pytest.mark.parametrize("only", ["z_K", "log_det"])
@pytest.mark.parametrize("params", [(), (6,)])
def test_one_output_used(only, params):
    p = random_problem((6,), 5, 4, params, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in p.inputs]
    z_K, log_det = vvae_fast.planar_flow(*inputs, backend="cpp")
    got = torch.autograd.grad((z_K if only == "z_K" else log_det).sum(), inputs)
    zero_z, zero_log_det = torch.zeros_like(p.grad_z), torch.zeros_like(p.grad_log_det)
    grads = (torch.ones_like(zero_z), zero_log_det) if only == "z_K" else (zero_z, torch.ones_like(zero_log_det))
    for x, y in zip(got, oracle(Problem(*(t.detach() for t in inputs), *grads))[2:], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_a_row_depend_on_nothing_else(isa, amortized, dtype):
    assert_rows_are_strangers(vvae_fast.planar_flow, amortized, dtype)


def test_saving_for_backward_leaves_the_bits_alone():
    p = random_problem((50,), 20, 6)
    with_grad = run(p, backend="cpp")
    with torch.no_grad():
        without = vvae_fast.planar_flow(*p.inputs, backend="cpp")
    assert torch.equal(with_grad[0], without[0])
    assert torch.equal(with_grad[1], without[1])


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_same_bits_on_every_run_and_any_number_of_threads(amortized):
    p = random_problem((3, 1000), 33, 20, (1000,) if amortized else (), scale=0.5)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(p, backend="cpp"))
    torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_a_bad_row_stays_alone(isa, amortized, bad):
    p = random_problem((70,), 20, 6, (70,) if amortized else ())
    clean = run(p, backend="cpp")
    z = p.z.clone()
    z[13, 2] = bad
    z_K, log_det, dz, du, _, _ = run(p._replace(z=z), backend="cpp")
    others = torch.arange(70) != 13
    assert not z_K[13].isfinite().all()
    for x, y in zip((z_K, log_det, dz), clean, strict=False):
        assert torch.equal(x[others], y[others])
    if amortized:
        assert torch.equal(du[others], clean[3][others])


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_nan_in_a_row_reaches_its_outputs_and_weight_gradients(amortized):
    p = random_problem((70,), 20, 6, (70,) if amortized else ())
    z = p.z.clone()
    z[13] = float("nan")
    z_K, log_det, _, du, dw, db = run(p._replace(z=z), backend="cpp")
    assert z_K[13].isnan().all()
    assert log_det[13].isnan()
    for t in (du, dw, db):
        assert (t[13] if amortized else t).isnan().all()


@pytest.mark.parametrize(("params", "sets"), [((), 1), ((100,), 100)])
def test_saved_for_backward_is_z_and_a_number_a_step(params, sets):
    rows, num_steps, dim = 100, 16, 40
    p = random_problem((rows,), num_steps, dim, params)
    assert saved_for_backward(p, "cpp") == 4 * (rows * (dim + num_steps) + sets * num_steps * (2 * dim + 1))


def test_nothing_is_saved_without_grad():
    p = random_problem((10,), 4, 3)
    assert vvae_fast.planar_flow(*p.inputs, backend="cpp")[0].grad_fn is None
    assert operators.planar_forward(*p.inputs, *FlowSpec().arguments(), False)[2].numel() == 0
    assert operators.planar_forward(*p.inputs, *FlowSpec().arguments(), True)[2].shape == (4, 10)


def test_inputs_are_left_alone():
    p = random_problem((70,), 18, 6)
    before = [t.clone() for t in p]
    run(p, backend="cpp")
    assert all(torch.equal(x, y) for x, y in zip(p, before, strict=True))


def test_instruction_sets_agree():
    p = random_problem((70,), 18, 6, scale=0.5, dtype=torch.float64)
    results = on_each_isa(lambda: run(p, backend="cpp"))
    for x, y in itertools.combinations(results.values(), 2):
        assert max(relative_errors(x, y)) < 1e-12
