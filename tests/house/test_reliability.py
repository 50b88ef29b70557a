"""The tables of docs/reliability.md: every line says what happens and names a test that is there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
ROWS = re.findall(r"^\| (?!fault \||---|command \||`make )(.+) \| (.+) \| (.+) \|$", PAGE, re.M)
KINDS = ["Numbers", "Shapes and memory", "Threads", "Data", "Runs and files", "Modules", "Installing", "Drop-ins"]


def functions_of(path: Path) -> list[str]:
    return [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(("fault", "seen", "test"), ROWS, ids=[fault for fault, _, _ in ROWS])
def test_the_test_exists(fault, seen, test):
    assert fault.strip()
    assert seen.strip()
    named = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", test)
    assert named, f"{test} is no name of a test as `test_file.py::test_name`"
    file, name = named.groups()
    (path,) = TESTS.rglob(file)
    assert functions_of(path).count(name) == 1


def test_every_line_of_a_table_was_read():
    lines = [line for line in PAGE.splitlines() if "::test_" in line and line.startswith("|")]
    assert len(ROWS) == len(lines) > 50


def test_the_page_is_ordered_by_kind():
    assert re.findall(r"^## (.*)$", PAGE, re.M) == KINDS


def test_each_fault_is_told_once():
    faults = [fault for fault, _, _ in ROWS]
    assert len(set(faults)) == len(faults)
