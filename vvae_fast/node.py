"""The optional extension vvae_fast._C_node: an ordinary call of the flow, see `shapes.are_ordinary`, in C++ with its
autograd node.

It gives the same bits as `autograd`'s Functions and costs less to call, and calling is most of what a small flow costs.
libtorch's C++ interface changes from release to release, so the extension serves the torch that it was built for and no
other; where it does not serve, `autograd` does.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from vvae_fast import config, shapes
from vvae_fast.backends import operators


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension, or why it does not serve."""
    if not config.wants_node():
        return None, "the environment variable VVAE_FAST_NODE is 0"
    try:
        import vvae_fast._C_node as _C_node
    except ImportError as error:
        return None, f"the extension vvae_fast._C_node did not load ({error})"
    if _C_node.torch_version() != torch.__version__:
        return None, f"vvae_fast._C_node was built for torch {_C_node.torch_version()}, here is {torch.__version__}"
    return _C_node, None


_C_node, load_error = _load()


def unobserved(are_ordinary: Callable[..., bool]) -> Callable[..., bool]:
    """The check of a call that neither torch.func, nor torch.jit.trace, nor torch.export looks at."""

    def check(*args) -> bool:
        if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
            return False
        return not torch.compiler.is_compiling() and are_ordinary(*args)

    return check


is_ordinary, is_ordinary_packed = (
    (_C_node.is_ordinary, _C_node.is_ordinary_packed)
    if _C_node is not None
    else (unobserved(shapes.are_ordinary), unobserved(shapes.is_ordinary_packed))
)


def run(call, z: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """`autograd.run` of an ordinary call: z_K [R, D] and log_det [R]."""
    prefix = operators.PREFIXES[call.backend.name]
    if call.num_steps is None:
        return _C_node.planar_flow(z, *params, *call.arguments, prefix)
    return _C_node.packed_planar_flow(z, *params, call.num_steps, *call.arguments, prefix)
