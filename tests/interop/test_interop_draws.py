"""The global random generators: what copies parameters draws nothing, and what draws does so as the other package."""

import contextlib
import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from vvae_fast.distributions import PlanarTransform
from vvae_fast.interop import normflows as our_normflows
from vvae_fast.interop import pyro as our_pyro
from vvae_fast.interop import pythae as our_pythae

nf = pytest.importorskip("normflows")
pyro_transforms = pytest.importorskip("pyro.distributions.transforms")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pythae's own
    pytest.importorskip("pythae")
    from pythae.models import VAE_LinNF, VAE_LinNF_Config
    from pythae.models.normalizing_flows import PlanarFlow, PlanarFlowConfig


def drawn() -> tuple:
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), *numpy_state[2:]


@contextlib.contextmanager
def nothing_drawn():
    before = drawn()
    yield
    assert drawn() == before


def normflows_model():
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2), [nf.flows.Planar((2,)) for _ in range(3)])


def pythae_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VAE_LinNF(VAE_LinNF_Config(input_dim=(1, 4, 4), latent_dim=3, flows=["Planar"] * 3))


def reloaded_normflows():
    model = our_normflows.from_normflows(normflows_model())
    state = our_normflows.to_normflows_state_dict(model)
    return lambda: (our_normflows.load_normflows_state_dict(model, state), model.load_state_dict(model.state_dict()))


def reloaded_pyro():
    stack = our_pyro.PlanarStack(2, 3)
    state = stack.to_pyro_state_dict()
    return lambda: stack.load_pyro_state_dict(state)


def reloaded_pythae():
    model = our_pythae.from_pythae(pythae_model())
    state = our_pythae.to_pythae_state_dict(model)
    return lambda: (our_pythae.load_pythae_state_dict(model, state), model.load_state_dict(model.state_dict()))


def bound(function, *prepared):
    return lambda: function(*prepared)


# Each makes what it needs, which may draw, and gives the call that may not.
COPIES = {
    "from_normflows": lambda: bound(our_normflows.from_normflows, normflows_model()),
    "from_normflows, fused": lambda: bound(
        our_normflows.from_normflows, our_normflows.from_normflows(normflows_model())
    ),
    "unfused": lambda: our_normflows.PlanarStack((2, 3), 4).unfused,
    "normflows' Planar": lambda: (
        lambda: our_normflows.Planar(2, "tanh", torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1))
    ),
    "normflows' state_dict": reloaded_normflows,
    "from_pyro": lambda: bound(our_pyro.from_pyro, [pyro_transforms.Planar(2), our_pyro.PlanarStack(2, 3)]),
    "Pyro's state_dict": reloaded_pyro,
    "with_cache": lambda: bound(our_pyro.PlanarStack(2, 3).with_cache, 0),
    "conditional": lambda: bound(our_pyro.ConditionalPlanar(nn.Linear(2, 5)).condition, torch.zeros(2)),
    "from_pythae": lambda: bound(our_pythae.from_pythae, pythae_model()),
    "pythae's state_dict": reloaded_pythae,
    "PlanarTransform": lambda: lambda: PlanarTransform(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2)).inv,
    "deepcopy": lambda: bound(copy.deepcopy, our_pyro.PlanarStack(2, 3)),
    "pickle": lambda: bound(pickle.loads, pickle.dumps(our_normflows.from_normflows(normflows_model()))),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_draws_nothing(name):
    call = COPIES[name]()
    with nothing_drawn():
        call()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_changes_nothing(device):
    """Placeholders are an inner matter: what comes out lies where its parameters lay."""
    models = normflows_model(), pythae_model(), nn.ModuleList(pyro_transforms.Planar(2) for _ in range(3))
    with torch.device(device):
        our_normflows.from_normflows(models[0])
        our_pythae.from_pythae(models[1])
        stack = our_pyro.from_pyro(models[2])
        layer = our_normflows.Planar(2)
    assert {p.device.type for model in (*models, stack) for p in model.parameters()} == {"cpu"}
    assert {p.device.type for p in layer.parameters()} == {device}


def normflows_layer(**given):
    return lambda planar: planar((2, 3), "tanh", **given)


ROW = torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("make", "ours", "theirs"),
    [
        (normflows_layer(), our_normflows.Planar, nf.flows.Planar),
        (normflows_layer(u=ROW), our_normflows.Planar, nf.flows.Planar),
        (normflows_layer(w=ROW, b=torch.ones(1)), our_normflows.Planar, nf.flows.Planar),
        (lambda planar: planar(40), our_pyro.Planar, pyro_transforms.Planar),
        (lambda planar: planar(5), our_pyro.planar, pyro_transforms.planar),
        (lambda planar: planar(5, 3, [7]), our_pyro.conditional_planar, pyro_transforms.conditional_planar),
        (lambda planar: planar(5, 3), our_pyro.conditional_planar, pyro_transforms.conditional_planar),
        (lambda planar: planar(PlanarFlowConfig(input_dim=(40,))), our_pythae.PlanarFlow, PlanarFlow),
    ],
)
def test_a_seed_gives_their_layer_and_their_next_draw(make, ours, theirs):
    torch.manual_seed(3)
    wanted = make(theirs)
    after = drawn()
    torch.manual_seed(3)
    got = make(ours)
    assert drawn() == after
    assert list(got.state_dict()) == list(wanted.state_dict())
    assert all(torch.equal(got.state_dict()[name], value) for name, value in wanted.state_dict().items())


def test_the_same_seed_gives_the_same_loss_curve():
    """The draws of training come after the conversion."""
    losses = []
    for convert in (lambda model: model, our_normflows.from_normflows):
        torch.manual_seed(0)
        model = convert(normflows_model())
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        curve = []
        for _ in range(10):
            z = torch.randn(64, 2)
            x, log_det = model.forward_and_log_det(z)
            loss = (0.5 * (x - 1).square().sum(-1) - log_det).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
