"""What setup.py decides to build, and what it says where it cannot: with stand-ins for compilers and torch's CUDA."""

import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from build_tools import compiler, environment  # noqa: E402, next to setup.py, and installed nowhere

CUDA_VARIABLES = ("FORCE_CUDA", "NO_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")
VARIABLES = (*CUDA_VARIABLES, *compiler.VARIABLES, "CC", "MAX_JOBS", "TORCH_DONT_CHECK_COMPILER_ABI")
# setup.py asks for it
pytest.importorskip("pybind11", reason="pybind11 is not installed")


def fake_compiler(file: Path, macros: str = "#define __GNUC__ 12", complaint: str = "") -> str:
    """A C++ compiler that only answers questions, and compiles nothing where it has a complaint."""
    file.write_text(
        f"#!/bin/sh\ncase \"$*\" in *-dM*) echo '{macros}'; exit 0;; esac\n"
        + (f"echo 'trial.cpp: In function:'\necho '{complaint}'\nexit 1\n" if complaint else "")
    )
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs setup.py without building anything: the arguments of setup(), under the variables given."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
    monkeypatch.setattr(environment, "wait_for_turn", lambda: None)
    default = {"CXX": fake_compiler(tmp_path / "fake-g++")}

    def run_setup(**variables: str) -> dict[str, object]:
        seen = {}
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(default | variables)
        monkeypatch.setattr(setuptools, "setup", seen.update)
        runpy.run_path(str(ROOT / "setup.py"))
        return seen

    with mock.patch.dict(os.environ):
        yield run_setup


def toolkit(folder: Path, version: str = "13.0", library: bool = True, complaint: str = "") -> Path:
    """A folder that looks like CUDA's toolkit, with a compiler that only answers questions."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    if library:
        (folder / "lib64" / "libcudart.so").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.88"\n'
        "elif [ $1 = --list-gpu-arch ]; then echo compute_75 compute_80 compute_86 compute_89 compute_90 compute_100\n"
        f"else echo '{complaint}'; exit {int(bool(complaint))}; fi\n"
    )
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def cuda_torch(monkeypatch, tmp_path):
    """A torch for CUDA 13 that sees the GPUs of the list, and finds the toolkit returned."""
    gpus = []
    home = toolkit(tmp_path / "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    return home, gpus


def fact(extension: setuptools.Extension, name: str) -> str:
    return dict(extension.define_macros)[name].strip('"')


def ends_with(run, **variables: str) -> str:
    """The one line that setup.py ends with."""
    with pytest.raises(SystemExit) as end:
        run(**variables)
    assert "\n" not in str(end.value)
    return str(end.value)


@pytest.fixture
def cpu_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)


@pytest.mark.usefixtures("cpu_torch")
def test_without_cuda_the_cpu_kernels_are_built_and_know_why(run):
    (extension,) = run()["ext_modules"]
    assert extension.name == "vvae_fast._C"
    assert fact(extension, "VVAE_FAST_CUDA_BUILD") == f"not built: torch {torch.__version__} has no CUDA"
    assert not any("cuda" in source for source in extension.sources)


@pytest.mark.usefixtures("cpu_torch")
def test_force_cuda_needs_a_torch_with_cuda(run):
    message = ends_with(run, FORCE_CUDA="1")
    assert message.startswith(
        f"vvae_fast: FORCE_CUDA was set, but torch {torch.__version__} has no CUDA. Remedy: install"
    )
    assert run(FORCE_CUDA="0")["ext_modules"]


def test_both_extensions_are_built_where_there_is_cuda(run, cuda_torch):
    cpu, cuda = run()["ext_modules"]
    assert fact(cpu, "VVAE_FAST_CUDA_BUILD") == "built"
    assert cuda.name == "vvae_fast._C_cuda"
    assert {"csrc/cuda/planar_cuda.cpp", "csrc/cuda/module.cpp"} <= set(cuda.sources)
    assert {Path(source).suffix for source in cuda.sources} <= {".cpp", ".cu"}
    assert {"csrc/planar_math.h", "csrc/checks.h", "csrc/cuda/planar_cuda.h"} <= set(cuda.depends)
    assert fact(cuda, "VVAE_FAST_NVCC") == "13.0"
    assert "USE_CUDA" in dict(cuda.define_macros)
    assert "USE_CUDA" not in dict(cpu.define_macros)
    assert {"-O3", "-lineinfo", "-std=c++17"} <= set(cuda.extra_compile_args["nvcc"])
    assert not any("fast" in flag for flag in cuda.extra_compile_args["nvcc"])
    assert str(cuda_torch[0] / "lib64") in cuda.library_dirs


def test_no_cuda_leaves_it_out(run, cuda_torch):
    (extension,) = run(NO_CUDA="1")["ext_modules"]
    assert fact(extension, "VVAE_FAST_CUDA_BUILD") == "not built: NO_CUDA was set"


def test_force_and_no_contradict_each_other(run, cuda_torch):
    assert "FORCE_CUDA and NO_CUDA contradict each other" in ends_with(run, FORCE_CUDA="1", NO_CUDA="1")


@pytest.mark.parametrize(
    ("version", "library", "reason"),
    [
        ("12.4", True, "nvcc 12.4 is not of CUDA 13.0, which torch was built with"),
        ("13.0", False, "no CUDA toolkit, a folder with bin/nvcc and libcudart.so, was found in CUDA_HOME ({home})"),
    ],
)
def test_a_toolkit_that_does_not_serve(run, cuda_torch, tmp_path, monkeypatch, version, library, reason):
    home = toolkit(tmp_path / "other", version, library)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
    reason = reason.format(home=home)
    (extension,) = run(CUDA_HOME=str(home))["ext_modules"]
    assert fact(extension, "VVAE_FAST_CUDA_BUILD") == f"not built: {reason}"
    message = ends_with(run, CUDA_HOME=str(home), FORCE_CUDA="1")
    assert f"FORCE_CUDA was set, but {reason}. Remedy: " in message
    assert "CUDA 13" in message


@pytest.mark.parametrize(
    ("gpus", "variable", "wanted"),
    [
        ([], None, "8.0;9.0+PTX"),
        ([], "", "8.0;9.0+PTX"),
        ([], "native", "8.0;9.0+PTX"),
        ([], "8.0 8.6+PTX", "8.0 8.6+PTX"),
        ([], " ", "8.0;9.0+PTX"),
        ([(9, 0), (9, 0)], None, "8.0;9.0+PTX"),
        ([(8, 9), (7, 5), (8, 9)], None, "8.0;9.0+PTX;8.9"),  # 7.5 lacks the instructions,
        ([(12, 0)], None, "8.0;9.0+PTX"),  # unknown to this nvcc: the PTX serves it
        ([(8, 9)], "native", "8.0;9.0+PTX;8.9"),
        ([], "9.0a", "9.0a"),
        ([], "Hopper", "Hopper"),
        ([], "8.0 10.0a", "8.0 10.0a"),
        # what lacks the instructions is left out, however it is written
        ([], "7.5;8.0;9.0+PTX", "8.0;9.0+PTX"),
        ([], "8.0;7.5+PTX", "8.0"),
        ([], "7.0 7.5 8.6", "8.6"),
        ([], "Pascal;Volta+Tegra;Turing;Ampere", "Ampere"),
    ],
)
def test_architectures(run, cuda_torch, gpus, variable, wanted):
    cuda_torch[1].extend(gpus)
    _, cuda = run(**({} if variable is None else {"TORCH_CUDA_ARCH_LIST": variable}))["ext_modules"]
    assert fact(cuda, "VVAE_FAST_CUDA_ARCHITECTURES") == os.environ["TORCH_CUDA_ARCH_LIST"] == wanted
    assert cpp_extension._get_cuda_arch_flags()  # torch understands it


def test_architectures_left_out_are_named(run, cuda_torch, capsys):
    run(TORCH_CUDA_ARCH_LIST="7.5;8.0;Turing;9.0+PTX")
    assert (
        "TORCH_CUDA_ARCH_LIST: 7.5, Turing left out, the CUDA kernels need compute capability 8.0"
        in capsys.readouterr().err
    )


def test_architectures_that_this_nvcc_does_not_know(run, cuda_torch):
    message = ends_with(run, TORCH_CUDA_ARCH_LIST="8.0;12.0+PTX")
    assert "TORCH_CUDA_ARCH_LIST names 12.0+PTX, which this nvcc does not know; it knows compute_100, " in message


@pytest.mark.parametrize(
    "variable", ["garbage", "90", "sm_90", "8.0,9.0", "8.0;;9.0", ";", "7.0", "Turing", "7.5;garbage", "8.0;native"]
)
def test_architectures_that_cannot_be(run, cuda_torch, variable):
    message = ends_with(run, TORCH_CUDA_ARCH_LIST=variable)
    assert "TORCH_CUDA_ARCH_LIST must name compute capabilities from 8.0 on, such as '8.0;9.0+PTX', got " in message
    assert repr(variable) in message


def test_a_compiler_that_does_not_run(run, cuda_torch):
    (cuda_torch[0] / "bin" / "nvcc").chmod(0o644)
    (extension,) = run()["ext_modules"]
    assert "not built: nvcc does not run (" in fact(extension, "VVAE_FAST_CUDA_BUILD")
    assert "repair the CUDA toolkit" in ends_with(run, FORCE_CUDA="1")


def test_a_source_archive_needs_no_torch(run, monkeypatch, cuda_torch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert run(FORCE_CUDA="1", NO_CUDA="1") == {}


def test_nvcc_that_refuses_the_compiler(run, cuda_torch, tmp_path, monkeypatch):
    complaint = "error: -- unsupported GNU version! gcc versions later than 15 are not supported!"
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit(tmp_path / "other", complaint=complaint)))
    reason = f"nvcc 13.0 does not compile an empty file ({complaint})"
    (extension,) = run()["ext_modules"]
    assert text_of(extension, "VVAE_FAST_CUDA_BUILD") == f"not built: {reason}"
    assert f"FORCE_CUDA was set, but {reason}. Remedy: set CC to a C++ compiler" in ends_with(run, FORCE_CUDA="1")


def text_of(extension: setuptools.Extension, name: str) -> str:
    """The macro's text, as C++ reads it."""
    return re.sub(r"(\\\d{3})+", lambda match: decoded(match[0]), fact(extension, name))


def decoded(octal: str) -> str:
    return bytes(int(digits, 8) for digits in octal.split("\\")[1:]).decode()


def test_a_reason_with_odd_characters_reaches_the_compiler_whole(run, cuda_torch, tmp_path):
    home = str(tmp_path / """a "b' é $HOME \\n""")
    (extension,) = run(CUDA_HOME=home)["ext_modules"] if not cpp_extension.CUDA_HOME else reason_of(run, home)
    macro = dict(extension.define_macros)["VVAE_FAST_CUDA_BUILD"]
    assert re.fullmatch(r'"[\w .,:;+()/\\-]*"', macro, re.ASCII)
    assert text_of(extension, "VVAE_FAST_CUDA_BUILD").endswith(f"was found in CUDA_HOME ({home})")


def reason_of(run, home: str) -> list[setuptools.Extension]:
    with mock.patch.object(cpp_extension, "CUDA_HOME", home):
        return run(CUDA_HOME=home)["ext_modules"]


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "OFF", " 0 "])
def test_a_switch_that_is_off(run, cuda_torch, value):
    assert len(run(NO_CUDA=value, FORCE_CUDA=value)["ext_modules"]) == 2


@pytest.mark.usefixtures("cpu_torch")
@pytest.mark.parametrize("value", ["", "0", "false", "no", "off"])
def test_cuda_is_not_forced_where_the_switch_is_off(run, value):
    assert len(run(FORCE_CUDA=value)["ext_modules"]) == 1


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_a_switch_that_is_on(run, cuda_torch, value):
    assert len(run(NO_CUDA=value)["ext_modules"]) == 1
    assert "contradict each other" in ends_with(run, NO_CUDA=value, FORCE_CUDA=value)


@pytest.mark.parametrize("variable", ["NO_CUDA", "FORCE_CUDA"])
def test_a_switch_that_is_neither(run, cuda_torch, variable):
    assert ends_with(run, **{variable: "maybe"}).startswith(f"vvae_fast: {variable} must be 1 or 0, got 'maybe'")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_jobs_that_torch_would_ignore(run, value):
    assert f"must be a whole number from 1 on, got {value!r}" in ends_with(run, MAX_JOBS=value)


def is_install_advice(message: str) -> bool:
    return all(
        word in message
        for word in ("g++ 11 or newer", "clang", "apt install g++", "dnf install gcc-c++", "conda install gxx")
    )


def test_no_compiler(run, tmp_path):
    message = ends_with(run, CXX="", PATH=str(tmp_path / "nothing"))
    assert message.startswith("vvae_fast: there is no C++ compiler: none of c++, ")
    assert is_install_advice(message)


def test_no_compiler_with_a_torch_for_cuda(run, cuda_torch, tmp_path):
    assert "there is no C++ compiler" in ends_with(run, CXX="", PATH=str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_the_compiler_on_path_is_everyones(run, tmp_path, name):
    fake_compiler(tmp_path / name)
    run(CXX="", PATH=str(tmp_path))
    assert os.environ["CXX"] == name  # what torch, setuptools and nvcc read
    assert os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] == "1"


def test_a_named_compiler_that_is_not_there(run):
    message = ends_with(run, CXX="/nowhere/g++ -pipe")
    assert message.startswith("vvae_fast: CXX names '/nowhere/g++', which is no program. ")
    assert is_install_advice(message)


def test_a_compiler_behind_another_program(run, tmp_path):
    command = f"/usr/bin/env {fake_compiler(tmp_path / 'g++')} -pipe"
    assert run(CXX=command, CC="ccache gcc")["ext_modules"]
    assert os.environ["CXX"] == command
    assert "CC" not in os.environ  # torch would take "gcc" for a flag
    run(CXX=command, CC="gcc-12")
    assert os.environ["CC"] == "gcc-12"  # nvcc's -ccbin


def test_a_compiler_that_is_too_old(run, tmp_path):
    old = fake_compiler(tmp_path / "old-g++", "#define __GNUC__ 10", "error: unrecognized -std=c++20")
    message = ends_with(run, CXX=old)
    assert message.startswith(f"vvae_fast: {old} is g++ 10, which is too old. ")
    assert is_install_advice(message)
    clang = fake_compiler(tmp_path / "clang++", "#define __GNUC__ 4\n#define __clang__ 1")  # what clang says of itself
    assert run(CXX=clang)["ext_modules"]


@pytest.mark.parametrize("program", ["true", "false", "cat"])
def test_a_program_that_is_no_compiler(run, program):
    message = ends_with(run, CXX=program)
    assert f"(CXX='{program}'): it is neither g++ nor clang" in message
    assert is_install_advice(message)


def test_a_compiler_that_fails(run, tmp_path):
    broken = fake_compiler(tmp_path / "broken", complaint="collect2: fatal error: cannot find ld")
    message = ends_with(run, CXX=broken, CFLAGS="-g")
    assert f"(CXX='{broken}', CFLAGS='-g'): collect2: fatal error: cannot find ld. Change these" in message


def test_pythons_headers_are_missing(run, tmp_path):
    without = fake_compiler(
        tmp_path / "g++", complaint="trial.cpp:1:10: fatal error: Python.h: No such file or directory"
    )
    message = ends_with(run, CXX=without)
    assert message.startswith("vvae_fast: Python.h, a header of this Python, is not in /")
    assert "apt install python3-dev" in message
    assert "dnf install python3-devel" in message


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("CFLAGS", "-march=nothing", "nothing"), ("CPPFLAGS", "-include none.h", "none.h"), ("LDFLAGS", "-lnone", "none")],
)
def test_flags_that_the_real_compiler_refuses(run, variable, value, reason):
    compiler.choose_compiler() if compiler.shutil.which("c++") else pytest.skip("c++ is not installed")
    message = ends_with(run, CXX="c++", **{variable: value})
    assert f"(CXX='c++', {variable}={value!r}): " in message
    assert reason in message.split(": ", 2)[2].split("Change these")[0]


def test_the_real_compiler_serves(run):
    compiler.choose_compiler() if compiler.shutil.which("c++") else pytest.skip("c++ is not installed")
    assert run(CXX="", CFLAGS="-Wall -std=c++11")["ext_modules"]


@pytest.mark.parametrize("variable", ["CXX", "CFLAGS", "LDFLAGS"])
def test_an_open_quote(run, variable):
    assert f"{variable} must be words as a shell reads them, got" in ends_with(run, **{variable: "g++ 'x"})


def test_a_compilation_that_fails_ends_in_one_line(run):
    build = run()["cmdclass"]["build_ext"](setuptools.Distribution())
    with (
        mock.patch.object(
            cpp_extension.BuildExtension, "build_extensions", side_effect=RuntimeError("Error compiling")
        ),
        pytest.raises(SystemExit, match=r"^vvae_fast: compiling failed \(Error compiling\) with CXX=.*MAX_JOBS=1$"),
    ):
        build.build_extensions()


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"setuptools": "68.2.2", "pybind11": "3.0"}, "setuptools 68.2.2 is older than 77"),
        ({"setuptools": "77.0.1"}, "pybind11 is missing"),
        ({"setuptools": "80", "pybind11": "2.9.1"}, "pybind11 2.9.1 is older than 2.13"),
    ],
)
def test_without_isolation_the_tools_are_asked_for(run, monkeypatch, versions, reason):
    def version(name: str) -> str:
        if name not in versions:
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    message = ends_with(run)
    assert message == (
        f"vvae_fast: without isolation the build needs its tools: {reason}. "
        "Run: pip install 'setuptools>=77' ninja 'pybind11>=2.13'"
    )


def test_ninja_is_found_beside_the_interpreter(run, monkeypatch, tmp_path):
    scripts, nothing = tmp_path / "scripts", str(tmp_path / "nothing")
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(scripts if name == "scripts" else tmp_path))
    assert "ninja, which runs the compilers, is missing. Run: pip install" in ends_with(run, PATH=nothing)
    scripts.mkdir()
    fake_compiler(scripts / "ninja")
    run(PATH=nothing)
    assert os.environ["PATH"].split(os.pathsep) == [str(scripts), nothing]  # where torch looks for it


def test_a_folder_that_cannot_be_written(run, monkeypatch, tmp_path):
    closed = ROOT
    monkeypatch.setattr(environment.os, "access", lambda path, mode: Path(path) != closed)
    assert f"and {ROOT} is not writable. Copy the source to a folder of yours" in ends_with(run)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    closed = tmp_path / "build" / "temp"
    closed.mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"and {closed} is not writable. An earlier build by another user left it"):
        environment.check_folder()
