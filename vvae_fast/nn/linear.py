"""The linear layer that computes amortized parameters, and its best approximation of low rank.

oneDNN computes large products, where PyTorch uses MKL: on processors that MKL does not know it runs at half speed, and
the head is most of the cost of an amortized flow.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vvae_fast.backends import needs_plain_torch

# Multiply-adds. With fewer oneDNN loses: in a training step even its smallest product takes 0.1 ms, which a loop of
# such products does not show (benchmarks/calls/head_products.py).
_LEAST_WORK = 1 << 24
# Of the inputs' mean variance, docs/math.md (68): so much they are taken to vary in every direction.
_RIDGE = 1e-4


def _find_onednn() -> Any:
    """PyTorch's private function for oneDNN, which its compiler uses; it may be missing."""
    namespace: Any = getattr(torch.ops, "mkldnn", None)
    return namespace._linear_pointwise.default if hasattr(namespace, "_linear_pointwise") else None


_onednn = _find_onednn()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, F] weight^T [F, M] + bias [M]; oneDNN takes only a dense weight or the transpose of one."""
    (rows, columns), (row, column) = weight.shape, weight.stride()
    if not (column == 1 and row >= columns) and not (row == 1 and column >= rows):
        weight = weight.contiguous()
    return _onednn(x.contiguous(), weight, bias, "none", [], "")


class OneDnnLinear(torch.autograd.Function):
    """x [N, F], weight [M, F], bias [M] -> x weight^T + bias [N, M]; `narrow` is the layer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, narrow: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.narrow = narrow
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        plain = nn.functional.linear
        product = plain if torch.is_grad_enabled() else _product  # differentiable for create_graph=True
        weight_product = plain if ctx.narrow else product
        return (
            product(grad, weight.t()) if needs_x else None,
            weight_product(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            None,
        )


# OneDnnLinear.apply without its detour through torch.func, of which `needs_plain_torch` has found none at work.
_apply = super(torch.autograd.Function, OneDnnLinear).apply


class Linear(nn.Linear):
    """nn.Linear with the same parameters, values and gradients, up to rounding."""

    narrow = False  # few inputs: oneDNN's copy of the transposed gradient takes longer than the weight's product

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not _serves(x, weight, bias):
            return nn.functional.linear(x, weight, bias)
        if x.dim() == 2:
            return _apply(x, weight, bias, self.narrow)
        return _apply(x.reshape(-1, x.shape[-1]), weight, bias, self.narrow).view(*x.shape[:-1], weight.shape[0])


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.numel() * weight.shape[0] >= _LEAST_WORK
        and _onednn is not None
        and x.shape[-1:] == weight.shape[1:]
        and bias is not None
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
        and x.device.type == weight.device.type == bias.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and x.layout == weight.layout == torch.strided
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not needs_plain_torch()
    )


class Factors(NamedTuple):
    """down [r, F], up [M, r] and bias [M] of x -> up (down x) + bias."""

    down: Tensor
    up: Tensor
    bias: Tensor


def nearest_of_rank(weight: Tensor, bias: Tensor, x: Tensor, rank: int, scales: Tensor, size: float) -> Factors:
    """The layer of this rank nearest to weight [M, F], bias [M] for inputs like x [N, F], docs/math.md (68), where an
    error of output m counts scales[m] times. What `up` reads has the root mean square `size`. All in float64."""
    mean = x.mean(0)
    covariance = (x - mean).t() @ (x - mean) / len(x)  # [F, F]
    variance = covariance.diagonal().mean()
    ridge = _RIDGE * (variance if variance > 0 else 1.0)
    root = torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean), dtype=x.dtype))
    left, values, right = torch.linalg.svd(scales[:, None] * (weight @ root), full_matrices=False)
    down = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)  # of x, numbers of variance 1
    up = left[:, :rank] * values[:rank] / scales[:, None]
    read = (x @ down.t()).square().mean().sqrt()
    larger = size / read if read > 0 else 1.0
    return Factors(larger * down, up / larger, bias + (weight - up @ down) @ mean)
