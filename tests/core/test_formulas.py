"""The choice of activation, constraint and log_det_eps: refusals, backends, and the modules that carry it."""

import copy
import functools
import itertools
import math

import pytest
import torch
from problems import random_problem

import vvae_fast
from vvae_fast import AmortizedPlanarFlow, PlanarFlow, backends, reference, shapes
from vvae_fast.backends import cuda, selection
from vvae_fast.functional import given_planar_flow, packed_planar_flow
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, FlowSpec

REFUSED = [
    (ValueError, r"activation must be one of .*'linear'.*got 'relu'", {"activation": "relu"}),
    (ValueError, r"constraint must be one of .*'log_softplus'.*got 'exp'", {"constraint": "exp"}),
    (ValueError, r"slope must be finite and above 0, got 0", {"activation": "leaky_relu", "slope": 0}),
    (ValueError, r"slope must be finite and above 0, got -0.1", {"activation": "leaky_relu", "slope": -0.1}),
    (ValueError, r"slope must be finite and above 0, got nan", {"activation": "leaky_relu", "slope": float("nan")}),
    (ValueError, r"slope must be finite and above 0, got inf", {"activation": "leaky_relu", "slope": float("inf")}),
    (ValueError, r"slope must be finite and above 0, got 1e\+39", {"activation": "leaky_relu", "slope": 1e39}),
    (TypeError, r"slope must be a float, got str", {"activation": "leaky_relu", "slope": "0.2"}),
    (TypeError, r"slope must be a float, got bool", {"activation": "leaky_relu", "slope": True}),
]
REFUSED_FORWARD = [
    (ValueError, r"log_det_eps must be finite and at least 0, got -0.1", {"log_det_eps": -0.1}),
    (ValueError, r"log_det_eps must be finite and at least 0, got nan", {"log_det_eps": float("nan")}),
    (ValueError, r"log_det_eps must be finite and at least 0, got 1e\+39", {"log_det_eps": 1e39}),
    (TypeError, r"log_det_eps must be a float, got Tensor", {"log_det_eps": torch.tensor(1e-4)}),
    (TypeError, r"log_det_eps must be a float, got NoneType", {"log_det_eps": None}),
]


def ids(cases):
    return [message for _, message, _ in cases]


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED, ids=ids(REFUSED))
def test_refused_by_name(error, message, changes):
    p = random_problem((5,), 4, 3)
    packed = torch.cat([t.flatten() for t in p.inputs[1:]])
    for function in (vvae_fast.planar_flow, vvae_fast.planar_flow_inverse):
        with pytest.raises(error, match=message):
            function(*p.inputs, **changes)
    with pytest.raises(error, match=message):
        packed_planar_flow(p.z, packed, 4, 3, **changes)
    with pytest.raises(error, match=message):
        PlanarFlow(3, 4, **changes)
    with pytest.raises(error, match=message):
        AmortizedPlanarFlow(3, 4, 5, **changes)


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED_FORWARD, ids=ids(REFUSED_FORWARD))
def test_log_det_eps_is_refused_by_name(error, message, changes):
    with pytest.raises(error, match=message):
        vvae_fast.planar_flow(*random_problem((5,), 4, 3).inputs, **changes)


def test_slope_is_leaky_relus():
    p = random_problem((5,), 4, 3)
    vvae_fast.planar_flow(*p.inputs, slope=-1.0)


@pytest.mark.parametrize("changes", [{"activation": "elu"}, {"constraint": "log_softplus"}, {"log_det_eps": 1e-4}])
def test_every_backend_runs_every_formula(changes, monkeypatch):
    monkeypatch.setattr(cuda, "most_dim", {torch.float32: 1024})  # of the extension, where there is one
    p = random_problem((5,), 4, 3)
    packed = torch.cat([t.flatten() for t in p.inputs[1:]]).requires_grad_()
    problem = shapes.Problem(5, 3, 4, 1, False, torch.float32, "cuda", spec=FlowSpec(**changes))
    for inverse, name in itertools.product((False, True), ("triton", "cuda")):
        assert selection._BACKENDS[name].unsupported(problem._replace(inverse=inverse)) == []
    assert backends.select(problem._replace(device_type="cpu"), "auto").name == "cpp"
    wanted = vvae_fast.planar_flow(*p.inputs, backend="reference", **changes)
    torch.testing.assert_close(vvae_fast.planar_flow(*p.inputs, **changes), wanted)
    got = packed_planar_flow(p.z, packed, 4, 3, **changes)
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.grad(got[0].sum(), packed)[0].norm() > 0


OPTIONS = [
    {"activation": activation, "constraint": constraint, "slope": 0.4}
    for activation in ACTIVATIONS
    for constraint in CONSTRAINTS
]


def modules(options):
    torch.manual_seed(0)
    shared, amortized = PlanarFlow(3, 4, **options).double(), AmortizedPlanarFlow(3, 4, 5, **options).double()
    for flow, context in (shared, ()), (amortized, (torch.randn(7, 5, dtype=torch.float64),)):
        flow.reset_parameters()  # in float64
        yield flow, context


@pytest.mark.parametrize("options", OPTIONS)
def test_modules_start_as_the_identity_and_pass_the_options_on(options):
    for flow, context in modules(options):
        z = torch.randn(7, 3, dtype=torch.float64)
        z_K, log_det = flow(z, *context)
        torch.testing.assert_close(z_K, z, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-13)
        torch.testing.assert_close(flow.u_hat(*context), torch.zeros_like(flow.u_hat(*context)), rtol=0, atol=1e-14)
        gradients = torch.autograd.grad(z_K.square().sum() + log_det.sum(), list(flow.parameters()))
        assert sum(g.norm() for g in gradients) > 0
        with torch.no_grad():
            for t in flow.parameters():
                t.add_(torch.randn_like(t), alpha=0.3)
        params = flow.params(*context) if context else (flow.u, flow.w, flow.b)
        z_K, log_det = flow(z, *context)
        torch.testing.assert_close((z_K, log_det), vvae_fast.planar_flow(z, *params, **options))
        if options["constraint"] != "none":
            torch.testing.assert_close(flow.inverse(z_K, *context)[0], z)
        torch.testing.assert_close(copy.deepcopy(flow)(z, *context), (z_K, log_det))


def test_no_constraint_no_inverse_of_modules():
    for flow, context in modules({"constraint": "none"}):
        with pytest.raises(ValueError, match='constraint must be "softplus" or "log_softplus" to invert, got "none"'):
            flow.inverse(torch.zeros(7, 3, dtype=torch.float64), *context)


def test_repr_says_what_differs():
    assert repr(PlanarFlow(2, 3, slope=0.2)) == "PlanarFlow(dim=2, num_steps=3)"
    flow = PlanarFlow(2, 3, activation="leaky_relu", slope=0.1, constraint="none", backend="reference")
    options = "activation='leaky_relu', slope=0.1, constraint='none', backend='reference'"
    assert repr(flow) == f"PlanarFlow(dim=2, num_steps=3, {options})"
    amortized = repr(AmortizedPlanarFlow(2, 3, 4, activation="elu"))
    assert "dim=2, num_steps=3, context_dim=4, activation='elu'" in amortized


def test_options_are_not_state():
    keys = list(PlanarFlow(2, 3).state_dict())
    assert list(PlanarFlow(2, 3, activation="elu", constraint="none").state_dict()) == keys == ["u", "w", "b"]


@pytest.mark.parametrize("options", [{}, {"activation": "leaky_relu", "constraint": "log_softplus"}])
def test_trajectory_goes_through_the_steps(options):
    for flow, context in modules(options):
        with torch.no_grad():
            for t in flow.parameters():
                t.add_(torch.randn_like(t), alpha=0.3)
        z = torch.randn(2, 7, 3, dtype=torch.float64)
        points = flow.trajectory(z, *context)
        assert points.shape == (5, 2, 7, 3)
        torch.testing.assert_close(points[0], z)
        torch.testing.assert_close(points[-1], flow(z, *context)[0])
        u, w, b = flow.params(*context) if context else (flow.u, flow.w, flow.b)
        torch.testing.assert_close(
            flow.u_hat(*context), reference.constrain(u, w, options.get("constraint", "softplus")).u_hat
        )
        first = vvae_fast.planar_flow(z, u[..., :2, :], w[..., :2, :], b[..., :2], **options)[0]
        torch.testing.assert_close(points[2], first)
        points[-1].sum().backward()
        assert all(t.grad is not None for t in flow.parameters())
    assert PlanarFlow(3, 0).trajectory(torch.zeros(7, 3)).shape == (1, 7, 3)


def test_step_is_a_flow_of_one_step_in_the_same_memory():
    flow = PlanarFlow(3, 4, activation="elu", constraint="log_softplus", slope=0.1, backend="reference").eval()
    with torch.no_grad():
        flow.u.normal_()
    z = torch.randn(7, 3)
    random_state = torch.get_rng_state()
    steps = [flow.step(k) for k in range(4)]
    assert torch.equal(torch.get_rng_state(), random_state)
    log_det, points = 0, flow.trajectory(z)
    for k, step in enumerate(steps):
        assert repr(step) == repr(flow).replace("num_steps=4", "num_steps=1")
        assert not step.training
        z, one = step(z)
        log_det = log_det + one
        torch.testing.assert_close(z, points[k + 1])
    torch.testing.assert_close(log_det, flow(points[0])[1])
    assert torch.equal(flow.step(-1).w, flow.w[3:])
    with torch.no_grad():
        steps[1].u.add_(1)
    assert torch.equal(steps[1].u, flow.u[1:2])
    for k in (4, -5):
        with pytest.raises(IndexError, match=f"k must be a step of 4, got {k}"):
            flow.step(k)


def own_constraint(s, batch=(), dtype=torch.float64):
    """z, u, w and b of steps with w . u = s - 1 and large parts across w; s [*batch, K]."""
    g = torch.Generator().manual_seed(0)
    s = s.double()

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    z = torch.randn(*(batch or (6,)), 3, generator=g, dtype=torch.float64)
    across, w, b = normal(s.shape[-1], 3), normal(s.shape[-1], 3), normal(s.shape[-1])
    u = across + ((s - 1 - (w * across).sum(-1)) / w.square().sum(-1))[..., None] * w
    return tuple(t.to(dtype) for t in (z, u, w, b))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("activation", ["tanh", "elu", "leaky_relu"])
@pytest.mark.parametrize("batch", [(), (6,)])
def test_given_s_is_the_determinants(batch, activation, backend):
    s = torch.randn(*batch, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(2).exp()
    z, *params = own_constraint(s, batch)
    options = {"activation": activation, "backend": backend}
    z_K, log_det = given_planar_flow(z, *params, s, **options)
    wanted = vvae_fast.planar_flow(z, *params, constraint="none", activation=activation, backend="reference")
    torch.testing.assert_close((z_K, log_det), wanted, rtol=1e-10, atol=1e-10)
    back, log_det_back = given_planar_flow(z_K, *params, s, inverse=True, **options)
    torch.testing.assert_close((back, log_det_back), (z, -log_det), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("batch", [(), (6,)])
@pytest.mark.parametrize("s", [1e-1, 1e-3, 1e-5, 1e-7])
def test_given_s_keeps_its_digits_near_zero(s, batch, backend):
    """Where tanh is steepest, in float32. 1 + w . u has none of them left where s = 1e-7."""
    near = torch.full((*batch, 1), s)
    z, u, w, b = (t.float() for t in own_constraint(near, batch))
    z, b = torch.zeros_like(z), torch.zeros_like(b)
    for inverse in (False, True):
        z_out, log_det = given_planar_flow(z, u, w, b, near, backend=backend, inverse=inverse)
        torch.testing.assert_close(log_det, (-1 if inverse else 1) * torch.full((6,), math.log(s)))
        assert not z_out.any()
    leaning = given_planar_flow(z + 0.1, u, w, b, near, backend=backend)
    exact = own_constraint(near, batch)[1:3]
    wanted = vvae_fast.planar_flow(z.double() + 0.1, *exact, b.double(), constraint="none", backend="reference")
    torch.testing.assert_close(leaning[0].double(), wanted[0], rtol=1e-5, atol=1e-5)


def test_gradients_of_a_given_s():
    """Layers of one unit: u = r q and w = r~ q, whose s = 1 + r r~ is known without a dot product."""
    g = torch.Generator().manual_seed(0)
    z, q = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, 3), (4, 3)))
    q = q / q.norm(dim=-1, keepdim=True)
    r, r_tilde = (torch.tanh(torch.randn(4, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(2))
    b = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    inputs = z.requires_grad_(), r, r_tilde, b

    def planar(z, r, r_tilde, b, inverse=False):
        return given_planar_flow(z, r[:, None] * q, r_tilde[:, None] * q, b, 1 + r * r_tilde, inverse=inverse)

    layers = q[..., None], r[:, None, None], r_tilde[:, None, None], b[:, None]
    for planar_way, sylvester in (
        (planar, vvae_fast.sylvester_flow),
        (functools.partial(planar, inverse=True), vvae_fast.sylvester_flow_inverse),
    ):
        out, wanted = planar_way(*inputs), sylvester(z, *layers)
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in out]
        gradients = torch.autograd.grad(out, inputs, weights), torch.autograd.grad(wanted, inputs, weights)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
        assert torch.autograd.gradcheck(planar_way, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(planar_way, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_given_s_in_half_precision_is_computed_in_float32(dtype):
    s = torch.tensor([2.0**-7, 0.5, 3.0])
    half = own_constraint(s, dtype=dtype)
    z_K, log_det = given_planar_flow(*half, s.to(dtype))
    whole = given_planar_flow(*(t.float() for t in half), s)
    assert z_K.dtype is dtype
    assert log_det.dtype is torch.float32
    torch.testing.assert_close((z_K.float(), log_det), (whole[0].to(dtype).float(), whole[1]))


def test_given_s_that_does_not_fit():
    p = random_problem((6,), 4, 3).inputs
    s = torch.ones(4)
    for inverse in (False, True):
        flow = functools.partial(given_planar_flow, inverse=inverse)
        with pytest.raises(ValueError, match=r"s must have b's shape \(4,\), got \(3,\)"):
            flow(*p, s[:3])
        with pytest.raises(TypeError, match=r"s must be a torch\.Tensor, got float"):
            flow(*p, 1.0)
        with pytest.raises(TypeError, match=r"z, u, w, b and s must share one dtype .* s torch\.float64"):
            flow(*p, s.double())
        with pytest.raises(ValueError, match="z must have shape"):
            flow(p[0][0, 0], *p[1:], s)
    with pytest.raises(ValueError, match="slope must be at most 1 to invert"):
        given_planar_flow(*p, s, activation="leaky_relu", slope=2, inverse=True)
    for bad in (0.0, -1.0, float("nan")):
        z_K, log_det = given_planar_flow(*p, torch.tensor([1.0, bad, 1.0, 1.0]))
        assert z_K.isnan().all()
        assert log_det.isnan().all()
    still = p[0], p[1], torch.zeros_like(p[2]), p[3]  # w = 0: a shift, whatever s
    z_K, log_det = given_planar_flow(*still, 2 * s)
    torch.testing.assert_close(z_K, p[0] + (torch.tanh(p[3])[:, None] * p[1]).sum(0))
    assert not log_det.any()
