"""What of Triton is compiled for GPUs that are not here: problems that ask for every kernel the table can choose."""

import torch

from vvae_fast.triton import _table
from vvae_fast.triton.sylvester import sizes


def cases(target: str) -> list[tuple[str, int, int, int, int, str]]:
    """(form, rows, D, K, parameter sets, dtype, *formulas), such that sm_90 uses each entry of the table."""
    found = set()
    for _, parameters, block_dim in _table.DIRECT:
        sets = {"shared": 1, "amortized": _table.FEW_ROWS}[parameters]
        some = block_dim in (1, 8, 64, 256, 1024)
        if target == "sm_90" or some:
            found.add(("direct", _table.FEW_ROWS, block_dim, 16, sets, "float32"))
        if (target != "gfx942" and some) or block_dim == 64:
            found.add(("inverse", _table.FEW_ROWS, block_dim, 16, sets, "float32"))
        if target == "sm_90" or (target == "sm_80" and some):
            found.add(("direct", 2 * _table.FEW_ROWS, block_dim, 16, min(2 * sets, sets**2), "float32"))
        if target == "sm_90" and some:
            found.add(("direct", _table.FEW_ROWS, block_dim, 16, sets, "float64"))
    found |= {("direct", 128, 40, 80, 1, dtype) for dtype in ("float32", "bfloat16", "float16")}
    found |= {("direct", 300, 40, 16, 100, dtype) for dtype in ("float32", "bfloat16")}
    if target != "gfx942":  # there the compact form does not run
        found |= {("compact", rows, dim, 32, 1, "float32") for rows in (4096, 65536) for dim in (64, 500)}
    if target == "sm_90":
        found |= {("compact", 4096, 64, 32, 1, "float64"), ("compact", 4096, 500, 32, 1, "bfloat16")}
        found.add(("compact", 256, 40, 5, 4, "float32"))
        found |= {("inverse", _table.FEW_ROWS, dim, 16, sets, "float64") for dim, sets in ((64, 1), (1024, 4096))}
        found |= {("inverse", 128, 40, 16, 1, "float32", "softplus", activation) for activation in ("elu", "sigmoid")}
        others = [("log_softplus", activation, 0.2, 1e-4) for activation in ("leaky_relu", "elu", "sigmoid", "linear")]
        found |= {("direct", 128, 40, 16, 1, "float32", *formulas) for formulas in others}
        found.add(("compact", 4096, 64, 32, 1, "float32", "log_softplus", "sigmoid", 0.2, 1e-4))
    return sorted(found) + sylvester_cases(target)


def sylvester_cases(target: str) -> list[tuple]:
    """(form, rows, D, L, parameter sets, dtype, M, kind), such that sm_90 has every number of warps."""
    found = []
    for form in ("sylvester", "sylvester_inverse"):
        found.append((form, 128, 64, 4, 128, "float32", 16, "packed"))
        found.append((form, 4096, 64, 4, 1, "float32", 16, "orthogonal"))
        found.append((form, 128, 64, 4, 128, "float32", 64, "triangular"))
        if target != "sm_90":
            continue
        found += [(form, 4096, 64, 4, 1, "float64", 16, "packed"), (form, 1000, 2, 4, 1000, "float32", 2, "orthogonal")]
        for dim, units in ((8, 4), (32, 32), (128, 64), (256, 32)):
            found.append((form, 256, dim, 4, 128, "float32", units, "orthogonal"))
        found.append((form, 128, 64, 4, 128, "float64", 64, "packed"))
    return found


def spills_some(case: tuple) -> bool:
    """Whether a kernel of the problem may spill registers: those of the largest Sylvester flows, whose matrices take
    all that a program has."""
    form, _, dim, _, _, dtype, *rest = case
    return form.startswith("sylvester") and sizes.numbers(dim, rest[0]) == sizes.most_numbers(getattr(torch, dtype))


def of_report(case: tuple) -> bool:
    """Whether the cost report has the problem: each kernel on short, usual and long rows."""
    form, rows, dim, _, _, dtype, *formulas = case
    if form.startswith("sylvester"):
        return dtype == "float32" and dim == 64
    if formulas or dtype == "float64":
        return False
    if form == "compact":
        return rows == 4096
    usual = rows in (128, 300) or (rows == _table.FEW_ROWS and dim in (8, 64, 1024))
    return usual if form == "direct" else dim == 64
