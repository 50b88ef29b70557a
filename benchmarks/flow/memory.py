"""Bytes that a contestant saves for its backward, and peak bytes of a forward and backward.

Saved: the storages that reach autograd's saved-tensor hooks in the forward, each counted once, with and without those
of the leaves, which the caller holds anyway. Peak: on a GPU, the highest allocation minus the one before the call. On a
CPU, the same for the process's resident set (VmHWM), in a forked child whose first call of this size it is. That also
counts scratch memory that PyTorch's allocators do not see. It works on Linux only, to about 0.3 MB.
"""

import atexit
import ctypes
import functools
import multiprocessing
import os
import re
import sys
from pathlib import Path

import torch

from benchmarks.flow.cases import Case
from benchmarks.flow.contestants import Contestant, Prepared
from benchmarks.flow.measure import Stage, failures_refused

_SMALL = {"rows": 64, "dim": 8, "num_steps": 2}  # loads code and starts threads before anything is counted
CPU_METHOD = "growth of the resident set's high-water mark in a forked child"
GPU_METHOD = "torch.cuda.max_memory_allocated"


def saved_bytes(prepared: Prepared) -> tuple[int, int]:
    """Bytes saved for the backward: of all storages, and without those of the leaves."""
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = prepared.forward()  # kept alive, since the address of a freed storage may be reused
    del outputs
    leaves = {t.untyped_storage().data_ptr() for t in prepared.leaves}
    return sum(storages.values()), sum(size for at, size in storages.items() if at not in leaves)


def peak_bytes(stage: Stage, contestant: Contestant) -> int | None:
    """Peak bytes of a forward and backward, above the inputs; None if they cannot be measured."""
    if stage.device.type == "cuda":
        return _cuda_peak(stage, stage.prepared(contestant))
    if not Path("/proc/self/clear_refs").exists():
        return None
    return _pool().apply(_resident_peak, (stage.case, contestant, torch.get_num_threads()))


def _cuda_peak(stage: Stage, prepared: Prepared) -> int:
    torch.cuda.synchronize(stage.device)
    before = torch.cuda.memory_allocated(stage.device)
    torch.cuda.reset_peak_memory_stats(stage.device)
    stage.answer(prepared)
    torch.cuda.synchronize(stage.device)
    return torch.cuda.max_memory_allocated(stage.device) - before


@functools.cache
def _pool():
    """One child for each task, forked from a process that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["benchmarks.flow.memory", "normflows.flows", "pyro.distributions.transforms", "pythae.models"]
    )
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server preloads modules before it gets our sys.path
    try:
        pool = context.Pool(1, maxtasksperchild=1)
    finally:
        del os.environ["PYTHONPATH"]
        if kept is not None:
            os.environ["PYTHONPATH"] = kept
    atexit.register(pool.terminate)
    return pool


def _resident_peak(case: Case, contestant: Contestant, threads: int) -> int:
    torch.set_num_threads(threads)
    with failures_refused():
        small = Stage(Case(**_SMALL, amortized=case.amortized, dtype=case.dtype), torch.device("cpu"))
        small.answer(contestant.build([t.requires_grad_() for t in small.inputs]))
        stage = Stage(case, torch.device("cpu"))
        prepared = contestant.build([t.requires_grad_() for t in stage.inputs])
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # freed memory is not counted
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        stage.answer(prepared)
        return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
