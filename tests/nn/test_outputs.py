"""What encoders, flows and decoders of one's own give: taken where it can be, else refused by the module's name."""

import re

import pytest
import torch
from torch import nn

from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn import Gaussian, mlp_decoder, mlp_encoder

DATA, HIDDEN, LATENT, BATCH = 12, 10, 4, 6


class Giving(nn.Module):
    """Calls a function on its input; `width` is what an encoder says of itself."""

    def __init__(self, function, width=None):
        super().__init__()
        self.function, self.out_features = function, width

    def forward(self, *inputs):
        return self.function(*inputs)


class TwoHeads(nn.Module):
    """The encoder of many an example: mean and log-variance, from two linear layers, and the features if asked for."""

    def __init__(self, gives_features=False, kind=tuple):
        super().__init__()
        self.body, self.gives_features, self.kind = nn.Linear(DATA, HIDDEN), gives_features, kind
        self.mean, self.log_var = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x):
        h = self.body(x.flatten(1)).relu()
        return self.kind([self.mean(h), self.log_var(h), *([h] if self.gives_features else [])])


def data():
    return torch.randint(0, 2, (BATCH, DATA)).float()


def messages(*parts):
    return ".*".join(re.escape(part) for part in parts)


def calls(vae, x):
    """Every public call that x goes through."""
    return (
        lambda: vae(x),
        lambda: vae.elbo_terms(x, 3),
        lambda: vae.log_likelihood(x, 3),
        lambda: vae.reconstruct(x),
        lambda: vae.posterior_sample(x, 2),
    )


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("feature_dim", [0, HIDDEN])
@pytest.mark.parametrize("flow", [None, PlanarFlow(LATENT, 2)], ids=["vanilla", "shared"])
def test_an_encoder_with_two_heads(flow, feature_dim, kind):
    """Its mean and log-variance are the posterior's, whether or not there is a head that is left out."""
    encoder, x = TwoHeads(kind=kind), data()
    vae = VAE(encoder, mlp_decoder(LATENT, DATA), LATENT, flow, feature_dim=feature_dim)
    assert (vae.posterior_head is None) == (feature_dim == 0)
    posterior = vae.encode(x)
    mean, log_var = encoder(x)
    assert torch.equal(posterior.mean, mean)
    assert torch.equal(posterior.log_var, log_var)
    assert posterior.features is None
    vae(x).neg_elbo.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    for call in calls(vae, x):
        call()
    vae.log_likelihood(x, 3, chunk_size=2)
    assert vae.sample(3).shape == (3, DATA)
    half = vae.bfloat16()
    assert {t.dtype for t in half.encode(x.bfloat16())[:2]} == {torch.float32}
    assert half(x.bfloat16()).kl.dtype == torch.float32


@pytest.mark.parametrize("feature_dim", [0, None])
def test_an_amortized_flow_needs_features(feature_dim):
    flow, x = AmortizedPlanarFlow(LATENT, 2, HIDDEN), data()
    vae = VAE(TwoHeads(), mlp_decoder(LATENT, DATA), LATENT, flow, feature_dim=feature_dim)
    for call in calls(vae, x):
        with pytest.raises(ValueError, match=r"flow takes features of width 10, and the encoder gave none: .*features"):
            call()
    vae = VAE(TwoHeads(gives_features=True), mlp_decoder(LATENT, DATA), LATENT, flow, feature_dim=feature_dim)
    assert vae.encode(x).features.shape == (BATCH, HIDDEN)
    for call in calls(vae, x):
        call()


FEATURES = ("encoder must give features of shape (6, 10)", "or the pair (mean, log_var) of shape (6, 4) each")
PAIR = ("encoder must give (mean, log_var) of shape (6, 4) each",)
WRONG_ENCODERS = [
    (lambda x: None, ValueError, (*FEATURES, "got NoneType")),
    (lambda x: {"mu": x, "logvar": x}, ValueError, (*FEATURES, "got a dict of 'mu', 'logvar'")),
    (lambda x: (x,), ValueError, (*FEATURES, "got a tuple of 1: ((6, 12))")),
    (lambda x: (x, x, x, x), ValueError, (*FEATURES, "got a tuple of 4")),
    (
        lambda x: (x, (x, None)),
        ValueError,
        (*FEATURES, "got a tuple of 2: ((6, 12), a tuple of 2: ((6, 12), NoneType))"),
    ),
    (lambda x: x.numpy(), ValueError, (*FEATURES, "got ndarray")),
    (lambda x: (x[:, :3], x[:, :3]), ValueError, (*PAIR, "got mean (6, 3)")),
    (lambda x: (x[:, :4], x[:, :1]), ValueError, (*PAIR, "got log_var (6, 1)")),
    (lambda x: (x[:, :4], x[:, :4], x[:3]), ValueError, (*PAIR, "got features (3, 12)")),
    (lambda x: x[:, :10].long(), TypeError, ("encoder must give floating numbers", "got torch.int64")),
    (lambda x: (x[:, :4], x[:, :4] > 0), TypeError, ("encoder must give floating numbers", "got torch.bool")),
    (lambda x: x[:, :10].to("meta"), ValueError, ("encoder must give tensors on cpu like its input, got meta",)),
    (lambda x: x[:, :9], ValueError, ("encoder must give features of shape (6, 10)", "got (6, 9); pass feature_dim=")),
    (lambda x: x[:, :10, None], ValueError, ("encoder must give features of shape (6, 10)", "got (6, 10, 1)")),
]


@pytest.mark.parametrize(("function", "error", "message"), WRONG_ENCODERS)
def test_what_an_encoder_must_not_give(function, error, message):
    vae = VAE(Giving(function, HIDDEN), mlp_decoder(LATENT, DATA), LATENT, PlanarFlow(LATENT, 2))
    for call in calls(vae, data()):
        with pytest.raises(error, match=messages(*message)):
            call()


def test_features_without_a_head():
    vae = VAE(Giving(lambda x: x), mlp_decoder(LATENT, DATA), LATENT, feature_dim=0)
    with pytest.raises(ValueError, match=r"no features, as feature_dim=0 said, but the pair .*got \(6, 12\)"):
        vae(data())
    with pytest.raises(ValueError, match="feature_dim=0 where it gives"):
        VAE(TwoHeads(), mlp_decoder(LATENT, DATA), LATENT)


FLOW = "flow must give z_K (6, 4) and log_det (6,)"
WRONG_FLOWS = [
    (lambda z: z, ValueError, (FLOW, "got (6, 4)")),
    (lambda z: None, ValueError, (FLOW, "got NoneType")),
    (lambda z: {"z": z}, ValueError, (FLOW, "got a dict of 'z'")),
    (lambda z: (z, 0.0), ValueError, (FLOW, "got a tuple of 2: ((6, 4), float)")),
    (lambda z: (z, z[:, 0], [z]), ValueError, (FLOW, "got a tuple of 3")),
    (lambda z: (z, z[:, :1]), ValueError, (FLOW, "got (6, 4) and (6, 1)")),
    (lambda z: (z, z.sum()), ValueError, (FLOW, "got (6, 4) and ()")),
    (lambda z: (z[0], z[:, 0]), ValueError, (FLOW, "got (4,) and (6,)")),
    (lambda z: (z, z[..., 0].long()), TypeError, ("flow must give floating numbers", "got torch.int64")),
]


@pytest.mark.parametrize(("function", "error", "message"), WRONG_FLOWS)
def test_what_a_flow_must_not_give(function, error, message):
    vae = VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, DATA), LATENT, Giving(function))
    with pytest.raises(error, match=messages(*message)):
        vae(data())
    for call in calls(vae, data()):
        with pytest.raises(error, match="flow must give"):
            call()


DECODER = "decoder must give [6, *] for z of shape (6, 4)"
WRONG_DECODERS = [
    (lambda z: (z, z), ValueError, (DECODER, "got a tuple of 2: ((6, 4), (6, 4)): join them with torch.cat")),
    (lambda z: None, ValueError, (DECODER, "got NoneType")),
    (lambda z: {"logits": z}, ValueError, (DECODER, "got a dict of 'logits'")),
    (lambda z: z.sum(1), ValueError, (DECODER, "got (6,)")),
    (lambda z: z[:3], ValueError, (DECODER, "got (3, 4)")),
    (lambda z: z > 0, TypeError, ("decoder must give floating numbers", "got torch.bool")),
    (lambda z: z, ValueError, ("decoder's params must be [*samples, 6, 12] for x of shape (6, 12)", "got (6, 4)")),
]


@pytest.mark.parametrize(("function", "error", "message"), WRONG_DECODERS)
def test_what_a_decoder_must_not_give(function, error, message):
    vae = VAE(mlp_encoder(DATA, HIDDEN), Giving(function), LATENT)
    with pytest.raises(error, match=messages(*message)):
        vae(data())
    for call in calls(vae, data())[:4]:
        with pytest.raises(error, match=r"decoder(?:'s params)? must"):
            call()


def test_a_decoder_of_too_few_parameters_names_itself_in_every_call():
    vae = VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, 13), LATENT, likelihood=Gaussian())
    with pytest.raises(
        ValueError, match=messages("decoder must give [N, 2 x channels, *] for the gaussian", "(3, 13)")
    ):
        vae.sample(3)
    for call in calls(vae, data())[:4]:
        with pytest.raises(ValueError, match=messages("decoder's params must be", "24", "gaussian: 2 a data", "13)")):
            call()


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        ([[0.0] * LATENT] * BATCH, ValueError, "noise must be (6, 4), got a list of 6"),
        (torch.zeros(BATCH, LATENT).long(), TypeError, "noise must be torch.float32 like the posterior's mean, got"),
    ],
)
def test_noise_of_another_kind(noise, error, message):
    vae = VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, DATA), LATENT)
    with pytest.raises(error, match=re.escape(message)):
        vae(data(), noise=noise)
