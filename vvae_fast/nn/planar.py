"""Planar flows as modules."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast import reference
from vvae_fast.functional import headed_planar_flow, packed_planar_flow, planar_flow, planar_flow_inverse
from vvae_fast.nn.base import AmortizedFlow, Flow, largest_rank_of
from vvae_fast.nn.base import Head as _Head  # noqa: F401  # by this name modules were pickled
from vvae_fast.shapes import as_index, check_size, compute_dtype, full_precision, unpack
from vvae_fast.spec import DEFAULT_SLOPE, FlowSpec

# The w . u at which u_hat = 0: with it the flow starts as the identity, docs/math.md (25), (32).
_IDENTITY_ALPHA = {
    "softplus": math.log(math.e - 1),
    "log_softplus": math.log(math.expm1(math.e - 1)),
    "none": 0.0,
}


def identity_u(w: Tensor, constraint: str) -> Tensor:
    """u [K, D] for w [K, D] such that u_hat = 0; it is computed in more than half precision, which would miss 0."""
    w = full_precision(w)
    return _IDENTITY_ALPHA[constraint] * w / w.square().sum(-1, keepdim=True)


class _Planar(Flow):
    """The base of both modules: the sizes, the spec, and the methods that need only the parameters."""

    def __init__(
        self, dim: int, num_steps: int, activation: str, slope: float, constraint: str, backend: str | None
    ) -> None:
        super().__init__(dim, backend)
        self.num_steps = check_size("num_steps", num_steps, 0)
        self.slope = FlowSpec(constraint, activation, slope).checked().slope
        self.activation, self.constraint = activation, constraint

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of `planar_flow`."""
        return FlowSpec(self.constraint, self.activation, self.slope).options() | super()._options()

    def _u_hat(self, u: Tensor, w: Tensor) -> Tensor:
        dtype = compute_dtype(u.dtype)
        return reference.constrain(u.to(dtype), w.to(dtype), self.constraint).u_hat.to(u.dtype)

    def _trajectory(self, z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> Tensor:
        points = [z]
        for k in range(self.num_steps):
            step = u[..., k : k + 1, :], w[..., k : k + 1, :], b[..., k : k + 1]
            points.append(planar_flow(points[-1], *step, **self._options())[0])
        return torch.stack(points)


def _fitting(z: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """The parameters; in float32 if they have half precision and z has not, like a posterior's samples."""
    return params if z.dtype is not torch.float32 else tuple(full_precision(p) for p in params)


class PlanarFlow(_Planar):
    """K planar steps, whose parameters u, w [K, D] and b [K] all samples share (Rezende & Mohamed 2015, equation 10).

    Starts as the identity map, with constraint="none" by u = 0. `flow(z)` maps z [*batch, D] to (z_K [*batch, D],
    log_det [*batch] in nats); `flow.inverse(z)` maps back, with the log_det of the inverse. activation, slope,
    constraint and backend are those of `planar_flow`. A flow in half precision takes z in its own dtype or in float32.

    Raises TypeError or ValueError if dim (at least 1) or num_steps (at least 0) is not a size, or if another argument
    is not a known name or is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_steps: int,
        *,
        activation: str = "tanh",
        slope: float = DEFAULT_SLOPE,
        constraint: str = "softplus",
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_steps, activation, slope, constraint, backend)
        self.u = nn.Parameter(torch.empty(self.num_steps, self.dim))
        self.w = nn.Parameter(torch.empty(self.num_steps, self.dim))
        self.b = nn.Parameter(torch.empty(self.num_steps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws w and b so that the hyperplanes w . z + b = 0 spread over the prior, and sets u so that u_hat = 0."""
        with torch.no_grad():
            self.w.normal_(std=self.dim**-0.5)
            self.u.copy_(identity_u(self.w, self.constraint))
            self.b.normal_()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_K [*batch, D], log_det [*batch] in nats) for z [*batch, D]; errors as `planar_flow`'s."""
        return planar_flow(z, *self._params(z), **self._options())

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0 [*batch, D], log_det [*batch] of the inverse map in nats) for z [*batch, D]."""
        return planar_flow_inverse(z, *self._params(z), **self._options())

    def u_hat(self) -> Tensor:
        """The constrained directions [K, D] in which the steps move points, docs/math.md (4)."""
        return self._u_hat(self.u, self.w)

    def trajectory(self, z: Tensor) -> Tensor:
        """z before, between and after the steps, [K + 1, *batch, D] for z [*batch, D]; errors as `planar_flow`'s."""
        return self._trajectory(z, *self._params(z))

    def _params(self, z: Tensor) -> tuple[Tensor, ...]:
        """u, w and b for z, after a check of z."""
        u, w, b = self.u, self.w, self.b
        self._check_z(z, u)
        return _fitting(z, u, w, b)

    def step(self, k: int) -> "PlanarFlow":
        """Step k as a flow of one step; k < 0 counts from the end. Its parameters have their own gradients but share
        this flow's memory, so training one changes both.

        Raises IndexError if there is no such step, TypeError if k is not an int.
        """
        k = as_index("k", k)
        if not -self.num_steps <= k < self.num_steps:
            raise IndexError(f"k must be a step of {self.num_steps}, got {k}")
        k %= self.num_steps
        with torch.device("meta"):  # no random numbers are drawn
            step = PlanarFlow(self.dim, 1, **self._options())
        step.u, step.w, step.b = (
            nn.Parameter(t.detach()[k : k + 1], t.requires_grad) for t in (self.u, self.w, self.b)
        )
        return step.train(self.training)

    def extra_repr(self) -> str:
        return self._repr(dim=self.dim, num_steps=self.num_steps)


def _num_params(dim: int, num_steps: int) -> int:
    """The length of u, w and b, concatenated."""
    return num_steps * (2 * dim + 1)


def largest_rank(dim: int, num_steps: int, context_dim: int) -> int:
    """Of an amortized flow's head; a larger one would restrict nothing."""
    return largest_rank_of(context_dim, _num_params(dim, num_steps))


class AmortizedPlanarFlow(_Planar, AmortizedFlow):
    """K planar steps with a parameter set for each data point, which a linear head computes from a context.

    Starts as the identity map for every context, with constraint="none" by u = 0. `flow(z, context)` takes context
    [*params, F] and z [*batch, D], where *params are the trailing dimensions of *batch, and returns (z_K [*batch, D],
    log_det [*batch] in nats): z [S, B, D] with context [B, F] is S samples for each data point. `flow.inverse(z,
    context)` maps back. activation, slope, constraint and backend are those of `planar_flow`. A flow in half precision
    takes the context in its own dtype, and z in its own dtype or in float32.

    The head, F -> K (2 D + 1), is most of an amortized flow's cost. With rank = r it is F -> r -> K (2 D + 1): first
    `head.down`, without a bias, then `head.up`. A rank above min(F, K (2 D + 1)) is refused: it would restrict nothing,
    and cost more than the full head of rank=None. With layer_norm=True a layer norm is between the two, docs/math.md
    (66), which heads of some ranks learn more with: `head.up` then reads rows of mean 0 and of one size.

    With normalise=True contexts are brought to like sizes before the head, docs/math.md (56), so that what a flow
    learns hardly depends on the size of an encoder's features. No information is lost: larger contexts stay larger.
    `load_state_dict` refuses a state_dict of a flow with another normalise or layer_norm.

    Raises TypeError or ValueError if dim, context_dim, rank (at least 1, with layer_norm=True 2) or num_steps (at least
    0) is not a size, or if another argument is not a known name or is out of range.
    """

    _OUTPUTS = "K (2 D + 1)"

    def __init__(
        self,
        dim: int,
        num_steps: int,
        context_dim: int,
        *,
        rank: int | None = None,
        normalise: bool = False,
        layer_norm: bool = False,
        activation: str = "tanh",
        slope: float = DEFAULT_SLOPE,
        constraint: str = "softplus",
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_steps, activation, slope, constraint, backend)
        self._make_head(context_dim, rank, normalise, layer_norm)
        self.reset_parameters()

    def _num_outputs(self) -> int:
        return _num_params(self.dim, self.num_steps)

    def reset_parameters(self) -> None:
        """Puts an identity flow's u, w and b into the head's bias. In the head's weight only b's rows are not zero.

        u_hat = 0 needs a u that fits w, but b is free: so the hyperplanes depend on the context from the start. With a
        rank this holds for `head.up`, and `head.down` starts like nn.Linear.
        """
        w = self._last().bias.new_empty((self.num_steps, self.dim)).normal_(std=self.dim**-0.5)
        b = torch.randn_like(w[:, 0])
        self._start(torch.cat([identity_u(w, self.constraint).flatten(), w.flatten(), b]), slice(2 * w.numel(), None))

    def params(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, w [*params, K, D] and b [*params, K]: views of the head's output for context [*params, F]."""
        return unpack(self._packed(context), self.num_steps, self.dim)

    def _packed_for(self, z: Tensor, context: Tensor) -> Tensor:
        """`_packed` for a z [*batch, D], after a check of z."""
        return _fitting(z, self._packed(context, z))[0]

    def _params_for(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return unpack(self._packed_for(z, context), self.num_steps, self.dim)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(z_K [*batch, D], log_det [*batch] in nats) for z [*batch, D] and context [*params, F]."""
        if self._is_usual(z, context):
            headed = self._headed(context) if z.is_cpu else None
            if headed is not None:
                return headed_planar_flow(z, *headed, **self._options())
            packed = self._head_output(context)
        else:
            packed = self._packed(context, z)
        return self._flow_with(z, packed)

    def _flow_with(self, z: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        return packed_planar_flow(z, _fitting(z, packed)[0], self.num_steps, self.dim, **self._options())

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(z_0 [*batch, D], log_det [*batch] of the inverse map in nats) for z [*batch, D], context [*params, F]."""
        return planar_flow_inverse(z, *self._params_for(z, context), **self._options())

    def u_hat(self, context: Tensor) -> Tensor:
        """The constrained directions [*params, K, D] in which the steps move points, docs/math.md (4)."""
        u, w, _ = self.params(context)
        return self._u_hat(u, w)

    def trajectory(self, z: Tensor, context: Tensor) -> Tensor:
        """z before, between and after the steps, [K + 1, *batch, D] for z [*batch, D] and context [*params, F]."""
        return self._trajectory(z, *self._params_for(z, context))

    def extra_repr(self) -> str:
        sizes = {"dim": self.dim, "num_steps": self.num_steps, "context_dim": self.context_dim}
        return self._repr(**sizes, **self._head_options())
