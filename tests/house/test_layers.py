"""The architecture: who imports whom, who reads the environment, what stays free of torch, how long a file gets."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vvae_fast"

# A room, which is a folder or a file, may import only rooms listed above it; in a room no imports form a circle.
ROOMS = [
    "_version",
    "config",
    "spec",
    "shapes",
    "reference",
    "triton",
    "node",
    "backends",
    "autograd",
    "functional",
    "sylvester",
    "distributions",
    "nn",
    "interop",
    "",
    "train.base",
    "train.data",
    "train.run",
    "train.study",
    "train.density",
    "train",
    "__main__",
]
MOST_FILES = 12  # of a folder

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


def room_of(name: str) -> str:
    """The longest of ROOMS that holds the module."""
    while name not in ROOMS:
        name = name.rpartition(".")[0]
    return name


def test_every_file_has_a_room():
    """The package's own __init__.py is the one module of the room without a name."""
    assert [name for name in FILES if room_of(name) == ""] == [""]
    assert {room_of(name) for name in FILES} == set(ROOMS)


@pytest.mark.parametrize("name", FILES)
def test_imports_only_from_rooms_above(name):
    within = {other for other in imports(FILES[name]) if not other.startswith("+")} - LOADERS.keys()
    place = ROOMS.index(room_of(name))
    assert not {other for other in within if ROOMS.index(room_of(other)) > place}


def test_no_imports_form_a_circle():
    left = {name: imports(path) & FILES.keys() - {name} for name, path in FILES.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them by their names alone, whatever their folders."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("__init__.py", "conftest.py")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("top", ["vvae_fast", "csrc", "tests", "benchmarks"])
def test_no_folder_holds_more_than_a_dozen_files(top):
    """But for benchmarks/results, which `make bench` fills."""
    suffixes = {".py", ".h", ".cuh", ".cpp", ".cu", ".c"}
    files = [path for path in (ROOT / top).rglob("*") if path.suffix in suffixes and path.name != "__init__.py"]
    counts = Counter(path.parent.relative_to(ROOT) for path in files)
    assert {str(folder): n for folder, n in counts.items() if n > MOST_FILES} == {}


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
    peers = {"+normflows", "+pyro", "+pythae", "+zuko"}
    wanted = {"interop._pyro_bases": {"+pyro"}, "interop.pythae": {"+pythae"}, "interop.zuko": {"+zuko"}}
    assert imports(FILES[name]) & (extras | peers) == wanted.get(name, set())


def test_formulas_and_kernels_are_free_of_torch():
    texts = {path.name: path.read_text() for path in (ROOT / "csrc").rglob("*.*")}
    with_torch = {name for name, text in texts.items() if "torch/" in text}
    headers = {"allocate.h", "argument.h", "checks.h", "operators.h", "schedule.h"}
    assert with_torch == headers | {"operators.cpp", "node.cpp"}
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
