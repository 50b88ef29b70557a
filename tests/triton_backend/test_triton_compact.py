"""The compact form of the Triton kernels, called directly and through planar_flow, against the float64 oracle."""

import pytest
import torch
from problems import (
    NAMES,
    Problem,
    assert_accuracy_rule,
    assert_same_of_strides,
    oracle,
    random_problem,
    relative_errors,
    run,
)
from triton_device import DEVICE, ON_DEVICE

from vvae_fast import shapes
from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics, _table, launch, planar
from vvae_fast.triton.compact_backward import launch_compact_backward
from vvae_fast.triton.compact_forward import launch_compact_forward

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = {  # batch, K, D, params
    "one chunk": ((40,), 16, 16, ()),
    "one step, one row": ((1,), 1, 17, ()),
    "three chunks, ragged rows and columns": ((19,), 35, 50, ()),
    "several slices": ((70,), 3, 20, ()),
    "columns in several tiles, z in memory": ((17,), 18, 90, ()),
    "sets of several rows": ((5, 3), 17, 33, (3,)),
    "sets of several slices, z in memory": ((20, 2), 20, 70, (2,)),
    "sets of one row": ((3,), 18, 20, (3,)),
    "more steps than dimensions": ((9,), 40, 16, ()),
}


def compact(p: Problem, constraint: str = "softplus", save: bool = True, **others) -> tuple[torch.Tensor, ...]:
    """z_K, log_det and, if `save`, dz, du, dw, db, straight from the launchers; `others` are more of the formulas."""
    formulas = FlowSpec(constraint, **others)
    p = Problem(*(t.to(DEVICE) for t in p))
    batch, dim, num_steps = p.z.shape[:-1], p.z.shape[-1], p.u.shape[-2]
    z, grad_z = (t.reshape(-1, dim) for t in (p.z, p.grad_z))
    z_K, dz = torch.empty_like(z.contiguous()), torch.empty_like(z.contiguous())
    log_det = z.new_empty(z.shape[0], dtype=shapes.compute_dtype(z.dtype))
    a = log_det.new_empty((num_steps, z.shape[0]) if save else (0,))
    launch_compact_forward((z, p.u, p.w, p.b), (z_K, log_det, a), formulas, save)
    outputs = z_K.view(*batch, dim).cpu(), log_det.view(batch).cpu()
    if not save:
        return outputs
    grads = [torch.empty_like(t.contiguous()) for t in (p.u, p.w, p.b)]
    grad_log_det = p.grad_log_det.reshape(-1).to(log_det.dtype)
    launch_compact_backward((grad_z, grad_log_det, z, p.u, p.w), a, dz, tuple(grads), formulas)
    return *outputs, dz.view(*batch, dim).cpu(), *(t.cpu() for t in grads)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_is_the_oracle(shape, constraint):
    p = random_problem(*shape, scale=0.5, dtype=torch.float64)
    errors = relative_errors(compact(p, constraint), oracle(p, constraint))
    assert max(errors) < 1e-11, dict(zip(NAMES, errors, strict=True))


@pytest.mark.parametrize("rows", [70, 200])
def test_large_blocks_of_rows_and_slices_of_many_blocks(rows, monkeypatch):
    monkeypatch.setattr(_heuristics, "_COMPACT_PROGRAMS", 4)
    monkeypatch.setattr(_table, "FEW_COMPACT_ROWS", 0)
    p = random_problem((rows,), 18, 20, scale=0.5, dtype=torch.float64)
    assert max(relative_errors(compact(p), oracle(p))) < 1e-11


@pytest.mark.parametrize("name", ["three chunks, ragged rows and columns", "columns in several tiles, z in memory"])
def test_saving_nothing_changes_nothing(name):
    p = random_problem(*SHAPES[name])
    for got, wanted in zip(compact(p, save=False), compact(p), strict=False):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("rows", "num_steps", "dim", "params"),
    [(8, 20, 32, ()), pytest.param(8, 18, 70, (), marks=pytest.mark.long), (4, 6, 20, (4,))],
)
def test_float32_accuracy(rows, num_steps, dim, params, monkeypatch):
    """The rule of the direct form. On a GPU tl.dot is three products in tf32."""
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: True)
    assert_accuracy_rule((rows, num_steps, dim, 0.7, params), **ON_DEVICE)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["three chunks, ragged rows and columns", "columns in several tiles, z in memory"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_cast(name, dtype):
    p = random_problem(*SHAPES[name], scale=0.5, dtype=dtype)
    for got, wanted in zip(compact(p), compact(p.to(torch.float32)), strict=True):
        if DEVICE == "cuda":  # a load's width may decide in which order a row is summed
            assert max(relative_errors([got], [wanted.double()])) < torch.finfo(got.dtype).eps * 4
        else:  # the interpreter cuts bfloat16 off
            rtol = 2**-7 if got.dtype == torch.bfloat16 else 0
            torch.testing.assert_close(got, wanted.to(got.dtype), rtol=rtol, atol=0)
    assert got.dtype == dtype


@pytest.mark.parametrize("shape", [((5, 2), 3, 33, (2,)), ((17,), 3, 70, ())])
def test_strided_inputs(shape):
    p = random_problem(*shape, scale=0.5).to(DEVICE)  # a copy is dense: the strides after it
    gaps = [torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]] for t in p[:4]]
    one = torch.ones((), device=DEVICE)
    zero_strides = one.expand_as(p.z), one.expand(p.z.shape[:-1])
    transposed = Problem(*(t.mT.contiguous().mT for t in p[:3]), *p[3:])
    for strided in (Problem(*gaps, *zero_strides), transposed):
        contiguous = Problem(*(t.contiguous() for t in strided))
        assert_same_of_strides(compact(strided), compact(contiguous), contiguous)


@pytest.mark.parametrize("name", ["one chunk", "columns in several tiles, z in memory"])
def test_nan_stays_in_its_row(name):
    p = random_problem(*SHAPES[name])
    p.z[5, 3] = torch.nan
    others = torch.arange(len(p.z)) != 5
    z_K, log_det, dz, *_ = compact(p)
    clean = compact(p._replace(z=p.z.nan_to_num()))
    for got, wanted in zip((z_K, log_det, dz), clean, strict=False):
        assert got[5].isnan().any()
        assert torch.equal(got[others], wanted[others])


@pytest.mark.parametrize("name", ["several slices", "columns in several tiles, z in memory"])
def test_same_bits_twice(name):
    p = random_problem(*SHAPES[name])
    for first, second in zip(compact(p), compact(p), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dim", [20, 100])
def test_edges_of_the_constraint(dim):
    """w . u from -80 to 100, and a w of zeros."""
    alphas = torch.tensor([-80.0, -50, -20, -5, -1, 0, 1, 5, 20, 50, 100, 0], dtype=torch.float64)
    p = random_problem((33,), len(alphas), dim, scale=0.5, dtype=torch.float64)
    n = p.w.square().sum(-1)
    u = p.u + ((alphas - (p.u * p.w).sum(-1)) / n)[:, None] * p.w
    p.w[-1] = 0
    p = p._replace(u=u)
    got, wanted = compact(p), oracle(p)
    assert max(relative_errors(got, wanted)) < 1e-11
    # Where |w . u| is large, P and the sum in (9) cancel: float32 loses what the oracle of its own inputs shows.
    p = p.to(torch.float32)
    assert max(relative_errors(compact(p), oracle(p.to(torch.float64)))) < 1e-3


@pytest.mark.parametrize(
    ("batch", "num_steps", "dim", "params"),
    [((64,), 3, 32, ()), ((64, 2), 2, 33, (2,)), ((1,), 1, 1100, (1,))],
)
def test_planar_flow_takes_this_form(batch, num_steps, dim, params, monkeypatch):
    def direct(*args):
        raise AssertionError("the direct form was launched")

    monkeypatch.setattr(_heuristics, "_COMPACT_WORK", 64 * 32)
    monkeypatch.setattr(planar, "launch_direct_forward", direct)
    monkeypatch.setattr(planar, "launch_direct_backward", direct)
    p = random_problem(batch, num_steps, dim, params, scale=0.5, dtype=torch.float64)
    got = run(Problem(*(t.to(DEVICE) for t in p)), backend="triton")
    assert max(relative_errors([t.cpu() for t in got], oracle(p))) < 1e-11


def test_packed_gradients(monkeypatch):
    monkeypatch.setattr(_heuristics, "is_compact", lambda *problem: True)
    rows, num_steps, dim, num_sets = 32, 5, 33, 2
    p = random_problem((rows // num_sets, num_sets), num_steps, dim, (num_sets,), scale=0.5, dtype=torch.float64)
    p = Problem(*(t.to(DEVICE) for t in p))
    z, grad_z = (t.reshape(rows, dim) for t in (p.z, p.grad_z))
    packed = torch.cat([p.u.flatten(1), p.w.flatten(1), p.b], 1)
    _, _, a = planar.planar_forward(z, p.u, p.w, p.b, FlowSpec(), True)
    dz, dpacked = planar.planar_backward_packed(grad_z, p.grad_log_det.reshape(rows), z, packed, a, FlowSpec())
    _, _, *wanted = oracle(Problem(*(t.cpu() for t in p)))
    wanted_packed = torch.cat([wanted[1].flatten(1), wanted[2].flatten(1), wanted[3]], 1)
    got = (dz.view_as(p.z).cpu(), dpacked.cpu())
    assert max(relative_errors(got, (wanted[0], wanted_packed))) < 1e-11


def test_where_the_form_is_chosen(monkeypatch):
    def is_compact(rows_per_set, dim, num_steps, dtype=torch.float32):
        return _heuristics.is_compact(rows_per_set, dim, num_steps, dtype)

    assert is_compact(65536, 64, 32)
    assert is_compact(1, 2049, 5000)
    assert is_compact(1, 1025, 16, torch.float64)
    assert not is_compact(1, 2048, 16)
    assert not is_compact(65536, 64, 65)
    assert not is_compact(65536, 16, 8)
    assert not is_compact(128, 40, 16)
    monkeypatch.setattr(launch, "BARRIER_ORDERS_MEMORY", False)
    assert not is_compact(65536, 64, 32)
