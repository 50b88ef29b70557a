"""Problems that hypothesis draws: shapes at the edges of vectors and tiles, any strides, formulas, scales."""

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from problems import Problem
from torch import Tensor

from vvae_fast.spec import ACTIVATIONS, CONSTRAINTS, FlowSpec

# 0 and the neighbours of every power of two: where vectors, chunks of steps and tiles of rows begin and end.
EDGES = sorted({0} | {2**k + off for k in range(11) for off in (-1, 0, 1)})
WORK = 120_000  # multiply-adds of a drawn problem, rows x K x D
COMPACT_ROWS = 16  # of one parameter set, from which on the C++ kernels take the compact form: csrc/cpu/schedule.h

seeds = st.integers(0, 2**31 - 1)
activations = st.sampled_from(ACTIVATIONS)
slopes = st.sampled_from([0.2, 1e-3, 0.5, 1.0])


def edges(least: int, most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in EDGES if least <= n <= most])


class Size(NamedTuple):
    samples: int  # for each parameter set
    sets: int | None  # None where all rows share one
    steps: int
    dim: int

    @property
    def params(self) -> tuple[int, ...]:
        return () if self.sets is None else (self.sets,)

    @property
    def batch(self) -> tuple[int, ...]:
        return (self.samples, *self.params)

    @property
    def rows(self) -> int:
        return math.prod(self.batch)


@st.composite
def sizes(draw, most_steps: int = 129, dims: tuple[int, int] = (0, 129), most_rows: int = 1025, work: int = WORK):
    """One set for all rows, one for each, for few rows each or for many."""
    steps, dim = draw(edges(0, most_steps)), draw(edges(*dims))
    rows = min(most_rows, max(1, work // max(1, steps * dim)))
    kind = draw(st.sampled_from(["shared", "each", "few", "many"]))
    if kind == "shared":
        return Size(draw(edges(0, rows)), None, steps, dim)
    if kind == "each":
        return Size(1, draw(edges(0, rows)), steps, dim)
    least, most = (0, COMPACT_ROWS - 1) if kind == "few" else (COMPACT_ROWS, 65)
    samples = draw(edges(least, max(least, min(most, rows))))
    return Size(samples, draw(edges(0, max(1, rows // max(1, samples)))), steps, dim)


@st.composite
def formulas(draw, inverse: bool = False) -> FlowSpec:
    """Any; with `inverse`, those that an inverse takes."""
    constraint = draw(st.sampled_from([c for c in CONSTRAINTS if not inverse or c != "none"]))
    eps = 0.0 if inverse else draw(st.sampled_from([0.0, 0.0, 1e-4]))
    return FlowSpec(constraint, draw(activations), draw(slopes), eps)


class Scales(NamedTuple):
    z: float = 1.0
    params: float = 0.5
    grads: float = 1.0


USUAL = Scales()


def problem(size: Size, seed: int, scales: Scales = USUAL, dtype: torch.dtype = torch.float64) -> Problem:
    """As problems.py draws them, at any scale and with D = 0 too: values that float32 holds, or infinities."""
    g = torch.Generator().manual_seed(seed)

    def randn(scale: float, *shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(torch.float32).to(dtype)

    root = max(1, size.dim) ** -0.25
    matrix, scale = (*size.params, size.steps, size.dim), scales.params
    u, w, b = randn(scale * root, *matrix), randn(scale * root * root, *matrix), randn(scale, *matrix[:-1])
    grads = randn(scales.grads, *size.batch, size.dim), randn(scales.grads, *size.batch)
    return Problem(randn(scales.z, *size.batch, size.dim), u, w, b, *grads)


def flat(p: Problem) -> Problem:
    """As the operators take it: z, grad_z [R, D] and grad_log_det [R]."""
    rows, dim = p.z.shape[:-1].numel(), p.z.shape[-1]
    return p._replace(
        z=p.z.reshape(rows, dim), grad_z=p.grad_z.reshape(rows, dim), grad_log_det=p.grad_log_det.reshape(rows)
    )


class Layout(NamedTuple):
    """How a tensor lies in its memory."""

    order: tuple[int, ...]  # the dimensions from the outermost to the innermost
    gaps: tuple[int, ...]  # an element of each dimension takes so much room; 0: all of its elements are one
    offset: int  # elements in front of it
    negated: bool  # a view that negates, as PyTorch makes of imaginary parts


@st.composite
def layouts(draw, rank: int) -> Layout:
    order = tuple(draw(st.permutations(range(rank))))
    gaps = tuple(draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 0]), min_size=rank, max_size=rank)))
    return Layout(order, gaps, draw(st.sampled_from([0, 0, 1, 3, 7, 16])), draw(st.integers(0, 7)) == 0)


class Placed(NamedTuple):
    view: Tensor
    memory: Tensor  # what it lies in, NaN elsewhere
    before: Tensor  # a copy of the memory's bytes

    @property
    def is_untouched(self) -> bool:
        return torch.equal(self.memory.view(torch.uint8), self.before)


def place(t: Tensor, layout: Layout) -> Placed:
    """The values of t as the layout has them; along a dimension without room, its first ones."""
    strides, extent = [0] * t.dim(), 1
    for dim in reversed(layout.order):
        strides[dim] = extent * layout.gaps[dim]
        extent += max(0, t.shape[dim] - 1) * strides[dim]
    memory = t.new_full((layout.offset + extent + 5,), math.nan)
    view = memory.as_strided(t.shape, strides, layout.offset)
    for dim, stride in enumerate(strides):
        if stride == 0 and t.shape[dim]:
            t = t.narrow(dim, 0, 1)
    ones = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
    view[ones].copy_(-t if layout.negated else t)
    view = torch._neg_view(view) if layout.negated else view
    return Placed(view, memory, memory.view(torch.uint8).clone())


@st.composite
def placements(draw, size: Size) -> list[Layout]:
    """One for each tensor of a flat problem."""
    sets = len(size.params)
    return [draw(layouts(rank)) for rank in (2, 2 + sets, 2 + sets, 1 + sets, 2, 1)]
