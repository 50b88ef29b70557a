"""Planar and Sylvester flows as lazy transforms of zuko, for `zuko.flows.Flow(transform, base)`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast import distributions
from vvae_fast.distributions import CachedTransform
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.sylvester.flows import AmortizedSylvesterFlow, SylvesterFlow, SylvesterParams
from vvae_fast.shapes import check_size
from vvae_fast.sylvester import sylvester_flow, sylvester_flow_inverse

try:  # zuko's Flow takes only zuko's own class
    from zuko.lazy import LazyTransform as _Lazy
except ImportError:
    _Lazy = nn.Module


class _OfAnyShape(CachedTransform):
    """Like zuko's transforms it keeps a shape, so that a flow's event_shape has no dimensions of a context."""

    def _shape(self, name: str, shape: torch.Size) -> torch.Size:
        return shape


class _PlanarSteps(distributions.PlanarTransform, _OfAnyShape):
    """The transform of a `PlanarTransform` with its parameters as they are for a context."""


class _SylvesterLayers(_OfAnyShape):
    """The transform of a `SylvesterTransform` with its parameters as they are for a context."""

    def __init__(self, params: SylvesterParams, options: dict[str, Any]) -> None:
        super().__init__(options)
        q, *others = params
        self._own_dims = (3, 3, 2, 2) if q is None else (3, 3, 3, 2, 2)
        self._tensors = tuple(others) if q is None else (q.mT, *others)

    def _params(self) -> tuple[Tensor, ...]:
        return self._tensors

    def _sources(self) -> tuple[Tensor, ...]:
        return self._tensors

    def _run(self, x: Tensor, params: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        *columns, r, r_tilde, b, s = params
        q = columns[0].mT if columns else None
        return (sylvester_flow_inverse if inverse else sylvester_flow)(x, q, r, r_tilde, b, s=s, **self.options)

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"SylvesterTransform(r={tuple(self._tensors[-4].shape)}, {named})"


class _LazyFlow(_Lazy):
    """A flow of `vvae_fast.nn`, and for a context a network in front of its head."""

    flow: Any
    hyper: nn.Module | None

    def _make_hyper(self, context: int, hidden_features: Sequence[int]) -> int:
        """Sets the network's hidden layers, and gives the size of their output; 0 without a context."""
        widths = [check_size("context", context, 0)]
        widths += [check_size("hidden_features' sizes", size, 1) for size in hidden_features]
        pairs = [(nn.Linear(fan_in, fan_out), nn.ReLU()) for fan_in, fan_out in pairwise(widths) if context]
        self.hyper = nn.Sequential(*(layer for pair in pairs for layer in pair)) if context else None
        return widths[-1] if context else 0

    def _features(self, c: Tensor | None) -> Tensor | None:
        """What the head takes; None without a context. Raises ValueError if a context is missing."""
        if self.hyper is None:
            return None
        if c is None:
            raise ValueError("c must be a context [*, C], as the transform was made with one, got None: pass flow(c)")
        return self.hyper(c)


class PlanarTransform(_LazyFlow):
    """K planar steps as one lazy transform: `zuko.flows.Flow(PlanarTransform(features, context, transforms), base)`.

    `lazy(c)` is a transform of torch.distributions x -> z with zuko's `call_and_ladj`, fused over the steps. In a zuko
    flow densities take its forward pass, and samples its inverse, which finds a root for each step. With
    `PlanarTransform(...).inv` samples take the forward pass, and densities of other points the inverse.

    Args:
        features: D.
        context: C, the size of a context c [*, C]; 0: none, and c is ignored, as zuko's transforms do.
        transforms: K.
        hidden_features: with a context, the sizes of the hidden layers of a network of c, with ReLU; its last layer is
            the head of an `AmortizedPlanarFlow`.
        activation, slope, constraint: those of `planar_flow`, as keywords. constraint="none" guarantees no inverse.

    Starts as the identity. Raises TypeError or ValueError if a size is not one, or as `PlanarFlow` does; ValueError
    where a context is missing.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        **options: Any,
    ) -> None:
        super().__init__()
        size = self._make_hyper(context, hidden_features)
        if size:
            self.flow = AmortizedPlanarFlow(features, transforms, size, **options)
        else:
            self.flow = PlanarFlow(features, transforms, **options)

    def forward(self, c: Tensor | None = None) -> distributions.PlanarTransform:
        """The transform for a context c [*, C]."""
        h, flow = self._features(c), self.flow
        u, w, b = (flow.u, flow.w, flow.b) if h is None else flow.params(h)
        return _PlanarSteps(u, w, b, activation=flow.activation, slope=flow.slope, constraint=flow.constraint)


class SylvesterTransform(_LazyFlow):
    """L Sylvester layers as one lazy transform: `zuko.flows.Flow(SylvesterTransform(features, context), base)`.

    As `PlanarTransform`, but for `transforms`, which is L, and the further keywords: those of `SylvesterFlow`,
    num_units, kind, num_reflections, activation, slope. Its inverse finds a root for each unit of each layer.
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        num_units: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        size = self._make_hyper(context, hidden_features)
        if size:
            self.flow = AmortizedSylvesterFlow(features, transforms, num_units, size, **options)
        else:
            self.flow = SylvesterFlow(features, transforms, num_units, **options)

    def forward(self, c: Tensor | None = None) -> CachedTransform:
        """The transform for a context c [*, C]."""
        h, flow = self._features(c), self.flow
        return _SylvesterLayers(flow.params() if h is None else flow.params(h), flow._options())
