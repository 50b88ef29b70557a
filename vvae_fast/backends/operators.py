"""The operators that a backend implements: their schemas and their fakes.

    planar_forward(z, u, w, b, *spec, save) -> (z_K, log_det, a)
    planar_backward(grad_z, grad_log_det, z, u, w, b, a, *spec, params=True) -> (dz, du, dw, db)
    planar_backward_packed(grad_z, grad_log_det, z, packed, a, *spec, params=True) -> (dz, dpacked)
    planar_inverse(z, u, w, b, *spec, save) -> (z_0, log_det, a)
    planar_inverse_backward(grad_z, grad_log_det, z, u, w, b, a, *spec, params=True) -> (dz, du, dw, db)

z [R, D]; shared u, w [K, D] and b [K], or P sets u, w [P, K, D] and b [P, K], row r using set r mod P; any strides.
packed [P, K (2 D + 1)] holds u, w and b of each set, concatenated as a linear head computes them.
The pre-activations a are [K, R] when `save`, else empty: with z they are all that the backward needs. log_det and a
have the dtype of computation. The inverse's a are the same pre-activations, and its z is its input, z_K.
Without `params` du, dw, db and dpacked are unused: they are empty, [0], and the kernels leave out as much of their work
as they can; dz has the same bits.
*spec are `FlowSpec.arguments`. The operators of the other backends are named triton_planar_forward,
cuda_planar_forward and so on.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast import shapes
from vvae_fast.spec import FlowSpec

Operator = Any  # an OpOverload, or a function that is called as one and gives a tuple of tensors


class Operators(NamedTuple):
    """What a backend implements: PyTorch's operators, or functions that are called as they are."""

    planar_forward: Operator
    planar_backward: Operator
    planar_backward_packed: Operator
    planar_inverse: Operator
    planar_inverse_backward: Operator


_ROWS = "Tensor z, Tensor u, Tensor w, Tensor b"
GRADS = "Tensor grad_z, Tensor grad_log_det"
_INVERTIBLE = "int constraint, int activation, float slope"  # of an inverse: `FlowSpec.arguments`
SPEC = f"{_INVERTIBLE}, float log_det_eps"
PARAMS = "bool params=True"
_SCHEMAS = {
    "planar_forward": f"({_ROWS}, {SPEC}, bool save) -> (Tensor, Tensor, Tensor)",
    "planar_backward": f"({GRADS}, {_ROWS}, Tensor a, {SPEC}, {PARAMS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "planar_backward_packed": f"({GRADS}, Tensor z, Tensor packed, Tensor a, {SPEC}, {PARAMS}) -> (Tensor, Tensor)",
    "planar_inverse": f"({_ROWS}, {_INVERTIBLE}, bool save) -> (Tensor, Tensor, Tensor)",
    "planar_inverse_backward": f"({GRADS}, {_ROWS}, Tensor a, {_INVERTIBLE}, {PARAMS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}


def _fake_outputs(z: Tensor, u: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Of a forward, whose last argument is `save`."""
    rows, dtype = z.shape[0], shapes.compute_dtype(z.dtype)
    a = z.new_empty((u.shape[-2], rows) if others[-1] else (0,), dtype=dtype)
    return z.new_empty(z.shape), z.new_empty((rows,), dtype=dtype), a


def fake_gradients(grad_z: Tensor, grad_log_det: Tensor, z: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Of a backward, whose last argument is `params`, and left out where it is True."""
    *params, _ = (t for t in others if isinstance(t, Tensor))  # the last one is a
    return z.new_empty(z.shape), *(t.new_empty((0,) if others[-1] is False else t.shape) for t in params)


def define(name: str, schema: str, fake: Callable[..., tuple[Tensor, ...]]) -> Operator:
    """The operator of a schema, for kernels to register, and its fake."""
    torch.library.define(f"vvae_fast::{name}", schema)
    operator = getattr(torch.ops.vvae_fast, name).default
    names = _argument_names(operator)

    def check_and_fake(*args: Any) -> tuple[Tensor, ...]:
        """The kernels check shapes; tensors of two devices never reach them and would end in a fake."""
        devices = {n: str(t.device) for n, t in zip(names, args, strict=False) if isinstance(t, Tensor)}
        torch._check(len(set(devices.values())) == 1, lambda: f"all tensors must be on one device, got {devices}")
        return fake(*args)

    torch.library.register_fake(f"vvae_fast::{name}", check_and_fake)
    return operator


def _argument_names(operator: Operator) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


PREFIXES = {"cpp": "", "triton": "triton_", "cuda": "cuda_"}  # of the operators' names, by backend
OPERATORS = {
    backend: Operators(
        *(
            define(prefix + name, schema, fake_gradients if "backward" in name else _fake_outputs)
            for name, schema in _SCHEMAS.items()
        )
    )
    for backend, prefix in PREFIXES.items()
}
planar_forward, planar_backward, planar_backward_packed, planar_inverse, planar_inverse_backward = OPERATORS["cpp"]


def in_python(find_module: Callable[[], ModuleType]) -> Operators:
    """Functions that are called as the operators are, by those of a module: with a FlowSpec for the spec's numbers. The
    module is asked for at each call, so that the first one may import it."""

    def function_of(name: str) -> Operator:
        names = _argument_names(getattr(OPERATORS["cpp"], name))
        first, end = names.index("constraint"), len(names) - 1  # the last is save or params

        def function(*args: Any) -> tuple[Tensor, ...]:
            spec = FlowSpec.of_arguments(*args[first:end])
            return getattr(find_module(), name)(*args[:first], spec, *args[end:])

        return function

    return Operators(*map(function_of, Operators._fields))
