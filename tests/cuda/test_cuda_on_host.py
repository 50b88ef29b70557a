"""The CUDA kernels themselves, run on the host against the float64 oracle: plainly, and under two sanitizers."""

import itertools

import cuda_host
import pytest
import torch
from cuda_host import FORWARD, REVERSE, Case, describe, far_product, wanted_of
from problems import (
    DRAWS,
    NAMES,
    Problem,
    assert_as_accurate,
    invert,
    random_problem,
    relative_errors,
    run,
)
from test_fused_inverse import edge_points
from test_planar_flow import EDGES, edge_problem, strided_views

from vvae_fast import reference
from vvae_fast.reference import activations
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, FlowSpec

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of each tensor, relative L2; the half precisions round what they write.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 4e-3, torch.float16: 1e-3}

# Rows and parameter sets: one set for all, several for many rows each, several for few rows each, one for each row.
SHARED = [((1,), ()), ((37,), ()), ((300,), ())]
SETS = [((17, 3), (3,)), ((3, 5), (5,)), ((1,), (1,)), ((11,), (11,))]
STEPS_AND_DIMS = [(1, 1), (2, 3), (7, 4), (17, 6), (37, 2), (5, 17), (18, 24), (33, 48), (3, 70), (20, 100)]


OTHERS = ACTIVATIONS[1:]  # than tanh


def every_kernel(dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Each instantiation at least once: D of each layout, read by vectors of four or one by one, in each dtype."""
    cases = []
    for dtype in dtypes:
        dims = [3, 4, 13, 16, 30, 32, 41, 48, 61, 64, 90, 128, 200, 256, 421, 512]
        dims += [] if dtype == torch.float64 else [701, 1024]
        for i, dim in enumerate(dims):
            steps = (2, 5, 17)[i % 3] if dim < 200 else 2
            for batch, params in (((21,), ()), ((5,), (5,)), ((2, 3), (3,))):
                p = random_problem(batch, steps, dim, params, scale=0.5, dtype=dtype, seed=dim)
                forms = ("direct",) if params else ("direct", "compact")
                cases += [Case(p, form=form, order=i) for form in forms]
        if dtype in (torch.float32, torch.float64):
            cases += every_kernel_of_few(dtype)
    # Blocks take rows several times; the last of each form cannot keep all steps in the block's memory.
    direct = [(130, 18, 4), (43, 18, 13), (15, 18, 132), (15, 18, 701)]
    compact = [(400, 18, 20), (200, 36, 60), (33, 70, 100)]
    for form, shapes in (("direct", direct), ("compact", compact)):
        cases += [Case(random_problem((rows,), steps, dim, scale=0.5), form=form) for rows, steps, dim in shapes]
    problems = [random_problem((rows,), steps, dim, scale=0.5) for rows, steps, dim in direct]
    cases += [Case(p, FlowSpec(activation="sigmoid"), inverse=inverse) for p in problems for inverse in (False, True)]
    return cases


def every_kernel_of_few(dtype: torch.dtype) -> list[Case]:
    """Those of the activations but tanh, and of the inverse."""
    cases = []
    dims = [3, 4, 13, 16, 41, 64, 200, 256, 421, 512 if dtype == torch.float64 else 1024]
    for i, dim in enumerate(dims):
        other = FlowSpec(activation=OTHERS[i % len(OTHERS)])
        for batch, params in (((21,), ()), ((5,), (5,)), ((2, 3), (3,))):
            steps = (2, 5)[i % 2]
            p = random_problem(batch, steps, dim, params, scale=0.5, dtype=dtype, seed=dim)
            cases += [Case(p, other, order=i), Case(p, other, order=i, inverse=True)]
            if i % 2 == 0:
                cases.append(Case(p, order=i, inverse=True))
    return cases


def check(cases: list[Case], run: cuda_host.Run) -> None:
    """Nothing was reported, and every answer is the oracle's."""
    assert run.report == ""
    for case, answer in zip(cases, run.answers, strict=True):
        about = describe(case)
        assert answer.error == "", about
        wanted = wanted_of(case)
        errors = relative_errors(answer.tensors, wanted)
        assert max(errors) < TOLERANCES[case.problem.z.dtype], (about, dict(zip(NAMES, errors, strict=False)))


@pytest.fixture(scope="module")
def plain():
    return cuda_host.program("plain")


@pytest.mark.parametrize(
    "sanitizer", ["plain", *(pytest.param(name, marks=pytest.mark.long) for name in ("address", "thread"))]
)
def test_every_kernel(sanitizer):
    program, cases = cuda_host.program(sanitizer), every_kernel(cuda_host.DTYPES_OF[sanitizer])
    done = cuda_host.run(program, cases)
    check(cases, done)
    held, names = cuda_host.instantiations(program), cuda_host.kernel_names()
    assert names == {name for name in names if any(f"::{name}" in kernel for kernel in held)}
    assert done.kernels == held


@pytest.mark.parametrize("form", ["direct", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes(plain, dtype, form):
    sizes = itertools.product(SHARED + SETS, STEPS_AND_DIMS)
    cases = []
    for i, ((batch, params), (steps, dim)) in enumerate(sizes):
        p = random_problem(batch, steps, dim, params, scale=0.5, dtype=dtype, seed=i)
        formulas = FlowSpec(CONSTRAINTS[i % 3])
        cases.append(Case(p, formulas, form, packed=i % 2 == 0))
        if i % 3 == 0:
            cases.append(Case(p, form=form, save=False))
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formulas(plain, activation, dtype, inverse):
    """Each constraint and eps, for sets of many rows, of few and of one."""
    cases = []
    sizes = itertools.product([((37,), ()), ((17, 3), (3,)), ((3, 5), (5,)), ((11,), (11,))], [(17, 6), (5, 24)])
    for i, ((batch, params), (steps, dim)) in enumerate(sizes):
        p = random_problem(batch, steps, dim, params, scale=0.5, dtype=dtype, seed=i)
        for constraint, eps in itertools.product(CONSTRAINTS, (0.0, 0.1)):
            if not inverse or (constraint != "none" and eps == 0):
                formulas = FlowSpec(constraint, activation, 0.3, eps)
                cases.append(Case(p, formulas, packed=i % 2 == 0, inverse=inverse))
        cases.append(Case(p, FlowSpec(activation=activation), save=False, inverse=inverse))
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constraints_of_the_half_precisions(plain, dtype):
    problems = [random_problem((37,), 17, 24, params, 0.5, dtype) for params in ((), (37,))]
    cases = [Case(p, FlowSpec(constraint)) for p in problems for constraint in CONSTRAINTS[:2]]
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.parametrize("params", [(), (70,)], ids=["shared", "amortized"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_taken_as_they_are(plain, dtype, params):
    cases = []
    kinds = [("direct", 6, False), ("direct", 8, False), ("compact", 20, False)]
    kinds += [("direct", 6, True), ("direct", 8, True)] if dtype.itemsize > 2 else []
    for form, dim, inverse in kinds:
        p = random_problem((70,), 18, dim, params, scale=0.5, dtype=dtype)
        cases += [Case(view, form=form, inverse=inverse) for view in (p, *strided_views(p).values())]
    done = cuda_host.run(plain, cases)
    check(cases, done)
    views = len(cases) // len(kinds)
    for i, answer in enumerate(done.answers):
        wanted = done.answers[i - i % views]
        assert all(map(torch.equal, answer.tensors, wanted.tensors)), describe(cases[i])


@pytest.mark.parametrize("dim", [3, 20])
def test_expanded_inputs(plain, dim):
    """One row of z, one parameter set and one gradient for all rows."""
    p = random_problem((6,), 4, dim, dtype=torch.float64)
    sets = [t.expand(6, *t.shape) for t in p.inputs[1:]]
    one = torch.ones((), dtype=torch.float64)
    problem = p._replace(z=p.z[:1].expand(6, dim), grad_z=one.expand(6, dim), grad_log_det=one.expand(6))
    amortized = problem._replace(u=sets[0], w=sets[1], b=sets[2])
    cases = [Case(p, inverse=inverse) for p in (problem, amortized) for inverse in (False, True)]
    check(cases, cuda_host.run(plain, cases))


KINDS = {
    **{form: {"form": form} for form in ("direct", "compact", "automatic")},
    "elu": {"formulas": FlowSpec(activation="elu")},
    "inverse": {"inverse": True},
    "inverse of sigmoid": {"inverse": True, "formulas": FlowSpec(activation="sigmoid")},
}
MANY = [((200,), ()), ((34, 3), (3,)), ((70,), (70,)), ((4, 9), (9,))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_blocks_and_lanes_changes_no_bit(plain, kind):
    problems = [random_problem(batch, 18, dim, params) for batch, params in MANY for dim in (5, 52)]
    orders = (FORWARD, REVERSE, 2, 3)
    done = cuda_host.run(plain, [Case(p, order=order, **KINDS[kind]) for p in problems for order in orders])
    assert done.report == ""
    assert {answer.error for answer in done.answers} == {""}
    for i, answer in enumerate(done.answers):
        first = done.answers[i - i % len(orders)]
        assert torch.equal(answer.a, first.a)
        assert all(map(torch.equal, answer.tensors, first.tensors))


def one_row(p: Problem, row: tuple[int, ...]) -> Problem:
    """The row alone, or all samples of its set where they are many: they share their sums' form."""
    if not p.u.shape[:-2]:
        return p._replace(**{name: getattr(p, name)[row][None] for name in ("z", "grad_z", "grad_log_det")})
    samples = slice(None) if p.z.shape[:-2].numel() >= 16 else slice(row[0], row[0] + 1)
    at = (samples, slice(row[-1], row[-1] + 1)) if len(row) > 1 else (slice(row[0], row[0] + 1),)
    alone = {name: getattr(p, name)[at] for name in ("z", "grad_z", "grad_log_det")}
    return p._replace(**alone, **{name: getattr(p, name)[row[-1]][None] for name in ("u", "w", "b")})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [5, 52])
def test_the_bits_of_a_row_are_the_same_alone(plain, kind, dim):
    """Nor do they depend on how long its neighbours search."""
    for batch, params in MANY:
        p = random_problem(batch, 18, dim, params)
        rows = [(0,) * len(batch), tuple(n - 1 for n in batch), tuple(n // 2 for n in batch)]
        alone = [one_row(p, row) for row in rows]
        done = cuda_host.run(plain, [Case(problem, **KINDS[kind]) for problem in (p, *alone)])
        assert done.report == ""
        together, *others = done.answers
        for row, answer in zip(rows, others, strict=True):
            where = (row[0],) if len(row) > 1 and answer.tensors[1].shape[0] > 1 else (0,)
            where += (0,) * (len(row) - 1)
            for i in range(3):  # z_K, log_det, dz
                assert torch.equal(answer.tensors[i][where], together.tensors[i][row]), (batch, params, NAMES[i])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["direct", "compact", "elu", "inverse", "inverse of sigmoid"])
@pytest.mark.parametrize("params", [(), (9,)], ids=["shared", "amortized"])
@pytest.mark.parametrize("scale", [0.3, 0.7])
@pytest.mark.parametrize(("num_steps", "dim"), [(8, 4), (6, 20), (20, 52), (33, 6)])
def test_float32_accuracy(plain, num_steps, dim, scale, params, kind):
    """The rule of tests/support/problems.py, whose backends are PyTorch's."""
    problems = [random_problem((9,), num_steps, dim, params, scale, seed=seed) for seed in range(DRAWS)]
    cases = [Case(p, **KINDS[kind]) for p in problems]
    done = cuda_host.run(plain, cases)
    assert done.report == ""
    ours, loop = [], []
    for case, answer in zip(cases, done.answers, strict=True):
        wanted, eager_loop = wanted_of(case), invert if case.inverse else run
        eager = eager_loop(case.problem, backend="reference", activation=case.formulas.activation)
        ours.append(relative_errors(answer.tensors, wanted))
        loop.append(relative_errors(eager, wanted))
    ours, loop = (torch.tensor(errors, dtype=torch.float64) for errors in (ours, loop))
    assert_as_accurate(ours, loop, kind)


@pytest.mark.parametrize("alpha", [-80.0, -20.0, 0.5413, 89.0])
def test_edges_of_the_constraint(plain, alpha):
    problems = [edge_problem(alpha, torch.float64, amortized) for amortized in (False, True)]
    cases = [Case(p, form=form) for p in problems for form in ("direct", "compact")]
    formulas = [FlowSpec(constraint, activation) for activation in OTHERS for constraint in CONSTRAINTS]
    cases += [Case(p, f) for p in problems for f in formulas]
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.parametrize("form", ["direct", "compact"])
def test_a_product_of_determinants_beyond_the_range(plain, form):
    cases = [Case(far_product(), form=form)]
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_of_the_inverse_at_the_edges_of_the_constraint(plain, activation, dtype, bound):
    """One step in one dimension: w = 1, b = 0, so that R is z itself and c follows from alpha exactly."""
    z = edge_points(dtype)[:, None]
    cases = []
    for constraint, alpha, sets in itertools.product(CONSTRAINTS[::2], EDGES, ((), (len(z),))):
        u, w, b = torch.full((*sets, 1, 1), alpha), torch.ones(*sets, 1, 1), torch.zeros(*sets, 1)
        p = Problem(z, u, w, b, torch.ones_like(z), torch.ones_like(z[:, 0])).to(dtype)
        cases.append(Case(p, FlowSpec(constraint, activation, 0.1), inverse=True))
    done = cuda_host.run(plain, cases)
    assert done.report == ""
    for case, answer in zip(cases, done.answers, strict=True):
        assert answer.error == ""
        p = case.problem.to(torch.float64)
        s = reference.constrain(p.u, p.w, case.formulas.constraint).s.flatten()
        x, R = answer.a[0].double(), p.z[:, 0]
        h = activations.activate(x, activation, 0.1).h
        residual = (x - h) + s * h - R
        assert (residual.abs() <= bound * R.abs().clamp(min=1)).all(), describe(case)
        assert all(t.isfinite().all() for t in answer.tensors[:2]), describe(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_not_there_add_nothing(plain, dtype):
    """Without the constraint and at w . u = -1 the determinant is 0 where a is, as it is behind the last row."""
    cases = []
    for rows, num_steps, dim in ((3, 2, 5), (37, 2, 60)):
        p = random_problem((rows,), num_steps, dim, scale=0.5, dtype=dtype)
        w = torch.zeros_like(p.w)
        w[:, 0] = 1
        p = p._replace(w=w, u=-w, b=1 + p.b.abs())
        cases += [Case(p, FlowSpec("none"), form) for form in ("direct", "compact")]
    check(cases, cuda_host.run(plain, cases))


def test_blocks_that_need_the_most_memory(plain):
    """The harness refuses what the smallest GPUs do not have."""
    shapes = [(512, 3, torch.float64), (61, 33, torch.float64), (20, 512, torch.float64), (9, 1024, torch.float32)]
    shapes += [(40, 480, torch.float32), (33, 256, torch.float32), (96, 64, torch.float32), (70, 17, torch.float64)]
    cases = [Case(random_problem((5,), num_steps, dim, scale=0.3, dtype=dtype)) for num_steps, dim, dtype in shapes]
    cases += [Case(random_problem((40,), 9, 300, scale=0.3), FlowSpec(activation="elu"))]
    cases += [Case(case.problem, inverse=True) for case in cases[2:4]]
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [(), (70,)], ids=["shared", "amortized"])
def test_a_bad_row_of_the_inverse_stays_alone(plain, params, bad):
    """And its search ends."""
    clean = random_problem((70,), 20, 6, params)
    z = clean.z.clone()
    z[13, 2] = bad
    kinds = [KINDS["inverse"], KINDS["inverse of sigmoid"]]
    done = cuda_host.run(plain, [Case(p, **kind) for kind in kinds for p in (clean, clean._replace(z=z))])
    assert done.report == ""
    others = torch.arange(70) != 13
    for wanted, answer in zip(done.answers[::2], done.answers[1::2], strict=True):
        assert answer.error == ""
        assert not answer.tensors[0][13].isfinite().all()
        for x, y in zip(answer.tensors[: 6 if params else 3], wanted.tensors, strict=False):
            assert torch.equal(x[others], y[others])
