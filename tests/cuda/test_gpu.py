"""What only a GPU has: streams, devices, graphs, launches, inductor's kernels around the flow's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Problem, random_problem, run
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import vvae_fast
from vvae_fast import backends, shapes
from vvae_fast.backends import _measured, gpu_choice
from vvae_fast.spec import FlowSpec

pytestmark = pytest.mark.gpu
PARAMS = pytest.mark.parametrize("params", [(), (64,)], ids=["shared", "amortized"])


def problem(params=(), rows=64, num_steps=8, seed=0) -> Problem:
    return random_problem((rows,), num_steps, 6, params, scale=0.5, seed=seed).to("cuda")


def leaves_of(p: Problem) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in p.inputs]


def assert_same_bits(got, wanted) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


def kernels_of(call) -> list[str]:
    """The names of the kernels that a call, not its first, runs on the device; copies and fills by the driver aside."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


@pytest.fixture
def prefer(monkeypatch):
    """Makes a backend the faster one of all measurements."""

    def everywhere(backend: str) -> None:
        monkeypatch.setattr(_measured, "FASTER", {(kind, 8, 8): {1024: backend} for kind in ("shared", "amortized")})
        gpu_choice.nearest.cache_clear()

    yield everywhere
    gpu_choice.nearest.cache_clear()


@PARAMS
def test_auto_takes_what_was_measured_as_faster(gpu_backend, params, prefer):
    prefer(gpu_backend)
    p = problem(params)
    assert backends.select(shapes.check(*p.inputs, FlowSpec()), None).name == gpu_backend
    assert_same_bits(run(p), run(p, backend=gpu_backend))


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1024), (torch.bfloat16, 1024), (torch.float16, 1024), (torch.float64, 512)]
)
@pytest.mark.usefixtures("set_cuda_form")
def test_rows_wider_than_the_cuda_kernels_take(dtype, most, prefer):
    """Refused by name; "auto" takes Triton's kernels, whatever was measured."""
    prefer("cuda")
    fits, wider = (random_problem((5,), 2, dim).to(dtype).to("cuda").inputs for dim in (most, most + 1))
    assert backends.select(shapes.check(*fits, FlowSpec()), None).name == "cuda"
    assert vvae_fast.planar_flow(*fits, backend="cuda")[0].isfinite().all()
    with pytest.raises(RuntimeError, match=f"'cuda' was asked for and cannot run: .* D up to {most}, got {most + 1}"):
        vvae_fast.planar_flow(*wider, backend="cuda")
    assert backends.select(shapes.check(*wider, FlowSpec()), None).name == "triton"
    assert vvae_fast.planar_flow(*wider)[0].isfinite().all()


AFTER_A_FAULT = """
import os, torch, vvae_fast
z, u, b = (torch.zeros(*size, device="cuda") for size in ((4, 3), (2, 3), (2,)))
outputs = vvae_fast.planar_flow(z, u, u, b, backend="cuda")
del outputs  # their memory serves the next call, which then has nothing to ask of the driver before it launches
try:
    z[torch.tensor([9], device="cuda")]
    torch.cuda.synchronize()
except RuntimeError:
    try:
        vvae_fast.planar_flow(z, u, u, b, backend="cuda")
    except RuntimeError as error:
        print("error:", error, flush=True)
os._exit(0)
"""


@pytest.mark.usefixtures("set_cuda_form")
def test_a_launch_that_fails_names_the_kernel():
    """On a device that a kernel before has broken: in a process of its own."""
    command, folder = [sys.executable, "-c", AFTER_A_FAULT], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert "error: vvae_fast: the kernel shared_forward_kernel could not be launched: " in done.stdout, done


@PARAMS
def test_runs_on_the_current_stream(gpu_backend, params):
    """Forward and backward wait for inputs that their stream writes late; on another stream they would see NaN."""
    p = problem(params)
    wanted = run(p, backend=gpu_backend)
    leaves = [torch.full_like(t, float("nan")).requires_grad_() for t in p.inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles: about 50 ms
        with torch.no_grad():
            for leaf, value in zip(leaves, p.inputs, strict=True):
                leaf.copy_(value)
        outputs = vvae_fast.planar_flow(*leaves, backend=gpu_backend)
        grads = torch.autograd.grad(outputs, leaves, (p.grad_z, p.grad_log_det))
    stream.synchronize()
    assert_same_bits((*outputs, *grads), wanted)


@PARAMS
def test_runs_on_the_tensors_device(gpu_backend, params):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    p = problem(params)
    got = run(p.to("cuda:1"), backend=gpu_backend)
    assert {t.device.index for t in got} == {1}
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.to("cuda:0") for t in got], run(p, backend=gpu_backend))


@PARAMS
def test_graph_of_forward_and_backward(gpu_backend, params):
    """Captured once, replayed with other numbers copied in: the bits of the calls that it stands for."""
    static = problem(params)
    leaves, grads = leaves_of(static), (static.grad_z, static.grad_log_det)

    def call():
        outputs = vvae_fast.planar_flow(*leaves, backend=gpu_backend)
        return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2):
        fresh = problem(params, seed=seed)
        with torch.no_grad():
            for at, value in zip((*leaves, *grads), fresh, strict=True):
                at.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, run(fresh, backend=gpu_backend))


@PARAMS
def test_compile_fullgraph(gpu_backend, params):
    p = problem(params)
    leaves = leaves_of(p)

    def loss(*tensors):
        z_K, log_det = vvae_fast.planar_flow(*tensors, backend=gpu_backend)
        return (z_K * p.grad_z).sum() + (log_det * p.grad_log_det).sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_compile_with_dynamic_batch(gpu_backend, prefer):
    """The choice of the backend is compiled too."""
    prefer(gpu_backend)
    compiled = torch.compile(vvae_fast.planar_flow, fullgraph=True, dynamic=True)
    for rows in (4, 9, 170):
        p = problem(rows=rows)
        leaves = leaves_of(p)
        outputs = compiled(*leaves)
        grads = torch.autograd.grad(outputs, leaves, (p.grad_z, p.grad_log_det))
        for x, y in zip((*outputs, *grads), run(p, backend=gpu_backend), strict=True):
            torch.testing.assert_close(x, y)


@PARAMS
@pytest.mark.parametrize(("empty", "num_steps"), [(True, 3), (False, 0)], ids=["no rows", "no steps"])
def test_nothing_to_do_launches_no_kernel_of_ours(gpu_backend, params, empty, num_steps):
    rows = 0 if empty else 64
    p = problem((rows,) if params else (), rows, num_steps)
    assert [name for name in kernels_of(lambda: run(p, backend=gpu_backend)) if "at::" not in name] == []


@pytest.mark.parametrize(
    ("rows", "dim", "params"), [(64, 6, (64,)), (5000, 6, ()), (2048, 64, ()), (2048, 100, ())], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_pass(rows, dim, params, dtype):
    """Both forms of the Triton backend: one for the forward, at most three for the backward, nothing of PyTorch's."""
    forward, backward = kernels_of_passes(random_problem((rows,), 8, dim, params, scale=0.5).to(dtype), "triton")
    assert len(forward) == 1, forward
    assert 1 <= len(backward) <= 3, backward


def kernels_of_passes(p: Problem, backend: str) -> tuple[list[str], list[str]]:
    p = p.to("cuda")
    leaves, grads = leaves_of(p), (p.grad_z, p.grad_log_det.to(shapes.compute_dtype(p.z.dtype)))
    outputs = vvae_fast.planar_flow(*leaves, backend=backend)
    forward = kernels_of(lambda: vvae_fast.planar_flow(*leaves, backend=backend))
    return forward, kernels_of(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True))  # run twice


@pytest.mark.parametrize(
    ("batch", "dim", "num_steps", "params", "form", "most"),
    [
        ((128,), 40, 80, (), "automatic", 2),
        ((5000,), 6, 8, (), "automatic", 2),
        ((2048,), 512, 64, (), "direct", 2),
        ((2048,), 512, 64, (), "compact", 3),
        ((2048,), 100, 8, (), "automatic", 3),
        ((40, 5), 100, 8, (5,), "compact", 3),
        ((40, 5), 40, 8, (5,), "direct", 2),
        ((64,), 6, 8, (64,), "automatic", 1),
        ((3, 64), 6, 8, (64,), "automatic", 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_kernels_of_a_pass(batch, dim, num_steps, params, form, most, dtype, set_cuda_form):
    """One for the forward; for the backward one, with sums over rows two, in the compact form at most three."""
    set_cuda_form(form)
    forward, backward = kernels_of_passes(random_problem(batch, num_steps, dim, params, scale=0.5).to(dtype), "cuda")
    assert len(forward) == 1, forward
    assert 1 <= len(backward) <= most, backward
    assert all("vvae::cuda::" in name for name in forward + backward), forward + backward
