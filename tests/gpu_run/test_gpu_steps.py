"""The steps of `make gpu` that build, sanitize and compare the cuda backend, where there is neither GPU nor toolkit."""

import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import gpu, prebuilt, sanitize
from vvae_fast.backends import cuda


@pytest.fixture
def steps(tmp_path):
    with (tmp_path / "gpu.log").open("w") as log:
        yield gpu.Steps(log)


class Commands:
    """Stands in for Steps.command: answers with the lines for what the command has in it, and keeps what was asked."""

    def __init__(self, **answers: list[str] | Exception) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, arguments, limit, kept=20, **environment):
        self.asked.append((" ".join(map(str, arguments)), limit, environment))
        for part, answer in self.answers.items():
            if part in self.asked[-1][0]:
                if isinstance(answer, Exception):
                    raise answer
                return answer
        return []


@pytest.fixture
def with_cuda(monkeypatch):
    """A GPU and a toolkit, as far as the steps ask for them, and nothing that was built before."""
    monkeypatch.setattr(prebuilt, "misfit", lambda architecture: "there is no record")
    monkeypatch.setattr(prebuilt, "write", lambda architecture: None)
    monkeypatch.setattr(gpu, "toolkit", lambda program: f"/cuda/bin/{program}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("with_cuda")
def test_the_build_is_for_this_gpu_and_fails_where_the_backend_does_not_load(steps, monkeypatch):
    commands, written = Commands(info=["cuda: "]), []
    monkeypatch.setattr(steps, "command", commands)
    monkeypatch.setattr(prebuilt, "write", written.append)
    assert gpu.build(steps) == "with the backend cuda for 9.0; not the prebuilt ones: there is no record"
    assert written == ["9.0"]
    (build, limit, environment), (ask, _, _) = commands.asked
    assert build.endswith("setup.py -q build_ext --inplace --force")
    assert (limit, environment) == (gpu.BUILD, {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"})
    assert "backends" in ask
    gpu.cuda_reasons.cache_clear()
    monkeypatch.setattr(steps, "command", Commands(info=["a warning", "cuda: it did not load"]))
    with pytest.raises(gpu.Failed, match="was built and cannot run: it did not load"):
        gpu.build(steps)
    assert written == ["9.0"]  # of the first


@pytest.mark.usefixtures("with_cuda")
def test_what_was_built_before_is_taken_where_it_fits_and_loads(steps, monkeypatch):
    monkeypatch.setattr(prebuilt, "misfit", lambda architecture: None)
    commands = Commands(info=["cuda: "])
    monkeypatch.setattr(steps, "command", commands)
    assert gpu.build(steps) == "prebuilt, with the backend cuda for 9.0"
    assert len(commands.asked) == 1
    gpu.cuda_reasons.cache_clear()
    answers = iter([["cuda: libcudart.so is not there"], [], ["cuda: "]])
    monkeypatch.setattr(steps, "command", lambda *arguments, **environment: next(answers))
    rebuilt = "with the backend cuda for 9.0; not the prebuilt ones: libcudart.so is not there"
    assert gpu.build(steps) == rebuilt


@pytest.mark.usefixtures("with_cuda")
def test_an_old_setuptools_is_said_before_it_fails(steps, monkeypatch):
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "76.1.0")
    with pytest.raises(gpu.Missing, match=r"setuptools 77 or newer, .* got 76\.1\.0"):
        gpu.build(steps)


@pytest.mark.usefixtures("with_cuda")
def test_without_nvcc_the_build_leaves_the_backend_out_and_says_so(steps, monkeypatch):
    monkeypatch.setattr(gpu, "toolkit", lambda program: None)
    commands = Commands()
    monkeypatch.setattr(steps, "command", commands)
    with pytest.raises(gpu.Missing, match=r"^nvcc$"):
        gpu.nvcc()
    note = "without the backend cuda: there is no nvcc; not the prebuilt ones: there is no record"
    assert gpu.build(steps) == note
    assert [environment for _, _, environment in commands.asked] == [{}]


def test_the_question_for_the_cuda_backend_is_answered_by_the_package(steps):
    """Executed: it depends on names of the package."""
    assert "CUDA" in gpu.cuda_reasons(steps) or torch.version.cuda


def test_programs_of_the_toolkit_are_found_beside_path(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.toolkit("no-such-program") is None
    for folder, program in (("bin", "nvcc-of-a-test"), ("compute-sanitizer", "sanitizer-of-a-test")):
        path = tmp_path / folder / program
        path.parent.mkdir()
        path.write_text("")
        path.chmod(0o755)
        assert gpu.toolkit(program) == str(path)


CLEAN = ["========= COMPUTE-SANITIZER", "a case", "sanitized 21 of 21 cases", "========= ERROR SUMMARY: 0 errors"]
READ = ["========= COMPUTE-SANITIZER", "========= Invalid __global__ read of size 4 bytes", "=========     at kernel"]
FAULT = [*READ, "Traceback", "========= ERROR SUMMARY: 12 errors"]
NO_RACE = ["sanitized 20 of 21 cases", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"]
RACE = ["========= Error: Race reported between Write access at kernel", *NO_RACE[:1]]
RACE += ["========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"]
REFUSED = ["========= Error: Device not supported. Please refer", "sanitized 21 of 21 cases"]
REFUSED += ["========= ERROR SUMMARY: 2 errors"]


@pytest.mark.usefixtures("with_cuda")
@pytest.mark.parametrize(
    ("answers", "outcome", "note"),
    [
        (
            {"fault": gpu.Failed("exit status 1", FAULT), "memcheck": CLEAN, "racecheck": NO_RACE},
            None,
            "memcheck finds nothing in 21 of 21 cases, racecheck finds nothing in 20 of 21 cases",
        ),
        ({"info": ["cuda: no GPU"]}, gpu.Missing, "the backend cuda: no GPU"),
        ({"fault": CLEAN}, gpu.Missing, "/cuda/bin/compute-sanitizer finds no error where one is"),
        ({"fault": REFUSED}, gpu.Missing, "compute-sanitizer: Error: Device not supported. Please refer"),
        ({"fault": gpu.Failed("exit status 1", ["no such option"])}, gpu.Missing, "no summary: no such option"),
        ({"fault": gpu.Failed("not done in 20 s", [])}, gpu.Missing, "compute-sanitizer: not done in 20 s"),
        ({"fault": FAULT, "memcheck": FAULT}, gpu.Failed, "memcheck finds 12, the first: Invalid __global__ read"),
        (
            {"fault": FAULT, "memcheck": gpu.Failed("exit status 1", ["ValueError: no", CLEAN[-1]])},
            gpu.Failed,
            "memcheck: the cases ended early: ValueError: no",
        ),
        (
            {"fault": FAULT, "memcheck": CLEAN, "racecheck": RACE},
            gpu.Failed,
            "racecheck finds 2, the first: Error: Race reported",
        ),
    ],
    ids=["clean", "no backend", "blind", "refused", "old", "slow", "memory", "early", "race"],
)
def test_what_the_sanitizer_says(steps, monkeypatch, answers, outcome, note):
    commands = Commands(**{"info": ["cuda: "]} | answers)
    monkeypatch.setattr(steps, "command", commands)
    if outcome is None:
        assert gpu.sanitizer(steps) == note
        runs = [(command, limit) for command, limit, environment in commands.asked if environment]
        assert [command.split()[1:3] for command, _ in runs] == [
            ["--tool", x] for x in ("memcheck",) * 2 + ("racecheck",)
        ]
        assert [limit for _, limit in runs] == [gpu.FAULT, gpu.SANITIZED, gpu.SANITIZED]
    else:
        with pytest.raises(outcome, match=re.escape(note)):
            gpu.sanitizer(steps)


def test_without_a_sanitizer_the_step_says_so(steps, monkeypatch):
    monkeypatch.setattr(gpu, "toolkit", lambda program: None)
    with pytest.raises(gpu.Missing, match=r"^compute-sanitizer$"):
        gpu.sanitizer(steps)


def test_the_sanitized_cases_run(monkeypatch, capsys):
    """On the CPU's operators, which take no half precisions: what is made of a case fits them."""
    asked, run = [], sanitize.run

    def on_cpu(case):
        assert {t.dtype for t in sanitize.inputs(case, "cpu")[:5]} == {case.dtype}
        run(case._replace(dtype=torch.float32) if case.dtype == torch.bfloat16 else case, "cpp", "cpu")

    monkeypatch.setattr(cuda, "set_form", asked.append)
    monkeypatch.setattr(sanitize, "run", on_cpu)
    assert sanitize.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"sanitized {len(sanitize.CASES)} of {len(sanitize.CASES)} cases"
    assert lines[0] == "37 rows, shared sets, D = 6, float32, direct"
    assert asked == [case.form for case in sanitize.CASES]
    assert set(asked) == {"direct", "compact", "automatic"}
    assert {case.dtype for case in sanitize.CASES} == {torch.float32, torch.float64, torch.bfloat16}
    samples = {case.rows // case.sets if case.sets else None for case in sanitize.CASES}
    assert samples == {None, 20, 3, 1}
    assert sum(case.inverse for case in sanitize.CASES) == 16
    assert {case.formulas.activation for case in sanitize.CASES} == {"tanh", "elu", "sigmoid"}
    assert sanitize.main(["--seconds=0"]) == 0
    assert capsys.readouterr().out == f"sanitized 0 of {len(sanitize.CASES)} cases\n"


@pytest.mark.usefixtures("with_cuda")
def test_the_backends_are_timed_into_a_file_beside_the_results(steps, monkeypatch, tmp_path):
    commands = Commands(info=["cuda: "])
    monkeypatch.setattr(steps, "command", commands)
    with pytest.raises(gpu.Failed, match="no shape was measured"):
        gpu.backends(steps, tmp_path)
    file = tmp_path / "_measured.py"

    def write(arguments, limit, **environment):
        (wanted,) = (x.removeprefix("--write=") for x in arguments if x.startswith("--write="))
        Path(wanted).write_text("FASTER = {}")
        (seconds,) = (float(x.removeprefix("--seconds=")) for x in arguments if x.startswith("--seconds="))
        assert 0 < seconds < limit < steps.left
        return []

    monkeypatch.setattr(steps, "command", write)
    assert gpu.backends(steps, tmp_path) == f"{file}, to be committed as vvae_fast/backends/_measured.py"
    assert file.exists()


@pytest.mark.usefixtures("with_cuda")
def test_smoke_runs_each_kernel_once(steps, monkeypatch):
    monkeypatch.setattr(steps, "command", Commands(info=["cuda: "], sanitize=["a case", "sanitized 41 of 41 cases"]))
    assert gpu.smoke(steps) == "sanitized 41 of 41 cases"
    gpu.cuda_reasons.cache_clear()
    monkeypatch.setattr(steps, "command", Commands(info=["cuda: no GPU"]))
    with pytest.raises(gpu.Missing, match="the backend cuda: no GPU"):
        gpu.smoke(steps)


def test_the_tests_run_in_many_processes_that_take_each_others_work(steps, monkeypatch):
    commands = Commands(pytest=["== 800 passed, 3 skipped in 170.00s =="])
    monkeypatch.setattr(steps, "command", commands)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    assert gpu.tests(steps) == "800 passed, 3 skipped in 170.00s"
    ((command, limit, _),) = commands.asked
    assert "-n 14 --dist worksteal" in command
    assert limit == 260
    monkeypatch.setattr(steps, "command", Commands(pytest=["== 803 skipped in 1.00s =="]))
    with pytest.raises(gpu.Failed, match="nothing was tested: 803 skipped"):
        gpu.tests(steps)


KEPT = gpu.LAST_BLOCK + gpu.GRACE + gpu.TABLE


@pytest.mark.parametrize(("left", "seconds"), [(500, 500 - KEPT), (200, 200 - KEPT), (30, None)])
def test_the_benchmarks_have_all_the_time_but_for_the_table(steps, monkeypatch, tmp_path, left, seconds):
    now = time.monotonic()
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)  # a busy machine takes seconds to get here
    steps.ends = now + left
    commands = Commands()
    monkeypatch.setattr(steps, "command", commands)
    with pytest.raises(gpu.Failed, match="no results" if seconds else "no time is left"):
        gpu.benchmarks(steps, tmp_path, None)
    if seconds:
        ((command, limit, _),) = commands.asked
        assert f"--seconds={seconds}" in command
        assert limit == pytest.approx(seconds + gpu.LAST_BLOCK)
