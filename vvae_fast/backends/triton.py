"""The Triton kernels of vvae_fast/triton, which the first call imports, as PyTorch's operators."""

from typing import Any

import torch
from torch import Tensor

from vvae_fast import triton as kernels
from vvae_fast.backends import operators, sylvester
from vvae_fast.backends.base import Backend

TRITON = Backend(
    "triton",
    operators.OPERATORS["triton"],
    kernels.unavailable,
    kernels.unsupported,
    takes_halves=lambda problem: not problem.inverse,
    is_automatic=lambda problem: problem.device_type != "cpu",  # where kernels are interpreted
)

_DEVICES = ("cuda", "cpu") if kernels.interpreted else ("cuda",)
for _operator, _function in zip(TRITON.operators, operators.in_python(kernels.find_planar), strict=True):
    torch.library.impl(_operator.name(), _DEVICES, _function)


def _register_sylvester(name: str, operator: operators.Operator) -> None:
    def function(*args: Any) -> tuple[Tensor, ...]:
        return getattr(kernels.find_sylvester(), name)(*args)

    torch.library.impl(operator.name(), _DEVICES, function)


for _name, _operator in sylvester.OPERATORS["triton"]._asdict().items():
    _register_sylvester(_name, _operator)
