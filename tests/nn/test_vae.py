import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as dist

from vvae_fast.nn.likelihoods import Binomial, Gaussian
from vvae_fast.nn.mlp import mlp_decoder, mlp_encoder
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.vae import VAE

DATA, HIDDEN, LATENT, BATCH = 12, 10, 4, 6


class AffineFlow(nn.Module):
    """z -> scale z + shift: the posterior stays Gaussian, so that everything is known in closed form."""

    def __init__(self, dim: int, scale: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.dim, self.scale, self.shift = dim, scale, shift

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * z + self.shift, z.new_full(z.shape[:-1], self.dim * math.log(self.scale))


def make_vae(flow: nn.Module | None = None, likelihood="bernoulli", num_params: int = 1) -> VAE:
    torch.manual_seed(0)
    encoder, decoder = mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, HIDDEN, num_params * DATA)
    return VAE(encoder, decoder, LATENT, flow, likelihood).double()


def bits(batch: int = BATCH) -> Tensor:
    return torch.randint(0, 2, (batch, DATA), generator=torch.manual_seed(1)).double()


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_gaussian_vae(flow: AffineFlow | None = None) -> tuple[VAE, Tensor, Tensor]:
    """A VAE with p(x) = N(bias, W W' + noise I) and nearly the true posterior; x [B, 3]; log p(x) [B]."""
    generator = seeded(3)
    weight, bias = torch.randn(3, 2, generator=generator).double(), torch.randn(3, generator=generator).double()
    log_var = -0.7
    decoder = nn.Linear(2, 3).double()
    vae = VAE(nn.Identity(), decoder, 2, flow, Gaussian(log_var=log_var), feature_dim=3).double()
    scale, shift = (flow.scale, flow.shift) if flow is not None else (1.0, 0.0)
    covariance = torch.linalg.inv(torch.eye(2).double() + weight.T @ weight / math.exp(log_var))
    to_mean = covariance @ weight.T / math.exp(log_var)  # [2, 3]
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        vae.posterior_head.weight.copy_(torch.cat([to_mean / scale, torch.zeros(2, 3)]))
        log_diagonal = (covariance.diagonal() / scale**2).log()
        vae.posterior_head.bias.copy_(torch.cat([(-to_mean @ bias - shift) / scale, log_diagonal]))
    marginal = dist.MultivariateNormal(bias, weight @ weight.T + math.exp(log_var) * torch.eye(3).double())
    x = marginal.sample((BATCH,))
    return vae, x, marginal.log_prob(x)


def test_kl_without_flow_is_torchs():
    vae, x = make_vae(), bits()
    mean, log_var, _ = vae.encode(x)
    expected = dist.kl_divergence(dist.Normal(mean, (0.5 * log_var).exp()), dist.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(vae.elbo_terms(x).kl, expected)
    torch.testing.assert_close(vae.elbo_terms(x, num_samples=5).kl, expected)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.7, -0.4)], ids=["identity", "affine"])
def test_kl_with_a_flow_converges_to_the_exact_one(scale, shift):
    vae, x = make_vae(AffineFlow(LATENT, scale, shift)), bits()
    mean, log_var, _ = vae.encode(x)
    q = dist.Normal(scale * mean + shift, scale * (0.5 * log_var).exp())
    expected = dist.kl_divergence(q, dist.Normal(0.0, 1.0)).sum(-1)
    samples = 20_000
    single = torch.stack([vae.elbo_terms(x, generator=seeded(seed)).kl for seed in range(50)])  # [50, B]
    tolerance = 5 * single.std(0) / math.sqrt(samples)
    kl = vae.elbo_terms(x, num_samples=samples, generator=seeded()).kl
    assert ((kl - expected).abs() < tolerance).all()


@pytest.mark.parametrize("flow", [None, PlanarFlow(LATENT, 3)], ids=["vanilla", "planar"])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_terms_are_one_number_a_data_point_and_add_up(flow, num_samples):
    terms = make_vae(flow)(bits(), num_samples)
    assert all(term.shape == (BATCH,) for term in terms)
    torch.testing.assert_close(terms.neg_elbo, terms.kl + terms.reconstruction)


def test_reconstruction_is_the_likelihood_of_the_decoders_output():
    vae, x = make_vae(), bits()
    mean, log_var, _ = vae.encode(x)
    z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=seeded(), dtype=mean.dtype)
    expected = -dist.Bernoulli(logits=vae.decoder(z)).log_prob(x).sum(-1)
    torch.testing.assert_close(vae.elbo_terms(x, generator=seeded()).reconstruction, expected)


@pytest.mark.parametrize("make_flow", [lambda: None, lambda: AffineFlow(2, 1.6, 0.3)], ids=["vanilla", "affine"])
def test_log_likelihood_is_exact_where_it_is_known(make_flow):
    vae, x, log_p = linear_gaussian_vae(make_flow())
    estimate = vae.log_likelihood(x, num_samples=20_000, generator=seeded())
    torch.testing.assert_close(estimate, log_p, rtol=0.0, atol=0.05)


def test_more_importance_samples_tighten_the_bound():
    vae, x, log_p = linear_gaussian_vae()
    x, log_p = x.repeat(2000, 1), log_p.repeat(2000)
    with torch.no_grad():
        vae.posterior_head.bias += 0.5
    neg_elbo = vae.elbo_terms(x, generator=seeded()).neg_elbo.mean().item()
    nll = {k: -vae.log_likelihood(x, k, generator=seeded()).mean().item() for k in (1, 5, 50)}
    assert nll[1] == pytest.approx(neg_elbo, abs=0.05)
    assert neg_elbo > nll[5] + 0.05 > nll[50] + 0.1 > -log_p.mean().item() + 0.05


@pytest.mark.parametrize("flow", [None, AmortizedPlanarFlow(LATENT, 3, HIDDEN)], ids=["vanilla", "planar"])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 60, 10_000])
def test_chunks_bound_memory_and_change_nothing(flow, chunk_size):
    vae, x = make_vae(flow), bits()
    whole = vae.log_likelihood(x, 23, generator=seeded())
    rows = []
    vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    torch.testing.assert_close(vae.log_likelihood(x, 23, chunk_size, seeded()), whole)
    assert max(rows) <= chunk_size
    assert sum(rows) == 23 * BATCH


def test_log_likelihood_needs_no_graph_and_checks_its_data():
    vae = make_vae()
    assert not vae.log_likelihood(bits(), 3).requires_grad
    with pytest.raises(ValueError, match=r"values in \[0, 1\] for the bernoulli"):
        vae.log_likelihood(bits() + 1.0, 3)


@pytest.mark.parametrize("make_flow", [lambda: PlanarFlow(LATENT, 3), lambda: AmortizedPlanarFlow(LATENT, 3, HIDDEN)])
def test_a_fresh_planar_flow_changes_nothing_and_learns(make_flow):
    flow, x = make_flow(), bits()
    terms, plain = make_vae(flow).elbo_terms(x, generator=seeded()), make_vae().elbo_terms(x, generator=seeded())
    torch.testing.assert_close(terms.reconstruction, plain.reconstruction)
    terms.neg_elbo.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    assert any(p.grad.abs().max() > 0 for p in flow.parameters())


def test_an_amortized_flow_reads_the_encoders_features():
    vae, x = make_vae(AmortizedPlanarFlow(LATENT, 3, HIDDEN)), bits()
    for parameter in vae.flow.parameters():
        nn.init.normal_(parameter)
    drawn = vae.posterior_sample(x, 5, seeded())
    z_K, log_det = vae.flow(drawn.z_0, vae.encoder(x))
    torch.testing.assert_close(drawn.z_K, z_K)
    q_0 = dist.Normal(vae.encode(x).mean, (0.5 * vae.encode(x).log_var).exp())
    torch.testing.assert_close(drawn.log_q, q_0.log_prob(drawn.z_0).sum(-1) - log_det)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("flow", [None, PlanarFlow(LATENT, 2), AmortizedPlanarFlow(LATENT, 2, HIDDEN)])
def test_batches_of_one_and_none(flow, batch):
    vae, x = make_vae(flow), bits(batch)
    assert vae(x).neg_elbo.shape == vae(x, 3).kl.shape == vae.log_likelihood(x, 5).shape == (batch,)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.posterior_sample(x, 2).z_K.shape == (2, batch, LATENT)


def test_a_row_depends_on_itself_alone():
    vae, x = make_vae(), bits()
    vae(x)  # the first batch is checked
    x[2] = math.nan
    terms = vae(x)
    others = torch.arange(BATCH) != 2
    assert terms.neg_elbo[2].isnan()
    assert terms.neg_elbo[others].isfinite().all()


class ConvDecoder(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(LATENT, channels, 4)

    def forward(self, z: Tensor) -> Tensor:  # [N, D] -> [N, channels, 4, 4]
        return self.up(z[:, :, None, None])


@pytest.mark.parametrize(("likelihood", "channels"), [("bernoulli", 1), (Gaussian(), 2), (Binomial(3), 1)])
def test_images_and_convolutions(likelihood, channels):
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    vae = VAE(encoder, ConvDecoder(channels), LATENT, None, likelihood, feature_dim=8)
    x = torch.randint(0, 2, (BATCH, 1, 4, 4)).float()
    assert vae(x, num_samples=3).reconstruction.shape == (BATCH,)
    assert vae.log_likelihood(x, 4).shape == (BATCH,)
    assert vae.sample(5).shape == vae.sample(5, mean=True).shape == (5, 1, 4, 4)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.decode(torch.zeros(2, 3, LATENT)).shape == (2, 3, channels, 4, 4)
    assert vae.decode(torch.zeros(LATENT)).shape == (channels, 4, 4)


def test_generators_decide_what_is_drawn():
    vae, x = make_vae(PlanarFlow(LATENT, 2)), bits()
    for draw in (vae.reconstruct, lambda x, generator: vae.sample(4, generator=generator)):
        assert torch.equal(draw(x, generator=seeded(5)), draw(x, generator=seeded(5)))
        assert not torch.equal(draw(x, generator=seeded(5)), draw(x, generator=seeded(6)))


def test_copies_and_pickles():
    vae, x = make_vae(AmortizedPlanarFlow(LATENT, 2, HIDDEN), Binomial(1)), bits()
    expected = vae(x, generator=seeded())
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(twin(x, generator=seeded()).neg_elbo, expected.neg_elbo)


def test_log_variances_survive_autocast():
    vae = make_vae().float()
    with torch.autocast("cpu", torch.bfloat16):
        terms = vae(bits().float())
    assert {term.dtype for term in terms} == {torch.float32}


def test_feature_dim_comes_from_the_flow_the_encoder_or_the_caller():
    decoder = mlp_decoder(LATENT, DATA)
    assert VAE(nn.Identity(), decoder, LATENT, AmortizedPlanarFlow(LATENT, 2, DATA)).feature_dim == DATA
    assert VAE(mlp_encoder(DATA, HIDDEN), decoder, LATENT).feature_dim == HIDDEN
    assert VAE(nn.Identity(), decoder, LATENT, feature_dim=DATA).feature_dim == DATA
    with pytest.raises(ValueError, match="pass feature_dim="):
        VAE(nn.Identity(), decoder, LATENT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flow": PlanarFlow(LATENT + 1, 2)}, "flow.dim and latent_dim must agree, got 5 and 4"),
        ({"flow": AmortizedPlanarFlow(LATENT, 2, 3)}, "encoder.out_features and feature_dim must agree, got 10 and 3"),
        ({"feature_dim": 3}, "encoder.out_features and feature_dim must agree, got 10 and 3"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"latent_dim": 2.0}, "latent_dim must be an int, got float"),
        ({"encoder": len}, "encoder must be an nn.Module, got builtin"),
        ({"decoder": None}, "decoder must be an nn.Module, got NoneType"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
    ],
)
def test_constructor_refuses(arguments, message):
    defaults = {"encoder": mlp_encoder(DATA, HIDDEN), "decoder": mlp_decoder(LATENT, DATA), "latent_dim": LATENT}
    with pytest.raises((ValueError, TypeError), match=message):
        VAE(**{**defaults, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a Tensor, got list"),
        (torch.zeros(DATA).double(), ValueError, r"x must be \[B, \*data\], got shape \(12,\)"),
        (torch.zeros(2, DATA), TypeError, "x must be torch.float64 like the VAE, got torch.float32"),
        (torch.zeros(2, DATA, dtype=torch.long), TypeError, "got torch.int64"),
        (torch.zeros(2, DATA, device="meta").double(), ValueError, "x must be on cpu like the VAE, got meta"),
    ],
)
def test_bad_data_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        make_vae()(x)


@pytest.mark.parametrize("call", ["__call__", "encode", "posterior_sample", "reconstruct", "log_likelihood", "iwae"])
def test_rows_of_another_width_are_refused(call):
    """By name, whatever is called, and with PyTorch's own error as the cause."""
    vae = VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, DATA), LATENT)
    more = {"num_samples": 2} if call == "iwae" else {}
    words = rf"x must have {DATA} numbers a row, as encoder's first layer takes, got 5, shape \(2, 5\); pass such rows"
    with pytest.raises(ValueError, match=words) as refused:
        getattr(vae, call)(torch.zeros(2, 5), **more)
    assert isinstance(refused.value.__cause__, RuntimeError)


def test_modules_whose_layers_do_not_fit_are_named():
    x = bits().float()
    for decoder, words in (
        (mlp_decoder(LATENT + 1, DATA), "z must have 5 numbers a row, as decoder's first layer takes, got 4"),
        (
            nn.Sequential(nn.Linear(LATENT, 3), nn.Linear(2, DATA)),
            r"decoder must take z of shape \(6, 4\).*refused: mat1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            VAE(mlp_encoder(DATA, HIDDEN), decoder, LATENT)(x)
    for layer in (nn.Conv2d(1, 2, 3), nn.Linear(DATA - 1, HIDDEN), nn.LayerNorm(DATA - 1)):
        encoder = nn.Sequential(nn.Identity(), layer, nn.Flatten())
        with pytest.raises(
            ValueError, match=r"x must have 11 numbers|encoder must take x of shape \(6, 12\), and a layer"
        ):
            VAE(encoder, mlp_decoder(LATENT, DATA), LATENT, feature_dim=HIDDEN)(x)


def test_other_errors_of_a_module_stay_as_they_are():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match=r"^a defect$"):
        VAE(Broken(), mlp_decoder(LATENT, DATA), LATENT, feature_dim=HIDDEN)(bits().float())


def test_encoders_and_decoders_of_wrong_shape_are_refused():
    x = bits().float()
    with pytest.raises(ValueError, match=r"encoder must give features of shape \(6, 5\).*got \(6, 12\)"):
        VAE(nn.Identity(), mlp_decoder(LATENT, DATA), LATENT, feature_dim=5)(x)
    with pytest.raises(ValueError, match=r"params must be .*6, 12\] .*got \(6, 13\)"):
        VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, DATA + 1), LATENT)(x)
    with pytest.raises(ValueError, match=r"z must be \[\*batch, 4\], got \(6, 12\)"):
        make_vae().decode(x)
    with pytest.raises(ValueError, match=r"decoder must give \[6, \*\]"):
        VAE(mlp_encoder(DATA, HIDDEN), nn.Flatten(0), LATENT)(x)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="num_samples must be at least 1"):
            make_vae()(bits(), num_samples=bad)


def test_mlp_widths():
    encoder, decoder = mlp_encoder(784, 400), mlp_decoder(40, 400, 784, activation=nn.Tanh)
    assert [type(layer) for layer in encoder] == [nn.Flatten, nn.Linear, nn.ReLU]
    assert [type(layer) for layer in decoder] == [nn.Linear, nn.Tanh, nn.Linear]
    assert (encoder.in_features, encoder.out_features, decoder.out_features) == (784, 400, 784)
    for build in (mlp_encoder, mlp_decoder):
        with pytest.raises(ValueError, match="needs at least two widths"):
            build(3)
        with pytest.raises(ValueError, match="each width must be at least 1, got 0"):
            build(3, 0)
        with pytest.raises(TypeError, match="each width must be an int, got float"):
            build(3, 2.0)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_noise_may_be_given(num_samples):
    vae = VAE(mlp_encoder(6, 4), mlp_decoder(2, 4, 6), 2, flow=PlanarFlow(2, 3))
    x, shape = torch.rand(5, 6).round(), (5, 2) if num_samples == 1 else (num_samples, 5, 2)
    torch.manual_seed(1)
    drawn = vae(x, num_samples)
    torch.manual_seed(1)
    given = vae(x, num_samples, noise=torch.randn(shape))
    assert all(map(torch.equal, drawn, given))
    with pytest.raises(ValueError, match=r"noise must be \(.*5, 2\), got \(5, 3\)"):
        vae(x, num_samples, noise=torch.randn(5, 3))
