"""What PyTorch does to the modules, to the inverse and to every activation: transforms, compilation, precision, copies.

test_autograd.py has the same of the functional flow with tanh, test_fused_inverse.py of its inverse.
"""

import copy
import io
import pickle

import pytest
import torch
from problems import random_problem
from test_modules import away_from_identity, both
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import vvae_fast
from vvae_fast import AmortizedPlanarFlow, PlanarFlow, planar_flow, planar_flow_inverse
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS

SLOPE = 0.3
DTYPES = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32)  # of z, u, w, b under autocast
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
ways = pytest.mark.parametrize("way", ["forward", "inverse"])
compiled_activations = pytest.mark.parametrize("activation", ["tanh", "elu"])  # a compile takes seconds


class Way(nn.Module):
    """A flow's forward map, or its inverse as the forward of a module."""

    def __init__(self, flow, way):
        super().__init__()
        self.flow, self.way = flow, way

    def forward(self, *inputs):
        return self.flow(*inputs) if self.way == "forward" else self.flow.inverse(*inputs)


def make(amortized, way="forward", activation="tanh", dtype=torch.float32, num_steps=2, **options):
    options = {"activation": activation, "slope": SLOPE, **options}
    flow = AmortizedPlanarFlow(3, num_steps, 4, **options) if amortized else PlanarFlow(3, num_steps, **options)
    return Way(away_from_identity(flow).to(dtype), way)


def inputs_of(amortized, rows, dtype=torch.float32, grad=False):
    sizes = (3, 4) if amortized else (3,)
    return tuple(torch.randn(rows, size, dtype=dtype, requires_grad=grad) for size in sizes)


def gradients(outputs, tensors):
    """Of a loss that needs both outputs."""
    return torch.autograd.grad(outputs[0].sin().sum() + outputs[1].square().sum(), tensors)


@pytest.fixture
def fresh_compiler():
    """Way.forward is one function, of which torch.compile keeps few versions."""
    torch.compiler.reset()


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("fresh_compiler")
@both
@ways
@compiled_activations
def test_compile_is_one_graph_for_every_batch(amortized, way, activation):
    """Values and gradients, and not a graph for each size."""
    module, graphs, counts = make(amortized, way, activation), [], []

    def counting(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counting)
    for rows in (5, 9, 17):  # no other size: equal ones count as one
        inputs = inputs_of(amortized, rows, grad=True)
        tensors = [*inputs, *module.parameters()]
        got, wanted = compiled(*inputs), module(*inputs)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(gradients(got, tensors), gradients(wanted, tensors))
        counts.append(len(graphs))
    assert counts[0] == counts[-1] > 0  # the first may take two: PyTorch starts again where a float is no number yet


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_compiles_an_inverse():
    module, inputs = make(True, "inverse"), inputs_of(True, 6)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(*inputs), module(*inputs))


@pytest.mark.usefixtures("fresh_compiler")
@both
def test_trajectory_and_u_hat_compile(amortized):
    class View(nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, *inputs):
            return self.flow.trajectory(*inputs), self.flow.u_hat(*inputs[1:])

    view, inputs = View(make(amortized).flow), inputs_of(amortized, 6)
    torch.testing.assert_close(torch.compile(view, fullgraph=True, backend="aot_eager")(*inputs), view(*inputs))


@both
@ways
@compiled_activations
def test_export_save_and_load(amortized, way, activation):
    """With the kernels inside, for any batch: none, one, more than at export."""
    module, inputs = make(amortized, way, activation), inputs_of(amortized, 6)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
    assert f"planar_{way}" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (6, 11, 1, 0):
        inputs = inputs_of(amortized, rows)
        torch.testing.assert_close(loaded(*inputs), module(*inputs))


@both
@ways
@each_activation
def test_an_ensemble_by_vmap(amortized, way, activation):
    """Parameters of several flows at once."""
    modules, inputs = [make(amortized, way, activation) for _ in range(3)], inputs_of(amortized, 5)
    params, _ = stack_module_state(modules)
    got = vmap(lambda p: functional_call(modules[0], p, inputs))(params)
    for i, module in enumerate(modules):
        torch.testing.assert_close((got[0][i], got[1][i]), module(*inputs))


@both
@ways
@each_activation
def test_gradients_of_a_module_row_by_row(amortized, way, activation):
    module, inputs = make(amortized, way, activation, torch.float64), inputs_of(amortized, 5, torch.float64)

    def loss(params, *row):
        z, log_det = functional_call(module, params, row)
        return z.sin().sum() + log_det.square().sum()

    params = dict(module.named_parameters())
    rows = vmap(grad(loss), in_dims=(None, *(0 for _ in inputs)))(params, *inputs)
    wanted = gradients(module(*inputs), list(params.values()))
    torch.testing.assert_close(tuple(g.sum(0) for g in rows.values()), wanted)


@both
@ways
@each_activation
def test_forward_mode_of_a_module(amortized, way, activation):
    module, inputs = make(amortized, way, activation, torch.float64), inputs_of(amortized, 5, torch.float64)
    params = {name: p.detach() for name, p in module.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    outputs, derivatives = jvp(lambda p: functional_call(module, p, inputs), (params,), (tangents,))
    torch.testing.assert_close(outputs, module(*inputs))
    weights = tuple(torch.randn_like(t) for t in outputs)
    got = sum((w * d).sum() for w, d in zip(weights, derivatives, strict=True))
    reverse = torch.autograd.grad(module(*inputs), list(module.parameters()), weights)
    torch.testing.assert_close(got, sum((g * t).sum() for g, t in zip(reverse, tangents.values(), strict=True)))


@each_activation
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_flow_under_transforms(activation, constraint):
    """As tests/core/test_inverse.py has it of the inverse."""
    p = random_problem((4,), 2, 3, dtype=torch.float64)

    def flow(z):
        return planar_flow(z, *p.inputs[1:], activation=activation, constraint=constraint, slope=SLOPE)

    z_K, log_det = flow(p.z)
    torch.testing.assert_close(vmap(flow)(p.z), (z_K, log_det))
    for jacobian in (jacrev, jacfwd):
        jacobians = vmap(jacobian(lambda z: flow(z)[0]))(p.z)
        torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, log_det)
    forward = hessian(lambda z: flow(z)[1].sum())(p.z)
    torch.testing.assert_close(forward, jacrev(jacrev(lambda z: flow(z)[1].sum()))(p.z))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("params", [(), (3,)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@each_activation
def test_derivatives_to_second_order(activation, constraint, params):
    """Of the public functions, on the backend that they choose."""
    p = random_problem((3,), 2, 2, params, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in p.inputs]
    options = {"activation": activation, "constraint": constraint, "slope": SLOPE}

    def flow(*tensors):
        return planar_flow(*tensors, **options, log_det_eps=1e-2 * (constraint == "none"))

    def inverse(*tensors):
        return planar_flow_inverse(*tensors, **options)

    for function in (flow, inverse)[: 1 if constraint == "none" else 2]:
        assert gradcheck(function, inputs, fast_mode=True)
        assert gradgradcheck(function, inputs, fast_mode=True)
        first, differentiable = (
            torch.autograd.grad(function(*inputs), inputs, (p.grad_z, p.grad_log_det), create_graph=graph)
            for graph in (False, True)
        )
        torch.testing.assert_close(differentiable, first)  # gradgradcheck alone would pass over a factor


@each_activation
@pytest.mark.parametrize("function", [planar_flow, planar_flow_inverse])
def test_autocast_mixes_dtypes(function, activation):
    """Computed in float32, and gradients in each tensor's own dtype."""
    p = random_problem((6,), 3, 4)
    inputs = z, u, w, b = [t.to(d).requires_grad_() for t, d in zip(p.inputs, DTYPES, strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_K, log_det = function(*inputs, activation=activation)
    assert (z_K.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)
    wanted = function(z.float(), u, w.float(), b, activation=activation)
    assert torch.equal(z_K, wanted[0].bfloat16())
    assert torch.equal(log_det, wanted[1])
    got = torch.autograd.grad((z_K, log_det), inputs, (p.grad_z.bfloat16(), p.grad_log_det))
    exact = torch.autograd.grad(wanted, inputs, (p.grad_z.bfloat16().float(), p.grad_log_det))
    assert [g.dtype for g in got] == list(DTYPES)
    assert all(torch.equal(x, y) for x, y in zip(got, exact, strict=True))


@ways
def test_autocast_of_an_amortized_module(way):
    """The head's product is bfloat16, the flow float32, and the parameters' gradients are those of float32 masters."""
    module, (z, context) = make(True, way), inputs_of(True, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params = module.flow.params(context)
        got = module(z, context)
    assert {t.dtype for t in params} == {torch.bfloat16}
    function = planar_flow if way == "forward" else planar_flow_inverse
    wanted = function(z, *(t.float() for t in params), slope=SLOPE)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    grads = gradients(got, list(module.parameters()))
    assert {t.dtype for t in grads} == {torch.float32}
    exact = gradients(module(z, context), list(module.parameters()))
    for x, y in zip(grads, exact, strict=True):
        assert (x - y).norm() < 0.02 * y.norm()


@both
def test_a_grad_scalers_step_is_the_plain_one(amortized):
    """And a step whose gradients overflow is none."""
    module, inputs = make(amortized), inputs_of(amortized, 6)
    plain = copy.deepcopy(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for m, scale in ((module, scaler.scale), (plain, lambda loss: loss)):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        z_K, log_det = m(*inputs)
        scale((z_K.square().sum(-1) - log_det).mean()).backward()
        if m is module:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    for x, y in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)

    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler.scale(module(*inputs)[0].mul(1e38).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


@both
@ways
@each_activation
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_the_same(amortized, way, activation, use_reentrant):
    module, inputs = make(amortized, way, activation), inputs_of(amortized, 6, grad=True)
    tensors = [*inputs, *module.parameters()]

    def gradients_after(run):
        for t in tensors:
            t.grad = None
        z, log_det = run()
        (z.sin().sum() + log_det.square().sum()).backward()  # reentrant checkpoints know no autograd.grad
        return [t.grad for t in tensors]

    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))  # the second call ends when all is recomputed
    got = gradients_after(lambda: checkpoint(module, *inputs, use_reentrant=use_reentrant))
    assert len(calls) == 2
    for x, y in zip(got, gradients_after(lambda: module(*inputs)), strict=True):
        assert torch.equal(x, y)


@both
def test_copies_keep_the_options(amortized):
    options = {"activation": "leaky_relu", "constraint": "log_softplus", "slope": SLOPE}
    flow, inputs = make(amortized, **options).flow, inputs_of(amortized, 5)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    copies = copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), torch.load(file, weights_only=False)
    for other in copies:
        assert repr(other) == repr(flow)
        for way in ("forward", "inverse"):
            for x, y in zip(Way(other, way)(*inputs), Way(flow, way)(*inputs), strict=True):
                assert torch.equal(x, y)
        away_from_identity(other)
        assert not torch.equal(other(*inputs)[0], flow(*inputs)[0])


def test_a_copied_step_leaves_the_flow():
    flow = make(False).flow
    step = copy.deepcopy(flow.step(1))
    away_from_identity(step)
    assert not torch.equal(step.u, flow.u[1:])


# What modules saved before they had activation, slope and constraint, and what they computed at `OLD_INPUTS`.
OLD_SHARED = {
    "u": [[0.5, -1.25], [-2.0, 0.75], [1.5, 0.25]],
    "w": [[1.0, 0.5], [-0.25, 2.0], [0.75, -1.5]],
    "b": [0.125, -0.5, 1.0],
}
OLD_AMORTIZED = {
    "head.weight": [[0.5, -0.25], [1.0, 0.75], [-0.5, 0.25], [0.25, 1.5], [-1.0, 0.5]],
    "head.bias": [0.25, -0.5, 1.0, 0.5, -0.125],
}
OLD_INPUTS = torch.tensor([[0.0, 0.0], [1.5, -0.5]]), torch.tensor([[1.0, -0.5], [0.25, 2.0]])
OLD = [
    pytest.param(
        False,
        OLD_SHARED,
        ([[2.6997323, 0.1830117], [5.0513663, -1.4281560]], [0.0196670, -0.0858358]),
        ([[-1.6123235, -1.5757673], [-1.3317765, -2.0926795]], [-0.6677098, -0.1319366]),
        id="shared",
    ),
    pytest.param(
        True,
        OLD_AMORTIZED,
        ([[0.3035801, -0.1099783], [1.3431870, 0.2258353]], [-0.0296660, 0.9516780]),
        ([[-0.3118103, 0.1129599], [1.5458368, -0.7121632]], [0.0240118, -1.4229421]),
        id="amortized",
    ),
]


@pytest.mark.parametrize(("amortized", "state", "forward", "inverse"), OLD)
def test_state_dicts_of_older_versions(amortized, state, forward, inverse):
    flow = AmortizedPlanarFlow(2, 1, 2) if amortized else PlanarFlow(2, 3)
    state = {name: torch.tensor(value) for name, value in state.items()}
    assert list(flow.state_dict()) == list(state)
    flow.load_state_dict(state)
    inputs = OLD_INPUTS[: 1 + amortized]
    for got, wanted in ((flow(*inputs), forward), (flow.inverse(*inputs), inverse)):
        torch.testing.assert_close(got, tuple(torch.tensor(t) for t in wanted), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("make_flow", [None, PlanarFlow, AmortizedPlanarFlow])
def test_a_vaes_step_compiles(make_flow):
    sizes = {None: (), PlanarFlow: (2, 4), AmortizedPlanarFlow: (2, 4, 6)}[make_flow]
    flow = make_flow and away_from_identity(make_flow(*sizes))
    encoder, decoder = vvae_fast.nn.mlp_encoder(5, 6), vvae_fast.nn.mlp_decoder(2, 6, 5)
    model = vvae_fast.VAE(encoder, decoder, latent_dim=2, flow=flow)
    x = torch.bernoulli(torch.full((7, 5), 0.4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in (model, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        step(x).neg_elbo.mean().backward()
        if step is model:
            wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name])
