"""Checks the arguments of the flow once, for every backend."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CONSTRAINTS = ("softplus", "none", "log_softplus")  # in the order of csrc/formulas.h, as the activations are
ACTIVATIONS = ("tanh", "leaky_relu", "elu", "sigmoid", "linear")
MOST = torch.finfo(torch.float32).max  # of the numbers of a formula: beyond, they are infinite in float32
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Formulas(NamedTuple):
    """What a step computes: the constraint of u, the activation h, its slope below 0 where it is leaky_relu, and the
    eps inside the logarithm of the determinant."""

    constraint: str = "softplus"
    activation: str = "tanh"
    slope: float = 0.2
    log_det_eps: float = 0.0

    def numbers(self) -> tuple[int, int, float, float]:
        """The same as operators take them."""
        return CONSTRAINTS.index(self.constraint), ACTIVATIONS.index(self.activation), self.slope, self.log_det_eps

    def is_usual(self) -> bool:
        """Whether it is what nearly every flow has, and the CUDA kernels take in the half precisions."""
        return self.activation == "tanh" and self.constraint != "log_softplus" and self.log_det_eps == 0

    @classmethod
    def of_numbers(cls, constraint: int, activation: int, slope: float, log_det_eps: float = 0.0) -> "Formulas":
        """Raises ValueError for a number without a name."""
        for name, number, names in (("constraint", constraint, CONSTRAINTS), ("activation", activation, ACTIVATIONS)):
            if not 0 <= number < len(names):
                raise ValueError(f"{name} must be in [0, {len(names) - 1}], got {number}: {names}")
        return cls(CONSTRAINTS[constraint], ACTIVATIONS[activation], slope, log_det_eps)


class Problem(NamedTuple):
    """What a backend has to know of a call: row r of z uses parameter set r mod num_sets."""

    rows: int
    dim: int
    num_steps: int
    num_sets: int
    amortized: bool
    compute_dtype: torch.dtype
    device_type: str
    inverse: bool = False
    formulas: Formulas = Formulas()


def check(z: Tensor, u: Tensor, w: Tensor, b: Tensor, formulas: Formulas) -> Problem:
    """Validates z [*batch, D] with u, w [*params, K, D] and b [*params, K], where *params ends *batch.

    Raises TypeError for what is not a floating tensor or a number or mixes dtypes, ValueError for shapes, devices,
    names and numbers out of range.
    """
    if not _alike(z, u, w, b):
        _check_kinds(z, u, w, b)
    _check_shapes(z, u, w, b)
    check_formulas(formulas)

    amortized = u.dim() > 2
    num_sets = math.prod(u.shape[:-2]) if amortized else 1
    rows = z.shape[0] if z.dim() == 2 else math.prod(z.shape[:-1])
    dtype, device_type = _compute_dtype(z, u, w, b), z.device.type
    return Problem(
        rows,
        z.shape[-1],
        u.shape[-2],
        num_sets,
        amortized,
        dtype,
        device_type,
        False,
        formulas,
    )


def check_formulas(formulas: Formulas) -> None:
    """Raises ValueError for an unknown name, TypeError or ValueError where a number is none or out of range."""
    constraint, activation, slope, log_det_eps = formulas
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if constraint not in CONSTRAINTS:
        raise ValueError(f"constraint must be one of {CONSTRAINTS}, got {constraint!r}")
    if activation == "leaky_relu":
        _check_number("slope", slope)
        if not 0 < slope <= MOST:
            raise ValueError(f"slope must be finite and above 0, got {slope}: at 0 a step loses what lies below it")
    if type(log_det_eps) is not float or log_det_eps != 0.0:
        _check_number("log_det_eps", log_det_eps)
        if not 0 <= log_det_eps <= MOST:
            raise ValueError(f"log_det_eps must be finite and at least 0, got {log_det_eps}: 0.0 is exact")


def check_invertible(formulas: Formulas) -> None:
    """Raises ValueError, with the reason, where a step may have no inverse; the names are known."""
    constraint, activation, slope, _ = formulas
    if constraint == "none":
        raise ValueError(
            'constraint must be "softplus" or "log_softplus" to invert, got "none": w . u <= -1 has no inverse'
        )
    if activation == "leaky_relu" and slope > 1:
        raise ValueError(
            f"slope must be at most 1 to invert leaky_relu, got {slope}: the constraint keeps w . u_hat above -1, and "
            "1 + (w . u_hat) slope can still be negative (flowjax accepts such a slope)"
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computation: the half precisions are computed and accumulated in float32, and so is log_det."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_sets(u: Tensor) -> int:
    """P of u [P, K, D], and 1 of u [K, D]."""
    return u.shape[0] if u.dim() == 3 else 1


def check_rows(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> None:
    """Raises ValueError where z [R, D], u, w [K, D] or [P, K, D] and b [K] or [P, K] do not fit: a kernel would read
    other memory. For operators that are called past `check`."""
    fits = z.dim() == 2 and u.dim() in (2, 3) and u.shape[-1] == z.shape[1] and u.shape[-2:].numel() < 2**31
    fits = fits and w.shape == u.shape and b.shape == u.shape[:-1]
    sets = num_sets(u)
    if not fits or (z.shape[0] % sets if sets else z.shape[0]):
        raise ValueError(
            "z must be [R, D], u and w [K, D] or [P, K, D], b [K] or [P, K], with K D < 2^31 and R a multiple of P, "
            f"got z {tuple(z.shape)}, u {tuple(u.shape)}, w {tuple(w.shape)}, b {tuple(b.shape)}"
        )
    _check_device(z, u=u, w=w, b=b)
    if not z.dtype == u.dtype == w.dtype == b.dtype or z.dtype not in DTYPES:
        raise TypeError(
            f"z, u, w and b must share a dtype of {DTYPES}, got z {z.dtype}, u {u.dtype}, w {w.dtype}, b {b.dtype}"
        )


def check_saved(grad_z: Tensor, grad_log_det: Tensor, z: Tensor, a: Tensor, num_steps: int) -> None:
    """Raises ValueError where grad_z [R, D], grad_log_det [R] or the pre-activations a [K, R] do not fit z [R, D]."""
    _check_device(z, grad_z=grad_z, grad_log_det=grad_log_det, a=a)
    rows, dtype = z.shape[0], compute_dtype(z.dtype)
    fits = grad_z.shape == z.shape and grad_log_det.shape == (rows,) and a.shape == (num_steps, rows)
    if not fits or not a.is_contiguous() or (grad_z.dtype, grad_log_det.dtype, a.dtype) != (z.dtype, dtype, dtype):
        raise ValueError(
            f"grad_z must be as z, {tuple(z.shape)} {z.dtype}, grad_log_det [R] and a [K, R] {dtype} as the forward "
            f"returned them with save=True, got {tuple(grad_z.shape)} {grad_z.dtype}, {tuple(grad_log_det.shape)} "
            f"{grad_log_det.dtype}, {tuple(a.shape)} {a.dtype}"
        )


def check_size(name: str, value: object, least: int) -> None:
    """Raises TypeError or ValueError where a size or a count is not an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")


def is_trailing(params: torch.Size, batch: torch.Size) -> bool:
    """Whether the parameters' batch dimensions end those of z: the only broadcast there is."""
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


def _check_kinds(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> None:
    tensors = (("z", z), ("u", u), ("w", w), ("b", b))
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}: convert it with .float()"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}: convert it with .to_dense()")
    _check_device(z, u=u, w=w, b=b)


def _check_device(z: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != z.device:
            raise ValueError(
                f"{name} must be on z's device {z.device}, got {tensor.device}: move it with .to(z.device)"
            )


def _check_shapes(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> None:
    if z.dim() < 1:
        raise ValueError(f"z must have shape [*batch, D], got a tensor of rank 0: {tuple(z.shape)}")
    dim = z.shape[-1]
    if dim < 1:
        raise ValueError(f"z must have shape [*batch, D] with D >= 1, got {tuple(z.shape)}")
    if u.dim() < 2 or u.shape[-1] != dim:
        raise ValueError(
            f"u must have shape [K, D] or [*batch, K, D] with D = {dim} as z {tuple(z.shape)} has, got {tuple(u.shape)}"
        )
    if w.shape != u.shape:
        raise ValueError(f"w must have u's shape {tuple(u.shape)}, got {tuple(w.shape)}")
    if b.shape != u.shape[:-1]:
        raise ValueError(
            f"b must have u's shape without its last dimension, {tuple(u.shape[:-1])}, got {tuple(b.shape)}"
        )
    params, batch = u.shape[:-2], z.shape[:-1]
    if not is_trailing(params, batch):
        raise ValueError(
            f"u's batch dimensions must equal the trailing batch dimensions of z, {tuple(batch)}, got {tuple(params)}: "
            "nothing else is broadcast (for parameters shared by all samples pass u, w [K, D] and b [K])"
        )


def _compute_dtype(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> torch.dtype:
    if u.dtype == w.dtype == b.dtype == z.dtype:
        return compute_dtype(z.dtype)
    if torch.is_autocast_enabled(z.device.type):
        return torch.float32
    raise TypeError(
        f"z, u, w and b must share one dtype outside torch.autocast, got z {z.dtype}, u {u.dtype}, w {w.dtype}, "
        f"b {b.dtype}: convert them with .to(z.dtype)"
    )
