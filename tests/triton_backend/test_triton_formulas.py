"""Every activation, constraint and log_det_eps in the Triton kernels against the float64 oracle."""

import itertools

import pytest
import torch
from problems import (
    Problem,
    assert_accuracy_rule,
    oracle,
    random_problem,
    relative_errors,
    run,
)
from triton_device import DEVICE, ON_DEVICE, TRITON, assert_float64_is_the_oracle

import vvae_fast
from vvae_fast import shapes
from vvae_fast.backends import selection
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, FlowSpec
from vvae_fast.triton import _heuristics
from vvae_fast.triton.math import AnyFlow

SLOPE = 0.3

# NumPy's, which interprets: rows that are not there or no numbers have log(0), inf - inf and the like, and go nowhere.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

PAIRS = list(itertools.product(ACTIVATIONS, CONSTRAINTS))
each_pair = pytest.mark.parametrize(("activation", "constraint"), PAIRS)
beside_tanh = pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "tanh"])


@pytest.fixture(params=["direct", "compact"])
def form(request, monkeypatch):
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: request.param == "compact")
    return request.param


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("batch", "params", "eps"), [((9,), (), 1e-4), ((5,), (5,), 0.0), ((4, 3), (3,), 1e-4)], ids=str
)
@each_pair
def test_direct(activation, constraint, batch, params, eps):
    others = {"activation": activation, "slope": SLOPE, "log_det_eps": eps}
    assert_float64_is_the_oracle(batch, 3, 4, params, constraint, **others)


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("params", "eps"), [((), 1e-4), ((2,), 0.0)], ids=str)
@pytest.mark.parametrize(("activation", "constraint"), PAIRS[::2])
def test_compact(activation, constraint, params, eps, monkeypatch):
    """Two chunks, the second not full, whose missing steps add no log(1 + eps); rows and columns that fill no tile.

    Every other pair, which is each activation and each constraint: they meet in functions that both forms share.
    """
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: True)
    batch, others = (3, 2) if params else (6,), {"activation": activation, "slope": SLOPE, "log_det_eps": eps}
    assert_float64_is_the_oracle(batch, 18, 20, params, constraint, tolerance=1e-10, **others)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("params", [(), (9,)])
@beside_tanh
def test_float32_accuracy(activation, params):
    case = (9, 6, 5, 0.3, params)
    assert_accuracy_rule(case, **ON_DEVICE, activation=activation, slope=SLOPE)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("params", [(), (5,)])
@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "linear"])
def test_rows_behind_the_last_add_nothing(activation, params):
    """w.u = -1 without the constraint: at a = 0, where no row is, the determinant is 0; so it is everywhere with
    linear, whose logarithm is not asked for."""
    p = random_problem((5,), 1, 2, params)
    w = torch.tensor([1.0, 0.0]).expand_as(p.w)
    p = p._replace(z=-p.z.abs(), u=-w, w=w, b=-torch.ones_like(p.b))
    if activation == "linear":
        p = p._replace(grad_log_det=torch.zeros_like(p.grad_log_det))
    z_K, log_det, *grads = run(p.to(DEVICE), "none", "triton", activation=activation, slope=SLOPE)
    wanted = oracle(p.to(torch.float64), "none", activation=activation, slope=SLOPE)
    kept = slice(0, 1) if activation == "linear" else slice(0, 2)
    assert max(relative_errors((z_K, log_det)[kept], wanted[kept])) < 1e-5
    if activation == "linear":
        assert all(t.isfinite().all() for t in grads)  # 0 / 0 is NaN in the oracle
    else:
        assert max(relative_errors(tuple(grads), wanted[2:])) < 1e-5


@pytest.mark.usefixtures("form")
@beside_tanh
def test_a_row_stays_alone(activation):
    """Its bits do not depend on the batch, nor on a row that holds what is no number."""
    p = random_problem((12,), 4, 5)
    options = {"activation": activation, "slope": SLOPE, "log_det_eps": 1e-4, "backend": "triton"}
    whole = run(p.to(DEVICE), **options)[:3]
    for rows in (slice(0, 1), slice(3, 12)):
        part = Problem(*(t[rows] if t.shape[:1] == (12,) else t for t in p))
        for x, y in zip(run(part.to(DEVICE), **options)[:3], whole, strict=True):
            assert torch.equal(x, y[rows])
    others = torch.arange(12) != 7
    for bad in (float("nan"), float("inf")):
        p.z[7, 2] = bad
        spoilt = run(p.to(DEVICE), **options)[:3]
        assert not spoilt[0][7].isfinite().all()
        for x, y in zip(spoilt, whole, strict=True):
            assert torch.equal(x[others], y[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@beside_tanh
def test_half_precisions_compute_in_float32(activation, dtype):
    p = random_problem((6,), 5, 6).to(dtype).to(DEVICE)
    p = p._replace(grad_log_det=p.grad_log_det.float())
    got = run(p, "log_softplus", "triton", activation=activation)
    wanted = run(p.to(torch.float32), "log_softplus", "triton", activation=activation)
    assert [t.dtype for t in got] == [dtype, torch.float32, *[dtype] * 4]
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-2 if x.dtype == dtype else 1e-6, atol=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_every_order(activation):
    p = random_problem((2,), 2, 2, scale=0.5, dtype=torch.float64).to(DEVICE)

    def flow(*inputs):
        options = {"activation": activation, "constraint": "log_softplus", "log_det_eps": 1e-4}
        return vvae_fast.planar_flow(*inputs, backend="triton", **options)

    inputs = [t.requires_grad_() for t in p.inputs]
    assert torch.autograd.gradcheck(flow, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(flow, inputs, fast_mode=True)


@each_pair
def test_nothing_is_refused_but_another_device(activation, constraint):
    formulas = FlowSpec(constraint, activation, SLOPE, 1e-4)
    problem = shapes.Problem(5, 3, 4, 1, False, torch.float32, "cuda", spec=formulas)
    assert selection._BACKENDS["triton"].unsupported(problem) == []
    assert selection._BACKENDS["triton"].unsupported(problem._replace(device_type="xpu")) == [
        "the triton backend runs on cuda tensors, got xpu"
    ]


def test_only_leaky_relus_slope_is_compiled_for():
    for activation in ACTIVATIONS:
        known = {AnyFlow.of(FlowSpec(activation=activation, slope=slope)) for slope in (0.1, 0.2, 1)}
        assert len(known) == (3 if activation == "leaky_relu" else 1)


def test_the_raw_operators_refuse_a_number_without_a_name():
    p = random_problem((4,), 2, 2).to(DEVICE)
    refused = [(3, 0, r"constraint must be in \[0, 2\], got 3"), (0, -1, r"activation must be in \[0, 4\], got -1")]
    for constraint, activation, message in refused:
        with pytest.raises(ValueError, match=message):
            TRITON.planar_forward(*p.inputs, constraint, activation, 0.2, 0.0, True)
        with pytest.raises(ValueError, match=message):
            TRITON.planar_inverse(*p.inputs, constraint, activation, 0.2, True)
