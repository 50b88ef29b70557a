"""Who computes a flow, and how one is chosen."""

from vvae_fast.backends.base import Backend
from vvae_fast.backends.cpp import CPP
from vvae_fast.backends.cuda import CUDA
from vvae_fast.backends.reference import REFERENCE
from vvae_fast.backends.selection import (
    check_name,
    info,
    needs_plain_torch,
    select,
    select_ordinary,
    use_backend,
)
from vvae_fast.backends.triton import TRITON

__all__ = [
    "CPP",
    "CUDA",
    "REFERENCE",
    "TRITON",
    "Backend",
    "check_name",
    "info",
    "needs_plain_torch",
    "select",
    "select_ordinary",
    "use_backend",
]
