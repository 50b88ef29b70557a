"""Who computes a flow, and how one is chosen."""

from vvae_fast.backends.reference import REFERENCE, as_functions_of
from vvae_fast.backends.selection import (
    check_name,
    info,
    needs_plain_torch,
    select,
    select_ordinary,
    select_sylvester,
    use_backend,
)

__all__ = [
    "REFERENCE",
    "as_functions_of",
    "check_name",
    "info",
    "needs_plain_torch",
    "select",
    "select_ordinary",
    "select_sylvester",
    "use_backend",
]
