"""What every launcher of Sylvester flows shares: the tensors of a call, checked and readable, and its sizes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast.triton.launch import Launch, ceil_div
from vvae_fast.triton.sylvester import sizes as by_size
from vvae_fast.triton.sylvester.sizes import Fixed


class Sizes(NamedTuple):
    """What a plan is made from."""

    rows: int
    layers: int
    sets: int
    fixed: Fixed
    strides: tuple[int, ...]  # of the sets of each parameter
    dtype: torch.dtype

    @property
    def rows_per_set(self) -> int:
        return self.rows // self.sets

    def launch(self, kernel: Callable[..., Any], *arguments: Any) -> Launch:
        """Of a kernel that takes rows, and as its first arguments after the tensors these sizes."""
        block, num_warps = by_size.block(self.fixed.dim, self.fixed.units, self.dtype)
        first = self.rows, self.layers, self.sets, *self.strides, self.fixed, block
        return Launch(kernel, (ceil_div(self.rows, block.rows),), *first, *arguments, num_warps=num_warps, capped=True)


class Call:
    """A call's z [R, D] and its parameters, of which only the sets' strides are free; shapes as in
    backends/sylvester.py. Raises ValueError or TypeError for what does not fit: a kernel would read other memory."""

    def __init__(self, z: Tensor, *params: Tensor | None) -> None:
        columns, r, r_tilde, d, d_tilde, b, s = self.given = params
        assert r is not None
        if z.dim() != 2 or r.dim() != 4 or not z.is_contiguous():
            raise ValueError(f"z must be contiguous [R, D] and r [P, L, M, M], got {tuple(z.shape)}, {tuple(r.shape)}")
        (rows, dim), (sets, layers, units, _) = z.shape, r.shape
        if columns is None and units != dim:
            raise ValueError(f"r must have {dim} units without columns, got {units}")
        if rows % sets if sets else rows:
            raise ValueError(f"z must have a multiple of {sets} rows, one for each parameter set, got {rows}")
        square, vector = (sets, layers, units, units), (sets, layers, units)
        check("columns", columns, (sets, layers, units, dim), z)
        check("r", r, square, z)
        check("r_tilde", r_tilde, square, z)
        for name, t in (("d", d), ("d_tilde", d_tilde), ("b", b), ("s", s)):
            check(name, t, vector, z)
        if z.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"z must be float32 or float64, got {z.dtype}")
        most, got = by_size.most_numbers(z.dtype), by_size.numbers(dim, units)
        if got > most:
            raise ValueError(f"M x D in powers of two must be at most {most} in {z.dtype}, got {got}")
        self.z, self.rows, self.dim, self.sets, self.layers, self.units = z, rows, dim, sets, layers, units
        columns, r, r_tilde, d, d_tilde, b, s = (t if t is None else _readable(t) for t in params)
        # A kernel that does not use a tensor takes another one in its place.
        self.params = tuple(z if t is None else t for t in (columns, r, r_tilde, d, d_tilde, b, s))
        self.sizes = Sizes(
            rows,
            layers,
            sets,
            Fixed(dim, units, columns is not None, r_tilde is None, sets == 1),
            tuple(t.stride(0) if sets > 1 else 0 for t in self.params),
            z.dtype,
        )

    @property
    def is_launched(self) -> bool:
        return self.rows > 0 and self.layers > 0


def check(name: str, t: Tensor | None, shape: tuple[int, ...], z: Tensor) -> None:
    """Raises ValueError or TypeError if a tensor has not this shape, or z's device and dtype."""
    if t is None:
        return
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if t.device != z.device:
        raise ValueError(f"{name} must be on z's device {z.device}, got {t.device}")
    if t.dtype != z.dtype:
        raise TypeError(f"{name} must have z's dtype {z.dtype}, got {t.dtype}")


def _readable(t: Tensor) -> Tensor:
    """Contiguous but for its first dimension."""
    return t if t.shape[0] == 0 or t[0].is_contiguous() else t.contiguous()
