"""The linear layer behind amortized parameters: large products go to oneDNN where PyTorch would ask another library.

On processors that MKL does not know it runs at half their speed, and the head is most of what an amortized flow costs.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_LEAST_WORK = 1 << 22  # multiply-adds; a call of oneDNN costs about 15 us by itself


def _find_onednn():
    """PyTorch's own entry to oneDNN, which its compiler uses; private, so asked for by name."""
    namespace = getattr(torch.ops, "mkldnn", None)
    return namespace._linear_pointwise.default if hasattr(namespace, "_linear_pointwise") else None


_onednn = _find_onednn()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [N, F] weight^T [F, M] + bias [M]."""
    return _onednn(x, weight, bias, "none", [], "")


class OneDnnLinear(torch.autograd.Function):
    """x [*batch, F], weight [M, F], bias [M] -> x weight^T + bias [*batch, M]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.detach(), weight.detach(), bias.detach())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        product = nn.functional.linear if torch.is_grad_enabled() else _product  # differentiable for create_graph=True
        rows, of_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (
            product(grad, weight.t()) if needs_x else None,
            product(of_rows.t(), rows.t()) if needs_weight else None,
            of_rows.sum(0) if needs_bias else None,
        )


class Linear(nn.Linear):
    """nn.Linear with the same parameters, values and gradients, up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None and _serves(x, self.weight):
            return OneDnnLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


def _serves(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and _onednn is not None
        and x.numel() * weight.shape[0] >= _LEAST_WORK
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )
