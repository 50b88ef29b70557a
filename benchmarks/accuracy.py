"""How many digits the kernels keep: python benchmarks/accuracy.py [--quick] [--backend cpp triton cuda]

In float32, over the activations and the constraints that can be inverted: one step with w.u from -20 to 100, and up to
32 steps in 2 to 40 dimensions with entries up to 2 N(0, 1), forward and inverse, each with its gradients. Every output and
gradient has to be within 10 times the float32 reference's error or 2e-6, whichever is larger, relative L2, against the
reference in float64. Prints the worst ratios, and exits with 1 and the smallest inputs where one is above.

Where a ratio is above 10 at an input, it is that of the medians over the input and 8 neighbours (entries moved by some
4e-6 of themselves): the reference can be exact by luck. Entries count where the truth fits float32 and the float32
reference is finite. Without a GPU, triton runs in its interpreter and cuda on the host, built with g++.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout's package; the problems, and the harness of cuda

BACKENDS = ("cpp", "triton", "cuda")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Errors of the kernels beside the float32 reference's.")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="all by default")
    parser.add_argument("--quick", action="store_true", help="few inputs: about a minute")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if "triton" in args.backend and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import sweep

    torch.set_num_threads(1)
    failed = False
    for name in args.backend:
        backend = sweep.backend_of(name)
        start, counts = time.perf_counter(), sweep.Counts()
        findings = list(sweep.sweep([backend], sweep.inputs("quick" if args.quick else "full"), counts))
        print_table(findings)
        print(vars(counts), f"{time.perf_counter() - start:.0f} s")
        failed |= print_breaches(findings)
    return int(failed)


def print_table(findings) -> None:
    worst = defaultdict(dict)
    for f in findings:
        key = (f.backend, "inverse" if f.input.inverse else "forward", f.input.activation)
        kept = worst[key].get(f.name)
        if kept is None or f.ratio > kept.ratio:
            worst[key][f.name] = f
    for key, by_name in sorted(worst.items()):
        print(f"{' '.join(key):40s}", "  ".join(f"{name} {f.ratio:.3g}" for name, f in by_name.items()))


def print_breaches(findings) -> bool:
    import sweep

    breaches = defaultdict(list)
    for f in findings:
        if f.ratio > sweep.MOST_RATIO and f.error > sweep.FLOOR:
            breaches[f.backend, f.input.inverse, f.input.activation, f.name].append(f)
    for of_kind in breaches.values():
        f = min(of_kind, key=lambda f: f.input.size)
        print(f"{f.backend}: {f.name} {f.error:.1e}, reference {f.reference:.1e} ({len(of_kind)} inputs): {f.input}")
    return bool(breaches)


if __name__ == "__main__":
    sys.exit(main())
