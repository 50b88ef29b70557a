"""The operator schemas, their fakes, and the extensions that implement those of the C++ and the CUDA backend.

    planar_forward(z, u, w, b, *spec, save) -> (z_K, log_det, a)
    planar_backward(grad_z, grad_log_det, z, u, w, b, a, *spec, params=True) -> (dz, du, dw, db)
    planar_backward_packed(grad_z, grad_log_det, z, packed, a, *spec, params=True) -> (dz, dpacked)
    planar_inverse(z, u, w, b, *spec, save) -> (z_0, log_det, a)
    planar_inverse_backward(grad_z, grad_log_det, z, u, w, b, a, *spec, params=True) -> (dz, du, dw, db)

z [R, D]; shared u, w [K, D] and b [K], or P sets u, w [P, K, D] and b [P, K], row r using set r mod P; any strides.
packed [P, K (2 D + 1)] holds the u, w and b of each set behind one another, as a linear head computes them.
The pre-activations a are [K, R] when `save`, else empty: with z they are all that the backward needs. log_det and a
have the dtype of computation. The inverse's a are the same pre-activations, and its z is what it was given, z_K.
Without `params` nobody wants du, dw, db or dpacked: they are empty, [0], and the kernels leave out what they can of
their work; dz has the same bits.
*spec are `FlowSpec.arguments`. The operators of the other backends are named triton_planar_forward,
cuda_planar_forward and so on.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from vvae_fast import config, shapes
from vvae_fast.spec import FlowSpec

try:
    import vvae_fast._C as _C
except ImportError as error:
    _C = None
    load_error = (
        f"the extension vvae_fast._C did not load from {Path(__file__).parent} ({error}): build it with "
        "`pip install .` after `pip install torch`, and start Python outside the source folder"
    )
else:
    load_error = None


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    """The extension vvae_fast._C_cuda, or why there is none."""
    if torch.version.cuda is None:  # a torch without CUDA, or for AMD's GPUs, lacks the libraries that it is linked to
        return None, f"PyTorch {torch.__version__} is not built for CUDA{', but for ROCm' if torch.version.hip else ''}"
    built = build_facts().get("cuda_build", "built")
    if built != "built":
        return None, f"the extension vvae_fast._C_cuda was {built} (FORCE_CUDA=1 pip install . says what to do)"
    try:
        import vvae_fast._C_cuda as _C_cuda

        _C_cuda.most_dim("float32")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # one that an older build left, too
        return None, f"the extension vvae_fast._C_cuda did not load ({error}): build it again with `pip install .`"
    return _C_cuda, None


class Operators(NamedTuple):
    """What a backend implements: PyTorch's operators, or functions that are called as they are."""

    planar_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    planar_backward: Callable[..., tuple[Tensor, ...]]
    planar_backward_packed: Callable[..., tuple[Tensor, Tensor]]
    planar_inverse: Callable[..., tuple[Tensor, Tensor, Tensor]]
    planar_inverse_backward: Callable[..., tuple[Tensor, ...]]


_INVERTIBLE = "int constraint, int activation, float slope"  # of an inverse: `FlowSpec.arguments`
_SPEC = f"{_INVERTIBLE}, float log_det_eps"
_PARAMS = "bool params=True"
_SCHEMAS = {
    "planar_forward": f"(Tensor z, Tensor u, Tensor w, Tensor b, {_SPEC}, bool save) -> (Tensor, Tensor, Tensor)",
    "planar_backward": "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor u, Tensor w, Tensor b, Tensor a,"
    f" {_SPEC}, {_PARAMS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "planar_backward_packed": "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor packed, Tensor a,"
    f" {_SPEC}, {_PARAMS}) -> (Tensor, Tensor)",
    "planar_inverse": f"(Tensor z, Tensor u, Tensor w, Tensor b, {_INVERTIBLE}, bool save) -> (Tensor, Tensor, Tensor)",
    "planar_inverse_backward": "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor u, Tensor w, Tensor b,"
    f" Tensor a, {_INVERTIBLE}, {_PARAMS}) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _check_fake(**tensors: Tensor) -> None:
    """The kernels check shapes; tensors of two devices never reach them and would end in a fake."""
    devices = {name: str(t.device) for name, t in tensors.items()}
    torch._check(len(set(devices.values())) == 1, lambda: f"all tensors must be on one device, got {devices}")


def _planar_forward(z: Tensor, u: Tensor, w: Tensor, b: Tensor, *spec_and_save) -> tuple[Tensor, Tensor, Tensor]:
    *_, save = spec_and_save
    _check_fake(z=z, u=u, w=w, b=b)
    rows, dtype = z.shape[0], shapes.compute_dtype(z.dtype)
    a = z.new_empty((u.shape[-2], rows) if save else (0,), dtype=dtype)
    return z.new_empty(z.shape), z.new_empty((rows,), dtype=dtype), a


def _planar_backward(
    grad_z: Tensor,
    grad_log_det: Tensor,
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    a: Tensor,
    *spec_and_params,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_fake(grad_z=grad_z, grad_log_det=grad_log_det, z=z, u=u, w=w, b=b, a=a)
    return z.new_empty(z.shape), *(_gradient(t, spec_and_params) for t in (u, w, b))


def _planar_backward_packed(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, packed: Tensor, a: Tensor, *spec_and_params
) -> tuple[Tensor, Tensor]:
    _check_fake(grad_z=grad_z, grad_log_det=grad_log_det, z=z, packed=packed, a=a)
    return z.new_empty(z.shape), _gradient(packed, spec_and_params)


def _gradient(of: Tensor, spec_and_params: tuple[object, ...]) -> Tensor:
    """Of a parameter; `params` is the last argument, and left out where it is True."""
    return of.new_empty((0,) if spec_and_params[-1] is False else of.shape)


def _define(name: str, schema: str, fake: Callable) -> OpOverload:
    torch.library.define(f"vvae_fast::{name}", schema)
    torch.library.register_fake(f"vvae_fast::{name}", fake)
    return getattr(torch.ops.vvae_fast, name).default


def _define_flow(prefix: str) -> Operators:
    """The operators whose names start with `prefix`."""
    fakes = (_planar_forward, _planar_backward, _planar_backward_packed, _planar_forward, _planar_backward)
    named = zip(_SCHEMAS.items(), fakes, strict=True)
    return Operators(*(_define(prefix + name, schema, fake) for (name, schema), fake in named))


PREFIXES = {"cpp": "", "triton": "triton_", "cuda": "cuda_"}  # of the operators' names, by backend
OPERATORS = {backend: _define_flow(prefix) for backend, prefix in PREFIXES.items()}
planar_forward, planar_backward, planar_backward_packed, planar_inverse, planar_inverse_backward = OPERATORS["cpp"]


def in_python(find_module: Callable[[], ModuleType]) -> Operators:
    """Functions that are called as the operators are, by those of a module: with a FlowSpec for the spec's numbers. The
    module is asked for at each call, so that the first one may import it."""

    def function_of(operator: OpOverload) -> Callable[..., tuple[Tensor, ...]]:
        name, names = operator._opname, [argument.name for argument in operator._schema.arguments]
        first, end = names.index("constraint"), len(names) - 1  # the last is save or params

        def function(*args) -> tuple[Tensor, ...]:
            spec = FlowSpec.of_arguments(*args[first:end])
            return getattr(find_module(), name)(*args[:first], spec, *args[end:])

        return function

    return Operators(*map(function_of, OPERATORS["cpp"]))


def build_facts() -> dict[str, object]:
    """How the extension was built; empty where it did not load."""
    return dict(_C.build_facts()) if _C is not None else {}


def cuda_build_facts() -> dict[str, object]:
    """How the CUDA extension was built; empty where it did not load."""
    return dict(_C_cuda.build_facts()) if _C_cuda is not None else {}


def set_cuda_form(name: str) -> None:
    """Makes the CUDA kernels take the form "direct" or "compact", or the one that the shape chooses, "automatic"."""
    if _C_cuda is None:
        raise RuntimeError(f"the CUDA kernels are not there to take the form {name!r}: {cuda_load_error}")
    _C_cuda.set_form(name)


def isa_levels() -> tuple[str, ...]:
    """The instruction sets that the CPU kernels can use on this machine, widest first."""
    return tuple(_C.isa_levels()) if _C is not None else ()


def isa() -> str | None:
    """The instruction set that the CPU kernels use."""
    return _C.isa() if _C is not None else None


def set_isa(name: str) -> None:
    """Makes the CPU kernels use another instruction set; ValueError where this machine or build lacks it."""
    levels = isa_levels()
    if name not in levels:
        raise ValueError(f"the instruction set must be one of {levels} on this machine, got {name!r}")
    _C.set_isa(name)


if _C is not None and config.isa() is not None:
    try:
        set_isa(config.isa())
    except ValueError as error:
        load_error = f"VVAE_FAST_ISA: {error}"

_C_cuda, cuda_load_error = _load_cuda()
# The most columns that the CUDA kernels take, by the dtype of computation. Asked once: torch.compile sees through no
# call of the extension.
cuda_most_dim = (
    {dtype: _C_cuda.most_dim(str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.float64)}
    if _C_cuda is not None
    else {}
)
