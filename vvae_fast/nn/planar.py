"""Planar flows as modules."""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast import reference
from vvae_fast.backends import check_name
from vvae_fast.functional import packed_planar_flow, planar_flow, planar_flow_inverse
from vvae_fast.nn.linear import Linear
from vvae_fast.shapes import (
    HALVES,
    as_index,
    autocasts,
    check_size,
    compute_dtype,
    full_precision,
    is_trailing,
    unpack,
    untraced,
)
from vvae_fast.spec import DEFAULT, DEFAULT_SLOPE, FlowSpec

# The w . u at which u_hat = 0: with it the flow starts as the identity, docs/math.md (25), (32).
_IDENTITY_ALPHA = {
    "softplus": math.log(math.e - 1),
    "log_softplus": math.log(math.expm1(math.e - 1)),
    "none": 0.0,
}

# The a of docs/math.md (56): on digits 0.02 and 0.03 did alike, and 0.05 worse. A few numbers have a larger one, since
# Adam moves the flow by the sum of the features' sizes.
_KNEE, _KNEE_SUM = 0.03, 3.0
_LEAST_SIZE = 1e-12  # of r / a: at 0 the factor is 1


def identity_u(w: Tensor, constraint: str) -> Tensor:
    """u [K, D] for w [K, D] such that u_hat = 0; it is computed in more than half precision, which would miss 0."""
    w = full_precision(w)
    return _IDENTITY_ALPHA[constraint] * w / w.square().sum(-1, keepdim=True)


class _Planar(nn.Module):
    """The base of both modules: the sizes, the spec, the backend, and the methods that need only the parameters."""

    def __init__(
        self, dim: int, num_steps: int, activation: str, slope: float, constraint: str, backend: str | None
    ) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        self.num_steps = check_size("num_steps", num_steps, 0)
        self.slope = FlowSpec(constraint, activation, slope).checked().slope
        if backend is not None:
            check_name(backend)
        self.activation, self.constraint, self.backend = activation, constraint, backend

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of `planar_flow`."""
        return FlowSpec(self.constraint, self.activation, self.slope).options() | {"backend": self.backend}

    @untraced
    def _check_z(self, z: Tensor, like: Tensor) -> None:
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}")
        if z.shape[-1:] != (self.dim,):
            raise ValueError(f"z must be [*batch, D] with the flow's D = {self.dim}, got {tuple(z.shape)}")
        if z.dtype is not like.dtype or z.device != like.device:
            _check_like("z", z, like, (torch.float32,) if like.dtype in HALVES else ())

    def _u_hat(self, u: Tensor, w: Tensor) -> Tensor:
        dtype = compute_dtype(u.dtype)
        return reference.constrain(u.to(dtype), w.to(dtype), self.constraint).u_hat.to(u.dtype)

    def _trajectory(self, z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> Tensor:
        points = [z]
        for k in range(self.num_steps):
            step = u[..., k : k + 1, :], w[..., k : k + 1, :], b[..., k : k + 1]
            points.append(planar_flow(points[-1], *step, **self._options())[0])
        return torch.stack(points)

    def _repr(self, **sizes: int | None) -> str:
        """The sizes that are not None, and the options that differ from their defaults."""
        defaults = {**dict.fromkeys(sizes), **DEFAULT.options(), "backend": None}
        shown = {name: x for name, x in (sizes | self._options()).items() if x != defaults[name]}
        return ", ".join([f"{name}={x!r}" for name, x in shown.items()])


def _check_like(name: str, tensor: Tensor, like: Tensor, others: tuple[torch.dtype, ...] = ()) -> None:
    """Raises if a tensor has another device than the parameters, or neither their dtype nor one of `others`."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the flow, got {tensor.device}: move one of them")
    allowed = tensor.dtype in (like.dtype, *others) or autocasts(tensor)
    if not allowed:
        raise TypeError(f"{name} must be {like.dtype} like the flow, got {tensor.dtype}: convert one of them")


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
    return min(context_dim, _num_params(dim, num_steps))


def _draw_like_linear(weight: Tensor) -> None:
    """Draws a weight [M, F] as nn.Linear does."""
    bound = weight.shape[1] ** -0.5
    weight.uniform_(-bound, bound)


class _Head(Linear):
    """A linear layer that its flow initialises. With `normalise` it takes rows of like sizes, docs/math.md (56).

    Both kinds have the same state_dict but for its version: nn.Linear's 1 without, 2 with `normalise`.
    """

    normalise = False  # for modules that were pickled before there was one

    def __init__(self, in_features: int, out_features: int, bias: bool = True, normalise: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.normalise, self._version = normalise, 2 if normalise else 1

    def reset_parameters(self) -> None:
        pass

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        version = local_metadata.get("version", self._version)  # a plain dict has none
        if version != self._version:
            errors.append(f"{prefix[:-1]} is of a flow with normalise={version == 2}: make the flow with that")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_of_like_sizes(x, self.in_features) if self.normalise else x)


def _of_like_sizes(x: Tensor, num_features: int) -> Tensor:
    """x [*batch, F] with the root mean square r of each row brought to a log(1 + r / a), docs/math.md (56)."""
    wide = full_precision(x)
    knee = max(_KNEE, _KNEE_SUM / num_features)
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / (knee * math.sqrt(num_features)) + _LEAST_SIZE
    return (wide * (torch.log1p(size) / size)).to(x.dtype)


class AmortizedPlanarFlow(_Planar):
    """K planar steps with a parameter set for each data point, which a linear head computes from a context.

    Starts as the identity map for every context, with constraint="none" by u = 0. `flow(z, context)` takes context
    [*params, F] and z [*batch, D], where *params are the trailing dimensions of *batch, and returns (z_K [*batch, D],
    log_det [*batch] in nats): z [S, B, D] with context [B, F] is S samples for each data point. `flow.inverse(z,
    context)` maps back. activation, slope, constraint and backend are those of `planar_flow`. A flow in half precision
    takes the context in its own dtype, and z in its own dtype or in float32.

    The head, F -> K (2 D + 1), is most of an amortized flow's cost. With rank = r it is F -> r -> K (2 D + 1): first
    `head.down`, without a bias, then `head.up`. A rank above min(F, K (2 D + 1)) is refused: it would restrict nothing,
    and cost more than the full head of rank=None.

    With normalise=True contexts are brought to like sizes before the head, docs/math.md (56), so that what a flow
    learns hardly depends on the size of an encoder's features. No information is lost: larger contexts stay larger.
    `load_state_dict` refuses a state_dict of the other kind.

    Raises TypeError or ValueError if dim, context_dim, rank (at least 1) or num_steps (at least 0) is not a size, or if
    another argument is not a known name or is out of range.
    """

    rank: int | None = None  # for modules that were pickled before there was one
    normalise = False  # the same
    head: Any  # a module, which may be the user's own

    def __init__(
        self,
        dim: int,
        num_steps: int,
        context_dim: int,
        *,
        rank: int | None = None,
        normalise: bool = False,
        activation: str = "tanh",
        slope: float = DEFAULT_SLOPE,
        constraint: str = "softplus",
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, num_steps, activation, slope, constraint, backend)
        self.context_dim = check_size("context_dim", context_dim, 1)
        self.rank = None if rank is None else self._check_rank(rank)
        if not isinstance(normalise, bool):
            raise TypeError(f"normalise must be a bool, got {type(normalise).__name__}")
        self.normalise = normalise
        outputs = _num_params(self.dim, self.num_steps)
        if self.rank is None:
            self.head = _Head(self.context_dim, outputs, normalise=normalise)
        else:
            down = _Head(self.context_dim, self.rank, bias=False, normalise=normalise)
            up = _Head(self.rank, outputs)
            up.narrow = True
            self.head = nn.Sequential(OrderedDict(down=down, up=up))
        self.reset_parameters()

    def _check_rank(self, rank: int) -> int:
        rank, most = check_size("rank", rank, 1), largest_rank(self.dim, self.num_steps, self.context_dim)
        if rank > most:
            raise ValueError(
                f"rank must be at most min(F, K (2 D + 1)) = {most}, got {rank}: use rank=None, which costs less"
            )
        return rank

    def reset_parameters(self) -> None:
        """Puts an identity flow's u, w and b into the head's bias. In the head's weight only b's rows are not zero.

        u_hat = 0 needs a u that fits w, but b is free: so the hyperplanes depend on the context from the start. With a
        rank this holds for `head.up`, and `head.down` starts like nn.Linear.
        """
        head = self.head if self.rank is None else self.head.up
        w = torch.empty_like(head.bias[: self.num_steps * self.dim]).view(self.num_steps, self.dim)
        with torch.no_grad():
            w.normal_(std=self.dim**-0.5)
            b = torch.randn_like(w[:, 0])
            head.bias.copy_(torch.cat([identity_u(w, self.constraint).flatten(), w.flatten(), b]))
            head.weight.zero_()
            _draw_like_linear(head.weight[2 * w.numel() :])
            if self.rank is not None:
                _draw_like_linear(self.head.down.weight)

    def params(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, w [*params, K, D] and b [*params, K]: views of the head's output for context [*params, F]."""
        return unpack(self._packed(context), self.num_steps, self.dim)

    def _packed(self, context: Tensor) -> Tensor:
        """The head's output [*params, K (2 D + 1)] for context [*params, F]."""
        self._check_context(context)
        packed = self.head(context)
        self._check_packed(packed, context)
        return packed

    def _packed_for(self, z: Tensor, context: Tensor) -> Tensor:
        """`_packed` for a z [*batch, D], after a check of z."""
        packed = self._packed(context)
        self._check_inputs(z, context)
        return _fitting(z, packed)[0]

    def _params_for(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return unpack(self._packed_for(z, context), self.num_steps, self.dim)

    @untraced
    def _check_context(self, context: Tensor) -> None:
        if not isinstance(context, Tensor) or context.dim() < 1 or context.shape[-1] != self.context_dim:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"context must be a tensor [*params, F] with F = {self.context_dim}, got {got}")
        _check_like("context", context, next(self.head.parameters(), context))

    @untraced
    def _check_packed(self, packed: Tensor, context: Tensor) -> None:
        wanted = (*context.shape[:-1], _num_params(self.dim, self.num_steps))
        if not isinstance(packed, Tensor) or packed.shape != wanted:
            got = tuple(packed.shape) if isinstance(packed, Tensor) else type(packed).__name__
            raise ValueError(f"head must give [*params, K (2 D + 1)] = {wanted}, got {got}")

    @untraced
    def _check_inputs(self, z: Tensor, context: Tensor) -> None:
        self._check_z(z, next(self.head.parameters(), z))
        params, batch = context.shape[:-1], z.shape[:-1]
        if not is_trailing(params, batch):
            raise ValueError(
                f"context's leading dimensions must be the trailing batch dimensions of z, {tuple(batch)}, "
                f"got {tuple(params)}: nothing else is broadcast"
            )

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(z_K [*batch, D], log_det [*batch] in nats) for z [*batch, D] and context [*params, F]."""
        packed = self._packed_for(z, context)
        return packed_planar_flow(z, packed, self.num_steps, self.dim, **self._options())

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
        sizes = {"dim": self.dim, "num_steps": self.num_steps, "context_dim": self.context_dim, "rank": self.rank}
        return self._repr(**sizes, normalise=self.normalise or None)
