"""Times forward + backward of the CUDA and the Triton backend over shapes on the GPU at hand and writes the faster of
each into vvae_fast/backends/_measured.py, which is where `backend=None` looks. On an idle GPU:

    python -m benchmarks.gpu.tune_backends [--only shared ...] [--seconds S] [--write FILE]

It times by the clock, since launches decide small shapes, in alternating rounds, in float32. A shape is written only if
both backends gave the same answer. `--only` takes a part of a shape's name, such as "shared 64 32 1024". Shapes
measured before on the same GPU stay. The order is mixed, so that a run that `--seconds` ends has shapes of all kinds.
"""

import argparse
import itertools
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import vvae_fast
from benchmarks.flow import gpu_clock
from vvae_fast.backends import _measured, gpu_choice

BACKENDS = ("triton", "cuda")
ROUNDS = 7
BLOCK_SECONDS = 4e-3  # of calls in a row, timed together
MOST_CALLS = 100
MOST_NUMBERS = 2**28  # shapes with larger tensors are not measured
TOLERANCE = 1e-3  # between the backends' answers, relative to their norm

Call = Callable[[], tuple[Tensor, ...]]
Clock = Callable[[str, Call], float]  # seconds of a backend's call


class Shape(NamedTuple):
    """The largest problem of a class of `gpu_choice`."""

    parameters: str  # "shared" or "amortized"
    dim: int
    num_steps: int
    rows: int

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @property
    def sets(self) -> tuple[int, ...]:
        return (self.rows,) if self.parameters == "amortized" else ()


def shapes() -> list[Shape]:
    """Every class whose tensors fit, in a mixed but fixed order."""
    classes = itertools.product(("shared", "amortized"), gpu_choice.DIMS, gpu_choice.STEPS, gpu_choice.ROWS)
    found = [shape for shape in itertools.starmap(Shape, classes) if _largest(shape) <= MOST_NUMBERS]
    random.Random(0).shuffle(found)
    return found


def _largest(shape: Shape) -> int:
    """The number of elements of the largest tensor: z, a or, if amortized, u."""
    per_row = shape.dim * shape.num_steps if shape.sets else max(shape.dim, shape.num_steps)
    return shape.rows * per_row


def problem_of(shape: Shape, device: str = "cuda") -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The leaves z, u, w, b and the gradients of z_K and log_det."""
    z = torch.randn(shape.rows, shape.dim, device=device)
    u, w = (torch.randn(*shape.sets, shape.num_steps, shape.dim, device=device) / shape.dim for _ in range(2))
    b = torch.randn(*shape.sets, shape.num_steps, device=device)
    gradients = torch.randn_like(z), torch.randn(shape.rows, device=device)
    return [t.requires_grad_() for t in (z, u, w, b)], gradients


def call_of(leaves: list[Tensor], gradients: tuple[Tensor, Tensor], backend: str) -> Call:
    """Forward and backward: z_K, log_det and the gradients of the leaves."""

    def call() -> tuple[Tensor, ...]:
        outputs = vvae_fast.planar_flow(*leaves, backend=backend)
        return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

    return call


def same(answers: list[tuple[Tensor, ...]]) -> bool:
    """Whether two answers agree; answers with a NaN do not."""
    return all(bool((x - y).norm() <= TOLERANCE * y.norm()) for x, y in zip(*answers, strict=True))


def measure(shape: Shape, clock: Clock, device: str = "cuda") -> dict[str, float] | str:
    """The median seconds of each backend, or why there are none."""
    problem = problem_of(shape, device)
    calls = {name: call_of(*problem, name) for name in BACKENDS}
    try:
        if not same([call() for call in calls.values()]):
            return "the answers differ"
    except RuntimeError as error:  # one of them rejects the shape, or has no memory for it
        return str(error).splitlines()[0]
    times = {name: [] for name in BACKENDS}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(clock(name, call))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def wall_clock(name: str, call: Call) -> float:
    """Seconds per call, for as many calls in a row as fill a block."""
    once = gpu_clock.wall_seconds(call, None, 1)
    return gpu_clock.wall_seconds(call, None, int(min(MOST_CALLS, max(1, BLOCK_SECONDS / once))))


def render(measured_on: str | None, table: dict[tuple, dict[int, str]]) -> str:
    """The text of _measured.py with the table, sorted."""
    text = Path(_measured.__file__).read_text()
    literal = "None" if measured_on is None else f'"{measured_on}"'
    head, name, _ = re.split(r"^(FASTER: .* = )", text, flags=re.MULTILINE)
    head = re.sub("(?m)^MEASURED_ON = .*$", lambda _: f"MEASURED_ON = {literal}", head)
    keys = sorted(table, key=lambda key: (key[0] != "shared", *key))
    lines = [f"    {key}: {dict(sorted(table[key].items()))},\n".replace("'", '"') for key in keys]
    return f"{head}{name}{{\n{''.join(lines)}}}\n" if lines else f"{head}{name}{{}}\n"


def tune(chosen: list[Shape], clock: Clock, file: Path, gpu: str, seconds: float, device: str = "cuda") -> None:
    """Writes the faster backend of each shape to the file as soon as it is known."""
    known = _measured.FASTER if gpu == _measured.MEASURED_ON else {}
    table = {key: dict(by_rows) for key, by_rows in known.items()}
    end = time.monotonic() + seconds
    for done, shape in enumerate(chosen):
        if time.monotonic() > end:
            print(f"{len(chosen) - done} of {len(chosen)} shapes were not measured: the time is up", flush=True)
            break
        found = measure(shape, clock, device)
        if isinstance(found, str):
            print(f"{shape}: not measured: {found}", flush=True)
            continue
        faster = min(found, key=found.get)
        table.setdefault(shape[:3], {})[shape.rows] = faster
        print(f"{shape}: {', '.join(f'{n} {t * 1e6:.1f} us' for n, t in found.items())}: {faster}", flush=True)
        file.write_text(render(gpu, table))


def missing() -> str | None:
    """The reason why the backends cannot be timed here; None if they can."""
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    for name in BACKENDS:
        state = vvae_fast.info()["backends"][name]
        if not state["available"]:
            return f"the {name} backend: {'; '.join(state['reasons'])}"
    return None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="shapes with PART in their name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no shape after so many")
    parser.add_argument("--write", type=Path, default=Path(_measured.__file__), metavar="FILE", help="another table")
    options = parser.parse_args(arguments)
    reason = missing()
    if reason:
        print(f"missing: {reason}")
        return 1
    chosen = [shape for shape in shapes() if all(part in str(shape) for part in options.only)]
    tune(chosen, wall_clock, options.write, torch.cuda.get_device_name(), options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
