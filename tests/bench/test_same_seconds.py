"""python -m benchmarks.study.same_seconds, without training."""

import concurrent.futures
import sys

import pytest

from benchmarks.study import same_seconds
from benchmarks.study.study_results import FOLDER, OURS, config_of, read
from vvae_fast.train.data.sets import load_dataset

LIKE = "amortized planar K=80"


def digits():
    return read(FOLDER / "digits", config_of("digits")), load_dataset("digits")


def test_the_epochs_take_the_same_time():
    results, dataset = digits()
    total = 200 * next(results.seconds(m, OURS) for m in results.in_order if m.label == LIKE)
    plans = same_seconds.plans(results, dataset, LIKE)
    assert list(plans) == results.in_order
    for model, config in plans.items():
        of_epoch = results.seconds(model, OURS)
        assert abs(config.epochs * of_epoch - total) <= of_epoch / 2, model.label
        own = (config.model, config.flow, config.num_steps, config.rank, config.units)
        assert own == (model.kind, model.flow, model.num_steps, model.rank, model.units)
    assert next(config.epochs for model, config in plans.items() if model.label == LIKE) == 200
    assert len({config.epochs for config in plans.values()}) > 5


def test_warm_up_keeps_its_share():
    results = read(FOLDER / "mnist_families_cpu", config_of("mnist_families_cpu"))
    base = results.study.settings
    assert (base["epochs"], base["warmup_epochs"]) == (20, 5)
    _, dataset = digits()  # of any size: only the plan counts
    plans = same_seconds.plans(results, dataset, "amortized triangular Sylvester L=4")
    assert {model.flow for model in plans} == {model.flow for model in results.study.models}
    for config in plans.values():
        assert config.warmup_epochs == pytest.approx(config.epochs / 4, abs=0.5)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"--like must be one of .*vanilla VAE, .* got planar"):
        same_seconds.plans(*digits(), "planar")


def test_a_line_for_each_model(monkeypatch, capsys):
    """In the models' order, with the mean over the seeds of each."""

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, *arguments):
            super().__init__(1)

    monkeypatch.setattr(same_seconds, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(same_seconds, "nll_of", lambda config, dataset: config.num_steps + config.seed / 10)
    monkeypatch.setattr(sys, "argv", ["same_seconds", "--like", LIKE, "--seeds", "2"])
    same_seconds.main()
    lines = capsys.readouterr().out.splitlines()
    results, _ = digits()
    assert [line.partition(":")[0] for line in lines] == [model.label for model in results.in_order]
    assert lines[-1].endswith("80.05 ± 0.07")
    assert f"{results.seconds(results.in_order[-1], OURS):.2f} s an epoch" in lines[-1]


def test_a_run_trains_what_its_configuration_says(monkeypatch):
    results, dataset = digits()
    model, config = list(same_seconds.plans(results, dataset, LIKE).items())[-1]
    trained = []
    monkeypatch.setattr(same_seconds, "trained_nll", lambda vae, *rest: trained.append((vae, *rest)) or 1.5)
    monkeypatch.setattr(same_seconds.torch, "set_num_threads", lambda count: None)
    assert same_seconds.nll_of(config, dataset) == 1.5
    ((vae, *rest),) = trained
    assert rest == [config, dataset]
    assert vae.flow.num_steps == model.num_steps
