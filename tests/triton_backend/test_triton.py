"""The Triton kernels against the float64 oracle: on the GPU where there is one, interpreted on the CPU where not."""

import itertools
from functools import partial

import pytest
import torch
from problems import (
    Problem,
    assert_accuracy_rule,
    assert_close_to_oracle,
    assert_right_at_an_edge,
    assert_same_of_strides,
    invert,
    opchecked,
    oracle,
    random_problem,
    relative_errors,
    run,
)
from test_planar_flow import edge_problem, strided_views
from triton_device import (
    DEVICE,
    ON_DEVICE,
    TRITON,
    assert_float64_is_the_oracle,
    assert_nothing_is_launched,
    assert_same_bits_where_a_barrier_orders_nothing,
    each_parameters,
    without_rows_or_steps,
)

import vvae_fast
from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics, _table

FORMULAS = FlowSpec().arguments()


def answer(p: Problem, constraint: str = "softplus") -> tuple[torch.Tensor, ...]:
    return tuple(t.cpu() for t in run(p.to(DEVICE), constraint, "triton"))


BATCHES = [
    ((1,), ()),
    ((7,), ()),
    ((), ()),
    ((2, 11), ()),
    ((5,), (5,)),
    ((17,), (17,)),
    ((3, 7), (7,)),
    ((8, 2), (2,)),
]
STEPS_AND_DIMS = [(1, 1), (2, 3), (5, 8), (3, 33), (17, 5), (2, 70)]


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("num_steps", "dim"), STEPS_AND_DIMS)
@pytest.mark.parametrize(("batch", "params"), BATCHES)
def test_float64_is_the_oracle(batch, params, num_steps, dim):
    assert_float64_is_the_oracle(batch, num_steps, dim, params)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("num_steps", "dim"), [(1, 1), (3, 2), (4, 9)])
@pytest.mark.parametrize(("batch", "params"), [((9,), ()), ((9,), (9,)), ((4, 3), (3,))])
def test_without_the_constraint(batch, params, num_steps, dim):
    assert_float64_is_the_oracle(batch, num_steps, dim, params, "none")


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("params", [(), (20,)])
@pytest.mark.parametrize("dim", [1, 6, 40, 300])
def test_configurations_for_many_rows(monkeypatch, dim, params):
    monkeypatch.setattr(_table, "FEW_ROWS", 0)
    assert_float64_is_the_oracle((20,), 3, dim, params)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("most", [1, 2])
def test_programs_that_take_several_blocks_of_rows(monkeypatch, most):
    """With one program there are no partial sums; with two, each adds blocks of rows, the last of them not full."""
    monkeypatch.setattr(_heuristics, "num_partials", lambda *shape: most)
    assert_float64_is_the_oracle((150,), 3, 6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("params", [(), (9,)])
@pytest.mark.parametrize(("num_steps", "dim"), [(8, 4), (6, 20), (8, 2)])
def test_float32_accuracy(num_steps, dim, params):
    assert_accuracy_rule((9, num_steps, dim, 0.7, params), **ON_DEVICE)


@each_parameters
@pytest.mark.parametrize("alpha", [-80.0, -20.0, -1.0, 0.0, 0.5413, 10.0, 89.0, 100.0])
def test_edges_of_the_constraint(alpha, amortized):
    got = answer(edge_problem(alpha, torch.float32, amortized))
    assert_right_at_an_edge(got, oracle(edge_problem(alpha, torch.float64, amortized)))


@pytest.mark.parametrize("params", [(), (5,)])
def test_zero_w_and_w_whose_square_underflows(params):
    p = random_problem((5,), 2, 3, params)
    for size in (0, 1e-22):
        got = answer(p._replace(w=p.w * size))
        assert all(t.isfinite().all() for t in got)
        assert (got[1] == 0).all()
    wanted = oracle(p._replace(w=p.w * 0).to(torch.float64))
    assert max(relative_errors(answer(p._replace(w=p.w * 0)), wanted)) < 1e-6


@pytest.mark.parametrize("params", [(), (5,)])
def test_rows_behind_the_last_add_nothing(params):
    """w.u = -1 without the constraint: at a = 0, where no row is, the determinant is 0."""
    p = random_problem((5,), 1, 2, params)
    w = torch.tensor([1.0, 0.0]).expand_as(p.w)
    assert_close_to_oracle(p._replace(u=-w, w=w, b=torch.ones_like(p.b)), "none", 1e-5, **ON_DEVICE)


@pytest.mark.parametrize("params", [(), (6,)])
def test_nan_stays_in_its_row(params):
    p = random_problem((6,), 3, 4, params)
    clean, z = answer(p), p.z.clone()
    z[2, 1] = float("nan")
    spoilt = answer(p._replace(z=z))
    others = torch.tensor([0, 1, 3, 4, 5])
    for x, y in zip(clean[:3], spoilt[:3], strict=True):
        assert y[2].isnan().all()
        assert torch.equal(x[others], y[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params", [(), (6,), (3,)])
def test_half_precisions_compute_in_float32(dtype, params):
    p = random_problem((2, 3) if params == (3,) else (6,), 5, 6, params).to(dtype)
    p = p._replace(grad_log_det=p.grad_log_det.float())
    got, wanted = answer(p), answer(p.to(torch.float32))
    assert [t.dtype for t in got] == [dtype, torch.float32, *[dtype] * 4]
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-2 if x.dtype == dtype else 1e-6, atol=1e-2)
        # On a GPU a load's width decides in which order a row is summed; the interpreter cuts bfloat16 off, unrounded.
        if DEVICE == "cpu" and dtype == torch.float16:
            assert torch.equal(x, y.to(x.dtype))


@pytest.mark.parametrize("params", [(), (6,), (3,)])
def test_strides(params):
    p = random_problem((2, 3) if params == (3,) else (6,), 3, 5, params).to(
        DEVICE
    )  # a copy is dense: the views after it
    wanted = answer(p)
    for name, view in strided_views(p).items():
        assert_same_of_strides(answer(view), wanted, p, name)
    one = torch.ones((), device=DEVICE)
    expanded = p._replace(grad_z=one.expand_as(p.z), grad_log_det=one.expand_as(p.z[..., 0]))
    dense = Problem(*(t.contiguous() for t in expanded))
    assert (expanded.grad_z.stride(-1), dense.grad_z.stride(-1)) == (0, 1)
    assert_same_of_strides(answer(expanded), answer(dense), dense, "expanded")


@pytest.mark.parametrize("params", [(), (12,)])
def test_bits_depend_on_the_row_alone(params):
    p = random_problem((12,), 4, 5, params)
    whole = answer(p)
    for rows in (slice(0, 1), slice(3, 12)):
        part = Problem(*(t[rows] if t.shape[:1] == (12,) else t for t in p))
        for x, y in zip(answer(part)[:3], whole[:3], strict=True):
            assert torch.equal(x, y[rows])
    assert all(map(torch.equal, answer(p), whole))


@without_rows_or_steps
@each_parameters
def test_nothing_to_do_launches_nothing(monkeypatch, batch, num_steps, amortized):
    assert_nothing_is_launched(answer, batch, num_steps, amortized, monkeypatch)


def packed_of(p: Problem) -> torch.Tensor:
    return torch.cat([p.u.flatten(-2), p.w.flatten(-2), p.b], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "params"), [((5,), (5,)), ((2, 3), (3,)), ((4,), (1, 1))])
def test_packed_parameters(batch, params, dtype):
    """A head's output, and one gradient in its layout; (1, 1) is one set for all rows."""
    p = random_problem(batch, 3, 4, params if params != (1, 1) else (1,), dtype=torch.float32).to(dtype).to(DEVICE)
    if params == (1, 1):
        p = p._replace(z=p.z[:1], grad_z=p.grad_z[:1], grad_log_det=p.grad_log_det[:1])
    z, packed = p.z.detach().requires_grad_(), packed_of(p).requires_grad_()
    outputs = vvae_fast.functional.packed_planar_flow(z, packed, 3, 4, backend="triton")
    dz, dpacked = torch.autograd.grad(outputs, (z, packed), (p.grad_z, p.grad_log_det.float()))
    z_K, log_det, *wanted = run(p._replace(grad_log_det=p.grad_log_det.float()), backend="triton")
    assert torch.equal(outputs[0], z_K)
    assert torch.equal(outputs[1], log_det)
    assert torch.equal(dz, wanted[0])
    assert torch.equal(dpacked, torch.cat([wanted[1].flatten(-2), wanted[2].flatten(-2), wanted[3]], -1))


@pytest.mark.parametrize("params", [(), (3,)])
def test_the_raw_operators_pass_opcheck(params):
    p = random_problem((3,), 2, 4, params).to(DEVICE)
    a = opchecked(TRITON.planar_forward, p, FORMULAS)[2]
    torch.library.opcheck(TRITON.planar_backward, (p.grad_z, p.grad_log_det, *p.inputs, a, *FORMULAS))
    torch.library.opcheck(TRITON.planar_backward, (p.grad_z, p.grad_log_det, *p.inputs, a, *FORMULAS, False))
    if params:
        arguments = (p.grad_z, p.grad_log_det, p.z, packed_of(p), a, *FORMULAS)
        torch.library.opcheck(TRITON.planar_backward_packed, arguments)


@pytest.mark.parametrize(("batch", "params", "compact"), [((40,), (), False), ((2, 3), (3,), False), ((40,), (), True)])
def test_a_frozen_flow_gets_the_same_dz_alone(batch, params, compact, monkeypatch):
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: compact)
    p = random_problem(batch, 2, 4, params, scale=0.5).to(DEVICE)
    z = p.z.clone().requires_grad_()
    outputs = vvae_fast.planar_flow(z, *p.inputs[1:], backend="triton")
    (dz,) = torch.autograd.grad(outputs, z, (p.grad_z, p.grad_log_det))
    assert torch.equal(dz, run(p, backend="triton")[2])
    if compact or params:
        return
    z_0 = vvae_fast.planar_flow_inverse(z, *p.inputs[1:], backend="triton")
    (dz,) = torch.autograd.grad(z_0, z, (p.grad_z, p.grad_log_det))
    assert torch.equal(dz, invert(p, "triton")[2])


@pytest.mark.parametrize("params", [(), pytest.param((3,), marks=pytest.mark.long)])
def test_gradients_of_every_order(params):
    p = random_problem((3,), 2, 2, params, scale=0.5, dtype=torch.float64).to(DEVICE)
    inputs = [t.requires_grad_() for t in p.inputs]
    flow = partial(vvae_fast.planar_flow, backend="triton")
    assert torch.autograd.gradcheck(flow, inputs)
    assert torch.autograd.gradgradcheck(flow, inputs)


def test_half_precision_through_the_reference():
    """Where gradients must be differentiable, or inside torch.func, they are computed in float32 too."""
    p = random_problem((3,), 2, 2).to(torch.bfloat16).to(DEVICE)
    z = p.z.detach().requires_grad_()
    z_K, log_det = vvae_fast.planar_flow(z, *p.inputs[1:], backend="triton")
    (dz,) = torch.autograd.grad(z_K.float().sum() + log_det.sum(), z, create_graph=True)
    assert dz.dtype == torch.bfloat16
    assert dz.requires_grad
    z_K, log_det = torch.func.vmap(lambda z: vvae_fast.planar_flow(z, *p.inputs[1:], backend="triton"))(p.z)
    assert (z_K.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)


def test_torch_compile():
    p = random_problem((4,), 3, 2).to(DEVICE)
    compiled = torch.compile(lambda *inputs: vvae_fast.planar_flow(*inputs, backend="triton"), fullgraph=True)
    for x, y in zip(compiled(*p.inputs), vvae_fast.planar_flow(*p.inputs, backend="triton"), strict=True):
        assert torch.equal(x, y)


def test_modules():
    context = torch.randn(6, 4, device=DEVICE)
    flow = vvae_fast.AmortizedPlanarFlow(3, 2, 4, backend="triton").to(DEVICE)
    reference = vvae_fast.AmortizedPlanarFlow(3, 2, 4, backend="reference").to(DEVICE)
    reference.load_state_dict(flow.state_dict())
    z = torch.randn(6, 3, device=DEVICE)
    for x, y in zip(flow(z, context), reference(z, context), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 3)}, r"z must be \[R, D\]"),
        ({"b": torch.zeros(3)}, r"got z \(4, 2\), u \(2, 2\), w \(2, 2\), b \(3,\)"),
        ({"z": torch.zeros(4)}, r"z must be \[R, D\]"),
        ({"u": torch.zeros(3, 2, 2), "w": torch.zeros(3, 2, 2), "b": torch.zeros(3, 2)}, "R a multiple of P"),
    ],
)
def test_the_raw_forward_refuses_what_does_not_fit(change, message):
    inputs = dict(zip("zuwb", random_problem((4,), 2, 2).inputs, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        TRITON.planar_forward(*(t.to(DEVICE) for t in inputs.values()), *FORMULAS, True)


def test_the_raw_operators_refuse_other_dtypes_and_saved_values():
    p = random_problem((4,), 2, 2).to(DEVICE)
    a = TRITON.planar_forward(*p.inputs, *FORMULAS, True)[2]
    with pytest.raises(TypeError, match="must share a dtype"):
        TRITON.planar_forward(p.z, p.u.double(), p.w, p.b, *FORMULAS, True)
    for wrong in (a[:1], a.double(), a.T.contiguous().T):
        with pytest.raises(ValueError, match="as the forward returned them"):
            TRITON.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, wrong, *FORMULAS)
    with pytest.raises(ValueError, match="packed must have shape"):
        TRITON.planar_backward_packed(p.grad_z, p.grad_log_det, p.z, torch.zeros(4, 3, device=DEVICE), a, *FORMULAS)


def test_every_shape_has_a_configuration():
    for pass_, dim, shared in itertools.product(("forward", "backward"), (1, 2, 40, 1024), (True, False)):
        for dtype in (torch.float32, torch.float64):
            rows = _heuristics.direct(pass_, 1, dim, shared, dtype).block_rows
            assert rows >= 1
            assert _heuristics.direct(pass_, 10**6, dim, shared, dtype).block_rows >= rows


@pytest.mark.parametrize("params", [(), (5,)])
def test_a_launch_for_each_block_where_a_barrier_orders_nothing(monkeypatch, params):
    assert_same_bits_where_a_barrier_orders_nothing(answer, random_problem((30, 5), 3, 6, params), monkeypatch)
