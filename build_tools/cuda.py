"""Whether the CUDA kernels can be built, with which toolkit and for which GPUs."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from build_tools.compiler import first_error
from build_tools.environment import is_set, run_program, say, stop

ARCHITECTURES = "8.0;9.0+PTX"  # later GPUs compile the PTX on first use
OLDEST = 80  # float32 tensor cores and asynchronous copies


class NoCuda(Exception):
    """Why the CUDA kernels cannot be built, and what to do about it."""


def nvcc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run of the toolkit's compiler; NoCuda where it does not start."""
    from torch.utils import cpp_extension

    command = [str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")), *arguments]
    try:
        return run_program(command)
    except OSError as error:
        remedy = "repair the CUDA toolkit or set CUDA_HOME to another one"
        raise NoCuda(f"nvcc does not run ({error})", remedy) from error


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
        where = f" in CUDA_HOME ({named})" if named else ""
        raise NoCuda(f"no CUDA toolkit, a folder with bin/nvcc and libcudart.so, was found{where}", remedy)
    version = (re.findall(r"release ([\d.]+)", nvcc("--version").stdout) or ["of unknown version"])[0]
    if version.split(".")[0] != major:
        remedy = f"set CUDA_HOME to the folder of CUDA {major}'s toolkit"
        raise NoCuda(f"nvcc {version} is not of CUDA {torch.version.cuda}, which torch was built with", remedy)
    check_host_compiler(version)
    return version


def check_host_compiler(version: str) -> None:
    """NoCuda where nvcc does not compile an empty file: it refuses C++ compilers newer than itself, for one."""
    host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    with tempfile.TemporaryDirectory(prefix="vvae_fast-") as folder:
        source = Path(folder, "trial.cu")
        source.touch()
        done = nvcc(*host, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o")))
    if done.returncode:
        remedy = "set CC to a C++ compiler that this nvcc takes"
        raise NoCuda(f"nvcc {version} does not compile an empty file ({first_error(done.stdout)})", remedy)


def architectures() -> str:
    """The GPUs to compile for: the environment's or, since torch by itself would fail where there is no GPU, a default
    and those that are here."""
    import torch

    known = set(nvcc("--list-gpu-arch").stdout.split())
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named and named != "native":
        return named_architectures(named, known)
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    here = {f"{major}.{minor}" for major, minor in gpus if major >= 8 and f"compute_{major}{minor}" in known}
    return ";".join([ARCHITECTURES, *sorted(here - set(re.findall(r"[\d.]+", ARCHITECTURES)))])


def capabilities(item: str) -> list[int]:
    """The compute capabilities, 90 for 9.0, that torch understands by a part of TORCH_CUDA_ARCH_LIST; none where it
    does not understand it."""
    from torch.utils import cpp_extension

    os.environ["TORCH_CUDA_ARCH_LIST"] = item
    try:
        flags = cpp_extension._get_cuda_arch_flags() if item not in ("", "native") else []
    except ValueError:
        return []
    return sorted({int(number) for flag in flags for number in re.findall(r"arch=compute_(\d+)", flag)})


def named_architectures(named: str, known: set[str]) -> str:
    """What TORCH_CUDA_ARCH_LIST names, less GPUs that are too old; ends the build where torch or nvcc does not
    understand it, or nothing is left."""
    items = re.split("[ ;]", named)
    understood = {item: capabilities(item) for item in items}
    kept = [item for item in items if understood[item] and understood[item][0] >= OLDEST]
    if not kept or not all(understood.values()):
        stop(
            "TORCH_CUDA_ARCH_LIST must name compute capabilities from 8.0 on, such as '8.0;9.0+PTX', got "
            f"{named!r}. Change it, unset it, or set NO_CUDA=1 to leave the CUDA kernels out"
        )
    foreign = [item for item in kept if any(f"compute_{number}" not in known for number in understood[item])]
    if foreign:
        stop(
            f"TORCH_CUDA_ARCH_LIST names {', '.join(foreign)}, which this nvcc does not know; it knows "
            f"{', '.join(sorted(known))}. Leave it out, or set CUDA_HOME to a newer toolkit"
        )
    if len(kept) == len(items):
        return named
    left_out = [item for item in items if item not in kept]
    say(f"TORCH_CUDA_ARCH_LIST: {', '.join(left_out)} left out, the CUDA kernels need compute capability 8.0 or newer")
    return ";".join(kept)


def plan() -> tuple[str, str, str]:
    """What `vvae-fast info` is to say of the CUDA kernels ("built" where they are to be), nvcc's version, the GPUs."""
    if is_set("FORCE_CUDA") and is_set("NO_CUDA"):
        stop("FORCE_CUDA and NO_CUDA contradict each other. Unset one of them")
    if is_set("NO_CUDA"):
        return "not built: NO_CUDA was set", "", ""
    try:
        version, chosen = find_toolkit(), architectures()
    except NoCuda as error:
        reason, remedy = error.args
        if is_set("FORCE_CUDA"):
            stop(f"FORCE_CUDA was set, but {reason}. Remedy: {remedy}, or unset FORCE_CUDA")
        say(f"CUDA kernels not built: {reason}")
        return f"not built: {reason}", "", ""
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
    say(f"CUDA kernels with nvcc {version} for {chosen} (NO_CUDA=1 leaves them out)")
    return "built", version, chosen
