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
    if importlib.machinery.PathFinder.find_spec("torch") is not None:
        return
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.is_file() and "include-system-site-packages = true" in settings.read_text():
        folders.append(sysconfig.get_path("purelib", vars={"base": sys.base_prefix, "platbase": sys.base_prefix}))
    for folder in folders:
        if importlib.machinery.PathFinder.find_spec("torch", [folder]) is not None:
            sys.path.append(folder)
            return
    sys.exit(f"vvae_fast: building needs PyTorch in this environment first. {REMEDY} (or give --no-build-isolation)")


def extension_arguments() -> dict[str, object]:
    """What setup() needs to build the extension."""
    find_torch()

    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        sys.exit(f"vvae_fast: building needs torch 2.11 or newer, got {torch.__version__}. {REMEDY}")
    version = runpy.run_path(str(Path(__file__).parent / "vvae_fast" / "_version.py"))["__version__"]
    extension = CppExtension(
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
            "-fwrapv",
            "-ffp-contract=fast",
            "-fvisibility=hidden",
        ],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


# A source archive is made of files alone; whatever builds a wheel asks for its metadata ("dist_info") first.
only_archive = bool({"sdist", "egg_info"} & set(sys.argv))
setup(**({} if only_archive else extension_arguments()))
