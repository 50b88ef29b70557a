"""The CUDA kernels compile for GPUs that are not here, keep everything in registers, and cost what the table says."""

import shutil

import pytest
from compiled import DTYPES_OF, ENTRY, Compiled, compile_cuda, table_of
from cuda_host import kernel_names

from benchmarks.sass import sass_report, sass_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the object files."""
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def compiled(folder) -> list[Compiled]:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    return compile_cuda(folder)


@pytest.mark.long
def test_every_kernel_compiles_for_every_architecture(compiled):
    names = kernel_names()
    assert names
    for arch in DTYPES_OF:
        kernels = [entry.kernel for entry in compiled if entry.arch == arch]
        assert {name for name in names if any(f"::{name}" in kernel for kernel in kernels)} == names
    by_arch = {arch: {entry.kernel for entry in compiled if entry.arch == arch} for arch in DTYPES_OF}
    assert by_arch["sm_80"] < by_arch["sm_90"]


@pytest.mark.long
def test_nothing_spills(compiled):
    wrong = [entry for entry in compiled if entry.spills]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(0 < entry.registers <= 255 for entry in compiled)  # they were read


@pytest.mark.long
def test_no_kernel_costs_more_than_the_table_says(compiled, folder):
    """`make sass` makes the table anew; the figures depend on the compiler. Of seldom used kernels only what they take
    of the machine is compared: disassembling all takes a minute."""
    tools, table = table_of("cuda")
    rows = sass_tables.rows_of_objects(folder / sass_report.ARCH, tools, sass_report.USUAL)
    assert sass_report.worse(rows, table) == []


def test_entries_are_read_from_what_ptxas_says():
    """A kernel with an array indexed at run time, and one that only waits."""
    said = (
        "ptxas info    : Compiling entry function '_ZN4vvae1kEv' for 'sm_80'\n"
        "ptxas info    : Function properties for _ZN4vvae1kEv\n"
        "    512 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 512 bytes cumulative stack size, 380 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_ZN4vvae1jEv' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN4vvae1jEv\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 1 barriers\n"
    )
    found = [match.groupdict() for match in ENTRY.finditer(said)]
    assert [list(entry.values())[1:] for entry in found] == [["sm_80", "512", "16", "20", "255"], ["sm_90", *"0008"]]
