"""Sylvester flows against the paper's formula and autograd, far from initialisation: docs/math.md (57) to (62)."""

import functools
import math

import pytest
import torch
from torch import Tensor

from vvae_fast.backends import cpp
from vvae_fast.backends.sylvester import (
    sylvester_backward,
    sylvester_forward,
    sylvester_inverse,
    sylvester_inverse_backward,
)
from vvae_fast.reference import Layers
from vvae_fast.reference import sylvester_backward as reference_backward
from vvae_fast.sylvester import packed_sylvester_flow, sylvester_flow, sylvester_flow_inverse

BACKENDS = ["reference", "cpp"]
SHAPES = [  # rows, D, M, L, whether there is a Q
    (7, 5, 3, 4, True),
    (6, 20, 17, 3, True),
    (40, 64, 16, 2, True),
    (4, 1, 1, 2, True),
    (9, 33, 33, 3, False),
    (70, 8, 8, 4, False),
    (3, 16, 9, 0, True),
    (5, 130, 40, 2, True),
]


def diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def arguments(rows, dim, units, layers, with_q=True, amortized=False, dtype=torch.float64, seed=0):
    """z, q, r, r_tilde and b whose steps are strong; what lies below the diagonals is NaN, since nobody may read it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sets = (rows,) if amortized else ()
    q = torch.linalg.qr(normal(*sets, layers, dim, units))[0] if with_q else None
    triangles = []
    for _ in range(2):
        matrix = normal(*sets, layers, units, units) / math.sqrt(units)
        diagonal(matrix).copy_(torch.tanh(2 * normal(*sets, layers, units)))
        below = torch.ones(units, units, dtype=torch.bool).tril(-1)
        triangles.append(matrix.masked_fill(below, math.nan))
    tensors = normal(rows, dim), q, *triangles, normal(*sets, layers, units)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def by_the_paper(z, q, r, r_tilde, b):
    """Equation 13 for one row, with Q = I and every second layer reversed where q is None."""
    for layer in range(r.shape[0]):
        turn = torch.eye(len(z), dtype=z.dtype)
        of_q = (turn.flip(0) if layer % 2 else turn) if q is None else q[layer]
        upper, upper_tilde = r[layer].triu(), r_tilde[layer].triu()
        z = z + of_q @ (upper @ torch.tanh(upper_tilde @ of_q.T @ z + b[layer]))
    return z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amortized", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_determinants(shape, amortized, backend):
    z, *params = arguments(*shape, amortized=amortized)
    z_out, log_det = sylvester_flow(z, *params, backend=backend)
    for i, row in enumerate(z[:8]):
        own = [t if t is None or not amortized else t[i] for t in params]
        torch.testing.assert_close(z_out[i], by_the_paper(row, *own), rtol=1e-12, atol=1e-12)
        jacobian = torch.autograd.functional.jacobian(lambda x, own=own: by_the_paper(x, *own), row)
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-10)
    z_back, log_det_back = sylvester_flow_inverse(z_out, *params, backend=backend)
    torch.testing.assert_close(z_back, z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-10, atol=1e-10)


def gradients(flow, leaves, of_z, of_log_det):
    leaves = [t if t is None else t.clone().requires_grad_() for t in leaves]
    z_out, log_det = flow(*leaves)
    given = [t for t in leaves if t is not None]
    found = torch.autograd.grad((z_out, log_det), given, (of_z, of_log_det), materialize_grads=True, allow_unused=True)
    return z_out.detach(), log_det.detach(), *found


@functools.cache
def strong_gradients(activation):
    """The leaves, the incoming gradients, and what the reference makes of them, for all shapes."""
    problems = []
    for shape in SHAPES:
        for amortized in (False, True):
            leaves = arguments(*shape, amortized=amortized)
            incoming = torch.randn_like(leaves[0]), torch.randn(shape[0], dtype=torch.float64)
            wanted = gradients(
                lambda *t: sylvester_flow(*t, activation=activation, backend="reference"), leaves, *incoming
            )
            problems.append((leaves, incoming, wanted))
    return problems


@pytest.mark.parametrize("isa", cpp.isa_levels())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["tanh", "elu", "sigmoid", "leaky_relu", "linear"])
def test_kernels_against_the_reference(activation, dtype, isa):
    tolerance = 1e-12 if dtype is torch.float64 else 1e-4
    before = cpp.isa()
    cpp.set_isa(isa)
    try:
        for leaves, incoming, wanted in strong_gradients(activation):
            leaves = [t if t is None else t.to(dtype) for t in leaves]
            got = gradients(
                lambda *t: sylvester_flow(*t, activation=activation, backend="cpp"),
                leaves,
                *(t.to(dtype) for t in incoming),
            )
            for ours, right in zip(got, wanted, strict=True):
                assert ours.shape == right.shape
                if right.numel():
                    assert ((ours - right).abs().max() / right.abs().max().clamp(min=1)) < tolerance
    finally:
        cpp.set_isa(before)


@pytest.mark.parametrize("isa", cpp.isa_levels())
@pytest.mark.parametrize("activation", ["tanh", "elu", "sigmoid", "leaky_relu", "linear"])
def test_the_inverse_against_the_reference(activation, isa):
    before = cpp.isa()
    cpp.set_isa(isa)
    try:
        for rows, dim, units, layers, with_q in [(5, 6, 3, 3, True), (4, 19, 17, 2, True), (3, 9, 9, 3, False)]:
            for amortized in (False, True):
                leaves = arguments(rows, dim, units, layers, with_q, amortized)
                incoming = torch.randn_like(leaves[0]), torch.randn(rows, dtype=torch.float64)
                wanted, got = (
                    gradients(
                        lambda *t, backend=backend: sylvester_flow_inverse(*t, activation=activation, backend=backend),
                        leaves,
                        *incoming,
                    )
                    for backend in ("reference", "cpp")
                )
                for ours, right in zip(got, wanted, strict=True):
                    size = right.abs().max().clamp(min=1)
                    assert ((ours - right).abs().max() / size) < 1e-10
    finally:
        cpp.set_isa(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_units_without_an_inverse_give_nan(backend):
    z, q, r, r_tilde, b = arguments(3, 4, 2, 1, amortized=True)
    diagonal(r)[1] = -1.5
    diagonal(r_tilde)[1] = 1.0
    z_out, log_det = sylvester_flow_inverse(z, q, r, r_tilde, b, backend=backend)
    assert z_out[1].isnan().any()
    assert log_det[1].isnan()
    assert z_out[[0, 2]].isfinite().all()
    assert log_det[[0, 2]].isfinite().all()


@pytest.mark.parametrize("amortized", [False, True])
@pytest.mark.parametrize("with_q", [False, True])
def test_the_reference_adjoint_is_autograds(with_q, amortized):
    z, q, r, r_tilde, b = arguments(5, 6, 3 if with_q else 6, 3, with_q, amortized)
    of_z, of_log_det = torch.randn_like(z), torch.randn(5, dtype=z.dtype)
    dz, *others = gradients(
        lambda *t: sylvester_flow(*t, backend="reference"), (z, q, r, r_tilde, b), of_z, of_log_det
    )[2:]
    c = diagonal(r) * diagonal(r_tilde)
    columns = None if q is None else q.mT
    got = reference_backward(of_z, of_log_det, z, Layers(columns, r, r_tilde, b, c, 1 + c), "tanh", 0.2)
    of_q, dr, dr_tilde, db, ds = got[1:]
    dr = dr + torch.diag_embed(ds * diagonal(r_tilde))
    dr_tilde = dr_tilde + torch.diag_embed(ds * diagonal(r))
    ours = [got[0], *([] if q is None else [of_q.mT]), dr, dr_tilde, db]
    for one, other in zip(ours, (dz, *others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("isa", cpp.isa_levels())
@pytest.mark.parametrize("rows", [1, 15, 33, 100])
@pytest.mark.parametrize("sets", [1, 5])
def test_rows_that_share_a_set(rows, sets, isa):
    """Slices of rows are summed in a fixed order, whatever the number of threads."""
    z, *params = arguments(sets, 12, 7, 3, amortized=True)
    z = torch.randn(rows, sets, 12, dtype=z.dtype)
    of_z, of_log_det = torch.randn_like(z), torch.randn(rows, sets, dtype=z.dtype)
    before = cpp.isa()
    cpp.set_isa(isa)
    try:
        wanted = gradients(lambda *t: sylvester_flow(*t, backend="reference"), (z, *params), of_z, of_log_det)
        got = gradients(lambda *t: sylvester_flow(*t, backend="cpp"), (z, *params), of_z, of_log_det)
        again = gradients(lambda *t: sylvester_flow(*t, backend="cpp"), (z, *params), of_z, of_log_det)
    finally:
        cpp.set_isa(before)
    for ours, right, same in zip(got, wanted, again, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)
        assert torch.equal(ours, same)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_q", [False, True])
def test_packed_parameters_are_the_same_flow(with_q, backend):
    z, q, r, r_tilde, b = arguments(5, 20, 18 if with_q else 20, 3, with_q, amortized=True)
    mixed = r.triu(1) + r_tilde.triu(1).mT
    diagonals = diagonal(r).clone(), diagonal(r_tilde).clone()
    of_z, of_log_det = torch.randn_like(z), torch.randn(5, dtype=z.dtype)
    wanted = gradients(lambda *t: sylvester_flow(*t, backend=backend), (z, q, r, r_tilde, b), of_z, of_log_det)
    got = gradients(
        lambda *t: packed_sylvester_flow(*t, backend=backend), (z, q, mixed, *diagonals, b), of_z, of_log_det
    )
    *same, dr, dr_tilde, db = wanted
    *same_too, dmixed, dd, dd_tilde, db_too = got
    wanted = *same, dr.triu(1) + dr_tilde.triu(1).mT, diagonal(dr), diagonal(dr_tilde), db
    for one, other in zip((*same_too, dmixed, dd, dd_tilde, db_too), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    back, _ = packed_sylvester_flow(got[0], q, mixed, *diagonals, b, backend=backend, inverse=True)
    torch.testing.assert_close(back, z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", range(1, 8))
def test_units_next_to_the_edge(backend, exponent):
    """c = -1 + 10^-n: s as the caller knows it gives the determinant that 1 + c, rounded to float32, has lost."""
    s = torch.full((1, 2), 10.0**-exponent, dtype=torch.float64)
    z, q, r, r_tilde, b = arguments(20, 4, 2, 1)
    root = torch.sqrt(1 - s)
    r, r_tilde = r.triu(1) + torch.diag_embed(root), r_tilde.triu(1) - torch.diag_embed(root)
    z = torch.zeros_like(z)
    b = 1e-4 * b  # a = 0, where h' = 1 and the determinant is s
    _, wanted = sylvester_flow(z, q, r, r_tilde, b, s=s, backend="reference")
    assert (wanted < 2 * math.log(10.0**-exponent) + 1).all()
    single = [t.float() for t in (z, q, r, r_tilde, b)]
    z_out, log_det = sylvester_flow(*single, s=s.float(), backend=backend)
    torch.testing.assert_close(log_det.double(), wanted, rtol=1e-5, atol=1e-5)
    back, log_det_back = sylvester_flow_inverse(z_out, *single[1:], s=s.float(), backend=backend)
    assert back.isfinite().all()
    assert log_det_back.isfinite().all()
    double, _ = sylvester_flow(z, q, r, r_tilde, b, s=s, backend=backend)
    exact, _ = sylvester_flow_inverse(double, q, r, r_tilde, b, s=s, backend=backend)
    torch.testing.assert_close(exact, z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amortized", [False, True])
@pytest.mark.parametrize("with_q", [False, True])
def test_gradcheck_and_gradgradcheck(with_q, amortized, backend):
    z, q, r, r_tilde, b = arguments(2, 3, 2 if with_q else 3, 2, with_q, amortized)
    leaves = [t.clone().requires_grad_() for t in (z, q, r.triu(), r_tilde.triu(), b) if t is not None]

    def flow(z, *params):
        q, r, r_tilde, b = params if with_q else (None, *params)
        return sylvester_flow(z, q, r, r_tilde, b, s=1.5 + diagonal(r) * diagonal(r_tilde), backend=backend)

    def plain(z, *params):
        return sylvester_flow(z, *(params if with_q else (None, *params)), backend=backend)

    for one in (flow, plain):
        assert torch.autograd.gradcheck(one, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(one, leaves, fast_mode=True)

    def inverse(z, *params):
        return sylvester_flow_inverse(z, *(params if with_q else (None, *params)), backend=backend)

    assert torch.autograd.gradcheck(inverse, leaves, fast_mode=True)


def operands(amortized=True, with_q=True, dtype=torch.float32):
    z, q, r, r_tilde, b = arguments(4, 6, 3 if with_q else 6, 2, with_q, amortized, dtype)
    r, r_tilde = r.triu(), r_tilde.triu()
    params = [
        None if q is None else q.mT,
        r,
        r_tilde,
        diagonal(r),
        diagonal(r_tilde),
        b,
        1 + diagonal(r) * diagonal(r_tilde),
    ]
    return z, *(t if t is None or amortized else t[None] for t in params)


@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("amortized", [False, True])
def test_opcheck(amortized, with_q):
    z, *params = operands(amortized, with_q)
    z_out, log_det, p = sylvester_forward(z, *params, 0, 0.2, True)
    torch.library.opcheck(sylvester_forward, (z, *params, 0, 0.2, True))
    torch.library.opcheck(sylvester_backward, (z_out, log_det, z, *params, p, 0, 0.2))
    z_0, log_det, a = sylvester_inverse(z, *params, 0, 0.2, True)
    torch.library.opcheck(sylvester_inverse, (z, *params, 0, 0.2, True))
    torch.library.opcheck(sylvester_inverse_backward, (z_0, log_det, z, *params, a, 0, 0.2))


@pytest.mark.parametrize("amortized", [False, True])
def test_compiles_to_one_graph(amortized):
    leaves = [
        t.triu().requires_grad_() if t.shape[-1] == t.shape[-2] == 3 else t.requires_grad_()
        for t in arguments(4, 6, 3, 2, amortized=amortized, dtype=torch.float32)
    ]
    compiled = torch.compile(lambda *t: sylvester_flow(*t, backend="cpp"), fullgraph=True, backend="aot_eager")
    ones = torch.ones(4, 6), torch.ones(4)
    wanted = torch.autograd.grad(sylvester_flow(*leaves, backend="cpp"), leaves, ones)
    for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves, ones), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_functional_transforms():
    z, *params = arguments(4, 6, 3, 2)
    z_out, log_det = sylvester_flow(z, *params)
    mapped = torch.func.vmap(lambda row: sylvester_flow(row, *params))(z)
    torch.testing.assert_close(mapped, (z_out, log_det))
    _, (tangent, _) = torch.func.jvp(lambda x: sylvester_flow(x, *params), (z,), (torch.ones_like(z),))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: sylvester_flow(row, *params)[0]))(z)
    torch.testing.assert_close(tangent, jacobian.sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    leaves = arguments(4, 6, 3, 2, dtype=torch.float32)
    rounded = [t.to(dtype) for t in leaves]
    z_out, log_det = sylvester_flow(*rounded)
    wanted, wanted_log_det = sylvester_flow(*(t.float() for t in rounded))
    assert z_out.dtype is dtype
    assert log_det.dtype is torch.float32
    torch.testing.assert_close(log_det, wanted_log_det)
    torch.testing.assert_close(z_out, wanted.to(dtype))


def test_rows_no_rows_and_one():
    z, *params = arguments(4, 6, 3, 2)
    empty, log_det = sylvester_flow(z[:0].requires_grad_(), *params)
    assert empty.shape == (0, 6)
    assert log_det.shape == (0,)
    one, log_det = sylvester_flow(z[0], *params)
    torch.testing.assert_close(one, sylvester_flow(z, *params)[0][0])
    assert log_det.shape == ()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": 3}, TypeError, r"z must be a torch.Tensor, got int"),
        ({"q": torch.zeros(2, 6, 2)}, ValueError, r"q must have shape \(2, 6, 3\) to fit r and z, got \(2, 6, 2\)"),
        ({"q": None}, ValueError, r"r must be \[\*params, L, D, D\] with D = 6 where q is None"),
        ({"r": torch.zeros(2, 7, 7)}, ValueError, r"1 <= M <= D = 6, got \(2, 7, 7\)"),
        ({"r": torch.zeros(3, 3)}, ValueError, r"r must have shape \[L, M, M\]"),
        ({"r_tilde": torch.zeros(2, 3, 2)}, ValueError, r"r_tilde must have shape \(2, 3, 3\)"),
        ({"r_tilde": None}, TypeError, r"r_tilde must be a torch.Tensor, got NoneType"),
        ({"b": torch.zeros(2)}, ValueError, r"b must have shape \(2, 3\)"),
        ({"s": torch.zeros(3, 2)}, ValueError, r"s must have shape \(2, 3\)"),
        ({"b": torch.zeros(2, 3).double()}, TypeError, r"must share one dtype outside torch.autocast"),
        ({"activation": "relu"}, ValueError, r"activation must be one of"),
        ({"backend": "cuda"}, RuntimeError, r"cuda has no kernels of Sylvester flows"),
        ({"backend": "fast"}, ValueError, r"backend must be one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    names = ("z", "q", "r", "r_tilde", "b")
    given = dict(zip(names, arguments(4, 6, 3, 2, dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        sylvester_flow(**given)


def test_operators_refuse_what_does_not_fit():
    z, *params = operands()
    with pytest.raises(RuntimeError, match="r_tilde must have size 3"):
        sylvester_forward(z, params[0], params[1], params[2][..., :2], *params[3:], 0, 0.2, False)
    with pytest.raises(RuntimeError, match="must have 6 units without columns"):
        sylvester_forward(z, None, *params[1:], 0, 0.2, False)
    with pytest.raises(RuntimeError, match="b must have z's dtype"):
        sylvester_forward(z, *params[:5], params[5].double(), params[6], 0, 0.2, False)


def test_any_strides():
    z, *params = arguments(6, 6, 3, 2, amortized=True)
    wanted = sylvester_flow(z, *params)
    strided = [t.mT.contiguous().mT for t in params[:3]]
    torch.testing.assert_close(sylvester_flow(z.t().contiguous().t(), *strided, params[3]), wanted)
