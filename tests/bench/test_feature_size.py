"""python -m benchmarks.study.feature_size, with one seed and two epochs."""

import torch
from study_commands import lines_of, two_epochs

from benchmarks.study import feature_size
from vvae_fast.train.data.sets import load_dataset


def test_a_line_for_each_size_and_model(monkeypatch, capsys):
    lines = lines_of(feature_size, two_epochs, monkeypatch, capsys, "--seeds", "1", "--sizes", "1", "16")
    assert [line.partition(": NLL")[0] for line in lines] == [
        f"digits fed as {title}, {name}"
        for title in ("0 to 1", "0 to 16")
        for name in ("vanilla", "amortized", "amortized, normalise")
    ]
    assert [", gain" in line for line in lines] == 2 * [False, True, True]


def test_the_encoder_gets_the_pixels_of_the_size(monkeypatch):
    study = feature_size.load_study(feature_size.CONFIGS / "digits.yaml")
    dataset = load_dataset("digits")
    config = feature_size.Model(feature_size.VANILLA, 0).config(study.base(dataset), 0, dataset)
    x, largest = dataset.test[:20], []
    for size in (1, 16):
        encoder = feature_size.make(config, dataset, size, True).encoder
        first = next(m for m in encoder.modules() if isinstance(m, torch.nn.Linear))
        first.register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0].max().item()))
        encoder(x)
    assert largest == [1.0, 16.0]
