"""What the flow modules share: the checks of z, and for the amortized ones the head that computes their parameters."""

import copy
import math
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from vvae_fast.backends import check_name
from vvae_fast.nn.arguments import first_parameter
from vvae_fast.nn.linear import Linear, nearest_of_rank
from vvae_fast.shapes import HALVES, autocasts, check_context_batch, check_size, full_precision, untraced
from vvae_fast.spec import DEFAULT

# The a of docs/math.md (56): on digits 0.02 and 0.03 did alike, and 0.05 worse. A few numbers have a larger one, since
# Adam moves the flow by the sum of the features' sizes.
_KNEE, _KNEE_SUM = 0.03, 3.0
# The sum of the deviations of what a head's second layer reads after a layer norm, and of its sizes after a cut: on
# MNIST rank 32 with a layer norm learned less with 16, 40 and 96, and rank 128 with 128.
_NORM_SUM = 32.0
_LEAST_SIZE = 1e-12  # of r / a: at 0 the factor is 1
# Of the mean over the head's outputs, docs/math.md (69): so much every output counts, also where nothing moves with it.
_LEAST_SHARE = 1e-3
_CHUNK = 1024  # rows whose parameters' derivatives are in memory at once
_Amortized = TypeVar("_Amortized", bound="AmortizedFlow")
# The most numbers that a layer reads which a flow computes itself. The backward computes its product a second time:
# of more, that takes longer than what it saves (benchmarks/calls/headed_width.py).
_MOST_HEADED = 192


def unautocast(like: Tensor) -> AbstractContextManager[Any]:
    """Without torch.autocast, whose half-precision products would leave nothing orthonormal."""
    return torch.autocast(like.device.type, enabled=False) if autocasts(like) else nullcontext()


class Flow(nn.Module):
    """The base of this package's flows: D, the backend, and the check of z. A flow in half precision also takes z in
    float32, and keeps its digits."""

    def __init__(self, dim: int, backend: str | None) -> None:
        super().__init__()
        self.dim = check_size("dim", dim, 1)
        if backend is not None:
            check_name(backend)
        self.backend = backend

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of the flow's function."""
        return {"backend": self.backend}

    def _own(self, rows: int, features: Any) -> tuple[Tensor, ...]:
        """What is trained, for each of `rows` data points, [rows, *] each, which `inference_gaps` fits. features are
        the context [rows, F], or None where a shared flow has none."""
        raise NotImplementedError

    def _run(self, z: Tensor, own: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """z_K and log_det for z [*batch, D] with what `_own` gives in the place of the flow's own."""
        raise NotImplementedError

    @untraced
    def _check_z(self, z: Tensor, like: Tensor) -> None:
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}")
        if z.shape[-1:] != (self.dim,):
            raise ValueError(f"z must be [*batch, D] with the flow's D = {self.dim}, got {tuple(z.shape)}")
        if z.dtype is not like.dtype or z.device != like.device:
            _check_like("z", z, like, (torch.float32,) if like.dtype in HALVES else ())

    def _repr(self, **sizes: Any) -> str:
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


def largest_rank_of(context_dim: int, outputs: int) -> int:
    """Of a head; a larger one would restrict nothing."""
    return min(context_dim, outputs)


def draw_like_linear(weight: Tensor) -> None:
    """Draws a weight [M, F] as nn.Linear does."""
    bound = weight.shape[1] ** -0.5
    weight.uniform_(-bound, bound)


class Head(Linear):
    """A linear layer that its flow initialises. With `normalise` it takes rows of like sizes, docs/math.md (56).

    All kinds have the same state_dict but for its version: nn.Linear's 1, 2 with `normalise`, 3 after a layer norm.
    """

    normalise = False  # for modules that were pickled before there was one

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, normalise: bool = False, normed: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.normalise, self._version = normalise, 3 if normed else 2 if normalise else 1

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
            option = "layer_norm" if 3 in (version, self._version) else "normalise"
            errors.append(f"{prefix[:-1]} is of a flow with {option}={version > 1}: make the flow with that")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inputs(x))

    def inputs(self, x: Tensor) -> Tensor:
        """What the product takes for x [*batch, F]."""
        return _of_like_sizes(x, self.in_features) if self.normalise else x


def _of_like_sizes(x: Tensor, num_features: int) -> Tensor:
    """x [*batch, F] with the root mean square r of each row brought to a log(1 + r / a), docs/math.md (56)."""
    wide = full_precision(x)
    knee = max(_KNEE, _KNEE_SUM / num_features)
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / (knee * math.sqrt(num_features)) + _LEAST_SIZE
    return (wide * (torch.log1p(size) / size)).to(x.dtype)


class RankNorm(nn.Module):
    """A layer norm of rows [*batch, r] whose numbers get a size by their count, docs/math.md (66)."""

    def forward(self, x: Tensor) -> Tensor:
        rank = x.shape[-1]
        return nn.functional.layer_norm(x, (rank,), x.new_full((rank,), _NORM_SUM / rank))


def _computes_more(module: nn.Module) -> bool:
    """Whether a call of the module gives something else than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    return not (
        _computes_more(module)
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or _has_any_global_hook()
    )


class AmortizedFlow(Flow):
    """The base of flows whose parameters a linear head computes from a context [*params, F].

    The head is F -> outputs, or with rank = r F -> r -> outputs: `head.down`, without a bias, with layer_norm
    `head.norm`, and `head.up`.
    """

    rank: int | None = None  # for modules that were pickled before there was one
    normalise = False  # the same
    layer_norm = False  # the same
    context_dim: int
    head: Any  # a module, which may be the user's own
    _OUTPUTS = ""  # their number as a formula, for messages

    def _num_outputs(self) -> int:
        raise NotImplementedError

    def _flow_with(self, z: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        """z_K and log_det for z [*batch, D] with the head's output packed [*params, outputs]."""
        raise NotImplementedError

    def _make_head(self, context_dim: int, rank: int | None, normalise: bool, layer_norm: bool) -> None:
        """Sets context_dim, rank, normalise, layer_norm and a head without values. Raises TypeError or ValueError for
        those that do not fit."""
        self.context_dim = check_size("context_dim", context_dim, 1)
        outputs = self._num_outputs()
        self.rank = None if rank is None else self._check_rank(rank, outputs)
        if not isinstance(normalise, bool):
            raise TypeError(f"normalise must be a bool, got {type(normalise).__name__}")
        self.normalise = normalise
        self.layer_norm = self._check_layer_norm(layer_norm)
        if self.rank is None:
            self.head = Head(self.context_dim, outputs, normalise=normalise)
        else:
            down = Head(self.context_dim, self.rank, bias=False, normalise=normalise)
            up = Head(self.rank, outputs, normed=self.layer_norm)
            up.narrow = True
            norm: dict[str, nn.Module] = {"norm": RankNorm()} if self.layer_norm else {}
            self.head = nn.Sequential(OrderedDict(down=down, **norm, up=up))

    def _check_rank(self, rank: int, outputs: int) -> int:
        rank, most = check_size("rank", rank, 1), largest_rank_of(self.context_dim, outputs)
        if rank > most:
            raise ValueError(
                f"rank must be at most min(F, {self._OUTPUTS}) = {most}, got {rank}: use rank=None, which costs less"
            )
        return rank

    def _check_layer_norm(self, layer_norm: bool) -> bool:
        if not isinstance(layer_norm, bool):
            raise TypeError(f"layer_norm must be a bool, got {type(layer_norm).__name__}")
        if layer_norm and (self.rank is None or self.rank == 1):
            raise ValueError(f"layer_norm=True wants a rank of at least 2, got rank={self.rank}: leave layer_norm out")
        return layer_norm

    def _head_options(self) -> dict[str, Any]:
        """What `repr` shows of the head; None for a default."""
        return {"rank": self.rank, "normalise": self.normalise or None, "layer_norm": self.layer_norm or None}

    def _last(self) -> Any:
        """The layer whose bias the outputs start as."""
        return self.head if self.rank is None else self.head.up

    def _start(self, bias: Tensor, drawn: slice) -> None:
        """Sets the bias of the last layer, draws its weight's rows `drawn` and sets the other rows to zero;
        `head.down` starts like nn.Linear."""
        last = self._last()
        with torch.no_grad():
            last.bias.copy_(bias)
            last.weight.zero_()
            self._draw_rows(last.weight[drawn])
            if self.rank is not None:
                draw_like_linear(self.head.down.weight)

    def _draw_rows(self, weight: Tensor) -> None:
        """Draws rows of the last layer's weight like nn.Linear. After a layer norm they are smaller by what it gives
        more than an nn.Linear, from contexts of unit variance, does: so the outputs vary as without."""
        draw_like_linear(weight)
        if self.layer_norm:
            weight.mul_(weight.shape[1] / (_NORM_SUM * math.sqrt(3)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def with_rank(self: _Amortized, rank: int, z: Tensor, context: Tensor) -> _Amortized:
        """A copy of this flow with a head of this rank: of all of them, the one that moves points like z [N, D] with
        contexts like context [N, F] most nearly as this flow does, to first order, docs/math.md (68), (69).

        For a trained flow: its head needs a smaller rank than one in training. In a VAE z are samples of q_0(z_0 | x)
        and context the features of the same x, some thousands of rows. The copy has parameters of its own, which an
        optimizer has to be told of. Every call with the same arguments gives the same.

        Raises TypeError or ValueError if rank is no size, or too large or not below the flow's own; if z or context is
        not as above, empty, or not finite; or if the head has a layer norm or hooks, or is not this flow's own.
        """
        rank = self._check_rank(rank, self._num_outputs())
        if self.rank is not None and rank >= self.rank:
            raise ValueError(f"rank must be below the flow's own, {self.rank}, got {rank}: a larger one adds nothing")
        self._check_context(context)
        self._check_inputs(z, context)
        if context.ndim != 2 or z.ndim != 2 or len(z) == 0:
            got = f"{tuple(z.shape)} and {tuple(context.shape)}"
            raise ValueError(f"z and context must be [N, D] and [N, F] with N of at least 1, got {got}")
        first, last = self._own_layers()
        z, context = z.detach().clone(), context.detach().clone()  # no graph, and none made in inference mode
        weight, bias, x = (t.to("cpu", torch.float64) for t in (last.weight, last.bias, first.inputs(context)))
        if first is not last:
            weight = weight @ first.weight.to(weight)
        counts = self._movement(z, (x @ weight.t() + bias).to(context))
        scales = (counts + _LEAST_SHARE * counts.mean()).sqrt() if counts.any() else torch.ones_like(counts)
        for name, t in {"context": x, "the flow's head": weight, "what the flow makes of z": scales}.items():
            if not t.isfinite().all():
                raise ValueError(f"{name} must be finite, got infinities or NaN: leave such rows out, or train anew")
        factors = nearest_of_rank(weight, bias, x, rank, scales, _NORM_SUM / rank)
        flow = copy.deepcopy(self)
        flow._make_head(self.context_dim, rank, self.normalise, False)
        new = flow.head.to(last.weight.device, last.weight.dtype).train(last.training)
        sources = (first.weight, last.weight, last.bias)
        for parameter, values, source in zip(new.parameters(), factors, sources, strict=True):
            parameter.copy_(values).requires_grad_(source.requires_grad)
            if not parameter.isfinite().all():
                raise ValueError(f"context must be larger for a head in {parameter.dtype}: scale it, or cut in float32")
        return flow

    def _own_layers(self) -> tuple[Head, Head]:
        """The first and the last linear layer of the head, which may be one, if it is this flow's and nothing else."""
        layers = [self.head] if self.rank is None else list(getattr(self.head, "_modules", {}).values())
        biases = [True] if self.rank is None else [False, True]
        kinds = [(type(layer), getattr(layer, "bias", None) is not None) for layer in layers]
        if kinds != [(Head, bias) for bias in biases] or any(map(_computes_more, (self.head, *layers))):
            wants = "leave layer_norm out" if self.layer_norm else "cut the flow before its head is changed"
            raise TypeError(f"head must be this flow's own, of one or two linear layers, without hooks: {wants}")
        return layers[0], layers[-1]

    def _movement(self, z: Tensor, packed: Tensor) -> Tensor:
        """How far z_K and log_det of z [N, D] move with each of the head's outputs packed [N, outputs]: the mean over
        the rows of their squared derivatives, docs/math.md (69), by one random direction a row, [outputs] in float64 on
        the CPU."""
        generator = torch.Generator(z.device).manual_seed(0)
        total = torch.zeros(packed.shape[1], dtype=torch.float64)
        for start in range(0, len(z), _CHUNK):
            part = slice(start, start + _CHUNK)
            with torch.enable_grad():
                params = packed[part].requires_grad_()
                z_K, log_det = self._flow_with(z[part], params)
                direction = torch.randn(z_K.shape, generator=generator, device=z.device)
                (grad,) = torch.autograd.grad((direction * z_K).sum() + log_det.sum(), params)
            total += grad.to("cpu", torch.float64).square().sum(0)
        return total / len(z)

    def _packed(self, context: Tensor, *z: Tensor) -> Tensor:
        """The head's output [*params, outputs] for context [*params, F], after a check of it, and of z [*batch, D] if
        it is given."""
        if not z or not self._is_usual(z[0], context):
            self._check_context(context)
            for given in z:
                self._check_inputs(given, context)
        return self._head_output(context)

    def _head_output(self, context: Tensor) -> Tensor:
        """`_packed` for a context that has been checked."""
        packed = self.head(context)
        self._check_packed(packed, context)
        return packed

    def _headed(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The input [R, F], weight and bias of the head's last layer for context [R, F], for a flow that computes this
        layer itself; None where the head ends in no linear layer, or in a wide one, or where hooks want to see it."""
        last, before = self.head, []
        if type(last) is nn.Sequential and _is_bare(last):
            *before, last = last
        if type(last) not in (Head, nn.Linear) or last.in_features > _MOST_HEADED or not _is_bare(last):
            return None
        weight, bias, outputs = last.weight, last.bias, self._num_outputs()
        if bias is None or weight.shape[0] != outputs or bias.shape != (outputs,):
            return None
        if not weight.dtype is bias.dtype is context.dtype:
            return None
        x = context
        for layer in before:
            x = layer(x)
        if not isinstance(x, Tensor) or x.shape[:-1] != context.shape[:-1]:
            self._check_packed(last(x), context)  # raises
        return last.inputs(x) if type(last) is Head else x, weight, bias

    def _is_usual(self, z: Tensor, context: Tensor) -> bool:
        """Whether z is [R, D] and context [R, F], both like the head: what the checks ask for, in nearly every call."""
        like = first_parameter(self.head)
        return (
            like is not None
            and not torch.jit.is_tracing()  # sizes are tensors there
            and type(z) is type(context) is Tensor
            and z.dtype is context.dtype is like.dtype
            and z.ndim == 2
            and z.shape[1] == self.dim
            and context.shape == (z.shape[0], self.context_dim)
            and z.device == context.device == like.device
        )

    @untraced
    def _check_context(self, context: Tensor) -> None:
        if not isinstance(context, Tensor) or context.dim() < 1 or context.shape[-1] != self.context_dim:
            got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"context must be a tensor [*params, F] with F = {self.context_dim}, got {got}")
        _check_like("context", context, self._like(context))

    def _like(self, other: Tensor) -> Tensor:
        """A parameter of the head; `other` if the user's own head has none."""
        parameter = first_parameter(self.head)
        return other if parameter is None else parameter

    @untraced
    def _check_packed(self, packed: Tensor, context: Tensor) -> None:
        wanted = (*context.shape[:-1], self._num_outputs())
        if not isinstance(packed, Tensor) or packed.shape != wanted:
            got = tuple(packed.shape) if isinstance(packed, Tensor) else type(packed).__name__
            raise ValueError(f"head must give [*params, {self._OUTPUTS}] = {wanted}, got {got}")

    @untraced
    def _check_inputs(self, z: Tensor, context: Tensor) -> None:
        self._check_z(z, self._like(z))
        check_context_batch(z, context)
