"""How many digits the kernels keep: python -m benchmarks.accuracy.accuracy [--quick] [--backend cpp triton cuda]

It runs the kernels in float32, for all activations and the constraints that can be inverted: one step with w.u from -20
to 100, and up to 32 steps in 2 to 40 dimensions with entries up to 2 N(0, 1); forward and inverse, with the gradients
of both. The truth is the reference in float64 with autograd. The rule: the relative L2 error of every output and
gradient is at most 10 times that of the float32 reference, or 2e-6, whichever is larger. It prints the worst ratios of
errors above 2e-6. If a ratio is above 10, it prints the smallest input of each kind, and exits with 1.

sweep.py says which entries count, and how a reference that is exact by luck is judged. Without a GPU, triton runs in
its interpreter, with fewer inputs, and cuda on the host, built with g++ in a minute or more.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path += [
    str(room) for room in (Path(__file__).resolve().parents[2] / "tests").iterdir()
]  # problems, and the harness of cuda
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # read by the imports below

from benchmarks.accuracy import sweep
from benchmarks.accuracy.accuracy_table import breaches, summary, table
from benchmarks.accuracy.sweep_inputs import inputs

BACKENDS = ("cpp", "triton", "cuda")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The errors of the kernels beside those of the float32 reference.")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="default: all three")
    parser.add_argument("--quick", action="store_true", help="few inputs: a minute for cpp")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's in the interpreter, of overflows
    broken = False
    for name in args.backend:
        start, counts = time.perf_counter(), sweep.Counts()
        findings = list(sweep.sweep([sweep.backend_of(name)], inputs(size_for(name, args.quick)), counts))
        print("\n".join([*table(findings), summary(counts, time.perf_counter() - start), *breaches(findings), ""]))
        broken |= bool(breaches(findings))
    print("broken" if broken else "held", f"within {sweep.MOST_RATIO:g} times the reference's error or {sweep.FLOOR:g}")
    return int(broken)


def size_for(name: str, quick: bool) -> str:
    """The size of the sweep; Triton's interpreter takes a third of a second for each input."""
    sizes = ("least", "quick") if name == "triton" and not torch.cuda.is_available() else ("quick", "full")
    return sizes[not quick]


if __name__ == "__main__":
    sys.exit(main())
