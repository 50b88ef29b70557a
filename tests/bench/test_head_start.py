"""python -m benchmarks.study.head_start, with one seed and two epochs."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.study import feature_size, head_start
from vvae_fast.train.data.sets import load_dataset


def test_a_line_for_each_head(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["head_start", "--seeds", "1", "--rank", "8", "--times", "1", "16", "--full"])

    def short(vae, config, dataset):
        return feature_size.trained_nll(vae, dataclasses.replace(config, epochs=2, num_samples=10), dataset)

    monkeypatch.setattr(head_start, "trained_nll", short)
    threads = torch.get_num_threads()
    try:
        head_start.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    titles = ("full head", "rank 8, 1 times as large", "rank 8, 16 times as large")
    assert [line.partition(": NLL")[0] for line in lines] == [f"digits, {title}" for title in titles]


def test_a_line_for_the_layer_norm(monkeypatch, capsys):
    arguments = ["head_start", "--seeds", "1", "--rank", "8", "--times", "--layer-norm"]
    monkeypatch.setattr(sys, "argv", arguments)
    normed = []

    def trained(vae, config, dataset):
        normed.append(vae.flow.layer_norm)
        return 2.0

    monkeypatch.setattr(head_start, "trained_nll", trained)
    threads = torch.get_num_threads()
    try:
        head_start.main()
    finally:
        torch.set_num_threads(threads)
    assert normed == [True]
    assert capsys.readouterr().out.startswith("digits, rank 8, layer norm: NLL 2.00")


def test_only_the_start_of_down_differs():
    """The product of the two layers is the same, up to rounding."""
    study = feature_size.load_study(feature_size.CONFIGS / "digits.yaml")
    dataset = load_dataset("digits")
    config = feature_size.Model(feature_size.VANILLA, 0).config(study.base(dataset), 0, dataset)
    small, large = (head_start.make(config, dataset, 8, times).flow.head for times in (1, 16))
    down = [head.down.weight.detach().square().mean().sqrt().item() for head in (small, large)]
    assert down[1] == pytest.approx(16 * down[0])
    torch.testing.assert_close(large.up.weight @ large.down.weight, small.up.weight @ small.down.weight)
    assert small.up.weight.any()
