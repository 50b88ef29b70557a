"""The optional extension vvae_fast._C_node: an ordinary call of the flow, see `shapes.is_ordinary`, in C++ with its
autograd node.

It gives the same bits as `autograd`'s Functions and costs less to call, and calling is most of what a small flow costs.
libtorch's C++ interface changes from release to release, so the extension serves the torch that it was built for and no
other; where it does not serve, `autograd` does.
"""

from typing import Any

import torch

from vvae_fast import config, shapes


def _load() -> tuple[Any, str | None]:
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


extension, load_error = _load()
serves = extension is not None
planar_flow, packed_planar_flow = (extension.planar_flow, extension.packed_planar_flow) if serves else (None, None)
headed_planar_flow = extension.headed_planar_flow if serves else None
_checks = extension if serves else shapes
is_ordinary, is_ordinary_packed = _checks.is_ordinary, _checks.is_ordinary_packed
is_ordinary_headed = _checks.is_ordinary_headed
