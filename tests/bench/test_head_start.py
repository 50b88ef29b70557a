"""python -m benchmarks.study.head_start, with one seed and two epochs."""

import pytest
import torch
from study_commands import lines_of, two_epochs

from benchmarks.study import feature_size, head_start
from vvae_fast.train.data.sets import load_dataset


def test_a_line_for_each_head(monkeypatch, capsys):
    arguments = ["--seeds", "1", "--rank", "8", "--times", "1", "16", "--full"]
    lines = lines_of(head_start, two_epochs, monkeypatch, capsys, *arguments)
    titles = ("full head", "rank 8, 1 times as large", "rank 8, 16 times as large")
    assert [line.partition(": NLL")[0] for line in lines] == [f"digits, {title}" for title in titles]


def test_a_line_for_the_layer_norm(monkeypatch, capsys):
    normed = []

    def trained(vae, config, dataset):
        normed.append(vae.flow.layer_norm)
        return 2.0

    arguments = ["--seeds", "1", "--rank", "8", "--times", "--layer-norm"]
    (line,) = lines_of(head_start, trained, monkeypatch, capsys, *arguments)
    assert normed == [True]
    assert line.startswith("digits, rank 8, layer norm: NLL 2.00")


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
