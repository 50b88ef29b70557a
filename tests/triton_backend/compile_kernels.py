"""Compiles what the Triton launchers would launch, for a GPU that is not here, and reads registers and spills.

    python tests/triton_backend/compile_kernels.py TARGET CASES [FOLDER]  # both JSON; prints one JSON line a kernel

FOLDER gets NVIDIA's machine code, a file for each line, whose name is in it. A process of its own: where Triton
interprets, its kernels cannot be compiled. Used by compiled.py.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, not what is installed

from vvae_fast.spec import FlowSpec
from vvae_fast.triton import _heuristics, direct_backward, launch, planar
from vvae_fast.triton.sylvester import operators as sylvester

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(kernel, args: tuple) -> ASTSource:
    """The kernel with Triton's own specialization: 1 is a constant, what 16 divides is known to be."""
    signature, constexprs, attributes = {}, {}, {}
    for i, arg in enumerate(args):
        parameter = kernel.params[i]
        if parameter.is_constexpr:
            signature[parameter.name], divisible = "constexpr", False
            constexprs[parameter.name] = arg
        elif isinstance(arg, torch.Tensor):
            signature[parameter.name] = TYPES[arg.dtype]
            divisible = True
        elif arg == 1 and not parameter.do_not_specialize:
            signature[parameter.name], divisible = "constexpr", False
            constexprs[parameter.name] = 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= arg < 2**31 else "i64"
            divisible = arg % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def resources(compiled) -> dict[str, int]:
    """Registers and spilled bytes a thread, from the machine code."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        return {"registers": registers, "spilled": stack + local}
    text = compiled.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": registers, "spilled": spilled}


def record(form: str, rows: int, dim: int, num_steps: int, num_sets: int, dtype: str, *formulas) -> list[tuple]:
    """What forward and backward of one problem launch in the form "direct" or "compact"; for "inverse" what the inverse
    and its backward do, which are direct. `formulas` are those of `FlowSpec`. "sylvester" and "sylvester_inverse" have
    L layers for K, and M and the kind in place of the formulas."""
    _heuristics.is_compact = lambda *problem: form == "compact"
    found = []
    launch.Launch.__call__ = lambda of, *tensors: found.append((of.kernel, (*tensors, *of.arguments), of.options))
    if form.startswith("sylvester"):
        run_sylvester(form, rows, dim, num_steps, num_sets, dtype, *formulas)
        return found
    sets = (num_sets,) if num_sets > 1 else ()
    new = {"dtype": getattr(torch, dtype), "device": "meta"}
    z, u, b = (
        torch.empty(rows, dim, **new),
        torch.empty(*sets, num_steps, dim, **new),
        torch.empty(*sets, num_steps, **new),
    )
    formulas = FlowSpec(*formulas)
    if form == "inverse":
        z_0, log_det, a = planar.planar_inverse(z, u, u, b, formulas, True)
        planar.planar_inverse_backward(z_0, log_det, z, u, u, b, a, formulas)
        return found
    z_K, log_det, a = planar.planar_forward(z, u, u, b, formulas, True)
    planar.planar_backward(z_K, log_det, z, u, u, b, a, formulas)
    return found


def run_sylvester(
    form: str, rows: int, dim: int, layers: int, num_sets: int, dtype: str, units: int, kind: str
) -> None:
    """A Sylvester flow, or its inverse, and the backward; `kind` is "orthogonal", "triangular" or "packed", which is
    orthogonal with packed parameters."""
    new = {"dtype": getattr(torch, dtype), "device": "meta"}
    z, vector = torch.empty(rows, dim, **new), torch.empty(num_sets, layers, units, **new)
    square = torch.empty(num_sets, layers, units, units, **new)
    columns = None if kind == "triangular" else torch.empty(num_sets, layers, units, dim, **new)
    params = columns, square, None if kind == "packed" else square, vector, vector, vector, vector
    there, back = sylvester.sylvester_forward, sylvester.sylvester_backward
    if form == "sylvester_inverse":
        there, back = sylvester.sylvester_inverse, sylvester.sylvester_inverse_backward
    z_out, log_det, saved = there(z, *params, 0, 0.2, True)
    back(z_out, log_det, z, *params, saved, 0, 0.2)


def main(target: list, cases: list, folder: Path | None) -> None:
    amd = target[0] == "hip"
    launch.AMD, direct_backward.BARRIER_ORDERS_MEMORY = amd, not amd  # what the launchers go by
    for case in cases:
        for kernel, args, chosen in record(*case):
            start = time.perf_counter()
            compiled = triton.compile(source(kernel, args), target=GPUTarget(*target), options=chosen)
            row = {"kernel": kernel.__name__, "case": case, "num_warps": chosen["num_warps"], **resources(compiled)}
            row |= {"shared": compiled.metadata.shared, "seconds": round(time.perf_counter() - start, 2)}
            if folder and "cubin" in compiled.asm:
                row["cubin"] = f"{len(list(folder.iterdir()))}.cubin"
                (folder / row["cubin"]).write_bytes(compiled.asm["cubin"])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
