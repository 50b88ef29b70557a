"""Orthonormal columns by Householder reflections, and the two triangles of a Sylvester layer."""

import pytest
import torch

from vvae_fast.nn import orthonormal
from vvae_fast.nn.sylvester.orthonormal import _columns, reflectors
from vvae_fast.nn.sylvester.triangles import triangles

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
dtypes = pytest.mark.parametrize("dtype", list(EPS))


def seeded(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def product(v):
    """I - 2 v v^T / |v|^2 of one vector after the other, [D, D]."""
    q = torch.eye(v.shape[-1], dtype=v.dtype)
    for x in v:
        q = q @ (torch.eye(len(x), dtype=v.dtype) - 2 * torch.outer(x, x) / x.dot(x))
    return q


def off(q):
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max().item()


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 7), (7, 3), (5, 5), (12, 7)])
def test_it_is_the_product_of_the_reflections(count, columns):
    v = seeded(2, 3, count, 7)
    q = orthonormal(v, columns)
    assert q.shape == (2, 3, 7, columns)
    assert q.mT.is_contiguous()
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(q[i, j], product(v[i, j])[:, :columns], rtol=0, atol=1e-14)


@dtypes
@pytest.mark.parametrize(("dim", "count"), [(1, 1), (2, 2), (64, 16), (256, 64), (256, 256)])
@pytest.mark.parametrize("spread", [1e9, 1e-1, 1e-4, 1e-7, 0.0])
def test_columns_are_orthonormal_to_rounding(dtype, dim, count, spread):
    """Also of vectors that are parallel but for `spread`: a rounding of each reflection is all that adds up."""
    v = (seeded(1, dim) + spread * seeded(count, dim, seed=1)).to(dtype)
    assert off(orthonormal(v).double()) < (8 + 4 * count) * EPS[dtype]


@dtypes
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_lengths_do_not_matter(dtype, size):
    v = seeded(2, 4, 9, dtype=dtype)
    weights = seeded(2, 9, 4, dtype=dtype, seed=1)
    torch.testing.assert_close(orthonormal(size * v), orthonormal(v), rtol=0, atol=16 * EPS[dtype])
    leaves = [v.clone().requires_grad_(), (size * v).requires_grad_()]
    one, other = (torch.autograd.grad((orthonormal(leaf) * weights).sum(), leaf)[0] for leaf in leaves)
    torch.testing.assert_close(other * size, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("count", "columns"), [(3, 7), (7, 3), (5, 5)])
def test_the_adjoint_is_that_of_plain_torch(count, columns):
    v, weights = seeded(6, count, 7).requires_grad_(), seeded(6, columns, 7, seed=1)
    with torch.no_grad():
        v[:, 1] = v[:, 2]
        v[:, 0] = 0
    wanted = torch.autograd.grad(_columns(v, columns), v, weights)
    got = torch.autograd.grad(orthonormal(v, columns).mT, v, weights)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    again = torch.autograd.grad(orthonormal(v, columns).mT, v, weights, create_graph=True)
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-12)


def test_half_precision_and_autocast():
    v = seeded(2, 4, 9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = orthonormal(v)
    assert torch.equal(q, orthonormal(v))
    half = v.bfloat16().requires_grad_()
    assert torch.equal(orthonormal(half), orthonormal(half.detach().float()))
    orthonormal(half).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_a_vector_of_zeros_reflects_nothing():
    v = seeded(3, 5)
    without = orthonormal(v[[0, 2]], 4)
    v[1] = 0
    v.requires_grad_()
    torch.testing.assert_close(orthonormal(v, 4), without, rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(orthonormal(v, 4).sin().sum(), v)
    assert gradient.isfinite().all()


def test_derivatives():
    v = seeded(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: orthonormal(v, 4), v)
    assert torch.autograd.gradgradcheck(lambda v: orthonormal(v, 4), v)
    per_sample = torch.func.vmap(torch.func.jacfwd(lambda v: orthonormal(v, 4)))(v.detach())
    whole = torch.autograd.functional.jacobian(lambda v: orthonormal(v, 4), v)
    for i in range(2):
        torch.testing.assert_close(per_sample[i], whole[i, :, :, i])


def test_reflectors_have_length_sqrt_2():
    torch.testing.assert_close(reflectors(seeded(4, 6)).square().sum(-1), torch.full((4,), 2.0).double())


@pytest.mark.parametrize(
    ("v", "columns", "message"),
    [
        (torch.zeros(3), None, r"v must be \[\*, H, D\] with D >= 1, got \(3,\)"),
        (torch.zeros(3, 0), None, r"v must be \[\*, H, D\] with D >= 1, got \(3, 0\)"),
        (torch.zeros(3, 2), None, "num_columns must be from 1 to D = 2, got 3"),
        (torch.zeros(1, 2), 0, "num_columns must be from 1 to D = 2, got 0"),
    ],
)
def test_refused(v, columns, message):
    with pytest.raises(ValueError, match=message):
        orthonormal(v, columns)


# Pairs x, y with c = tanh x tanh y from -1 + 1e-7 on, and far beyond.
AXIS = torch.tensor([-80.0, -20.0, -9.0, -3.0, -1.0, -0.1, -1e-4, 0.0, 1e-6, 0.01, 0.5, 2.0, 8.3, 30.0, 80.0])
X, Y = (t.flatten() for t in torch.meshgrid(AXIS, AXIS, indexing="ij"))
MORE = torch.linspace(0.0, 9.0, 91)
X, Y = torch.cat([X, MORE, MORE]), torch.cat([Y, -MORE, 0.3 - MORE])


def exact(x, y):
    """s and its derivatives by x and y, in float64, with cosh, which has no cancellation."""
    x, y = x.double(), y.double()
    one = (x + y).cosh() / x.cosh() / y.cosh()
    return one, y.tanh() / x.cosh().square(), x.tanh() / y.cosh().square()


def test_s_and_its_gradient_keep_their_digits():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    s = triangles(x[:, None, None], y[:, None]).s[:, 0]
    got = (s, *torch.autograd.grad(s.sum(), (x, y)))
    for value, wanted in zip(got, exact(X, Y), strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=1e-37)


def test_the_diagonals_and_their_gradients_keep_their_digits():
    for which in (0, 1):
        x = X.clone().requires_grad_()
        zero = torch.zeros_like(x)
        t = triangles(*((x[:, None, None], zero[:, None]) if which == 0 else (zero[:, None, None], x[:, None])))[which]
        (gradient,) = torch.autograd.grad(t.sum(), x)
        torch.testing.assert_close(t.flatten(), X.tanh(), rtol=0, atol=0)
        torch.testing.assert_close(gradient.double(), X.double().cosh() ** -2, rtol=2e-6, atol=1e-37)


def test_triangles_take_the_two_sides_of_mixed():
    mixed, y = seeded(2, 3, 4, 4), seeded(2, 3, 4, seed=1)
    r, r_tilde, s = triangles(mixed, y)
    x = mixed.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(r, mixed.triu(1) + torch.diag_embed(x.tanh()))
    torch.testing.assert_close(r_tilde, mixed.mT.triu(1) + torch.diag_embed(y.tanh()))
    torch.testing.assert_close(s, 1 + x.tanh() * y.tanh())


def test_derivatives_of_triangles():
    mixed, y = seeded(2, 3, 3).requires_grad_(), seeded(2, 3, seed=1).requires_grad_()
    with torch.no_grad():
        mixed[0, 0, 0] = 0.0  # where a formula with |x| has a corner
        y[1, 1] = 0.0
    assert torch.autograd.gradcheck(triangles, (mixed, y))
    assert torch.autograd.gradgradcheck(triangles, (mixed, y))
    mixed, y = mixed.detach()[0], y.detach()[0]
    plain = torch.func.hessian(lambda y: (1 + mixed.diagonal().tanh() * y.tanh()).log().sum())(y)
    torch.testing.assert_close(torch.func.hessian(lambda y: triangles(mixed, y).s.log().sum())(y), plain)
