"""Prebuilt extensions, and a record of what they were built with, so that a machine with a GPU spends no time on
compiling. Without a GPU, with nvcc and PyTorch for CUDA,

    python -m benchmarks.gpu.prebuilt [--architectures 9.0]

builds them all, strips them and writes the record; `make gpu` uses them if the whole record fits.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.gpu.gpu_steps import ROOT

NAMES = ("_C", "_C_node", "_C_cuda")
RECORD = "_built.json"  # in the package's folder, like the extensions
SOURCES = ("csrc", "build_tools", "setup.py", "vvae_fast/_version.py")  # the extensions are made from these
BUILD = (sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force")  # even if nothing is newer


def extensions(root: Path = ROOT) -> list[Path]:
    """The paths of setup.py's extensions for this Python, whether they exist or not."""
    return [root / "vvae_fast" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in NAMES]


def digest(paths: list[Path], root: Path = ROOT) -> str:
    """A checksum of the names and contents of files, and of all files in folders."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    found = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts):
        data = file.read_bytes()
        found.update(f"{file.relative_to(root).as_posix()} {len(data)} ".encode() + data)
    return found.hexdigest()


def here(root: Path = ROOT) -> dict[str, str]:
    """The facts that must be the same where the extensions are built and where they are used."""
    import torch

    sources = digest([root / name for name in SOURCES], root)
    return {"Python": sysconfig.get_config_var("SOABI"), "torch": torch.__version__, "sources": sources}


def write(architectures: str, root: Path = ROOT) -> None:
    """Writes the record of the present extensions; without a complete set it removes the record."""
    record = root / "vvae_fast" / RECORD
    record.unlink(missing_ok=True)
    if all(path.exists() for path in extensions(root)):
        built = here(root) | {"architectures": architectures, "extensions": digest(extensions(root), root)}
        record.write_text(json.dumps(built, indent=1) + "\n")


def misfit(architecture: str, root: Path = ROOT) -> str | None:
    """Why the present extensions do not fit a GPU of this architecture, such as "9.0"; None if they fit."""
    record = root / "vvae_fast" / RECORD
    if not record.exists():
        return f"there is no vvae_fast/{RECORD}"
    try:
        built = json.loads(record.read_text())
    except ValueError:
        return f"vvae_fast/{RECORD} is no JSON"
    if not isinstance(built, dict) or not all(isinstance(value, str) for value in built.values()):
        return f"vvae_fast/{RECORD} is no record of a build"
    for path in extensions(root):
        if not path.exists():
            return f"{path.name} is missing"
    for name, value in here(root).items():
        if built.get(name) != value:
            difference = "they have changed" if name == "sources" else f"{built.get(name)}, here {value}"
            return f"other {name}: {difference}"
    known = built.get("architectures", "").replace("+PTX", "").split(";")
    if architecture not in known:
        return f"other architectures: {';'.join(known)}, here {architecture}"
    if built.get("extensions") != digest(extensions(root), root):
        return "the extensions are not those of the record"
    return None


def strip(paths: list[Path]) -> str:
    """Removes unused symbols; the note says how many bytes that saved."""
    program = shutil.which("strip")
    if program is None:
        return "not stripped: there is no strip"
    before = sum(path.stat().st_size for path in paths)
    subprocess.run([program, "--strip-unneeded", *paths], check=True)
    return f"stripped, {before / 1e6:.0f} to {sum(path.stat().st_size for path in paths) / 1e6:.0f} MB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default="9.0", help="as in TORCH_CUDA_ARCH_LIST, 9.0 by default")
    options = parser.parse_args(arguments)
    (ROOT / "vvae_fast" / RECORD).unlink(missing_ok=True)
    environment = os.environ | {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": options.architectures}
    if status := subprocess.run(BUILD, cwd=ROOT, env=environment).returncode:
        return status
    if missing := [path.name for path in extensions() if not path.exists()]:
        print(f"not built, see above: {', '.join(missing)}", flush=True)
        return 1
    note = strip(extensions())
    write(options.architectures)
    print(f"prebuilt for {options.architectures}: {note}; vvae_fast/{RECORD} says for what", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
