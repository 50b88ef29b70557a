"""The lines of progress where there is no terminal: how far a series is, and how long it will take."""

import pytest

from vvae_fast.train.base import progress
from vvae_fast.train.base.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(progress, clock, epochs, seconds, resumed=0):
    """A run of `epochs` epochs, each of so many seconds; the first ones were finished by an earlier call."""
    progress.start("a model")
    history = [{"val_neg_elbo": 1.0}] * resumed
    progress.update("training", history)
    for epoch in range(resumed, epochs):
        clock[0] += seconds
        history = [{"val_neg_elbo": 1.0}] * (epoch + 1)
        progress.update("training", history)


def test_the_time_left_is_that_of_the_runs_pace(clock, capsys):
    with Progress(num_runs=3, epochs=4) as series:
        run(series, clock, 4, 10.0)
        series.conclude("done")
        run(series, clock, 2, 90.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", about ")[2] for line in lines if "epoch" in line] == [
        "2 min left",
        "2 min left",
        "90 s left",
        "80 s left",
        "10 min left",
        "9 min left",
    ]


def test_epochs_of_an_earlier_call_took_no_time(clock, capsys):
    with Progress(num_runs=1, epochs=10) as series:
        run(series, clock, 8, 30.0, resumed=6)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[1/1] a model: training, epoch 7/10, validation -ELBO 1.00, about 90 s left",
        "[1/1] a model: training, epoch 8/10, validation -ELBO 1.00, about 60 s left",
    ]


def test_nothing_is_promised_before_the_first_epoch_or_after_the_last(clock, capsys):
    with Progress(num_runs=1, epochs=2) as series:
        run(series, clock, 0, 0.0)
        clock[0] += 60.0
        series.show("training", "", 0)
        run(series, clock, 2, 30.0)
        clock[0] += 60.0
        series.show("evaluating", "", 2)
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0]
    assert "left" not in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h"), (86400, "24.0 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
