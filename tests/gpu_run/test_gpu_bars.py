"""The table and the bars of `make gpu`, and the report, of a run that nobody made."""

import dataclasses
import re
from pathlib import Path
from statistics import median

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the extra [bench] is not installed")

from test_benchmarks import stored_run

from benchmarks.flow import bench_training
from benchmarks.flow.bench_training import GPU_GROUPS, flows
from benchmarks.flow.cases import GPU_CASES, GPU_MEMORY_CASES, Case
from benchmarks.flow.contestants import ours
from benchmarks.flow.measure import Refused, Run
from benchmarks.gpu import bars
from benchmarks.report import front, report, results, tables

# Seconds of each contestant by the clock and on the device, and of each step.
CLOCK = {
    "vvae_fast cuda": (100e-6, 10e-6),
    "vvae_fast triton": (200e-6, 20e-6),
    "vvae_fast cuda direct": (350e-6, 35e-6),
    "plain loop": (1.3e-3, 0.13e-3),
    "reference": (12e-3, 1.2e-3),
}
STEPS = {"vanilla": 1e-3, "vvae_fast cuda K=80": 1.05e-3, "vvae_fast triton K=80": 1.15e-3}
STEPS |= {"vanilla, CUDA graph": 0.2e-3, "vvae_fast cuda K=80, CUDA graph": 0.25e-3}


def shape_of(case: Case) -> dict[str, object]:
    fields = {"rows": case.rows, "dim": case.dim, "num_steps": case.num_steps, "amortized": case.amortized}
    return {"case": str(case), "dtype": case.dtype, "status": "ok", **fields}


def timed(name: str, case: Case, pass_: str) -> results.Row:
    role = "peer" if name in ("plain loop", "reference") else "form" if name.endswith("direct") else "ours"
    wall, device = CLOCK[name]
    times = {"median": device, "round_medians": 3 * [device], "host_median": wall, "host_round_medians": 3 * [wall]}
    times |= {"floor": 8e-6, "to_floor": device / 8e-6, "fastest_peer": "plain loop", "to_fastest_peer": wall / 1.3e-3}
    ratio = wall / CLOCK["plain loop"][0]
    times |= {"base": "plain loop", "base_ratios": [ratio], "to_base": ratio}
    return results.Row(**shape_of(case), pass_=pass_, contestant=name, role=role, **times)


def fabricated() -> results.Results:
    """A row for everything that a GPU run has; the numbers are nobody's."""
    rows = []
    for case in GPU_CASES:
        for pass_ in case.passes:
            names = [name for name in CLOCK if name != "vvae_fast cuda direct" or name in case.contestants]
            rows += [timed(name, case, pass_) for name in names]
            refused = [("vvae_fast cpp", "ours", "not run: runs on cpu tensors")]
            refused += [("torch.compile", "peer", "missing: x")] * ("torch.compile" in case.contestants)
            for name, role, status in refused:
                shape = shape_of(case) | {"status": status}
                rows.append(results.Row(**shape, pass_=pass_, contestant=name, role=role))
    for case in GPU_MEMORY_CASES:
        for name, status, sizes in (
            ("vvae_fast cpp", "not run: runs on cpu tensors", {}),
            ("vvae_fast cuda", "ok", {"saved_bytes": 3_000, "peak_bytes": 5_000}),
        ):
            shape = shape_of(case) | {"status": status}
            rows.append(results.Row(**shape, pass_="memory", contestant=name, role="ours", **sizes))
    for group in GPU_GROUPS:
        step = {"case": str(group), "pass_": "step", "rows": group.rows, "dim": 40, "num_steps": None}
        step |= {"amortized": None, "status": "ok", "dtype": "float32"}
        for name, seconds in STEPS.items():
            role, ratio = results._role(name, {}), seconds / STEPS["vanilla"]
            times = {"median": seconds, "round_medians": 3 * [seconds], "to_base": ratio, "base_ratios": [ratio, 1.2]}
            rows.append(results.Row(**step, contestant=name, role=role, **times))
    run = Run(torch.device("cpu"))
    run.unit_rates["float32"] = {"float32": 4e13, "tf32 / 3": 1e14}
    header = results.header(run, "full", 200.0, commit="0123456789")
    header |= {"device": "cuda", "machine": "A GPU", "copy_bytes_per_second": 4e12, "torch": "2.11.0+cu130"}
    return results.Results(header, rows)


def test_the_table_is_short_and_has_every_case_and_the_bars():
    lines = bars.table(fabricated()).splitlines()
    assert len(lines) <= 37
    assert lines[1] == "copy 4.00 TB/s; 40.0 Tflop/s float32; 100.0 Tflop/s tf32 / 3"
    columns = ["cuda", "triton", "plain", "reference", "compile", "device: forward, cuda", "device: forward, triton"]
    assert re.split(r"  +", lines[2])[1:] == [*columns, "backward, cuda", "backward, triton"]
    for case in GPU_CASES:
        (line,) = (x for x in lines if x.startswith(f"{tables.title(timed('vvae_fast cuda', case, ''))}  "))
        both = ["100 us (13x)", "200 us (6.50x)", "1.30 ms", "12.0 ms (0.11x)"]
        compiled = ["missing"] if "torch.compile" in case.contestants else []
        alone = 2 * ["10.0 us (1.25x)", "20.0 us (2.50x)"]
        assert re.split(r"  +", line)[1:] == [*both, *compiled, *alone]
    steps = "vanilla 1.00x, vvae_fast cuda K=80 1.05x, vvae_fast triton K=80 1.15x"
    graphs = "vanilla, CUDA graph 0.20x, vvae_fast cuda K=80, CUDA graph 0.25x"
    assert f"VAE-step-Adam-B512: {steps}, {graphs}" in lines
    assert "memory shared-B4096-D64-K32: saved 3.0 kB (plain loop -), peak 5.0 kB (plain loop -)" in lines
    assert lines[-16:] == [
        "128 x 40, K = 80, triton, times the plain loop, 6 wanted: met, 6.50",
        "128 x 40, K = 80, triton, times the reference, 50 wanted: met, 60.00",
        "128 x 40, K = 80, triton, times torch.compile, 3 wanted: not measured",
        "65,536 x 64, K = 32, triton, forward, floor / time, 0.5 wanted: not met, 0.40",
        "65,536 x 64, K = 32, triton, backward, floor / time, 0.33 wanted: met, 0.40",
        "4,096 x 40, K = 16, amortized, triton, forward, part of the copy's bandwidth, 0.6 wanted: not met, 0.40",
        "128 x 40, K = 80, cuda, forward on the device, us, at most 12 wanted: met, 10.00",
        "128 x 40, K = 80, cuda, times the Triton backend, 1.3 wanted: met, 2.00",
        "128 x 40, K = 80, cuda, times the plain loop, 11 wanted: met, 13.00",
        "128 x 40, K = 80, cuda, times the reference, 100 wanted: met, 120.00",
        "65,536 x 64, K = 32, cuda, forward, floor / time, 0.67 wanted: met, 0.80",
        "65,536 x 64, K = 32, cuda, backward, floor / time, 0.5 wanted: met, 0.80",
        "4,096 x 512, K = 64, cuda, times its direct form, 2 wanted: met, 3.50",
        "Adam step, B = 512, K = 80, cuda, over the vanilla step, at most 1.10 wanted: met, 1.05",
        "fused-Adam step, B = 512, K = 80, cuda, over the vanilla step, at most 1.10 wanted: met, 1.05",
        "fused-Adam step, B = 512, K = 80, cuda, times itself in a CUDA graph, 1.5 wanted: met, 4.20",
    ]


def changed(run: results.Results, contestant: str, **fields) -> results.Results:
    """The run with other numbers of one contestant, wherever it was timed."""
    rows = [
        dataclasses.replace(row, **fields) if row.contestant == contestant and row.median else row for row in run.rows
    ]
    return results.Results(run.header, rows)


@pytest.mark.parametrize(
    ("nth", "contestant", "field", "met", "missed"),
    [
        (0, "vvae_fast triton", "host_round_medians", 1.3e-3 / 6.01, 1.3e-3 / 5.99),
        (1, "vvae_fast triton", "host_round_medians", 12e-3 / 50.1, 12e-3 / 49.9),
        (3, "vvae_fast triton", "to_floor", 1.99, 2.01),
        (4, "vvae_fast triton", "to_floor", 2.99, 3.01),
        (5, "vvae_fast triton", "to_floor", 1.66, 1.67),
        (6, "vvae_fast cuda", "median", 12e-6, 12.01e-6),
        (7, "vvae_fast cuda", "host_round_medians", 200e-6 / 1.31, 200e-6 / 1.29),
        (8, "vvae_fast cuda", "host_round_medians", 1.3e-3 / 11.1, 1.3e-3 / 10.9),
        (9, "vvae_fast cuda", "host_round_medians", 12e-3 / 100.1, 12e-3 / 99.9),
        (10, "vvae_fast cuda", "to_floor", 1.49, 1.51),
        (11, "vvae_fast cuda", "to_floor", 1.99, 2.01),
        (12, "vvae_fast cuda direct", "host_round_medians", 201e-6, 199e-6),
        (13, "vvae_fast cuda K=80", "to_base", 1.1, 1.101),
        (14, "vvae_fast cuda K=80", "to_base", 1.1, 1.101),
        (15, "vvae_fast cuda K=80, CUDA graph", "round_medians", 0.69e-3, 0.71e-3),
    ],
)
def test_a_bar_is_met_up_to_its_number_by_its_own_contestant(nth, contestant, field, met, missed):
    verdicts = []
    for value in (met, missed):
        numbers = 3 * [value] if field.endswith("medians") else value
        verdicts.append(bars.BARS[nth].verdict(changed(fabricated(), contestant, **{field: numbers})))
    assert ": met, " in verdicts[0], verdicts
    assert ": not met, " in verdicts[1], verdicts


def test_without_its_contestant_or_any_row_a_bar_is_not_measured():
    run = fabricated()
    for bar in bars.BARS:
        name = "vvae_fast cuda" if "cuda" in bar.text else "vvae_fast triton"
        for rows in ([row for row in run.rows if not row.contestant.startswith(name)], []):
            assert bar.verdict(results.Results(run.header, rows)) == f"{bar.text}: not measured"
        nothing = {"median": None, "to_base": None, "to_floor": None, "round_medians": [], "host_round_medians": []}
        refused = [dataclasses.replace(row, **nothing) for row in run.rows]
        assert bar.verdict(results.Results(run.header, refused)) == f"{bar.text}: not measured"


def test_ratios_between_backends_are_of_the_same_rounds():
    """One slow round, in which both were slow, changes nothing."""
    run = changed(fabricated(), "vvae_fast triton", host_round_medians=[200e-6, 2000e-6, 200e-6])
    run = changed(run, "vvae_fast cuda", host_round_medians=[100e-6, 1000e-6, 150e-6])
    assert bars.BARS[7].measured(run) == pytest.approx(median([2.0, 2.0, 4 / 3]))


def test_every_bar_has_a_prediction():
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    rows = re.findall(r"^\| (.* wanted) \| .* \| (?:met|not met|close) \|$", page, re.MULTILINE)
    assert rows == [bar.text for bar in bars.BARS]


def test_every_bar_has_its_case_and_contestants():
    """A bar that names what no session runs would never be measured."""
    cases = {str(case): case for case in GPU_CASES}
    assert {"vvae_fast", "plain loop", "reference", "torch.compile"} <= set(cases[bars.LONG].contestants)
    assert "vvae_fast" in cases[bars.MANY].contestants
    assert "vvae_fast cuda direct" in cases[bars.WIDE].contestants
    assert "vvae_fast cuda direct" in [trial.name for trial in ours("cpu") if trial.role == "form"]
    steps = flows(["triton", "cuda"])
    for optimizer in ("Adam", "fused-Adam"):
        (group,) = (group for group in GPU_GROUPS if str(group) == f"VAE-step-{optimizer}-B512")
        assert group.takes("vanilla")
        assert group.takes("vvae_fast cuda K=80")
        assert "vvae_fast cuda K=80" in steps
        assert "vvae_fast cuda K=80, CUDA graph" in bench_training.names(group, ["triton", "cuda"], in_full=False)


def test_the_larger_batch_of_a_vae_step_is_of_flows_with_shared_parameters(monkeypatch):
    (group,) = (group for group in GPU_GROUPS if str(group) == "VAE-step-fused-Adam-B512")
    taken = [name for name in flows(["cpp"]) if group.takes(name)]
    assert taken == ["vanilla", "no-op K=80", "vvae_fast cpp K=80"]
    assert all(group.takes(name) for group in bench_training.GROUPS for name in flows(["cpp"]))
    asked, make_data = [], bench_training.make_data
    monkeypatch.setattr(bench_training, "make_data", lambda *given: asked.append(given) or make_data(*given))
    cpu = torch.device("cpu")
    bench_training.training_step("vvae_fast cpp K=80", group, cpu, ("cpp",))()
    assert asked == [(cpu, 512)]
    assert make_data(*asked[0]).shape == (512, 784)


def test_whole_steps_in_graphs_are_of_the_larger_batch():
    graphs = ["vanilla, CUDA graph", "vvae_fast cuda K=80, CUDA graph"]
    for group in GPU_GROUPS:
        found = [name for name in bench_training.names(group, ["cuda"], in_full=False) if name.endswith("CUDA graph")]
        assert found == (graphs if group.rows == 512 else [])
    assert [results._role(name, {}) for name in ("vanilla", *graphs)] == ["base", "form", "form"]


@pytest.mark.parametrize("name", ["vanilla", "vvae_fast cpp K=80"])
def test_a_graph_is_checked_before_it_is_timed(monkeypatch, name):
    """By replays of a stand-in for the graph, which runs the step: loss, gradients, and what the optimizer moved."""
    group, cpu = bench_training.Training("Adam", rows=8), torch.device("cpu")
    replays, ways = [], {"right": lambda step: step, "still": lambda step: lambda: torch.zeros(())}
    ways["wrong"] = lambda step: lambda: step() * 1.001
    for way, make in ways.items():
        monkeypatch.setattr(bench_training, "captured", lambda step, make=make: replays.append(1) or make(step))
        bench_training.training_step.cache_clear()
        if way == "right":
            assert bench_training.training_step(f"{name}, CUDA graph", group, cpu, ("cpp",))().isfinite()
            continue
        with pytest.raises(Refused, match="leaves parameters as they were" if way == "still" else "is off by 1.0e-03"):
            bench_training.training_step(f"{name}, CUDA graph", group, cpu, ("cpp",))
    bench_training.training_step.cache_clear()
    assert len(replays) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vanilla", "vvae_fast {} K=80"])
def test_a_step_in_a_graph_trains(gpu_backend, name):
    """The real graph passes the benchmark's own check, and its loss falls."""
    group = next(group for group in GPU_GROUPS if str(group) == "VAE-step-fused-Adam-B512")
    name = f"{name.format(gpu_backend)}, CUDA graph"
    step = bench_training.training_step(name, group, torch.device("cuda"), (gpu_backend,))
    first = step().item()
    for _ in range(50):
        last = step()
    assert last.item() < first
    bench_training.training_step.cache_clear()


def test_the_report_takes_a_gpu_beside_the_cpu(tmp_path):
    run, cpu = fabricated(), stored_run()
    paths = [results.write(x, tmp_path) for x in (run, cpu)]
    assert re.fullmatch(r"a-gpu/torch-2\.11\.0-cu130-[A-Za-z0-9-]+\.json", str(paths[0].relative_to(tmp_path)))
    assert results.read(paths[0]) == run
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{front.START}{front.END}after\n")
    assert report.main(tmp_path, readme) == 0
    page = readme.read_text()
    assert front.NO_GPU not in page
    assert front.readme_section(cpu, paths[1].parent.name) in page
    assert "| 128 x 40, K = 80 | 100 us | 13x | - |" in page
    machine = (tmp_path / "a-gpu" / "README.md").read_text()
    assert "| 128 x 40, K = 80 | 100 us (13x) | 1.30 ms | missing | 12.0 ms (0.11x) | 8.00 us | 1.25x |" in machine
    assert "| 65,536 x 64, K = 32 | 1.25x (10.0 us) | 1.25x (10.0 us) |" in machine
    assert "784-400-40, B = 100, and 512 where the column says so, as a ratio" in machine
    assert "| 4,096 x 64, K = 32 | 3.0 kB |" in machine
    assert "Copy: 4.00 TB/s" in machine
    three = "{0}, both | {0}, forward | {0}, backward"
    columns = " | ".join(three.format(name) for name in ("cuda", "triton", "cuda direct"))
    assert f"| B x D, K | {columns} |" in machine
    times = "100 us | 10.0 us | 10.0 us | 200 us | 20.0 us | 20.0 us"
    assert f"| 4,096 x 512, K = 64 | {times} | 350 us | 35.0 us | 35.0 us |" in machine
    assert f"| 128 x 40, K = 80 | {times} | - | - | - |" in machine
    assert (tmp_path / "a-gpu" / "time.svg").exists()
    assert "## Backends" not in (paths[1].parent / "README.md").read_text()
