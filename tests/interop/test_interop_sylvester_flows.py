"""vvae_fast.interop.sylvester_flows against the formulas of riannevdberg/sylvester-flows, in plain PyTorch."""

import pytest
import torch
from torch import nn

from vvae_fast import AmortizedPlanarFlow, AmortizedSylvesterFlow
from vvae_fast.interop.sylvester_flows import (
    BjorckSylvesterFlow,
    from_sylvester_flows,
    to_sylvester_flows_state_dict,
)

DIM, LAYERS, FEATURES, ROWS = 6, 3, 16, 32
KINDS = [
    ("planar", DIM, 0),
    ("orthogonal", 4, 0),
    ("orthogonal", DIM, 0),
    ("householder", DIM, 5),
    ("triangular", DIM, 0),
]
each_kind = pytest.mark.parametrize(("kind", "units", "reflections"), KINDS)


class Theirs(nn.Module):
    """The heads of one of its VAEs under its names, and its flow: every number as its formulas have it."""

    def __init__(self, kind, units, reflections, size=1.0):
        super().__init__()
        self.kind, self.units, self.reflections = kind, units, reflections
        self.q_z_mean = nn.Linear(FEATURES, DIM)  # of the VAE: not the flow's
        if kind == "planar":
            self.amor_u = nn.Linear(FEATURES, LAYERS * DIM)
            self.amor_w = nn.Linear(FEATURES, LAYERS * DIM)
            self.amor_b = nn.Linear(FEATURES, LAYERS)
        else:
            self.amor_d = nn.Linear(FEATURES, LAYERS * units * units)
            self.amor_diag1 = nn.Sequential(nn.Linear(FEATURES, LAYERS * units), nn.Tanh())
            self.amor_diag2 = nn.Sequential(nn.Linear(FEATURES, LAYERS * units), nn.Tanh())
            self.amor_b = nn.Linear(FEATURES, LAYERS * units)
            if kind != "triangular":
                self.amor_q = nn.Linear(FEATURES, LAYERS * DIM * (units if kind == "orthogonal" else reflections))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, size * FEATURES**-0.5)

    def q(self, h):
        """[L, B, D, M], or None."""
        if self.kind == "triangular":
            return [None] * LAYERS
        q, eye = self.amor_q(h), torch.eye(self.units, dtype=h.dtype)
        if self.kind == "householder":
            v = q.reshape(len(h), LAYERS, self.reflections, DIM)
            v = v / v.norm(dim=-1, keepdim=True)
            product = eye.expand(len(h), LAYERS, DIM, DIM)
            for k in range(self.reflections):
                product = (eye - 2 * v[:, :, k, :, None] * v[:, :, k, None]) @ product
            return product.transpose(0, 1)
        flat = q.reshape(-1, DIM * self.units)
        a = (flat / flat.norm(dim=1, keepdim=True)).view(-1, DIM, self.units)
        for _ in range(100):
            a = a @ (eye + 0.5 * (eye - a.mT @ a))
            if (a.mT @ a - eye).flatten(1).norm(dim=1).max() <= (1e-5 if self.units == DIM else 1e-6):
                break
        return a.view(-1, LAYERS, DIM, self.units).transpose(0, 1)

    def planar(self, z, h):
        total = 0
        us, ws = (layer(h).view(-1, LAYERS, DIM) for layer in (self.amor_u, self.amor_w))
        for u, w, b in zip(us.unbind(1), ws.unbind(1), self.amor_b(h).unbind(1), strict=True):
            wu = (w * u).sum(-1, keepdim=True)
            u = u + (nn.functional.softplus(wu) - 1 - wu) * w / w.square().sum(-1, keepdim=True)
            t = torch.tanh((w * z).sum(-1, keepdim=True) + b[:, None])
            total = total + (1 + ((1 - t**2) * w * u).sum(-1)).abs().log()
            z = z + u * t
        return z, total

    def forward(self, z, h):
        if self.kind == "planar":
            return self.planar(z, h)
        m, total = self.units, 0
        d = self.amor_d(h).reshape(-1, m, m, LAYERS)
        x, y, b = (layer(h).reshape(-1, m, LAYERS) for layer in (self.amor_diag1, self.amor_diag2, self.amor_b))
        for k, q in enumerate(self.q(h)):
            r1 = d[..., k].triu(1) + torch.diag_embed(x[..., k])
            r2 = d[..., k].mT.triu(1) + torch.diag_embed(y[..., k])
            if q is None:
                q = torch.eye(m, dtype=z.dtype).expand(len(z), m, m)
                q = q.flip(-1) if k % 2 else q
            t = torch.tanh((z[:, None] @ q @ r2.mT)[:, 0] + b[..., k])
            z = z + (t[:, None] @ (q @ r1).mT)[:, 0]
            total = total + (1 + (1 - t**2) * x[..., k] * y[..., k]).abs().log().sum(-1)
        return z, total


def inputs(dtype=torch.float64):
    return torch.randn(ROWS, DIM, dtype=dtype), torch.randn(ROWS, FEATURES, dtype=dtype)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_flow_is_theirs(kind, units, reflections, dtype):
    torch.manual_seed(0)
    theirs = Theirs(kind, units, reflections).to(dtype)
    flow = from_sylvester_flows(theirs.state_dict(), kind)
    classes = {"planar": AmortizedPlanarFlow, "orthogonal": BjorckSylvesterFlow}
    assert type(flow) is classes.get(kind, AmortizedSylvesterFlow)
    z, h = inputs(dtype)
    bound = {"rtol": 0, "atol": 2e-5 if dtype is torch.float32 else 1e-11}
    for got, wanted in zip(flow(z, h), theirs(z, h), strict=True):
        torch.testing.assert_close(got, wanted, **bound)


@each_kind
def test_gradients_are_theirs(kind, units, reflections):
    torch.manual_seed(0)
    theirs = Theirs(kind, units, reflections).double()
    flow = from_sylvester_flows(theirs.state_dict(), kind)
    z, h = inputs()
    h.requires_grad_()
    found = []
    for f in (flow, theirs):
        z_out, log_det = f(z, h)
        found.append(torch.autograd.grad(z_out.square().sum() + log_det.sum(), h)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@each_kind
def test_the_state_dict_goes_both_ways(kind, units, reflections):
    theirs = Theirs(kind, units, reflections)
    state = theirs.state_dict()
    back = to_sylvester_flows_state_dict(from_sylvester_flows(state, kind))
    assert {name: t.shape for name, t in back.items()} == {n: t.shape for n, t in state.items() if "amor" in n}
    other = Theirs(kind, units, reflections)
    other.load_state_dict(back, strict=False)
    z, h = inputs(torch.float32)
    for got, wanted in zip(other(z, h), theirs(z, h), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("units", [4, DIM])
def test_what_bjorcks_tolerance_costs(units):
    """docs/interop.md: Q is orthonormal to 1e-6, or 1e-5 where M = D, and log_det off by less."""
    torch.manual_seed(1)
    theirs = Theirs("orthogonal", units, 0).double()
    flow = from_sylvester_flows(theirs.state_dict(), "orthogonal")
    z, h = inputs()
    q = flow.params(h).q
    defect = torch.linalg.matrix_norm(q.mT @ q - torch.eye(units, dtype=q.dtype)).max()
    assert defect <= (1e-5 if units == DIM else 1e-6)
    claimed = theirs(z, h)[1]
    rows = [torch.autograd.functional.jacobian(lambda row, k=k: fixed_q(theirs, row, h, k), z[k]) for k in range(ROWS)]
    exact = torch.linalg.slogdet(torch.stack(rows)).logabsdet
    assert (claimed - exact).abs().max() <= defect


def fixed_q(theirs, row, h, k):
    """z_L of row k, whose Q is that of its whole batch."""
    batch = torch.zeros(ROWS, DIM, dtype=row.dtype).index_put((torch.tensor([k]),), row[None])
    return theirs(batch, h)[0][k]


def test_float32s_rounding_ends_the_iteration():
    """Where rounding keeps |Q^T Q - I| above the tolerance theirs takes all its 100 steps, and to no effect."""
    from vvae_fast.interop.sylvester_flows import _bjorck

    torch.manual_seed(0)
    q = _bjorck(torch.randn(50, 40, 30), 1e-9)
    torch.testing.assert_close(q.mT @ q, torch.eye(30).expand(50, 30, 30), rtol=0, atol=1e-6)


def test_an_empty_batch():
    flow = from_sylvester_flows(Theirs("orthogonal", 4, 0).state_dict(), "orthogonal")
    z_out, log_det = flow(torch.zeros(0, DIM), torch.zeros(0, FEATURES))
    assert z_out.shape == (0, DIM)
    assert log_det.shape == (0,)


@each_kind
def test_the_inverse(kind, units, reflections):
    torch.manual_seed(0)
    flow = from_sylvester_flows(Theirs(kind, units, reflections).double().state_dict(), kind)
    z, h = inputs()
    z_out, log_det = flow(z, h)
    back, minus = flow.inverse(z_out, h)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-4)
    torch.testing.assert_close(minus, -log_det, rtol=0, atol=1e-4)


def test_errors():
    state = Theirs("householder", DIM, 5).state_dict()
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'iaf'"):
        from_sylvester_flows(state, "iaf")
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        from_sylvester_flows(nn.Identity(), "planar")
    with pytest.raises(ValueError, match=r"state_dict must have amor_u.weight, .* for kind='planar'"):
        from_sylvester_flows(state, "planar")
    with pytest.raises(ValueError, match="amor_q must have L D M with D >= M = 6 and L = 3 outputs, got 90"):
        from_sylvester_flows(state, "orthogonal")
    with pytest.raises(ValueError, match=r"state_dict must be of kind='householder' with D = 6, got"):
        from_sylvester_flows(Theirs("orthogonal", 4, 0).state_dict(), "householder")
    with pytest.raises(ValueError, match="amor_d must have M M L outputs"):
        from_sylvester_flows({**state, "amor_b.weight": torch.zeros(2, 3), "amor_b.bias": torch.zeros(2)}, "triangular")
    with pytest.raises(ValueError, match=r"amor_b.weight must be \[outputs, F\] and its bias"):
        from_sylvester_flows({**state, "amor_b.bias": torch.zeros(2)}, "triangular")
    with pytest.raises(TypeError, match=r"state_dict's amor_b.bias must be a torch.Tensor, got int"):
        from_sylvester_flows({**state, "amor_b.bias": 2}, "triangular")
    with pytest.raises(TypeError, match="flow must be one that from_sylvester_flows gives"):
        to_sylvester_flows_state_dict(AmortizedSylvesterFlow(4, 2, 2, 5))
