"""The public surface is what public_surface.txt says: names, signatures, defaults, state_dicts, pickles, options,
operators and messages. A change of it is a decision: users' programs, scripts and files depend on each line.

This command makes the list anew, from the root of the repository:

    PYTHONPATH=. python tests/house/test_public_surface.py > tests/house/public_surface.txt
"""

import argparse
import ast
import importlib
import inspect
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import vvae_fast
from vvae_fast import config, distributions
from vvae_fast.interop import normflows, pyro, pythae, sylvester_flows, zuko  # noqa: F401  # for the programs below
from vvae_fast.nn import Likelihood, mlp_decoder, mlp_encoder
from vvae_fast.train import cli

for peer in ("pyro", "pythae", "zuko"):  # whose classes are bases of interop's where they are installed
    pytest.importorskip(peer)

LIST = Path(__file__).with_name("public_surface.txt")
MODULES = [
    "vvae_fast",
    "vvae_fast.nn",
    "vvae_fast.distributions",
    "vvae_fast.interop.normflows",
    "vvae_fast.interop.pyro",
    "vvae_fast.interop.pythae",
    "vvae_fast.interop.sylvester_flows",
    "vvae_fast.interop.zuko",
]


def names_of(name: str) -> Iterator[str]:
    """A module's public names with their signatures, and those of its classes."""
    module = importlib.import_module(name)
    own = (key for key, value in vars(module).items() if getattr(value, "__module__", None) == name)
    for key in sorted(getattr(module, "__all__", own)):
        if not key.startswith("_"):
            value = getattr(module, key)
            yield key + signature_of(value)
            if inspect.isclass(value) and name != "vvae_fast":  # whose classes are vvae_fast.nn's
                yield from (f"{key}.{member}" for member in members_of(value))


def members_of(cls: type) -> Iterator[str]:
    """What a class has from this package: methods with their signatures, properties, and attributes."""
    members = {key for base in cls.__mro__ if base.__module__.startswith("vvae_fast") for key in vars(base)}
    fields = (*getattr(cls, "_fields", ()), *getattr(cls, "__dataclass_fields__", ()))  # which its signature shows
    for key in sorted(members - {*fields}):
        if not key.startswith("_"):
            value = getattr(cls, key)
            if callable(value):
                yield key + signature_of(value)
            else:
                yield key if isinstance(value, property) else f"{key} = {value}"


def signature_of(value: Callable[..., object]) -> str:
    """Without annotations: tests/house/test_typing.py is for those."""
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def vae(flow: nn.Module | None = None, likelihood: str | Likelihood = "bernoulli", outputs: int = 6) -> vvae_fast.VAE:
    return vvae_fast.VAE(mlp_encoder(6, 5), mlp_decoder(2, 5, outputs), 2, flow, likelihood)


def layers(name: str, *layers: nn.Module) -> nn.Module:
    """What interop's functions take for another package's model."""
    return nn.ModuleDict({name: nn.ModuleList(layers)})


z, u, w, b = torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3)
many = torch.zeros(4, 3, 2)  # sets of u or w
x = torch.zeros(4, 6)
NAMES = {**vars(distributions), **vars(vvae_fast.nn), **vars(vvae_fast), **globals()}  # of the programs below
MODELS = """
PlanarFlow(2, 3)
AmortizedPlanarFlow(2, 3, 5)
AmortizedPlanarFlow(2, 3, 5, rank=2)
SylvesterFlow(2, 3, 1)
SylvesterFlow(2, 3, kind="householder", num_reflections=4)
SylvesterFlow(2, 3, kind="triangular")
AmortizedSylvesterFlow(2, 3, 1, 5)
AmortizedSylvesterFlow(2, 3, None, 5, kind="triangular", rank=2)
HouseholderFlow(2, 4)
AmortizedHouseholderFlow(2, 4, 5)
vae()
vae(PlanarFlow(2, 3))
vae(AmortizedPlanarFlow(2, 3, 5))
vae(None, Gaussian(), 12)
vae(None, Binomial(3))
vae(None, Standardised(x[0], x[0] + 1, Gaussian(log_var=0.0)))
normflows.Planar((2,))
normflows.PlanarStack(2, 3)
normflows.from_normflows(layers("flows", normflows.Planar((2,)), normflows.Planar((2,))))
pyro.Planar(2)
pyro.PlanarStack(2, 3)
pyro.conditional_planar(2, 5, [4])
pyro.Householder(2, 2)
pyro.Sylvester(2, 2)
pyro.conditional_householder(2, 5, [4], 2)
pythae.PlanarFlow(pythae.PlanarFlowConfig((2,)))
pythae.PlanarStack(2, 3)
pythae.from_pythae(layers("net", pythae.PlanarStack(2, 2), pythae.PlanarStack(2, 1)))
sylvester_flows.BjorckSylvesterFlow(3, 2, 2, 5)
zuko.PlanarTransform(2)
zuko.PlanarTransform(2, 5, 3, (4,))
zuko.SylvesterTransform(2)
zuko.SylvesterTransform(2, 5, 3, (4,), 1)
"""
TRANSFORMS = """
PlanarTransform(u, w, b)
PlanarTransform(u, w, b).inv
"""
MISTAKES = """
planar_flow([0.0], u, w, b)
planar_flow(z.int(), u, w, b)
planar_flow(z, u.double(), w, b)
planar_flow(z, u, w, b.half())
planar_flow(z, u.to("meta"), w, b)
planar_flow(z[0, 0], u, w, b)
planar_flow(z[:, :0], u[:, :0], w[:, :0], b)
planar_flow(z[:, :1], u, w, b)
planar_flow(z, u[:2], w, b)
planar_flow(z, u, w, b[:2])
planar_flow(z, many[:3], many[:3], many[:3, :, 0])
planar_flow(z, u[0], w[0], b[0])
planar_flow(z, u, w, b, activation="relu")
planar_flow(z, u, w, b, constraint="exp")
planar_flow(z, u, w, b, activation="leaky_relu", slope=0)
planar_flow(z, u, w, b, slope="0.1")
planar_flow(z, u, w, b, log_det_eps=-1.0)
planar_flow(z, u, w, b, log_det_eps=None)
planar_flow(z, u, w, b, backend="numpy")
planar_flow(z, u, w, b, backend=3)
planar_flow_inverse(z, u, w, b, constraint="none")
planar_flow_inverse(z, u, w, b, activation="leaky_relu", slope=1.5)
use_backend("numpy")
use_backend(None)
PlanarFlow(0, 3)
PlanarFlow(2.0, 3)
PlanarFlow(2, -1)
PlanarFlow(2, True)
PlanarFlow(2, 3, backend="numpy")
PlanarFlow(2, 3)([0.0])
PlanarFlow(2, 3)(z[:, :1])
PlanarFlow(2, 3)(z.double())
PlanarFlow(2, 3)(z.to("meta"))
PlanarFlow(2, 3).step(3)
PlanarFlow(2, 3).step("first")
PlanarFlow(2, 3, constraint="none").inverse(z)
AmortizedPlanarFlow(2, 3, 0)
AmortizedPlanarFlow(2, 3, 5, rank=6)
AmortizedPlanarFlow(2, 3, 5)(z, z)
AmortizedPlanarFlow(2, 3, 5)(z, x[:3, :5])
AmortizedPlanarFlow(2, 3, 5)(z, x[:, :5].double())
sylvester_flow(z, None, u, u, b)
SylvesterFlow(2, 3, 3)
SylvesterFlow(2, 3, 1, kind="triangular")
SylvesterFlow(2, 3, kind="diagonal")
SylvesterFlow(2, 3, num_reflections=4)
SylvesterFlow(2, 3)(z[:, :1])
AmortizedSylvesterFlow(2, 3, 1, 5, rank=6)
AmortizedSylvesterFlow(2, 3, 1, 5)(z, x[:3, :5])
HouseholderFlow(2, -1)
AmortizedHouseholderFlow(2, 4, 5)(z, x)
orthonormal(b)
orthonormal(z)
VAE(None, mlp_decoder(2, 5, 6), 2)
VAE(mlp_encoder(6, 5), mlp_decoder(2, 5, 6), 3, PlanarFlow(2, 3))
VAE(mlp_encoder(6, 5), mlp_decoder(2, 5, 6), 2, AmortizedPlanarFlow(2, 3, 4))
VAE(mlp_encoder(6, 5), mlp_decoder(2, 5, 6), 2, feature_dim=4)
VAE(nn.Linear(6, 5), mlp_decoder(2, 5, 6), 2, likelihood="poisson")
VAE(nn.Identity(), mlp_decoder(2, 5, 6), 2)
vae().elbo_terms([0.0])
vae().elbo_terms(x.int())
vae().elbo_terms(x.double())
vae().elbo_terms(x, num_samples=0)
vae().elbo_terms(x + 2)
vae().decode(x)
vae().log_likelihood(x, num_samples=0)
vae().sample(-1)
mlp_encoder(6)
mlp_decoder(2, 0, 6)
make_likelihood("binomial")
make_likelihood("bernoulli", total_count=3)
Bernoulli().log_prob(x, z)
Bernoulli().check_data(x + 2)
Binomial(0)
Binomial(3).check_data(x + 0.5)
Gaussian(log_var="0")
Standardised(z, torch.zeros(3))
Standardised(z, -torch.ones(4, 2))
PlanarTransform(u, w[:2], b)
PlanarTransform(u, w, b, activation="relu")
PlanarTransform(u, w, b)(z[:, :1])
PlanarTransform(u, w, b, constraint="none").inv(z)
PlanarTransform(many, many, many[..., 0])(torch.zeros(3, 2))
normflows.PlanarStack((), 3)
normflows.PlanarStack(2, 3, act="relu")
normflows.Planar((2,), u=z)
normflows.from_normflows(nn.Identity())
normflows.load_normflows_state_dict(nn.Identity(), {})
pyro.PlanarStack(2, 0)
pyro.from_pyro([])
pyro.from_pyro([PlanarTransform(u, w, b)])
pyro.ConditionalPlanar(3)
pyro.planar(0)
pyro.Householder(2, 0)
pyro.ConditionalHouseholder(2, None)
pyro.Sylvester(2)._inverse(z)
pythae.PlanarStack(2, 3, "sigmoid")
pythae.PlanarStack(2, 3, log_det_eps=-1.0)
pythae.PlanarStack(2, 3)(z[0])
pythae.PlanarStack(2, 3).inverse(z)
pythae.from_pythae(nn.Identity())
sylvester_flows.from_sylvester_flows({}, "triangular")
sylvester_flows.from_sylvester_flows({}, "iaf")
zuko.PlanarTransform(2, -1)
zuko.PlanarTransform(2, 5)()
zuko.SylvesterTransform(2)()(x)
"""


def programs(text: str) -> list[str]:
    return text.strip().splitlines()


def state_dicts() -> Iterator[str]:
    """Keys and shapes, and the names of public attributes."""
    for name in programs(MODELS):
        model = eval(name, NAMES)
        yield from (f"{name}: {key} {[*tensor.shape]}" for key, tensor in model.state_dict().items())
        attributes = sorted(key for key in vars(model).keys() - vars(nn.Module()) if not key.startswith("_"))
        yield f"{name} has {', '.join(attributes) or 'no attributes'}"


def names_in_pickles() -> Iterator[str]:
    """Modules and names, private ones too, that a model saved whole has to find when it is loaded."""
    found = set()
    for program in (*programs(MODELS), *programs(TRANSFORMS)):
        steps = pickletools.genops(pickle.dumps(eval(program, NAMES), protocol=2))  # torch.save's
        found |= {argument for step, argument, _ in steps if step.name == "GLOBAL"}
    yield from sorted(name.replace(" ", ".") for name in found if name.startswith("vvae_fast."))


def options() -> Iterator[str]:
    """Of each command: an option, "..." where it takes several values, its choices and its default."""
    parser = cli._parser()
    yield from parser_lines("", parser)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        yield from parser_lines(f"{name} ", command)


def parser_lines(command: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.dest not in ("help", "version") and action.nargs != argparse.PARSER:
            several = {None: "", 0: " (takes no value)", "+": " ...", "*": " [...]"}[action.nargs]
            choices = f" of {', '.join(map(str, action.choices))}" if action.choices else ""
            required = " required" if action.required else f" = {action.default}"
            yield f"{command}{' '.join(action.option_strings) or action.dest}{several}{choices}{required}"


def operators() -> Iterator[str]:
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vvae_fast::"))
    yield from (str(getattr(torch.ops.vvae_fast, name.partition("::")[2]).default._schema) for name in names)


def environment_variables() -> Iterator[str]:
    """Which vvae_fast/config.py names: it alone reads them, as tests/house/test_layers.py says."""
    tree = ast.parse(inspect.getsource(config))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    yield from sorted(text for text in texts if re.fullmatch(r"[A-Z_]+", text))


def keys_of_info() -> Iterator[str]:
    """Of `info()` itself and of what it says of backends and nodes; its other values are the machine's."""
    info = vvae_fast.info()
    yield from info
    yield from (f"backends.{name}.{key}" for name, state in info["backends"].items() for key in state)
    yield from (f"node.{key}" for key in info["node"])


def messages() -> Iterator[str]:
    """What each wrong call raises."""
    for mistake in programs(MISTAKES):
        try:
            eval(mistake, NAMES)
        except (IndexError, NotImplementedError, TypeError, ValueError) as error:
            yield f"{mistake}: {type(error).__name__}: {error}"
        else:
            raise AssertionError(f"{mistake} raises nothing")


SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    **{name: partial(names_of, name) for name in MODULES},
    "state_dicts and attributes": state_dicts,
    "names in pickles": names_in_pickles,
    "command line": options,
    "torch.ops.vvae_fast": operators,
    "environment variables": environment_variables,
    "keys of info()": keys_of_info,
    "messages": messages,
}


def listed() -> dict[str, list[str]]:
    sections = re.split(r"^\[(.*)\]\n", LIST.read_text(), flags=re.MULTILINE)[1:]
    return {name: text.splitlines() for name, text in zip(sections[::2], sections[1::2], strict=True)}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_public_surface_is_as_listed(section):
    assert list(SECTIONS[section]()) == listed()[section]


def test_the_list_has_no_other_section():
    assert listed().keys() == SECTIONS.keys()


if __name__ == "__main__":
    for name, lines in SECTIONS.items():
        print(f"[{name}]", *lines(), sep="\n")
