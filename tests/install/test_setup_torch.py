"""How a build finds the torch it is for: under pip, uv and build, which isolate builds in three ways; a broken one."""

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOO_OLD = "vvae_fast: building needs torch 2.11 or newer, got 2.10.0+found. Run: uv pip install 'torch>=2.11'"
NEEDED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "build_tools", "csrc")
HOOK = "import setuptools.build_meta as backend; backend.prepare_metadata_for_build_wheel('.')"
IDENTITIES = ("PIP_BUILD_TRACKER", "UV", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")

for module in ("pybind11", "setuptools"):
    pytest.importorskip(module, reason=f"{module} is not installed")


@pytest.fixture
def source(tmp_path):
    """The files that a build reads, in a folder whose name is no plain word."""
    folder = tmp_path / "a söurce"
    folder.mkdir()
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "vvae_fast").mkdir()
    shutil.copy(ROOT / "vvae_fast" / "_version.py", folder / "vvae_fast")
    return folder


def make_environment(folder: Path, torch: str | None = None) -> Path:
    """An environment without pip, with a torch of this text where it is given."""
    venv.create(folder, symlinks=True)
    if torch is not None:
        write_torch(packages_of(folder), torch)
    return folder


def packages_of(prefix: Path) -> Path:
    return prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def write_torch(folder: Path, text: str) -> None:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(text)


@pytest.fixture
def isolated(tmp_path):
    """An environment such as uv and build make for a build: with its tools, without torch."""
    folder = make_environment(tmp_path / "isolated")
    for tool in ("setuptools", "pybind11"):
        installed = importlib.metadata.distribution(tool)
        for name in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
            (packages_of(folder) / name).symlink_to(installed.locate_file(name))
    return folder


def run_in(source: Path, command: list[object], **variables: str) -> str:
    """The last line of a build that ends early."""
    kept = {name: value for name, value in os.environ.items() if name not in IDENTITIES}
    path = os.pathsep.join(part for part in kept["PATH"].split(os.pathsep) if Path(part) != Path(sys.prefix, "bin"))
    done = subprocess.run(
        list(map(str, command)),
        cwd=source,
        env={**kept, "PATH": path, "NO_CUDA": "1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def like_uv(isolated: Path) -> list[object]:
    """As uv calls the backend: VIRTUAL_ENV and PATH changed to the build's own environment, argv[0] -c."""
    script = 'VIRTUAL_ENV="$1" PATH="$1/bin:$PATH" "$1/bin/python" -c "$2"; exit $?'
    return ["sh", "-c", script, "uv", isolated, HOOK]


FOUND = "__version__ = '2.10.0+found'"


def test_uv_with_an_environment_named(source, isolated, tmp_path):
    target = make_environment(tmp_path / "target", FOUND)
    assert run_in(source, like_uv(isolated), UV="uv", VIRTUAL_ENV=str(target)) == TOO_OLD


@pytest.mark.parametrize("argument", ["--python={}/bin/python", "--python={}", "{}/bin/python"])
def test_uv_with_an_interpreter_named(source, isolated, tmp_path, argument):
    target = make_environment(tmp_path / "target", FOUND)
    assert run_in(source, [*like_uv(isolated), argument.format(target)], UV="uv") == TOO_OLD


def test_uv_with_an_environment_on_path(source, isolated, tmp_path):
    target = make_environment(tmp_path / "target", FOUND)
    path = os.pathsep.join([str(target / "bin"), os.environ["PATH"]])
    assert run_in(source, like_uv(isolated), UV="uv", PATH=path) == TOO_OLD


def test_uv_with_its_default_environment(source, isolated):
    make_environment(source / ".venv", FOUND)
    assert run_in(source, like_uv(isolated), UV="uv") == TOO_OLD


def test_build_by_the_environments_interpreter(source, isolated, tmp_path):
    target = make_environment(tmp_path / "target", FOUND)
    (tmp_path / "_in_process.py").write_text(f"import sys\nsys.path.insert(0, '')\n{HOOK}\n")
    caller = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    command = [target / "bin" / "python", "-c", caller, isolated / "bin" / "python", tmp_path / "_in_process.py"]
    assert run_in(source, command) == TOO_OLD.replace("uv pip", "pip")
    # pip's builds run in the environment that is installed into: no other is meant
    assert "building needs PyTorch first" in run_in(source, command, PIP_BUILD_TRACKER="/tmp/tracker")


def test_no_torch_names_each_cause_and_remedy(source, isolated):
    message = run_in(source, like_uv(isolated), UV="uv")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert message.startswith(f"vvae_fast: building needs PyTorch first, and there is none for Python {version} in /")
    assert str(packages_of(isolated)) in message
    assert "Where it is not installed: uv pip install 'torch>=2.11'" in message
    assert "isolation hides it: activate its environment" in message
    assert "run there uv pip install 'setuptools>=77' ninja 'pybind11>=2.13' and then" in message
    for command in ("pip install --no-build-isolation .", "uv pip install --no-build-isolation ."):
        assert command in message
    assert message.endswith("python -m build --wheel --no-isolation")


def test_a_folder_that_an_uninstalled_torch_left(source, isolated, tmp_path):
    (packages_of(isolated) / "torch" / "lib").mkdir(parents=True)
    assert "building needs PyTorch first" in run_in(source, like_uv(isolated), UV="uv")
    target = make_environment(tmp_path / "target", FOUND)
    assert run_in(source, like_uv(isolated), UV="uv", VIRTUAL_ENV=str(target)) == TOO_OLD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("import missing_module", "ModuleNotFoundError: No module named 'missing_module'"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line)"),
    ],
)
def test_a_torch_that_does_not_import(source, isolated, text, reason):
    write_torch(packages_of(isolated), text)
    message = run_in(source, like_uv(isolated), UV="uv")
    assert message.startswith(f"vvae_fast: the torch that is installed does not import ({reason}")
    assert message.endswith("Repair it: uv pip install 'torch>=2.11' --force-reinstall")


def test_a_source_archive_carries_what_setup_imports(source, isolated):
    subprocess.run(
        [isolated / "bin" / "python", "setup.py", "-q", "sdist"], cwd=source, check=True, capture_output=True
    )
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {f"build_tools/{path.name}" for path in (ROOT / "build_tools").glob("*.py")} <= names


def test_pip_shows_one_line(source, tmp_path):
    pytest.importorskip("pip", reason="pip is not installed")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--isolated", "--no-index"]
    done = subprocess.run(
        [*command, "--no-deps", "--dry-run", "."],
        cwd=source,
        env={**os.environ, "CXX": "", "PATH": str(tmp_path / "nothing")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count("vvae_fast: there is no C++ compiler: none of ") == 1
    assert "[1 lines of output]" in output
    assert "Traceback" not in output


def test_two_builds_in_one_folder_take_turns(tmp_path):
    code = "import pathlib, sys; from build_tools import environment; environment.ROOT = pathlib.Path(sys.argv[1])"
    code += "; environment.wait_for_turn(); environment.say('its turn')"
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    second = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert second.stderr.readline() == f"vvae_fast: waiting for another build in {tmp_path}\n"
    os.close(folder)
    assert second.stderr.readline() == "vvae_fast: its turn\n"
    assert second.wait() == 0
    second.stderr.close()
