"""The op suite of test_planar_flow.py for the backends on a GPU, against the float64 oracle on the CPU."""

import itertools

import gpu_memory
import pytest
import torch
from problems import (
    Problem,
    assert_accuracy_rule,
    assert_close_to_oracle,
    assert_float64_is_the_oracle,
    assert_right_at_an_edge,
    oracle,
    random_problem,
    relative_errors,
    run,
    saved_for_backward,
)
from test_fused_inverse import run as invert
from test_planar_flow import (
    BATCHES,
    EDGES,
    EMPTY_OR_SMALL,
    SCALED,
    STEPS_AND_DIMS,
    edge_problem,
    strided_views,
)

import vvae_fast
from vvae_fast import shapes
from vvae_fast.backends import cuda
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS
from vvae_fast.triton import _heuristics

pytestmark = pytest.mark.gpu
CUDA_FORMS = pytest.mark.parametrize("form", ["direct", "compact"])


@pytest.fixture
def on_gpu(gpu_backend):
    return {"backend": gpu_backend, "device": "cuda"}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize(("batch", "params"), BATCHES)
def test_float64_is_the_oracle(on_gpu, batch, params, constraint):
    for num_steps, dim in STEPS_AND_DIMS:
        assert_float64_is_the_oracle(batch, num_steps, dim, params, constraint, **on_gpu)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("params", [(), (21,)])
@pytest.mark.parametrize(("num_steps", "dim"), [(256, 300), (300, 17), (20, 513)])
def test_large_steps_and_dims(on_gpu, num_steps, dim, params):
    if on_gpu["backend"] == "cuda":
        dim = min(dim, cuda.most_dim[torch.float64])
    assert_float64_is_the_oracle((21,), num_steps, dim, params, tolerance=1e-9, **on_gpu)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("batch", "params"), [((20_011,), ()), ((2500,), (2500,)), ((80, 3), (3,)), ((300, 19), (19,))]
)
def test_many_rows(on_gpu, batch, params):
    """More rows than the programs of a backward take at once, and sets with many samples."""
    assert_float64_is_the_oracle(batch, 18, 6, params, **on_gpu)


@pytest.mark.usefixtures("poisoned", "set_cuda_form")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("batch", "params"), [((131,), ()), ((40, 3), (3,)), ((3, 5), (5,))])
def test_every_formula_of_the_cuda_kernels(batch, params, activation):
    for dim in (3, 16, 60, 200, 500):
        p = random_problem(batch, 9, dim, params, scale=0.5, dtype=torch.float64)
        for constraint, eps in itertools.product(CONSTRAINTS, (0.0, 0.1)):
            formulas = {"activation": activation, "slope": 0.3, "log_det_eps": eps}
            assert_close_to_oracle(p, constraint, 1e-10, "cuda", "cuda", **formulas)
        for constraint in ("softplus", "log_softplus"):
            formulas = {"activation": activation, "slope": 0.3, "constraint": constraint}
            got, wanted = invert(p.to("cuda"), "cuda", **formulas), invert(p, "reference", **formulas)
            assert max(relative_errors(got, wanted)) < 1e-10, (dim, formulas)


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize(("rows", "num_steps", "dim", "scale"), SCALED)
def test_float32_accuracy(on_gpu, rows, num_steps, dim, scale, amortized):
    assert_accuracy_rule((rows, num_steps, dim, scale, (rows,) if amortized else ()), **on_gpu)


COMPACT_CASES = pytest.mark.parametrize(
    "case",
    [
        (200, 32, 64, 0.3, ()),
        (200, 32, 64, 0.7, ()),
        (300, 32, 40, 0.7, ()),
        (100, 64, 512, 0.7, ()),
        (40, 20, 100, 0.7, ()),
    ],
)


@COMPACT_CASES
def test_float32_accuracy_of_the_compact_form(case, monkeypatch):
    """Its matrix products are three in tf32 each."""
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: True)
    assert_accuracy_rule(case, backend="triton", device="cuda")


@CUDA_FORMS
@COMPACT_CASES
def test_float32_accuracy_of_the_cuda_forms(case, form, set_cuda_form):
    set_cuda_form(form)
    assert_accuracy_rule(case, backend="cuda", device="cuda")


@CUDA_FORMS
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [1, 5, 16, 30, 60, 100, 200, 333, 512, 1000, 1024])
@pytest.mark.parametrize(("batch", "params"), [((1,), ()), ((131,), ()), ((40, 3), (3,)), ((3, 5), (5,))])
def test_float32_of_the_cuda_forms_in_every_width(batch, params, dim, form, set_cuda_form):
    """Every layout of a row; few rows, many, sets with many samples, which share kernels, and with few."""
    set_cuda_form(form)
    for num_steps in (2, 8, 35):
        p = random_problem(batch, num_steps, dim, params, scale=0.5)
        errors = relative_errors(run(p.to("cuda"), backend="cuda"), oracle(p.to(torch.float64)))
        assert max(errors) < 2e-5, (num_steps, errors)


@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
@pytest.mark.parametrize("alpha", EDGES)
def test_edges_of_the_constraint(gpu_backend, alpha, amortized):
    got = run(edge_problem(alpha, torch.float32, amortized).to("cuda"), backend=gpu_backend)
    assert_right_at_an_edge(got, oracle(edge_problem(alpha, torch.float64, amortized)))


@pytest.mark.parametrize("params", [(), (9,)])
@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-14])
def test_small_w(gpu_backend, params, size):
    p = random_problem((9,), 3, 4, params)
    p = p._replace(w=p.w * size)
    got, wanted = run(p.to("cuda"), backend=gpu_backend), oracle(p.to(torch.float64))
    assert all(t.isfinite().all() for t in got)
    assert max(relative_errors((got[0], *got[2:]), (wanted[0], *wanted[2:]))) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params", [(), (20,)])
def test_half_precisions_compute_in_float32(gpu_backend, dtype, params):
    p = random_problem((20,), 10, 6, params).to(dtype)
    p = p._replace(grad_log_det=p.grad_log_det.float())
    got = run(p.to("cuda"), backend=gpu_backend)
    assert [t.dtype for t in got] == [dtype, torch.float32, *4 * [dtype]]
    errors = relative_errors(got, oracle(p.to(torch.float64)))
    assert errors.pop(1) < 1e-5  # log_det
    assert max(errors) < torch.finfo(dtype).eps


@pytest.mark.parametrize("params", [(), (70,)])
def test_strides_are_taken_as_they_are(gpu_backend, params):
    p = random_problem((70,), 18, 6, params)
    wanted = oracle(p.to(torch.float64))
    for name, view in strided_views(p.to("cuda")).items():
        assert max(relative_errors(run(view, backend=gpu_backend), wanted)) < 1e-5, name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("batch", "params"), EMPTY_OR_SMALL)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_no_steps_and_empty_batches(gpu_backend, batch, params, num_steps):
    p = random_problem(batch, num_steps, 4, params, dtype=torch.float64)
    for x, y in zip(run(p.to("cuda"), backend=gpu_backend), oracle(p), strict=True):
        torch.testing.assert_close(x.cpu(), y)


@pytest.mark.parametrize(("batch", "params"), [((20_011,), ()), ((3, 1000), (1000,))])
def test_same_bits_on_every_run(gpu_backend, batch, params):
    p = random_problem(batch, 33, 20, params, scale=0.5).to("cuda")
    first = run(p, backend=gpu_backend)
    for _ in range(5):
        for x, y in zip(run(p, backend=gpu_backend), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dim", [2, 6, 20, 40, 100])
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_bits_of_a_row_do_not_depend_on_the_batch(dim, amortized, monkeypatch):
    """Few rows and many have other blocks; the direct form sums a row in one order in both."""
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: False)
    rows = 10_000
    p = random_problem((rows,), 8, dim, (rows,) if amortized else (), scale=0.5).to("cuda")
    part = Problem(*(t[:77] if t.shape[0] == rows else t for t in p))
    for x, y in zip(run(part, backend="triton")[:3], run(p, backend="triton")[:3], strict=True):
        assert torch.equal(x, y[:77])


@CUDA_FORMS
@pytest.mark.parametrize("dim", [2, 6, 20, 40, 60, 100, 300])
@pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])
def test_bits_of_a_row_are_its_own_in_the_cuda_forms(dim, amortized, form, set_cuda_form):
    """Whatever the batch, and wherever in it the row is."""
    set_cuda_form(form)
    rows = 10_000
    p = random_problem((rows,), 20, dim, (rows,) if amortized else (), scale=0.5).to("cuda")
    whole = run(p, backend="cuda")[:3]
    for part in (slice(0, 1), slice(5, 82), slice(4001, 6050), slice(rows - 1, rows)):
        few = Problem(*(t[part] if t.shape[0] == rows else t for t in p))
        for x, y in zip(run(few, backend="cuda")[:3], whole, strict=True):
            assert torch.equal(x, y[part]), part


@pytest.mark.parametrize("dim", [6, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_cuda_form_does_not_depend_on_the_batch(dim, dtype, set_cuda_form):
    """What a single row gets by itself is what it gets among thousands."""
    set_cuda_form("automatic")
    p = random_problem((5000,), 20, dim, scale=0.5).to(dtype)
    p = p._replace(grad_log_det=p.grad_log_det.to(shapes.compute_dtype(dtype))).to("cuda")
    few = Problem(*(t[2000:2001] if t.shape[0] == 5000 else t for t in p))
    for x, y in zip(run(few, backend="cuda")[:3], run(p, backend="cuda")[:3], strict=True):
        assert torch.equal(x, y[2000:2001])


@CUDA_FORMS
def test_bits_of_a_row_do_not_depend_on_other_sets_in_the_cuda_forms(form, set_cuda_form):
    """A set with many samples runs the kernels of shared parameters, whatever sets there are beside it."""
    set_cuda_form(form)
    p = random_problem((40, 7), 20, 100, (7,), scale=0.5).to("cuda")
    one = Problem(p.z[:, 3:4], p.u[3:4], p.w[3:4], p.b[3:4], p.grad_z[:, 3:4], p.grad_log_det[:, 3:4])
    for x, y in zip(run(one, backend="cuda")[:3], run(p, backend="cuda")[:3], strict=True):
        assert torch.equal(x, y[:, 3:4])


@pytest.mark.parametrize(("params", "sets"), [((), 1), ((100,), 100)])
def test_saved_for_backward_is_z_and_a_number_a_step(gpu_backend, params, sets):
    rows, num_steps, dim = 100, 16, 40
    p = random_problem((rows,), num_steps, dim, params).to("cuda")
    assert saved_for_backward(p, gpu_backend) == 4 * (rows * (dim + num_steps) + sets * num_steps * (2 * dim + 1))


@pytest.fixture
def most_of_the_memory():
    """Two processes may not both find it free."""
    with gpu_memory.alone(60e9):
        yield


@pytest.mark.usefixtures("most_of_the_memory")
@pytest.mark.parametrize("num_steps", [2, 65])
def test_more_elements_than_32_bits_count(num_steps):
    """z and, with 65 steps, the pre-activations have more than 2^31. Rows between the ends are 0 and add nothing."""
    rows, dim, end = 2**25 + 1001, 64, 100
    small = random_problem((2 * end,), num_steps, dim, scale=0.3).to(torch.bfloat16)
    small = small._replace(grad_log_det=small.grad_log_det.float())

    def spread(t):
        whole = torch.zeros(rows, *t.shape[1:], dtype=t.dtype, device="cuda")
        whole[:end], whole[-end:] = t[:end], t[end:]
        return whole

    large = Problem(*(spread(t) if len(t) == 2 * end else t.to("cuda") for t in small))
    wanted = oracle(small.to(torch.float64))
    for backend in ("triton", "cuda"):  # one after the other
        if not vvae_fast.info()["backends"][backend]["available"]:
            continue
        answers = [
            [torch.cat([t[:end], t[-end:]]) if len(t) == rows else t for t in run(large, backend=backend)]
            for _ in range(2)
        ]
        errors = relative_errors(answers[0], wanted)
        assert errors.pop(1) < 1e-4, backend  # log_det
        assert max(errors) < 2 * torch.finfo(torch.bfloat16).eps, backend
        for x, y in zip(*answers, strict=True):
            assert torch.equal(x, y), backend
