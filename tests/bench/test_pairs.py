"""benchmarks/calls: pairs.py, this checkout against another one, head_products.py and headed_width.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.calls import head_products, headed_width, pairs
from benchmarks.flow.cases import Case
from vvae_fast import AmortizedPlanarFlow
from vvae_fast.nn import base, linear

ROOT = Path(__file__).parents[2]
CASE = Case(100, 2, 8)


class Steady:
    """A checkout whose calls take what is written down, one after the other."""

    def __init__(self, log: list, name: str, times: dict[str, list[float]]) -> None:
        self.log, self.name, self.times = log, name, {key: iter(of) for key, of in times.items()}

    def seconds(self, case: Case, contestant: str) -> float:
        self.log.append(self.name)
        return next(self.times[contestant])


def test_rounds_take_turns_and_the_ratio_is_the_median_of_theirs():
    log = []
    this = Steady(log, "this", {"ours": [2.0, 20.0, 6.0], "no-op": [1.0, 1.0, 1.0]})
    other = Steady(log, "other", {"ours": [1.0, 10.0, 1.0], "no-op": [1.0, 2.0, 1.0]})
    found = pairs.compare(CASE, [this, other], 3)
    assert found["ours"] == (6.0, 1.0, 2.0)
    assert found["no-op"] == (1.0, 1.0, 1.0)
    first_of_each_pair = log[::2]
    assert first_of_each_pair == ["this", "this", "other", "other", "this", "this"]


@pytest.mark.parametrize("is_over", [False, True])
def test_a_process_that_ended_is_named(monkeypatch, is_over):
    """Before it is asked, and while it should answer."""
    popen = subprocess.Popen
    ends = [sys.executable, "-c", "" if is_over else "input()", "a checkout"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(ends, **options))
    checkout = pairs.Checkout(ROOT)
    with checkout.process as process:
        if is_over:
            process.wait()
        with pytest.raises(SystemExit, match="the process of a checkout ended: what it said is above"):
            checkout.seconds(CASE, "ours")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.calls.pairs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_this_checkout_against_itself():
    pytest.importorskip("pytest_benchmark", reason="the extra [bench] is not installed")
    done = run(ROOT, "--rounds", 1, "--only", CASE)
    assert done.returncode == 0, done.stderr
    (row,) = done.stdout.splitlines()[1:]
    assert re.fullmatch(r"shared-B100-D2-K8( +\d+\.\d){2}( +\d+\.\d\d){2}", row)


def test_a_folder_without_the_package_is_named(tmp_path):
    done = run(tmp_path, "--rounds", 1, "--only", CASE)
    assert done.returncode == 1
    assert f"{tmp_path} holds no vvae_fast: give the root of a checkout that is built in place" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(linear._onednn is None, reason="this PyTorch has no entry to oneDNN")
def test_head_products(monkeypatch, capsys):
    """Both libraries' products are the same, and a line for each size says which the head takes."""
    for plain, onednn in head_products.products(24, 8).values():
        torch.testing.assert_close(plain(), onednn())
    monkeypatch.setattr(sys, "argv", ["head_products", "1", "1"])
    monkeypatch.setattr(head_products, "SIZES", [(1296, 32), (1296, 400)])
    monkeypatch.setattr(head_products, "quiet", lambda threads: None)
    head_products.main()
    said, *lines = capsys.readouterr().out.splitlines()
    assert said.endswith("1 threads; PyTorch / oneDNN, microseconds")
    assert [line.rsplit(maxsplit=1)[1] for line in lines] == ["PyTorch", "oneDNN"]


def test_headed_width(monkeypatch, capsys):
    """Each width is timed both ways; the lines say which one the flow takes."""
    monkeypatch.setattr(base, "_MOST_HEADED", 8)
    given = []
    monkeypatch.setattr(AmortizedPlanarFlow, "_headed", lambda flow, x: given.append(base._MOST_HEADED))
    monkeypatch.setattr(sys, "argv", ["headed_width", "1", "1"])
    monkeypatch.setattr(headed_width, "WIDTHS", (8, 9))
    monkeypatch.setattr(headed_width, "STEPS", (2,))
    monkeypatch.setattr(headed_width, "quiet", lambda threads: None)
    headed_width.main()
    said, *lines = capsys.readouterr().out.splitlines()
    assert said.endswith("1 threads, B = 100; microseconds")
    assert [line.rsplit(maxsplit=1)[1] for line in lines] == ["inside", "apart"]
    assert list(dict.fromkeys(given)) == [8, 7, 9]
