"""Builds vvae_fast._C, vvae_fast._C_node and, where there is a CUDA toolkit, vvae_fast._C_cuda against the torch of the
environment it is installed into. Where _C_node does not compile, the rest is installed without it.

FORCE_CUDA=1 ends a build that cannot have the CUDA kernels; NO_CUDA=1 leaves them out. TORCH_CUDA_ARCH_LIST names the
GPUs that they are compiled for, as it does for all of PyTorch's extensions. The checks before are in build_tools/.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import BaseError

sys.path.insert(0, str(Path(__file__).parent))  # a front end that calls the backend does not put it there

from build_tools import compiler, cuda, environment, torch_here

# The oldest stable ABI that the sources use: the binary runs on every torch from 2.11 on.
TORCH_TARGET_VERSION = "0x020b000000000000"
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
]
COMPILE_ERRORS = (RuntimeError, OSError, BaseError)  # of torch's build_ext and of setuptools'
DURATIONS = (
    "compiling the CPU kernels, about three and a half minutes of processor time",
    "compiling the CPU and the CUDA kernels, about seven minutes of processor time (NO_CUDA=1 saves most of it)",
)
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]


def text_macro(name: str, text: str) -> tuple[str, str]:
    """A macro with a text for C++, which ninja, the shell and the compiler each read on its way."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in " .,:;+-_()/") else octal(c) for c in text)
    return name, f'"{plain}"'


def octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def debug_flags() -> list[str]:
    """Against Python's own -g, with which _C is seven times as large; none where CFLAGS itself asks for one."""
    return [] if any(word.startswith("-g") for word in compiler.words("CFLAGS")) else ["-g0"]


def build_command() -> type:
    """torch's build_ext, which ends in a traceback where a compiler fails, with a last line instead."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except COMPILE_ERRORS as error:
                if not extension.optional:
                    raise
                environment.say(
                    f"going on without {extension.name}, which did not compile ({error}): small flows are slower"
                )

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except COMPILE_ERRORS as error:
                environment.stop(
                    f"compiling failed ({error}) with CXX={os.environ['CXX']!r}. The compiler's first error is above,"
                    " after the first FAILED; where it was killed, memory ran out: set MAX_JOBS=1"
                )

    return Build


def extension_arguments() -> dict[str, object]:
    """What setup() needs to build the extensions."""
    environment.check_tools("pybind11")
    environment.check_ninja()
    environment.check_jobs()
    torch_here.find_torch()
    compiler.check_compiler()
    cuda_build, nvcc, architectures = cuda.plan()

    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    environment.say(f"building against torch {torch.__version__} of {Path(torch.__file__).parent.parent}")
    version = runpy.run_path(str(environment.ROOT / "vvae_fast" / "_version.py"))["__version__"]
    flags = [*FLAGS, *debug_flags()]
    environment.say(DURATIONS[cuda_build == "built"])
    shared = {
        "include_dirs": [pybind11.get_include()],
        "define_macros": [
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            text_macro("VVAE_FAST_TORCH_VERSION", torch.__version__),
        ],
        "depends": sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh")),
    }
    facts = [text_macro("VVAE_FAST_VERSION", version), text_macro("VVAE_FAST_CUDA_BUILD", cuda_build)]
    extensions = [
        CppExtension(
            "vvae_fast._C",
            sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            include_dirs=list(shared["include_dirs"]),
            define_macros=[*shared["define_macros"], *facts],
            depends=shared["depends"],
            extra_compile_args=list(flags),
        ),
        CppExtension(
            "vvae_fast._C_node",
            ["csrc/autograd/node.cpp"],
            include_dirs=list(shared["include_dirs"]),
            define_macros=[text_macro("VVAE_FAST_TORCH_VERSION", torch.__version__)],
            extra_compile_args=["-O2", *debug_flags(), "-fvisibility=hidden"],
            optional=True,
        ),
    ]
    if cuda_build == "built":
        facts = [text_macro("VVAE_FAST_NVCC", nvcc), text_macro("VVAE_FAST_CUDA_ARCHITECTURES", architectures)]
        extensions.append(
            CUDAExtension(
                "vvae_fast._C_cuda",
                sorted(str(path) for path in Path("csrc/cuda").rglob("*") if path.suffix in (".cpp", ".cu")),
                include_dirs=list(shared["include_dirs"]),
                define_macros=[*shared["define_macros"], ("USE_CUDA", None), *facts],
                depends=shared["depends"],
                extra_compile_args={"cxx": list(flags), "nvcc": list(NVCC_FLAGS)},
            )
        )
    return {"ext_modules": extensions, "cmdclass": {"build_ext": build_command()}}


environment.check_tools("setuptools")
environment.check_folder()
environment.wait_for_turn()
# A source archive is made of files alone; whatever builds a wheel asks for its metadata ("dist_info") first.
only_archive = bool({"sdist", "egg_info"} & set(sys.argv))
setup(**({} if only_archive else extension_arguments()))
