"""PlanarFlow and AmortizedPlanarFlow."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import vvae_fast
from vvae_fast import AmortizedPlanarFlow, PlanarFlow, planar_flow
from vvae_fast.nn.arguments import first_parameter


def away_from_identity(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


def flow_and_inputs(amortized, dim=3, num_steps=5, rows=7, dtype=torch.float32):
    flow = AmortizedPlanarFlow(dim, num_steps, 4) if amortized else PlanarFlow(dim, num_steps)
    inputs = (torch.randn(rows, dim, dtype=dtype), *((torch.randn(rows, 4, dtype=dtype),) if amortized else ()))
    return flow.to(dtype), inputs


both = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])


@both
@pytest.mark.parametrize("dim", [1, 2, 40])
def test_identity_at_initialisation(amortized, dim):
    flow, inputs = flow_and_inputs(amortized, dim, num_steps=16)
    z_K, log_det = flow(*inputs)
    torch.testing.assert_close(z_K, inputs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(7), rtol=0, atol=1e-5)


@both
def test_initialisation_can_be_left(amortized):
    """The identity is no saddle point: every parameter tensor gets a gradient."""
    flow, inputs = flow_and_inputs(amortized)
    z_K, log_det = flow(*inputs)
    (z_K.square().sum() - log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@both
def test_inverse(amortized):
    flow, inputs = flow_and_inputs(amortized, dtype=torch.float64)
    away_from_identity(flow)
    z_K, log_det = flow(*inputs)
    z_0, inverse_log_det = flow.inverse(z_K, *inputs[1:])
    torch.testing.assert_close(z_0, inputs[0])
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_amortized_is_each_rows_own_flow():
    flow, (z, context) = flow_and_inputs(True, dtype=torch.float64)
    away_from_identity(flow)
    z_K, log_det = flow(z, context)
    u, w, b = flow.params(context)
    for row in range(len(z)):
        one = planar_flow(z[row], u[row], w[row], b[row])
        torch.testing.assert_close(z_K[row], one[0])
        torch.testing.assert_close(log_det[row], one[1])


def test_amortized_parameters_are_views_of_the_head():
    flow, (_, context) = flow_and_inputs(True)
    u, w, b = flow.params(context)
    assert u.untyped_storage().data_ptr() == w.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert (u.shape, w.shape, b.shape) == ((7, 5, 3), (7, 5, 3), (7, 5))


def test_several_samples_of_each_data_point():
    flow, (z, context) = flow_and_inputs(True, dtype=torch.float64)
    away_from_identity(flow)
    samples = torch.randn(6, *z.shape, dtype=torch.float64)
    z_K, log_det = flow(samples, context)
    for s in range(6):
        torch.testing.assert_close((z_K[s], log_det[s]), flow(samples[s], context))


@both
def test_parameters_may_move(amortized):
    """An in-place optimizer step between forward passes is seen; nothing is cached."""
    flow, inputs = flow_and_inputs(amortized)
    before, _ = flow(*inputs)
    away_from_identity(flow)
    assert (flow(*inputs)[0] - before).abs().max() > 1e-2


@both
def test_pickle_deepcopy_and_state_dict(amortized):
    flow, inputs = flow_and_inputs(amortized)
    away_from_identity(flow)
    wanted = flow(*inputs)
    fresh, _ = flow_and_inputs(amortized)
    fresh.load_state_dict(flow.state_dict())
    for other in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow), fresh):
        for x, y in zip(other(*inputs), wanted, strict=True):
            assert torch.equal(x, y)


def test_state_dict_names():
    assert set(PlanarFlow(2, 3).state_dict()) == {"u", "w", "b"}
    assert set(AmortizedPlanarFlow(2, 3, 4).state_dict()) == {"head.weight", "head.bias"}


@both
def test_training_lowers_a_loss(amortized):
    flow, inputs = flow_and_inputs(amortized, dim=2, num_steps=8, rows=256)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        z_K, log_det = flow(*inputs)
        loss = ((z_K[:, 0] - z_K[:, 1].square()).square() + 0.5 * z_K[:, 1].square() - log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@both
def test_no_steps_is_the_identity(amortized):
    flow, inputs = flow_and_inputs(amortized, num_steps=0)
    z_K, log_det = flow(*inputs)
    assert torch.equal(z_K, inputs[0])
    assert torch.equal(log_det, torch.zeros(7))


@both
def test_compile_and_autocast(amortized):
    flow, inputs = flow_and_inputs(amortized)
    away_from_identity(flow)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), flow(*inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_K, log_det = flow(*inputs)
    assert (z_K.dtype, log_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(z_K, flow(*inputs)[0], rtol=0.1, atol=0.1)


@both
def test_backend_of_a_module(amortized):
    sizes = (3, 5, 4) if amortized else (3, 5)
    kind = AmortizedPlanarFlow if amortized else PlanarFlow
    with pytest.raises(ValueError, match="backend must be one of"):
        kind(*sizes, backend="tpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        kind(*sizes, backend="")
    inputs = flow_and_inputs(amortized)[1]
    flow = kind(*sizes, backend="cpp")
    z_K, log_det = flow(*inputs)
    z_0, inverse_log_det = flow.inverse(z_K, *inputs[1:])
    assert "PlanarFlowFunction" in type(z_0.grad_fn).__name__
    torch.testing.assert_close(z_0, inputs[0])
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_repr_says_the_sizes():
    assert repr(PlanarFlow(2, 3)) == "PlanarFlow(dim=2, num_steps=3)"
    assert "dim=2, num_steps=3, context_dim=4" in repr(AmortizedPlanarFlow(2, 3, 4))


@pytest.mark.parametrize(
    ("error", "message", "z", "context"),
    [
        (TypeError, r"z must be a torch.Tensor, got list", [1.0], (6, 5)),
        (TypeError, r"z must be a torch.Tensor, got NoneType", None, (6, 5)),
        (ValueError, r"z must be \[\*batch, D\] with the flow's D = 4, got \(6, 3\)", (6, 3), (6, 5)),
        (ValueError, r"context's leading dimensions .*\(7,\), got \(6,\)", (7, 4), (6, 5)),
        (ValueError, r"context's leading dimensions .*\(\), got \(6,\)", (4,), (6, 5)),
        (TypeError, r"z must be torch.float32 like the flow, got torch.float64", torch.zeros(6, 4).double(), (6, 5)),
        (ValueError, r"z must be on cpu like the flow, got meta", torch.zeros(6, 4, device="meta"), (6, 5)),
    ],
)
def test_amortized_arguments_are_refused_by_their_own_names(error, message, z, context):
    flow = AmortizedPlanarFlow(4, 3, 5)
    z = torch.zeros(z) if isinstance(z, tuple) else z
    for call in (flow, flow.inverse):
        with pytest.raises(error, match=message):
            call(z, torch.zeros(context))


@pytest.mark.parametrize("way", ["forward", "inverse", "trajectory"])
def test_a_shared_flow_names_its_argument(way):
    """And not its own u, which the caller has not passed."""
    call = getattr(PlanarFlow(4, 3), way)
    for shape in ((6, 3), (4, 6), (), (0,)):
        got = re.escape(str(shape))
        with pytest.raises(ValueError, match=rf"z must be \[\*batch, D\] with the flow's D = 4, got {got}"):
            call(torch.zeros(shape))
    for z, name in (([0.0] * 4, "list"), (None, "NoneType"), (torch.zeros(6, 4).numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"z must be a torch.Tensor, got {name}"):
            call(z)


@pytest.mark.parametrize("k", [1.0, "1", None, slice(0, 2)])
def test_a_step_is_asked_for_by_an_int(k):
    flow = PlanarFlow(2, 3)
    with pytest.raises(TypeError, match=f"k must be an int, got {type(k).__name__}"):
        flow.step(k)
    assert torch.equal(flow.step(torch.tensor(1)).w, flow.w[1:2])  # what can index a list can index this


def test_a_usual_call_needs_none_of_the_checks(monkeypatch):
    """z [R, D] and context [R, F] like the head: nearly every call. What the checks would refuse is not one."""
    flow = AmortizedPlanarFlow(4, 3, 5)
    z, context = torch.randn(6, 4), torch.randn(6, 5)
    wanted, checked = flow(z[None], context), []
    monkeypatch.setattr(flow, "_check_inputs", lambda *given: checked.append(given))
    torch.testing.assert_close(flow(z, context), (wanted[0][0], wanted[1][0]))
    assert not checked
    flow(z[None], context)
    assert len(checked) == 1
    unusual = [(other, context) for other in (z[None], z[:, :3], z[:5], z[0], z.double(), z.to("meta"), z.tolist())]
    unusual += [(z, other) for other in (context[None], context[:, :4], context[:5], context.double(), None)]
    for given in (*unusual, (z.to("meta"), context.to("meta")), (z.double(), context.double())):
        assert not flow._is_usual(*given)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 3),
        nn.ReLU(),
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2, affine=False)), nn.Linear(2, 3)),
        nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.int8), False), nn.Parameter(torch.zeros(2))]),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        AmortizedPlanarFlow(2, 3, 4, rank=2),
    ],
)
def test_the_first_parameter_is_that_of_parameters(module):
    module.register_parameter("none", None)
    assert first_parameter(module) is next((p for p in module.parameters() if p.is_floating_point()), None)


def test_a_head_of_ones_own():
    flow = AmortizedPlanarFlow(4, 3, 5)
    flow.head = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 27))
    assert flow(torch.zeros(6, 4), torch.zeros(6, 5))[0].shape == (6, 4)
    flow.head = torch.nn.Linear(5, 26)
    with pytest.raises(ValueError, match=r"head must give \[\*params, K \(2 D \+ 1\)\] = \(6, 27\), got \(6, 26\)"):
        flow(torch.zeros(6, 4), torch.zeros(6, 5))
    flow.head = torch.nn.LSTM(5, 27)
    with pytest.raises(ValueError, match=r"head must give .* = \(6, 27\), got tuple"):
        flow(torch.zeros(6, 4), torch.zeros(6, 5))


def test_no_steps_have_a_gradient():
    z = torch.randn(4, 3, requires_grad=True)
    AmortizedPlanarFlow(3, 0, 400)(z, torch.randn(4, 400))[0].sum().backward()
    assert torch.equal(z.grad, torch.ones(4, 3))


def test_public_names():
    for name in vvae_fast.__all__:
        assert hasattr(vvae_fast, name)
