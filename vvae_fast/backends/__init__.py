"""Who computes a flow, and how one is chosen."""

from vvae_fast.backends.selection import (
    CPP,
    CUDA,
    REFERENCE,
    TRITON,
    Backend,
    check_name,
    info,
    needs_plain_torch,
    select,
    select_ordinary,
    use_backend,
)

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
