"""Sylvester flows as modules."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vvae_fast.nn.base import AmortizedFlow, Flow, unautocast
from vvae_fast.nn.sylvester.orthonormal import orthonormal
from vvae_fast.nn.sylvester.triangles import diagonals, triangles
from vvae_fast.shapes import check_size, full_precision
from vvae_fast.spec import DEFAULT_SLOPE, FlowSpec
from vvae_fast.sylvester import packed_sylvester_flow

KINDS = ("orthogonal", "householder", "triangular")
_REFLECTIONS = 8  # of a householder layer by default


class SylvesterParams(NamedTuple):
    """The arguments of `sylvester_flow`: q [*params, L, D, M], or None for the triangular kind; r, r_tilde
    [*params, L, M, M]; b, s [*params, L, M]. In full precision."""

    q: Tensor | None
    r: Tensor
    r_tilde: Tensor
    b: Tensor
    s: Tensor


class _Packed(NamedTuple):
    """The arguments of `packed_sylvester_flow`: q [*params, L, D, M] or None; mixed [*params, L, M, M]; d, d_tilde, s
    and b [*params, L, M]. In full precision."""

    q: Tensor | None
    mixed: Tensor
    d: Tensor
    d_tilde: Tensor
    s: Tensor
    b: Tensor


class _Raw(NamedTuple):
    """What is trained: v [*params, L, H, D], which is None for the triangular kind, mixed [*params, L, M, M], and
    y, b [*params, L, M]."""

    v: Tensor | None
    mixed: Tensor
    y: Tensor
    b: Tensor


class _Sylvester(Flow):
    """The base of both modules: the sizes, and what they do with what is trained."""

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_units: int | None,
        kind: str,
        num_reflections: int,
        activation: str,
        slope: float,
        backend: str | None,
    ) -> None:
        super().__init__(dim, backend)
        self.num_layers = check_size("num_layers", num_layers, 1)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        self.kind = kind
        self.num_units = self.dim if num_units is None else check_size("num_units", num_units, 1)
        if kind == "triangular" and self.num_units != self.dim:
            raise ValueError(f"num_units must be D = {self.dim} or None for kind='triangular', got {num_units}")
        if self.num_units > self.dim:
            raise ValueError(f"num_units must be at most D = {self.dim}, got {num_units}: Q is [D, M] with M <= D")
        num_reflections = check_size("num_reflections", num_reflections, 1)
        if kind != "householder" and num_reflections != _REFLECTIONS:
            raise ValueError(f"num_reflections is for kind='householder' alone, got {num_reflections} for {kind!r}")
        # of a layer's Q
        self.num_reflections = {"orthogonal": self.num_units, "householder": num_reflections, "triangular": 0}[kind]
        self.slope = FlowSpec("none", activation, slope).checked().slope
        self.activation = activation

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of `sylvester_flow`."""
        return {"activation": self.activation, "slope": self.slope} | super()._options()

    def _draw(self, like: Tensor) -> _Raw:
        """The identity, R = 0: v of any direction, R~'s rows of about length 1 as a planar w, y and b from N(0, 1)."""
        layers, units = self.num_layers, self.num_units

        def normal(*shape: int) -> Tensor:
            return like.detach().new_empty(shape).normal_()

        v = normal(layers, self.num_reflections, self.dim) if self.num_reflections else None
        mixed = normal(layers, units, units).tril(-1) * units**-0.5
        return _Raw(v, mixed, normal(layers, units), normal(layers, units))

    def _q_of(self, v: Tensor) -> Tensor:
        return orthonormal(v, self.num_units)

    def _made_of(self, raw: _Raw) -> _Packed:
        q = None if raw.v is None else self._q_of(raw.v)
        mixed = full_precision(raw.mixed)
        return _Packed(q, mixed, *diagonals(mixed, full_precision(raw.y)), full_precision(raw.b))

    def _public(self, raw: _Raw) -> SylvesterParams:
        q = None if raw.v is None else self._q_of(raw.v)
        r, r_tilde, s = triangles(full_precision(raw.mixed), full_precision(raw.y))
        return SylvesterParams(q, r, r_tilde, full_precision(raw.b), s)

    def _apply_to(self, z: Tensor, params: _Packed, inverse: bool = False) -> tuple[Tensor, Tensor]:
        q, mixed, d, d_tilde, s, b = params
        with unautocast(z):
            wide = z.to(b.dtype)
            z_out, log_det = packed_sylvester_flow(
                wide, q, mixed, d, d_tilde, b, s=s, inverse=inverse, **self._options()
            )
        return z_out.to(z.dtype), log_det

    def _run(self, z: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self._apply_to(z, self._made_of(_Raw(*own) if self.num_reflections else _Raw(None, *own)))

    def _trajectory(self, z: Tensor, params: _Packed) -> Tensor:
        wide, points = z.to(params.b.dtype), [z]
        for layer in range(self.num_layers):
            q = None if params.q is None else params.q.narrow(-3, layer, 1)
            own = _Packed(q, params.mixed.narrow(-3, layer, 1), *(t.narrow(-2, layer, 1) for t in params[2:]))
            turned = params.q is None and layer % 2 == 1  # a first layer takes z as it is
            wide, _ = self._apply_to(wide.flip(-1) if turned else wide, own)
            wide = wide.flip(-1) if turned else wide
            points.append(wide.to(z.dtype))
        return torch.stack(points)

    def _sizes(self) -> dict[str, Any]:
        reflections = self.num_reflections if self.kind == "householder" else None
        sizes = {"dim": self.dim, "num_layers": self.num_layers, "num_units": self.num_units, "kind": self.kind}
        return sizes | {"num_reflections": reflections}


class SylvesterFlow(_Sylvester):
    """L Sylvester layers of M units, whose parameters all samples share (van den Berg et al. 2018, equation 13).

    `flow(z)` maps z [*batch, D] to (z_L [*batch, D], log_det [*batch] in nats); `flow.inverse(z)` maps back, with the
    log_det of the inverse. A layer z + Q R h(R~ Q^T z + b) is M planar steps that do not see each other, docs/math.md
    (57). Its Q is of one of three kinds:

    - "orthogonal": M orthonormal columns, the product of M Householder reflections.
    - "householder": M columns of the product of `num_reflections` Householder reflections, by default 8. M = D in the
      paper.
    - "triangular": the identity, and every second layer takes z in reverse order. M = D.

    num_units is M, by default D. Trained are v [L, H, D], the reflections; mixed [L, M, M], which has R's entries above
    its diagonal and R~'s below; x on mixed's diagonal and y [L, M], with R_ii = tanh x and R~_ii = tanh y, so that a
    layer has an inverse; and b [L, M]. The flow starts as the identity, R = 0: in the first step R alone has a
    gradient, and everything else from the second step on. In half precision v, mixed, y and b become Q, R and R~ in
    float32, and z may have the flow's dtype or float32.

    Raises TypeError or ValueError if dim, num_layers, num_units or num_reflections (at least 1) is not a size,
    num_units exceeds D or is not D for the triangular kind, num_reflections is given for another kind than
    "householder", or another argument is not a known name or is out of range.
    """

    v: Tensor | None

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_units: int | None = None,
        *,
        kind: str = "orthogonal",
        num_reflections: int = _REFLECTIONS,
        activation: str = "tanh",
        slope: float = DEFAULT_SLOPE,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_layers, num_units, kind, num_reflections, activation, slope, backend)
        layers, units = self.num_layers, self.num_units
        reflections = torch.empty(layers, self.num_reflections, self.dim)
        self.register_parameter("v", nn.Parameter(reflections) if self.num_reflections else None)
        self.mixed = nn.Parameter(torch.empty(layers, units, units))
        self.y = nn.Parameter(torch.empty(layers, units))
        self.b = nn.Parameter(torch.empty(layers, units))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the reflections, R~, y and b, and sets R to zero."""
        with torch.no_grad():
            for parameter, drawn in zip((self.v, self.mixed, self.y, self.b), self._draw(self.b), strict=True):
                if parameter is not None and drawn is not None:
                    parameter.copy_(drawn)

    def params(self) -> SylvesterParams:
        """The arguments of `sylvester_flow`: q [L, D, M] or None, r, r_tilde [L, M, M], b and s [L, M]."""
        return self._public(self._raw())

    def _raw(self) -> _Raw:
        return _Raw(self.v, self.mixed, self.y, self.b)

    def _own(self, rows: int, features: Any) -> tuple[Tensor, ...]:
        return tuple(t.expand(rows, *t.shape) for t in self._raw() if t is not None)

    def _params_for(self, z: Tensor) -> _Packed:
        self._check_z(z, self.b)
        return self._made_of(self._raw())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_L [*batch, D], log_det [*batch] in nats) for z [*batch, D]; errors as `sylvester_flow`'s."""
        return self._apply_to(z, self._params_for(z))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0 [*batch, D], log_det [*batch] of the inverse map in nats) for z [*batch, D]."""
        return self._apply_to(z, self._params_for(z), inverse=True)

    def trajectory(self, z: Tensor) -> Tensor:
        """z before, between and after the layers, [L + 1, *batch, D] for z [*batch, D]."""
        return self._trajectory(z, self._params_for(z))

    def extra_repr(self) -> str:
        return self._repr(**self._sizes())


class AmortizedSylvesterFlow(_Sylvester, AmortizedFlow):
    """L Sylvester layers of M units with a parameter set for each data point, which a linear head computes from a
    context.

    `flow(z, context)` takes context [*params, F] and z [*batch, D], where *params are the trailing dimensions of
    *batch, and returns (z_L [*batch, D], log_det [*batch] in nats). `flow.inverse(z, context)` maps back. kind,
    num_units, num_reflections, activation, slope and backend are those of `SylvesterFlow`; the head,
    F -> L (H D + M^2 + 2 M) with H reflections in a layer, gives its v, mixed, y and b. rank, normalise and
    layer_norm are those of `AmortizedPlanarFlow`.

    Starts as the identity map for every context, R = 0, with a b that depends on it.

    Raises TypeError or ValueError if context_dim or rank (at least 1) is not a size, and as `SylvesterFlow` does.
    """

    _OUTPUTS = "L (H D + M^2 + 2 M)"

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_units: int | None = None,
        context_dim: int | None = None,
        *,
        kind: str = "orthogonal",
        num_reflections: int = _REFLECTIONS,
        rank: int | None = None,
        normalise: bool = False,
        layer_norm: bool = False,
        activation: str = "tanh",
        slope: float = DEFAULT_SLOPE,
        backend: str | None = None,
    ) -> None:
        if context_dim is None:  # it has a default because num_units has one
            raise TypeError("context_dim must be given: the size F of the contexts [*params, F]")
        super().__init__(dim, num_layers, num_units, kind, num_reflections, activation, slope, backend)
        self._make_head(context_dim, rank, normalise, layer_norm)
        self.reset_parameters()

    def _lengths(self) -> list[int]:
        """Of v, mixed, y and b in the head's output."""
        layers, units = self.num_layers, self.num_units
        return [layers * self.num_reflections * self.dim, layers * units * units, layers * units, layers * units]

    def _num_outputs(self) -> int:
        return sum(self._lengths())

    def reset_parameters(self) -> None:
        """Puts a new `SylvesterFlow`'s parameters into the head's bias. In the head's weight only b's rows are not
        zero, and b depends on the context from the start; with a rank this holds for `head.up`."""
        drawn = self._draw(self._last().bias)
        bias = torch.cat([t.flatten() for t in drawn if t is not None])
        self._start(bias, slice(bias.numel() - drawn.b.numel(), None))

    def params(self, context: Tensor) -> SylvesterParams:
        """The arguments of `sylvester_flow` for context [*params, F]: q [*params, L, D, M] or None, r, r_tilde
        [*params, L, M, M], b and s [*params, L, M]."""
        return self._public(self._raw(context))

    def _raw(self, context: Tensor, *z: Tensor) -> _Raw:
        return self._raw_of(self._packed(context, *z))

    def _raw_of(self, packed: Tensor) -> _Raw:
        """Views of the head's output."""
        layers, units = self.num_layers, self.num_units
        v, mixed, y, b = packed.split_with_sizes(self._lengths(), -1)
        return _Raw(
            v.unflatten(-1, (layers, self.num_reflections, self.dim)) if self.num_reflections else None,
            mixed.unflatten(-1, (layers, units, units)),
            y.unflatten(-1, (layers, units)),
            b.unflatten(-1, (layers, units)),
        )

    def _own(self, rows: int, features: Any) -> tuple[Tensor, ...]:
        return tuple(t for t in self._raw(features) if t is not None)

    def _flow_with(self, z: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_to(z, self._made_of(self._raw_of(packed)))

    def _params_for(self, z: Tensor, context: Tensor) -> _Packed:
        return self._made_of(self._raw(context, z))

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(z_L [*batch, D], log_det [*batch] in nats) for z [*batch, D] and context [*params, F]."""
        return self._flow_with(z, self._packed(context, z))

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0 [*batch, D], log_det [*batch] of the inverse map in nats) for z [*batch, D], context [*params, F]."""
        return self._apply_to(z, self._params_for(z, context), inverse=True)

    def trajectory(self, z: Tensor, context: Tensor) -> Tensor:
        """z before, between and after the layers, [L + 1, *batch, D] for z [*batch, D] and context [*params, F]."""
        return self._trajectory(z, self._params_for(z, context))

    def extra_repr(self) -> str:
        return self._repr(**self._sizes(), context_dim=self.context_dim, **self._head_options())
