"""Bad input: every argument is refused by name, with what was wanted and what came."""

import pytest
import torch

import vvae_fast


def good(**changes):
    arguments = {"z": torch.zeros(5, 3), "u": torch.zeros(4, 3), "w": torch.ones(4, 3), "b": torch.zeros(4), **changes}
    return arguments


FUNCTIONS = [vvae_fast.planar_flow, vvae_fast.planar_flow_inverse]

REFUSED = [
    (TypeError, r"z must be a torch.Tensor, got list", {"z": [1.0]}),
    (TypeError, r"u must be a torch.Tensor, got NoneType", {"u": None}),
    (TypeError, r"z must be float32.*got torch.int64", {"z": torch.zeros(5, 3, dtype=torch.int64)}),
    (TypeError, r"b must be float32.*got torch.complex64", {"b": torch.zeros(4, dtype=torch.complex64)}),
    (TypeError, r"must share one dtype.*u torch.float64", {"u": torch.zeros(4, 3, dtype=torch.float64)}),
    (TypeError, r"must share one dtype.*z torch.bfloat16", {"z": torch.zeros(5, 3, dtype=torch.bfloat16)}),
    (TypeError, r"z must be a dense tensor, got torch.sparse_coo", {"z": torch.zeros(5, 3).to_sparse()}),
    (ValueError, r"w must be on z's device cpu, got meta", {"w": torch.ones(4, 3, device="meta")}),
    (ValueError, r"z must have shape \[\*batch, D\].*rank 0", {"z": torch.zeros(())}),
    (ValueError, r"D >= 1, got \(5, 0\)", {"z": torch.zeros(5, 0)}),
    (ValueError, r"u must have shape .*D = 3.*got \(4, 2\)", {"u": torch.zeros(4, 2)}),
    (ValueError, r"u must have shape .*got \(3,\)", {"u": torch.zeros(3)}),
    (ValueError, r"w must have u's shape \(4, 3\), got \(1, 3\)", {"w": torch.ones(1, 3)}),
    (ValueError, r"b must have u's shape without.*\(4,\), got \(4, 1\)", {"b": torch.zeros(4, 1)}),
    (ValueError, r"b must have .*\(4,\), got \(1,\)", {"b": torch.zeros(1)}),
    (ValueError, r"activation must be one of .*'tanh'.*got 'relu'", {"activation": "relu"}),
    (ValueError, r"constraint must be one of .*got None", {"constraint": None}),
    (ValueError, r"backend must be one of .*got 'tpu'", {"backend": "tpu"}),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("error", "message", "changes"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_refused_by_name(function, error, message, changes):
    with pytest.raises(error, match=message):
        function(**good(**changes))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("batch", "params"),
    [((5,), (1,)), ((1,), (5,)), ((5,), (4,)), ((5, 7), (5,)), ((5,), (5, 5)), ((2, 5), (1, 5)), ((), (1,))],
)
def test_only_the_documented_broadcast(function, batch, params):
    changes = {name: torch.zeros(*params, 4, 3) for name in ("u", "w")} | {"b": torch.zeros(*params, 4)}
    with pytest.raises(ValueError, match="trailing batch dimensions of z"):
        function(**good(z=torch.zeros(*batch, 3), **changes))


def test_inverse_without_a_guarantee_is_refused():
    with pytest.raises(ValueError, match='constraint must be "softplus" or "log_softplus" to invert, got "none"'):
        vvae_fast.planar_flow_inverse(**good(constraint="none"))


def test_inverse_backend_asked_for_by_name():
    wanted = vvae_fast.planar_flow_inverse(**good(backend="reference"))
    with vvae_fast.use_backend("cpp"):
        implied = vvae_fast.planar_flow_inverse(**good())
    for got in (implied, vvae_fast.planar_flow_inverse(**good(backend="cpp"))):
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y)
    with pytest.raises(RuntimeError, match="'cuda' was asked for and cannot run"):
        vvae_fast.planar_flow_inverse(**good(backend="cuda"))


def test_meta_tensors_are_refused_by_the_kernels_with_the_reason():
    arguments = {name: t.to("meta") for name, t in good().items()}
    with pytest.raises(RuntimeError, match="cpp backend runs on cpu tensors, got meta"):
        vvae_fast.planar_flow(**arguments, backend="cpp")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "dim must be an int, got float", (2.0, 3)),
        (TypeError, "num_steps must be an int, got bool", (2, True)),
        (ValueError, "dim must be at least 1, got 0", (0, 3)),
        (ValueError, "num_steps must be at least 0, got -1", (2, -1)),
    ],
)
def test_module_sizes(error, message, arguments):
    with pytest.raises(error, match=message):
        vvae_fast.PlanarFlow(*arguments)
    with pytest.raises(error, match=message):
        vvae_fast.AmortizedPlanarFlow(*arguments, 5)


def test_context_is_checked():
    with pytest.raises(ValueError, match="context_dim must be at least 1"):
        vvae_fast.AmortizedPlanarFlow(2, 3, 0)
    flow = vvae_fast.AmortizedPlanarFlow(2, 3, 5)
    with pytest.raises(TypeError, match=r"context must be torch.float32 like the flow, got torch.float64"):
        flow(torch.zeros(4, 2), torch.zeros(4, 5, dtype=torch.float64))
    for context, got in ((torch.zeros(4, 6), r"\(4, 6\)"), (None, "NoneType"), (torch.zeros(()), r"\(\)")):
        with pytest.raises(ValueError, match=rf"context must be a tensor .* F = 5, got {got}"):
            flow(torch.zeros(4, 2), context)
    with pytest.raises(ValueError, match="trailing batch dimensions"):
        flow(torch.zeros(4, 2), torch.zeros(3, 5))
