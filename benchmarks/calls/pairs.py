"""Compares this checkout with another one, both built in place.

    python -m benchmarks.calls.pairs FOLDER [--rounds 12] [--only B128]

It times forward + backward of the cpp backend on the CPU cases of `make bench`. Each checkout has its own process. They
take turns, with a block of calls each, so that a slow machine slows both. A round's ratio is this checkout's median
over the other's. It prints the medians over rounds, in microseconds, and the median ratio. The no-op's code is the same
in both: its ratio shows the machine's noise. Each result is checked against the oracle before it is timed.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.flow.cases import PLANAR_CASES, Case

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SECONDS = 0.06
CONTESTANTS = {"ours": "vvae_fast cpp", "no-op": "no-op"}  # by contestants.py's names


class Checkout:
    """A process that times calls of the package in `folder`."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.calls.pairs", "--worker", folder.resolve()]
        # Without a buffer: else text that an ended process did not read would be written again at the end.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT)

    def seconds(self, case: Case, contestant: str) -> float:
        """The median call of a block."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended, and gives no answer
            self.process.stdin.write(json.dumps([str(case), contestant]).encode() + b"\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self.process.args[-1]} ended: what it said is above")
        return float(answer)


def compare(case: Case, pair: list[Checkout], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of this checkout and of the other one, and their ratio, for each contestant."""
    times = {name: [] for name in CONTESTANTS}  # for each round: (this checkout, the other)
    for i in range(rounds):
        for name in CONTESTANTS:
            both = {k: pair[k].seconds(case, name) for k in ((0, 1), (1, 0))[i % 2]}
            times[name].append((both[0], both[1]))
    return {
        name: (*map(statistics.median, zip(*of, strict=True)), statistics.median(this / other for this, other in of))
        for name, of in times.items()
    }


def work(folder: Path) -> None:
    """Reads requests from stdin and prints the answers, with the package of `folder` and the cases of this checkout."""
    sys.path.insert(0, str(folder))
    import torch

    import vvae_fast
    from benchmarks.flow import contestants, measure

    if folder not in Path(vvae_fast.__file__).parents:
        raise SystemExit(f"{folder} holds no vvae_fast: give the root of a checkout that is built in place")
    measure.settle_allocator()
    cases = {str(case): case for case in PLANAR_CASES}
    by_name = {one.name: one for one in (*contestants.ours(), *contestants.baselines())}
    stage = None
    for line in sys.stdin:
        name, contestant = json.loads(line)
        if stage is None or name != str(stage.case):
            stage = measure.Stage(cases[name], torch.device("cpu"))
        call, _ = stage.calls(stage.prepared(by_name[CONTESTANTS[contestant]]), "forward+backward")
        once = min(measure.seconds_of(call) for _ in range(3))
        count = measure.calls_of_block(BLOCK_SECONDS, once)
        print(statistics.median(measure.seconds_of(call) for _ in range(count)), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Forward + backward of this checkout against another one's.")
    parser.add_argument("folder", type=Path, help="the other checkout, built in place (setup.py build_ext --inplace)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="", help="cases whose name holds this, as in amortized-B100-D8-K16")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        work(args.folder.resolve())
        return
    pair = [Checkout(ROOT), Checkout(args.folder.resolve())]
    print(f"{'':32s} {'this':>10s} {'other':>10s} {'ratio':>6s} {'no-op':>6s}")
    for case in PLANAR_CASES:
        if args.only in str(case):
            found = compare(case, pair, args.rounds)
            (this, other, ratio), (_, _, of_no_op) = found["ours"], found["no-op"]
            print(f"{case!s:32s} {1e6 * this:10.1f} {1e6 * other:10.1f} {ratio:6.2f} {of_no_op:6.2f}", flush=True)


if __name__ == "__main__":
    main()
