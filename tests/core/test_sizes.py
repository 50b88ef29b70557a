"""Sizes are whatever can index a list, numbers whatever is real; no bools, and nothing that would be rounded."""

import numpy as np
import pytest
import torch

from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow, inference_gaps, planar_flow, planar_flow_inverse
from vvae_fast.functional import packed_planar_flow
from vvae_fast.interop import normflows, pyro, pythae
from vvae_fast.nn import Binomial, Gaussian, make_likelihood, mlp_decoder, mlp_encoder
from vvae_fast.nn.gated import gated_conv_decoder, gated_mlp_decoder, gated_mlp_encoder


class Index:
    def __index__(self):
        return 3


class Config:
    activation = "tanh"

    def __init__(self, input_dim):
        self.input_dim = input_dim


THREES = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), Index()]
NO_SIZES = [True, np.True_, torch.tensor(True), 3.0, np.float32(3), np.array([3, 3]), "3", None, torch.tensor(3.0)]


def name(value):
    return f"{type(value).__name__}-{getattr(value, 'dtype', '')}"


def vae():
    return VAE(mlp_encoder(6, 5), mlp_decoder(2, 6), 2, PlanarFlow(2, 1))


def gaps(**sizes):
    return inference_gaps(vae(), torch.zeros(3, 6), **{"iterations": 1, "num_samples": 2, **sizes})


# What takes a size, how it is called with it, and what it must then be or have.
TAKERS = {
    "PlanarFlow dim": lambda n: PlanarFlow(n, 2).w.shape[1],
    "PlanarFlow num_steps": lambda n: PlanarFlow(2, n).w.shape[0],
    "AmortizedPlanarFlow dim": lambda n: AmortizedPlanarFlow(n, 2, 4).dim,
    "AmortizedPlanarFlow num_steps": lambda n: AmortizedPlanarFlow(2, n, 4).params(torch.zeros(4))[0].shape[0],
    "AmortizedPlanarFlow context_dim": lambda n: AmortizedPlanarFlow(2, 2, n).head.in_features,
    "VAE latent_dim": lambda n: VAE(mlp_encoder(6, 5), mlp_decoder(3, 6), n).latent_dim,
    "VAE num_samples": lambda n: len(vae().posterior_sample(torch.zeros(1, 6), n).z_K),
    "VAE elbo num_samples": lambda n: vae()(torch.zeros(3, 6), n).kl.shape[0],
    "VAE log_likelihood num_samples": lambda n: vae().log_likelihood(torch.zeros(3, 6), n).shape[0],
    "VAE chunk_size": lambda n: vae().log_likelihood(torch.zeros(3, 6), 2, n).shape[0],
    "inference_gaps iterations": lambda n: len(gaps(iterations=n).elbo),
    "inference_gaps num_samples": lambda n: len(gaps(num_samples=n).elbo),
    "inference_gaps chunk_size": lambda n: len(gaps(chunk_size=n).elbo),
    "VAE sample": lambda n: len(vae().sample(n)),
    "mlp_encoder": lambda n: mlp_encoder(6, n).out_features,
    "mlp_decoder": lambda n: mlp_decoder(n, 6).in_features,
    "gated_mlp_encoder": lambda n: gated_mlp_encoder(6, n).out_features,
    "gated_mlp_decoder": lambda n: gated_mlp_decoder(n, 6).in_features,
    "gated_conv_decoder latent_dim": lambda n: gated_conv_decoder(n).in_features,
    "gated_conv_decoder num_params": lambda n: gated_conv_decoder(2, n).out_features // 784,
    "Binomial": lambda n: Binomial(n).total_count,
    "make_likelihood": lambda n: make_likelihood("binomial", total_count=n).total_count,
    "normflows num_steps": lambda n: normflows.PlanarStack(2, n).num_steps,
    "normflows shape": lambda n: normflows.PlanarStack(n, 2).shape[0],
    "normflows shapes": lambda n: normflows.PlanarStack((2, n), 2).shape[1],
    "pyro input_dim": lambda n: pyro.Planar(n).input_dim,
    "pyro stack input_dim": lambda n: pyro.PlanarStack(n, 2).input_dim,
    "pyro num_steps": lambda n: pyro.PlanarStack(2, n).num_steps,
    "pythae dim": lambda n: pythae.PlanarStack(n, 2).input_dim,
    "pythae num_steps": lambda n: pythae.PlanarStack(2, n).num_steps,
    "pythae input_dim": lambda n: pythae.PlanarFlow(Config(n)).input_dim,
    "pythae input_dim's": lambda n: pythae.PlanarFlow(Config((1, n))).input_dim,
}


@pytest.mark.parametrize("three", THREES, ids=name)
@pytest.mark.parametrize("taker", TAKERS)
def test_sizes_are_what_can_index_a_list(taker, three):
    got = TAKERS[taker](three)
    assert got == 3
    assert type(got) is int


@pytest.mark.parametrize("size", NO_SIZES, ids=name)
@pytest.mark.parametrize("taker", TAKERS)
def test_everything_else_is_refused_by_name(taker, size):
    with pytest.raises((TypeError, ValueError), match=r"must be .*(?:int|shape).*, got|needs total_count"):
        TAKERS[taker](size)


def test_feature_dim_and_step():
    three = np.int64(3)
    built = VAE(torch.nn.Linear(6, 3), mlp_decoder(2, 6), 2, feature_dim=three)
    assert type(built.feature_dim) is int
    assert torch.equal(PlanarFlow(2, 5).step(three).b.new_zeros(1), torch.zeros(1))
    with pytest.raises(TypeError, match="k must be an int, got bool"):
        PlanarFlow(2, 5).step(True)


REALS = [np.float32(0.25), np.float64(0.25), np.float16(0.25)]
NO_REALS = ["0.2", None, True, np.True_, 1j, torch.tensor(0.25), [0.25]]


@pytest.mark.parametrize("number", REALS, ids=name)
def test_numbers_are_what_is_real(number):
    z, u, w, b = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)
    packed = torch.cat([t.flatten() for t in (u, w, b)])
    options = {"activation": "leaky_relu", "slope": number}
    wanted = {"activation": "leaky_relu", "slope": 0.25}
    for backend in ("cpp", "reference"):
        for call in (
            lambda o: planar_flow(z, u, w, b, **o),
            lambda o: planar_flow_inverse(z, u, w, b, **o),
            lambda o: packed_planar_flow(z, packed, 4, 3, **o),
        ):
            got, exact = call({**options, "backend": backend}), call({**wanted, "backend": backend})
            assert all(map(torch.equal, got, exact))
        got = planar_flow(z, u, w, b, constraint="none", log_det_eps=number, backend=backend)
        exact = planar_flow(z, u, w, b, constraint="none", log_det_eps=0.25, backend=backend)
        assert all(map(torch.equal, got, exact))
    assert type(PlanarFlow(2, 3, **options).slope) is float
    assert repr(PlanarFlow(2, 3, **options)) == repr(PlanarFlow(2, 3, **wanted))
    assert type(Gaussian(number).log_var) is float


@pytest.mark.parametrize("number", NO_REALS, ids=name)
@pytest.mark.parametrize("activation", ["tanh", "leaky_relu"])
def test_no_other_numbers(activation, number):
    with pytest.raises(TypeError, match=f"slope must be a float, got {type(number).__name__}"):
        PlanarFlow(2, 3, activation=activation, slope=number)
    if number is not None:
        with pytest.raises(TypeError, match=f"log_var must be a float, got {type(number).__name__}"):
            Gaussian(number)


def test_a_number_beyond_every_float():
    with pytest.raises(ValueError, match="slope must be finite and above 0, got inf"):
        PlanarFlow(2, 3, activation="leaky_relu", slope=10**400)
