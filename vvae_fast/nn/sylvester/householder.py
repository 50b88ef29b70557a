"""Householder flows as modules."""

from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast.functional import planar_flow
from vvae_fast.nn.base import AmortizedFlow, Flow
from vvae_fast.nn.sylvester.orthonormal import reflectors
from vvae_fast.shapes import check_size, compute_dtype, full_precision


class _Householder(Flow):
    """The base of both modules."""

    def __init__(self, dim: int, num_reflections: int, backend: str | None) -> None:
        super().__init__(dim, backend)
        self.num_reflections = check_size("num_reflections", num_reflections, 0)

    def _draw(self, like: Tensor) -> Tensor:
        """v [K, D] in pairs of equal vectors, whose reflections cancel; an odd K leaves the last one."""
        drawn = like.detach().new_empty(((self.num_reflections + 1) // 2, self.dim)).normal_()
        return _in_pairs(drawn)[: self.num_reflections]

    def _apply_to(self, z: Tensor, v: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """A reflection is the linear planar step with u = -w of length sqrt 2; its log|det| is 0."""
        w = reflectors(full_precision(v))
        w = w.flip(-2) if inverse else w
        b = torch.zeros_like(w[..., 0])
        z_out, _ = planar_flow(z.to(w.dtype), -w, w, b, activation="linear", constraint="none", **self._options())
        return z_out.to(z.dtype), z.new_zeros(z.shape[:-1], dtype=compute_dtype(z.dtype))

    def _run(self, z: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (v,) = own
        return self._apply_to(z, v)

    def _trajectory(self, z: Tensor, v: Tensor) -> Tensor:
        wide, points = full_precision(z), [z]
        for k in range(self.num_reflections):
            wide, _ = self._apply_to(wide, v.narrow(-2, k, 1))
            points.append(wide.to(z.dtype))
        return torch.stack(points)


def _in_pairs(rows: Tensor) -> Tensor:
    """[2 N, *] of [N, *], each row twice."""
    return rows.repeat_interleave(2, 0)


class HouseholderFlow(_Householder):
    """K Householder reflections z - 2 v v^T z / |v|^2, which all samples share (Tomczak & Welling 2016).

    `flow(z)` maps z [*batch, D] to (z_K [*batch, D], log_det [*batch], zeros: a flow of reflections keeps volumes).
    `flow.inverse(z)` maps back. Trained is v [K, D], whose lengths do not matter; a vector of zeros reflects nothing.
    backend is that of `planar_flow`: the reflections are linear planar steps.

    Starts as the identity map, to rounding, with pairs of equal vectors. An odd number of reflections leaves one: it
    mirrors z in a random direction.

    Raises TypeError or ValueError if dim (at least 1) or num_reflections (at least 0) is not a size, or for an unknown
    backend.
    """

    def __init__(self, dim: int, num_reflections: int, *, backend: str | None = None) -> None:
        super().__init__(dim, num_reflections, backend)
        self.v = nn.Parameter(torch.empty(self.num_reflections, self.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws pairs of equal vectors."""
        with torch.no_grad():
            self.v.copy_(self._draw(self.v))

    def params(self) -> Tensor:
        """v [K, D]."""
        return self.v

    def _own(self, rows: int, features: Any) -> tuple[Tensor, ...]:
        return (self.v.expand(rows, *self.v.shape),)

    def _params_for(self, z: Tensor) -> Tensor:
        self._check_z(z, self.v)
        return self.params()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_K [*batch, D], log_det [*batch], zeros) for z [*batch, D]; errors as `planar_flow`'s."""
        return self._apply_to(z, self._params_for(z))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0 [*batch, D], log_det [*batch], zeros) for z [*batch, D]: the reflections from the last to the first."""
        return self._apply_to(z, self._params_for(z), inverse=True)

    def trajectory(self, z: Tensor) -> Tensor:
        """z before, between and after the reflections, [K + 1, *batch, D] for z [*batch, D]."""
        return self._trajectory(z, self._params_for(z))

    def extra_repr(self) -> str:
        return self._repr(dim=self.dim, num_reflections=self.num_reflections)


class AmortizedHouseholderFlow(_Householder, AmortizedFlow):
    """K Householder reflections with vectors for each data point, which a linear head computes from a context.

    `flow(z, context)` takes context [*params, F] and z [*batch, D], where *params are the trailing dimensions of
    *batch, and returns (z_K [*batch, D], log_det [*batch], zeros). `flow.inverse(z, context)` maps back. The head is
    F -> K D; rank, normalise and layer_norm are those of `AmortizedPlanarFlow`.

    Starts as the identity map for every context, to rounding: the head gives pairs of equal vectors, which depend on
    the context. An odd number of reflections leaves one.

    Raises TypeError or ValueError if context_dim or rank (at least 1) is not a size, and as `HouseholderFlow` does.
    """

    _OUTPUTS = "K D"

    def __init__(
        self,
        dim: int,
        num_reflections: int,
        context_dim: int,
        *,
        rank: int | None = None,
        normalise: bool = False,
        layer_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_reflections, backend)
        self._make_head(context_dim, rank, normalise, layer_norm)
        self.reset_parameters()

    def _num_outputs(self) -> int:
        return self.num_reflections * self.dim

    def reset_parameters(self) -> None:
        """Draws a head, `head.up` with a rank, that gives pairs of equal vectors for every context."""
        last = self._last()
        self._start(self._draw(last.bias).flatten(), slice(0, 0))
        pairs = last.weight.detach().unflatten(0, (self.num_reflections, self.dim))  # [K, D, F]
        drawn = torch.empty_like(pairs[::2])
        self._draw_rows(drawn.flatten(0, 1))
        pairs.copy_(_in_pairs(drawn)[: self.num_reflections])

    def params(self, context: Tensor) -> Tensor:
        """v [*params, K, D] for context [*params, F]: a view of the head's output."""
        return self._raw(context)

    def _raw(self, context: Tensor, *z: Tensor) -> Tensor:
        return self._raw_of(self._packed(context, *z))

    def _raw_of(self, packed: Tensor) -> Tensor:
        return packed.unflatten(-1, (self.num_reflections, self.dim))

    def _flow_with(self, z: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_to(z, self._raw_of(packed))

    def _own(self, rows: int, features: Any) -> tuple[Tensor, ...]:
        return (self.params(features),)

    def _params_for(self, z: Tensor, context: Tensor) -> Tensor:
        return self._raw(context, z)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(z_K [*batch, D], log_det [*batch], zeros) for z [*batch, D] and context [*params, F]."""
        return self._flow_with(z, self._packed(context, z))

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0 [*batch, D], log_det [*batch], zeros) for z [*batch, D] and context [*params, F]."""
        return self._apply_to(z, self._params_for(z, context), inverse=True)

    def trajectory(self, z: Tensor, context: Tensor) -> Tensor:
        """z before, between and after the reflections, [K + 1, *batch, D], for context [*params, F]."""
        return self._trajectory(z, self._params_for(z, context))

    def extra_repr(self) -> str:
        sizes = {"dim": self.dim, "num_reflections": self.num_reflections, "context_dim": self.context_dim}
        return self._repr(**sizes, **self._head_options())
