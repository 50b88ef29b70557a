"""Guards around the memory of every tensor that is made inside a `with guarded()`, checked when the tensor is gone."""

import contextlib
import ctypes
import functools
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("guard_allocator.cpp")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Lasts as long as the process."""
    return tempfile.TemporaryDirectory(prefix="guards-")


@functools.cache
def _library() -> ctypes.CDLL:
    """Built once in a session; skips the test where there is no compiler."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    out = Path(_folder().name, "guards.so")
    include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror"]
    command = ["g++", *flags, *include, SOURCE, *libraries, "-lc10", "-o", out]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[:4000]
    library = ctypes.CDLL(str(out))
    for name in ("count_blocks", "count_broken"):
        getattr(library, name).restype = ctypes.c_long
    return library


def count_blocks() -> int:
    """Blocks that PyTorch was handed so far."""
    return _library().count_blocks()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """AssertionError where a guard was broken of a tensor that was made inside and is gone at the end."""
    library = _library()
    before = library.count_broken()
    library.install()
    try:
        yield
    finally:
        library.uninstall()
    gc.collect(0)
    broken = library.count_broken() - before
    assert broken == 0, f"memory around {broken} tensors was written to"


def write_past(t: torch.Tensor, elements: int) -> None:
    """A fault on purpose: a zero so many elements behind the tensor's start, or before it."""
    ctypes.memset(t.data_ptr() + elements * t.element_size(), 0, t.element_size())
