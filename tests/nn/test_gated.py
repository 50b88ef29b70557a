"""Gated layers and networks."""

import dataclasses

import pytest
import torch
from test_train import make_config

from vvae_fast.nn.gated import (
    GatedConv2d,
    GatedConvTranspose2d,
    GatedLinear,
    gated_conv_decoder,
    gated_conv_encoder,
    gated_mlp_decoder,
    gated_mlp_encoder,
)
from vvae_fast.train.base.files import RunError
from vvae_fast.train.data.sets import Dataset, load_dataset
from vvae_fast.train.run.networks import build_optimizer, build_vae


def images(*counts: int) -> Dataset:
    parts = [torch.rand(count, 28, 28).round() for count in counts]
    return Dataset("images", *parts, "bernoulli", total_count=None, image_shape=(28, 28), dynamic=False)


def test_a_gated_layer_is_an_affine_map_times_the_sigmoid_of_another():
    layer, x = GatedLinear(5, 3).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    a, g = (x @ layer.linear.weight.T + layer.linear.bias).split(3, -1)
    torch.testing.assert_close(layer(x), a * g.sigmoid())


@pytest.mark.parametrize("layer", [GatedConv2d(2, 3, 5, 2, 2), GatedConvTranspose2d(2, 3, 5, 2, 2, 1)])
def test_gated_convolutions_gate_channel_by_channel(layer):
    x = torch.randn(4, 2, 8, 8)
    a, g = layer.conv(x).split(3, 1)
    torch.testing.assert_close(layer(x), a * g.sigmoid())
    assert layer(x).shape == (4, 3, *({GatedConv2d: (4, 4)}.get(type(layer), (16, 16))))


def test_mlps():
    encoder, decoder = gated_mlp_encoder(784, 300, 300), gated_mlp_decoder(40, 300, 300, 784)
    assert (encoder.in_features, encoder.out_features) == (784, 300)
    assert encoder(torch.randn(3, 28, 28)).shape == (3, 300)
    assert decoder(torch.randn(3, 40)).shape == (3, 784)
    # a and g of 784-300 and 300-300; of 40-300 and 300-300, and the plain last layer
    assert sum(p.numel() for p in encoder.parameters()) == 2 * (785 * 300 + 301 * 300)
    assert sum(p.numel() for p in decoder.parameters()) == 2 * (41 * 300 + 301 * 300) + 301 * 784
    assert isinstance(gated_mlp_decoder(2, 5)[-1], torch.nn.Linear)


@pytest.mark.parametrize("make", [gated_mlp_encoder, gated_mlp_decoder])
def test_widths_are_checked(make):
    with pytest.raises(ValueError, match="needs at least two widths"):
        make(5)
    with pytest.raises(ValueError, match=make.__name__):
        make(5, 0)


def test_convolutional_networks():
    encoder, decoder = gated_conv_encoder(), gated_conv_decoder(64, num_params=2)
    assert encoder(torch.randn(3, 784)).shape == (3, 256)
    assert torch.equal(encoder(torch.ones(2, 28, 28)), encoder(torch.ones(2, 784)))
    assert decoder(torch.randn(3, 64)).shape == (3, 2 * 784)
    with pytest.raises(ValueError, match="latent_dim"):
        gated_conv_decoder(0)


@pytest.mark.parametrize("model", ["vanilla", "amortized", "shared"])
@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_the_convolutional_vae_takes_a_step(model, optimizer):
    dataset = images(8, 2, 2)
    steps = 0 if model == "vanilla" else 3
    changes = {"model": model, "num_steps": steps, "network": "gated-conv", "hidden": (), "latent_dim": 64}
    config = make_config(dataset, **changes, optimizer=optimizer, lr=1e-3)
    vae = build_vae(config, dataset)
    descent = build_optimizer(config, vae)
    assert type(descent).__name__.lower() == optimizer
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        loss = vae(dataset.train.flatten(1)).neg_elbo.mean()
        descent.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in vae.parameters())
        descent.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_the_convolutional_network_wants_its_images():
    digits = load_dataset("digits")
    config = make_config(digits, network="gated-conv", hidden=())
    with pytest.raises(RunError, match=r"wants grey images of 28 x 28, digits has rows of shape \[8, 8\]; choose"):
        build_vae(config, digits)


def test_the_gated_mlp_is_not_the_plain_one():
    dataset = images(4, 1, 1)
    plain, gated = (build_vae(make_config(dataset, network=name), dataset) for name in ("mlp", "gated-mlp"))
    assert {type(layer) for layer in gated.encoder} >= {GatedLinear}
    assert not any(isinstance(layer, GatedLinear) for layer in plain.modules())
    config = dataclasses.replace(make_config(dataset), hidden=(9, 5), network="gated-mlp")
    assert build_vae(config, dataset).feature_dim == 5
