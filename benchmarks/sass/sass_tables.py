"""`make sass`: compiles every CUDA kernel and every Triton kernel for sm_90, without a GPU, and writes their costs into
sass_cuda.txt and sass_triton.txt. CONTRIBUTING.md explains the columns. The tests that compile the kernels compare with
these tables.

    python -m benchmarks.sass.sass_tables [cuda | triton]    # both by default; the CUDA kernels take nvcc eight minutes
"""

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.sass import sass_report
from benchmarks.sass.sass_report import ARCH, LOOPS, TABLES, TRITON_LOOPS, Row


def rows_of_objects(folder: Path, tools: dict[str, Path], wanted: re.Pattern[str] | None = None) -> list[Row]:
    """The rows of nvcc's object files in the folder; `wanted` as in rows_of_cubin."""
    objects = sorted(path.resolve() for path in folder.glob("*.o"))

    def rows(path: Path) -> list[Row]:
        with tempfile.TemporaryDirectory() as cubins:
            subprocess.run([tools["cuobjdump"], "-xelf", ARCH, path], cwd=cubins, capture_output=True, check=True)
            found = [sass_report.rows_of_cubin(cubin, tools, LOOPS, wanted) for cubin in Path(cubins).glob("*.cubin")]
            return [row for of_cubin in found for row in of_cubin]

    with ThreadPoolExecutor(2) as pool:
        return [row for of_object in pool.map(rows, objects) for row in of_object]


def rows_of_launches(launches: list[dict], folder: Path, tools: dict[str, Path]) -> list[Row]:
    """The rows of the files that compile_kernels.py wrote into the folder; launches of the same code are read once."""
    of_code: dict[str, list[Row]] = {}
    rows, seen = [], {}
    for launch in launches:
        cubin = folder / launch["cubin"]
        digest = hashlib.sha256(cubin.read_bytes()).hexdigest()
        if digest not in of_code:
            of_code[digest] = sass_report.rows_of_cubin(cubin, tools, TRITON_LOOPS)
        form, size, dim, steps, sets, dtype, *formulas = launch["case"]
        problem = ", ".join([f"{form} {size}x{dim}", f"K={steps}", f"sets={sets}", dtype, *map(str, formulas)])
        name = f"{launch['kernel']}<{problem}>"
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:  # a problem that launches a kernel several times
            name += f" #{seen[name]}"
        rows += [row._replace(kernel=name, shared=launch["shared"]) for row in of_code[digest]]
    return rows


def versions(table: str, tools: dict[str, Path]) -> dict[str, str]:
    """The versions of the programs that the figures depend on."""
    if table == "cuda":
        compiler = {"nvcc": sass_report.version_of("nvcc")}
    else:
        compiler = {"triton": importlib.metadata.version("triton")}
    return compiler | {name: sass_report.version_of(path) for name, path in sorted(tools.items())}


def main(tables: list[str]) -> None:
    sys.path += [str(room) for room in (Path(__file__).resolve().parents[2] / "tests").iterdir()]  # what compiles them
    import compiled

    tools = sass_report.disassembler()
    if tools is None:
        raise SystemExit("make sass needs cuobjdump and nvdisasm: Triton brings them, and so does the CUDA toolkit")
    for table in tables:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if table == "cuda":
                found = compiled.compile_cuda(folder, compiled.ALL_DTYPES_OF)
                if spilled := [entry for entry in found if entry.spills]:
                    raise SystemExit("\n".join(["these kernels spill:", *map(str, spilled)]))
                rows = rows_of_objects(folder / ARCH, tools)
            else:
                import triton_cases

                cases = [case for case in triton_cases.cases(ARCH) if triton_cases.of_report(case)]
                launches = compiled.compile_triton(ARCH, cases, folder)
                rows = rows_of_launches(launches, folder, tools)
        text = sass_report.text_of(rows, versions(table, tools))
        if TABLES[table].exists():
            before, _ = sass_report.read(TABLES[table].read_text())
            print("\n".join(sass_report.worse(rows, before)))
        TABLES[table].write_text(text)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TABLES))
