"""Every kernel that the table can choose compiles for GPUs that are not here, and spills no register."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from vvae_fast.kernels import _table

TARGETS = {"sm_80": ["cuda", 80, 32], "sm_90": ["cuda", 90, 32], "gfx942": ["hip", "gfx942", 64]}
LEAST_SHARED_MEMORY = 64 * 1024  # bytes a program; what every one of the targets has


def cases(target: str) -> list[tuple[str, int, int, int, int, str]]:
    """(form, rows, D, K, parameter sets, dtype, *formulas), such that sm_90 uses each entry of the table.

    The others compile those of a few block sizes, for time.
    """
    found = set()
    for _, parameters, block_dim in _table.DIRECT:
        sets = {"shared": 1, "amortized": _table.FEW_ROWS}[parameters]
        some = block_dim in (1, 8, 64, 256, 1024)
        if target == "sm_90" or some:
            found.add(("direct", _table.FEW_ROWS, block_dim, 16, sets, "float32"))
        if (target != "gfx942" and some) or block_dim == 64:
            found.add(("inverse", _table.FEW_ROWS, block_dim, 16, sets, "float32"))
        if target == "sm_90" or (target == "sm_80" and some):
            found.add(("direct", 2 * _table.FEW_ROWS, block_dim, 16, min(2 * sets, sets**2), "float32"))
        if target == "sm_90" and some:
            found.add(("direct", _table.FEW_ROWS, block_dim, 16, sets, "float64"))
    found |= {("direct", 128, 40, 80, 1, dtype) for dtype in ("float32", "bfloat16", "float16")}
    found |= {("direct", 300, 40, 16, 100, dtype) for dtype in ("float32", "bfloat16")}
    if target != "gfx942":  # there the compact form does not run
        found |= {("compact", rows, dim, 32, 1, "float32") for rows in (4096, 65536) for dim in (64, 500)}
    if target == "sm_90":
        found |= {("compact", 4096, 64, 32, 1, "float64"), ("compact", 4096, 500, 32, 1, "bfloat16")}
        found.add(("compact", 256, 40, 5, 4, "float32"))
        found |= {("inverse", _table.FEW_ROWS, dim, 16, sets, "float64") for dim, sets in ((64, 1), (1024, 4096))}
        found |= {("inverse", 128, 40, 16, 1, "float32", "softplus", activation) for activation in ("elu", "sigmoid")}
        others = [("log_softplus", activation, 0.2, 1e-4) for activation in ("leaky_relu", "elu", "sigmoid", "linear")]
        found |= {("direct", 128, 40, 16, 1, "float32", *formulas) for formulas in others}
        found.add(("compact", 4096, 64, 32, 1, "float32", "log_softplus", "sigmoid", 0.2, 1e-4))
    return sorted(found)


def compile_all(target: str) -> list[dict]:
    script = Path(__file__).with_name("compile_kernels.py")
    command = [
        sys.executable,
        str(script),
        json.dumps(TARGETS[target]),
        json.dumps(cases(target)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=script.parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    """What each target's compiler made of the kernels; the targets side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(TARGETS, pool.map(compile_all, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit(compiled, target):
    rows = compiled[target]
    compact = {f"compact_{name}_kernel" for name in ("forward", "backward", "gradients", "finish")}
    direct = {"direct_forward_kernel", "direct_backward_kernel", "add_partials_kernel"}
    assert {row["kernel"] for row in rows} == (direct if target == "gfx942" else direct | compact)
    assert [row for row in rows if row["spilled"] or row["shared"] > LEAST_SHARED_MEMORY] == []
    assert all(0 < row["registers"] <= 512 for row in rows)  # the registers were read


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
