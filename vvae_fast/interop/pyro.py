"""Pyro's planar, Householder and Sylvester transforms, and one fused transform for a list of planar or Householder
ones."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vvae_fast import reference, shapes
from vvae_fast.distributions import CachedPlanar
from vvae_fast.interop._pyro_bases import AsModule, ConditionalBase, Conditioned, check_callable, dense, sizes
from vvae_fast.interop._pyro_reflections import (
    ConditionalHouseholder,
    ConditionedHouseholder,
    Householder,
    Sylvester,
    conditional_householder,
    householder,
    sylvester,
)
from vvae_fast.interop._runs import Layer, check_rows, check_state_dict, is_class, without_drawing
from vvae_fast.spec import FlowSpec

__all__ = [
    "ConditionalHouseholder",
    "ConditionalPlanar",
    "ConditionedHouseholder",
    "ConditionedPlanar",
    "Householder",
    "Planar",
    "PlanarStack",
    "Sylvester",
    "conditional_householder",
    "conditional_planar",
    "from_pyro",
    "householder",
    "planar",
    "sylvester",
]


class _PyroPlanar(CachedPlanar):
    """Pyro's formulas: tanh, and a constrained u."""

    def __init__(self, cache_size: int = 1) -> None:
        super().__init__(FlowSpec().options(), cache_size)

    def u_hat(self, u: Tensor, w: Tensor) -> Tensor:
        """The constrained u_hat [*params, D], with w . u_hat > -1, for u and w [*params, D]."""
        return reference.constrain(u, w, self.options["constraint"]).u_hat


class _PlanarModule(_PyroPlanar, AsModule):
    """A transform that is also a module, for pyro.module: u, w and bias are its parameters."""

    def __init__(self, cache_size: int, input_dim: int, *num_steps: int) -> None:
        super().__init__(cache_size)
        self.input_dim = shapes.check_size("input_dim", input_dim, 1)
        steps = [shapes.check_size("num_steps", size, 1) for size in num_steps]
        self.bias = nn.Parameter(torch.empty(steps or 1))
        self.u = nn.Parameter(torch.empty(*steps, self.input_dim))
        self.w = nn.Parameter(torch.empty(*steps, self.input_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws u and w uniformly between +-1 / sqrt(D), and sets bias to 0."""
        bound = 1 / math.sqrt(self.input_dim)
        nn.init.uniform_(self.w, -bound, bound)
        nn.init.uniform_(self.u, -bound, bound)
        nn.init.zeros_(self.bias)

    def _sources(self) -> tuple[Tensor, ...]:
        return self.u, self.w, self.bias


class PlanarStack(_PlanarModule):
    """K of Pyro's planar steps as one transform: bias [K], u and w [K, D].

    For `TransformedDistribution` and `pyro.module`. It maps x [*batch, D]. The log_prob of its own samples comes from
    the cache, that of any other point from the inverse. Each step is initialised as in Pyro.

    Raises TypeError or ValueError if input_dim or num_steps, both at least 1, is not a size.
    """

    def __init__(self, input_dim: int, num_steps: int, *, cache_size: int = 1) -> None:
        super().__init__(cache_size, input_dim, num_steps)

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.bias)

    def _params(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.w, self.bias

    def to_pyro_state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The state_dict, with copies, of a list of Pyro's transforms: `{prefix}{k}.bias` [1], `.u` and `.w` [D]."""
        return {
            f"{prefix}{k}.{name}": (value[k : k + 1] if name == "bias" else value[k]).clone()
            for k in range(self.num_steps)
            for name, value in self.state_dict().items()
        }

    def load_pyro_state_dict(self, state_dict: dict[str, Tensor], prefix: str = "") -> None:
        """Loads `{prefix}{k}.bias` [1], `.u` and `.w` [D] of K of Pyro's transforms; other prefixes are ignored.

        Raises ValueError if a step is missing, has another shape or is one too many, TypeError if state_dict is not a
        state_dict.
        """
        check_state_dict(state_dict)
        own = {name for name in state_dict if name.startswith(prefix)}
        wanted = {name: [f"{prefix}{k}.{name}" for k in range(self.num_steps)] for name in ("bias", "u", "w")}
        names = {name for of_steps in wanted.values() for name in of_steps}
        if own != names:
            raise ValueError(
                f"state_dict must have the bias, u and w of K = {self.num_steps} steps at {prefix!r}, got without "
                f"{sorted(names - own)} and with {sorted(own - names)}: make the stack with as many steps"
            )
        for name, of_steps in wanted.items():
            check_rows({n: state_dict[n] for n in of_steps}, (1,) if name == "bias" else (self.input_dim,))
        rows = {name: [state_dict[n] for n in of_steps] for name, of_steps in wanted.items()}
        self.load_state_dict({name: (torch.cat if name == "bias" else torch.stack)(v) for name, v in rows.items()})

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, num_steps={self.num_steps}"


class Planar(_PlanarModule):
    """Pyro's `Planar(input_dim)`: bias [1], u and w [D], its state_dict, and an inverse.

    It maps x [*batch, D]. The log_prob of its own samples comes from the cache, that of any other point from the
    inverse. Raises TypeError or ValueError if input_dim is not a size of at least 1.
    """

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(cache_size, input_dim)

    def _params(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u[None], self.w[None], self.bias

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}"


class ConditionedPlanar(_PyroPlanar, Conditioned):
    """One planar step whose parameters a function computes at every call, like Pyro's.

    Args:
        nn: maps context to (bias [*params, 1], u [*params, D], w [*params, D]). The cache sees a change of a module's
            parameters, buffers and mode. For any other callable nothing is cached, and every log_prob inverts.
        context: a tensor.
    """

    def __init__(self, nn: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], context: Tensor, cache_size: int = 1):
        super().__init__(cache_size)
        check_callable(nn, "(bias, u, w)")
        self.nn, self.context = nn, context

    def _params(self) -> tuple[Tensor, Tensor, Tensor]:
        params = self.nn(self.context)
        three = isinstance(params, (tuple, list)) and len(params) == 3 and all(isinstance(p, Tensor) for p in params)
        if not three:
            raise ValueError(f"nn must give (bias, u, w) of sizes [1, D, D], got {sizes(params)}")
        bias, u, w = params
        if u.shape != w.shape or bias.shape != (*u.shape[:-1], 1):
            raise ValueError(f"nn must give bias [*params, 1], u and w [*params, D], got {sizes(params)}")
        return u[..., None, :], w[..., None, :], bias


class ConditionalPlanar(ConditionalBase):
    """Pyro's `ConditionalPlanar(nn)`: nn maps a context [*params, C] to (bias, u, w) of sizes [1, D, D].

    `conditional.condition(context)` is a transform with an inverse. If Pyro is installed, it is one of Pyro's
    `ConditionalTransformModule`s, so that `ConditionalTransformedDistribution` takes it.
    """

    def __init__(self, nn: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        check_callable(nn, "(bias, u, w)")
        self.nn = nn

    domain = CachedPlanar.domain
    codomain = CachedPlanar.codomain
    bijective = True

    def condition(self, context: Tensor) -> ConditionedPlanar:
        """The transform for this context; it raises errors of nn's outputs when it is called."""
        return ConditionedPlanar(self.nn, context)


def from_pyro(transforms: Iterable[torch.distributions.Transform]) -> PlanarStack | Householder:
    """One fused transform with the values of a list of planar transforms, or of Householder ones, Pyro's own or this
    module's, in their order.

    The list may be a ComposeTransform's `parts` or a ModuleList. The parameters are new: make the optimizer afterwards.

    Raises TypeError if a transform is neither or the kinds are mixed, ValueError if the list is empty or the sizes
    differ.
    """
    if not isinstance(transforms, Iterable):
        raise TypeError(f"transforms must be a list of planar transforms, got {type(transforms).__name__}")
    layers: list[Layer] = list(transforms)
    if not layers:
        raise ValueError("transforms must hold at least one planar transform, got none")
    if all(_is_householder(layer) for layer in layers):
        return _joined_reflections(layers)
    for layer in layers:
        theirs = is_class(layer, "pyro.distributions.transforms.planar", "Planar")
        if not theirs and not isinstance(layer, (Planar, PlanarStack)):
            raise TypeError(
                f"transforms must all be Planar, Pyro's or this package's, got {type(layer).__name__}: fuse the runs "
                "between other transforms one by one"
            )
    dim = _shared_dim({layer.u.shape[-1] for layer in layers})
    joined = {
        name: torch.cat([getattr(layer, name).detach().reshape(-1, *sizes) for layer in layers])
        for name, sizes in (("u", (dim,)), ("w", (dim,)), ("bias", ()))
    }
    stack = without_drawing(PlanarStack, dim, len(joined["bias"]))
    stack.load_state_dict(joined, assign=True)
    return stack


def _shared_dim(dims: set[int]) -> int:
    if len(dims) > 1:
        raise ValueError(f"transforms must share one input_dim, got {sorted(dims)}")
    return dims.pop()


def _is_householder(layer: Layer) -> bool:
    return isinstance(layer, Householder) or is_class(layer, "pyro.distributions.transforms.householder", "Householder")


def _joined_reflections(layers: list[Layer]) -> Householder:
    """One `Householder` of all their reflections."""
    dim = _shared_dim({layer.u_unnormed.shape[-1] for layer in layers})
    joined = without_drawing(Householder, dim)
    joined.u_unnormed = nn.Parameter(torch.cat([layer.u_unnormed.detach() for layer in layers]))
    return joined


def planar(input_dim: int) -> Planar:
    """Pyro's helper: `Planar(input_dim)`."""
    return Planar(input_dim)


def conditional_planar(input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None) -> ConditionalPlanar:
    """Pyro's helper: `ConditionalPlanar` of Pyro's DenseNN, which maps a context [*params, context_dim].

    hidden_dims are the sizes of its hidden layers, by default two of 10 input_dim. Raises TypeError or ValueError if a
    size is not an integer of at least 1, ImportError if Pyro is not installed.
    """
    return ConditionalPlanar(dense(input_dim, context_dim, hidden_dims, [1, input_dim, input_dim]))
