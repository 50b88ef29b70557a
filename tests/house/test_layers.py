"""The architecture: who imports whom, who reads the environment, what stays free of torch, how long a file gets."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vvae_fast"

# A file may import only files listed above it.
ORDER = [
    "_version",
    "config",
    "spec",
    "shapes",
    "reference.activations",
    "reference.flow",
    "reference",
    "backends.operators",
    "backends.base",
    "backends.reference",
    "backends.cpp",
    "backends.cuda",
    "kernels.launch",
    "kernels._table",
    "kernels._heuristics",
    "kernels.math",
    "kernels.root",
    "kernels.direct_forward",
    "kernels.direct_backward",
    "kernels.compact_chunk",
    "kernels.compact_forward",
    "kernels.compact_gradients",
    "kernels.compact_backward",
    "kernels.planar",
    "kernels",
    "backends.triton",
    "backends._measured",
    "backends.gpu_choice",
    "node",
    "backends.selection",
    "backends",
    "autograd",
    "functional",
    "distributions",
    "interop",
    "interop._runs",
    "interop.normflows",
    "interop.pyro",
    "interop.pythae",
    "nn.likelihoods",
    "nn.mlp",
    "nn.gated",
    "nn.linear",
    "nn.planar",
    "nn.outputs",
    "nn.vae",
    "nn",
    "",
    "train",
    "train.extras",
    "train.files",
    "train.paths",
    "train.output",
    "train.memory",
    "train.outcome",
    "train.environment",
    "train.idx",
    "train.energies",
    "train.density",
    "train.arrays",
    "train.statistics",
    "train.numbers",
    "train.loaders",
    "train.data",
    "train.processes",
    "train.compiling",
    "train.runconfig",
    "train.objective",
    "train.networks",
    "train.module",
    "train.seal",
    "train.checkpoints",
    "train.resuming",
    "train.progress",
    "train.folder",
    "train.evaluation",
    "train.runs",
    "train.plots",
    "train.density_plots",
    "train.density_runs",
    "train.compare",
    "train.study",
    "train.cli",
    "__main__",
]

LOADERS = {"_C": "backends.cpp", "_C_cuda": "backends.cuda", "_C_node": "node"}  # of the extensions


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it, and the top-level names of all others with a '+'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {resolve(name) for name in names}
    return found


def resolve(name: str) -> str:
    top, *rest = name.split(".")
    if top != "vvae_fast":
        return f"+{top}"
    while rest and ".".join(rest) not in FILES and ".".join(rest) not in LOADERS:
        rest.pop()
    return ".".join(rest)


def test_every_file_has_its_place():
    assert set(FILES) == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_imports_only_from_above(name):
    above = set(ORDER[: ORDER.index(name)]) | LOADERS.keys()
    below = {other for other in imports(FILES[name]) if not other.startswith("+")} - above
    assert not below


@pytest.mark.parametrize("extension", LOADERS)
def test_an_extension_has_one_loader(extension):
    assert [name for name in FILES if extension in imports(FILES[name])] == [LOADERS[extension]]


def test_the_oracle_imports_torch_alone():
    assert imports(FILES["reference.activations"]) == {"+torch", "+typing"}
    assert imports(FILES["reference.flow"]) == {"+torch", "+typing", "reference.activations", "spec"}


def test_one_reader_of_the_environment():
    readers = [name for name, path in FILES.items() if re.search(r"\bos\.(environ|getenv)\b", path.read_text())]
    assert readers == ["config"]


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(("train", "__main__"))])
def test_the_core_needs_torch_alone(name):
    extras = {"+lightning", "+matplotlib", "+sklearn", "+rich", "+numpy", "+tensorboard", "+yaml"}
    peers = {"+normflows", "+pyro", "+pythae"}
    wanted = {"interop.pyro": {"+pyro"}, "interop.pythae": {"+pythae"}}.get(name, set())  # where it is installed
    assert imports(FILES[name]) & (extras | peers) == wanted


def test_formulas_and_kernels_are_free_of_torch():
    texts = {path.name: path.read_text() for path in (ROOT / "csrc").rglob("*.*")}
    with_torch = {name for name, text in texts.items() if "torch/" in text}
    assert with_torch == {"allocate.h", "checks.h", "operators.h", "schedule.h", "operators.cpp", "node.cpp"}
    for name in texts.keys() - with_torch:
        assert not with_torch & set(re.findall(r'#include "(?:.*/)?([^"/]+)"', texts[name])), name
    formulas = "".join(path.read_text() for path in (ROOT / "csrc" / "planar").iterdir())
    assert {line for line in re.findall(r"#include .*", formulas) if "/" in line or "<" in line} == {
        "#include <stdint.h>"
    }


@pytest.mark.parametrize(
    "pattern",
    ["vvae_fast/**/*.py", "csrc/**/*.*", "tests/**/*.py", "benchmarks/**/*.py", "setup.py", "build_tools/*.py"],
)
def test_files_stay_short(pattern):
    long = {str(p): n for p in ROOT.glob(pattern) if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_equations_cited_by_the_code_exist():
    tags = {int(n) for n in re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "math.md").read_text())}
    cited = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]:
        for citation in re.findall(r"docs/math\.md ((?:\(\d+\)(?:, | and | to )?)+)", path.read_text()):
            cited |= {int(n) for n in re.findall(r"\d+", citation)}
    assert cited
    assert cited <= tags
