"""Launches the Triton kernels on a driver that compiles for sm_90 and runs nothing; prints how often each was compiled.

A process of its own: where Triton interprets, nothing is compiled. Used by test_compiled_kernels.py.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, not what is installed

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import planar
from vvae_fast.triton.sylvester import operators as sylvester


class Launcher:
    """Takes a kernel's arguments and drops them."""

    def __init__(self, source, metadata) -> None:
        self.launch = lambda *args: None
        self.global_scratch_size = self.profile_scratch_size = 0

    def __call__(self, *args) -> None:
        pass


def fake_driver() -> SimpleNamespace:
    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
    utils = SimpleNamespace(
        load_binary=lambda *args: (1, 2, 32, 0, 1024),
        unload_module=lambda *args: None,
        get_device_properties=lambda device: properties,
    )
    return SimpleNamespace(
        utils=utils,
        launcher_cls=Launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )


def forward_and_backward(rows: int, dim: int, num_steps: int, amortized: bool, inverse: bool = False) -> None:
    sets = (rows,) if amortized else ()
    z, u, b = torch.zeros(rows, dim), torch.zeros(*sets, num_steps, dim), torch.zeros(*sets, num_steps)
    there, back = planar.planar_forward, planar.planar_backward
    if inverse:
        there, back = planar.planar_inverse, planar.planar_inverse_backward
    for slope in (0.1, 0.2):  # tanh has none
        formulas = FlowSpec(slope=slope)
        z_K, log_det, a = there(z, u, u, b, formulas, True)
        back(z_K, log_det, z, u, u, b, a, formulas)


def sylvester_forward_and_backward(rows: int, dim: int, layers: int, amortized: bool, inverse: bool = False) -> None:
    """Of layers of dim / 2 units."""
    sets, units = rows if amortized else 1, dim // 2
    square, vector = torch.zeros(sets, layers, units, units), torch.zeros(sets, layers, units)
    params = torch.zeros(sets, layers, units, dim), square, square, vector, vector, vector, vector
    there, back = sylvester.sylvester_forward, sylvester.sylvester_backward
    if inverse:
        there, back = sylvester.sylvester_inverse, sylvester.sylvester_inverse_backward
    z = torch.zeros(rows, dim)
    z_out, log_det, saved = there(z, *params, 0, 0.2, True)
    back(z_out, log_det, z, *params, saved, 0, 0.2)


def main(problems: list) -> None:
    driver.set_active(fake_driver())
    for problem in problems:
        if problem[0] == "sylvester":
            sylvester_forward_and_backward(*problem[1:])
        else:
            forward_and_backward(*problem)
    counts = Counter()
    for name, module in sys.modules.items():
        if name.startswith("vvae_fast.triton."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction) and kernel.__module__ == name:
                    counts[kernel.__name__] += sum(len(cache[0]) for cache in kernel.device_caches.values())
    print(json.dumps({name: count for name, count in counts.items() if count}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
