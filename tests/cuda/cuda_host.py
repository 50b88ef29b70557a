"""The CUDA kernels on the host: building them with g++, their problems and their answers."""

import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from filelock import FileLock  # which PyTorch installs
from problems import Problem, random_problem
from torch import Tensor

from vvae_fast import reference
from vvae_fast.spec import FlowSpec

FOLDER = "VVAE_FAST_TEST_BUILDS"  # an environment variable: where the processes of a test run put what they build
HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,vla-bound", "-fno-sanitize-recover"],
    "thread": ["-fsanitize=thread"],
}
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fwrapv",
    "-Wall",
    "-Werror",
]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-tsan"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

# Constants of a small GPU.
SMALL = [
    ("reduce/partials.cuh", "most_programs", 3),
    ("direct/shared_forward.cu", "kMostForwardPrograms", 3),
    ("direct/shared_inverse.cu", "kMostInversePrograms", 3),
    ("compact/compact_forward.cu", "kMostForwardPrograms", 3),
    ("stage.cuh", "enough_blocks", 4),
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Of each program: a template over the dtype takes minutes to compile for each. What a sanitizer sees are addresses and
# barriers; the former differ for numbers of four bytes and of two, the latter for none.
DTYPES_OF = {"plain": tuple(DTYPES), "address": (torch.float32, torch.bfloat16), "thread": (torch.float32,)}
FORMS = {"automatic": 0, "direct": 1, "compact": 2}
FORWARD, REVERSE = 0, 1  # orders of the blocks; any other number is the seed of a random one


class Case(NamedTuple):
    problem: Problem  # z [*samples, P, D] or [*samples, D], as in tests/support/problems.py
    formulas: FlowSpec = FlowSpec()
    form: str = "automatic"
    order: int = FORWARD
    save: bool = True  # without it there is no backward
    packed: bool = False  # du, dw and db are views of one buffer [P, K (2 D + 1)]
    inverse: bool = False


def far_product() -> Problem:
    """In every other row 16 determinants of 2,000, whose product float32 does not hold, and then 4 whose log s is sunk,
    docs/math.md (38); in the others determinants of 1."""
    rows, dim = 40, 20
    p = random_problem((rows,), 20, dim, scale=0.5)
    z, u, w, grad_z = p.z.clone(), torch.zeros_like(p.u), torch.zeros_like(p.w), p.grad_z.clone()
    w[:, 2] = 1
    z[::2, 2], z[1::2, 2] = 0, 3  # a = 0 for good, and a from 3 on
    u[:, 2] = torch.tensor([2000.0] * 16 + [-88.5] * 4)
    grad_z[:, 2] = 0  # the gradient in this direction would grow as the product
    return p._replace(z=z, u=u, w=w, b=torch.zeros_like(p.b), grad_z=grad_z)


class Answer(NamedTuple):
    tensors: tuple[Tensor, ...]  # z_K or z_0, log_det and, if saved, dz, du, dw, db in the shapes of the problem's
    a: Tensor | None  # [K, rows]
    error: str  # what the harness saw, or an exception of a launcher


class Run(NamedTuple):
    answers: list[Answer]
    kernels: set[str]  # that ran, with their template's arguments
    report: str  # where the run ended early: a sanitizer's words, or a lane's


def sources(csrc: Path = CSRC) -> list[Path]:
    return sorted((csrc / "cuda").rglob("*.cu"))


def kernel_names(csrc: Path = CSRC) -> set[str]:
    """The names of all kernels in the sources."""
    text = "".join(path.read_text() for path in sorted((csrc / "cuda").rglob("*.cu*")))
    text = re.sub(r"//.*", "", text)
    return set(re.findall(r"__global__[^;{}]*?\b(\w+_kernel)\s*\(", text))


def has_runtime(sanitizer: str) -> bool:
    """Whether g++ links what the sanitizer needs, and it starts."""
    program = "int main() { return 0; }"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "program")
        command = ["g++", *SANITIZERS[sanitizer], "-x", "c++", "-", "-o", out]
        return all(
            subprocess.run(line, input=program, text=True, capture_output=True, check=False).returncode == 0
            for line in (command, [out])
        )


def replace(path: Path, old: str, new: str) -> None:
    """In the file, where the pattern is once."""
    text, count = re.subn(old, lambda _: new, path.read_text())
    assert count == 1, f"{old!r} is {count} times in {path.name}"
    path.write_text(text)


def copy_sources(folder: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    """csrc for a GPU that is small: few rows make several blocks, and blocks take their rows in several turns; and for
    some dtypes, float32 among them."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    for name, constant, value in SMALL:
        replace(csrc / "cuda" / name, rf"\b{constant} = \d+", f"{constant} = {value}")
    keep_dtypes(csrc, dtypes)


def keep_dtypes(csrc: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    """Kernels of the other dtypes are not compiled, and launch nothing."""
    dispatch = csrc / "cuda" / "dispatch.cuh"
    names = "|".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    others = re.compile(rf"(case Dtype::(?!(?:{names})\b)\w+:) return f\(.*")
    dispatch.write_text(others.sub(r"\1 return;", dispatch.read_text()))


def compiling(source: Path, csrc: Path, out: Path, sanitizer: str) -> list:
    include = [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{HERE / 'cuda_on_host'}"]
    return ["g++", *FLAGS, *SANITIZERS[sanitizer], *include, "-x", "c++", "-c", source, "-o", out]


def linking(objects: list[Path], program: Path, sanitizer: str) -> list:
    return ["g++", *SANITIZERS[sanitizer], *objects, "-o", program]


def run_commands(commands: list[list]) -> None:
    """Side by side, the first ones first; AssertionError with the words of one that fails."""

    def one(command: list) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, commands))


@functools.cache
def build(sanitizer: str) -> Path | None:
    """The program, in a folder with its object files and its csrc; None where g++ has not what the sanitizer needs.

    Processes of pytest-xdist share what the first of them builds.
    """
    if not has_runtime(sanitizer):
        return None
    root = Path(os.environ.get(FOLDER) or _temporary().name)
    with FileLock(root / f"{sanitizer}.lock"):
        if not (root / sanitizer / "run").exists():
            _compile(sanitizer, root / sanitizer)
    return root / sanitizer / "run"


def _compile(sanitizer: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what a build that failed has left
    copy_sources(folder, DTYPES_OF[sanitizer])
    csrc = folder / "csrc"
    work = [*sources(csrc), HERE / "cuda_on_host" / "run.cpp"]
    longest_first = sorted(work, key=lambda source: -source.stat().st_size)
    run_commands([compiling(source, csrc, folder / f"{source.stem}.o", sanitizer) for source in longest_first])
    run_commands([linking(sorted(folder.glob("*.o")), folder / "run", sanitizer)])


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    """Lasts as long as the process."""
    return tempfile.TemporaryDirectory(prefix="cuda-on-host-")


def program(sanitizer: str) -> Path:
    """Built once in a session; skips the test where something is missing."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    built = build(sanitizer)
    if built is None:
        pytest.skip(f"g++ has no runtime of the sanitizer {sanitizer!r}")
    return built


def symbols(program: Path) -> dict[int, str]:
    """The functions of a program, by their distance from launch_forward."""
    done = subprocess.run(["nm", "--demangle", program], capture_output=True, text=True, check=True)
    found = re.findall(r"^([0-9a-f]+) [TtWw] (.*)$", done.stdout, re.MULTILINE)
    start = next(int(at, 16) for at, name in found if name.startswith("vvae::cuda::launch_forward("))
    return {int(at, 16) - start: name for at, name in found if "[clone" not in name and "::operator" not in name}


def instantiations(program: Path) -> set[str]:
    """Every kernel that the program holds, whether it can run or not."""
    names = "|".join(kernel_names())
    # From the start: a function that was not inlined may have a kernel's lambda among its template arguments.
    kernel = re.compile(rf"(?:void )?vvae::cuda::(?:\(anonymous namespace\)::)?({names})[<(]")
    return {name for name in symbols(program).values() if kernel.match(name)}


def _input(t: Tensor) -> bytes:
    """The tensor's own bytes and what lies between them, with the alignment to 16 bytes that it has in its storage."""
    size = t.element_size()
    first = t.storage_offset() * size
    start = first - first % 16
    end = first + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * size
    data = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())[start:end].numpy().tobytes()
    strides = [*t.stride(), 0, 0][:3]
    return struct.pack("<q", len(data)) + data + struct.pack("<4q", first - start, *strides)


def _flat(p: Problem) -> Problem:
    """z, grad_z [rows, D], u, w [P, K, D], b [P, K]; strides stay where they can."""
    params = p.u.shape[:-2]
    num_sets = params.numel()
    rows = p.z.shape[:-1].numel()
    z, grad_z = (t.reshape(rows, t.shape[-1]) for t in (p.z, p.grad_z))
    u, w = (t.reshape(num_sets, *t.shape[-2:]) for t in (p.u, p.w))
    return Problem(z, u, w, p.b.reshape(num_sets, p.b.shape[-1]), grad_z, p.grad_log_det.reshape(rows))


def _encode(case: Case) -> bytes:
    amortized = case.problem.u.dim() > 2
    p = _flat(case.problem)
    (rows, dim), (sets, steps, _) = p.z.shape, p.u.shape
    assert rows % sets == 0
    p = p._replace(grad_log_det=p.grad_log_det.to(compute_dtype(p.z.dtype)))
    kind = struct.pack("<3q2d", DTYPES[p.z.dtype], *case.formulas.arguments())
    size = struct.pack("<5q", amortized, rows, sets, dim, steps)
    how = struct.pack("<5q", FORMS[case.form], case.order, case.save, case.packed, case.inverse)
    return kind + size + how + b"".join(map(_input, p))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self) -> int:
        self.at += 8
        return struct.unpack_from("<q", self.data, self.at - 8)[0]

    def bytes(self) -> bytes:
        size = self.number()
        self.at += size
        return self.data[self.at - size : self.at]

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        data = self.bytes()
        return (
            torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
        )


def _decode(case: Case, reader: _Reader) -> Answer:
    p = case.problem
    dtype, computed = p.z.dtype, compute_dtype(p.z.dtype)
    rows, steps = p.z.shape[:-1].numel(), p.u.shape[-2]
    error = reader.bytes().decode()
    tensors = [reader.tensor(dtype, *p.z.shape), reader.tensor(computed, *p.z.shape[:-1])]
    a = reader.tensor(computed, steps if case.save else 0, rows)
    if not case.save:
        return Answer(tuple(tensors), None, error)
    error += reader.bytes().decode()
    tensors.append(reader.tensor(dtype, *p.z.shape))
    if case.packed:
        packed = reader.tensor(dtype, *p.u.shape[:-2], steps * (2 * p.u.shape[-1] + 1))
        u, w, b = packed.split([p.u.shape[-2:].numel()] * 2 + [steps], -1)
        tensors += [u.unflatten(-1, p.u.shape[-2:]), w.unflatten(-1, p.u.shape[-2:]), b]
        reader.bytes(), reader.bytes()
    else:
        tensors += [reader.tensor(dtype, *t.shape) for t in (p.u, p.w, p.b)]
    return Answer(tuple(tensors), a, error)


def run(program: Path, cases: list[Case], timeout: float = 300) -> Run:
    """The answers, from a process for each processor; of one that ends early only its report."""
    parts = min(os.cpu_count(), len(cases))
    with ThreadPoolExecutor(parts) as pool:
        runs = list(pool.map(lambda i: _run_part(program, cases[i::parts], timeout), range(parts)))
    reports = "\n".join(part.report for part in runs if part.report)
    answers = [] if reports else [runs[i % parts].answers[i // parts] for i in range(len(cases))]
    return Run(answers, set().union(*(part.kernels for part in runs)), reports)


def _run_part(program: Path, cases: list[Case], timeout: float) -> Run:
    with tempfile.TemporaryDirectory(prefix="cuda-on-host-") as folder:
        return _run_in(Path(folder), program, cases, timeout)


def _run_in(folder: Path, program: Path, cases: list[Case], timeout: float) -> Run:
    problems, answers = folder / "problems", folder / "answers"
    problems.write_bytes(struct.pack("<q", len(cases)) + b"".join(map(_encode, cases)))
    done = subprocess.run(
        [program, problems, answers],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, **ENVIRONMENT},
    )
    if done.returncode != 0:
        case = cases[min(len(done.stdout), len(cases) - 1)]
        return Run([], set(), f"{describe(case)}\nexit status {done.returncode}\n{done.stderr[:6000]}")
    reader = _Reader(answers.read_bytes())
    found = [_decode(case, reader) for case in cases]
    names = symbols(program)
    return Run(found, {names[reader.number()] for _ in range(reader.number())}, "")


def describe(case: Case) -> str:
    p = case.problem
    return f"{tuple(p.z.shape)} {tuple(p.u.shape)} {p.z.dtype} {case[1:]}"


def wanted_of(case: Case) -> tuple[Tensor, ...]:
    """The oracle's answer in float64, as an `Answer`'s tensors."""
    p, formulas = case.problem.to(torch.float64), case.formulas
    if case.inverse:
        answer = _inverse_oracle(p, formulas)
    else:
        z_K, log_det, _ = reference.planar_forward(*p.inputs, formulas)
        answer = z_K, log_det, *reference.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, formulas)
    return answer if case.save else answer[:2]


def _inverse_oracle(p: Problem, formulas: FlowSpec) -> tuple[Tensor, ...]:
    inputs = [t.clone().requires_grad_() for t in p.inputs]
    outputs = reference.planar_inverse(*inputs, formulas)
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))
