"""The cost of each kernel by its machine code for sm_90, without a GPU: makes the rows of sass_cuda.txt and
sass_triton.txt from cubins, and compares them. `make sass` writes the tables (sass_tables.py); the tests that compile
the kernels compare. CONTRIBUTING.md explains the columns.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks.sass import sass, sass_walk

HERE = Path(__file__).resolve().parent
TABLES = {"cuda": HERE / "sass_cuda.txt", "triton": HERE / "sass_triton.txt"}
ARCH = "sm_90"
WORSE = 1.05  # a figure may grow by this factor before the table must be written again
STEPS_OF_CHUNK = 16
NONE, UNREAD = "-", "?"  # a kernel without such a loop; one whose code was not read
# The kernels of nearly every call.
USUAL = re.compile(r".*<((Layout|Tiles)<\d+, \d+>, )?float(, StandardFlow(, false)?)?>")
RESERVED = 1024  # bytes of each block's shared memory that the system uses on sm_90


class Signature(NamedTuple):
    """Identifies a kernel's loop over steps: the longest of the loops that have these instructions, not counting those
    of
    inner loops. With several names, the next name is the next longest loop."""

    names: tuple[str, ...]
    has: str  # opcodes; "-" marks those that the loop must not have
    steps: int = 1  # in a turn
    once: str = ""  # if turns are unrolled: an opcode that occurs once in each usual step
    in_inverse: int = 1  # how often `once` occurs in a step of the kernel's inverse


LOOPS = {
    "shared_forward_kernel": Signature(("steps",), "LDS MUFU -LDG -BAR", once="STG"),
    "shared_inverse_kernel": Signature(("steps",), "LDS MUFU -LDG -BAR", once="STG"),
    "shared_backward_kernel": Signature(("steps",), "LDS STS -MUFU -LDG -STG -BAR", once="STS", in_inverse=2),
    "amortized_forward_kernel": Signature(("steps",), "LDG MUFU STG", once="STG"),
    "amortized_backward_kernel": Signature(("steps", "again"), "LDG MUFU STG"),
    "compact_forward_kernel": Signature(("chunks",), "HMMA MUFU BAR", STEPS_OF_CHUNK),
    "compact_backward_kernel": Signature(("chunks", "again"), "HMMA MUFU BAR", STEPS_OF_CHUNK),
}
TRITON_LOOPS = {
    "direct_forward_kernel": Signature(("steps",), "MUFU"),
    "direct_backward_kernel": Signature(("steps", "again"), "MUFU"),
    "add_partials_kernel": Signature(("sums",), "LDG"),
    "compact_forward_kernel": Signature(("chunks",), "MUFU", STEPS_OF_CHUNK),
    "compact_backward_kernel": Signature(("chunks",), "MUFU", STEPS_OF_CHUNK),
    "compact_gradients_kernel": Signature(("rows",), "MUFU"),
    "sylvester_forward_kernel": Signature(("layers",), "MUFU"),
    "sylvester_inverse_kernel": Signature(("units",), "MUFU"),
    "sylvester_passed_kernel": Signature(("layers",), "MUFU"),
    "sylvester_backward_kernel": Signature(("layers",), "MUFU"),
    "sylvester_inverse_backward_kernel": Signature(("layers",), "MUFU"),
    "sylvester_products_kernel": Signature(("rows",), "HMMA"),
    "sylvester_sums_kernel": Signature(("rows",), "LDG"),
}


class Row(NamedTuple):
    registers: int
    spilled: int  # bytes of a thread in memory
    shared: int  # bytes of a block that are known at compile time
    divergent: int  # branches for diverged lanes at a shuffle, in the loop
    elsewhere: int  # the same in the rest of the kernel
    steps: int  # in a turn of the loop
    instructions: int  # in the loop, including rare paths
    usual: int  # instructions on the usual path of one turn
    cycles: int  # of a turn, see sass_walk.py
    chain: int
    loop: str  # what the loop goes over; with NONE or UNREAD all figures of the loop are 0
    kernel: str  # with its arguments

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.loop}"


_HEADINGS = ("regs", "spill", "shared", "div", "other", "steps", "instr", "usual", "cycles", "chain", "loop", "kernel")
HEADINGS = dict(zip(Row._fields, _HEADINGS, strict=True))
NEVER_MORE = ("spilled", "divergent", "elsewhere")
HARDLY_MORE = ("registers", "shared")
HARDLY_MORE_A_STEP = ("instructions", "usual", "cycles", "chain")


def disassembler() -> dict[str, Path] | None:
    """cuobjdump and nvdisasm: those of Triton, whose version is pinned, or those on PATH."""
    triton = importlib.util.find_spec("triton")  # importing it takes a second
    folder = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin") if triton else None
    found = {name: shutil.which(name, path=folder) or shutil.which(name) for name in ("cuobjdump", "nvdisasm")}
    return {name: Path(path) for name, path in found.items()} if all(found.values()) else None


def version_of(program: str | Path) -> str:
    """The version of one of CUDA's programs, such as "V13.0.88"."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV\d+\.\d+\.\d+", said)[0]


def readable(names: list[str]) -> list[str]:
    """C++ names without their namespaces, results and parameters: kernel<Layout<4, 3>, float, StandardFlow>."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"(vvae|cuda|\(anonymous namespace\))::", "", name) for name in said.splitlines()]
    return [re.sub(r"^void ", "", name).split(">(")[0] + ">" if "<" in name else name for name in short]


def resources(cubin: Path, tools: dict[str, Path]) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled and shared bytes of each kernel, by its mangled name."""
    said = subprocess.run([tools["cuobjdump"], "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for name, usage in re.findall(r"Function (\S+?):?\s+(REG:.*)", said):
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        found[name] = (number["REG"], number["STACK"] + number["LOCAL"], max(0, number["SHARED"] - RESERVED))
    return found


def _has(own: list[sass.Instruction], signature: Signature) -> bool:
    kinds = {one.kind for one in own}
    wanted = signature.has.split()
    return all((kind[1:] not in kinds) if kind[0] == "-" else (kind in kinds) for kind in wanted)


def loops_over_steps(kernel: sass.Kernel, signature: Signature) -> list[tuple[str, sass.Loop]]:
    """The kernel's loops over steps, each with what it goes over."""
    found = [loop for loop in kernel.loops if _has(kernel.own(loop), signature)]
    found.sort(key=lambda loop: -len(kernel.own(loop)))
    return list(zip(signature.names, found, strict=False))


def _divergent(instructions: list[sass.Instruction]) -> int:
    return sum(one.opcode == "BRA.DIV" for one in instructions)


def rows_of(kernel: sass.Kernel, name: str, used: tuple[int, int, int], signatures: dict[str, Signature]) -> list[Row]:
    """A row for each loop, or one row without a loop."""
    signature = signatures.get(re.match(r"\w+", name)[0])
    loops = loops_over_steps(kernel, signature) if signature else []
    if not loops:
        return [Row(*used, 0, _divergent(kernel.instructions), 0, 0, 0, 0, 0, NONE, name)]
    rows = []
    for over, loop in loops:
        own = kernel.own(loop)
        turn = sass_walk.walk(kernel, loop)
        divergent = _divergent(own)
        elsewhere = _divergent(kernel.instructions) - divergent
        once = sum(one.kind == signature.once for one in sass_walk.usual_way(kernel, loop))
        steps = max(signature.steps, once // (signature.in_inverse if name.endswith(", true>") else 1))
        figures = (len(own), turn.instructions, turn.in_order, turn.chain)
        rows.append(Row(*used, divergent, elsewhere, steps, *figures, over, name))
    return rows


def _numbers_of(cubin: Path, names: list[str]) -> str:
    """The kernels' indices in the symbol table, in nvdisasm's format."""
    said = subprocess.run(["readelf", "-sW", cubin], capture_output=True, text=True, check=True).stdout
    functions = [line.split() for line in said.splitlines() if " FUNC " in line]
    symbols = {words[-1]: words[0].rstrip(":") for words in functions}
    return ",".join(symbols[name] for name in names)


def rows_of_cubin(
    cubin: Path, tools: dict[str, Path], signatures: dict[str, Signature], wanted: re.Pattern[str] | None = None
) -> list[Row]:
    """The rows of a cubin. Kernels whose names are not `wanted` stay UNREAD: disassembling takes most of the time."""
    used = resources(cubin, tools)
    names = dict(zip(used, readable(list(used)), strict=True))
    read = [name for name in used if wanted is None or wanted.fullmatch(names[name])]
    rows = [Row(*used[name], 0, 0, 0, 0, 0, 0, 0, UNREAD, names[name]) for name in used if name not in read]
    if not read:
        return rows
    command = [tools["nvdisasm"], "-c", *(["-fun", _numbers_of(cubin, read)] if rows else []), cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kernel in sass.parse(text):
        if kernel.name in read:
            rows += rows_of(kernel, names[kernel.name], used[kernel.name], signatures)
    return rows


def text_of(rows: list[Row], versions: dict[str, str]) -> str:
    """The table; a line stays the same unless its own figures change."""
    lines = [f"# {name} {version}" for name, version in versions.items()]
    lines.append(" ".join(f"{HEADINGS[key]:>6}" for key in Row._fields[:-1]) + " " + HEADINGS["kernel"])
    for row in sorted(rows, key=lambda row: (row.kernel, row.loop)):
        lines.append(" ".join(f"{value:>6}" for value in row[:-1]) + " " + row.kernel)
    return "\n".join(lines) + "\n"


def read(text: str) -> tuple[list[Row], dict[str, str]]:
    lines = text.splitlines()
    versions = dict(line[2:].rsplit(" ", 1) for line in lines if line.startswith("# "))
    rows = []
    for line in lines[len(versions) + 1 :]:
        *figures, loop, kernel = line.split(maxsplit=len(Row._fields) - 1)
        rows.append(Row(*map(int, figures), loop, kernel))
    return rows, versions


def worse(rows: list[Row], table: list[Row]) -> list[str]:
    """Costs above those of the table, and kernels that only one side has; empty if the table still holds."""
    now, then = ({row.kernel for row in some} for some in (rows, table))
    said = [f"{kernel} is not in the table" for kernel in sorted(now - then)]
    said += [f"{kernel} is in the table and was not compiled" for kernel in sorted(then - now)]
    of_kernel, of_loop = {row.kernel: row for row in table}, {row.name: row for row in table}
    for row in rows:
        old = of_kernel.get(row.kernel) if row.loop == UNREAD else of_loop.get(row.name)
        if old is None:
            said += [f"{row.name}: no such loop in the table"] if row.kernel in then else []
            continue
        figures = [(key, 1, 1) for key in ("spilled", *HARDLY_MORE)]
        if row.loop != UNREAD:
            figures += [(key, 1, 1) for key in ("divergent", "elsewhere")]
            figures += [(key, max(row.steps, 1), max(old.steps, 1)) for key in HARDLY_MORE_A_STEP]
        for key, steps, steps_then in figures:
            new, before = getattr(row, key) / steps, getattr(old, key) / steps_then
            if new > before * (1.0 if key in NEVER_MORE else WORSE):
                said.append(f"{row.name}: {HEADINGS[key]} {before:g} -> {new:g}")
    return said
