"""vvae_fast.interop.pyro against Pyro."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from likeness import assert_alike
from problems import random_problem

from vvae_fast.interop.pyro import ConditionalPlanar, ConditionedPlanar, Planar, PlanarStack, from_pyro

pyro = pytest.importorskip("pyro")
dist = pytest.importorskip("pyro.distributions")
theirs = pytest.importorskip("pyro.distributions.transforms")
dense = pytest.importorskip("pyro.nn.dense_nn")
STEPS, DIM = 11, 5

seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def their_layers(seed=0, steps=STEPS, dim=DIM):
    """Pyro's transforms, far from initialisation."""
    p = random_problem((1,), steps, dim, scale=0.8, seed=seed)
    layers = torch.nn.ModuleList(theirs.Planar(dim) for _ in range(steps))
    with torch.no_grad():
        for layer, u, w, b in zip(layers, p.u, p.w, p.b, strict=True):
            layer.u.copy_(u)
            layer.w.copy_(w)
            layer.bias.copy_(b)
    return layers


def run(*transforms):
    def flow(x):
        x = x.view_as(x)  # their cache would give the last answer back for the same tensor
        log_det = 0
        for transform in transforms:
            y = transform(x)
            log_det = log_det + transform.log_abs_det_jacobian(x, y)
            x = y
        return x, log_det

    return flow


def columns(*transforms):
    return [[getattr(t, name) for t in transforms] for name in ("u", "w", "bias")]


@seeds
@pytest.mark.parametrize("batch", [(64,), (3, 7)])
def test_fused_is_theirs(batch, seed):
    layers = their_layers(seed)
    stack = from_pyro(layers)
    assert {name: tuple(p.shape) for name, p in stack.named_parameters()} == {
        "bias": (STEPS,),
        "u": (STEPS, DIM),
        "w": (STEPS, DIM),
    }
    assert_alike(run(stack), run(*layers), torch.randn(*batch, DIM), columns(stack), columns(*layers))


@seeds
def test_layer_is_theirs(seed):
    layers = their_layers(seed)
    ours = torch.nn.ModuleList(Planar(DIM) for _ in layers)
    ours.load_state_dict(layers.state_dict())
    assert list(ours[0].state_dict()) == list(layers[0].state_dict()) == ["bias", "u", "w"]
    assert_alike(run(*ours), run(*layers), torch.randn(64, DIM), columns(*ours), columns(*layers))


@pytest.mark.parametrize("cache_size", [0, 1])
def test_in_their_transformed_distribution(cache_size):
    """log_prob of samples as theirs, and of any other point, where theirs raises KeyError."""
    layers = their_layers()
    stack = from_pyro(layers).with_cache(cache_size)
    base = dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)
    ours, wanted = dist.TransformedDistribution(base, [stack]), dist.TransformedDistribution(base, list(layers))
    torch.manual_seed(3)
    samples = ours.rsample((4, 6))
    torch.manual_seed(3)
    their_samples = wanted.rsample((4, 6))
    torch.testing.assert_close(samples, their_samples, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.log_prob(samples), wanted.log_prob(their_samples), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.log_prob(samples.clone()), ours.log_prob(samples), rtol=1e-3, atol=1e-3)
    assert ours.log_prob(torch.randn(4, 6, DIM)).isfinite().all()
    with pytest.raises(KeyError):
        wanted.log_prob(torch.randn(4, 6, DIM))
    ours.clear_cache()
    assert stack._cached_call is None
    assert ours.expand((2,)).sample().shape == (2, DIM)
    single = dist.TransformedDistribution(base, [Planar(DIM), Planar(DIM).inv])
    assert single.log_prob(single.sample((3,))).shape == (3,)


def test_in_their_compose_transform_module():
    """Their container of modules registers the parameters, and finds its parts equal only to themselves."""
    stack, layer = PlanarStack(DIM, 3), Planar(DIM)
    composed = dist.transforms.ComposeTransformModule([stack, layer])
    assert len(list(composed.parameters())) == 6
    x = torch.randn(4, DIM)
    torch.testing.assert_close(composed.inv(composed(x).detach()), x, rtol=1e-4, atol=1e-4)
    pyro.clear_param_store()
    pyro.module("flow", composed)
    assert set(pyro.get_param_store()) == {f"flow$$${k}.{name}" for k in (0, 1) for name in ("bias", "u", "w")}


def test_with_cache_shares_the_parameters():
    stack = PlanarStack(DIM, 3)
    uncached = stack.with_cache(0)
    assert stack.with_cache(1) is stack
    assert uncached.u is stack.u
    assert uncached != stack
    assert len({uncached, stack, stack}) == 2
    with pytest.raises(ValueError, match="cache_size must be 0 or 1, got 2"):
        stack.with_cache(2)


@pytest.mark.parametrize("kind", [lambda: Planar(DIM), lambda: PlanarStack(DIM, 3)])
def test_called_transforms_can_be_copied_moved_and_pickled(kind):
    transform, x = kind(), torch.randn(4, DIM)
    y = transform(x)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(other(x), y)
        assert set(other.state_dict()) == {"bias", "u", "w"}
    assert transform.double()(x.double()).dtype == torch.float64


def test_reset_as_theirs():
    transform = PlanarStack(400, 50)
    assert transform.u.abs().max() <= 400**-0.5
    assert transform.w.std().item() == pytest.approx((400 * 3) ** -0.5, rel=0.05)
    torch.nn.init.ones_(transform.bias)
    transform.reset_parameters()
    assert not transform.bias.any()


def test_state_dict_both_ways():
    layers, others = their_layers(), their_layers(seed=1)
    stack = from_pyro(layers)
    state = stack.to_pyro_state_dict()
    assert state.keys() == layers.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in layers.state_dict().items())
    stack.load_pyro_state_dict({**{f"flow.{n}": v for n, v in others.state_dict().items()}, "other": 0}, "flow.")
    for name, value in others.state_dict().items():
        assert torch.equal(stack.to_pyro_state_dict("flow.")[f"flow.{name}"], value)
    layers.load_state_dict(stack.to_pyro_state_dict())
    with pytest.raises(ValueError, match=r"K = 3 steps at '', got without \[\] and with \['10\.bias'"):
        PlanarStack(DIM, 3).load_pyro_state_dict(state)
    with pytest.raises(ValueError, match=r"got without \['11\.bias', '11\.u', '11\.w'\] and with \[\]"):
        PlanarStack(DIM, 12).load_pyro_state_dict(state)
    with pytest.raises(TypeError, match="state_dict must be a dict of names and tensors, got PlanarStack"):
        stack.load_pyro_state_dict(stack)
    with pytest.raises(TypeError, match=r"state_dict's 0\.u must be a torch.Tensor, got NoneType"):
        stack.load_pyro_state_dict(state | {"0.u": None})
    with pytest.raises(ValueError, match=r"state_dict's 3\.bias must have shape \(1,\), got \(\)"):
        stack.load_pyro_state_dict(state | {"3.bias": torch.tensor(0.0)})


def test_from_pyro_takes_what_holds_transforms():
    layers = their_layers()
    x = torch.randn(4, DIM)
    wanted = run(*layers)(x)[0]
    composed = dist.transforms.ComposeTransformModule(list(layers))
    mixed = [*layers[:3], from_pyro(layers[3:7]), *layers[7:9], from_pyro(layers[9:])]
    for given in (list(layers), layers, composed.parts, composed, mixed):
        torch.testing.assert_close(from_pyro(given)(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "transforms"),
    [
        (ValueError, "at least one planar transform, got none", []),
        (TypeError, "transforms must be a list of planar transforms, got NoneType", None),
        (TypeError, "transforms must be a list of planar transforms, got Planar", Planar(2)),
        (TypeError, "must all be Planar, .* got Radial", [theirs.Radial(2)]),
        (ValueError, r"must share one input_dim, got \[2, 3\]", [theirs.Planar(2), Planar(3)]),
    ],
)
def test_from_pyro_errors(error, message, transforms):
    with pytest.raises(error, match=message):
        from_pyro(transforms)


def test_sizes():
    with pytest.raises(ValueError, match="input_dim must be at least 1, got 0"):
        Planar(0)
    with pytest.raises(TypeError, match="num_steps must be an int, got float"):
        PlanarStack(2, 3.0)


class Hypernet(torch.nn.Module):
    """Pyro's own hypernetwork, and how often it ran."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.net = dense.DenseNN(3, [16], [1, dim, dim])
        self.runs = 0

    def forward(self, context):
        self.runs += 1
        return self.net(context)


def hypernet(seed=0):
    torch.manual_seed(seed)
    net = Hypernet()
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else 1
            parameter.copy_(0.8 * fan_in**-0.5 * torch.randn_like(parameter))
    return net


@seeds
@pytest.mark.parametrize("batch", [(6,), (4, 6)])
def test_conditional_is_theirs(batch, seed):
    net, context = hypernet(seed), torch.randn(6, 3)
    ours, wanted = ConditionalPlanar(net), theirs.ConditionalPlanar(net)
    params = [list(net.parameters())]
    x = torch.randn(*batch, DIM)
    assert_alike(run(ours.condition(context)), run(wanted.condition(context)), x, params, params)
    wanted.load_state_dict(ours.state_dict())


def test_conditional_in_their_distribution():
    net, context = hypernet(), torch.randn(6, 3)
    base = dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)
    stack = [ConditionalPlanar(net), ConditionalPlanar(hypernet(1))]
    conditional = dist.ConditionalTransformedDistribution(base, stack)
    flow = conditional.condition(context)
    assert isinstance(flow.transforms[0], ConditionedPlanar)
    samples = flow.rsample((6,))
    runs = net.runs
    value = flow.log_prob(samples)
    assert net.runs == runs  # from the cache
    torch.testing.assert_close(flow.log_prob(samples.clone()), value, rtol=1e-3, atol=1e-3)
    flow.log_prob(torch.randn(6, DIM)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    samples = flow.rsample((6,))
    value = flow.log_prob(samples)
    with torch.no_grad():
        net.net.layers[0].weight.add_(1.0)
    fresh = conditional.condition(context).log_prob(samples)
    assert not torch.allclose(fresh, value)
    torch.testing.assert_close(flow.log_prob(samples), fresh)


def test_conditional_of_a_plain_function():
    bias, u, w = torch.randn(6, 1), torch.randn(6, DIM), torch.randn(6, DIM)
    flow = ConditionalPlanar(lambda context: (bias + context, u, w)).condition(torch.zeros(6, 1))
    x = torch.randn(6, DIM)
    y = flow(x)
    bias.add_(1)  # nothing tells: nothing may be kept
    assert not torch.allclose(flow(x), y)
    torch.testing.assert_close(flow.inv(flow(x)), x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"nn must give \(bias, u, w\) of sizes \[1, D, D\], got Tensor"):
        ConditionalPlanar(lambda context: context).condition(x)(x)
    with pytest.raises(ValueError, match=r"nn must give bias \[\*params, 1\].*got \[\(6, 5\), \(6, 5\), \(6, 1\)\]"):
        ConditionalPlanar(lambda context: (u, w, bias)).condition(x)(x)
    with pytest.raises(ValueError, match=r"nn must give .* got \[\(6, 5\), 'int', 'int'\]"):
        ConditionalPlanar(lambda context: (u, 1, 2)).condition(x)(x)
    with pytest.raises(TypeError, match=r"nn must map context to .* got NoneType"):
        ConditionalPlanar(None)
    with pytest.raises(TypeError, match=r"nn must map context to .* got Tensor"):
        ConditionedPlanar(u, x)


def elbo_after_svi(transforms, seed, iterations=150):
    """The ELBO that a guide of these transforms reaches on a banana, from one seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)

    def model():
        with pyro.plate("samples", 64):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([2.0, 0.5])).to_event(1))
            pyro.factor("bend", -0.5 * (z[:, 1] - 0.5 * z[:, 0].square()).square(), has_rsample=True)

    def guide():
        for k, transform in enumerate(transforms):
            pyro.module(f"flow{k}", transform)
        with pyro.plate("samples", 64):
            pyro.sample("z", dist.TransformedDistribution(base, list(transforms)))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    losses = [svi.step() / 64 for _ in range(iterations)]
    return losses[0], sum(losses[-30:]) / 30


def test_svi_reaches_the_elbo_of_pyros_stack():
    """Both from the same parameters and draws; the bar is the spread of Pyro's own over seeds."""
    theirs_reached, ours_reached = [], []
    for seed in range(3):
        layers = their_layers(seed, 4, 2)
        ours = from_pyro(layers)
        ours_first, reached = elbo_after_svi([ours], seed)
        ours_reached.append(reached)
        first, reached = elbo_after_svi(layers, seed)
        theirs_reached.append(reached)
        assert ours_first == pytest.approx(first, rel=1e-4)
        assert reached < first
    spread = torch.tensor(theirs_reached).std().item()
    for got, wanted in zip(ours_reached, theirs_reached, strict=True):
        assert abs(got - wanted) <= spread, (ours_reached, theirs_reached)


def test_pyro_is_not_needed():
    code = """
import sys
sys.modules["pyro"] = None
import torch
from vvae_fast.interop.pyro import ConditionalPlanar, PlanarStack
flow = torch.distributions.TransformedDistribution(torch.distributions.Normal(torch.zeros(3), 1.0), PlanarStack(3, 4))
assert flow.log_prob(flow.rsample((5,))).shape == (5,)
assert ConditionalPlanar(torch.nn.Identity()).bijective
"""
    subprocess.run([sys.executable, "-c", code], check=True)
