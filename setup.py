"""Builds vvae_fast._C against the torch of the environment it is installed into."""

import importlib.machinery
import runpy
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# The oldest stable ABI that the sources use: the binary runs on every torch from 2.11 on.
TORCH_TARGET_VERSION = "0x020b000000000000"


REMEDY = "Run: pip install 'torch>=2.11'"


def find_torch() -> None:
    """Makes the target environment's torch importable inside pip's isolated build, which must not download another."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    if importlib.machinery.PathFinder.find_spec("torch") is not None:
        return
    for folder in folders:
        if importlib.machinery.PathFinder.find_spec("torch", [folder]) is not None:
            sys.path.append(folder)
            return
    sys.exit(f"vvae_fast: building needs PyTorch in this environment first. {REMEDY}")


find_torch()

import pybind11  # noqa: E402
import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(f"vvae_fast: building needs torch 2.11 or newer, got {torch.__version__}. {REMEDY}")

version = runpy.run_path(str(Path(__file__).parent / "vvae_fast" / "_version.py"))["__version__"]

setup(
    ext_modules=[
        CppExtension(
            "vvae_fast._C",
            ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
            include_dirs=[pybind11.get_include()],
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
                ("VVAE_FAST_VERSION", f'"{version}"'),
                ("VVAE_FAST_TORCH_VERSION", f'"{torch.__version__}"'),
            ],
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            extra_compile_args=[
                "-O3",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
                "-fvisibility=hidden",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
