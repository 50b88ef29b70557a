"""The checks of what a VAE and its modules are given: widths, beta and noise; and when data can be checked."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast.nn.outputs import describe
from vvae_fast.shapes import check_size, untraced

OF_SHAPES = re.compile("shape|size|channels|should contain|input to conv")  # in PyTorch's errors for shapes that misfit


@untraced
def check_beta(beta: float) -> None:
    if not hasattr(beta, "__float__"):
        raise TypeError(f"beta must be a number, got {type(beta).__name__}: {beta!r}")
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number from 0 on, got {beta}")


@untraced
def check_noise(noise: Tensor, mean: Tensor, num_samples: int) -> None:
    wanted = mean.shape if num_samples == 1 else (num_samples, *mean.shape)
    if not isinstance(noise, Tensor) or noise.shape != wanted:
        raise ValueError(f"noise must be {tuple(wanted)}, got {describe(noise)}")
    if not noise.is_floating_point():
        raise TypeError(f"noise must be {mean.dtype} like the posterior's mean, got {noise.dtype}")


def run_module(module: nn.Module, name: str, argument: str, t: Tensor) -> Any:
    """module(t), t [B, *]. Raises ValueError, which names module and argument, where its layers refuse t's shape."""
    if torch.compiler.is_compiling():
        return module(t)
    try:
        return module(t)
    except RuntimeError as error:  # only now is there time to look for the reason
        if isinstance(error, torch.OutOfMemoryError) or OF_SHAPES.search(str(error)) is None:
            raise
        raise ValueError(_refused(module, name, argument, t, str(error).split("\n")[0])) from error


def _refused(module: nn.Module, name: str, argument: str, t: Tensor, reason: str) -> str:
    """The words for a tensor whose shape a module's layers refused for a reason."""
    first = next((layer for layer in module.modules() if layer._parameters), None)  # that has parameters of its own
    wanted, came = first.in_features if isinstance(first, nn.Linear) else None, math.prod(t.shape[1:])
    if wanted is not None and wanted not in (came, t.shape[-1]):
        return (
            f"{argument} must have {wanted} numbers a row, as {name}'s first layer takes, got {came}, shape "
            f"{tuple(t.shape)}; pass such rows, or make the {name} for {came}"
        )
    return f"{name} must take {argument} of shape {tuple(t.shape)}, and a layer of it refused: {reason}; correct one"


def first_parameter(module: nn.Module) -> Tensor | None:
    """The first floating one of module.parameters(), or None. `parameters` itself takes five times as long to begin,
    which a call with a small batch shows."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter
    for child in module._modules.values():
        if child is not None and (of_child := first_parameter(child)) is not None:
            return of_child
    return None


def find_feature_dim(encoder: nn.Module, flow: nn.Module | None, feature_dim: int | None) -> int:
    context_dim = getattr(flow, "context_dim", None)
    out_features = getattr(encoder, "out_features", None)
    if feature_dim is None:
        feature_dim = context_dim if context_dim is not None else out_features
    if feature_dim is None:
        raise ValueError(
            "feature_dim is unknown: the encoder has no out_features; pass feature_dim=, its output width, or "
            "feature_dim=0 where it gives (mean, log_var)"
        )
    feature_dim = check_size("feature_dim", feature_dim, 0)
    if feature_dim:
        check_agreement("flow.context_dim", context_dim, "feature_dim", feature_dim)
        check_agreement("encoder.out_features", out_features, "feature_dim", feature_dim)
    return feature_dim


def check_modules(**modules: nn.Module | None) -> None:
    for name, module in modules.items():
        if not isinstance(module, nn.Module) and not (name == "flow" and module is None):
            raise TypeError(f"{name} must be an nn.Module, got {type(module).__name__}")


def check_agreement(name: str, value: int | None, other_name: str, other: int) -> None:
    if value is not None and value != other:
        raise ValueError(f"{name} and {other_name} must agree, got {value} and {other}")


def trains_eagerly(x: Tensor) -> bool:
    """Whether gradients are needed and the numbers of x can be read, which a trace does not allow."""
    return (
        torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not isinstance(x, torch._subclasses.FakeTensor)
        and not x.is_meta
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
