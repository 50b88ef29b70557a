"""The script that writes the kernels' table: what it tries, what it keeps, what it writes. Nothing is timed here."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu import tune_triton
from benchmarks.gpu.tune_triton import Entry
from vvae_fast.triton import _heuristics, _table
from vvae_fast.triton.launch import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRY = Entry("DIRECT", ("backward", "shared", 4), 0)


@pytest.fixture
def table(monkeypatch):
    """The tables, put back afterwards, and small problems."""
    for form in ("DIRECT", "COMPACT"):
        monkeypatch.setattr(_table, form, dict(getattr(_table, form)))
    monkeypatch.setattr(tune_triton, "FEW", 40)
    monkeypatch.setattr(tune_triton, "NUM_STEPS", 2)


def test_the_committed_table_is_what_the_script_writes():
    assert tune_triton.render(_table.MEASURED_ON) == Path(_table.__file__).read_text()


@pytest.mark.usefixtures("table")
def test_a_changed_table_is_written_and_read_back():
    ENTRY.set((16, 2, 1))
    names = {}
    exec(tune_triton.render("NVIDIA H200"), names)
    assert names["MEASURED_ON"] == "NVIDIA H200"
    assert names["DIRECT"][ENTRY.key][0] == (16, 2, 1)
    assert names["DIRECT"][ENTRY.key][1] == _table.DIRECT[ENTRY.key][1]


@pytest.mark.parametrize("entry", tune_triton.entries(), ids=str)
def test_candidates_are_launches_that_keep_the_bits_of_a_row(entry):
    found = list(tune_triton.candidates(entry))
    assert len(found) == len(set(found)) > 1
    assert entry.value in found
    for rows, second, third in found:
        assert rows >= 1
        assert min(second, third) >= 1
        if entry.form == "DIRECT" and rows > 1:
            assert rows * entry.key[-1] >= _table.LEAST_ELEMENTS * 32 * second


@pytest.mark.parametrize("entry", tune_triton.entries(), ids=str)
def test_an_entry_is_timed_on_a_problem_that_reads_it(entry, monkeypatch):
    z, u, *_ = tune_triton.problem_of(entry, "meta")
    for form in ("DIRECT", "COMPACT"):
        monkeypatch.setattr(_table, form, dict(getattr(_table, form)))
    before = launches(entry, z, u)
    entry.set((7, 7, 7))
    assert launches(entry, z, u) != before


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("key", [("forward", "shared", 4), ("backward", "shared", 4)])
def test_a_candidate_is_what_is_launched(key, monkeypatch):
    """Not the plan of the entry before."""
    entry, launched = Entry("DIRECT", key, 0), []
    monkeypatch.setattr(Launch, "__call__", lambda planned, *tensors: launched.append(planned))
    call, _ = tune_triton.pass_of(entry, tune_triton.problem_of(entry, "meta"))
    for value in ((64, 1, 2), (64, 2, 2), (128, 2, 3)):
        entry.set(value)
        launched.clear()
        call()
        assert launched[0].arguments[-1] == value[2]
        assert value[0] in launched[0].arguments
        assert launched[0].options["num_warps"] == value[1]


def launches(entry, z, u) -> tuple:
    if entry.form == "COMPACT":
        return _heuristics.compact(entry.key[0], len(z), z.shape[1], True, torch.float32)
    return _heuristics.direct(entry.key[0], len(z), z.shape[1], u.dim() == 2, torch.float32)


def scripted(times: dict[tuple, float]):
    """A clock that runs the call and reports what the entry's value is said to take."""

    def median_ms(call) -> float:
        call()
        return times.get(ENTRY.value, 2.0)

    return median_ms


@pytest.mark.usefixtures("table")
def test_the_fastest_right_candidate_stays():
    standing = ENTRY.value
    fast = (2 * standing[0], 1, standing[2])
    assert tune_triton.tune(ENTRY, scripted({fast: 1.0}), DEVICE) == (2.0, 1.0)
    assert ENTRY.value == fast


@pytest.mark.usefixtures("table")
def test_a_little_faster_is_noise():
    standing = ENTRY.value
    tune_triton.tune(ENTRY, scripted({(2 * standing[0], 1, standing[2]): 1.98}), DEVICE)
    assert ENTRY.value == standing


@pytest.mark.usefixtures("table")
def test_wrong_or_failing_candidates_do_not_stay(capsys):
    standing = ENTRY.value

    def median_ms(call) -> float:
        if ENTRY.value[0] > standing[0]:
            raise RuntimeError("out of resource: shared memory")
        if ENTRY.value == standing:
            call()
            return 2.0
        return 1.0  # and leaves NaN in the outputs

    assert tune_triton.tune(ENTRY, median_ms, DEVICE) == (2.0, 2.0)
    assert ENTRY.value == standing
    printed = capsys.readouterr().out
    assert "RuntimeError" in printed
    assert "wrong" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the script would tune for")
def test_without_a_gpu_it_says_so(capsys):
    assert tune_triton.main([]) == 1
    assert capsys.readouterr().out == "missing: PyTorch sees no GPU\n"
