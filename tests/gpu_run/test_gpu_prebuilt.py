"""Extensions that were built before, on stand-ins: taken where their record fits, refused by name where it does not."""

import json
import subprocess

import pytest
import torch

from benchmarks.gpu import gpu_steps, prebuilt


@pytest.fixture
def root(tmp_path):
    """A checkout with both extensions and the record of their build."""
    for name in (*prebuilt.SOURCES[2:], "csrc/cpu/a.cpp", "csrc/a.h", "build_tools/cuda.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text of {name}")
    for path in prebuilt.extensions(tmp_path):
        path.write_bytes(b"machine code")
    prebuilt.write("9.0", tmp_path)
    return tmp_path


def record_of(root):
    return root / "vvae_fast" / prebuilt.RECORD


def change(root, **values):
    """The record as another build would have written it."""
    record_of(root).write_text(json.dumps(json.loads(record_of(root).read_text()) | values))


def test_what_fits_is_taken(root):
    assert prebuilt.misfit("9.0", root) is None
    (root / "csrc" / "__pycache__").mkdir()
    (root / "csrc" / "__pycache__" / "x.pyc").write_text("")
    (root / "vvae_fast" / "other.py").write_text("")
    assert prebuilt.misfit("9.0", root) is None
    prebuilt.write("8.0;9.0+PTX", root)
    assert prebuilt.misfit("9.0", root) is None
    assert prebuilt.misfit("8.0", root) is None


@pytest.mark.parametrize("name", ["csrc/cpu/a.cpp", "csrc/a.h", "build_tools/cuda.py", "setup.py", "csrc/new.cu"])
def test_other_sources_are_named(root, name):
    (root / name).write_text("another text")
    assert prebuilt.misfit("9.0", root) == "other sources: they have changed"


def test_a_source_that_is_gone_or_has_another_name_is_another_one(root):
    (root / "csrc" / "a.h").rename(root / "csrc" / "b.h")
    assert prebuilt.misfit("9.0", root) == "other sources: they have changed"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"Python": "cpython-309-x86_64-linux-gnu"}, "other Python: cpython-309-x86_64-linux-gnu, here "),
        ({"torch": "2.11.0+cu130"}, f"other torch: 2.11.0+cu130, here {torch.__version__}"),
        ({"torch": ""}, "other torch: , here "),
        ({"architectures": "8.0;8.6"}, "other architectures: 8.0;8.6, here 9.0"),
        ({"architectures": ""}, "other architectures: , here 9.0"),
        ({"extensions": "00"}, "the extensions are not those of the record"),
        ({"sources": 1}, "vvae_fast/_built.json is no record of a build"),
    ],
)
def test_each_misfit_is_named(root, values, words):
    change(root, **values)
    assert prebuilt.misfit("9.0", root).startswith(words)


def test_a_record_that_is_missing_or_spoiled(root):
    for text, words in (("{", "is no JSON"), ("[]", "is no record of a build"), ("{}", "other Python: None, here ")):
        record_of(root).write_text(text)
        assert words in prebuilt.misfit("9.0", root)
    record_of(root).write_bytes(b"\xff\xfe")
    assert prebuilt.misfit("9.0", root) == "vvae_fast/_built.json is no JSON"
    record_of(root).unlink()
    assert prebuilt.misfit("9.0", root) == "there is no vvae_fast/_built.json"


@pytest.mark.parametrize("nth", [0, 1])
def test_an_extension_that_is_missing_or_built_since(root, nth):
    path = prebuilt.extensions(root)[nth]
    path.write_bytes(b"of a build by hand")
    assert prebuilt.misfit("9.0", root) == "the extensions are not those of the record"
    path.unlink()
    assert prebuilt.misfit("9.0", root) == f"{path.name} is missing"
    prebuilt.write("9.0", root)
    assert not record_of(root).exists()


def test_the_digest_is_of_this_checkouts_sources():
    assert all((gpu_steps.ROOT / name).exists() for name in prebuilt.SOURCES)
    assert len(prebuilt.here()["sources"]) == 64


def test_prebuilt_builds_for_the_gpu_that_is_named_and_records_it(root, monkeypatch, capsys):
    """A build that fails leaves no record of the one before."""
    commands = []

    def build(command, env=None, returncode=0, **options):
        commands.append(command)
        assert not record_of(root).exists()
        assert env is None or (env["FORCE_CUDA"], env["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(prebuilt.subprocess, "run", build)
    monkeypatch.setattr(prebuilt, "extensions", lambda root_=root, of=prebuilt.extensions: of(root))
    monkeypatch.setattr(prebuilt, "ROOT", root)
    monkeypatch.setattr(prebuilt, "write", lambda architectures, write=prebuilt.write: write(architectures, root))
    monkeypatch.setattr(prebuilt.shutil, "which", lambda program: f"/bin/{program}")
    assert prebuilt.main([]) == 0
    assert commands == [prebuilt.BUILD, ["/bin/strip", "--strip-unneeded", *prebuilt.extensions()]]
    assert "prebuilt for 9.0: stripped, 0 to 0 MB" in capsys.readouterr().out
    assert prebuilt.misfit("9.0", root) is None
    monkeypatch.setattr(prebuilt.shutil, "which", lambda program: None)
    assert prebuilt.main([]) == 0
    assert "not stripped: there is no strip" in capsys.readouterr().out
    monkeypatch.setattr(prebuilt.subprocess, "run", lambda *a, **o: build(*a, returncode=1, **o))
    assert prebuilt.main([]) == 1
    assert not record_of(root).exists()
    monkeypatch.setattr(prebuilt.subprocess, "run", build)
    prebuilt.extensions(root)[1].unlink()  # which the build goes on without
    assert prebuilt.main([]) == 1
    assert "not built, see above: _C_node" in capsys.readouterr().out
    assert not record_of(root).exists()
