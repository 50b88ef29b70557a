"""What PyTorch does to the flow: derivatives to second order, transforms, compilation, autocast, the raw operators."""

import pytest
import torch
from problems import opchecked, oracle, random_problem, run
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jacrev, jvp, vmap

import vvae_fast
from vvae_fast import backends, shapes
from vvae_fast.backends import operators
from vvae_fast.functional import packed_planar_flow
from vvae_fast.spec import FlowSpec

SOFTPLUS_TANH = FlowSpec().arguments()
CASES = [((5,), ()), ((5,), (5,)), ((2, 3), (3,)), ((), ())]


def float64_inputs(batch, params, num_steps=3, dim=3):
    p = random_problem(batch, num_steps, dim, params, dtype=torch.float64)
    return p, [t.requires_grad_() for t in p.inputs]


def pack(u, w, b):
    """[*params, K (2 D + 1)] as a linear head computes it."""
    return torch.cat([u.flatten(-2), w.flatten(-2), b], -1)


@pytest.mark.parametrize("constraint", ["softplus", "none"])
@pytest.mark.parametrize(("batch", "params"), CASES)
def test_gradcheck_and_gradgradcheck(batch, params, constraint):
    _, inputs = float64_inputs(batch, params, num_steps=2)

    def flow(*tensors):
        return vvae_fast.planar_flow(*tensors, constraint=constraint, backend="cpp")

    assert gradcheck(flow, inputs)
    assert gradgradcheck(flow, inputs)


@pytest.mark.parametrize("needed", range(4))
@pytest.mark.parametrize("params", [(), (5,)])
def test_gradient_of_one_input_alone(needed, params):
    p, _ = float64_inputs((5,), params)
    inputs = [t.detach().requires_grad_(i == needed) for i, t in enumerate(p.inputs)]
    outputs = vvae_fast.planar_flow(*inputs, backend="cpp")
    (got,) = torch.autograd.grad(outputs, inputs[needed], (p.grad_z, p.grad_log_det))
    torch.testing.assert_close(got, oracle(p)[2 + needed])


def test_gradient_of_expanded_ones():
    """`.sum().backward()` hands over gradients of stride 0."""
    _, inputs = float64_inputs((5,), ())
    z_K, log_det = vvae_fast.planar_flow(*inputs, backend="cpp")
    (z_K.sum() + log_det.sum()).backward()
    assert all(t.grad.isfinite().all() for t in inputs)


def test_private_switches_exist():
    """Every call asks these two; a PyTorch that drops them must fail here and not in a user's hands."""
    assert torch._C._are_functorch_transforms_active() is False
    assert vmap(lambda x: x + torch._C._are_functorch_transforms_active())(torch.zeros(1)).item() == 1
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
        assert backends.needs_plain_torch()
    assert not backends.needs_plain_torch()


def test_vmap_over_rows_is_the_batch():
    p, _ = float64_inputs((6,), ())
    got = vmap(lambda z: vvae_fast.planar_flow(z, *p.inputs[1:]))(p.z)
    for x, y in zip(got, vvae_fast.planar_flow(*p.inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_vmap_over_parameters_is_amortized():
    p, _ = float64_inputs((6,), (6,))
    for x, y in zip(vmap(vvae_fast.planar_flow)(*p.inputs), vvae_fast.planar_flow(*p.inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_per_sample_gradients():
    p, _ = float64_inputs((6,), ())

    def log_det_of(w, z):
        return vvae_fast.planar_flow(z, p.u, w, p.b)[1]

    per_sample = vmap(grad(log_det_of), in_dims=(None, 0))(p.w.detach(), p.z)
    w = p.w.detach().requires_grad_()
    (total,) = torch.autograd.grad(vvae_fast.planar_flow(p.z, p.u, w, p.b)[1].sum(), w)
    torch.testing.assert_close(per_sample.sum(0), total)


def test_jacrev_has_the_log_det():
    p, _ = float64_inputs((4,), ())
    _, log_det = vvae_fast.planar_flow(*p.inputs)
    jacobians = vmap(jacrev(lambda z: vvae_fast.planar_flow(z, *p.inputs[1:])[0]))(p.z)
    torch.testing.assert_close(torch.linalg.slogdet(jacobians).logabsdet, log_det)


def test_forward_mode_agrees_with_reverse_mode():
    p, inputs = float64_inputs((4,), ())
    tangents = tuple(torch.randn_like(t) for t in inputs)
    outputs = vvae_fast.planar_flow(*inputs)
    reverse = torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))
    wanted = sum((g * t).sum() for g, t in zip(reverse, tangents, strict=True))
    primals = tuple(t.detach() for t in inputs)

    _, (dz_K, dlog_det) = jvp(vvae_fast.planar_flow, primals, tangents)
    torch.testing.assert_close((dz_K * p.grad_z).sum() + (dlog_det * p.grad_log_det).sum(), wanted)

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        z_K, log_det = (forward_ad.unpack_dual(y).tangent for y in vvae_fast.planar_flow(*duals))
    torch.testing.assert_close((z_K * p.grad_z).sum() + (log_det * p.grad_log_det).sum(), wanted)


def test_checkpoint_recomputes_the_same():
    p, inputs = float64_inputs((5,), ())
    outputs = torch.utils.checkpoint.checkpoint(vvae_fast.planar_flow, *inputs, use_reentrant=False)
    got = torch.autograd.grad(outputs, inputs, (p.grad_z, p.grad_log_det))
    for x, y in zip(got, run(p)[2:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("params", [(), (7,)])
def test_in_place_use_of_an_input_is_noticed(params):
    _, inputs = float64_inputs((7,), params)
    z = inputs[0] * 1.0
    z_K, _ = vvae_fast.planar_flow(z, *inputs[1:])
    z_K.add_(1.0)  # the output is free to be changed, the input is saved
    z.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z_K.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("params", [(), (9,)])
def test_compile_fullgraph(backend, params):
    p = random_problem((9,), 4, 3, params)
    inputs = [t.requires_grad_() for t in p.inputs]

    def loss(*tensors):
        z_K, log_det = vvae_fast.planar_flow(*tensors)
        return (z_K * p.grad_z).sum() + (log_det * p.grad_log_det).sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*inputs), inputs)
    for x, y in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_compile_runs_the_kernels_and_follows_use_backend():
    p = random_problem((9,), 4, 3)
    targets = []

    def count(graph, _):
        targets.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(vvae_fast.planar_flow, fullgraph=True, backend=count)
    wanted = vvae_fast.planar_flow(*p.inputs)
    torch.testing.assert_close(compiled(*p.inputs), wanted)
    assert targets[-1].count(operators.planar_forward) == 1
    with vvae_fast.use_backend("reference"):
        torch.testing.assert_close(compiled(*p.inputs), wanted)
    assert operators.planar_forward not in targets[-1]
    assert len(targets) == 2


def test_compile_with_dynamic_batch():
    compiled = torch.compile(vvae_fast.planar_flow, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9, 17):
        p = random_problem((rows,), 4, 3)
        torch.testing.assert_close(compiled(*p.inputs), vvae_fast.planar_flow(*p.inputs))


@pytest.mark.parametrize("params", [(), (6,)])
def test_export(params):
    class Flow(torch.nn.Module):
        def forward(self, z, u, w, b):
            return vvae_fast.planar_flow(z, u, w, b)

    p = random_problem((6,), 4, 3, params)
    program = torch.export.export(Flow(), p.inputs)
    torch.testing.assert_close(program.module()(*p.inputs), vvae_fast.planar_flow(*p.inputs))


@pytest.mark.parametrize("params", [(), (6,)])
def test_autocast_mixes_dtypes(params):
    p = random_problem((6,), 4, 3, params)
    z, b = p.z.bfloat16(), p.b.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_K, log_det = vvae_fast.planar_flow(z, p.u, p.w, b)
    assert (z_K.dtype, log_det.dtype) == (torch.bfloat16, torch.float32)
    wanted = vvae_fast.planar_flow(z.float(), p.u, p.w, b.float())
    assert torch.equal(z_K, wanted[0].bfloat16())
    assert torch.equal(log_det, wanted[1])


@pytest.mark.parametrize("formulas", [SOFTPLUS_TANH, (1, 2, 0.2, 1e-4)])
@pytest.mark.parametrize(("rows", "params"), [(6, ()), (6, (6,)), (6, (3,)), (0, ())])
def test_opcheck(rows, params, formulas):
    p = random_problem((rows,), 4, 3, params)
    flat = p.inputs
    a = opchecked(operators.planar_forward, p, formulas)[2]
    torch.library.opcheck(operators.planar_backward, (p.grad_z, p.grad_log_det, *flat, a, *formulas))
    if params:
        packed = pack(*flat[1:])
        torch.library.opcheck(
            operators.planar_backward_packed, (p.grad_z, p.grad_log_det, flat[0], packed, a, *formulas)
        )


@pytest.mark.parametrize("batch", [(6,), (5, 6), (16, 3), (0, 2)])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_packed_parameters(batch, backend):
    """packed_planar_flow is planar_flow on views of one tensor, first and second order."""
    p = random_problem(batch, 4, 3, batch[-1:], dtype=torch.float64)
    inputs = z, packed = p.z.clone().requires_grad_(), pack(p.u, p.w, p.b).requires_grad_()

    def derivatives(z_K, log_det):
        first = torch.autograd.grad((z_K.sin().sum(), log_det.sin().sum()), inputs, create_graph=True)
        return [z_K, log_det, *first, *torch.autograd.grad([g.square().sum() for g in first], inputs)]

    got = derivatives(*packed_planar_flow(z, packed, 4, 3, backend=backend))
    for x, y in zip(got, derivatives(*vvae_fast.planar_flow(z, *shapes.unpack(packed, 4, 3))), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("only", ["z_K", "log_det"])
def test_packed_parameters_with_one_output_used(only):
    p = random_problem((6,), 4, 3, (6,), dtype=torch.float64)
    packed = pack(p.u, p.w, p.b).requires_grad_()
    got = packed_planar_flow(p.z, packed, 4, 3)[only == "log_det"]
    wanted = vvae_fast.planar_flow(p.z, *shapes.unpack(packed, 4, 3), backend="reference")[only == "log_det"]
    for x, y in zip(*(torch.autograd.grad(out.sum(), packed) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(6)}, "z must have rank 2"),
        ({"u": torch.zeros(4, 2)}, "u must have size 3"),
        ({"w": torch.zeros(5, 3)}, "w must have size 4"),
        ({"b": torch.zeros(4, dtype=torch.float64)}, "b must have z's dtype"),
        ({"u": torch.zeros(3, dtype=torch.float32)}, "u must be"),
        ({"z": torch.zeros(6, 3, dtype=torch.int64)}, "z must be float32 or float64"),
        ({"u": torch.zeros(4, 4, 3), "w": torch.zeros(4, 4, 3), "b": torch.zeros(4, 4)}, "a multiple of 4 rows"),
    ],
)
def test_raw_operator_refuses_what_would_read_out_of_bounds(change, message):
    p = random_problem((6,), 4, 3)._replace(**change)
    with pytest.raises(RuntimeError, match=message):
        operators.planar_forward(*p.inputs, *SOFTPLUS_TANH, True)
    if set(change) == {"z"}:
        return
    a = torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match=message):
        operators.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, a, *SOFTPLUS_TANH)


def test_raw_operator_refuses_two_devices_and_absurd_sizes():
    p = random_problem((6,), 4, 3)
    with pytest.raises(RuntimeError, match="must be on one device"):
        operators.planar_forward(p.z, p.u.to("meta"), p.w, p.b, *SOFTPLUS_TANH, True)
    steps = 2**62
    u, b = torch.zeros(1, 1).expand(steps, 1), torch.zeros(1).expand(steps)
    with pytest.raises(RuntimeError, match="at most 2\\^40 elements"):
        operators.planar_forward(torch.zeros(0, 1), u, u, b, *SOFTPLUS_TANH, False)


def test_raw_packed_backward_refuses_other_widths():
    p = random_problem((6,), 4, 3, (6,))
    a = operators.planar_forward(*p.inputs, *SOFTPLUS_TANH, True)[2]
    with pytest.raises(RuntimeError, match="packed must have size 28 in dimension 1, got 27"):
        operators.planar_backward_packed(p.grad_z, p.grad_log_det, p.z, pack(*p.inputs[1:])[:, 1:], a, *SOFTPLUS_TANH)


def test_raw_backward_refuses_other_pre_activations():
    p = random_problem((6,), 4, 3)
    for a, message in ((torch.zeros(4, 5), "a must have size 6"), (torch.zeros(6, 4).t(), "a must be contiguous")):
        with pytest.raises(RuntimeError, match=message):
            operators.planar_backward(p.grad_z, p.grad_log_det, *p.inputs, a, *SOFTPLUS_TANH)
