"""Every operator of the C++ backend at once: Python threads, each of which runs OpenMP threads of its own.

    python tests/cpu/sanitizers/stress.py --isa avx2 --python-threads 4 --openmp-threads 2

Each answer has to be bit for bit what one thread alone gives. Meant for a build with a sanitizer, sanitized.py,
and fast enough without one to be a test of its own.
"""

import argparse
import itertools
import sys
import threading

import torch

import vvae_fast
from vvae_fast.backends import cpp, headed, operators
from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, FlowSpec

# rows, sets (None: shared), K, D. Each form and where it changes, a tile that is not full, D that fill no vector, rows
# that several threads share in one pass (shared), side by side over sets, and one set after another.
SIZES = [
    (0, None, 3, 4),
    (1, None, 1, 1),
    (131, None, 5, 3),
    (1500, None, 18, 21),
    (33, 33, 17, 5),
    (1000, 1000, 9, 20),
    (90, 3, 18, 9),
    (2000, 50, 9, 24),
    (1100, 2, 17, 18),
]


def problem(size: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    rows, sets, steps, dim = size
    g = torch.Generator().manual_seed(rows)
    matrix = (steps, dim) if sets is None else (sets, steps, dim)
    shapes = [(rows, dim), matrix, matrix, matrix[:-1], (rows, dim), (rows,)]
    return [(0.5 * torch.randn(shape, generator=g)).to(dtype) for shape in shapes]


def call_all(p: list[torch.Tensor], formulas: FlowSpec) -> list[torch.Tensor]:
    """What the operators give for one problem, and for its parameters as views of a head's output."""
    z, u, w, b, grad_z, grad_log_det = p
    numbers = formulas.arguments()
    z_K, log_det, a = operators.planar_forward(z, u, w, b, *numbers, True)
    outputs = [z_K, log_det, a, *operators.planar_backward(grad_z, grad_log_det, z, u, w, b, a, *numbers)]
    outputs.append(operators.planar_backward(grad_z, grad_log_det, z, u, w, b, a, *numbers, False)[0])  # dz alone
    if u.dim() == 3:
        packed = torch.cat([u.flatten(-2), w.flatten(-2), b], -1)
        outputs += operators.planar_backward_packed(grad_z, grad_log_det, z, packed, a, *numbers)
    if formulas.constraint != "none":
        z_0, log_det, a = operators.planar_inverse(z, u, w, b, *numbers[:3], True)
        grads = operators.planar_inverse_backward(grad_z, grad_log_det, z, u, w, b, a, *numbers[:3])
        outputs += [z_0, log_det, a, *grads]
    return outputs + call_headed(p, numbers)


def call_headed(p: list[torch.Tensor], numbers: tuple) -> list[torch.Tensor]:
    """The operators of a flow with its head, for one problem's z: its gradient is the context."""
    z, u, *_, grad_z, grad_log_det = p
    steps, dim = u.shape[-2:]
    g = torch.Generator().manual_seed(steps)
    weight = torch.randn(steps * (2 * dim + 1), dim, generator=g).to(z.dtype) / (4 * dim)
    tensors = z, grad_z, weight, weight[:, 0].clone()
    z_K, log_det, saved = headed.headed_forward(*tensors, *numbers, True)
    given = grad_z, grad_log_det, *tensors, saved, *numbers
    return [z_K, log_det, saved, *headed.headed_backward(*given), headed.headed_backward(*given, False)[0]]


def train_a_step(p: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same through autograd, whose backward runs in this thread as well."""
    z, u, w, b, grad_z, grad_log_det = p
    batch = z.shape[:1] if u.dim() == 2 else (z.shape[0] // u.shape[0], u.shape[0])
    z, grad_z, grad_log_det = z.unflatten(0, batch), grad_z.unflatten(0, batch), grad_log_det.unflatten(0, batch)
    inputs = [t.detach().requires_grad_() for t in (z, u, w, b)]
    outputs = vvae_fast.planar_flow(*inputs, backend="cpp")
    return [*outputs, *torch.autograd.grad(outputs, inputs, (grad_z, grad_log_det))]


def same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def cases(part: int, parts: int) -> list[tuple]:
    """Sizes, dtypes and formulas; each activation and constraint meets each form."""
    names = itertools.cycle(itertools.product(ACTIVATIONS, CONSTRAINTS))
    everything = [
        (size, dtype, FlowSpec(constraint, activation))
        for size in SIZES
        for dtype in (torch.float32, torch.float64)
        for activation, constraint in itertools.islice(names, 2)
    ]
    return everything[part::parts]


def run_threads(count: int, work) -> list[str]:
    """What went wrong in any of the threads, which start together."""
    problems, barrier = [], threading.Barrier(count)

    def body(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except Exception as error:
            problems.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


def stress(options: argparse.Namespace) -> list[str]:
    torch.set_num_threads(1)
    prepared = []
    for size, dtype, formulas in cases(0, options.thin):
        p = problem(size, dtype)
        prepared.append((p, formulas, call_all(p, formulas), train_a_step(p)))

    def work(number: int) -> None:
        torch.set_num_threads(options.openmp_threads)
        for i in range(len(prepared)):
            p, formulas, wanted, trained = prepared[(i + number) % len(prepared)]  # the inputs are shared, too
            if not same(call_all(p, formulas), wanted) or not same(train_a_step(p), trained):
                raise ValueError(f"other bits for z {tuple(p[0].shape)}, u {tuple(p[1].shape)}, {formulas}")

    problems = []
    for _ in range(options.rounds):  # new threads, whose memory is new, after threads that are gone
        problems += run_threads(options.python_threads, work)
    return problems


def switch(options: argparse.Namespace) -> list[str]:
    """Threads that call while one changes the instruction set: each call takes one or the other as a whole."""
    levels = cpp.isa_levels()
    p, formulas = problem(SIZES[4], torch.float64), FlowSpec()
    wanted = []
    for level in levels:
        cpp.set_isa(level)
        wanted.append(call_all(p, formulas))

    def work(number: int) -> None:
        for i in range(20):
            if number == 0:
                cpp.set_isa(levels[i % len(levels)])
            else:
                z_K, log_det, _ = operators.planar_forward(*p[:4], *formulas.arguments(), True)
                if not any(same([z_K, log_det], answer[:2]) for answer in wanted):
                    raise ValueError("an answer of no instruction set")

    return run_threads(options.python_threads, work)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=cpp.isa(), choices=cpp.isa_levels())
    parser.add_argument("--python-threads", type=int, default=4)
    parser.add_argument("--openmp-threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--thin", type=int, default=1, help="take one case of so many")
    return parser.parse_args(arguments)


def find_problems(options: argparse.Namespace) -> list[str]:
    """What was wrong with an answer, in words; the threads and the instruction set are put back."""
    isa, threads = cpp.isa(), torch.get_num_threads()
    cpp.set_isa(options.isa)
    try:
        return stress(options) + switch(options)
    finally:
        cpp.set_isa(isa)
        torch.set_num_threads(threads)


def main() -> int:
    options = parse()
    problems = find_problems(options)
    print("\n".join(problems) or f"{options}: the same bits everywhere", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
