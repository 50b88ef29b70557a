"""vvae_fast.interop.normflows against normflows."""

import copy
import pickle

import pytest
import torch
from likeness import assert_alike
from problems import random_problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vvae_fast.interop.normflows import (
    Planar,
    PlanarStack,
    from_normflows,
    load_normflows_state_dict,
    to_normflows_state_dict,
)

nf = pytest.importorskip("normflows")
STEPS = 11

seeds = pytest.mark.parametrize("seed", [0, 1, 2])
events = pytest.mark.parametrize("shape", [(5,), (2, 3), (3, 2, 2)], ids=str)


def model_of(shape, act="tanh", seed=0, steps=STEPS):
    """A normflows model of their planar layers, far from initialisation."""
    size = torch.Size(shape).numel()
    p = random_problem((1,), steps, size, scale=0.8, seed=seed)
    layers = [
        nf.flows.Planar(shape, act, u.reshape(1, *shape).clone(), w.reshape(1, *shape).clone(), b[None].clone())
        for u, w, b in zip(p.u, p.w, p.b, strict=True)
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(shape), layers)


def columns(model):
    """Their u, w, b, and those of a fused model, whose gradients are compared flat."""
    return [[getattr(layer, name) for layer in model.flows] for name in "uwb"]


@seeds
@events
@pytest.mark.parametrize("act", ["tanh", "leaky_relu"])
def test_fused_is_theirs(shape, act, seed):
    model = model_of(shape, act, seed)
    fused = from_normflows(copy.deepcopy(model))
    assert [type(layer) for layer in fused.flows] == [PlanarStack]
    assert {name: tuple(p.shape) for name, p in fused.flows[0].state_dict().items()} == {
        "u": (STEPS, *shape),
        "w": (STEPS, *shape),
        "b": (STEPS,),
    }
    z = torch.randn(64, *shape)
    assert_alike(fused.forward_and_log_det, model.forward_and_log_det, z, columns(fused), columns(model))


@events
@pytest.mark.parametrize("act", ["tanh", "leaky_relu"])
def test_layer_is_theirs_inside_their_model(shape, act):
    model = model_of(shape, act)
    ours = copy.deepcopy(model)
    ours.flows = nn.ModuleList(Planar(shape, act) for _ in model.flows)
    ours.load_state_dict(model.state_dict())
    z = torch.randn(64, *shape)
    assert_alike(ours.forward_and_log_det, model.forward_and_log_det, z, columns(ours), columns(model))
    model.load_state_dict(ours.state_dict())


@events
def test_inverse_is_theirs_where_they_have_one(shape):
    """Rows that pass near a kink might take another side of it; none of these does."""
    model = model_of(shape, "leaky_relu")
    fused = from_normflows(copy.deepcopy(model))
    x = torch.randn(64, *shape)
    assert_alike(fused.inverse_and_log_det, model.inverse_and_log_det, x, columns(fused), columns(model))


def test_their_leaky_relu_has_a_float32_slope_in_float64():
    """docs/interop.md has this difference: their inverse is off by float32's rounding of 0.2, unless float64 is torch's
    default dtype; ours by float64's."""

    def off_by(model):
        return (model.inverse(model.forward(x)) - x).abs().max().item()

    model = model_of((2,), "leaky_relu", steps=8).double()
    fused = from_normflows(copy.deepcopy(model))
    x = torch.randn(500, 2, dtype=torch.float64)
    log_prob = fused.log_prob(x)
    assert off_by(fused) < 1e-12
    assert 1e-8 < off_by(model) < 1e-4
    assert (model.log_prob(x) - log_prob).abs().max() > 1e-7
    try:
        torch.set_default_dtype(torch.float64)
        assert off_by(model) < 1e-12
        torch.testing.assert_close(model.log_prob(x), log_prob, rtol=1e-9, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


@seeds
@events
@pytest.mark.parametrize("act", ["tanh", "leaky_relu", "elu", "sigmoid", "linear"])
def test_inverse_of_every_activation(shape, act, seed):
    stack = PlanarStack(shape, STEPS, act).double()
    p = random_problem((1,), STEPS, stack.u[0].numel(), scale=0.8, seed=seed, dtype=torch.float64)
    stack.load_state_dict({"u": p.u.reshape(stack.u.shape), "w": p.w.reshape(stack.w.shape), "b": p.b})
    z = torch.randn(2, 9, *shape, dtype=torch.float64)
    z_K, log_det = stack(z)
    assert (z_K.shape, log_det.shape) == (z.shape, (2, 9))
    back, inverse_log_det = stack.inverse(z_K)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)


def test_log_prob_of_any_point():
    """forward_kld needs the inverse, which normflows' tanh layers lack."""
    model = model_of((2,))
    x = torch.randn(50, 2)
    with pytest.raises(NotImplementedError):
        model.log_prob(x)
    fused = from_normflows(model)
    samples, log_q = fused.sample(50)
    torch.testing.assert_close(fused.log_prob(samples), log_q, rtol=1e-4, atol=1e-4)
    fused.forward_kld(x).backward()
    assert all(p.grad.isfinite().all() for p in fused.flows.parameters())


def test_state_dict_both_ways():
    model, other = model_of((2, 3)), model_of((2, 3), seed=1)
    fused = from_normflows(copy.deepcopy(model))
    state = to_normflows_state_dict(fused)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    load_normflows_state_dict(fused, other.state_dict())
    other_state = to_normflows_state_dict(fused)
    assert all(torch.equal(other_state[name], value) for name, value in other.state_dict().items())
    model.load_state_dict(other_state)
    layers = fused.flows[0].unfused()
    layers.load_state_dict(model.flows.state_dict())
    with pytest.raises(ValueError, match=r"state_dict must have flows\.10\.u for the model's flows\.0\.u"):
        load_normflows_state_dict(fused, {n: v for n, v in state.items() if n != "flows.10.u"})
    with pytest.raises(RuntimeError, match=r"flows\.11\.u"):
        load_normflows_state_dict(fused, {**state, "flows.11.u": state["flows.0.u"]})


def test_runs_end_where_layers_differ():
    def layers(*acts):
        return [nf.flows.Planar((2,), act) for act in acts]

    frozen = layers("tanh", "tanh")
    for layer in frozen:
        layer.requires_grad_(False)
    tied = layers("tanh")[0]
    hooked = layers("tanh")[0]
    hooked.register_forward_hook(lambda *_: None)
    flows = [*layers("tanh", "tanh"), Planar((2,)), *layers("leaky_relu"), *frozen, *layers("tanh")]
    flows += [nf.flows.Permute(2), tied, tied, hooked, nf.flows.Radial((2,)), PlanarStack((2,), 3), *layers("tanh")]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)
    z, state = torch.randn(8, 2), copy.deepcopy(model).state_dict()
    wanted = model.forward_and_log_det(z)
    assert from_normflows(model) is model
    kinds = [(type(f).__name__, getattr(f, "num_steps", None), getattr(f, "act", None)) for f in model.flows]
    assert kinds == [
        ("PlanarStack", 3, "tanh"),
        ("PlanarStack", 1, "leaky_relu"),
        ("PlanarStack", 2, "tanh"),
        ("PlanarStack", 1, "tanh"),
        ("Permute", None, None),
        ("Planar", None, "tanh"),
        ("Planar", None, "tanh"),
        ("Planar", None, "tanh"),
        ("Radial", None, None),
        ("PlanarStack", 4, "tanh"),
    ]
    assert not any(p.requires_grad for p in model.flows[2].parameters())
    assert model.flows[5] is model.flows[6] is tied
    for got, value in zip(model.forward_and_log_det(z), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    again = to_normflows_state_dict(from_normflows(model))
    unstacked = {name for name in state if not name.startswith("flows.13")}
    assert unstacked <= set(again)
    load_normflows_state_dict(model, again)


def test_where_nothing_is_fused_a_warning_says_what_was_found():
    hooked = nf.flows.Planar((2,))
    hooked.register_forward_hook(lambda *_: None)
    for layers, found in (
        ([nf.flows.Radial((2,)), nf.flows.Radial((2,)), hooked], "2 Radial, 1 Planar"),
        ([], "no layers"),
    ):
        model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), layers)
        with pytest.warns(UserWarning, match=f"nothing is fused: model.flows .*, got {found}; planar") as warned:
            assert from_normflows(model) is model
        assert warned[0].filename == __file__
        assert list(model.flows) == layers
    from_normflows(from_normflows(model_of((2,))))  # the second time there is nothing to do, and nothing to warn of


def test_mode_and_dtype_are_kept():
    model = from_normflows(model_of((3,)).double().eval())
    assert not model.flows[0].training
    assert model.flows[0].u.dtype == torch.float64


def steps_of(model, seed=0):
    """One training step at each call, towards a target that bends, from one seed."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    g = torch.Generator().manual_seed(seed)

    def step():
        z = torch.randn(128, 8, generator=g)
        x, log_det = model.forward_and_log_det(z)
        loss = ((x[:, 0] - x[:, 1].square()).square() + 0.5 * x[:, 1:].square().sum(-1) - log_det).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch that run: what small batches spend their time on, whatever the machine."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators_of(call) -> int:
    with Operators() as counted:
        call()
    return counted.count


def test_same_loss_curve_with_a_tenth_of_the_operators():
    """32 layers, converted in one line; `make bench` times them."""
    model = model_of((8,), steps=32)
    fused = from_normflows(copy.deepcopy(model))
    theirs, ours = steps_of(model), steps_of(fused)
    for _ in range(20):
        assert ours() == pytest.approx(theirs(), rel=0.01)
    z = torch.randn(128, 8)
    counts = [operators_of(lambda m=m: m.forward_and_log_det(z)[1].sum().backward()) for m in (model, fused)]
    assert counts[0] > 10 * counts[1] > 0, counts


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "state_dict must be a dict of names and tensors, got NoneType", None),
        (TypeError, r"state_dict's flows\.1\.u must be a torch.Tensor, got float", {"flows.1.u": 1.0}),
        (ValueError, r"flows\.1\.w must have shape \(1, 2\), got \(1, 3\)", {"flows.1.w": torch.zeros(1, 3)}),
        (ValueError, r"flows\.0\.b must have shape \(1,\), got \(2,\)", {"flows.0.b": torch.zeros(2)}),
        (RuntimeError, r"Unexpected key.*flows\.2\.b", {"flows.2.b": torch.zeros(1)}),
    ],
)
def test_state_dicts_that_do_not_fit(error, message, changes):
    model = from_normflows(model_of((2,), steps=2))
    state = changes and to_normflows_state_dict(model) | changes
    with pytest.raises(error, match=message):
        load_normflows_state_dict(model, state)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"shape must have at least one dimension, got \(\)", lambda: Planar(())),
        (TypeError, r"shape's sizes must be an int, got float", lambda: Planar(2.0)),
        (ValueError, r"act must be one of .*got 'relu'", lambda: Planar(2, "relu")),
        (ValueError, r"u must have shape \(1, 2\), got \(2,\)", lambda: Planar(2, u=torch.zeros(2))),
        (TypeError, r"u must be a floating torch.Tensor, got list", lambda: Planar(2, u=[0.0, 0.0])),
        (TypeError, r"b must be a floating torch.Tensor, got torch.int64", lambda: Planar(2, b=torch.zeros(1).long())),
        (ValueError, r"num_steps must be at least 1, got 0", lambda: PlanarStack(2, 0)),
        (TypeError, r"z must be a torch.Tensor, got list", lambda: Planar(2)([0.0, 0.0])),
        (ValueError, r"z must be \[\*batch, \*shape\] with shape = \(2, 3\)", lambda: Planar((2, 3))(torch.ones(3, 2))),
        (TypeError, r"model must have a ModuleList `flows`.*got Linear", lambda: from_normflows(nn.Linear(1, 1))),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_fused_models_files_are_normflows(tmp_path):
    """Their model.save and model.load know no stacks; a state_dict of stacks is loaded too."""
    model = model_of((2, 3))
    fused, path = from_normflows(copy.deepcopy(model)), tmp_path / "model.pt"
    fused.save(path)
    other = model_of((2, 3), seed=1)
    other.load(path)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
    model_of((2, 3), seed=2).save(path)
    fused.load(path)
    z = torch.randn(8, 2, 3)
    wanted = model_of((2, 3), seed=2).forward_and_log_det(z)
    for copied in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert list(copied.state_dict()) == list(model.state_dict())
        for got, value in zip(copied.forward_and_log_det(z), wanted, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
    stacked = {f"flows.0.{name}": value + 1 for name, value in fused.flows[0].state_dict().items()}
    fused.load_state_dict(stacked, strict=False)  # without the base's
    assert torch.equal(fused.flows[0].u, stacked["flows.0.u"])


def test_a_fused_models_state_dict_is_a_view_as_any():
    fused = from_normflows(model_of((2,)))
    fused.state_dict()["flows.3.u"].zero_()
    assert not fused.flows[0].u[3].any()
    assert fused.state_dict(keep_vars=True)["flows.3.u"].requires_grad
    state = {name: value + 1 for name, value in fused.state_dict().items()}
    fused.load_state_dict({name: value.double() for name, value in state.items()}, assign=True)
    assert fused.flows[0].w.dtype == torch.float64


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"Missing key.*\"flows\.2\.w\"", {"flows.2.w": None}),
        (r"Unexpected key.*\"flows\.1\.v\"", {"flows.1.v": torch.zeros(1)}),
        (r"Unexpected key.*\"flows\.6\.u\"", {"flows.6.u": torch.zeros(1, 2)}),
        (r"size mismatch for flows\.1\.u: got \(1, 3\), the model has \(1, 2\)", {"flows.1.u": torch.zeros(1, 3)}),
        (r"size mismatch for flows\.1\.u: got float", {"flows.1.u": 1.0}),
    ],
)
def test_a_fused_models_load_state_dict_names_theirs(message, changes):
    flows = [nf.flows.Planar((2,)), nf.flows.Planar((2,)), nf.flows.Planar((2,)), nf.flows.Radial((2,))]
    model = from_normflows(
        nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [*flows, *map(copy.deepcopy, flows[:2])])
    )
    assert [type(flow).__name__ for flow in model.flows] == ["PlanarStack", "Radial", "PlanarStack"]
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    state = {name: value for name, value in (state | changes).items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False) if "size" not in message else None
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_list_made_by_hand_is_converted_too():
    """Nothing marks it as fused: its own state_dict stays, the functions give theirs."""
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [PlanarStack(2, 3), Planar(2)])
    theirs = to_normflows_state_dict(model)
    assert {name for name in theirs if name.startswith("flows")} == {f"flows.{k}.{p}" for k in range(4) for p in "uwb"}
    load_normflows_state_dict(model, {name: value + 1 for name, value in theirs.items()})
    assert torch.equal(model.flows[0].u[2:], theirs["flows.2.u"] + 1)
    assert "flows.2.u" not in model.state_dict()
