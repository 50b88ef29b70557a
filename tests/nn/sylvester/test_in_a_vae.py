"""Sylvester and Householder flows as a VAE's posterior: the bounds, half precision, and the inference gaps."""

import copy
import math
import pickle

import pytest
import torch
from test_vae import bits, make_vae, seeded
from torch import nn

from vvae_fast import (
    VAE,
    AmortizedHouseholderFlow,
    AmortizedSylvesterFlow,
    HouseholderFlow,
    SylvesterFlow,
    inference_gaps,
)
from vvae_fast.nn import FittedFlow, mlp_decoder, mlp_encoder

BACKENDS = ["reference", "cpp"]
DIM, HIDDEN = 4, 10  # of make_vae
SYLVESTER = {"backend": BACKENDS[0]}
FLOWS = {
    "orthogonal": lambda: SylvesterFlow(DIM, 2, 3, **SYLVESTER),
    "householder": lambda: SylvesterFlow(DIM, 2, kind="householder", num_reflections=3, **SYLVESTER),
    "triangular": lambda: SylvesterFlow(DIM, 2, kind="triangular", **SYLVESTER),
    "amortized orthogonal": lambda: AmortizedSylvesterFlow(DIM, 2, 3, HIDDEN, activation="elu", **SYLVESTER),
    "amortized triangular": lambda: AmortizedSylvesterFlow(
        DIM, 2, None, HIDDEN, kind="triangular", rank=3, **SYLVESTER
    ),
    "reflections": lambda: HouseholderFlow(DIM, 3),
    "amortized reflections": lambda: AmortizedHouseholderFlow(DIM, 3, HIDDEN, rank=2),
}
flows = pytest.mark.parametrize("flow", FLOWS)


def moved_vae(flow: str) -> VAE:
    """A VAE in float64 with a wrong encoder and a flow that is not the identity."""
    torch.manual_seed(4)
    vae = make_vae(FLOWS[flow]())
    nn.init.constant_(vae.posterior_head.bias, 1.0)
    for parameter in vae.flow.parameters():
        nn.init.normal_(parameter, std=0.5)
    return vae


@flows
def test_the_elbo_is_what_its_parts_are(flow):
    vae, x, noise = moved_vae(flow), bits(), torch.randn(3, len(bits()), DIM).double()
    mean, log_var, features = vae.encode(x)
    z_0 = mean + (0.5 * log_var).exp() * noise
    z_K, log_det = vae.flow(z_0, *([features] if flow.startswith("amortized") else []))
    log_q = -0.5 * (noise.square() + log_var + math.log(2 * math.pi)).sum(-1) - log_det
    wanted = vae.log_joint(x, z_K) - log_q  # [3, B]
    torch.testing.assert_close(-vae(x, 3, noise=noise).neg_elbo, wanted.mean(0))
    torch.testing.assert_close(vae.iwae(x, 3, noise=noise), wanted.logsumexp(0) - math.log(3))
    drawn = vae.posterior_sample(x, 3, seeded())
    z_0, inverse_log_det = vae.flow.inverse(drawn.z_K, *([features] if flow.startswith("amortized") else []))
    torch.testing.assert_close(z_0, drawn.z_0)
    log_q_0 = -0.5 * ((z_0 - mean).square() / log_var.exp() + log_var + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(drawn.log_q, log_q_0 + inverse_log_det)


@flows
def test_log_likelihood_is_a_tighter_bound(flow):
    vae, x = moved_vae(flow), bits()
    found = vae.importance(x, 500, generator=seeded())
    assert (found.log_likelihood > found.elbo).all()
    assert found.log_likelihood.isfinite().all()


@flows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(flow, dtype):
    half = moved_vae(flow).to(dtype)
    wide, x, noise = copy.deepcopy(half).float(), bits().to(dtype), torch.randn(len(bits()), DIM)
    got, wanted = half(x, noise=noise), wide(x.float(), noise=noise)
    assert {t.dtype for t in got} == {torch.float32}
    for a, b in zip(got, wanted, strict=True):
        assert ((a - b).abs() / (1 + b.abs())).max() < 0.15
    got.neg_elbo.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in half.parameters())
    drawn = half.posterior_sample(x, 2)
    context = (half.encode(x).features,) if flow.startswith("amortized") else ()
    torch.testing.assert_close(half.flow(drawn.z_0, *context)[0], drawn.z_K)  # with all digits of float32


@flows
def test_a_step_compiles(flow):
    make = FLOWS[flow]
    vae = VAE(mlp_encoder(6, HIDDEN), mlp_decoder(DIM, HIDDEN, 6), DIM, make())
    x, noise = torch.randint(0, 2, (5, 6)).float(), torch.randn(5, DIM)
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")
    gradients = []
    for step in (vae, compiled):
        vae.zero_grad()
        step(x, noise=noise).neg_elbo.mean().backward()
        gradients.append([p.grad.clone() for p in vae.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@flows
def test_q_starts_as_the_vaes_own_posterior(flow):
    """A learning rate near 0 leaves it there: its densities, at the points that the VAE draws, are the VAE's."""
    vae, x = moved_vae(flow), bits()
    fitted = inference_gaps(vae, x, iterations=1, lr=1e-300, num_samples=2).proposal
    assert isinstance(fitted, FittedFlow)
    assert {len(t) for t in fitted.params} == {len(x)}
    drawn = vae.posterior_sample(x, 3, seeded())
    for q in (fitted, pickle.loads(pickle.dumps(fitted))):
        z, log_q = q.sample(3, seeded())
        torch.testing.assert_close(z, drawn.z_K)
        torch.testing.assert_close(log_q, drawn.log_q)


@flows
def test_fitting_raises_the_elbo(flow):
    vae = moved_vae(flow)
    before = [p.clone() for p in vae.parameters()]
    gaps = inference_gaps(vae, bits(), iterations=100, num_samples=500, generator=seeded())
    assert (gaps.amortization_gap > 0.1).all()
    assert (gaps.effective_sample_size > gaps.plain.effective_sample_size).all()
    assert all(map(torch.equal, vae.parameters(), before))


@pytest.mark.parametrize("flow", ["orthogonal", "amortized triangular", "amortized reflections"])
def test_gaps_in_half_precision_and_of_parts(flow):
    vae, x = moved_vae(flow).bfloat16(), bits(5).bfloat16()
    gaps = inference_gaps(vae, x, iterations=3, num_samples=20, chunk_size=32, generator=seeded())
    assert {t.dtype for t in (*gaps[:6], *gaps.proposal.params)} == {torch.float32}
    assert {len(t) for t in gaps.proposal.params} == {5}


def test_a_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps is for planar flows, got 4 for SylvesterFlow: leave it out"):
        inference_gaps(moved_vae("orthogonal"), bits(), num_steps=4)


def test_sizes_have_to_fit():
    networks = mlp_encoder(6, HIDDEN), mlp_decoder(DIM, HIDDEN, 6), DIM
    for flow in (SylvesterFlow(3, 2), HouseholderFlow(3, 2)):
        with pytest.raises(ValueError, match=r"flow\.dim and latent_dim must agree, got 3 and 4"):
            VAE(*networks, flow)
    for flow in (AmortizedSylvesterFlow(DIM, 2, 2, 7), AmortizedHouseholderFlow(DIM, 2, 7)):
        with pytest.raises(ValueError, match=r"encoder\.out_features and feature_dim must agree, got 10 and 7"):
            VAE(*networks, flow)


def test_an_amortized_flow_has_d_units_by_default():
    flow = AmortizedSylvesterFlow(4, 2, kind="triangular", context_dim=6)
    assert flow.num_units == SylvesterFlow(4, 2).num_units == 4
    with pytest.raises(TypeError, match="context_dim must be given: the size F of the contexts"):
        AmortizedSylvesterFlow(4, 2, 3)
