"""Every activation, constraint and log_det_eps in the C++ kernels against the float64 oracle."""

import itertools

import pytest
import torch
from problems import assert_accuracy_rule, assert_close_to_oracle, oracle, random_problem, relative_errors, run

import vvae_fast
from vvae_fast import backends, shapes
from vvae_fast.backends import operators
from vvae_fast.functional import packed_planar_flow
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, FlowSpec

SLOPE = 0.3
PAIRS = list(itertools.product(ACTIVATIONS, CONSTRAINTS))
each_pair = pytest.mark.parametrize(("activation", "constraint"), PAIRS)
BATCHES = [((131,), ()), ((33,), (33,)), ((3, 17), (17,)), ((40, 2), (2,)), ((), ())]


@pytest.mark.usefixtures("poisoned")
@each_pair
def test_float64_is_the_oracle(isa, activation, constraint):
    for (batch, params), eps in itertools.product(BATCHES, (0.0, 1e-4)):
        for num_steps, dim in ((1, 1), (5, 8), (17, 5)):
            p = random_problem(batch, num_steps, dim, params, 0.5, torch.float64)
            others = {"activation": activation, "slope": SLOPE, "log_det_eps": eps}
            assert_close_to_oracle(p, constraint, 1e-10, **others)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("params", [(), (200,)])
@pytest.mark.parametrize(("num_steps", "dim"), [(16, 6), (32, 64)])
@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "sigmoid", "linear"])
def test_float32_accuracy(activation, num_steps, dim, params):
    assert_accuracy_rule((200, num_steps, dim, 0.3, params), activation=activation, slope=SLOPE)


@each_pair
def test_auto_takes_the_kernels(activation, constraint):
    p = random_problem((5,), 4, 3)
    options = {"activation": activation, "constraint": constraint, "slope": SLOPE, "log_det_eps": 1e-4}
    assert backends.select(shapes.check(*p.inputs, FlowSpec(**options)), None).name == "cpp"
    packed = torch.cat([t.flatten() for t in p.inputs[1:]]).requires_grad_()
    results = [packed_planar_flow(p.z, packed, 4, 3, backend=name, **options) for name in ("cpp", "reference")]
    gradients = [torch.autograd.grad(r, packed, (p.grad_z, p.grad_log_det))[0] for r in results]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("params", [(), (5,)])
@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "linear"])
def test_lanes_behind_the_last_row_add_nothing(isa, activation, params):
    """w.u = -1 without the constraint: at a = 0, where no row is, the determinant is 0, and the eps too small."""
    p = random_problem((5,), 2, 2, params)
    w = torch.tensor([1.0, 0.0]).expand_as(p.w)
    p = p._replace(z=-p.z.abs(), u=-w, w=w, b=-torch.ones_like(p.b))
    others = {"activation": activation, "slope": SLOPE, "log_det_eps": 1e-30 if activation == "linear" else 0.0}
    if activation == "linear":
        p = p._replace(grad_log_det=torch.zeros_like(p.grad_log_det))  # of a logarithm that is not there
    got = run(p, "none", "cpp", **others)
    assert max(relative_errors(got, oracle(p.to(torch.float64), "none", **others))) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_bits_of_a_row_depend_on_nothing_else(isa, activation, amortized):
    rows = 150
    p = random_problem((rows,), 20, 10, (rows,) if amortized else ())
    options = {"activation": activation, "slope": SLOPE, "log_det_eps": 1e-4, "backend": "cpp"}
    whole = vvae_fast.planar_flow(*p.inputs, **options)
    for keep in (torch.arange(1), torch.arange(63), torch.arange(77, 140)):
        params = tuple(t[keep] if amortized else t for t in p.inputs[1:])
        for x, y in zip(vvae_fast.planar_flow(p.z[keep], *params, **options), whole, strict=True):
            assert torch.equal(x, y[keep])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_row_stays_alone(isa, activation, bad):
    p = random_problem((70,), 20, 6)
    clean = run(p, backend="cpp", activation=activation)
    z = p.z.clone()
    z[13, 2] = bad
    got = run(p._replace(z=z), backend="cpp", activation=activation)
    others = torch.arange(70) != 13
    assert not got[0][13].isfinite().all()
    for x, y in zip(got[:3], clean, strict=False):
        assert torch.equal(x[others], y[others])


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, eps):
    p = random_problem((5,), 3, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in p.inputs]

    def flow(*tensors):
        return vvae_fast.planar_flow(*tensors, activation=activation, log_det_eps=eps, backend="cpp")

    assert torch.autograd.gradcheck(flow, inputs)
    assert torch.autograd.gradgradcheck(flow, inputs)


def test_raw_operators_refuse_a_number_without_a_name():
    p = random_problem((6,), 4, 3)
    with pytest.raises(RuntimeError, match=r"constraint must be in \[0, 2\], got 3"):
        operators.planar_forward(*p.inputs, 3, 0, 0.2, 0.0, False)
    with pytest.raises(RuntimeError, match=r"activation must be in \[0, 4\], got -1"):
        operators.planar_inverse(*p.inputs, 0, -1, 0.2, False)
    with pytest.raises(ValueError, match=r"activation must be in \[0, 4\], got 5"):
        FlowSpec.of_arguments(0, 5, 0.2)
