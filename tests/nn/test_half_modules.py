"""Modules in half precision as a whole: every public call works, and statistics and densities are float32."""

import copy

import pytest
import torch
from test_modules import away_from_identity
from torch import nn

from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow
from vvae_fast.distributions import PlanarTransform
from vvae_fast.interop import normflows, pyro
from vvae_fast.nn import Bernoulli, Binomial, Gaussian, mlp_decoder, mlp_encoder
from vvae_fast.nn.gated import gated_conv_decoder, gated_conv_encoder, gated_mlp_decoder, gated_mlp_encoder

DATA, HIDDEN, LATENT, BATCH = 12, 10, 4, 6
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
halves = pytest.mark.parametrize("dtype", list(EPS), ids=["bfloat16", "float16"])
FLOWS = {
    "none": lambda: None,
    "shared": lambda: PlanarFlow(LATENT, 3),
    "amortized": lambda: AmortizedPlanarFlow(LATENT, 3, HIDDEN),
}
flows = pytest.mark.parametrize("flow", list(FLOWS))
likelihoods = pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(), Binomial(3), Gaussian(), Gaussian(0.5)],
    ids=["bernoulli", "binomial", "learnt", "fixed"],
)


def make(flow, likelihood=None, networks=(mlp_encoder, mlp_decoder)):
    likelihood = likelihood or Bernoulli()
    encoder, decoder = networks
    flow = FLOWS[flow]()
    if flow is not None:
        away_from_identity(flow)
    return VAE(encoder(DATA, HIDDEN), decoder(LATENT, HIDDEN, likelihood.num_params * DATA), LATENT, flow, likelihood)


def bits(dtype=torch.float32):
    return torch.randint(0, 2, (BATCH, DATA)).to(dtype)


def seeded():
    return torch.Generator().manual_seed(2)


def dtypes(tensors):
    return {t.dtype for t in tensors if t is not None}


def worst(got, wanted):
    return max(((x - y).abs() / (1 + y.abs())).max().item() for x, y in zip(got, wanted, strict=True))


@halves
@flows
@likelihoods
def test_what_a_vae_in_half_precision_gives(flow, likelihood, dtype):
    """As the same numbers in float32: they differ by the roundings of the networks."""
    half = make(flow, likelihood).to(dtype)
    wide = copy.deepcopy(half).float()
    x, noise = bits(), torch.randn(BATCH, LATENT)
    calls = {
        "forward": lambda vae, x: vae(x, noise=noise),
        "samples": lambda vae, x: vae.elbo_terms(x, 3, seeded()),
        "importance": lambda vae, x: [vae.log_likelihood(x, 20, 16, seeded())],
        "posterior": lambda vae, x: vae.posterior_sample(x, 2, seeded()),
        "encode": lambda vae, x: vae.encode(x)[:2],
        "decode": lambda vae, x: [vae.decode(noise)],
    }
    for name, call in calls.items():
        got, wanted = call(half, x.to(dtype)), call(wide, x)
        assert dtypes(got) == {torch.float32}, name
        assert worst(got, wanted) < 16 * EPS[dtype], name


@halves
@flows
@likelihoods
def test_what_a_vae_made_goes_into_it_again(flow, likelihood, dtype):
    """And into its flow: the user converts nothing that the user has not made."""
    vae, x = make(flow, likelihood).to(dtype), bits(dtype)
    drawn, posterior = vae.posterior_sample(x, 2), vae.encode(x)
    for made in (vae.sample(3), vae.sample(3, mean=True), vae.reconstruct(x)):
        assert made.dtype == dtype
        vae(made)
    vae.log_likelihood(vae.sample(3), 4)
    vae.decode(drawn.z_K)
    if vae.flow is None:
        return
    context = (posterior.features,) if flow == "amortized" else ()
    for z in (drawn.z_0, drawn.z_0.to(dtype)):
        z_K, log_det = vae.flow(z, *context)
        z_0, inverse_log_det = vae.flow.inverse(z_K, *context)
        assert (z_K.dtype, z_0.dtype, log_det.dtype, inverse_log_det.dtype) == (z.dtype, z.dtype, *[torch.float32] * 2)
        assert vae.flow.trajectory(z, *context).dtype == z.dtype
    torch.testing.assert_close(vae.flow(drawn.z_0, *context)[0], drawn.z_K)  # with all digits of float32


@halves
@flows
@likelihoods
def test_a_training_step(flow, likelihood, dtype):
    vae, x = make(flow, likelihood).to(dtype), bits(dtype)
    optimizer = torch.optim.SGD(vae.parameters(), 1e-2)
    before = vae(x, noise=torch.zeros(BATCH, LATENT)).neg_elbo.mean()
    before.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in vae.parameters())
    optimizer.step()
    assert vae(x, noise=torch.zeros(BATCH, LATENT)).neg_elbo.mean() < before


@halves
@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(400), Gaussian(), Gaussian(0.5)])
def test_densities_are_summed_in_float32(likelihood, dtype):
    """Of 784 dimensions; in half precision the sum alone would be off by nats."""
    x = torch.randint(0, 2, (2, 784)).to(dtype)
    params = torch.randn(2, likelihood.num_params * 784).to(dtype)
    got, wanted = likelihood.log_prob(x, params), likelihood.log_prob(x.double(), params.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)


@halves
@pytest.mark.parametrize("networks", ["gated", "convolutional"])
def test_the_other_networks(networks, dtype):
    if networks == "gated":
        vae, x = make("amortized", networks=(gated_mlp_encoder, gated_mlp_decoder)), bits(dtype)
    else:
        vae, x = VAE(gated_conv_encoder(), gated_conv_decoder(LATENT), LATENT), torch.zeros(1, 28, 28, dtype=dtype)
    vae.to(dtype)
    terms = vae(x)
    terms.neg_elbo.sum().backward()
    assert dtypes(terms) == {torch.float32}
    assert all(p.grad.isfinite().all() for p in vae.parameters())


@halves
@pytest.mark.parametrize("part", ["encoder", "decoder", "flow", "posterior_head"])
def test_a_part_alone_in_another_precision(part, dtype):
    """Each module is called in the dtype of its own parameters."""
    for whole, own in ((torch.float32, dtype), (dtype, torch.float32), (torch.float32, torch.float64)):
        vae = make("amortized").to(whole)
        getattr(vae, part).to(own)
        x = bits(vae.posterior_head.weight.dtype)
        assert all(t.isfinite().all() for t in vae(x))
        vae.log_likelihood(x, 3)
        vae.reconstruct(x)


class Scaling(nn.Module):
    """A flow of one's own, with a parameter and with none."""

    def __init__(self, learnt):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0)) if learnt else 2.0

    def forward(self, z):
        scale = torch.as_tensor(self.scale, dtype=z.dtype)
        return nn.functional.linear(z, scale * torch.eye(LATENT, dtype=z.dtype)), scale.log().expand(z.shape[:-1])


@halves
@pytest.mark.parametrize("learnt", [True, False])
def test_a_flow_of_ones_own(learnt, dtype):
    vae = VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, DATA), LATENT, Scaling(learnt)).to(dtype)
    assert dtypes(vae.posterior_sample(bits(dtype), 2)) == dtypes(vae(bits(dtype))) == {torch.float32}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@flows
def test_autocast_over_a_vae(flow, dtype, autocast):
    vae = make(flow).to(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", autocast):
        for x in {dtype: bits(dtype), torch.float32: bits(wanted)}.values():
            assert dtypes([*vae(x), vae.log_likelihood(x, 3)]) == {wanted}
            vae.reconstruct(x)
        vae.sample(2)
    wrong = torch.float32 if dtype == torch.float64 else torch.float64
    with (
        torch.autocast("cpu", autocast),
        pytest.raises(TypeError, match=f"x must be {dtype} like the VAE, got {wrong}"),
    ):
        vae(bits(wrong))  # autocast converts no float64


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("flow", ["shared", "amortized"])
def test_another_default_dtype(flow, default_dtype):
    """Of the modules made under it, and of those that were there before."""
    vae, before = make(flow), make(flow).float()
    for module, dtype in ((vae, default_dtype), (before, torch.float32)):
        x = bits(dtype)
        assert dtypes(module(x)) == {torch.float64 if dtype == torch.float64 else torch.float32}
        module.log_likelihood(module.sample(3), 3)
        assert module.reconstruct(x).dtype == dtype


@halves
def test_a_flow_starts_as_the_identity_in_half_precision(dtype):
    flow = PlanarFlow(16, 8).to(dtype)
    flow.reset_parameters()
    z = torch.randn(20, 16)
    z_K, log_det = flow(z)
    assert (z_K - z).abs().max() < 16 * EPS[dtype]
    assert log_det.abs().max() < 16 * EPS[dtype]


@halves
def test_layers_in_other_packages_places(dtype):
    z = torch.randn(5, LATENT).to(dtype)
    z_K, log_det = normflows.PlanarStack(LATENT, 3).to(dtype)(z)
    assert (z_K.dtype, log_det.dtype) == (dtype, torch.float32)
    transform = pyro.PlanarStack(LATENT, 3).to(dtype)
    flow = PlanarFlow(LATENT, 3).to(dtype)
    for t in (transform, PlanarTransform(flow.u, flow.w, flow.b)):
        y = t(z)
        assert (y.dtype, t.log_abs_det_jacobian(z, y).dtype, t.inv(y.clone()).dtype) == (dtype, torch.float32, dtype)


@pytest.mark.parametrize("amortized", [False, True])
def test_z_of_another_dtype_is_refused_by_name(amortized):
    flow = AmortizedPlanarFlow(2, 3, 4) if amortized else PlanarFlow(2, 3)
    for own, wrong in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
    ):
        flow.to(own)
        context = (torch.zeros(5, 4, dtype=own),) if amortized else ()
        for call in (flow, flow.inverse, flow.trajectory):
            with pytest.raises(TypeError, match=f"z must be {own} like the flow, got {wrong}"):
                call(torch.zeros(5, 2, dtype=wrong), *context)
    with pytest.raises(TypeError, match=r"z must be torch.float32 like the VAE, got torch.float64"):
        make("none").decode(torch.zeros(2, LATENT).double())


def test_tensors_without_data():
    """Such as torch.device("meta") makes; autocast knows no such device."""
    vae = make("amortized").to("meta")
    assert vae(bits().to("meta")).neg_elbo.shape == (BATCH,)
