"""What is printed never costs a result: other encodings, readers that go, full disks, closed streams."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vvae_fast.train import cli
from vvae_fast.train.base import memory, output
from vvae_fast.train.cli import main
from vvae_fast.train.run import runs

OPTIONS = "--epochs 2 --batch-size 40 --latent-dim 2 --hidden 3 --steps 1 --num-samples 2"
SMALL = [*OPTIONS.split(), "--seeds", "0", "1"]
PROGRAM = [sys.executable, "-m", "vvae_fast"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path) -> str:
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (60, 9)))
    return str(tmp_path / "bits.npy")


def shell(command: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    """Runs `command` in bash, where $PROGRAM is the program; its exit code is that of $PROGRAM in a pipe, too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": " ".join(PROGRAM), **environment}
    text = f"{command}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_a_table_in_ascii(data, tmp_path):
    command = f"$PROGRAM compare {' '.join(SMALL)} --data {data} --out out"
    done = shell(command, tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert " +- " in done.stdout
    assert done.stdout.isascii()
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


@pytest.mark.parametrize(
    "reader",
    [
        "| head -1",
        "> /dev/full",
        "2>&- >&- <&-",
        *(pytest.param(reader, marks=pytest.mark.long) for reader in ("| true", ">&-")),
    ],
)
def test_readers_that_go_and_streams_that_fail(data, tmp_path, reader):
    done = shell(f"$PROGRAM compare {OPTIONS} --seeds 0 --data {data} --out out {reader}", tmp_path)
    # What fits into a pipe before its reader goes is no failure.
    codes = {"| true": [0, 141], "| head -1": [0, 141], "> /dev/full": [2]}
    assert done.returncode in codes.get(reader, [0])
    error = "vvae-fast: error: the output cannot be written (No space left on device); all else is done\n"
    assert done.stderr == (error if reader == "> /dev/full" else "")
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    files = {path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".csv")}
    assert not any("seed 0: -ELBO" in path.read_text() for path in files), "no file has the closed stream's number"


@pytest.mark.parametrize(
    ("command", "reader"), [("info", "| true"), ("--help", "> /dev/full"), ("bogus", "2>&1 | true")]
)
def test_short_output_into_nowhere(tmp_path, command, reader):
    done = shell(f"$PROGRAM {command} {reader}", tmp_path)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert "check the path and the disk" not in done.stderr
    assert done.returncode in (0, 2, 141)


class Broken:
    encoding, errors = "utf-8", "strict"

    def __init__(self, error: OSError):
        self.error, self.writes = error, 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@pytest.mark.parametrize(
    ("error", "code"), [(BrokenPipeError(32, "Broken pipe"), 141), (OSError(5, "Input/output error"), 2)]
)
def test_the_exit_code_of_output_that_fails(monkeypatch, capsys, error, code):
    stream = Broken(error)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["info"]) == code
    assert stream.writes == 1, "nothing is tried again"
    assert sys.stdout is stream
    said = capsys.readouterr().err
    assert said.count("\n") == (code == 2)
    assert ("Input/output error" in said) == (code == 2)


def test_what_an_encoding_lacks(monkeypatch):

    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "ascii"))
    with output.guarded():
        print("1 ± 2 ━ ü \udcff")
    assert buffer.getvalue() == b"1 +- 2 - \\xfc \\udcff\n"
    assert sys.stdout.errors == "strict"


def test_results_are_written_before_anything_is_printed_or_drawn(data, tmp_path, monkeypatch):
    from vvae_fast.train.study import compare

    class Stop(Exception):
        pass

    def stop(*arguments):
        raise Stop

    for number, name in enumerate(("print_table", "_plot")):
        with monkeypatch.context() as patch:
            patch.setattr(compare, name, stop)
            with pytest.raises(Stop):
                main(["compare", *SMALL, "--data", data, "--out", str(tmp_path / str(number))])
        assert (tmp_path / str(number) / "results.json").exists()


ALLOCATIONS = [
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((10**12,), np.dtype("f8")),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("aoti_torch_empty_strided(...) API call failed at /somewhere/csrc/allocate.h, line 18"),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", ALLOCATIONS, ids=lambda error: type(error).__name__ + str(error)[:9])
def test_memory_that_runs_out_is_one_line_with_advice_that_fits(data, tmp_path, monkeypatch, capsys, error):
    def fail(*arguments, **options):
        raise error

    assert memory.is_out_of_memory(error)
    command = ["train", *SMALL[:-3], "--data", data, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(runs.VAEModule, "training_step", fail)
        assert main(command) == 2
    training = capsys.readouterr().err
    assert "out of memory while training; lower --batch-size" in training
    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate", fail)
        assert main(command) == 2
    evaluating = capsys.readouterr().err
    assert "out of memory while evaluating" in evaluating
    assert "--batch-size" not in evaluating
    assert training.count("\n") == evaluating.count("\n") == 1
    assert main(command) == 0, "what was trained is kept"


def test_other_errors_are_no_memory():
    for error in (RuntimeError("shape '[2]' is invalid"), OSError(28, "No space left on device"), ValueError("memory")):
        assert not memory.is_out_of_memory(error)


def test_a_kernel_that_finds_no_memory_is_known():
    """The real error of the compiled kernels, in a process that may take only a little more than it has."""
    program = """
import resource, torch, vvae_fast
from vvae_fast.train.base.memory import is_out_of_memory
torch.set_num_threads(1)
z, u, w, b = torch.zeros(30_000_000, 2), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1)
vvae_fast.planar_flow(z[:9], u, w, b)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    vvae_fast.planar_flow(z, u, w, b)
except (MemoryError, RuntimeError) as error:
    assert is_out_of_memory(error), error
    print("known")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "known\n", done.stderr


def test_exit_codes_are_told(capsys):
    for command in ([], ["train"], ["compare"], ["density"], ["evaluate"], ["gaps"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert f"{cli.DIVERGED} a run diverged" in printed
        assert f"{cli.OUTPUT_CLOSED} the output's reader has gone" in printed
