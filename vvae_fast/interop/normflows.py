"""normflows' planar flow, and one fused layer for a run of them. normflows itself is not imported."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vvae_fast import shapes
from vvae_fast.functional import planar_flow, planar_flow_inverse
from vvae_fast.interop import _runs
from vvae_fast.spec import ACTIVATIONS

_SLOPE = 0.2  # normflows' slope of leaky_relu
_LAYERS = _runs.LayerList("flows", "nf.NormalizingFlow")


class PlanarStack(_runs.Stack):
    """K planar steps over events of any shape, one fused layer of a normflows model: u, w [K, *shape] and b [K].

    `stack(z)` maps z [*batch, *shape] to (z_K [*batch, *shape], log_det [*batch] in nats); `stack.inverse(z)` maps
    back, for every activation. Each step is initialised as in normflows.

    Args:
        shape: the event's shape, an int or a sequence of at least one.
        num_steps: K, at least 1.
        act: an activation of `planar_flow`; "leaky_relu" has normflows' slope 0.2.

    Raises TypeError or ValueError if shape, num_steps or act is not one of these.
    """

    def __init__(self, shape: int | Sequence[int], num_steps: int, act: str = "tanh") -> None:
        super().__init__()
        num_steps = shapes.check_size("num_steps", num_steps, 1)
        sizes = shape if isinstance(shape, Sequence) else (shape,)
        if not len(sizes):
            raise ValueError("shape must have at least one dimension, got (): pass (1,) for scalars")
        self.shape = tuple(shapes.check_size("shape's sizes", size, 1) for size in sizes)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")
        self.act = act
        self.u = nn.Parameter(torch.empty(num_steps, *self.shape))
        self.w = nn.Parameter(torch.empty(num_steps, *self.shape))
        self.b = nn.Parameter(torch.empty(num_steps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws u and w uniformly between +-sqrt(2) and +-sqrt(2 / D), D the event's size, and sets b to 0."""
        for name in ("u", "w", "b"):
            self._reset(name)

    def _reset(self, name: str) -> None:
        if name == "b":
            nn.init.zeros_(self.b)
            return
        limit = math.sqrt(2) if name == "u" else math.sqrt(2 / math.prod(self.shape))
        nn.init.uniform_(getattr(self, name), -limit, limit)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_K [*batch, *shape], log_det [*batch] in nats) for z [*batch, *shape]; errors as `planar_flow`'s."""
        return self._run(planar_flow, z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0 [*batch, *shape], log_det [*batch] of the inverse map in nats) for z [*batch, *shape]."""
        return self._run(planar_flow_inverse, z)

    def _run(self, flow: Callable[..., tuple[Tensor, Tensor]], z: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}")
        batch = z.shape[: max(z.dim() - len(self.shape), 0)]
        if z.shape[len(batch) :] != self.shape:
            raise ValueError(f"z must be [*batch, *shape] with shape = {self.shape}, got {tuple(z.shape)}")
        size = math.prod(self.shape)
        u, w = self.u.reshape(-1, size), self.w.reshape(-1, size)
        z_K, log_det = flow(z.reshape(*batch, size), u, w, self.b, activation=self.act, slope=_SLOPE)
        return z_K.reshape(z.shape), log_det

    def unfused(self) -> nn.ModuleList:
        """A list of K layers `Planar` with copies of the parameters and normflows' state_dict."""
        rows = zip(*(p.detach().clone().split(1) for p in (self.u, self.w, self.b)), strict=True)
        return nn.ModuleList(Planar(self.shape, self.act, *row) for row in rows)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, num_steps={self.num_steps}, act={self.act!r}"


class Planar(PlanarStack):
    """normflows' `Planar(shape, act="tanh", u=None, w=None, b=None)`: u, w [1, *shape] and b [1], its state_dict.

    `planar(z)` maps z [*batch, *shape] to (z, log_det [*batch] in nats); `planar.inverse(z)` maps back, for every
    activation. It works inside a normflows model. Raises TypeError if u, w or b is not a floating tensor, ValueError if
    one has another shape, and the errors of PlanarStack.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        act: str = "tanh",
        u: Tensor | None = None,
        w: Tensor | None = None,
        b: Tensor | None = None,
    ) -> None:
        _runs.without_drawing(super().__init__, shape, 1, act)
        for name, value in (("u", u), ("w", w), ("b", b)):
            wanted = getattr(self, name).shape
            if value is None:  # drawn in normflows' order, so that the same seed gives the same layer
                setattr(self, name, nn.Parameter(torch.empty(wanted)))
                self._reset(name)
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a floating torch.Tensor, got {got}")
            if value.shape != wanted:
                raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(value.shape)}: reshape it")
            setattr(self, name, nn.Parameter(value))


def from_normflows(model: nn.Module) -> nn.Module:
    """Replaces, in place, each run of planar layers in `model.flows` by one fused layer, and returns the model.

    A run is consecutive layers, normflows' own `Planar` or this module's, with the same act, shape, dtype, device and
    requires_grad. Layers of a subclass, with hooks or with shared parameters stay. The parameters are new, with the
    values of the old ones: make the optimizer afterwards. Lists inside other flows are not searched. A warning says
    where there was nothing to fuse, and what was found.

    Raises TypeError if model has no ModuleList `flows`, such as nf.NormalizingFlow has.
    """
    _LAYERS.fuse(model, _facts, lambda layer, act: PlanarStack(layer.u.shape[1:], 1, act))
    return model


def to_normflows_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict that a model had before `from_normflows`: `flows.{k}.u`, `.w` and `.b`."""
    return _LAYERS.unfused_state_dict(model)


def load_normflows_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads a state_dict from before `from_normflows` into the fused model.

    Raises ValueError if a step is missing, RuntimeError as load_state_dict does.
    """
    _LAYERS.load_unfused_state_dict(model, state_dict)


def _facts(layer: _runs.Layer) -> tuple[str] | None:
    """The activation of a planar layer; None for any other layer, and for one of normflows with a changed slope."""
    if type(layer) in (Planar, PlanarStack):
        return (layer.act,)
    theirs = _runs.is_class(layer, "normflows.flows.planar", "Planar")
    return (layer.act,) if theirs and (layer.act != "leaky_relu" or layer.h.negative_slope == _SLOPE) else None
