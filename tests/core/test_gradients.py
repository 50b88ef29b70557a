"""Outputs depend on every argument, on every backend: a gradient that is zero everywhere is zeros and not None."""

import itertools

import pytest
import torch

from vvae_fast import AmortizedPlanarFlow, PlanarFlow, planar_flow, planar_flow_inverse, shapes
from vvae_fast.backends import reference as reference_backend
from vvae_fast.functional import packed_planar_flow
from vvae_fast.spec import ACTIVATIONS

BACKENDS = ("cpp", "reference", "triton")
D = 3
each_backend = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", ["shared", "amortized", "packed", "inverse", "amortized inverse"])
WANTED = [
    subset for n in range(1, 5) for subset in itertools.combinations("zuwb", n)
]  # every choice of what requires a gradient


@pytest.fixture(autouse=True)
def _skip_without(request):
    import vvae_fast

    backend = request.node.callspec.params.get("backend")
    state = vvae_fast.info()["backends"][backend]
    if not state["available"] or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip(f"{backend} does not run on CPU tensors here: {'; '.join(state['reasons'])}")


def problem(kind, num_steps, rows, dtype=torch.float32, wanted="zuwb"):
    """z, u, w, b, of which `wanted` require a gradient."""
    params = (rows,) if "amortized" in kind or kind == "packed" else ()
    shapes_of = {"z": (rows, D), "u": (*params, num_steps, D), "w": (*params, num_steps, D), "b": (*params, num_steps)}
    return {n: torch.randn(s, dtype=dtype).requires_grad_(n in wanted) for n, s in shapes_of.items()}


def run(kind, p, **options):
    if kind == "packed":
        packed = torch.cat([p["u"].flatten(-2), p["w"].flatten(-2), p["b"]], -1)
        return packed_planar_flow(p["z"], packed, p["b"].shape[-1], D, **options)
    return (planar_flow_inverse if "inverse" in kind else planar_flow)(*p.values(), **options)


@kinds
@each_backend
@pytest.mark.parametrize("rows", [5, 0])
def test_no_steps(kind, backend, rows):
    """z_K = z and log_det = 0; the derivatives are the identity and zeros, whatever is asked for."""
    for wanted in WANTED:
        p = problem(kind, 0, rows, wanted=wanted)
        z_K, log_det = run(kind, p, backend=backend)
        assert torch.equal(z_K, p["z"])
        assert torch.equal(log_det, torch.zeros(rows))
        assert z_K.requires_grad
        assert log_det.requires_grad
        for output in (z_K, log_det, z_K + log_det[:, None]):
            weight = torch.randn_like(output)
            grads = torch.autograd.grad(output, [p[n] for n in wanted], weight, retain_graph=True)
            for n, grad in zip(wanted, grads, strict=True):
                through = n == "z" and output is not log_det
                assert torch.equal(grad, weight if through else torch.zeros_like(p[n])), (wanted, n)


@kinds
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_no_steps_run_on_the_backend_that_was_asked_for(kind, backend, monkeypatch):
    monkeypatch.setattr(reference_backend, "planar_forward", None)
    run(kind, problem(kind, 0, 5), backend=backend)


@kinds
@each_backend
def test_no_steps_without_gradients(kind, backend):
    """A new tensor, as of any other number of steps: one may write into it."""
    p = problem(kind, 0, 5)
    with torch.no_grad():
        z_K, log_det = run(kind, p, backend=backend)
        assert not z_K.requires_grad
        assert not log_det.requires_grad
        assert z_K.data_ptr() != p["z"].data_ptr()
        assert torch.equal(z_K, p["z"])


@pytest.mark.one_in(3)
@kinds
@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("output", [0, 1], ids=["z_K", "log_det"])
def test_one_output_has_a_gradient_for_every_argument(kind, backend, activation, output):
    """log_det of linear steps, say, depends on neither z nor b."""
    p = problem(kind, 2, 4)
    grads = torch.autograd.grad(run(kind, p, backend=backend, activation=activation)[output].sum(), list(p.values()))
    for n in p:
        alone = {m: t.detach().requires_grad_(m == n) for m, t in p.items()}
        out = run(kind, alone, backend=backend, activation=activation)
        assert out[0].requires_grad
        assert out[1].requires_grad
        (grad,) = torch.autograd.grad(out[output].sum(), [alone[n]])
        torch.testing.assert_close(grad, grads[list(p).index(n)])


@kinds
@each_backend
@pytest.mark.parametrize("num_steps", [0, 3])
def test_no_rows(kind, backend, num_steps):
    p = problem(kind, num_steps, 0)
    z_K, log_det = run(kind, p, backend=backend)
    assert (z_K.shape, log_det.shape) == ((0, D), (0,))
    grads = torch.autograd.grad(z_K.sum() + log_det.sum(), list(p.values()))
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, p.values(), strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_steps_in_other_dtypes(backend, kind, dtype):
    p = problem(kind, 0, 4, dtype)
    z_K, log_det = run(kind, p, backend=backend)
    assert torch.equal(z_K, p["z"])
    assert (z_K.dtype, log_det.dtype) == (dtype, shapes.compute_dtype(dtype))
    assert [g.dtype for g in torch.autograd.grad(log_det.sum() + z_K.sum(), list(p.values()))] == [dtype] * 4


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@kinds
def test_no_steps_twice(backend, kind):
    p = problem(kind, 0, 4, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda *t: run(kind, dict(zip(p, t, strict=True)), backend=backend), list(p.values())
    )


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_special_values_pass_through_no_steps(backend):
    special = torch.tensor([[0.0, -0.0, torch.inf], [-torch.inf, torch.nan, 1e-45]])
    p = problem("shared", 0, 2)
    z_K, _ = planar_flow(special.requires_grad_(), p["u"], p["w"], p["b"], backend=backend)
    assert torch.equal(z_K.detach().view(torch.int32), special.detach().view(torch.int32))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("amortized", [False, True])
def test_modules_without_steps(backend, amortized):
    """Every parameter has a gradient, which an optimizer and DistributedDataParallel ask for."""
    flow = AmortizedPlanarFlow(D, 0, 4, backend=backend) if amortized else PlanarFlow(D, 0, backend=backend)
    inputs = (torch.randn(5, D), *((torch.randn(5, 4),) if amortized else ()))
    for call in (flow, flow.inverse):
        flow.zero_grad()
        z_K, log_det = call(*inputs)
        (z_K.sum() + log_det.sum()).backward()
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in flow.parameters())
