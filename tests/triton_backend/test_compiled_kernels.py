"""Every kernel that the table can choose compiles for GPUs that are not here, and spills no register."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from compiled import TRITON_TARGETS, compile_triton, table_of
from triton_cases import cases, of_report, spills_some

from benchmarks.sass import sass_report, sass_tables

pytestmark = pytest.mark.long
LEAST_SHARED_MEMORY = 64 * 1024  # bytes a program; what every one of the targets has
MOST_SPILLED = 512  # bytes a thread, of the largest Sylvester flows' adjoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of NVIDIA's machine code, a folder a target."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def compiled(folder):
    """What each target's compiler made of the kernels; the targets side by side."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda target: compile_triton(target, cases(target), folder / target), TRITON_TARGETS)
        return dict(zip(TRITON_TARGETS, found, strict=True))


@pytest.mark.parametrize("target", TRITON_TARGETS)
def test_kernels_fit(compiled, target):
    rows = compiled[target]
    compact = {f"compact_{name}_kernel" for name in ("forward", "backward", "gradients", "finish")}
    direct = {"direct_forward_kernel", "direct_backward_kernel", "add_partials_kernel"}
    passes = ("forward", "inverse", "passed", "backward", "inverse_backward", "products", "sums")
    always = direct | {f"sylvester_{name}_kernel" for name in passes}
    assert {row["kernel"] for row in rows} == (always if target == "gfx942" else always | compact)
    assert [row for row in rows if row["shared"] > LEAST_SHARED_MEMORY] == []
    spilled = [row for row in rows if row["spilled"]]
    assert [row for row in spilled if row["spilled"] > MOST_SPILLED or not spills_some(tuple(row["case"]))] == []
    assert all(0 < row["registers"] <= 512 for row in rows)  # the registers were read


def test_no_kernel_costs_more_than_the_table_says(compiled, folder):
    """`make sass` makes the table anew; the figures depend on the compiler."""
    tools, table = table_of("triton")
    target = sass_report.ARCH
    launches = [launch for launch in compiled[target] if of_report(tuple(launch["case"]))]
    rows = sass_tables.rows_of_launches(launches, folder / target, tools)
    assert sass_report.worse(rows, table) == []


def variants(problems: list[tuple]) -> dict[str, int]:
    script = Path(__file__).with_name("count_variants.py")
    command = [sys.executable, str(script), json.dumps(problems)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=script.parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_batch_size_and_steps_compile_nothing_new():
    """Training's last batch is smaller, and a study has many K: neither waits for the compiler."""
    problems = [(rows, 40, num_steps, False) for rows in (128, 100, 33) for num_steps in (80, 16, 5, 2)]
    assert set(variants(problems).values()) == {1}
    problems = [(rows, 40, 16, True) for rows in (128, 100, 33, 3)]
    assert set(variants(problems).values()) == {1}
    problems = [(rows, 64, 32, False) for rows in (4096, 4000, 2000)]
    assert set(variants(problems).values()) == {1}
    problems = [(rows, 40, num_steps, False, True) for rows, num_steps in ((128, 80), (33, 16), (33, 2))]
    assert set(variants(problems).values()) == {1}
    for inverse in (False, True):
        problems = [("sylvester", rows, 32, layers, False, inverse) for rows, layers in ((128, 4), (33, 3), (3, 2))]
        counts = variants(problems)
        assert max(counts.values()) == 2  # of products of two widths
        assert [name for name, count in counts.items() if count > 1] == ["sylvester_products_kernel"]
        problems = [("sylvester", rows, 32, layers, True, inverse) for rows, layers in ((128, 4), (33, 3), (3, 2))]
        assert set(variants(problems).values()) == {1}
