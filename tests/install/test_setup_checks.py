"""What setup.py looks for before it builds: a compiler, Python's headers, its tools, a folder that it may write."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import setuptools
import torch
from setup_runs import ROOT, ends_with, environment, fake_compiler, setup_runs
from torch.utils import cpp_extension

# setup.py asks for it
pytest.importorskip("pybind11", reason="pybind11 is not installed")


@pytest.fixture
def run(monkeypatch, tmp_path):
    with setup_runs(monkeypatch, tmp_path) as run_setup:
        yield run_setup


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


def test_no_compiler_with_a_torch_for_cuda(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
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


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="c++ is not installed")


@needs_compiler
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("CFLAGS", "-march=nothing", "nothing"), ("CPPFLAGS", "-include none.h", "none.h"), ("LDFLAGS", "-lnone", "none")],
)
def test_flags_that_the_real_compiler_refuses(run, variable, value, reason):
    message = ends_with(run, CXX="c++", **{variable: value})
    assert f"(CXX='c++', {variable}={value!r}): " in message
    assert reason in message.split(": ", 2)[2].split("Change these")[0]


@needs_compiler
def test_the_real_compiler_serves(run):
    assert run(CXX="", CFLAGS="-Wall -std=c++11")["ext_modules"]


@pytest.mark.parametrize("variable", ["CXX", "CFLAGS", "LDFLAGS"])
def test_an_open_quote(run, variable):
    assert f"{variable} must be words as a shell reads them, got" in ends_with(run, **{variable: "g++ 'x"})


def test_the_node_may_fail_to_compile_and_no_other_extension(run, capsys):
    arguments = run()
    build = arguments["cmdclass"]["build_ext"](setuptools.Distribution())
    with mock.patch.object(cpp_extension.BuildExtension, "build_extension", side_effect=RuntimeError("no header")):
        for extension in arguments["ext_modules"]:
            if extension.name == "vvae_fast._C_node":
                build.build_extension(extension)
            else:
                with pytest.raises(RuntimeError, match="no header"):
                    build.build_extension(extension)
    said = "going on without vvae_fast._C_node, which did not compile (no header): small flows are slower"
    assert said in "".join(capsys.readouterr())


@needs_compiler
@pytest.mark.parametrize(("flags", "kept"), [("", False), ("-O1", False), ("-g", True), ("-O1 -ggdb3", True)])
def test_pythons_own_debug_information_is_left_out_and_that_of_cflags_kept(run, flags, kept):
    for extension in run(CXX="c++", CFLAGS=flags)["ext_modules"]:
        given = extension.extra_compile_args
        assert ("-g0" not in (given if isinstance(given, list) else given["cxx"])) == kept


def test_the_log_says_what_is_built_and_how_long_it_takes(run, capsys):
    run(NO_CUDA="1")
    assert "vvae_fast: compiling the CPU kernels, about three and a half minutes" in capsys.readouterr().err


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
