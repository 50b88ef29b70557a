"""The torch to build against: that of the environment installed into, which isolated builds hide, not another."""

import importlib.machinery
import importlib.util
import os
import shutil
import site
import sys
import warnings
from pathlib import Path

from build_tools.environment import ROOT, install_tools, installer, numbers, stop

OLDEST = (2, 11)


def remedy() -> str:
    return f"{installer()} 'torch>={'.'.join(map(str, OLDEST))}'"


def front_end() -> str | None:
    """Which program runs the build: "pip", "uv", "build" (or another with pyproject_hooks), None where none does."""
    if "PIP_BUILD_TRACKER" in os.environ:
        return "pip"
    if Path(sys.argv[0]).name == "_in_process.py":
        return "build"
    return "uv" if "UV" in os.environ and sys.argv[0] == "-c" else None


def own_folders() -> list[str]:
    """Where this interpreter's packages are, the isolation of pip undone."""
    folders = site.getsitepackages([sys.prefix, sys.exec_prefix])
    settings = Path(sys.prefix, "pyvenv.cfg")
    sees_system = "include-system-site-packages = true" in (settings.read_text() if settings.is_file() else "")
    if sees_system:
        folders += site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])
    return [*folders, site.getusersitepackages()] if sees_system or not settings.is_file() else folders


def callers_prefixes() -> list[Path]:
    """The environments that the program which runs the build was told of, its own last: /env or /env/bin/python."""
    process = Path("/proc", str(os.getppid()))
    try:
        program, *arguments = map(os.fsdecode, (process / "cmdline").read_bytes().split(b"\0"))
        variables = map(os.fsdecode, (process / "environ").read_bytes().split(b"\0"))
        folder = (process / "cwd").readlink()
    except OSError:  # no /proc, or another user's process
        return []
    environment = dict(entry.split("=", 1) for entry in variables if "=" in entry)
    values = [argument.rpartition("=")[2] for argument in arguments]  # --python /env, --python=/env/bin/python
    values += [environment.get(name, "") for name in ("UV_PYTHON", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")]
    paths = [folder / value for value in (*values, program) if "/" in value]
    return [prefix for path in paths for prefix in (path, path.parent.parent)]


def other_prefixes() -> list[Path]:
    """The environments that may be meant where the build runs in one of its own, as those of uv and build do: what the
    caller was told of, the active one, uv's default, and the interpreter that all of them are made of."""
    own = Path(sys.prefix, "bin")
    path = os.pathsep.join(part for part in os.environ.get("PATH", "").split(os.pathsep) if Path(part) != own)
    on_path = shutil.which("python3", path=path) or shutil.which("python", path=path)
    active = [Path(on_path).parent.parent] if on_path else []
    is_environment = any((prefix / mark).exists() for prefix in active for mark in ("pyvenv.cfg", "conda-meta"))
    ordered = [*active, ROOT / ".venv"] if is_environment else [ROOT / ".venv", *active]
    return [*callers_prefixes(), *ordered, Path(sys.base_prefix)]


def has_torch(folders: list[str]) -> bool:
    spec = importlib.machinery.PathFinder.find_spec("torch", folders)
    return spec is not None and spec.origin is not None  # an uninstalled torch may leave a folder behind


def candidates() -> list[list[str]]:
    """The package folders of each environment whose torch may be meant, this one's first."""
    # pip's builds run in the environment that is installed into, and a build by hand in its own.
    others = other_prefixes() if front_end() in ("uv", "build") else []
    return [own_folders(), *(site.getsitepackages([str(prefix)]) for prefix in dict.fromkeys(others))]


def find_torch() -> None:
    """Makes torch importable and checks it; ends the build where it is missing, broken or too old."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        environments = candidates()
        folders = next(filter(has_torch, environments), None)
        if folders is None:
            stop_without_torch([folder for folders in environments for folder in folders if Path(folder).is_dir()])
        sys.path.extend(folders)
        sys.modules.pop("torch", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where there is no numpy, say, which the build has no use for
            import torch
    except Exception as error:  # a broken installation raises anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        stop(f"the torch that is installed does not import ({reason}). Repair it: {remedy()} --force-reinstall")
    if numbers(torch.__version__) < OLDEST:
        stop(f"building needs torch {'.'.join(map(str, OLDEST))} or newer, got {torch.__version__}. Run: {remedy()}")


def stop_without_torch(searched: list[str]) -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stop(
        f"building needs PyTorch first, and there is none for Python {version} in"
        f" {', '.join(dict.fromkeys(searched))}. Where it is not installed: {remedy()}. Where it is in another folder,"
        f" the build's isolation hides it: activate its environment, or run there {install_tools()} and then"
        " pip install --no-build-isolation ., uv pip install --no-build-isolation . or"
        " python -m build --wheel --no-isolation"
    )
