"""vvae_fast.interop.pythae against pythae."""

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from likeness import assert_alike
from problems import random_problem

import vvae_fast.interop.pythae
from vvae_fast.interop.pythae import (
    PlanarFlow,
    PlanarStack,
    from_pythae,
    load_pythae_state_dict,
    to_pythae_state_dict,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pythae's own
    pytest.importorskip("pythae")
    from pythae.data.datasets import BaseDataset
    from pythae.models import AutoModel, VAE_LinNF, VAE_LinNF_Config
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.normalizing_flows import BaseNF, NFModel, PlanarFlowConfig
    from pythae.models.normalizing_flows import PlanarFlow as TheirPlanarFlow
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

STEPS, DIM = 11, 5
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def fill(layers, seed):
    """Parameters far from initialisation."""
    p = random_problem((1,), len(layers), layers[0].u.shape[1], scale=0.8, seed=seed)
    with torch.no_grad():
        for layer, u, w, b in zip(layers, p.u, p.w, p.b, strict=True):
            layer.u.copy_(u[None])
            layer.w.copy_(w[None])
            layer.b.copy_(b[None])
    return layers


def their_layers(activation="tanh", seed=0):
    config = PlanarFlowConfig(input_dim=(DIM,), activation=activation)
    return fill([TheirPlanarFlow(config) for _ in range(STEPS)], seed)


def fused(layers):
    model = torch.nn.Module()
    model.net = torch.nn.ModuleList(copy.deepcopy(layers))
    (stack,) = from_pythae(model).net
    return stack


def without_flows():
    model = torch.nn.Module()
    model.net = torch.nn.ModuleList()
    return model


def run(*layers):
    def flow(x):
        log_det = 0
        for layer in layers:
            output = layer(x)
            x, log_det = output.out, log_det + output.log_abs_det_jac
        return x, log_det

    return flow


def columns(*layers):
    return [[getattr(layer, name) for layer in layers] for name in "uwb"]


@seeds
@pytest.mark.parametrize("activation", ["tanh", "elu"])
def test_fused_is_theirs(activation, seed):
    layers = their_layers(activation, seed)
    stack = fused(layers)
    assert {name: tuple(p.shape) for name, p in stack.state_dict().items()} == {
        "w": (STEPS, DIM),
        "u": (STEPS, DIM),
        "b": (STEPS,),
    }
    assert_alike(run(stack), run(*layers), torch.randn(64, DIM), columns(stack), columns(*layers))


@seeds
@pytest.mark.parametrize("activation", ["tanh", "elu"])
def test_layer_is_theirs(activation, seed):
    layers = their_layers(activation, seed)
    ours = [PlanarFlow(layer.model_config) for layer in layers]
    for mine, layer in zip(ours, layers, strict=True):
        assert list(mine.state_dict()) == list(layer.state_dict())
        mine.load_state_dict(layer.state_dict())
    assert_alike(run(*ours), run(*layers), torch.randn(64, DIM), columns(*ours), columns(*layers))


def test_linear_is_their_formula():
    """Theirs raises: it multiplies the number 1 by a matrix."""
    theirs = their_layers("linear")[0]
    x = torch.randn(6, DIM)
    with pytest.raises(TypeError):
        theirs(x)
    out, log_det = run(fused([theirs]))(x)
    torch.testing.assert_close(out, x + theirs.u * F.linear(x, theirs.w, theirs.b))
    torch.testing.assert_close(log_det, torch.log((1 + (theirs.u * theirs.w).sum()).abs() + 1e-4).expand(6))


def test_the_output_is_theirs():
    flow = PlanarFlow(PlanarFlowConfig(input_dim=(2, 3)))
    output = flow(torch.randn(4, 2, 3))
    assert type(output) is ModelOutput
    assert output.out is output["out"]
    assert output.out is output[0]
    assert (output.out.shape, output.log_abs_det_jac.shape) == ((4, 6), (4,))
    with pytest.raises(NotImplementedError):
        flow.inverse(output.out)
    flow.update()


def test_a_batch_of_one_keeps_its_dimension():
    config = PlanarFlowConfig(input_dim=(DIM,))
    x = torch.randn(1, DIM)
    assert TheirPlanarFlow(config)(x).log_abs_det_jac.shape == ()
    assert PlanarFlow(config)(x).log_abs_det_jac.shape == (1,)


def vae(*flows, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = VAE_LinNF(VAE_LinNF_Config(input_dim=(1, 4, 4), latent_dim=3, flows=list(flows)))
    planar = [layer for layer in model.net if type(layer) is TheirPlanarFlow]
    fill(planar, seed)
    return model


@pytest.mark.parametrize("flows", [["Planar"] * STEPS, ["Planar", "Planar", "Radial", "Planar", "Planar", "Planar"]])
def test_vae_lin_nf(flows):
    """The same loss and gradients from the same draws, and its checkpoints both ways."""
    model, data = vae(*flows), {"data": torch.rand(8, 1, 4, 4)}
    ours = copy.deepcopy(model)
    assert from_pythae(ours) is ours
    radial = "Radial" in flows
    assert [type(layer) for layer in ours.net] == (
        [PlanarStack, type(model.net[2]), PlanarStack] if radial else [PlanarStack]
    )

    def loss(model):
        torch.manual_seed(2)
        loss = model(data).loss
        loss.backward()
        return loss

    torch.testing.assert_close(loss(ours), loss(model), rtol=1e-5, atol=1e-5)
    encoder = zip(ours.encoder.parameters(), model.encoder.parameters(), strict=True)
    for got, wanted in encoder:
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-4)

    state = to_pythae_state_dict(ours)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    other = vae(*flows, seed=1)
    load_pythae_state_dict(ours, other.state_dict())
    torch.testing.assert_close(loss(ours), loss(other), rtol=1e-5, atol=1e-5)
    model.load_state_dict(to_pythae_state_dict(ours))
    with pytest.raises(ValueError, match=r"state_dict must have net\.1\.u"):
        load_pythae_state_dict(ours, {n: v for n, v in state.items() if n != "net.1.u"})


def test_the_public_surface_is_theirs():
    """Every public name of their class, whose `activation` and its derivative are functions: see docs/interop.md."""
    config = PlanarFlowConfig(input_dim=(2, 3))
    ours, theirs = PlanarFlow(config), TheirPlanarFlow(config)
    assert isinstance(ours, BaseNF)
    assert {name for name in dir(theirs) if not name.startswith("_")} - set(dir(ours)) == {"activation_derivative"}
    assert (ours.input_dim, ours.model_config, ours.model_name) == (6, config, "PlanarFlow")
    assert vvae_fast.interop.pythae.PlanarFlowConfig is PlanarFlowConfig
    for error in (AttributeError, ValueError):  # theirs, and this package's
        with pytest.raises(error, match="input_dim must be the shape"):
            PlanarFlow(PlanarFlowConfig())


def same_state(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_files_are_theirs(tmp_path):
    """Ours and theirs read what either wrote, AutoModel too."""
    config = PlanarFlowConfig(input_dim=(2, 3), activation="elu")
    ours, theirs = PlanarFlow(config), TheirPlanarFlow(config)
    for layer, folder in ((ours, str(tmp_path / "ours")), (theirs, str(tmp_path / "theirs"))):
        layer.save(folder)
        for load in (PlanarFlow.load_from_folder, TheirPlanarFlow.load_from_folder, AutoModel.load_from_folder):
            loaded = load(folder)
            assert same_state(loaded, layer)
            assert loaded.model_config == config
    assert type(PlanarFlow.load_from_folder(folder)) is PlanarFlow
    with pytest.raises(
        TypeError, match="model_config must be pythae's PlanarFlowConfig to be saved, got SimpleNamespace"
    ):
        PlanarFlow(SimpleNamespace(input_dim=2, activation="tanh")).save(folder)


def trained(model, data, tmp_path):
    """What pythae's trainer leaves of a model: itself, and the folder of its final one."""
    dataset = BaseDataset(data, torch.ones(len(data)))
    config = BaseTrainerConfig(str(tmp_path), num_epochs=2, steps_saving=1, per_device_train_batch_size=4, no_cuda=True)
    trainer = BaseTrainer(model, dataset, dataset, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    (run,) = tmp_path.iterdir()
    assert {path.name for path in run.iterdir()} == {"checkpoint_epoch_1", "checkpoint_epoch_2", "final_model"}
    return trainer._best_model, run


def test_their_trainer_saves_what_auto_model_loads(tmp_path):
    prior = torch.distributions.MultivariateNormal(torch.zeros(DIM), torch.eye(DIM))
    model = NFModel(prior, PlanarFlow(PlanarFlowConfig(input_dim=(DIM,))))
    best, run = trained(model, torch.randn(8, DIM), tmp_path)
    assert same_state(AutoModel.load_from_folder(str(run / "final_model")), best.flow)


@pytest.mark.parametrize("flows", [["Planar"] * 3, ["Planar", "Radial", "Planar", "Planar", "Radial"]])
def test_a_fused_vae_is_trained_saved_and_loaded_by_pythae(flows, tmp_path):
    model = from_pythae(vae(*flows))
    best, run = trained(model, torch.rand(8, 1, 4, 4), tmp_path)
    loaded = AutoModel.load_from_folder(str(run / "final_model"))
    assert len(loaded.net) == len(flows)
    assert same_state(loaded, best)
    again = from_pythae(copy.deepcopy(loaded))
    assert [type(layer) for layer in again.net] == [type(layer) for layer in best.net]
    data = {"data": torch.rand(4, 1, 4, 4)}
    losses = []
    for each in (best, loaded, again):
        torch.manual_seed(0)
        losses.append(each.eval()(data).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[2], losses[0])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "activation must be one of .* got 'sigmoid'", lambda: PlanarStack(2, 3, "sigmoid")),
        (ValueError, "num_steps must be at least 1, got 0", lambda: PlanarStack(2, 0)),
        (
            ValueError,
            "model_config.input_dim must be the shape",
            lambda: PlanarFlow(SimpleNamespace(input_dim=None, activation="tanh")),
        ),
        (
            TypeError,
            "model_config.input_dim must be a shape or an int, got float",
            lambda: PlanarFlow(SimpleNamespace(input_dim=2.0, activation="tanh")),
        ),
        (TypeError, "x must be a torch.Tensor, got list", lambda: PlanarStack(2, 1)([0.0])),
        (
            ValueError,
            r"x must be \[B, \*input_dim\] with 2 numbers a row, got \(3, 4\)",
            lambda: PlanarStack(2, 1)(torch.ones(3, 4)),
        ),
        (TypeError, "model must have a ModuleList `net`.*got Linear", lambda: from_pythae(torch.nn.Linear(1, 1))),
        (ValueError, "log_det_eps must be .* at least 0, got -1", lambda: from_pythae(without_flows(), log_det_eps=-1)),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_pythae_is_not_needed():
    code = """
import sys
sys.modules["pythae"] = None
import torch
from types import SimpleNamespace
from vvae_fast.interop.pythae import PlanarFlow
flow = PlanarFlow(SimpleNamespace(input_dim=3, activation="tanh"))
output = flow(torch.randn(5, 3))
assert output.out is output["out"] is output[0] is output.to_tuple()[0]
assert output.log_abs_det_jac.shape == (5,)
for call in (flow.save, PlanarFlow.load_from_folder):
    try:
        call("folder")
    except ImportError as error:
        assert "pip install pythae" in str(error)
    else:
        raise AssertionError(call)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
