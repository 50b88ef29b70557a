"""Runs other packages' own tests of these flows with this package's classes, and explains the failures.

    python -m benchmarks.other_packages.peers_tests [FILE or FOLDER ...]

For each package it takes the test file in the paths, such as a checkout of its repository, or else the file installed
with the package (normflows has one). A table says what ran. EXPLAINED has the reasons of known failures. The exit code
is 1 if a failure has no reason, and 2 if a path holds none of the files.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Peer(NamedTuple):
    """A file of tests: its name, what its text holds, and which of its tests concern these flows."""

    package: str  # its name in the plugin
    module: str  # as it is imported
    file: str
    text: str
    select: str = ""
    above: int = 0  # the file's imports start so many folders above its own

    def is_in(self, path: Path) -> bool:
        return path.name == self.file and re.search(self.text, path.read_text(errors="replace")) is not None


PEERS = (
    Peer("normflows", "normflows", "planar_test.py", r"normflows"),
    Peer("pythae", "pythae", "test_planar_flow.py", r"pythae"),
    Peer("pythae", "pythae", "test_VAE_LinFlow.py", r"pythae", "not Generation"),  # those tests run no flow
    Peer("pyro", "pyro", "test_transforms.py", r"import pyro", "planar or householder or sylvester", above=2),
    Peer("pytorch", "torch", "test_transforms.py", r"from torch\.distributions\.transforms import", "PlanarTransform"),
)


class Reason(NamedTuple):
    """Why tests fail. The patterns match a test's identifier, without folders and file, and its message."""

    package: str
    test: str
    message: str
    why: str


EXPLAINED = (
    Reason(
        "pythae",
        r"test_(interpolate|reconstruct)\[model_configs0-demo_data[01]\]",
        r"RuntimeError: all elements of target should be between 0 and 1",
        "fails with pythae's own layers too: the data are normal draws, and the likelihood asks for 0 to 1",
    ),
    Reason(
        "pytorch",
        r"test_forward_inverse\[True-PlanarTransform\(cache_size=0\)",
        r"NotImplementedError: constraint must be .* to invert, got \"none\"",
        'constraint="none" guarantees no inverse, and without a cache none is known',
    ),
)


def find(peer: Peer, paths: list[Path]) -> Path | None:
    """The peer's file: one of the paths, in a folder of them, or installed."""
    for path in paths:
        for candidate in [path] if path.is_file() else sorted(path.rglob(peer.file)):
            if peer.is_in(candidate):
                return candidate.resolve()
    spec = importlib.util.find_spec(peer.module)
    for folder in spec.submodule_search_locations or () if spec else ():
        for candidate in sorted(Path(folder).rglob(peer.file)):
            if peer.is_in(candidate):
                return candidate
    return None


def run(peer: Peer, file: Path) -> dict[str, dict[str, str]]:
    """The outcome and the message of each of the file's tests. Raises RuntimeError if pytest runs none of them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"peer": peer.package, "root": str(file.parents[peer.above]), "outcomes": f"{folder}/outcomes.json"}
        Path(folder, "pytest.ini").write_text("[pytest]\n")  # without the peer's options and without ours
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        conftest = file.parent / "conftest.py"
        slow = ["--runslow"] if conftest.is_file() and "--runslow" in conftest.read_text() else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(file),
            "-p",
            "benchmarks.other_packages.peers_plugin",
            "-q",
            "--import-mode=importlib",
        ]
        command += ["-c", f"{folder}/pytest.ini", "-p", "no:cacheprovider", *slow]
        command += ["-k", peer.select] if peer.select else []
        environment = os.environ | {"PYTHONPATH": path, "PEERS_TESTS": json.dumps(settings)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1, 2):
            raise RuntimeError(f"pytest ended with {done.returncode} on {file}:\n{done.stdout}{done.stderr}")
        return json.loads(Path(settings["outcomes"]).read_text())


def reason(package: str, test: str, message: str) -> str | None:
    """Why the test fails; None if no entry explains it."""
    for entry in EXPLAINED:
        if entry.package == package and re.search(entry.test, test) and re.search(entry.message, message):
            return entry.why
    return None


def failures(outcomes: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    """The identifier, without folders and files, and the message of each test that failed."""
    failed = {test: result["message"] for test, result in outcomes.items() if result["outcome"] == "failed"}
    return [(test.split("::", 1)[-1], message) for test, message in failed.items()]


def lines(peer: Peer, outcomes: dict[str, dict[str, str]]) -> Iterator[str]:
    """The peer's row of the table, and a row for each failure."""
    counts = {kind: [t["outcome"] for t in outcomes.values()].count(kind) for kind in ("passed", "failed", "skipped")}
    yield ROW.format(peer.package, peer.file, len(outcomes) - counts["skipped"], *counts.values())
    for test, message in failures(outcomes):
        yield f"    {test}: {reason(peer.package, test, message) or f'UNEXPLAINED: {message}'}"


ROW = "{:<10} {:<22} {:>5} {:>7} {:>7} {:>8}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders of the packages' tests")
    paths = parser.parse_args(arguments).paths
    files = {peer: find(peer, paths) for peer in PEERS}
    for path in paths:
        if not path.exists() or not any(f and f.is_relative_to(path.resolve()) for f in files.values()):
            print(f"{path}: none of {', '.join(sorted({peer.file for peer in PEERS}))} there", file=sys.stderr)
            return 2
    print(ROW.format("package", "file", "run", "passed", "failed", "skipped"))
    unexplained = 0
    for peer, file in files.items():
        if file is None:
            print(f"{peer.package:<10} {peer.file:<22} not found: give its path, or that of a checkout")
            continue
        outcomes = run(peer, file)
        print(*lines(peer, outcomes), sep="\n", flush=True)
        unexplained += sum(reason(peer.package, *failure) is None for failure in failures(outcomes)) + (not outcomes)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
