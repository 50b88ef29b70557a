"""What only a GPU has: streams, devices, graphs, launches, inductor's kernels around the flow's."""

import pytest
import torch
from problems import Problem, random_problem, run
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import vvae_fast
from vvae_fast import backends, shapes

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


@PARAMS
def test_auto_takes_the_kernels(params):
    p = problem(params)
    assert backends.select(shapes.check(*p.inputs, "tanh", "softplus"), None) == "triton"
    assert_same_bits(run(p), run(p, backend="triton"))


@PARAMS
def test_runs_on_the_current_stream(params):
    """Forward and backward wait for inputs that their stream writes late; on another stream they would see NaN."""
    p = problem(params)
    wanted = run(p, backend="triton")
    leaves = [torch.full_like(t, float("nan")).requires_grad_() for t in p.inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles: about 50 ms
        with torch.no_grad():
            for leaf, value in zip(leaves, p.inputs, strict=True):
                leaf.copy_(value)
        outputs = vvae_fast.planar_flow(*leaves, backend="triton")
        grads = torch.autograd.grad(outputs, leaves, (p.grad_z, p.grad_log_det))
    stream.synchronize()
    assert_same_bits((*outputs, *grads), wanted)


@PARAMS
def test_runs_on_the_tensors_device(params):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    p = problem(params)
    got = run(p.to("cuda:1"), backend="triton")
    assert {t.device.index for t in got} == {1}
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.to("cuda:0") for t in got], run(p, backend="triton"))


@PARAMS
def test_graph_of_forward_and_backward(params):
    """Captured once, replayed with other numbers copied in: the bits of the calls that it stands for."""
    static = problem(params)
    leaves, grads = leaves_of(static), (static.grad_z, static.grad_log_det)

    def call():
        outputs = vvae_fast.planar_flow(*leaves, backend="triton")
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
        assert_same_bits(captured, run(fresh, backend="triton"))


@PARAMS
def test_compile_fullgraph(params):
    p = problem(params)
    leaves = leaves_of(p)

    def loss(*tensors):
        z_K, log_det = vvae_fast.planar_flow(*tensors)
        return (z_K * p.grad_z).sum() + (log_det * p.grad_log_det).sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for x, y in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_compile_with_dynamic_batch():
    compiled = torch.compile(vvae_fast.planar_flow, fullgraph=True, dynamic=True)
    for rows in (4, 9, 170):
        p = problem(rows=rows)
        leaves = leaves_of(p)
        outputs = compiled(*leaves)
        grads = torch.autograd.grad(outputs, leaves, (p.grad_z, p.grad_log_det))
        for x, y in zip((*outputs, *grads), run(p, backend="triton"), strict=True):
            torch.testing.assert_close(x, y)


@PARAMS
@pytest.mark.parametrize(("empty", "num_steps"), [(True, 3), (False, 0)], ids=["no rows", "no steps"])
def test_nothing_to_do_launches_no_kernel_of_ours(params, empty, num_steps):
    rows = 0 if empty else 64
    p = problem((rows,) if params else (), rows, num_steps)
    assert [name for name in kernels_of(lambda: run(p, backend="triton")) if "at::" not in name] == []


@pytest.mark.parametrize(
    ("rows", "dim", "params"), [(64, 6, (64,)), (5000, 6, ()), (2048, 64, ()), (2048, 100, ())], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_a_pass(rows, dim, params, dtype):
    """Both forms: one for the forward, at most three for the backward, and nothing of PyTorch's beside them."""
    p = random_problem((rows,), 8, dim, params, scale=0.5).to(dtype).to("cuda")
    leaves, grads = leaves_of(p), (p.grad_z, p.grad_log_det.float())
    outputs = vvae_fast.planar_flow(*leaves, backend="triton")
    forward = kernels_of(lambda: vvae_fast.planar_flow(*leaves, backend="triton"))
    assert len(forward) == 1, forward
    backward = kernels_of(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True))  # run twice
    assert 1 <= len(backward) <= 3, backward
