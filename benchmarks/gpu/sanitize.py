"""Runs every kernel of the cuda backend once, on problems so small that compute-sanitizer takes only seconds.

    compute-sanitizer --tool racecheck python -m benchmarks.gpu.sanitize [--seconds 20] [--fault]

It prints a line for each case. `--fault` reads past the end of a tensor instead, to show whether the sanitizer works.
"""

import argparse
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from vvae_fast.backends import cuda, operators
from vvae_fast.spec import FlowSpec

NUM_STEPS = 20  # two chunks; the second is not full


class Case(NamedTuple):
    """A forward or an inverse, and its backward, in one form; sets = 0: parameters shared by all rows."""

    rows: int
    sets: int
    dim: int
    dtype: torch.dtype
    form: str = "automatic"
    formulas: FlowSpec = FlowSpec()
    inverse: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        what = [self.formulas.activation] if self.formulas != FlowSpec() else []
        what += ["inverse"] if self.inverse else []
        size = f"{self.rows} rows, {self.sets or 'shared'} sets, D = {self.dim}"
        return ", ".join([size, dtype, self.form, *what])


# The rows do not fill a block; the columns are read one by one and in fours. Sets of 20 samples run the kernels for
# shared parameters, sets of 3 and of 1 those for amortized parameters.
SHARED = ((37, 0, 6), (150, 0, 100), (60, 3, 100))
AMORTIZED = ((12, 4, 6), (9, 9, 100))
CASES = [
    Case(*shape, dtype, form)
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for shapes, forms in ((SHARED, ("direct", "compact")), (AMORTIZED, ("automatic",)))
    for shape in shapes
    for form in forms
    if (dtype, form) != (torch.float64, "compact")  # which does not exist
]
ELU, SIGMOID = FlowSpec(activation="elu"), FlowSpec(activation="sigmoid")
CASES += [
    Case(*shape, dtype, "automatic", formulas, inverse)
    for dtype in (torch.float32, torch.float64)
    for shape in (SHARED[0], SHARED[1], AMORTIZED[0], AMORTIZED[1])
    for formulas, inverse in ((ELU, False), (FlowSpec(), True), (SIGMOID, True))
]


def inputs(case: Case, device: str) -> list[Tensor]:
    """z [R, D], u, w [*P, K, D], b [*P, K], grad_z [R, D], grad_log_det [R], made on the CPU."""
    sets = (case.sets,) if case.sets else ()
    matrix, params = (case.rows, case.dim), (*sets, NUM_STEPS, case.dim)
    tensors = [torch.randn(shape) for shape in (matrix, params, params, params[:-1], matrix)]
    tensors[1:3] = (t / case.dim**0.5 for t in tensors[1:3])
    computed = torch.float64 if case.dtype == torch.float64 else torch.float32
    return [*(t.to(case.dtype).to(device) for t in tensors), torch.randn(case.rows).to(computed).to(device)]


def run(case: Case, backend: str = "cuda", device: str = "cuda") -> None:
    """Both passes by the operators alone, without autograd and the package's Python code."""
    z, u, w, b, grad_z, grad_log_det = inputs(case, device)
    computed_by, numbers = operators.OPERATORS[backend], case.formulas.arguments()
    if case.inverse:
        z_0, _, a = computed_by.planar_inverse(z, u, w, b, *numbers[:3], True)
        answers = computed_by.planar_inverse_backward(grad_z, grad_log_det, z_0, u, w, b, a, *numbers[:3])
    else:
        a = computed_by.planar_forward(z, u, w, b, *numbers, True)[2]
        answers = computed_by.planar_backward(grad_z, grad_log_det, z, u, w, b, a, *numbers)
    if not all(t.isfinite().all() for t in [t.cpu() for t in answers]):
        raise ArithmeticError(f"{case}: gradients are not finite")


def read_past_the_end() -> None:
    """A forward whose z has memory for its first number only."""
    z, u, w, b, *_ = inputs(CASES[0], "cuda")
    z.untyped_storage().resize_(z.itemsize)
    operators.OPERATORS["cuda"].planar_forward(z, u, w, b, *FlowSpec().arguments(), False)
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after that many")
    parser.add_argument("--fault", action="store_true", help="do what the sanitizer has to find, and nothing else")
    options = parser.parse_args(arguments)
    if options.fault:
        read_past_the_end()
        return 0
    ends, done = time.monotonic() + options.seconds, 0
    for case in CASES:
        if time.monotonic() >= ends:
            break
        print(case, flush=True)
        cuda.set_form(case.form)
        run(case)
        done += 1
    print(f"sanitized {done} of {len(CASES)} cases", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
