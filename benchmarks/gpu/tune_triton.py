"""Times the candidates for every entry of the Triton kernels' table on the GPU at hand and writes the fastest into
vvae_fast/triton/_table.py. On an idle GPU:

    python -m benchmarks.gpu.tune_triton [--only forward ...] [--write FILE]

A candidate replaces an entry only if it is 3 % faster and gives the same answer. `--only` takes a part of an entry's
name, such as "direct forward shared 64 few". Each entry and candidate takes about a second, mostly for the compiler.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _table
from vvae_fast.triton.launch import forget_plans

NUM_STEPS = 16
FEW, MANY = 1024, 65536  # rows at which the two entries of a key are timed
GAIN = 0.97  # a new value must take less than this fraction of the present entry's time


class Entry(NamedTuple):
    """One launch of the table: few (0) or many (1) rows of a key."""

    form: str  # "DIRECT" or "COMPACT"
    key: tuple
    column: int

    def __str__(self) -> str:
        return " ".join(map(str, (self.form.lower(), *self.key, ("few", "many")[self.column])))

    @property
    def value(self) -> tuple[int, ...]:
        return getattr(_table, self.form)[self.key][self.column]

    def set(self, value: tuple[int, ...]) -> None:
        both = list(getattr(_table, self.form)[self.key])
        both[self.column] = value
        getattr(_table, self.form)[self.key] = tuple(both)
        forget_plans()  # they were made from the entry before


def entries() -> list[Entry]:
    return [
        Entry(form, key, column) for form in ("DIRECT", "COMPACT") for key in getattr(_table, form) for column in (0, 1)
    ]


def candidates(entry: Entry) -> Iterator[tuple[int, ...]]:
    """Other possible values of an entry: powers of two around the present one."""
    if entry.form == "DIRECT":
        rows, warps, stages = entry.value
        least = _table.LEAST_ELEMENTS * 32 // entry.key[-1]  # rows of a warp: see the table's note on bits
        for more_rows in (rows // 2, rows, rows * 2, rows * 4):
            for more_warps in {warps, 2 * warps} if rows > 1 else {warps}:
                if more_rows >= max(1, least * more_warps):
                    yield from ((more_rows, more_warps, s) for s in range(max(1, stages - 1), stages + 2))
    else:
        rows, block_dim, warps = entry.value
        for more_rows in (rows // 2, rows, rows * 2):
            if more_rows >= 16:
                yield from ((more_rows, block_dim, w) for w in (warps // 2, warps, warps * 2) if 1 <= w <= 16)


def problem_of(entry: Entry, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """z, u, w, b of a problem that the entry serves."""
    rows, dim = (FEW, MANY)[entry.column], entry.key[-1]
    sets = ()
    if "amortized" in entry.key:
        least = 1 if entry.column == 0 else _table.FEW_ROWS + 1
        rows = max(least, min(rows, 2**26 // (NUM_STEPS * dim)))
        sets = (rows,)
    z = torch.randn(rows, dim, device=device)
    u, w = (torch.randn(*sets, NUM_STEPS, dim, device=device) / dim**0.5 for _ in range(2))
    return z, u, w, torch.randn(*sets, NUM_STEPS, device=device)


def pass_of(entry: Entry, inputs: tuple[torch.Tensor, ...]):
    """A call of the pass that the entry belongs to, in its form."""
    z = inputs[0]
    forms = importlib.import_module(f"vvae_fast.triton.{entry.form.lower()}_forward")
    launch = getattr(forms, f"launch_{entry.form.lower()}_forward")
    z_K, log_det, a = outputs = torch.empty_like(z), z.new_empty(len(z)), z.new_empty(NUM_STEPS, len(z))
    if "forward" in entry.key:
        return lambda: launch(inputs, outputs, FlowSpec(), True), outputs
    launch(inputs, outputs, FlowSpec(), True)
    forms = importlib.import_module(f"vvae_fast.triton.{entry.form.lower()}_backward")
    launch_back = getattr(forms, f"launch_{entry.form.lower()}_backward")
    saved, (dz, *gradients) = (z_K, log_det, *inputs[:3]), (torch.empty_like(t) for t in inputs)
    return lambda: launch_back(saved, a, dz, tuple(gradients), FlowSpec()), (dz, *gradients)


def tune(entry: Entry, median_ms, device: str = "cuda") -> tuple[float, float]:
    """Leaves the fastest value in the table; returns the milliseconds before and after."""
    call, outputs = pass_of(entry, problem_of(entry, device))
    before = best = median_ms(call)
    wanted = [t.clone() for t in outputs]
    standing = chosen = entry.value
    for value in candidates(entry):
        entry.set(value)
        for t in outputs:
            t.fill_(float("nan"))
        try:
            time = median_ms(call) if value != standing else before
        except Exception as error:  # too many registers, or too much shared memory, for this GPU
            print(f"    {value}: {type(error).__name__}", flush=True)
            continue
        right = value == standing or all(
            torch.allclose(*pair, 1e-3, 1e-3) for pair in zip(outputs, wanted, strict=True)
        )
        print(f"    {value}: {time:.4f} ms{'' if right else ', wrong'}", flush=True)
        if right and time < GAIN * best:
            best, chosen = time, value
    entry.set(chosen)
    return before, best


def render(measured_on: str | None) -> str:
    """The text of _table.py for the present tables."""
    text = Path(_table.__file__).read_text()
    for form in ("DIRECT", "COMPACT"):
        start = text.index(f"{form} = {{\n")
        end = text.index("\n}\n", start)
        lines = [f"    {key}: {value},".replace("'", '"') for key, value in getattr(_table, form).items()]
        text = text[:start] + "\n".join([f"{form} = {{", *lines]) + text[end:]
    start = text.index("\nMEASURED_ON = ") + 1
    literal = "None" if measured_on is None else f'"{measured_on}"'
    return text[:start] + f"MEASURED_ON = {literal}" + text[text.index("\n", start) :]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="entries with PART in their name")
    parser.add_argument("--write", default=_table.__file__, metavar="FILE", help="instead of the package's own table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("missing: PyTorch sees no GPU")
        return 1
    from triton.testing import do_bench

    def median_ms(call) -> float:
        return do_bench(call, warmup=10, rep=40, return_mode="median")

    for entry in entries():
        if all(part in str(entry) for part in options.only):
            print(entry, flush=True)
            before, after = tune(entry, median_ms)
            print(f"  {before:.4f} ms -> {after:.4f} ms, {entry.value}", flush=True)
            Path(options.write).write_text(render(torch.cuda.get_device_name()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
