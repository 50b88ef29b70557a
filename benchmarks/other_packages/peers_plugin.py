"""A plugin of pytest that replaces a peer's classes by this package's, and writes the outcome of each test.

peers_tests.py starts pytest with it. PEERS_TESTS holds, as JSON, the peer, the folder from which its tests import each
other, and the file for the outcomes.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

SETTINGS = json.loads(os.environ["PEERS_TESTS"])
OUTCOMES: dict[str, dict[str, str]] = {}


def replace(package: str, theirs: object, ours: object) -> None:
    """Replaces one of the package's classes by ours, under every name in the package's loaded modules."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package and isinstance(module, ModuleType):
            for attribute in [a for a, value in vars(module).items() if value is theirs]:
                setattr(module, attribute, ours)


def normflows() -> None:
    import normflows

    from vvae_fast.interop.normflows import Planar

    replace("normflows", normflows.flows.Planar, Planar)


def pyro() -> None:
    import pyro.distributions.transforms as theirs

    from vvae_fast.interop import pyro as ours

    for name in ("Planar", "Householder", "Sylvester"):
        for each in (name, f"Conditional{name}", f"Conditioned{name}", name.lower(), f"conditional_{name.lower()}"):
            if hasattr(theirs, each) and hasattr(ours, each):
                replace("pyro", getattr(theirs, each), getattr(ours, each))


def pythae() -> None:
    """Replaces the layer, and VAE_LinNF by one that is fused when it is made."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE_LinNF
    from pythae.models.normalizing_flows import PlanarFlow as theirs

    from vvae_fast.interop.pythae import PlanarFlow, from_pythae

    replace("pythae", theirs, PlanarFlow)
    torch.serialization.add_safe_globals([BaseDataset])  # the class of the tests' own data
    make = VAE_LinNF.__init__

    def fused(self: nn.Module, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)
        if len(self.net):
            from_pythae(self)

    VAE_LinNF.__init__ = fused


def pytorch() -> None:
    """Adds `planar_transforms` to the file's lists, since there is no class to replace; fakes a missing helper."""
    stand_in = ModuleType("torch.testing._internal.common_utils")
    stand_in.run_tests = lambda: None  # only `python test_transforms.py` calls it; the real module needs expecttest
    sys.modules[stand_in.__name__] = stand_in


def planar_transforms(cache_size: int) -> list[torch.distributions.Transform]:
    """For the file's data, 3 points of 6 numbers: every activation and constraint, shared and amortized parameters."""
    from vvae_fast.distributions import PlanarTransform

    generator = torch.Generator().manual_seed(0)
    transforms = []
    for activation, constraint, params in (
        ("tanh", "softplus", ()),
        ("tanh", "softplus", (3,)),
        ("leaky_relu", "log_softplus", ()),
        ("elu", "softplus", (3,)),
        ("sigmoid", "log_softplus", (3,)),
        ("linear", "softplus", ()),
        ("tanh", "none", ()),
    ):
        shapes = (*params, 4, 6), (*params, 4, 6), (*params, 4)
        u, w, b = (0.5 * torch.randn(shape, generator=generator) for shape in shapes)
        options = {"activation": activation, "constraint": constraint, "cache_size": cache_size}
        transforms.append(PlanarTransform(u, w, b, **options))
    return transforms + [transform.inv for transform in transforms]


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    module = yield
    if SETTINGS["peer"] == "pytorch":
        file = module.obj
        active, inactive = planar_transforms(1), planar_transforms(0)
        file.TRANSFORMS_CACHE_ACTIVE += active  # parametrize holds these lists themselves
        file.TRANSFORMS_CACHE_INACTIVE += inactive
        file.ALL_TRANSFORMS += active + inactive
    return module


def pytest_configure() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        globals()[SETTINGS["peer"]]()
    sys.path.append(SETTINGS["root"])  # after the installed peer, since the folder may hold a copy of it


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        OUTCOMES[report.nodeid] = {"outcome": "failed", "message": str(report.longrepr).strip().splitlines()[-1]}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test failed if its setup, its teardown or a subtest did."""
    known = OUTCOMES.setdefault(report.nodeid, {"outcome": "passed", "message": ""})
    if report.failed and known["outcome"] != "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr)
        known.update(outcome="failed", message=message.strip().splitlines()[0])
    elif report.skipped:
        known.update(outcome="skipped", message=str(report.longrepr[-1] if report.longrepr else ""))


def pytest_sessionfinish() -> None:
    Path(SETTINGS["outcomes"]).write_text(json.dumps(OUTCOMES))
