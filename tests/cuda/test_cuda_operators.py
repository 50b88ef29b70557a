"""The CUDA backend's operators without a GPU: their arguments, outputs and what they hand to the kernels, for which
tests/cuda/cuda_stand_in.cpp stands in, as it does for CUDA."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from vvae_fast import shapes
from vvae_fast.backends.cuda import load_error
from vvae_fast.backends.operators import OPERATORS, Operators
from vvae_fast.spec import FlowSpec

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
COMPILE = ["g++", "-O1", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
COMPILE += [f"-I{CUDA}"]
TORCH = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
LIBRARIES = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
SYMBOLIC = "-Wl,-Bsymbolic"  # the library's own functions before torch's of the same names
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Numbers that every dtype has. The half precisions have no other activation than tanh.
TANH = [FlowSpec(slope=0.5).arguments(), FlowSpec("none", slope=2.0).arguments()]
OTHERS = [FlowSpec("none", "linear", 0.5).arguments(), FlowSpec("log_softplus", "elu", 2.0, 4.0).arguments()]
USUAL = TANH[0]

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")


def compile_(*arguments: str | Path, before_torch: Sequence[str | Path] = ()) -> None:
    """Headers are looked for in these folders before torch's."""
    command = [*COMPILE, *(f"-isystem{folder}" for folder in before_torch), *TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_operators_compile_without_cuda_headers():
    compile_("-fsyntax-only", "-std=c++17", CUDA / "operators.cpp")  # an older torch's standard


def test_the_module_compiles_without_cuda_headers(tmp_path):
    """The pybind11 that torch brings may refuse TORCH_TARGET_VERSION, as 2.11's does and the one here: the installed
    one is found before it, as it is in the build."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    refusing = tmp_path / "pybind11" / "pybind11.h"
    refusing.parent.mkdir()
    refusing.write_text('#error "not where TORCH_TARGET_VERSION is defined"')
    macros = ("VVAE_FAST_NVCC", "VVAE_FAST_CUDA_ARCHITECTURES", "VVAE_FAST_TORCH_VERSION")
    folders = [pybind11.get_include(), sysconfig.get_path("include"), tmp_path]
    options = [f'-D{name}=""' for name in macros]
    compile_("-fsyntax-only", "-std=c++17", *options, CUDA / "module.cpp", before_torch=folders)


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The operators as a GPU's tensors would reach them."""
    if load_error is None:
        pytest.skip("the CUDA kernels are there and have these operators")
    library = tmp_path_factory.mktemp("operators") / "operators.so"
    sources = (CUDA / "operators.cpp", HERE / "cuda_stand_in.cpp")
    compile_("-std=c++20", "-shared", "-fPIC", *sources, "-o", library, *LIBRARIES, SYMBOLIC)
    torch.ops.load_library(library)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return Operators(*(lambda *a, op=op: op.redispatch(keys, *a) for op in OPERATORS["cuda"]))


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, all sums of which are exact."""
    return torch.randint(-2, 3, shape).to(dtype)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them, and dimensions in another order where there are two."""
    apart = torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    return apart.mT.contiguous().mT if t.dim() > 1 and t.numel() else apart


def problem(rows: int, sets: tuple[int, ...], num_steps: int, dim: int, dtype: torch.dtype, change=strided):
    shapes = (rows, dim), (*sets, num_steps, dim), (*sets, num_steps, dim), (*sets, num_steps)
    return tuple(change(numbers(*shape, dtype=dtype)) for shape in shapes)


def set_of_row(t: torch.Tensor, rows: int, shared_dims: int) -> torch.Tensor:
    """The parameters of each row, in double."""
    t = t.double()
    return t.expand(rows, *t.shape) if t.dim() == shared_dims else t[torch.arange(rows) % t.shape[0]]


def formulas_of(dtype: torch.dtype) -> list[tuple[int, int, float, float]]:
    return TANH + (OTHERS if dtype.itemsize > 2 else [])


def wanted_forward(z, u, w, b, formulas, sign=1):
    """As the stand-ins compute it."""
    constraint, activation, slope, log_det_eps = formulas
    steps = 1 + torch.arange(u.shape[-2]).double()
    u, w, b = (set_of_row(t, len(z), dims) for t, dims in ((u, 2), (w, 2), (b, 1)))
    z_K = z.double() + sign * ((u - 2 * w) * steps[:, None]).sum(-2)
    log_det = (b * steps).sum(-1) + constraint + 4 * activation + slope + log_det_eps
    return z_K, sign * log_det, b.T + z.double()[:, 0]


def wanted_weights(grad_z, grad_log_det, u, w, b, a, formulas):
    constraint, activation, slope, log_det_eps = formulas
    sets = u.shape[0] if u.dim() == 3 else 1
    per_set = (grad_z.double() - grad_log_det.double()[:, None]).view(-1, sets, grad_z.shape[1]).sum(0)
    du = u.double().view(sets, -1, u.shape[-1]) + per_set[:, None] + constraint
    db = b.double().view(sets, -1) + a.double().view(len(a), -1, sets).sum(1).T + slope + log_det_eps
    return du.view(u.shape), w.double() + activation, db.view(b.shape)


def equal(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got.double(), wanted.double())


def computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sets", [(), (1,), (2,), (6,)])
@pytest.mark.parametrize("change", [strided, torch.Tensor.contiguous])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_hands_over_every_stride(operators, dtype, change, sets):
    inputs = problem(6, sets, 3, 4, dtype, change)
    for formulas in formulas_of(dtype):
        wanted = wanted_forward(*inputs, formulas)
        for x, y, kind in zip(operators.planar_forward(*inputs, *formulas, True), wanted, (0, 1, 1), strict=True):
            equal(x, y, computed(dtype) if kind else dtype)
        z_K, log_det, a = operators.planar_forward(*inputs, *formulas, False)
        equal(z_K, wanted[0], dtype)
        equal(log_det, wanted[1], computed(dtype))
        assert (a.shape, a.dtype) == ((0,), computed(dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sets", [(), (1,), (2,), (6,)])
@pytest.mark.parametrize("change", [strided, torch.Tensor.contiguous])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_hands_over_every_stride(operators, dtype, change, sets):
    z, u, w, b = inputs = problem(6, sets, 3, 4, dtype, change)
    a = numbers(3, 6, dtype=computed(dtype))
    grad_z, grad_log_det = change(numbers(6, 4, dtype=dtype)), change(numbers(6, dtype=computed(dtype)))
    for formulas in formulas_of(dtype):
        dz, *weights = operators.planar_backward(grad_z, grad_log_det, *inputs, a, *formulas)
        equal(dz, grad_z.double() + grad_log_det.double()[:, None] + z.double(), dtype)
        for x, y in zip(weights, wanted_weights(grad_z, grad_log_det, u, w, b, a, formulas), strict=True):
            equal(x, y, dtype)
            assert x.shape == y.shape
        alone, *nothing = operators.planar_backward(grad_z, grad_log_det, *inputs, a, *formulas, False)
        equal(alone, dz, dtype)
        assert [t.shape for t in nothing] == [(0,)] * 3
    for grads in ((grad_z[:1, :1].expand(6, 4), grad_log_det[:1].expand(6)), (grad_z, grad_log_det)):
        dz = operators.planar_backward(*grads, *inputs, a, *USUAL)[0]
        equal(dz, grads[0].double() + grads[1].double()[:, None] + z.double(), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sets", [(), (1,), (2,), (6,)])
@pytest.mark.parametrize("change", [strided, torch.Tensor.contiguous])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_hands_over_every_stride(operators, dtype, change, sets):
    inputs = problem(6, sets, 3, 4, dtype, change)
    grad_z, grad_log_det = change(numbers(6, 4, dtype=dtype)), change(numbers(6, dtype=dtype))
    for *formulas, _ in TANH + OTHERS:
        outputs = operators.planar_inverse(*inputs, *formulas, True)
        for x, y in zip(outputs, wanted_forward(*inputs, (*formulas, 0), -1), strict=True):
            equal(x, y, dtype)
        assert operators.planar_inverse(*inputs, *formulas, False)[2].shape == (0,)
        a = outputs[2]
        dz, *weights = operators.planar_inverse_backward(grad_z, grad_log_det, *inputs, a, *formulas)
        equal(dz, grad_z.double() - grad_log_det.double()[:, None] + inputs[0].double(), dtype)
        for x, y in zip(weights, wanted_weights(grad_z, -grad_log_det, *inputs[1:], a, (*formulas, 0)), strict=True):
            equal(x, y, dtype)
            assert x.shape == y.shape
        alone, *nothing = operators.planar_inverse_backward(grad_z, grad_log_det, *inputs, a, *formulas, False)
        equal(alone, dz, dtype)
        assert [t.shape for t in nothing] == [(0,)] * 3


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sets", [1, 2, 6])
@pytest.mark.parametrize("change", [strided, torch.Tensor.contiguous])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_gradients_are_those_of_the_views(operators, dtype, change, sets):
    z, packed = change(numbers(6, 4, dtype=dtype)), change(numbers(sets, 3 * 9, dtype=dtype))
    a = numbers(3, 6, dtype=computed(dtype))
    grads = numbers(6, 4, dtype=dtype), numbers(6, dtype=computed(dtype))
    dz, dpacked = operators.planar_backward_packed(*grads, z, packed, a, *TANH[1])
    wanted = operators.planar_backward(*grads, z, *shapes.unpack(packed, 3, 4), a, *TANH[1])
    assert dpacked.shape == packed.shape
    assert dpacked.is_contiguous()
    for x, y in zip((dz, *shapes.unpack(dpacked, 3, 4)), wanted, strict=True):
        assert torch.equal(x, y)
    alone, nothing = operators.planar_backward_packed(*grads, z, packed, a, *TANH[1], False)
    assert torch.equal(alone, dz)
    assert nothing.shape == (0,)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "sets", "steps"), [(0, (), 3), (0, (0,), 3), (0, (2,), 3), (6, (), 0), (6, (2,), 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_rows_or_steps_nothing_is_launched(operators, dtype, rows, sets, steps):
    z, u, w, b = problem(rows, sets, steps, 4, dtype)
    z_K, log_det, a = operators.planar_forward(z, u, w, b, *USUAL, True)
    equal(z_K, z, dtype)
    equal(log_det, torch.zeros(rows), computed(dtype))
    assert a.shape == (steps, rows)
    grads = numbers(rows, 4, dtype=dtype), numbers(rows, dtype=computed(dtype))
    answers = [operators.planar_backward(*grads, z, u, w, b, a, *USUAL)]
    if dtype == torch.float64:
        for x, y in zip(operators.planar_inverse(z, u, w, b, *USUAL[:3], True), (z_K, log_det, a), strict=True):
            equal(x, y, dtype)
        answers.append(operators.planar_inverse_backward(*grads, z, u, w, b, a, *USUAL[:3]))
    for dz, *weights in answers:
        equal(dz, grads[0], dtype)
        for x, like in zip(weights, (u, w, b), strict=True):
            equal(x, torch.zeros_like(like), dtype)
    packed = torch.ones(sets[0] if sets else 1, steps * 9, dtype=dtype)
    dz, dpacked = operators.planar_backward_packed(*grads, z, packed, a, *USUAL)
    equal(dz, grads[0], dtype)
    equal(dpacked, torch.zeros_like(packed), dtype)


REFUSED = [
    ("z must have rank 2, got 1", {"z": torch.zeros(4)}),
    (r"u must be \[K, D\] or \[P, K, D\], got rank 1", {"u": torch.zeros(4)}),
    ("w must have size 3 in dimension 0, got 2", {"w": torch.zeros(2, 4)}),
    ("b must have size 3 in dimension 0, got 4", {"b": torch.zeros(4)}),
    ("b must be Float, got Double", {"b": torch.zeros(3, dtype=torch.float64)}),
    ("w must be on a CUDA device, the same as z", {"w": torch.zeros(3, 4, device="meta")}),
    (
        "z must have a multiple of 5 rows",
        {"u": torch.zeros(5, 3, 4), "w": torch.zeros(5, 3, 4), "b": torch.zeros(5, 3)},
    ),
    ("z must be float32, float64, bfloat16 or float16, got Int", {n: torch.int32 for n in "zuwb"}),
    ("z must have 1 to 32 columns on CUDA, got 33", {n: (3, 33) for n in "zuw"}),
    ("grad_z must have size 6 in dimension 0, got 5", {"grad_z": torch.zeros(5, 4)}),
    ("grad_log_det must be Float, got BFloat16", {"grad_log_det": torch.zeros(6, dtype=torch.bfloat16)}),
    ("a must be contiguous, as planar_forward returned it", {"a": torch.zeros(6, 3).T}),
    ("the kernel unlucky could not be launched: 13 columns", {n: (3, 13) for n in "zuw"} | {"grad_z": (6, 13)}),
]


@pytest.mark.parametrize(("message", "changes"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refused_with_the_reason(operators, message, changes):
    shapes = {"grad_z": (6, 4), "grad_log_det": (6,), "z": (6, 4), "u": (3, 4), "w": (3, 4), "b": (3,), "a": (3, 6)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, change in changes.items():
        if isinstance(change, torch.dtype):
            change = arguments[name].to(change)
        elif isinstance(change, tuple):
            change = torch.zeros(len(arguments[name]), change[1])
        arguments[name] = change
    with pytest.raises(RuntimeError, match=message):
        operators.planar_backward(*arguments.values(), *USUAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_half_precisions_have_not_is_refused(operators, dtype):
    inputs = problem(6, (), 3, 4, dtype)
    packed = numbers(6, 3 * 9, dtype=dtype)
    saved = numbers(6, 4, dtype=dtype), numbers(6, dtype=torch.float32), inputs[0]
    a = numbers(3, 6, dtype=torch.float32)
    message = "z must be float32 or float64 on CUDA for other activations.*got (BFloat16|Half): convert it to float32"
    for formulas in OTHERS[0], FlowSpec(log_det_eps=1e-4).arguments():
        with pytest.raises(RuntimeError, match=message):
            operators.planar_forward(*inputs, *formulas, True)
        with pytest.raises(RuntimeError, match=message):
            operators.planar_backward(*saved, *inputs[1:], a, *formulas)
        with pytest.raises(RuntimeError, match=message):
            operators.planar_backward_packed(*saved, packed, a, *formulas)
    with pytest.raises(RuntimeError, match="z must be float32 or float64 for the inverse, got"):
        operators.planar_inverse(*inputs, *USUAL[:3], True)
    with pytest.raises(RuntimeError, match="z must be float32 or float64 for the inverse, got"):
        operators.planar_inverse_backward(*saved, *inputs[1:], a, *USUAL[:3])


def test_numbers_without_a_formula_are_refused(operators):
    inputs = problem(6, (), 3, 4, torch.float32)
    with pytest.raises(RuntimeError, match=r"constraint must be in \[0, 2\], got 3"):
        operators.planar_forward(*inputs, 3, 0, 0.2, 0.0, True)
    with pytest.raises(RuntimeError, match=r"activation must be in \[0, 4\], got -1"):
        operators.planar_inverse(*inputs, 0, -1, 0.2, True)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("z must have a multiple of 5 rows", {"u": (5, 3, 4), "w": (5, 3, 4), "b": (5, 3)}),
        ("grad_log_det must have rank 1, got 2", {"grad_log_det": (6, 1)}),
        ("a must have size 3 in dimension 0, got 2", {"a": (2, 6)}),
        ("the kernel unlucky could not be launched: 13 columns", {n: (3, 13) for n in "uw"} | {"z": (6, 13)}),
    ],
)
def test_the_inverse_is_refused_with_the_reason(operators, message, changes):
    shapes = {"grad_z": (6, 4), "grad_log_det": (6,), "z": (6, 4), "u": (3, 4), "w": (3, 4), "b": (3,), "a": (3, 6)}
    shapes |= changes | {"grad_z": changes.get("z", (6, 4))}
    with pytest.raises(RuntimeError, match=message):
        operators.planar_inverse_backward(*map(torch.zeros, shapes.values()), *USUAL[:3])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("packed must have size 27 in dimension 1, got 26", {"packed": (2, 26)}),
        ("packed must be Float, got Half", {"packed": torch.zeros(2, 27, dtype=torch.float16)}),
        ("z must have a multiple of 4 rows", {"packed": (4, 27)}),
        ("grad_log_det must have rank 1, got 2", {"grad_log_det": (6, 1)}),
    ],
)
def test_packed_is_refused_with_the_reason(operators, message, changes):
    shapes = {"grad_z": (6, 4), "grad_log_det": (6,), "z": (6, 4), "packed": (2, 27), "a": (3, 6)} | changes
    arguments = [torch.zeros(shape) if isinstance(shape, tuple) else shape for shape in shapes.values()]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        operators.planar_backward_packed(*arguments, *USUAL)
