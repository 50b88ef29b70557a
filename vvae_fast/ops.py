"""The operator schemas, their fakes, and the extension that implements them.

    planar_forward(z, u, w, b, constrained, save) -> (z_K, log_det, a)
    planar_backward(grad_z, grad_log_det, z, u, w, b, a, constrained) -> (dz, du, dw, db)
    planar_backward_packed(grad_z, grad_log_det, z, packed, a, constrained) -> (dz, dpacked)

z [R, D]; shared u, w [K, D] and b [K], or P sets u, w [P, K, D] and b [P, K], row r using set r mod P; any strides.
packed [P, K (2 D + 1)] holds the u, w and b of each set behind one another, as a linear head computes them.
The pre-activations a are [K, R] when `save`, else empty: with z they are all that the backward needs.
"""

from pathlib import Path

import torch
from torch import Tensor

from vvae_fast import config

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

_NAMESPACE = "vvae_fast"

torch.library.define(
    f"{_NAMESPACE}::planar_forward",
    "(Tensor z, Tensor u, Tensor w, Tensor b, bool constrained, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    f"{_NAMESPACE}::planar_backward",
    "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor u, Tensor w, Tensor b, Tensor a, bool constrained)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    f"{_NAMESPACE}::planar_backward_packed",
    "(Tensor grad_z, Tensor grad_log_det, Tensor z, Tensor packed, Tensor a, bool constrained) -> (Tensor, Tensor)",
)


def _check_fake(**tensors: Tensor) -> None:
    """The kernels check shapes; tensors of two devices never reach them and would end in a fake."""
    devices = {name: str(t.device) for name, t in tensors.items()}
    torch._check(len(set(devices.values())) == 1, lambda: f"all tensors must be on one device, got {devices}")


@torch.library.register_fake(f"{_NAMESPACE}::planar_forward")
def _(z: Tensor, u: Tensor, w: Tensor, b: Tensor, constrained: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_fake(z=z, u=u, w=w, b=b)
    rows = z.shape[0]
    a = z.new_empty((u.shape[-2], rows) if save else (0,))
    return z.new_empty(z.shape), z.new_empty((rows,)), a


@torch.library.register_fake(f"{_NAMESPACE}::planar_backward_packed")
def _(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, packed: Tensor, a: Tensor, constrained: bool
) -> tuple[Tensor, Tensor]:
    _check_fake(grad_z=grad_z, grad_log_det=grad_log_det, z=z, packed=packed, a=a)
    return z.new_empty(z.shape), packed.new_empty(packed.shape)


@torch.library.register_fake(f"{_NAMESPACE}::planar_backward")
def _(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, u: Tensor, w: Tensor, b: Tensor, a: Tensor, constrained: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_fake(grad_z=grad_z, grad_log_det=grad_log_det, z=z, u=u, w=w, b=b, a=a)
    return z.new_empty(z.shape), u.new_empty(u.shape), w.new_empty(w.shape), b.new_empty(b.shape)


planar_forward = torch.ops.vvae_fast.planar_forward.default
planar_backward = torch.ops.vvae_fast.planar_backward.default
planar_backward_packed = torch.ops.vvae_fast.planar_backward_packed.default


def build_facts() -> dict[str, object]:
    """How the extension was built; empty where it did not load."""
    return dict(_C.build_facts()) if _C is not None else {}


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
