"""Every example of docs/ is run as it stands, a page's in one namespace, and prints what the page says it prints."""

import contextlib
import importlib.util
import io
import re
import warnings
from pathlib import Path

import pytest
import torch

import vvae_fast
from vvae_fast import shapes
from vvae_fast.backends import cuda, selection
from vvae_fast.spec import ACTIVATIONS, FlowSpec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.S)
PEERS = ("normflows", "pyro", "pythae", "zuko")
each_page = pytest.mark.parametrize("name", PAGES)


def missing(code: str) -> set[str]:
    """The peers that a block imports and that are not installed."""
    return {peer for peer in re.findall(r"^(?:import|from) (\w+)", code, re.M) if peer in PEERS and not found(peer)}


def found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def assert_printed(got: str, wanted: str) -> None:
    """Word by word; numbers written as 2e-07 are measured ones, and right within a factor of ten."""
    got, wanted = got.split(), wanted.split()
    assert len(got) == len(wanted), got
    for x, y in zip(got, wanted, strict=True):
        if re.fullmatch(r"\de[+-]\d\d", y):
            assert 0.1 <= float(x) / float(y) <= 10, (x, y)
        else:
            assert x == y


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if "```python" in text])
def test_examples_run(name):
    names, absent = {"__name__": name}, set()
    for block in BLOCK.finditer(PAGES[name]):
        code, output = block.groups()
        if missing(code):
            absent |= missing(code)
            continue
        line = PAGES[name][: block.start(1)].count("\n")  # so that an error says where in the page
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
            if any(peer in code for peer in PEERS):
                warnings.simplefilter("ignore")  # the packages' own, as they are imported
            exec(compile("\n" * line + code, DOCS / name, "exec"), names)
        assert_printed(printed.getvalue(), output or "")
    results = [value for name, value in names.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert all(torch.isfinite(value).all() for value in results)
    if absent:
        pytest.skip(f"the other examples ran; not installed: {', '.join(sorted(absent))}")


def test_printed_is_compared():
    assert_printed("a 2e-07\n", "a   9e-08")
    for got in ("a 2e-05", "b 9e-08", "a"):
        with pytest.raises(AssertionError):
            assert_printed(got, "a 9e-08")


@each_page
def test_links_and_equations_exist(name):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if not target.startswith("http"):
            assert (DOCS / target.split("#")[0]).exists(), target
    tags = set(re.findall(r"\\tag\{(\d+)\}", PAGES["math.md"]))
    for numbers in re.findall(r"math\.md\)? ((?:\(\d+\)(?:, | and | to )?)+)", PAGES[name]):
        assert set(re.findall(r"\d+", numbers)) <= tags, numbers


def test_the_index_has_every_page():
    assert set(re.findall(r"\]\((\w+\.md)\)", PAGES["index.md"])) == set(PAGES) - {"index.md"}


def test_who_runs_what_is_what_the_backends_say(monkeypatch):
    """A column is a backend in the table's order, a row an activation; yes only where both ways and the inverse run."""
    monkeypatch.setattr(cuda, "most_dim", {torch.float32: 1024})  # of the extension, where there is one
    table = re.findall(r"^\| (\w+): forward, backward, inverse \| (.*) \|$", PAGES["backends.md"], re.M)
    assert {activation for activation, _ in table} == set(ACTIVATIONS)
    for activation, answers in table:
        for name, answer in zip(("cpp", "cuda", "triton", "reference"), answers.split(" | "), strict=True):
            formulas = FlowSpec(activation=activation)
            device = "cuda" if name in ("cuda", "triton") else "cpu"
            problem = shapes.Problem(5, 3, 4, 1, False, torch.float32, device, spec=formulas)
            both = [problem, problem._replace(inverse=True)]
            reasons = [reason for p in both for reason in selection._BACKENDS[name].unsupported(p)]
            assert (answer == "yes") == (not reasons), (activation, name, reasons)


def test_every_public_name_has_a_page():
    text = "".join(PAGES.values())
    for module in (vvae_fast, vvae_fast.nn):
        for name in module.__all__:
            assert name in text, name


def test_interops_names_are_there():
    sources = "".join(path.read_text() for path in (DOCS.parent / "vvae_fast").rglob("*.py"))
    for name in re.findall(r"`(?:stack\.)?((?:from|to|load)_\w+|Planar\w*|ConditionalPlanar)\(", PAGES["interop.md"]):
        assert re.search(rf"(?:def|class) {name}\b", sources), name


def test_the_commands_that_print_numbers_are_there():
    """CONTRIBUTING's table: modules that can be run, targets of the Makefile, tests."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("### Where each number comes from")[2]
    table = "\n".join(line for line in table.partition("\nA new case")[0].splitlines() if line.startswith("|"))
    modules, targets = re.findall(r"python -m ([\w.]+)", table), re.findall(r"`make ([\w-]+)`", table)
    assert len(modules) >= 4
    assert len(targets) >= 6
    makefile = (ROOT / "Makefile").read_text()
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules)
    assert all(f"\n{target}:" in makefile for target in targets)
    assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/]+\.py", table))
    pages = re.findall(r"(?:docs/|, )([a-z]+\.md)", table)
    assert all((DOCS / page).exists() for page in pages)
