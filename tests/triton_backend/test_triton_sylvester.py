"""The Triton kernels of Sylvester flows against the oracle in float64."""

import functools

import pytest
import torch
from test_sylvester_flow import arguments, diagonal, gradients
from triton_device import DEVICE

import vvae_fast
from vvae_fast import backends
from vvae_fast.backends import selection
from vvae_fast.backends.sylvester import OPERATORS
from vvae_fast.spec import ACTIVATIONS
from vvae_fast.sylvester import packed_sylvester_flow, sylvester_flow, sylvester_flow_inverse
from vvae_fast.triton import launch
from vvae_fast.triton.sylvester import sizes, sums

TRITON = OPERATORS["triton"]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # of a tensor's largest entry, or of 1
SHAPES = [  # rows, D, M, L, whether there is a Q; 70 rows are three programs
    (5, 5, 3, 3, True),
    (3, 1, 1, 2, True),
    (4, 6, 6, 3, False),
    (2, 19, 17, 2, True),
    (70, 3, 2, 1, True),
    (3, 7, 2, 0, True),
]
FLOWS = {False: sylvester_flow, True: sylvester_flow_inverse}

each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
each_parameters = pytest.mark.parametrize("amortized", [False, True], ids=["shared", "amortized"])


def on_device(tensors, dtype=torch.float64):
    return [t if t is None else t.to(DEVICE, dtype) for t in tensors]


def assert_close(got, wanted, dtype=torch.float64):
    for ours, right in zip(got, wanted, strict=True):
        assert ours.shape == right.shape
        assert ours.dtype == dtype
        if right.numel():
            assert (ours.cpu() - right).abs().max() / right.abs().max().clamp(min=1) < TOLERANCES[dtype]


def assert_is_the_oracle(flow, leaves, incoming, dtype=torch.float64):
    """`flow` takes the leaves and the backend's name."""
    wanted = gradients(functools.partial(flow, backend="reference"), leaves, *incoming)
    got = gradients(functools.partial(flow, backend="triton"), on_device(leaves, dtype), *on_device(incoming, dtype))
    assert_close(got, wanted, dtype)


def incoming_of(z):
    return torch.randn_like(z), torch.randn(z.shape[:-1], dtype=z.dtype)


@pytest.mark.usefixtures("poisoned")
@each_direction
@each_parameters
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle(shape, dtype, amortized, inverse):
    leaves = arguments(*shape, amortized=amortized)
    assert_is_the_oracle(FLOWS[inverse], leaves, incoming_of(leaves[0]), dtype)


@pytest.mark.usefixtures("poisoned")
@each_direction
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "tanh"])
def test_each_activation(activation, inverse):
    leaves = arguments(4, 5, 3, 2, amortized=True)
    flow = functools.partial(FLOWS[inverse], activation=activation, slope=0.3)
    assert_is_the_oracle(flow, leaves, incoming_of(leaves[0]))


@pytest.mark.usefixtures("poisoned")
@each_direction
@pytest.mark.parametrize("with_q", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_packed_parameters(samples, with_q, inverse):
    """mixed's own diagonal is NaN, since nobody may read it."""
    z, q, r, r_tilde, b = arguments(4, 5, 3 if with_q else 5, 3, with_q, amortized=True)
    mixed = r.triu(1) + r_tilde.triu(1).mT
    diagonal(mixed).fill_(float("nan"))
    leaves = torch.randn(samples, *z.shape, dtype=z.dtype), q, mixed, diagonal(r).clone(), diagonal(r_tilde).clone(), b
    assert_is_the_oracle(functools.partial(packed_sylvester_flow, inverse=inverse), leaves, incoming_of(leaves[0]))


@pytest.mark.usefixtures("poisoned")
@each_direction
@pytest.mark.parametrize("with_q", [True, False])
def test_samples_of_each_set(with_q, inverse):
    """Rows that share a set, [samples, batch, D]: sums over rows."""
    z, *params = arguments(2, 5, 3 if with_q else 5, 2, with_q, amortized=True)
    z = torch.randn(9, *z.shape, dtype=z.dtype)
    assert_is_the_oracle(FLOWS[inverse], (z, *params), incoming_of(z))


@pytest.mark.parametrize("rows_of_slice", [32, 70])
def test_sums_over_slices(monkeypatch, rows_of_slice):
    """In a fixed order: the same bits on every run."""
    monkeypatch.setattr(sums, "_LEAST_ROWS", rows_of_slice)
    leaves = arguments(130, 2, 2, 1)
    incoming = incoming_of(leaves[0])
    assert_is_the_oracle(sylvester_flow, leaves, incoming)
    flow = functools.partial(sylvester_flow, backend="triton")
    once, again = (gradients(flow, on_device(leaves), *on_device(incoming)) for _ in range(2))
    assert all(map(torch.equal, once, again))


@each_direction
def test_s_is_taken_as_it_is_given(inverse):
    """c = -1 + 10^-7, next to which 1 + c has no digit left in float32; a = 0, where the determinant is s."""
    s = torch.full((1, 2), 1e-7, dtype=torch.float64)
    z, q, r, r_tilde, b = arguments(6, 4, 2, 1)
    root = torch.sqrt(1 - s)
    r, r_tilde = r.triu(1) + torch.diag_embed(root), r_tilde.triu(1) - torch.diag_embed(root)
    z, b = torch.zeros_like(z), 1e-4 * b
    leaves = z, q, r, r_tilde, b, s

    def log_det(backend, z, q, r, r_tilde, b, s):
        return FLOWS[inverse](z, q, r, r_tilde, b, s=s, backend=backend)[1].cpu().double()

    wanted = log_det("reference", *leaves)
    torch.testing.assert_close(log_det("triton", *on_device(leaves)), wanted, rtol=1e-9, atol=1e-9)
    if not inverse:  # of the inverse the float32 reference has no more digits of the root either
        got = log_det("triton", *on_device(leaves, torch.float32))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    def flow(z, q, r, r_tilde, b, s, backend):
        return sylvester_flow(z, q, r, r_tilde, b, s=s, backend=backend)

    if not inverse:
        assert_is_the_oracle(flow, leaves, incoming_of(z))


def test_the_gradient_of_s():
    z, q, r, r_tilde, b = arguments(4, 5, 3, 2, amortized=True)
    s = 1 + diagonal(r) * diagonal(r_tilde)
    for one in FLOWS.values():

        def flow(*leaves, backend, one=one):
            return one(*leaves[:-1], s=leaves[-1], backend=backend)

        assert_is_the_oracle(flow, (z, q, r, r_tilde, b, s), incoming_of(z))


def test_units_without_an_inverse_give_nan():
    z, q, r, r_tilde, b = arguments(3, 4, 2, 1, amortized=True)
    diagonal(r)[1], diagonal(r_tilde)[1] = -1.5, 1.0
    z_out, log_det = sylvester_flow_inverse(*on_device((z, q, r, r_tilde, b)), backend="triton")
    assert z_out.isnan().any(-1).tolist() == [False, True, False]
    assert log_det.isnan().tolist() == [False, True, False]


@each_direction
@each_parameters
def test_bits_of_a_row_depend_on_nothing_else(amortized, inverse):
    z, *params = on_device(arguments(40, 6, 2, 1, amortized=amortized))
    whole = FLOWS[inverse](z, *params, backend="triton")
    for keep in (torch.randperm(40), torch.arange(1), torch.arange(15, 40)):
        part = z[keep], *(t[keep] if amortized else t for t in params)
        for x, y in zip(FLOWS[inverse](*part, backend="triton"), whole, strict=True):
            assert torch.equal(x, y[keep])


def test_any_strides():
    z, *params = on_device(arguments(6, 6, 3, 2, amortized=True))
    wanted = sylvester_flow(z, *params, backend="triton")
    strided = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in params]
    got = sylvester_flow(z.t().contiguous().t(), *strided, backend="triton")
    assert all(map(torch.equal, got, wanted))
    of_sets = [torch.cat([t.flatten(1), t.flatten(1)], -1)[:, : t[0].numel()].view(t.shape) for t in params]
    assert all(map(torch.equal, sylvester_flow(z, *of_sets, backend="triton"), wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    leaves = on_device(arguments(4, 6, 3, 2), dtype)
    z_out, log_det = sylvester_flow(*leaves, backend="triton")
    wanted, wanted_log_det = sylvester_flow(*(t.float() for t in leaves), backend="triton")
    assert (z_out.dtype, log_det.dtype) == (dtype, torch.float32)
    assert torch.equal(z_out, wanted.to(dtype))
    assert torch.equal(log_det, wanted_log_det)


def operands(amortized, with_q, packed, dtype=torch.float64):
    z, q, r, r_tilde, b = on_device(arguments(2, 3, 2 if with_q else 3, 2, with_q, amortized), dtype)
    r, r_tilde, d, d_tilde = r.triu(), r_tilde.triu(), diagonal(r), diagonal(r_tilde)
    params = q if q is None else q.mT, r, None if packed else r_tilde, d, d_tilde, b, 1 + d * d_tilde
    return z, *(t if t is None or amortized else t[None] for t in params)


@pytest.mark.parametrize(
    ("amortized", "with_q", "packed"), [(True, True, False), (False, True, True), (True, False, True)]
)
def test_opcheck(amortized, with_q, packed):
    z, *params = operands(amortized, with_q, packed)
    for forward, backward in (TRITON[:2], TRITON[2:]):
        z_out, log_det, saved = forward(z, *params, 0, 0.2, True)
        torch.library.opcheck(forward, (z, *params, 0, 0.2, True))
        torch.library.opcheck(backward, (z_out, log_det, z, *params, saved, 0, 0.2))


@each_parameters
def test_compiles_to_one_graph(amortized):
    leaves = [t.requires_grad_() for t in on_device(arguments(4, 6, 3, 2, amortized=amortized), torch.float32)]
    compiled = torch.compile(lambda *t: sylvester_flow(*t, backend="triton"), fullgraph=True, backend="aot_eager")
    ones = torch.ones(4, 6, device=DEVICE), torch.ones(4, device=DEVICE)
    wanted = torch.autograd.grad(sylvester_flow(*leaves, backend="triton"), leaves, ones)
    for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves, ones), wanted, strict=True):
        torch.testing.assert_close(one, other)


@each_direction
def test_gradients_of_every_order(inverse):
    z, q, r, r_tilde, b = on_device(arguments(2, 2, 2, 1, amortized=True))
    leaves = [t.clone().requires_grad_() for t in (z, q, r.triu(), r_tilde.triu(), b)]
    flow = functools.partial(FLOWS[inverse], backend="triton")
    assert torch.autograd.gradcheck(flow, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(flow, leaves, fast_mode=True)


def test_nothing_to_do_launches_nothing(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch.Launch, "__call__", refuse)
    for rows, layers in ((0, 2), (3, 0)):
        leaves = on_device(arguments(rows, 3, 2, layers))
        z_out, log_det, dz, *others = gradients(
            functools.partial(sylvester_flow, backend="triton"), leaves, *on_device(incoming_of(leaves[0]))
        )
        assert torch.equal(z_out, leaves[0])
        assert (log_det == 0).all()
        assert dz.shape == leaves[0].shape
        assert all((t == 0).all() for t in others)


def test_the_raw_operators_refuse_what_does_not_fit():
    z, *params = operands(True, True, False)
    forward, backward, *_ = TRITON
    saved = forward(z, *params, 0, 0.2, True)[2]
    for wrong, error, message in (
        ((z, *params[:2], params[2][..., :1], *params[3:]), ValueError, "r_tilde must have shape"),
        ((z, None, *params[1:]), ValueError, "r must have 3 units without columns, got 2"),
        ((z, *params[:5], params[5].float(), params[6]), TypeError, "b must have z's dtype"),
        ((z[:1], *params), ValueError, "a multiple of 2 rows"),
        ((z.half(), *(t.half() for t in params)), TypeError, "z must be float32 or float64"),
    ):
        with pytest.raises(error, match=message):
            forward(*wrong, 0, 0.2, False)
    with pytest.raises(ValueError, match="activation must be in"):
        forward(z, *params, 9, 0.2, False)
    with pytest.raises(ValueError, match="saved must have shape"):
        backward(z, z[:, 0], z, *params, saved[:1], 0, 0.2)


def test_what_is_too_large_is_refused_with_the_reason():
    most = sizes.most_numbers(torch.float32)
    z, q = torch.zeros(1, most, device=DEVICE), torch.zeros(1, most, 2, device=DEVICE)
    square, vector = torch.zeros(1, 2, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match=rf"at most {most} in float32, got 2 x {most}"):
        sylvester_flow(z, q, square, square, vector, backend="triton")
    with pytest.raises(ValueError, match=f"must be at most {most}"):
        TRITON.sylvester_forward(z, q.mT[None], *(square[None],) * 2, *(vector[None],) * 4, 0, 0.2, False)
    assert sizes.most_numbers(torch.float64) < most


def test_the_default_on_a_gpu(monkeypatch):
    """Triton where its kernels take the size, else the reference."""
    z = torch.zeros(3, 64, device="meta")
    assert backends.select_sylvester(z, 16, torch.float32, None).name == "reference"
    on_gpu = type("OnGpu", (), {"shape": z.shape, "device": torch.device("cuda")})()
    monkeypatch.setattr(selection.kernels, "interpreted", True)
    assert backends.select_sylvester(on_gpu, 16, torch.float32, None).name == "triton"
    on_gpu.shape = (3, 1024)
    assert backends.select_sylvester(on_gpu, 16, torch.float32, None).name == "reference"
    with pytest.raises(RuntimeError, match="cuda has no kernels of Sylvester flows"):
        backends.select_sylvester(on_gpu, 16, torch.float32, "cuda")
    with vvae_fast.use_backend("triton"), pytest.raises(RuntimeError, match="runs Sylvester flows whose M x D"):
        backends.select_sylvester(on_gpu, 16, torch.float32, None)
