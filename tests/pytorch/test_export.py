"""What leaves the process: traces and ONNX by the reference, torch.export with or without kernels; docs/export.md."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from test_composition import Way, gradients, inputs_of, make
from test_modules import both
from torch import nn

import vvae_fast
from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn import Binomial, Gaussian, mlp_decoder, mlp_encoder
from vvae_fast.spec import ACTIVATIONS

ways = pytest.mark.parametrize("way", ["forward", "inverse"])
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
DATA, LATENT, HIDDEN = 8, 3, 5
FLOWS = {
    "none": lambda: None,
    "shared": lambda: PlanarFlow(LATENT, 2),
    "amortized": lambda: AmortizedPlanarFlow(LATENT, 2, HIDDEN),
}


def longer(inputs):
    """More rows than were traced, and other numbers."""
    return tuple(torch.cat([t, t + 0.5, t]).detach().requires_grad_(t.requires_grad) for t in inputs)


def saved_and_loaded(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.one_in(2)
@both
@ways
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_trace_has_the_values_and_gradients(amortized, way, activation):
    """Of another batch than the traced one, after saving; and no warning is made."""
    module, inputs = make(amortized, way, activation, torch.float64), inputs_of(amortized, 6, torch.float64, grad=True)
    traced = torch.jit.trace(module, inputs)
    assert "vvae_fast::" not in str(traced.inlined_graph)
    loaded, inputs = saved_and_loaded(traced), longer(inputs)
    got, wanted = loaded(*inputs), module(*inputs)
    torch.testing.assert_close(got, wanted)
    own = dict(loaded.named_parameters())
    got = gradients(got, [*inputs, *(own[name] for name, _ in module.named_parameters())])
    torch.testing.assert_close(got, gradients(wanted, [*inputs, *module.parameters()]))


@pytest.mark.parametrize(
    "activation", ["tanh", *(pytest.param(name, marks=pytest.mark.long) for name in ("sigmoid", "elu"))]
)
def test_a_trace_searches_as_long_as_other_inputs_need(activation):
    """The root of the traced inputs is found at once, those of others are not."""
    module = make(False, "inverse", activation, torch.float64)
    with torch.no_grad():
        module.flow.u.mul_(8.0)
        module.flow.w.mul_(4.0)
        module.flow.b.zero_()
        traced = torch.jit.trace(module, (torch.zeros(2, 3, dtype=torch.float64),))
        z = 20 * torch.randn(500, 3, dtype=torch.float64)
        torch.testing.assert_close(traced(z), module(z))


@both
@pytest.mark.parametrize("options", [{"num_steps": 0}, {"backend": "cpp"}, {"dtype": torch.bfloat16}], ids=str)
def test_a_trace_of_any_flow(amortized, options):
    """Without steps, of a backend asked for by name, in half precision; without gradients as with them."""
    dtype = options.get("dtype", torch.float32)
    module, inputs = make(amortized, **options), inputs_of(amortized, 6, dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(module, inputs)
            assert "vvae_fast::" not in str(traced.inlined_graph)
            tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(traced(*longer(inputs)), module(*longer(inputs)), **tolerance)


def test_checks_hold_while_tracing():
    with pytest.raises(ValueError, match=r"z must be \[\*batch, D\] with the flow's D = 3, got \(6, 4\)"):
        torch.jit.trace(PlanarFlow(3, 2), (torch.zeros(6, 4),))
    assert torch._C._get_tracing_state() is None


class Call(nn.Module):
    """A call of a VAE as the forward of a module."""

    def __init__(self, vae, call):
        super().__init__()
        self.vae, self.call = vae, call

    def forward(self, *inputs):
        return self.call(self.vae, *inputs)


def make_vae(flow, likelihood="bernoulli", num_params=1):
    torch.manual_seed(0)
    return VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, HIDDEN, num_params * DATA), LATENT, flow, likelihood)


def bits(rows=6):
    return torch.randint(0, 2, (rows, DATA)).float()


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("likelihood", [("bernoulli", 1), (Binomial(2), 1), (Gaussian(), 2)], ids=["b", "n", "g"])
def test_a_vae_is_traced(flow, likelihood):
    vae = make_vae(FLOWS[flow](), *likelihood)
    module, inputs = Call(vae, lambda v, x, noise: tuple(v(x, noise=noise))), (bits(), torch.randn(6, LATENT))
    traced = saved_and_loaded(torch.jit.trace(module, inputs))
    others = bits(9), torch.randn(9, LATENT)
    torch.testing.assert_close(traced(*others), module(*others))


def test_draws_of_a_vae_are_traced():
    vae = make_vae(FLOWS["amortized"]())
    calls = {
        lambda v, x: tuple(v(x)): (9,),
        lambda v, x: tuple(v.elbo_terms(x, 3)): (9,),
        lambda v, x: v.posterior_sample(x, 2).log_q: (2, 9),
        lambda v, x: v.reconstruct(x): (9, DATA),
        lambda v, x: v.sample(4): (4, DATA),
        lambda v, x: v.decode(v.encode(x).mean): (9, DATA),
    }
    for call, shape in calls.items():
        got = torch.jit.trace(Call(vae, call), (bits(),), check_trace=False)(bits(9))
        assert (got[0] if isinstance(got, tuple) else got).shape == shape


@pytest.mark.parametrize("flow", FLOWS)
def test_tensorboards_graph(flow, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    with tensorboard.SummaryWriter(tmp_path) as writer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # a VAE draws: two traces differ
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        writer.add_graph(make_vae(FLOWS[flow]()), bits())
        if flow == "shared":
            writer.add_graph(FLOWS[flow](), torch.randn(6, LATENT))
    assert any(path.stat().st_size > 1000 for path in tmp_path.iterdir())


def test_a_vae_is_exported_for_any_batch():
    for flow, make_flow in FLOWS.items():
        vae, batch = make_vae(make_flow()), torch.export.Dim("batch")
        program = torch.export.export(vae, (bits(),), dynamic_shapes=({0: batch},))
        assert ("planar_forward" in str(program.graph)) == (flow != "none")
        assert program.module()(bits(9))[0].shape == (9,)


@both
def test_half_precision_compiles(amortized):
    vae = make_vae(FLOWS["amortized" if amortized else "shared"]()).bfloat16()
    torch.compiler.reset()
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")
    noise = torch.randn(6, LATENT)
    x = bits().bfloat16()
    torch.testing.assert_close(compiled(x, noise=noise), vae(x, noise=noise), rtol=2e-2, atol=2e-2)


LOADS = """
import sys, torch

def load(path):
    print(torch.export.load(path).module()(torch.zeros(4, 3))[0].shape)

try:
    load(sys.argv[1])
except Exception as error:
    print("error when deserializing" in str(error))
load(sys.argv[2])
print("vvae_fast" in sys.modules)
import vvae_fast
load(sys.argv[1])
"""


def test_a_program_in_a_fresh_process(tmp_path):
    """As docs/export.md has it: with the kernels the package comes first, from the reference nothing has to."""
    flow, batch = PlanarFlow(3, 2), torch.export.Dim("batch")
    paths = [str(tmp_path / f"{backend}.pt2") for backend in ("cpp", "reference")]
    for path, backend in zip(paths, ("cpp", "reference"), strict=True):
        with vvae_fast.use_backend(backend):
            exported = torch.export.export(flow, (torch.zeros(6, 3),), dynamic_shapes=({0: batch},))
        torch.export.save(exported, path)
    command = [sys.executable, "-W", "ignore", "-c", LOADS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["True", "torch.Size([4, 3])", "False", "torch.Size([4, 3])"], done.stderr


def onnx_outputs(module, inputs, others, dynamo, path):
    """What an ONNX runtime makes of other inputs, with more rows."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    names = [f"input_{i}" for i in range(len(inputs))]
    batch = torch.export.Dim("batch")
    free = {"dynamic_shapes": (tuple({0: batch} for _ in inputs),)} if dynamo else {}
    if not dynamo:
        free = {"dynamic_axes": {name: {0: "batch"} for name in names}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.onnx.export(module, inputs, str(path), input_names=names, dynamo=dynamo, **free)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: t.detach().numpy() for i, t in zip(session.get_inputs(), others, strict=True)}
    return tuple(torch.from_numpy(t) for t in session.run(None, feed))


@both
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_onnx_takes_flows(amortized, dynamo, activation, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    for way in ("forward",) if dynamo else ("forward", "inverse"):  # the newer one takes minutes for an inverse
        module, inputs = make(amortized, way, activation), inputs_of(amortized, 6)
        got = onnx_outputs(module, inputs, longer(inputs), dynamo, tmp_path / "flow.onnx")
        torch.testing.assert_close(got, module(*longer(inputs)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_takes_a_vae(dynamo, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    module = Call(make_vae(FLOWS["amortized"]()), lambda v, x, noise: tuple(v(x, noise=noise)))
    inputs, others = (bits(), torch.randn(6, LATENT)), (bits(9), torch.randn(9, LATENT))
    got = onnx_outputs(module, inputs, others, dynamo, tmp_path / "vae.onnx")
    torch.testing.assert_close(got, module(*others), rtol=1e-4, atol=1e-5)


class ExportingOnnx:
    """What both exporters tell the modules, without the packages that they need."""

    def __enter__(self):
        from torch.onnx._internal.exporter import _flags

        self.flags = _flags
        _flags._is_onnx_exporting = True

    def __exit__(self, *exception):
        self.flags._is_onnx_exporting = False


@both
@ways
def test_what_is_exported_for_onnx_has_no_kernels(amortized, way):
    module, inputs = make(amortized, way, "leaky_relu"), inputs_of(amortized, 6)  # its root is closed: a short graph
    with ExportingOnnx():
        program = torch.export.export(module, inputs)
    assert "vvae_fast" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))
    assert f"planar_{way}" in str(torch.export.export(module, inputs).graph)


def test_shared_memory_and_copies_of_traces():
    flow = PlanarFlow(3, 2).share_memory()
    assert flow.u.is_shared()
    traced = torch.jit.trace(flow, (torch.zeros(2, 3),))
    assert torch.equal(copy.deepcopy(traced)(torch.ones(4, 3))[0], traced(torch.ones(4, 3))[0])
    assert Way(flow, "forward")(torch.ones(4, 3))[0].shape == (4, 3)
