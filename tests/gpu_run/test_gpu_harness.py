"""`make gpu` where there is no GPU: its steps and its clock, on stand-ins."""

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the extra [bench] is not installed")

from test_gpu_bars import fabricated

from benchmarks.flow import ceilings, gpu_clock, session
from benchmarks.flow.cases import GPU_CASES, Case
from benchmarks.flow.measure import COPY, Block, Refused, Run, time_limit
from benchmarks.gpu import bars, gpu, gpu_steps
from benchmarks.report import results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def steps(tmp_path):
    with (tmp_path / "gpu.log").open("w") as log:
        yield gpu.Steps(log)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    """Once: with all targets in turn, too."""
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", f"RESULTS={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.fullmatch(r"environment: missing: PyTorch sees no GPU \(\d+\.\d s\)\n", done.stdout), done
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-test.log"]
    assert (tmp_path / "gpu-test.log").read_text() == done.stdout


@pytest.mark.parametrize("target", ["", *gpu.TARGETS])
def test_a_target_of_make_is_one_of_the_harness(target):
    """RESULTS and COMMIT hold for each."""
    name = f"gpu-{target}" if target else "gpu"
    command = ["make", "--no-print-directory", "--dry-run", name, "PYTHON=python", "RESULTS=some folder", "COMMIT=abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = [
        "python",
        "-m",
        "benchmarks.gpu.gpu",
        *filter(None, [target]),
        "--results",
        "some folder",
        "--commit",
        "abc",
    ]
    assert shlex.split(done.stdout) == wanted


def test_another_target_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["tets"])
    assert "TARGET must be one of test, bench, sanitize, tune, got tets" in capsys.readouterr().err


def raising(error):
    def action():
        raise error

    return action


def test_a_step_is_a_line(steps, capsys):
    steps.step("a", lambda: None)
    steps.step("b", lambda: "a note")
    steps.step("c", raising(gpu.Missing("nvcc")))
    assert steps.exit_status == 0
    steps.step("d", raising(gpu.Failed("exit status 2")))
    steps.step("e", raising(ZeroDivisionError("by zero")))
    lines = capsys.readouterr().out.splitlines()
    wanted = ["a: PASS (T)", "b: PASS (T), a note", "c: missing: nvcc (T)"]
    wanted += ["d: FAIL (T), exit status 2", "e: FAIL (T), ZeroDivisionError: by zero"]
    assert [re.sub(r"\(\d+\.\d s\)", "(T)", line) for line in lines] == wanted
    assert steps.exit_status == 1


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["heeded", "ignored"])
def interrupts(request):
    """What the harness does on SIGINT: started with & by a shell script, it ignores it, and so would its commands."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_command_is_seen_as_it_comes_and_ends_in_time(steps, tmp_path, capsys):
    assert steps.command([sys.executable, "-c", "print('one'); print('two')"], 60) == ["one", "two"]
    with pytest.raises(gpu.Failed, match="exit status 3: last words"):
        steps.command([sys.executable, "-c", "import sys; print('last words'); sys.exit(3)"], 60)
    worker = (
        "import subprocess, sys; print('up'); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    start = time.monotonic()
    with pytest.raises(gpu.Failed, match="not done in 2 s"):
        steps.command([sys.executable, "-c", worker], 2)
    assert time.monotonic() - start < 60  # and not the worker's whole time
    words = (tmp_path / "gpu.log").read_text().split()
    assert words[:6] == ["one", "two", "last", "words", "up", "Traceback"]  # of the interrupt
    assert capsys.readouterr().out == (tmp_path / "gpu.log").read_text()


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_comes_before_the_end_and_lets_a_command_say_what_it_has():
    patient = "import time\ntry: print('up', flush=True), time.sleep(60)\nexcept KeyboardInterrupt: print('one failed')"
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    options["preexec_fn"] = gpu_steps.heed_interrupts
    with subprocess.Popen([sys.executable, "-c", patient], **options) as process:
        assert process.stdout.readline() == "up\n"
        with gpu_steps.ending(process, 0) as late:
            assert process.stdout.read() == "one failed\n"
            assert process.wait() == 0
        assert late.is_set()


def test_what_runs_ends_with_the_harness(tmp_path):
    """Told to end, as by `timeout`, it leaves nothing behind that goes on measuring."""
    worker = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = "import sys; from benchmarks.gpu import gpu_steps; gpu_steps.end_with_what_runs(); "
    code += f"gpu_steps.Steps(open(sys.argv[1], 'w')).command([sys.executable, '-c', {worker!r}], 60)"
    command = [sys.executable, "-c", code, str(tmp_path / "gpu.log")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as harness:
        number = int(harness.stdout.readline())
        harness.terminate()
        assert harness.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    assert (tmp_path / "gpu.log").read_text() == f"{number}\n"


@pytest.fixture
def stand_ins(monkeypatch):
    """A GPU and a toolkit as far as the first steps ask, and commands that all fail."""
    for name in ("environment", "nvcc"):
        monkeypatch.setattr(gpu, name, lambda: "here")
    monkeypatch.setattr(gpu, "toolkit", lambda program: program)
    monkeypatch.setattr(gpu, "architecture", lambda: "9.0")
    monkeypatch.setattr(gpu.prebuilt, "misfit", lambda architecture: "there is no record")
    monkeypatch.setattr(gpu.Steps, "command", raising(gpu.Failed("exit status 1")))
    monkeypatch.setattr(sys, "path", list(sys.path))


STEPS = {
    "test": ["smoke", "tests"],
    "bench": ["benchmarks", "memory", "table"],
    "sanitize": ["sanitizer"],
    "tune": ["backends"],
}


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("target", gpu.TARGETS)
def test_a_failing_step_stops_none_behind_it(steps, tmp_path, target):
    assert gpu.run(target, steps, tmp_path, None) == 1
    names = ["build", *STEPS[target]]
    assert steps.outcomes == {"environment": "PASS", "nvcc": "PASS"} | dict.fromkeys(names, "FAIL")


@pytest.mark.usefixtures("stand_ins")
def test_a_failing_target_stops_none_behind_it_and_each_has_its_log(tmp_path):
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"gpu-{target}.log" for target in gpu.TARGETS}
    for target, names in STEPS.items():
        lines = (tmp_path / f"gpu-{target}.log").read_text().splitlines()
        assert [line.split(":")[0] for line in lines] == ["environment", "nvcc", "build", *names]


def test_every_target_and_step_has_its_line_in_the_page():
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"| `make gpu-{target}` |" in page and f"`gpu-{target}.log`" in page for target in gpu.TARGETS)
    steps = {"environment", "nvcc", "build", *(name for names in STEPS.values() for name in names)}
    meanings = page[page.index("## What the lines mean") :]
    assert set(re.findall(r"^\| `(\w+)` \|", meanings, re.MULTILINE)) == steps


@pytest.mark.parametrize(("failing", "status"), [(None, 0), ("bench", 1)])
def test_the_exit_status_is_that_of_all_targets(tmp_path, monkeypatch, failing, status):
    run = []

    def one(target, steps, folder, commit):
        steps.outcomes = {"environment": "PASS", "build": "PASS"}
        run.append((target, commit))
        return int(target == failing)

    monkeypatch.setattr(gpu, "run", one)
    assert gpu.main(["--results", str(tmp_path), "--commit", "abc"]) == status
    assert run == [(target, "abc") for target in gpu.TARGETS]
    run.clear()
    assert gpu.main(["tune", "test", "--results", str(tmp_path)]) == 0
    assert run == [("tune", None), ("test", None)]


def test_a_target_is_under_nine_minutes():
    """Each command ends GRACE seconds after its limit at the latest."""
    assert gpu_steps.TOTAL + gpu_steps.GRACE < 540
    assert gpu.BUILD + gpu.SMOKE + gpu.TESTS + 3 * gpu.GRACE < gpu_steps.TOTAL
    assert gpu.BUILD + gpu.FAULT + 2 * gpu.SANITIZED + 4 * gpu.GRACE < gpu_steps.TOTAL


def test_torch_compile_has_its_time_for_a_bar_after_the_longest_build(steps, tmp_path, monkeypatch):
    """Up to two minutes on a CPU; memory, VAE steps and three cases come before."""
    now = time.monotonic()
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    steps.ends = now + gpu_steps.TOTAL - gpu.BUILD
    asked = []
    monkeypatch.setattr(steps, "command", lambda command, limit: asked.append(command))
    with pytest.raises(gpu.Failed, match="no results"):
        gpu.benchmarks(steps, tmp_path, None)
    (seconds,) = (float(x.removeprefix("--seconds=")) for x in asked[0] if x.startswith("--seconds="))
    monkeypatch.setattr(session.time, "time", lambda: 0.0)
    (case,) = (case for case in GPU_CASES if str(case) == bars.LONG)
    assert session.Bench("cpu", quick=True, seconds=seconds).to_compile(case) > 240


def test_torch_compile_leaves_the_cases_behind_its_own_their_time(monkeypatch):
    monkeypatch.setattr(session.time, "time", lambda: 0.0)  # none passes while the test runs
    bench = session.Bench("cpu", quick=True, seconds=240)
    first, last = (case for case in GPU_CASES if "torch.compile" in case.contestants)
    behind = len(GPU_CASES) - 1 - GPU_CASES.index(first)
    assert bench.to_compile(last) == pytest.approx(240 - session.AFTER_COMPILING)
    assert bench.to_compile(first) == pytest.approx(bench.to_compile(last) - session.A_CASE * behind)
    assert session.Bench("cpu", quick=True).to_compile(first) == math.inf


def test_every_test_of_the_gpu_is_in_a_file_that_the_harness_runs():
    marked = [path.name for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    assert all(name.startswith(("test_gpu", "test_triton")) for name in marked)


def test_wall_seconds_wait_for_the_device_twice_and_set_up_before():
    events = []

    def setup():
        events.append("setup")
        return (len(events),), {}

    seconds = gpu_clock.wall_seconds(lambda at: events.append("call"), setup, 3, lambda: events.append("wait"))
    assert events == [*3 * ["setup"], "wait", *3 * ["call"], "wait"]
    assert seconds > 0


class Event:
    """Stands in for torch.cuda.Event: the clock ticks at every record."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_device_seconds_are_between_the_events_of_queued_calls(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(gpu_clock, "_flushed", lambda: torch.empty(8))
    times = gpu_clock.device_seconds(lambda: order.append("call"), None, seconds=1e-3, wall=1e-4)
    assert times == [1e-3] * 3
    assert order == [*3 * ["sleep", "call"], "wait"]
    assert len(gpu_clock.device_seconds(lambda: None, None, seconds=10, wall=1e-6)) == gpu_clock.MOST_CALLS


SHAPE = Case(128, 40, 80)


def gpu_run() -> Run:
    """A run in which the device takes a tenth of what the clock says."""
    run = Run(torch.device("cpu"))
    run.unit_rates["float32"] = {"float32": 4e13, "tf32 / 3": 1e14}
    run.copy_bytes[SHAPE] = 10**9
    for name, wall in ((COPY, 1e-3), ("vvae_fast cpp", 1e-4), ("plain loop", 6e-3), ("torch.compile", 2.5e-4)):
        timing = run.timings[SHAPE, "forward+backward", name]
        timing.rounds, timing.host_rounds = 3 * [[wall / 10] * 5], 3 * [[wall] * 3]
    return run


def test_ratios_to_peers_are_by_the_clock_and_to_the_floor_on_the_device():
    rows = {row.contestant: row for row in results.rows(gpu_run(), session.Bench("cpu", quick=True).contestants)}
    mine = rows["vvae_fast cpp"]
    assert (mine.median, mine.wall, mine.wall_rounds) == (1e-5, 1e-4, [1e-4] * 3)
    assert mine.floor == pytest.approx(SHAPE.floor("forward+backward", 1e13, 1e14), rel=1e-4)
    assert mine.to_floor == pytest.approx(1e-5 / mine.floor, rel=1e-4)
    assert (mine.fastest_peer, mine.to_fastest_peer) == ("torch.compile", 0.4)
    assert (mine.base, mine.to_base, mine.page_faults) == ("plain loop", 0.016667, None)


def test_the_memory_step_reads_the_run(tmp_path):
    run = fabricated()
    with pytest.raises(gpu.Failed, match="no results"):
        gpu.memory(tmp_path, 0.0)
    path = results.write(run, tmp_path)
    assert "vvae_fast cuda saves 0.0 MB at shared-B65536-D64-K32" in gpu.memory(tmp_path, 0.0)
    with pytest.raises(gpu.Failed, match="no results"):
        gpu.memory(tmp_path, path.stat().st_mtime + 1)
    results.write(results.Results(run.header, [row for row in run.rows if row.pass_ != "memory"]), tmp_path)
    with pytest.raises(gpu.Failed, match="lacks the bytes"):
        gpu.memory(tmp_path, 0.0)


def test_benchmarks_that_are_cut_off_leave_their_part_and_its_table(steps, tmp_path, monkeypatch, capsys):
    def cut_off(command, limit):
        run = fabricated()
        results.write(results.Results(run.header | {"kind": "partial"}, run.rows), tmp_path)
        raise gpu.Failed("not done in 380 s")

    monkeypatch.setattr(steps, "command", cut_off)
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu.measured(steps, tmp_path, None)
    assert steps.outcomes == {"benchmarks": "FAIL", "memory": "PASS", "table": "PASS"}
    assert "cuda, forward on the device, us, at most 12 wanted: met, 10.00" in capsys.readouterr().out


def test_a_session_whose_time_is_up_keeps_what_it_has():
    bench = session.Bench("cpu", quick=True, seconds=-1.0)
    begun, late = (Block(SHAPE, "forward", name, 1) for name in ("plain loop", "no-op"))
    bench.run.timings[SHAPE, "forward", "plain loop"].rounds.append([1.0])
    for block in (begun, late):
        with pytest.raises(pytest.skip.Exception), bench.recording(block):
            pytest.fail("it was run")
    statuses = {name: timing.status for (_, _, name), timing in bench.run.timings.items()}
    assert statuses == {"plain loop": "ok", "no-op": session.OUT_OF_TIME}
    assert bench.cut_short


def test_what_takes_too_long_to_prepare_is_refused():
    def compile_for_ever():
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    with pytest.raises(Refused, match="not ready after 0 s"), time_limit(0.05):
        compile_for_ever()
    with time_limit(math.inf):
        pass


def test_a_commit_is_named_where_git_knows_none(monkeypatch):
    monkeypatch.setattr(results, "_git", lambda *_: None)
    for named, wanted in ((None, ("unknown", True)), ("abc", ("abc", False)), ("abc-dirty", ("abc", True))):
        header = results.header(Run(torch.device("cpu")), "full", 1.0, named)
        assert (header["commit"], header["dirty"]) == wanted


def test_rates_have_the_name_of_their_unit():
    (name,) = ceilings.matrix_product_rates(torch.float64, torch.device("cpu"), repeats=1, size=64)
    assert name == "float64"
