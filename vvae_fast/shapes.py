"""Checks the arguments of the flow once, for every backend."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from vvae_fast.spec import DEFAULT, FlowSpec

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
_transforms_are_active, _tracing_state = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_PLAIN = (Tensor, torch.nn.Parameter)  # and no subclass, such as torch.export's
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_set_tracing_state = torch._C._set_tracing_state  # type: ignore[attr-defined]  # not in PyTorch's stubs


class Problem(NamedTuple):
    """The facts about a call that a backend needs: row r of z uses parameter set r mod num_sets."""

    rows: int
    dim: int
    num_steps: int
    num_sets: int
    amortized: bool
    compute_dtype: torch.dtype
    device_type: str
    inverse: bool = False
    spec: FlowSpec = DEFAULT


def untraced(check: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A check that leaves no trace: while torch.jit.trace records, sizes are tensors, and reading them warns."""

    @functools.wraps(check)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        state = _tracing_state()
        if state is None:
            return check(*args, **kwargs)
        _set_tracing_state(None)
        try:
            return check(*args, **kwargs)
        finally:
            _set_tracing_state(state)

    return wrapped


def is_ordinary(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> bool:
    """Whether z is [R, D] and u [K, D] or [R, K, D], of one dtype of full precision with w and b, and neither
    torch.func nor torch.jit.trace looks on: nearly every call. Of what `check` refuses, the operators refuse all else.
    """
    if _transforms_are_active() or _tracing_state() is not None:
        return False
    if not (type(z) in _PLAIN and type(u) in _PLAIN and type(w) in _PLAIN and type(b) in _PLAIN):
        return False
    dtype, rank = z.dtype, u.ndim
    return (
        (dtype is torch.float32 or dtype is torch.float64)
        and dtype is u.dtype is w.dtype is b.dtype
        and z.ndim == 2
        and z.shape[1] > 0
        and (rank == 2 or (rank == 3 and u.shape[0] == z.shape[0]))
    )


def is_ordinary_packed(z: Tensor, packed: Tensor, num_steps: int, dim: int) -> bool:
    """The same for z [R, D] and packed [R, K (2 D + 1)]."""
    return (
        not _transforms_are_active()
        and _tracing_state() is None
        and type(z) in _PLAIN
        and type(packed) in _PLAIN
        and z.dtype is packed.dtype
        and (z.dtype is torch.float32 or z.dtype is torch.float64)
        and type(num_steps) is int is type(dim)
        and num_steps >= 0
        and dim > 0
        and z.ndim == 2
        and z.shape[1] == dim
        and packed.shape == (z.shape[0], num_steps * (2 * dim + 1))
    )


def is_ordinary_headed(z: Tensor, context: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """The same for z [R, D], context [R, F], weight [K (2 D + 1), F] and bias [K (2 D + 1)] on the CPU, not under
    torch.autocast. It finds all that the operators refuse."""
    if _transforms_are_active() or _tracing_state() is not None or torch.is_autocast_enabled("cpu"):
        return False
    if not (type(z) in _PLAIN and type(context) in _PLAIN and type(weight) in _PLAIN and type(bias) in _PLAIN):
        return False
    return (
        z.dtype is context.dtype is weight.dtype is bias.dtype
        and (z.dtype is torch.float32 or z.dtype is torch.float64)
        and z.is_cpu
        and context.is_cpu
        and weight.is_cpu
        and bias.is_cpu
        and z.layout is context.layout is weight.layout is bias.layout is torch.strided
        and z.ndim == context.ndim == weight.ndim == 2
        and z.shape[1] > 0
        and context.shape[0] == z.shape[0]
        and weight.shape[1] == context.shape[1]
        and weight.shape[0] % (2 * z.shape[1] + 1) == 0
        and bias.shape == weight.shape[:1]
    )


@untraced
def check(z: Tensor, u: Tensor, w: Tensor, b: Tensor, spec: FlowSpec, inverse: bool = False) -> Problem:
    """Validates z [*batch, D] with u, w [*params, K, D] and b [*params, K], where *params ends *batch.

    The problem has the spec that `FlowSpec.checked` returns.

    Raises TypeError for mixed dtypes, or if an argument is not a floating tensor or number, ValueError for shapes,
    devices, names and numbers out of range.
    """
    alike = _alike(z, u, w, b)
    if not alike:
        check_tensors(z=z, u=u, w=w, b=b)
    _check_shapes(z, u, w, b)
    spec = spec.checked(inverse)

    batch, params = z.shape[:-1], u.shape[:-2]
    amortized = len(params) > 0
    return Problem(
        batch[0] if len(batch) == 1 else math.prod(batch),
        z.shape[-1],
        u.shape[-2],
        math.prod(params) if amortized else 1,
        amortized,
        compute_dtype(z.dtype) if alike else common_dtype(z=z, u=u, w=w, b=b),
        z.device.type,
        inverse,
        spec,
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computation: half precisions, and their log_det, are computed and accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(t: Tensor) -> Tensor:
    """A half-precision tensor in float32, any other unchanged: sums and densities need the digits."""
    return t.float() if t.dtype in HALVES else t


def autocasts(t: Tensor) -> bool:
    """Whether torch.autocast chooses the dtypes on a tensor's device; some devices, such as meta, have no autocast."""
    return torch.amp.is_autocast_available(t.device.type) and torch.is_autocast_enabled(t.device.type)


def unpack(packed: Tensor, num_steps: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views u, w [*params, K, D] and b [*params, K] of packed [*params, K (2 D + 1)]."""
    u, w, b = packed.split_with_sizes([num_steps * dim, num_steps * dim, num_steps], -1)
    return u.unflatten(-1, (num_steps, dim)), w.unflatten(-1, (num_steps, dim)), b


def pack(u: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The inverse of `unpack`, as a copy."""
    return torch.cat([u.flatten(-2), w.flatten(-2), b], -1)


def num_steps_of(weight: Tensor, dim: int) -> int:
    """K of a head's weight [K (2 D + 1), F]."""
    return weight.shape[0] // (2 * dim + 1)


def num_sets(u: Tensor) -> int:
    """P of u [P, K, D], and 1 of u [K, D]."""
    return u.shape[0] if u.dim() == 3 else 1


def check_rows(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> None:
    """Raises ValueError if z [R, D], u, w [K, D] or [P, K, D] and b [K] or [P, K] do not fit: a kernel would read
    other memory. For operators that are called past `check`."""
    of_z, of_u = z.shape, u.shape  # asked for once: every call of an operator comes here
    fits = len(of_z) == 2 and len(of_u) in (2, 3) and of_u[-1] == of_z[1] and of_u[-2] * of_u[-1] < 2**31
    fits = fits and w.shape == of_u and b.shape == of_u[:-1]
    sets = of_u[0] if len(of_u) == 3 else 1
    if not fits or (of_z[0] % sets if sets else of_z[0]):
        raise ValueError(
            "z must be [R, D], u and w [K, D] or [P, K, D], b [K] or [P, K], with K D < 2^31 and R a multiple of P, "
            f"got z {tuple(z.shape)}, u {tuple(u.shape)}, w {tuple(w.shape)}, b {tuple(b.shape)}"
        )
    if not z.device == u.device == w.device == b.device:
        _check_device(z=z, u=u, w=w, b=b)
    if not z.dtype is u.dtype is w.dtype is b.dtype or z.dtype not in DTYPES:
        raise TypeError(
            f"z, u, w and b must share a dtype of {DTYPES}, got z {z.dtype}, u {u.dtype}, w {w.dtype}, b {b.dtype}"
        )


def check_saved(grad_z: Tensor, grad_log_det: Tensor, z: Tensor, a: Tensor, num_steps: int) -> None:
    """Raises ValueError if grad_z [R, D], grad_log_det [R] or the pre-activations a [K, R] do not fit z [R, D]."""
    if not z.device == grad_z.device == grad_log_det.device == a.device:
        _check_device(z, grad_z=grad_z, grad_log_det=grad_log_det, a=a)
    rows, dtype = z.shape[0], compute_dtype(z.dtype)
    fits = grad_z.shape == z.shape and grad_log_det.shape == (rows,) and a.shape == (num_steps, rows)
    if not fits or not a.is_contiguous() or (grad_z.dtype, grad_log_det.dtype, a.dtype) != (z.dtype, dtype, dtype):
        raise ValueError(
            f"grad_z must be as z, {tuple(z.shape)} {z.dtype}, grad_log_det [R] and a [K, R] {dtype} as the forward "
            f"returned them with save=True, got {tuple(grad_z.shape)} {grad_z.dtype}, {tuple(grad_log_det.shape)} "
            f"{grad_log_det.dtype}, {tuple(a.shape)} {a.dtype}"
        )


def check_size(name: str, value: object, least: int) -> int:
    """A size or a count as an int; anything that can index a list is one, also numpy's integers, but not bools.

    Raises TypeError for anything else, ValueError if it is below `least`.
    """
    if type(value) is not int:
        value = as_index(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def as_index(name: str, value: Any) -> int:
    """Anything that can index a list, as an int. Raises TypeError for anything else, and for bools."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or _is_bool(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return number


def _is_bool(value: object) -> bool:
    """Python's, numpy's or a tensor of one."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def is_trailing(params: torch.Size, batch: torch.Size) -> bool:
    """Whether the parameters' batch dimensions are the trailing ones of z: the only allowed broadcast."""
    return params == batch[len(batch) - len(params) :]  # shorter than params where there are too many of them


def _alike(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> bool:
    """Dense floating tensors of one dtype on one device: what nearly every call passes, and the cheapest to ask."""
    return (
        isinstance(z, Tensor)
        and isinstance(u, Tensor)
        and isinstance(w, Tensor)
        and isinstance(b, Tensor)
        and z.dtype is u.dtype is w.dtype is b.dtype
        and z.dtype in DTYPES
        and z.layout is u.layout is w.layout is b.layout is torch.strided
        and z.device == u.device == w.device == b.device
    )


def check_tensors(**tensors: Any) -> None:
    """Raises TypeError if an argument is not a dense tensor of a dtype of DTYPES, ValueError if it is not on the first
    one's device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}: convert it with .float()"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}: convert it with .to_dense()")
    _check_device(**tensors)


def _check_device(z: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != z.device:
            raise ValueError(
                f"{name} must be on z's device {z.device}, got {tensor.device}: move it with .to(z.device)"
            )


def _check_shapes(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> None:
    shape, of_u = z.shape, u.shape  # asked for once: every call of the flow comes here
    if not shape:
        raise ValueError("z must have shape [*batch, D], got a tensor of rank 0: ()")
    dim = shape[-1]
    if dim < 1:
        raise ValueError(f"z must have shape [*batch, D] with D >= 1, got {tuple(shape)}")
    if len(of_u) < 2 or of_u[-1] != dim:
        raise ValueError(
            f"u must have shape [K, D] or [*batch, K, D] with D = {dim} as z {tuple(shape)} has, got {tuple(of_u)}"
        )
    if w.shape != of_u:
        raise ValueError(f"w must have u's shape {tuple(of_u)}, got {tuple(w.shape)}")
    if b.shape != of_u[:-1]:
        raise ValueError(f"b must have u's shape without its last dimension, {tuple(of_u[:-1])}, got {tuple(b.shape)}")
    if len(of_u) > 2 and not is_trailing(of_u[:-2], shape[:-1]):
        raise ValueError(
            f"u's batch dimensions must equal the trailing batch dimensions of z, {tuple(shape[:-1])}, "
            f"got {tuple(of_u[:-2])}: nothing else is broadcast (for parameters shared by all samples pass u, w [K, D] "
            "and b [K])"
        )


def check_context_batch(z: Tensor, context: Tensor) -> None:
    """Raises ValueError if z [*batch, D] and context [*params, F] do not fit: *params has to end *batch."""
    params, batch = context.shape[:-1], z.shape[:-1]
    if not is_trailing(params, batch):
        raise ValueError(
            f"context's leading dimensions must be the trailing batch dimensions of z, {tuple(batch)}, "
            f"got {tuple(params)}: nothing else is broadcast"
        )


@untraced
def check_head(z: Tensor, context: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Validates z [*batch, D] with context [*params, F], weight [K (2 D + 1), F] and bias [K (2 D + 1)].

    Raises TypeError or ValueError as `check` does.
    """
    check_tensors(z=z, context=context, weight=weight, bias=bias)
    if z.dim() < 1 or z.shape[-1] < 1:
        raise ValueError(f"z must have shape [*batch, D] with D >= 1, got {tuple(z.shape)}")
    dim, features = z.shape[-1], context.shape[-1:]
    if weight.dim() != 2 or weight.shape[1:] != features or weight.shape[0] % (2 * dim + 1):
        raise ValueError(
            f"weight must be [K (2 D + 1), F] with 2 D + 1 = {2 * dim + 1} as z {tuple(z.shape)} has and F as context "
            f"{tuple(context.shape)} has, got {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [K (2 D + 1)] = ({weight.shape[0]},), as weight has rows, got {tuple(bias.shape)}"
        )
    check_context_batch(z, context)
    common_dtype(z=z, context=context, weight=weight, bias=bias)


def common_dtype(**tensors: Tensor) -> torch.dtype:
    """The dtype of computation. Raises TypeError where dtypes differ outside torch.autocast."""
    first, *_ = tensors.values()
    if all(t.dtype == first.dtype for t in tensors.values()):
        return compute_dtype(first.dtype)
    if autocasts(first):
        return torch.float32
    *names, last = tensors
    got = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
    raise TypeError(
        f"{', '.join(names)} and {last} must share one dtype outside torch.autocast, got {got}: convert them with "
        ".to(z.dtype)"
    )
