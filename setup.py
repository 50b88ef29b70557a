"""Builds vvae_fast._C and, where there is a CUDA toolkit, vvae_fast._C_cuda against the torch of the environment it is
installed into.

FORCE_CUDA=1 ends a build that cannot have the CUDA kernels; NO_CUDA=1 leaves them out. TORCH_CUDA_ARCH_LIST names the
GPUs that they are compiled for, as it does for all of PyTorch's extensions.
"""

import importlib.machinery
import os
import re
import runpy
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# The oldest stable ABI that the sources use: the binary runs on every torch from 2.11 on.
TORCH_TARGET_VERSION = "0x020b000000000000"
REMEDY = "Run: pip install 'torch>=2.11'"
ARCHITECTURES = "8.0;9.0+PTX"  # later GPUs compile the PTX on first use
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]


class NoCuda(Exception):
    """Why the CUDA kernels cannot be built, and what to do about it."""


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


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def nvcc(argument: str) -> str:
    """What the toolkit's compiler prints."""
    from torch.utils import cpp_extension

    command = [str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")), argument]
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    except OSError as error:
        raise NoCuda(
            f"nvcc does not run ({error})", "repair the CUDA toolkit or set CUDA_HOME to another one"
        ) from error


def find_toolkit() -> str:
    """The version of the CUDA toolkit that the build uses; NoCuda where there is none for this torch."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        raise NoCuda(f"torch {torch.__version__} has no CUDA", "install PyTorch's build for CUDA")
    major = torch.version.cuda.split(".")[0]
    # torch takes the folder above nvcc's, which a script that calls the toolkit's nvcc may be in as well.
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [cpp_extension.CUDA_HOME] if named else [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    for home in map(Path, filter(None, homes)):
        libraries = (file for folder in ("lib64", "lib", "lib/*") for file in home.glob(f"{folder}/libcudart.so"))
        if (home / "bin" / "nvcc").is_file() and any(libraries):
            cpp_extension.CUDA_HOME = str(home)
            break
    else:
        remedy = f"install the toolkit of CUDA {major} and set CUDA_HOME to its folder"
        raise NoCuda("no CUDA toolkit, a folder with bin/nvcc and libcudart.so, was found", remedy)
    version = (re.findall(r"release ([\d.]+)", nvcc("--version")) or ["of unknown version"])[0]
    if version.split(".")[0] != major:
        remedy = f"set CUDA_HOME to the folder of CUDA {major}'s toolkit"
        raise NoCuda(f"nvcc {version} is not of CUDA {torch.version.cuda}, which torch was built with", remedy)
    return version


def architectures() -> str:
    """The GPUs to compile for: the environment's or, since torch by itself would fail where there is no GPU, a default
    and those that are here."""
    import torch

    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named and named != "native":
        check_architectures(named)
        return named
    known = nvcc("--list-gpu-arch").split()
    here = {f"{major}.{minor}" for major, minor in gpus if major >= 8 and f"compute_{major}{minor}" in known}
    return ";".join([ARCHITECTURES, *sorted(here - set(re.findall(r"[\d.]+", ARCHITECTURES)))])


def check_architectures(named: str) -> None:
    """Ends the build where TORCH_CUDA_ARCH_LIST has what torch does not understand, or GPUs without tensor cores for
    float32."""
    from torch.utils import cpp_extension

    os.environ["TORCH_CUDA_ARCH_LIST"] = named
    try:
        understood = bool(cpp_extension._get_cuda_arch_flags())
    except ValueError:
        understood = False
    if not understood or any(int(major) < 8 for major in re.findall(r"(\d+)\.\d", named)):
        sys.exit(
            "vvae_fast: TORCH_CUDA_ARCH_LIST must name compute capabilities from 8.0 on, such as '8.0;9.0+PTX', got "
            f"{named!r}. Change it, unset it, or set NO_CUDA=1 to leave the CUDA kernels out"
        )


def cuda_extension(shared: dict[str, list]) -> tuple[list[Extension], str]:
    """The CUDA kernels' extension where it can be built, and what `vvae-fast info` is to say of it."""
    from torch.utils.cpp_extension import CUDAExtension

    if is_set("FORCE_CUDA") and is_set("NO_CUDA"):
        sys.exit("vvae_fast: FORCE_CUDA and NO_CUDA contradict each other. Unset one of them")
    if is_set("NO_CUDA"):
        return [], "not built: NO_CUDA was set"
    try:
        version, chosen = find_toolkit(), architectures()
    except NoCuda as error:
        reason, remedy = error.args
        if is_set("FORCE_CUDA"):
            sys.exit(f"vvae_fast: FORCE_CUDA was set, but {reason}. Remedy: {remedy}, or unset FORCE_CUDA")
        return [], f"not built: {reason}"
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
    print(f"vvae_fast: CUDA kernels with nvcc {version} for {chosen} (NO_CUDA=1 leaves them out)", file=sys.stderr)
    facts = [("VVAE_FAST_NVCC", f'"{version}"'), ("VVAE_FAST_CUDA_ARCHITECTURES", f'"{chosen}"')]
    extension = CUDAExtension(
        "vvae_fast._C_cuda",
        sorted(str(path) for path in Path("csrc/cuda").iterdir() if path.suffix in (".cpp", ".cu")),
        include_dirs=list(shared["include_dirs"]),
        define_macros=[*shared["define_macros"], ("USE_CUDA", None), *facts],
        depends=shared["depends"],
        extra_compile_args={"cxx": list(FLAGS), "nvcc": list(NVCC_FLAGS)},
    )
    return [extension], "built"


def extension_arguments() -> dict[str, object]:
    """What setup() needs to build the extensions."""
    find_torch()

    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        sys.exit(f"vvae_fast: building needs torch 2.11 or newer, got {torch.__version__}. {REMEDY}")
    version = runpy.run_path(str(Path(__file__).parent / "vvae_fast" / "_version.py"))["__version__"]
    shared = {
        "include_dirs": [pybind11.get_include()],
        "define_macros": [
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("VVAE_FAST_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        "depends": sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh")),
    }
    cuda, cuda_build = cuda_extension(shared)
    facts = [("VVAE_FAST_VERSION", f'"{version}"'), ("VVAE_FAST_CUDA_BUILD", f'"{cuda_build}"')]
    extension = CppExtension(
        "vvae_fast._C",
        ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        include_dirs=list(shared["include_dirs"]),
        define_macros=[*shared["define_macros"], *facts],
        depends=shared["depends"],
        extra_compile_args=list(FLAGS),
    )
    return {"ext_modules": [extension, *cuda], "cmdclass": {"build_ext": BuildExtension}}


# A source archive is made of files alone; whatever builds a wheel asks for its metadata ("dist_info") first.
only_archive = bool({"sdist", "egg_info"} & set(sys.argv))
setup(**({} if only_archive else extension_arguments()))
