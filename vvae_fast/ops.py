"""The operator schemas, their fakes, and the extensions that implement those of the C++ and the CUDA backend.

    planar_forward(z, u, w, b, *formulas, save) -> (z_K, log_det, a)
    planar_backward(grad_z, grad_log_det, z, u, w, b, a, *formulas, params=True) -> (dz, du, dw, db)
    planar_backward_packed(grad_z, grad_log_det, z, packed, a, *formulas, params=True) -> (dz, dpacked)
    planar_inverse(z, u, w, b, *formulas, save) -> (z_0, log_det, a)
    planar_inverse_backward(grad_z, grad_log_det, z, u, w, b, a, *formulas, params=True) -> (dz, du, dw, db)

z [R, D]; shared u, w [K, D] and b [K], or P sets u, w [P, K, D] and b [P, K], row r using set r mod P; any strides.
packed [P, K (2 D + 1)] holds the u, w and b of each set behind one another, as a linear head computes them.
The pre-activations a are [K, R] when `save`, else empty: with z they are all that the backward needs. log_det and a
have the dtype of computation. The inverse's a are the same pre-activations, and its z is what it was given, z_K.
Without `params` nobody wants du, dw, db or dpacked: they are empty, [0], and the kernels leave out what they can of
their work; dz has the same bits.
*formulas are `shapes.Formulas.numbers()`, for the inverse without the last. The operators of the other backends are
named triton_planar_forward, cuda_planar_forward and so on.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from vvae_fast import config, shapes

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
    """What a backend implements."""

    planar_forward: OpOverload
    planar_backward: OpOverload
    planar_backward_packed: OpOverload
    planar_inverse: OpOverload
    planar_inverse_backward: OpOverload


_INVERTIBLE = "int constraint, int activation, float slope"
_FORMULAS = f"{_INVERTIBLE}, float log_det_eps"
_PARAMS = "bool params=True"
_SCHEMAS = {
    "planar_forward": f"(Tensor z, Tensor u, Tensor w, Tensor b, {_FORMULAS}, bool save) -> (Tensor, Tensor, Tensor)",
    "planar_backward": "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor u, Tensor w, Tensor b, Tensor a,"
    f" {_FORMULAS}, {_PARAMS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "planar_backward_packed": "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor packed, Tensor a,"
    f" {_FORMULAS}, {_PARAMS}) -> (Tensor, Tensor)",
    "planar_inverse": f"(Tensor z, Tensor u, Tensor w, Tensor b, {_INVERTIBLE}, bool save) -> (Tensor, Tensor, Tensor)",
    "planar_inverse_backward": "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor u, Tensor w, Tensor b,"
    f" Tensor a, {_INVERTIBLE}, {_PARAMS}) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _check_fake(**tensors: Tensor) -> None:
    """The kernels check shapes; tensors of two devices never reach them and would end in a fake."""
    devices = {name: str(t.device) for name, t in tensors.items()}
    torch._check(len(set(devices.values())) == 1, lambda: f"all tensors must be on one device, got {devices}")


def _planar_forward(z: Tensor, u: Tensor, w: Tensor, b: Tensor, *formulas_and_save) -> tuple[Tensor, Tensor, Tensor]:
    *_, save = formulas_and_save
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
    *formulas_and_params,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_fake(grad_z=grad_z, grad_log_det=grad_log_det, z=z, u=u, w=w, b=b, a=a)
    return z.new_empty(z.shape), *(_gradient(t, formulas_and_params) for t in (u, w, b))


def _planar_backward_packed(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, packed: Tensor, a: Tensor, *formulas_and_params
) -> tuple[Tensor, Tensor]:
    _check_fake(grad_z=grad_z, grad_log_det=grad_log_det, z=z, packed=packed, a=a)
    return z.new_empty(z.shape), _gradient(packed, formulas_and_params)


def _gradient(of: Tensor, formulas_and_params: tuple[object, ...]) -> Tensor:
    """Of a parameter; `params` is the last argument, and left out where it is True."""
    return of.new_empty((0,) if formulas_and_params[-1] is False else of.shape)


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


def unpack(packed: Tensor, num_steps: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views u, w [*params, K, D] and b [*params, K] of packed [*params, K (2 D + 1)]."""
    u, w, b = packed.split_with_sizes([num_steps * dim, num_steps * dim, num_steps], -1)
    return u.unflatten(-1, (num_steps, dim)), w.unflatten(-1, (num_steps, dim)), b


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
