"""What tests/cuda/test_cuda_on_host.py would say of kernels that are wrong: each is found by the means named."""

import re
import shutil
from typing import NamedTuple

import cuda_host
import pytest
import torch
from cuda_host import Case, far_product, wanted_of
from problems import random_problem, relative_errors

from vvae_fast.spec import FlowSpec


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # there once
    new: str
    sources: tuple[str, ...]  # that are compiled anew
    sanitizer: str
    caught: str  # what is said of it: a part of a report, or of what check() says


MUTANTS = [
    Mutant(
        "a block sums over rows that its warps still write",
        "shared_backward.cu",
        "      __syncthreads();\n      T* partial =",
        "      T* partial =",
        ("shared_backward.cu",),
        "thread",
        "data race",
    ),
    Mutant(
        "a warp reads h before its lanes have written it",
        "shared_backward.cu",
        "  __syncwarp();\n  for (int i = 0; i < count; ++i) at.z = add(",
        "  for (int i = 0; i < count; ++i) at.z = add(",
        ("shared_backward.cu",),
        "thread",
        "data race",
    ),
    Mutant(
        "steps are staged while others still read those before",
        "compact_forward.cu",
        "        __syncthreads();  // the chunk before is done with\n",
        "",
        ("compact_forward.cu",),
        "thread",
        "data race",
    ),
    Mutant(
        "a vector of four at the wrong lane's columns",
        "row.cuh",
        "return 4 * (v * Layout::lanes + lane_of_row<Layout>());",
        "return 4 * (v * Layout::lanes + lane_of_row<Layout>()) + 1;",
        ("shared_forward.cu",),
        "address",
        "misaligned address",
    ),
    Mutant(
        "a block asks for less memory than it uses",
        "shared_forward.cu",
        "staged * Staged<T, L>::bytes_of_step, stream",
        "staged * Staged<T, L>::bytes_of_step - 32, stream",
        ("shared_forward.cu",),
        "address",
        "heap-buffer-overflow",
    ),
    Mutant(
        "a column more than a row has",
        "row.cuh",
        "if (first + i < dim) raw.four[v].set(i,",
        "if (first + i <= dim) raw.four[v].set(i,",
        ("amortized_forward.cu",),
        "address",
        "heap-buffer-overflow",
    ),
    Mutant(
        "the gradient of the step beside",
        "finish.cu",
        "p.to.db_of(set, step)",
        "p.to.db_of(set, (step + 1) % steps)",
        ("finish.cu",),
        "plain",
        "wrong",
    ),
    Mutant(
        "two programs add into one's memory",
        "shared_backward.cu",
        "partial_of(p.partials, program,",
        "partial_of(p.partials, program / 2,",
        ("shared_backward.cu",),
        "plain",
        "two blocks write workspace",
    ),
    Mutant(
        "the last row is left out",
        "stage.cuh",
        "const bool inside = group < p.split.block_rows && first_row + group < p.split.rows_per_set;",
        "const bool inside = group < p.split.block_rows && first_row + group + 1 < p.split.rows_per_set;",
        ("shared_forward.cu",),
        "plain",
        "never written",
    ),
    Mutant(
        "the inverse stages steps while others still read those behind",
        "stage.cuh",
        "          if (!fresh) __syncthreads();  // the steps before are done with\n",
        "",
        ("shared_inverse.cu",),
        "thread",
        "data race",
    ),
    Mutant(
        "the inverse's backward with the pre-activation of another step",
        "views.cuh",
        "a(taken<const compute_t<S>>(f.a, f).data)",
        "a(taken<const compute_t<S>>(f.a, f).data - (f.inverse ? f.rows : 0))",
        ("amortized_backward.cu",),
        "plain",
        "wrong",
    ),
    Mutant(
        "the z that was kept for the step after",
        "amortized_backward.cu",
        "z = load_row<Layout>(Rows<T>{kept(k), 1,",
        "z = load_row<Layout>(Rows<T>{kept(k + 1 < steps ? k + 1 : k), 1,",
        ("amortized_backward.cu",),
        "plain",
        "wrong",
    ),
    Mutant(
        "the z that was kept for another chunk",
        "shared_backward.cu",
        "first > 0 ? load_row<Layout>(Rows<T>{kept(first), 1,",
        "first > 0 ? load_row<Layout>(Rows<T>{kept(p.chunk), 1,",
        ("shared_backward.cu",),
        "plain",
        "wrong",
    ),
    Mutant(
        "nobody asks whether a chunk's product left its range",
        "compact_forward.cu",
        "outside |= L::outside(product.high);",
        "",
        ("compact_forward.cu",),
        "plain",
        "wrong",
    ),
    Mutant(
        "a program keeps its z where another one does",
        "compact_backward.cu",
        "return p.kept.of(program * p.sets + set, nth,",
        "return p.kept.of(program / 2 * p.sets + set, nth,",
        ("compact_backward.cu",),
        "plain",
        "two blocks write workspace",
    ),
    Mutant(
        "another activation taken for tanh",
        "views.cuh",
        "activation(F::of(p.spec))",
        "activation(F::of({}))",
        ("shared_backward.cu",),
        "plain",
        "wrong",
    ),
]


def cases() -> list[Case]:
    """Few: rows for several blocks in several turns, and several chunks of steps."""
    problems = [
        (random_problem((100,), 20, 13, scale=0.5), "direct"),
        (random_problem((3, 5), 4, 13, (5,), scale=0.5), "direct"),
        (random_problem((15,), 18, 600, scale=0.5), "direct"),
        (random_problem((200,), 36, 60, scale=0.5), "compact"),
        (random_problem((33,), 70, 100, scale=0.5), "compact"),
        (far_product(), "compact"),
    ]
    cases = [Case(p, form=form) for p, form in problems]
    for formulas in FlowSpec(), FlowSpec(activation="sigmoid"):
        cases += [Case(problems[i][0], formulas, inverse=True) for i in (1, 2)]
    return [*cases, Case(problems[0][0], FlowSpec(activation="sigmoid"))]


def build(mutant: Mutant, folder) -> object:
    """The program with the mutated sources compiled anew, for few layouts and float32 alone."""
    original = cuda_host.program(mutant.sanitizer)
    csrc = folder / "csrc"
    shutil.copytree(original.parent / "csrc", csrc)
    (mutated,) = (csrc / "cuda").rglob(mutant.file)
    cuda_host.replace(mutated, re.escape(mutant.old), mutant.new)
    dispatch = csrc / "cuda" / "dispatch.cuh"
    dispatch.write_text(re.sub(r"^ *if \(dim <= (?!16\)).*\n", "", dispatch.read_text(), flags=re.MULTILINE))
    cuda_host.keep_dtypes(csrc, (torch.float32,))
    objects = []
    for path in original.parent.glob("*.o"):
        if f"{path.stem}.cu" in mutant.sources:
            (source,) = (csrc / "cuda").rglob(f"{path.stem}.cu")
            path = folder / path.name
            cuda_host.run_commands([cuda_host.compiling(source, csrc, path, mutant.sanitizer)])
        objects.append(path)
    cuda_host.run_commands([cuda_host.linking(objects, folder / "run", mutant.sanitizer)])
    return folder / "run"


def said_of(program) -> str:
    done = cuda_host.run(program, cases())
    said = [done.report]
    for case, answer in zip(cases(), done.answers, strict=False):
        errors = relative_errors(answer.tensors, wanted_of(case))
        said += [answer.error, "wrong" if max(errors) > 2e-5 else ""]
    return "\n".join(filter(None, said))


each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])


@each_mutant
def test_each_fault_on_purpose_is_one_change(mutant):
    (path,) = (cuda_host.CSRC / "cuda").rglob(mutant.file)
    assert path.read_text().count(mutant.old) == 1


@pytest.mark.long
@each_mutant
def test_a_wrong_kernel_is_found(mutant, tmp_path):
    program = build(mutant, tmp_path)
    said = said_of(program)
    shutil.rmtree(tmp_path)
    assert mutant.caught in said


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", cuda_host.SANITIZERS)
def test_the_right_kernels_are_not(sanitizer):
    assert said_of(cuda_host.program(sanitizer)) == ""
