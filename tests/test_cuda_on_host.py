"""The CUDA kernels themselves, run on the host against the float64 oracle: plainly, and under two sanitizers."""

import itertools
import math

import cuda_host
import pytest
import torch
from cuda_host import FORWARD, REVERSE, Case, describe
from problems import ERROR_FLOOR, NAMES, Problem, oracle, random_problem, relative_errors, run
from test_planar_flow import edge_problem, strided_views

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of each tensor, relative L2; the half precisions round what they write.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 4e-3, torch.float16: 1e-3}

# Rows and parameter sets: one set for all, several for many rows each, several for few rows each, one for each row.
SHARED = [((1,), ()), ((37,), ()), ((300,), ())]
SETS = [((17, 3), (3,)), ((3, 5), (5,)), ((1,), (1,)), ((11,), (11,))]
STEPS_AND_DIMS = [(1, 1), (2, 3), (7, 4), (17, 6), (37, 2), (5, 17), (18, 24), (33, 48), (3, 70), (20, 100)]


def every_kernel() -> list[Case]:
    """Each instantiation at least once: D of each layout, read by vectors of four or one by one, in each dtype."""
    cases = []
    for dtype in DTYPES:
        dims = [3, 4, 13, 16, 30, 32, 41, 48, 61, 64, 90, 128, 200, 256, 421, 512]
        dims += [] if dtype == torch.float64 else [701, 1024]
        for i, dim in enumerate(dims):
            steps = (2, 5, 17)[i % 3] if dim < 200 else 2
            for batch, params in (((21,), ()), ((5,), (5,)), ((2, 3), (3,))):
                p = random_problem(batch, steps, dim, params, scale=0.5, dtype=dtype, seed=dim)
                forms = ("direct",) if params else ("direct", "compact")
                cases += [Case(p, form=form, order=i) for form in forms]
    # Blocks take rows several times; the last of each form cannot keep all steps in the block's memory.
    direct = [(130, 18, 4), (43, 18, 13), (15, 18, 132), (15, 18, 701)]
    compact = [(400, 18, 20), (200, 36, 60), (33, 70, 100)]
    for form, shapes in (("direct", direct), ("compact", compact)):
        cases += [Case(random_problem((rows,), steps, dim, scale=0.5), form=form) for rows, steps, dim in shapes]
    return cases


def check(cases: list[Case], run: cuda_host.Run) -> None:
    """Nothing was reported, and every answer is the oracle's."""
    assert run.report == ""
    for case, answer in zip(cases, run.answers, strict=True):
        about = describe(case)
        assert answer.error == "", about
        wanted = oracle(case.problem.to(torch.float64), case.constraint)
        if not case.save:
            wanted = wanted[:2]
        errors = relative_errors(answer.tensors, wanted)
        assert max(errors) < TOLERANCES[case.problem.z.dtype], (about, dict(zip(NAMES, errors, strict=False)))


@pytest.fixture(scope="module")
def plain():
    return cuda_host.program("plain")


@pytest.mark.parametrize("sanitizer", cuda_host.SANITIZERS)
def test_every_kernel(sanitizer):
    program, cases = cuda_host.program(sanitizer), every_kernel()
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
        cases.append(Case(p, ("softplus", "none")[i % 5 == 0], form, packed=i % 2 == 0))
        if i % 3 == 0:
            cases.append(Case(p, form=form, save=False))
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.parametrize("params", [(), (70,)], ids=["shared", "amortized"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_taken_as_they_are(plain, dtype, params):
    cases = []
    for form, dim in (("direct", 6), ("direct", 8), ("compact", 20)):
        p = random_problem((70,), 18, dim, params, scale=0.5, dtype=dtype)
        cases += [Case(view, form=form) for view in (p, *strided_views(p).values())]
    done = cuda_host.run(plain, cases)
    check(cases, done)
    views = len(cases) // 3
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
    cases = [Case(problem), Case(amortized)]
    check(cases, cuda_host.run(plain, cases))


FORMS = ["direct", "compact", "automatic"]
MANY = [((200,), ()), ((34, 3), (3,)), ((70,), (70,)), ((4, 9), (9,))]


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_blocks_and_lanes_changes_no_bit(plain, form):
    problems = [random_problem(batch, 18, dim, params) for batch, params in MANY for dim in (5, 52)]
    orders = (FORWARD, REVERSE, 2, 3)
    done = cuda_host.run(plain, [Case(p, form=form, order=order) for p in problems for order in orders])
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [5, 52])
def test_the_bits_of_a_row_are_the_same_alone(plain, form, dim):
    for batch, params in MANY:
        p = random_problem(batch, 18, dim, params)
        rows = [(0,) * len(batch), tuple(n - 1 for n in batch), tuple(n // 2 for n in batch)]
        alone = [one_row(p, row) for row in rows]
        done = cuda_host.run(plain, [Case(problem, form=form) for problem in (p, *alone)])
        assert done.report == ""
        together, *others = done.answers
        for row, answer in zip(rows, others, strict=True):
            where = (row[0],) if len(row) > 1 and answer.tensors[1].shape[0] > 1 else (0,)
            where += (0,) * (len(row) - 1)
            for i in range(3):  # z_K, log_det, dz
                assert torch.equal(answer.tensors[i][where], together.tensors[i][row]), (batch, params, NAMES[i])


@pytest.mark.parametrize("form", ["direct", "compact"])
@pytest.mark.parametrize("params", [(), (9,)], ids=["shared", "amortized"])
@pytest.mark.parametrize("scale", [0.3, 0.7])
@pytest.mark.parametrize(("num_steps", "dim"), [(8, 4), (6, 20), (20, 52), (33, 6)])
def test_float32_accuracy(plain, num_steps, dim, scale, params, form):
    """The rule of tests/problems.py, whose backends are PyTorch's."""
    problems = [random_problem((9,), num_steps, dim, params, scale, seed=seed) for seed in range(8)]
    done = cuda_host.run(plain, [Case(p, form=form) for p in problems])
    assert done.report == ""
    ratios = []
    for p, answer in zip(problems, done.answers, strict=True):
        wanted = oracle(p.to(torch.float64))
        eager = relative_errors(run(p, backend="reference"), wanted)
        ours = relative_errors(answer.tensors, wanted)
        ratios.append([max(x / max(y, ERROR_FLOOR), 1e-3) for x, y in zip(ours, eager, strict=True)])
    draws = dict(zip(NAMES, zip(*ratios, strict=True), strict=True))
    means = {name: math.exp(sum(map(math.log, of_name)) / len(of_name)) for name, of_name in draws.items()}
    assert max(means.values()) <= 1.6, means
    assert max(map(max, draws.values())) <= 4, draws


@pytest.mark.parametrize("alpha", [-80.0, -20.0, 0.5413, 89.0])
def test_edges_of_the_constraint(plain, alpha):
    problems = [edge_problem(alpha, torch.float64, amortized) for amortized in (False, True)]
    cases = [Case(p, form=form) for p in problems for form in ("direct", "compact")]
    check(cases, cuda_host.run(plain, cases))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_not_there_add_nothing(plain, dtype):
    """Without the constraint and at w . u = -1 the determinant is 0 where a is, as it is behind the last row."""
    cases = []
    for rows, num_steps, dim in ((3, 2, 5), (37, 2, 60)):
        p = random_problem((rows,), num_steps, dim, scale=0.5, dtype=dtype)
        w = torch.zeros_like(p.w)
        w[:, 0] = 1
        p = p._replace(w=w, u=-w, b=1 + p.b.abs())
        cases += [Case(p, "none", form) for form in ("direct", "compact")]
    check(cases, cuda_host.run(plain, cases))


def test_blocks_that_need_the_most_memory(plain):
    """The harness refuses what the smallest GPUs do not have."""
    shapes = [(512, 3, torch.float64), (61, 33, torch.float64), (20, 512, torch.float64), (9, 1024, torch.float32)]
    shapes += [(40, 480, torch.float32), (33, 256, torch.float32), (96, 64, torch.float32), (70, 17, torch.float64)]
    cases = [Case(random_problem((5,), num_steps, dim, scale=0.3, dtype=dtype)) for num_steps, dim, dtype in shapes]
    check(cases, cuda_host.run(plain, cases))
