"""Flows as transforms of torch.distributions: `PlanarTransform`, and the base of other packages' transforms."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.transforms import _InverseTransform

from vvae_fast import shapes
from vvae_fast.backends import needs_plain_torch
from vvae_fast.functional import planar_flow, planar_flow_inverse
from vvae_fast.spec import DEFAULT_SLOPE, FlowSpec


class _Call(NamedTuple):
    """One call, and everything that must be unchanged for it to be valid."""

    x: Tensor
    y: Tensor
    log_det: Tensor  # [*batch]
    tensors: tuple[Tensor, ...]  # x, y and the sources; kept alive, so that no new tensor gets the same id
    versions: tuple[tuple[int, int, bool], ...]
    values: tuple[Tensor, ...]  # of the sources
    mode: tuple[object, ...]
    with_grad: bool


class _Inverse(_InverseTransform):
    """torch's inverse, but a copy or a pickle of it is still the inverse of one transform."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.inv, "inv")

    def __copy__(self) -> Transform:
        return copy.copy(self.inv).inv

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The point that the transform maps to x, and the log|det| [*batch] of the inverse there, in one pass."""
        transform: Any = self.inv
        found, log_det = transform._inverted(x)
        return found, -log_det


class CachedTransform(Transform):
    """The base of all transforms: broadcasting, the inverse, and a cache that any change empties.

    A subclass defines `options`, the keyword arguments of its flow, `_params()`, `_sources()`, `_run()` and
    `_why_not_bijective()`.
    """

    _own_dims: tuple[int, ...] = ()  # how many dimensions of each of `_params()` are not those of *params

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, options: dict[str, Any], cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.options = options
        self._cached_call: _Call | None = None

    def _params(self) -> tuple[Tensor, ...]:
        """The parameters as they are now, [*params, ...]; the first one's last dimension is D."""
        raise NotImplementedError

    def _run(self, x: Tensor, params: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        """The flow or its inverse, with its log|det|: x [*batch, D], where *params are the last of *batch."""
        raise NotImplementedError

    def _sources(self) -> tuple[Tensor, ...] | None:
        """The tensors that the parameters are computed from; None if they are unknown, and then nothing is cached."""
        raise NotImplementedError

    def _mode(self) -> tuple[object, ...]:
        """Everything else that the result depends on."""
        return tuple(self.options.values())

    @property
    def inv(self) -> Transform:
        """The inverse transform; its own `inv` is this one."""
        if self._inv is None:
            self._inv = _Inverse(self)
        return self._inv

    def with_cache(self, cache_size: int = 1) -> CachedTransform:
        """This transform if it has that cache_size, else a copy that has it and shares the tensors."""
        if cache_size == self._cache_size:
            return self
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1, got {cache_size}")
        other = copy.copy(self)
        other._cache_size = cache_size
        return other

    @property
    def bijective(self) -> bool:  # type: ignore[override]  # torch's is an attribute
        """Whether an inverse is guaranteed: not with constraint "none", and not with leaky_relu and a slope above 1."""
        return self._why_not_bijective() is None

    def _why_not_bijective(self) -> Exception | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """y [*batch, D] for x; the batch dimensions of x are broadcast with those of the parameters."""
        return self.call_and_ladj(x)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [*batch, D] for x, and log|det dy/dx| [*batch] in nats, in one pass."""
        call = self._cached(x=x)
        if call is not None:
            return call.y, call.log_det
        y, log_det = self._flow(x)
        self._remember(x, y, log_det)
        return y, log_det

    def _call(self, x: Tensor) -> Tensor:
        return self._flow(x)[0]

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._inverted(y)[0]

    def _inverted(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x for y, and log|det dy/dx|."""
        call = self._cached(y=y)
        if call is not None:
            return call.x, call.log_det
        x, log_det = self._flow_inverse(y)
        self._remember(x, y, -log_det)
        return x, -log_det

    def _inverse(self, y: Tensor) -> Tensor:
        return self._flow_inverse(y)[0]

    def _flow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(*self._broadcast("x", x), inverse=False)

    def _flow_inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if why := self._why_not_bijective():
            raise NotImplementedError(
                f"{why}. With cache_size=1 the last sample is known without an inverse, until anything changes; for "
                "gradients of its log_prob draw it with rsample"
            )
        return self._run(*self._broadcast("y", y), inverse=True)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| [*batch] in nats, computed from x unless (x, y) is the pair of the last call."""
        call = self._cached(x=x, y=y)
        return self._flow(x)[1] if call is None else call.log_det

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape [*batch, D] of y for that of x."""
        return self._shape("x", shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape [*batch, D] of x for that of y."""
        return self._shape("y", shape)

    def _shape(self, name: str, shape: torch.Size) -> torch.Size:
        first = self._params()[0]
        _check_dim(name, shape, first)
        return torch.Size((*_broadcast_batch(name, shape, first.shape[: -self._own_dims[0]]), shape[-1]))

    def _broadcast(self, name: str, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [*batch, D] and the parameters, broadcast so that *params are the trailing dimensions of *batch."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        given = self._params()
        _check_dim(name, x.shape, given[0])
        params = given[0].shape[: -self._own_dims[0]]
        if shapes.is_trailing(params, x.shape[:-1]):
            return x, given
        batch = _broadcast_batch(name, x.shape, params)
        trailing = batch[len(batch) - len(params) :]
        expanded = (
            t.expand(*trailing, *t.shape[t.dim() - own :]) for t, own in zip(given, self._own_dims, strict=True)
        )
        return x.expand(*batch, x.shape[-1]), tuple(expanded)

    def _cached(self, **given: Tensor) -> _Call | None:
        """The last call, if x, y or both are its own tensors and nothing has changed since."""
        call = self._cached_call
        if call is None or any(tensor is not getattr(call, name) for name, tensor in given.items()):
            return None
        tensors = self._watched(call.x, call.y)
        if tensors is None or len(tensors) != len(call.tensors):
            return None
        same = all(a is b for a, b in zip(tensors, call.tensors, strict=True))
        if not same or _versions(tensors) != call.versions or self._mode() != call.mode:
            return None
        if not _still(tensors[2:], call.values):
            return None
        # A call under no_grad has no graph: for the parameters its answer would be a constant.
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return None if wants_grad and not call.with_grad else call

    def _remember(self, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        if self._cache_size == 0:
            return
        tensors = self._watched(x, y)
        if tensors is None:
            self.clear_cache()
            return
        values = tuple(t.detach().clone() for t in tensors[2:])
        self._cached_call = _Call(
            x, y, log_det, tensors, _versions(tensors), values, self._mode(), torch.is_grad_enabled()
        )

    def clear_cache(self) -> None:
        """Forgets the last call, with the memory of its graph; Pyro's distributions call it."""
        self._cached_call = None

    def _watched(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...] | None:
        """The tensors that must not change; None if a change would leave no trace."""
        if torch.compiler.is_compiling() or needs_plain_torch():
            return None
        sources = self._sources()
        if sources is None or any(t.is_inference() for t in (x, y, *sources)):
            return None
        return x, y, *sources

    def __getstate__(self) -> dict[str, object]:
        # A copy makes its own inverse, and graphs can be neither copied nor pickled. The base class's __getstate__
        # cannot be used, because Pyro replaces it.
        return {**self.__dict__, "_inv": None, "_cached_call": None}


class CachedPlanar(CachedTransform):
    """The base of all planar transforms: `_params()` are u, w [*params, K, D] and b [*params, K]."""

    _own_dims = (2, 2, 1)

    def _run(self, x: Tensor, params: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        u, w, b = params
        return (planar_flow_inverse if inverse else planar_flow)(x, u, w, b, **self.options)

    def _why_not_bijective(self) -> Exception | None:
        try:
            FlowSpec(**self.options).check_invertible()
        except ValueError as error:
            return error
        return None


class PlanarTransform(CachedPlanar):
    """K planar steps as a transform of torch.distributions: `TransformedDistribution(base, PlanarTransform(u, w, b))`.

    Args:
        u, w: [*params, K, D], and b: [*params, K], tensors or parameters, referenced and not copied. *params are batch
            dimensions of the distribution, and broadcast with those of a sample, as in torch's transforms.
        activation, slope, constraint: as in `planar_flow`. `bijective` is False for constraint="none": no inverse is
            guaranteed, and only the log_prob of a sample is known, with cache_size=1.
        cache_size: 1 keeps x, y and log_det of the last call, so that the log_prob of a sample needs no inverse; 0, the
            default, keeps nothing. Any change of u, w or b empties the cache, and so does a change of x or y, except a
            write through `.data`. If gradients are needed, a sample drawn without them is computed again.

    Raises TypeError or ValueError if u, w, b or a name do not fit, as `planar_flow` does; NotImplementedError for an
    inverse that is not guaranteed.
    """

    def __init__(
        self,
        u: Tensor,
        w: Tensor,
        b: Tensor,
        *,
        activation: str = "tanh",
        slope: float = DEFAULT_SLOPE,
        constraint: str = "softplus",
        cache_size: int = 0,
    ) -> None:
        super().__init__(FlowSpec(constraint, activation, slope).options(), cache_size)
        self.u, self.w, self.b = u, w, b
        check_params(u, w, b, self.options)

    def _params(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.w, self.b

    def _sources(self) -> tuple[Tensor, ...]:
        return self.u, self.w, self.b

    def __eq__(self, other: object) -> bool:  # no hash, because the values may change
        return (
            isinstance(other, PlanarTransform)
            and self.options == other.options
            and all(_equal(a, b) for a, b in zip(self._params(), other._params(), strict=True))
        )

    def __repr__(self) -> str:
        named = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"PlanarTransform(u={tuple(self.u.shape)}, {named})"


def check_params(u: Tensor, w: Tensor, b: Tensor, options: dict[str, Any]) -> None:
    """Raises `planar_flow`'s errors if parameters or names do not fit each other, before there is a sample."""
    if not isinstance(u, Tensor):
        raise TypeError(f"u must be a torch.Tensor, got {type(u).__name__}")
    if u.dim() < 2:
        raise ValueError(f"u must have shape [K, D] or [*params, K, D], got {tuple(u.shape)}")
    if u.shape[-1] < 1:
        raise ValueError(f"u must have shape [K, D] or [*params, K, D] with D >= 1, got {tuple(u.shape)}")
    dtype = u.dtype if u.dtype in shapes.DTYPES else torch.float32  # any other dtype is rejected with u's name
    shapes.check(u.new_zeros((0, *u.shape[:-2], u.shape[-1]), dtype=dtype), u, w, b, FlowSpec(**options))


def _check_dim(name: str, shape: torch.Size, first: Tensor) -> None:
    if len(shape) < 1 or shape[-1] != first.shape[-1]:
        raise ValueError(f"{name} must be [*batch, D] with the parameters' D = {first.shape[-1]}, got {tuple(shape)}")


def _broadcast_batch(name: str, shape: torch.Size, params: torch.Size) -> torch.Size:
    """The batch dimensions of a sample's shape [*batch, D], broadcast with *params."""
    batch = shape[:-1]
    try:
        return torch.broadcast_shapes(batch, params)
    except RuntimeError:
        raise ValueError(
            f"{name}'s batch dimensions must broadcast with the parameters', {tuple(params)}, got {tuple(batch)}"
        ) from None


def _versions(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int, bool], ...]:
    """Versions and addresses: a write in place raises a version, and module.to() moves the memory."""
    return tuple((t._version, t.data_ptr(), t.requires_grad) for t in tensors)


def _still(tensors: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> bool:
    """Whether the tensors have these values: PyTorch's fused optimizers and Pyro's ClippedAdam raise no version."""
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return True  # a comparison would wait for the GPU, which a capture forbids
    return all(t.is_meta or torch.equal(t, value) for t, value in zip(tensors, values, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
