"""The benchmark suite itself: its floor, its refusals, its records and its report."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the extra [bench] is not installed")

from benchmarks.flow import bench_training
from benchmarks.flow.cases import FAST, GPU_CASES, GPU_MEMORY_CASES, MEMORY_CASES, PLANAR_CASES, Case
from benchmarks.flow.contestants import Contestant, Prepared, Unavailable, cuda_direct, no_op, ours
from benchmarks.flow.loops import plain_loop
from benchmarks.flow.measure import COPY, Block, Refused, Run, Stage, make_inputs
from benchmarks.flow.memory import peak_bytes, saved_bytes
from benchmarks.flow.peers import peers
from benchmarks.flow.session import Bench
from benchmarks.report import front, report, results, tables
from vvae_fast import PlanarFlow
from vvae_fast.backends import cpp, cuda

ROOT = Path(__file__).parents[2]
SMALL = Case(6, 3, 2)
RUNS_HERE = [trial for trial in ours("cpu") if trial.runs]


def contestant(flow, role="peer", **fields) -> Contestant:
    return Contestant("trial", role, lambda inputs: Prepared(partial(flow, *inputs), inputs), **fields)


def refusal(case: Case, trial: Contestant) -> str:
    with pytest.raises(Refused) as caught:
        Stage(case, torch.device("cpu")).prepared(trial)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "pass_", "traffic", "flops"),
    [
        (Case(100, 2, 8), "forward", 4 * (100 * (4 + 1 + 8) + 32), 6_400 + 16_000),
        (Case(100, 2, 8), "backward", 4 * (100 * (6 + 1 + 8) + 64), 12_800 + 16_000),
        (Case(10, 3, 2, amortized=True, dtype="float64"), "forward", 8 * 10 * (6 + 1 + 2 + 14), 600),
        (Case(10, 3, 2, amortized=True, dtype="float64"), "backward", 8 * 10 * (9 + 1 + 2 + 28), 1_440),
    ],
)
def test_traffic_and_flops(case, pass_, traffic, flops):
    assert (case.traffic(pass_), case.flops(pass_)) == (traffic, flops)


def test_floor_is_the_slower_of_memory_and_arithmetic():
    case = Case(100, 2, 8)
    assert case.floor("forward", bandwidth=1_000, rate=1e5) == 5.328
    assert case.floor("forward", bandwidth=1e5, rate=1_000) == 22.4
    assert case.floor("forward+backward", bandwidth=1e5, rate=1_000) == pytest.approx(22.4 + 28.8)
    assert case.traffic("forward+backward") == 5_328 + 6_256


def test_names_are_unique_and_the_report_knows_them():
    for cases in (PLANAR_CASES, MEMORY_CASES, GPU_CASES, GPU_MEMORY_CASES):
        assert len({str(case) for case in cases}) == len(cases)
    assert {*front.HEADLINE, *tables.FLOOR_CASES} <= {str(case) for case in PLANAR_CASES}
    assert set(tables.GPU_FLOOR_CASES) <= {str(case) for case in GPU_CASES}


def test_registry_covers_the_sizes():
    for field, smallest, largest in (("rows", 1, 262_144), ("dim", 2, 1024), ("num_steps", 1, 256)):
        sizes = [getattr(case, field) for case in PLANAR_CASES]
        assert (min(sizes), max(sizes)) == (smallest, largest)


def test_inputs_suit_a_contestant_without_a_constraint():
    """pythae's tolerance rests on |det| > 0.5: det = 1 + c h' with c = w . u and 0 < h' <= 1."""
    for case in (
        case for case in [*PLANAR_CASES, *MEMORY_CASES] if "pythae" in case.contestants and not case.amortized
    ):
        _, u, w, _ = make_inputs(case)
        assert (u * w).sum(-1).min() > -0.5, case


@pytest.mark.parametrize("case", [SMALL, Case(5, 3, 4, amortized=True), Case(1, 1, 1, dtype="float64")], ids=str)
@pytest.mark.parametrize("trial", [*RUNS_HERE, *peers()], ids=lambda trial: trial.name)
def test_contestants_agree_with_the_oracle(case, trial):
    amortized_peer = case.amortized and trial.name in ("normflows", "pythae")
    if amortized_peer:
        assert refusal(case, trial) == f"not run: {trial.name} has no amortized parameters"
    else:
        Stage(case, torch.device("cpu")).prepared(trial)


def spoiled(index, spoil):
    """The plain loop with one output changed."""

    def flow(*inputs):
        outputs = list(plain_loop(*inputs))
        outputs[index] = spoil(outputs[index])
        return outputs

    return flow


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return u.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.001 * grad


def test_a_wrong_contestant_is_refused_before_timing():
    assert refusal(SMALL, contestant(spoiled(0, lambda z: 1.001 * z))).startswith("wrong: z_K is off by 1.0e-03")
    assert refusal(SMALL, contestant(spoiled(1, lambda x: x + 1e-3))).startswith("wrong: log_det")
    assert refusal(SMALL, contestant(spoiled(1, lambda x: x * float("nan")))).startswith("wrong: log_det")
    assert refusal(SMALL, contestant(spoiled(1, lambda x: x[:, None]))).startswith("failed: RuntimeError")
    wrong_du = contestant(lambda z, u, w, b: plain_loop(z, WrongGradient.apply(u), w, b))
    assert refusal(SMALL, wrong_du).startswith("wrong: du is off by 1.0e-03")
    assert refusal(Case(6, 3, 2, dtype="float64"), contestant(spoiled(0, lambda z: (1 + 1e-9) * z))).startswith("wrong")
    Stage(SMALL, torch.device("cpu")).prepared(contestant(plain_loop))
    Stage(SMALL, torch.device("cpu")).prepared(contestant(no_op, role="no-op"))


def test_slack_is_for_log_det_alone():
    slack = {"log_det_slack": 2e-4}
    Stage(SMALL, torch.device("cpu")).prepared(contestant(spoiled(1, lambda x: x + 1e-4), **slack))
    assert refusal(SMALL, contestant(spoiled(1, lambda x: x + 1e-3), **slack)).startswith("wrong: log_det")
    assert refusal(SMALL, contestant(spoiled(0, lambda z: z + 1e-3), **slack)).startswith("wrong: z_K")


class DoubledLogDet(PlanarFlow):
    """Wrong on every backend but the reference."""

    def forward(self, z):
        z_K, log_det = super().forward(z)
        return z_K, log_det if self.backend == "reference" else 2 * log_det


def test_wrong_flow_of_the_vae_step_is_refused():
    cpu = torch.device("cpu")
    x = bench_training.make_data(cpu)
    bench_training.check(bench_training.make_model(lambda: PlanarFlow(40, 4), cpu), x)
    with pytest.raises(Refused, match="wrong: loss or gradient"):
        bench_training.check(bench_training.make_model(lambda: DoubledLogDet(40, 4), cpu), x)


def timed_run(seconds: dict[str, list[float]]) -> Run:
    """A run in which each contestant's rounds gave these medians."""
    run = Run(torch.device("cpu"))
    run.unit_rates["float32"], run.copy_bytes[SMALL] = {"float32": 1e12}, 1_000
    for name, rounds in seconds.items():
        timing = run.timings[SMALL, "forward", name]
        timing.rounds = timing.host_rounds = [[x, x, x] for x in rounds]
        timing.page_faults = [0.0] * len(rounds)
    return run


def test_rows_have_their_ratios():
    run = timed_run({COPY: [1e-6, 2e-6, 1e-6], "vvae_fast cpp": [4e-6, 5e-6, 4e-6], "plain loop": [8e-6, 20e-6, 12e-6]})
    bench = Bench("cpu", quick=True)
    rows = {row.contestant: row for row in results.rows(run, bench.contestants)}
    mine, loop = rows["vvae_fast cpp"], rows["plain loop"]
    assert mine.floor == pytest.approx(SMALL.traffic("forward") / (1_000 / 1e-6), rel=1e-4)
    assert mine.to_floor == pytest.approx(4e-6 / mine.floor, rel=1e-4)
    assert (mine.fastest_peer, mine.to_fastest_peer) == ("plain loop", pytest.approx(4 / 12, rel=1e-4))
    assert (mine.base, mine.base_ratios, mine.to_base) == ("plain loop", [0.5, 0.25, 0.33333], 0.33333)
    assert (loop.role, rows[COPY].role, rows[COPY].to_floor) == ("peer", "copy", None)
    assert (tables.cell(mine), tables.cell(loop)) == ("4.00 us (3.00x)", "12.0 us~")
    without = timed_run({"vvae_fast cpp": [4e-6], "reference": [8e-6]})
    assert {row.base for row in results.rows(without, bench.contestants)} == {None}


def test_a_refused_contestant_is_a_row():
    bench = Bench("cpu", quick=True)

    def missing(inputs):
        raise Unavailable("missing: no such package")

    def failing(inputs):
        raise ZeroDivisionError("two\nlines")

    for name, role, build, outcome in (
        ("a", "peer", missing, pytest.skip.Exception),
        ("b", "peer", failing, pytest.skip.Exception),
        ("c", "ours", missing, pytest.skip.Exception),
        ("d", "ours", failing, pytest.fail.Exception),  # a package that fails its own benchmark says so loudly
    ):
        bench.contestants[name] = Contestant(name, role, build)
        block = Block(SMALL, "forward", name, 0)
        with pytest.raises(outcome), bench.recording(block):
            bench.prepared(block)
    rows = {row.contestant: row for row in results.rows(bench.run, bench.contestants)}
    assert [rows[name].status for name in "abcd"] == 2 * ["missing: no such package", "failed: ZeroDivisionError: two"]
    assert all(row.median is None for row in rows.values())


def test_a_backend_for_another_device_says_so():
    names = {trial.name: trial for trial in ours("meta")}
    assert not names["vvae_fast cpp"].runs
    assert "runs on cpu tensors" in refusal(SMALL, names["vvae_fast cpp"])


def test_the_direct_form_is_asked_for_in_each_pass_and_given_up_behind_it(monkeypatch):
    """The cuda backend's operators are the CPU's here."""
    asked = []
    monkeypatch.setattr(cuda, "set_form", asked.append)
    monkeypatch.setattr(cuda, "CUDA", cpp.CPP)
    stage = Stage(SMALL, torch.device("cpu"))
    prepared = stage.prepared(contestant(cuda_direct, role="form"))
    assert asked == 2 * ["direct", "automatic"]
    outputs = prepared.forward()
    assert asked[4:] == ["direct", "automatic"]
    torch.autograd.grad(outputs, prepared.leaves, stage.grads)
    assert asked[6:] == ["direct", "automatic"]
    monkeypatch.setattr(cuda, "CUDA", None)
    assert refusal(SMALL, contestant(cuda_direct, role="form")).startswith("failed: ")
    assert asked[-1] == "automatic"


def test_a_form_is_a_contestant_where_a_case_names_it_and_never_ours():
    bench = Bench("cpu", quick=True)
    direct = bench.contestants["vvae_fast cuda direct"]
    assert (direct.role, direct.runs) == ("form", False)
    assert refusal(SMALL, direct).startswith(("missing", "not run"))
    wide, other = Case(6, 3, 2, contestants=("vvae_fast", "vvae_fast cuda direct")), Case(6, 3, 2, contestants=FAST)
    assert bench.names(wide).count("vvae_fast cuda direct") == 1
    assert "vvae_fast cuda direct" not in bench.names(other)
    assert "vvae_fast cuda" in bench.names(other)
    assert "cuda direct" not in bench.backends
    bench.contestants["vvae_fast cuda direct"] = contestant(plain_loop, role="form")
    run = timed_run({"vvae_fast cuda": [4e-6], "vvae_fast cuda direct": [1e-6], "plain loop": [8e-6]})
    rows = {row.contestant: row for row in results.rows(run, bench.contestants)}
    assert {row.base for row in rows.values()} == {"plain loop"}
    assert rows["vvae_fast cuda"].fastest_peer == "plain loop"
    picked = tables.pick(results.Results({}, list(rows.values())), "forward", str(SMALL))
    assert picked[tables.OURS].contestant == "vvae_fast cuda"


def test_saved_bytes_are_z_and_the_pre_activations():
    case = Case(4096, 64, 32)
    stage = Stage(case, torch.device("cpu"))
    saved, beside_inputs = saved_bytes(stage.prepared(RUNS_HERE[0]))
    assert 0 <= saved - 4 * 4096 * (64 + 32) < 32_768
    assert 0 <= beside_inputs - 4 * 4096 * 32 < 32_768


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak bytes on a CPU are measured on Linux")
def test_peak_bytes_counts_what_a_call_touches():
    case = Case(8192, 64, 4)
    z_K_and_gradient = 2 * 4 * 8192 * 64
    peak = peak_bytes(Stage(case, torch.device("cpu")), Contestant("no-op", "no-op", build_no_op))
    assert abs(peak - z_K_and_gradient / 2) < 1.5e6  # the no-op's dz is the incoming gradient


def build_no_op(inputs):
    return Prepared(partial(no_op, *inputs), inputs)


def stored_run() -> results.Results:
    """Three cases: one in which ours is faster than the peer, one in which it is not, one without a peer."""
    fields = {"role": "ours", "status": "ok", "dim": 64, "num_steps": 32, "amortized": False, "dtype": "float32"}
    rows = []
    for B, peer in ((1, 0.5), (10, 2.0), (100, None)):
        shared = {**fields, "case": f"shared-B{B}-D64-K32", "pass_": "forward", "rows": B}
        peers_ratio = {"fastest_peer": "pythae", "to_fastest_peer": 1 / peer} if peer else {}
        rows.append(
            results.Row(**shared, contestant="vvae_fast cpp", median=1e-4, floor=5e-5, to_floor=2.0, **peers_ratio)
        )
        if peer:
            shared |= {"role": "peer", "contestant": "pythae"}
            rows.append(results.Row(**shared, median=peer * 1e-4, to_base=peer, base_ratios=[peer]))
    header = results.header(Run(torch.device("cpu")), "full", 1.0)
    return results.Results(header, rows)


def test_report_says_where_a_peer_is_faster():
    run = stored_run()
    sentence = tables.where_not_fastest(run)
    assert "not the fastest in 1 of 2 comparisons" in sentence
    assert "1 x 64, K = 32, forward (pythae takes 0.50 of its time)" in sentence
    faster = results.Results(run.header, [row for row in run.rows if row.rows != 1])
    assert "is the fastest in all 1 comparisons" in tables.where_not_fastest(faster)
    assert tables.where_not_fastest(faster).endswith(
        "at all in it: plain loop, torch.compile, reference, normflows, Pyro, flowjax."
    )
    assert tables.where_not_fastest(results.Results(run.header, [])) == ""


def test_noisy_rounds_and_floors_below_a_function_call_are_marked():
    (row,) = (row for row in stored_run().rows if row.rows == 100)
    assert tables.cell(dataclasses.replace(row, round_medians=[1.0, 1.6, 1.2])) == "100 us~"
    assert tables.cell(dataclasses.replace(row, round_medians=[1.0, 1.4, 1.2])) == "100 us"
    assert tables.floor_ratio(row) == "2.00x"
    assert tables.floor_ratio(dataclasses.replace(row, floor=1.9e-6)) == "-"


def test_the_section_says_when_no_gpu_was_measured():
    run = stored_run()
    gpu = results.Results({**run.header, "device": "cuda"}, run.rows)
    page = f"{front.START}{front.END}"
    assert front.NO_GPU in front.with_section(page, {"cpu": run})
    assert front.NO_GPU not in front.with_section(page, {"cpu": run, "gpu": gpu})


def test_results_are_read_as_they_were_written(tmp_path):
    run = stored_run()
    path = results.write(run, tmp_path)
    assert results.read(path) == run
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 1 + len(run.rows)
    quick = results.Results({**run.header, "kind": "quick", "date": "2999"}, run.rows)
    assert results.write(quick, tmp_path).name.startswith("quick-")
    assert results.newest(folder=tmp_path) == {path.parent.name: path}


def test_uncommitted_changes_are_in_the_name(tmp_path):
    run = stored_run()
    names = [results.write(results.Results({**run.header, "dirty": x}, []), tmp_path).stem for x in (False, True)]
    assert names[1] == f"{names[0]}-dirty"


@pytest.mark.parametrize("spoiled", ["", "{", "[]", "null", '{"header": {}, "rows": []}', "\0\0", "old", "row"])
def test_report_names_a_file_it_cannot_read_and_writes_nothing(tmp_path, capsys, spoiled):
    run = stored_run()
    path = results.write(results.Results({**run.header, "dirty": False}, run.rows), tmp_path)
    written = json.loads(path.read_text())
    if spoiled == "old":
        del written["header"]["dirty"]
    elif spoiled == "row":
        written["rows"][0]["renamed"] = 1
    path.write_text(json.dumps(written) if spoiled in ("old", "row") else spoiled)
    readme = tmp_path / "README.md"
    readme.write_text(f"{front.START}old\n{front.END}\n")
    assert report.main(tmp_path, readme) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"cannot read {path} (truncated, or of another version): delete it or run `make bench` again"
    assert "old" in readme.read_text()
    assert not (path.parent / "README.md").exists()


def test_readme_is_what_the_report_writes_from_the_committed_results():
    newest = results.newest(results.committed())
    assert newest
    readme = (ROOT / "README.md").read_text()
    runs = {machine: results.read(path) for machine, path in newest.items()}
    assert front.with_section(readme, runs) == readme
    for machine, run in runs.items():
        assert (results.FOLDER / machine / "README.md").read_text() == report.machine_page(run)


def test_report_replaces_the_section_alone():
    page = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    written = front.with_section(page, {"machine": stored_run()})
    assert written.startswith("before\n<!-- bench -->\n")
    assert written.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in written


def session(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The quick run with further options."""
    options = ["-q", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *options, "--quick", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_session_with_an_unusable_folder_for_results(tmp_path):
    """It says so before anything is measured."""
    (tmp_path / "file").touch()
    done = session("--results", str(tmp_path / "file"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"cannot write results to {tmp_path / 'file'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_session_with_missing_and_broken_peers(tmp_path):
    """The command of `make bench-quick` on one pass of one case; two peers are stubs that fail to import."""
    (tmp_path / "normflows.py").write_text("raise ImportError('No module named normflows')")
    (tmp_path / "pythae.py").write_text("raise RuntimeError('broken')")
    names = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    only = "bench_planar and B100-D2-K8-forward- and not Pyro"
    done = session("--results", str(tmp_path), "-k", only, **names)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*/*.json")
    assert path.name.startswith("partial-"), "a part of the quick run is not the quick run"
    rows = {row["contestant"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["normflows"]["status"] == "missing: No module named normflows (pip install normflows)"
    assert rows["pythae"]["status"] == "failed: RuntimeError: broken"
    assert rows["torch.compile"]["status"].startswith("not run")
    assert rows["reference"]["status"] == "ok"
    assert rows["plain loop"]["median"] > rows["no-op"]["median"] > 0
    assert {row.get("base") for row in rows.values() if "median" in row} == {"plain loop"}
