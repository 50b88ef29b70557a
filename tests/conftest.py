"""Fixtures of the whole suite, which runs the Triton kernels on the GPU or, where there is none, interpreted."""

import contextlib
import os
import sys
import tempfile

import pytest
import torch
from torch.distributions import Distribution

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # vvae_fast and Triton read it when they are imported
    with contextlib.suppress(ImportError):  # the tests that need Triton skip and say so
        import interpreter
        import triton

        triton.knobs.runtime.interpret = True
        interpreter.sum_dots_in_order()
        interpreter.patch_once_a_launch()
with contextlib.suppress(ImportError):  # tests/cpu/test_properties*.py skip and say so
    import property_profiles  # noqa: F401

import cuda_host

import vvae_fast
from vvae_fast.backends import cpp, cuda
from vvae_fast.triton import launch

TORCHS_OWN = {name: vars(Distribution)[name] for name in ("_validate_args", "arg_constraints")}
os.environ.pop("TRITON_INTERPRET", None)  # child processes start as a user's would


def positions(item) -> list[int]:
    """Of a case's values, one for each `parametrize` of its test."""
    found = []
    for marker in item.iter_markers("parametrize"):
        names, values = marker.args
        case = item.callspec.params
        value = case[names] if isinstance(names, str) else tuple(case[name] for name in names)
        found.append(list(values).index(value))
    return found


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """The Triton kernels' own tests are tests of the GPU if there is one, and interpreted if not.

    What the marker one_in leaves out of a grid is long. Each value stays in some case. So does each pair of two axes'
    values if a third axis has n values or more.
    """
    for item in items:
        thinned = item.get_closest_marker("one_in")
        if thinned and sum(positions(item)) % thinned.args[0]:
            item.add_marker("long")
        if item.path.name.startswith("test_triton") and torch.cuda.is_available():
            item.add_marker("gpu")


def pytest_configure(config):
    """Processes of pytest-xdist share the cores, and what tests/cuda/cuda_host.py builds."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workerinput["workercount"]))
        os.environ.pop("PYTEST_XDIST_WORKER", None)  # a session of benchmarks in a child process would measure nothing
    else:
        builds = tempfile.TemporaryDirectory(prefix="vvae-fast-tests-")
        os.environ[cuda_host.FOLDER] = builds.name
        config.add_cleanup(builds.cleanup)


def pytest_runtest_setup(item):
    for name, value in TORCHS_OWN.items():  # zuko, where it is imported, switches validation off for the whole process
        setattr(Distribution, name, value)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _nothing_compiled():
    """PyTorch refuses a function's ninth compilation: those of other files in this process do not count."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _fresh_plans():
    """What a test makes of the launches' heuristics neither meets plans made before nor outlives it."""
    launch.forget_plans()
    yield
    launch.forget_plans()


@pytest.fixture
def poisoned():
    """torch.empty holds NaN: an output element that a kernel leaves out cannot pass for a right one."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=cpp.isa_levels())
def isa(request):
    """Each instruction set that this machine has, in turn."""
    previous = cpp.isa()
    cpp.set_isa(request.param)
    yield request.param
    cpp.set_isa(previous)


def _skip_without(backend: str) -> None:
    state = vvae_fast.info()["backends"][backend]
    if not state["available"]:
        pytest.skip(f"no backend {backend}: {'; '.join(state['reasons'])}")


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    """Each backend for GPUs that this machine has, in turn."""
    _skip_without(request.param)
    return request.param


@pytest.fixture
def set_cuda_form():
    """Makes the cuda backend take "direct" or "compact", for one test."""
    _skip_without("cuda")
    yield cuda.set_form
    cuda.set_form("automatic")


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    previous = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(previous)
