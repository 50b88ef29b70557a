"""The operators of flows whose parameters are context weight^T + bias: their schemas and fakes. The C++ backend has
them.

    headed_forward(z, context, weight, bias, *spec, save) -> (z_K, log_det, saved)
    headed_backward(grad_z, grad_log_det, z, context, weight, bias, saved, *spec, params=True)
        -> (dz, dcontext, dweight, dbias)

z [R, D]; context [R, F], weight [K (2 D + 1), F] and bias [K (2 D + 1)], whose rows are those of u, of w and of b, as
in `operators`' packed. saved, when `save`, holds the pre-activations a [K, R], and behind them z [D, R] every few
steps. *spec are `FlowSpec.arguments`. Without `params` all but dz are empty, [0]; dz has the same bits.
"""

from typing import Any, NamedTuple

from torch import Tensor

from vvae_fast import shapes
from vvae_fast.backends.operators import GRADS, PARAMS, SPEC, Operator, define, fake_gradients

_MOST_STEPS, _SPAN_NUMBERS = 8, 512  # of csrc/cpu/headed/args.h's steps_between


class HeadedOperators(NamedTuple):
    """What a backend implements."""

    headed_forward: Operator
    headed_backward: Operator


def _saved_rows(num_steps: int, dim: int) -> int:
    """As csrc/cpu/headed/args.h's saved_rows."""
    between = max(1, min(_SPAN_NUMBERS // dim, _MOST_STEPS))
    return num_steps + max(0, -(-num_steps // between) - 1) * dim


def _fake_outputs(z: Tensor, context: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, dim = z.shape
    saved = (_saved_rows(shapes.num_steps_of(weight, dim), dim), rows) if others[-1] else (0,)
    return z.new_empty(z.shape), z.new_empty((rows,)), z.new_empty(saved)


_TENSORS = "Tensor z, Tensor context, Tensor weight, Tensor bias"
OPERATORS = HeadedOperators(
    define("headed_forward", f"({_TENSORS}, {SPEC}, bool save) -> (Tensor, Tensor, Tensor)", _fake_outputs),
    define(
        "headed_backward",
        f"({GRADS}, {_TENSORS}, Tensor saved, {SPEC}, {PARAMS}) -> (Tensor, Tensor, Tensor, Tensor)",
        fake_gradients,
    ),
)
headed_forward, headed_backward = OPERATORS
