"""The loops that the benchmarks compare with: right, as short as they are said to be, and in the VAE step; and who is
there to be compared."""

import inspect
from functools import partial

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the extra [bench] is not installed")

from test_benchmarks import RUNS_HERE, contestant, timed_run
from torch.utils._python_dispatch import TorchDispatchMode

import vvae_fast
from benchmarks.flow import bench_training, loops
from benchmarks.flow.bench_training import GROUPS, check, flows, make_data, make_model
from benchmarks.flow.cases import GPU_CASES, MEMORY_CASES, PLANAR_CASES, Case
from benchmarks.flow.contestants import COMPILED, LOOPS, NO_LEAF, baselines, ours
from benchmarks.flow.measure import Refused, Stage, make_gradients, make_inputs
from benchmarks.report import results
from benchmarks.study import epochs, study_results
from vvae_fast.train.data.sets import load_dataset
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.studies import load_study

CPU = torch.device("cpu")
SHARED = [loops.step_by_step, loops.products_first]
CHUNKS = Case(7, 5, 2 * loops.CHUNK + 3)  # more than one chunk, and a part of one


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("loop", "rows", "dim", "num_steps"),
    [
        *((loop, *sizes) for loop in SHARED for sizes in ((6, 3, 2), (1, 1, 1), (7, 5, CHUNKS.num_steps))),
        (loops.plain_loop, loops.MANY_ROWS - 1, 4, 5),
        (loops.plain_loop, loops.MANY_ROWS, 4, 5),
    ],
)
def test_a_loop_with_shared_parameters_agrees_with_the_oracle(loop, rows, dim, num_steps, dtype):
    """Outputs and gradients, in float64 to eleven digits."""
    Stage(Case(rows, dim, num_steps, dtype=dtype), CPU).prepared(contestant(loop))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [(6, 3, 2), (1, 1, 1), (loops.MANY_ROWS, 2, 3)])
def test_a_loop_with_amortized_parameters_agrees_with_the_oracle(sizes, dtype):
    Stage(Case(*sizes, amortized=True, dtype=dtype), CPU).prepared(contestant(loops.plain_loop))


@pytest.mark.parametrize("loop", [*SHARED, loops.amortized_loop])
def test_a_loop_has_at_most_twenty_lines(loop):
    """With what it calls, without signatures and descriptions."""
    lines = [len(inspect.getsource(f).splitlines()) - 2 for f in (loop, loops._constrained)]
    assert sum(lines) <= 20


VIEWS = ("view", "t", "select", "slice", "split", "unbind", "transpose", "unsqueeze", "squeeze", "expand", "detach")


class Counter(TorchDispatchMode):
    """Of the operators that compute something: on a GPU each is a launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::") not in VIEWS
        return function(*args, **(kwargs or {}))


def test_the_plain_loop_launches_a_ninth_of_what_the_reference_does():
    """What the bars for a GPU rest on: at 128 x 40, K = 80, forward and backward."""
    case, counts = Case(128, 40, 80), []
    for loop in (loops.reference_loop, loops.plain_loop):
        inputs = [t.requires_grad_() for t in make_inputs(case)]
        with Counter() as counter:
            torch.autograd.grad(loop(*inputs), inputs, make_gradients(case))
        counts.append(counter.count)
    assert 8 <= counts[0] / counts[1] <= 10, counts


def test_the_plain_loop_is_in_every_case_that_has_a_peer():
    """Or its ratios would have nothing to be to."""
    names = {trial.name for trial in baselines() if trial.role == "peer"} | {"normflows", "Pyro", "pythae", "flowjax"}
    for case in [*PLANAR_CASES, *GPU_CASES, *MEMORY_CASES]:
        assert loops.PLAIN in case.contestants or not names & set(case.contestants), case


def test_the_results_say_which_loop_is_compiled():
    assert COMPILED in LOOPS
    header = results.header(timed_run({}), "full", 1.0)
    assert header["compiled"] == COMPILED


def test_the_vae_step_has_the_loops_and_a_compiled_one():
    names = [name for name in flows(["cpp"]) if GROUPS[0].takes(name)]
    for kind in ("K=80", "amortized K=16"):
        for name in (loops.PLAIN, loops.REFERENCE, "torch.compile", "vvae_fast cpp", "no-op"):
            assert f"{name} {kind}" in names
    assert {f"vvae_fast cpp amortized K={k} rank 32" for k in (16, 80)} < set(names)
    assert bench_training.names(GROUPS[0], ["cpp"], in_full=True) == names
    few = bench_training.names(GROUPS[0], ["triton"], in_full=False)
    assert not any(name.startswith(("torch.compile", loops.REFERENCE)) for name in few)
    assert f"{loops.PLAIN} K=80" in few


def test_an_epoch_is_timed_with_the_flow_and_with_both_loops():
    """A step of each; the vanilla VAE has no flow to loop over."""
    study = load_study(study_results.CONFIGS / "digits.yaml")
    models = [Model("vanilla", 0), Model("amortized", 2), Model("shared", 2)]
    dataset = load_dataset("digits")
    content = epochs.measure(study.base(dataset), dataset, models, rounds=1, num_steps=1)
    timed = [(row["model"], row["backend"]) for row in content["epochs"] if row["seconds"] > 0]
    flows = [(model, name) for model in ("amortized", "shared") for name in ("vvae_fast", "plain loop", "reference")]
    assert timed == [("vanilla", "vvae_fast"), *flows]


def test_an_epoch_of_another_family_is_timed_with_the_flow_alone():
    """The loops are over planar steps. The row says which family it is."""
    study = load_study(study_results.CONFIGS / "digits.yaml")
    models = [Model("amortized", 2, rank=4), Model("amortized", 1, flow="sylvester-orthogonal", units=2)]
    dataset = load_dataset("digits")
    content = epochs.measure(study.base(dataset), dataset, models, rounds=1, num_steps=1)
    timed = [(study_results.model_of(row), row["backend"]) for row in content["epochs"]]
    planar = [(models[0], name) for name in ("vvae_fast", "plain loop", "reference")]
    assert timed == [*planar, (models[1], "vvae_fast")]


@pytest.mark.filterwarnings(NO_LEAF)
def test_the_flow_of_a_step_is_compiled_once_for_both_optimizers(monkeypatch):
    """By a compiler that only counts: the benchmarks' own takes a minute."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    bench_training.compiled.cache_clear()
    for group in GROUPS:
        bench_training.training_step("torch.compile amortized K=16", group, CPU, ("cpp",))()
    bench_training.compiled.cache_clear()
    bench_training.training_step.cache_clear()
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", [bench_training.shared, bench_training.amortized])
def test_a_step_with_the_plain_loop_is_checked_against_the_reference(kind):
    x = make_data(CPU, 16)
    check(make_model(lambda: kind(loops.plain_loop), CPU), x)

    def wrong(*inputs):
        z_K, log_det = loops.plain_loop(*inputs)
        return z_K, 1.01 * log_det

    with pytest.raises(Refused, match="wrong: loss or gradient"):
        check(make_model(lambda: kind(wrong), CPU), x)


def test_who_runs_here_is_asked_without_running(monkeypatch):
    """Tests are collected where a kernel may not run, as Triton 3.6's interpreter with numpy 2.5."""

    def run(*args, **options):
        raise AssertionError("it ran")

    monkeypatch.setattr(vvae_fast, "planar_flow", run)
    assert [trial.name for trial in ours("cpu") if trial.runs] == [trial.name for trial in RUNS_HERE]
