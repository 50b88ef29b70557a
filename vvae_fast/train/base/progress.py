"""Progress of a series of runs: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from vvae_fast.train.base import outcome
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.output import make_console

LINE_SECONDS = 5.0
ROUTINE = ("training", "evaluating", "fitting")  # any other stage is printed at once


class Progress:
    """Shows how far a series of runs is. Use it as a context manager. For each run call `start`, then `update` and
    `finish`, or, if the run does not train a VAE, `show` and `conclude`.

    Args:
        num_runs: the length of the series.
        epochs: the largest number of epochs of a run.
        quiet: show nothing.
    """

    def __init__(self, num_runs: int, epochs: int, quiet: bool = False):
        self.console = make_console(quiet=quiet)
        self.num_runs, self.epochs = num_runs, epochs
        self.run, self.title, self.printed_at = 0, "", 0.0
        self.first: tuple[float, int] | None = None  # when this run was first shown, and how many epochs it had then
        self.bar = None
        if self.console.is_terminal:
            columns = require("rich.progress")
            self.bar = columns.Progress(
                columns.TextColumn("{task.description}"),
                columns.BarColumn(),
                columns.TaskProgressColumn(),
                columns.TimeElapsedColumn(),
                columns.TextColumn("left:"),
                columns.TimeRemainingColumn(),
                console=self.console,
            )

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("starting", total=self.num_runs * self.epochs)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, title: str) -> None:
        """The next run begins."""
        self.run += 1
        self.title, self.printed_at = title, time.monotonic()
        self.first = None

    def update(self, stage: str, history: list[dict]) -> None:
        """A run's stage and the records of its finished epochs (see VAEModule)."""
        detail = ""
        if history:
            detail = f", epoch {len(history)}/{self.epochs}, validation -ELBO {history[-1]['val_neg_elbo']:.2f}"
        self.show(stage, detail, len(history))

    def finish(self, result: dict) -> None:
        """The run has ended with a result (see runs.run)."""
        scores = [
            f"{name} {'not finite' if result[key] is None else format(result[key], '.2f')}"
            for name, key in (("-ELBO", "neg_elbo"), ("NLL", "nll"))
        ]
        ending = "" if result["status"] == outcome.FINISHED else f"; {outcome.describe(result)}"
        self.conclude(", ".join(scores) + ending)

    def show(self, stage: str, detail: str, completed: int) -> None:
        """Shows a run's stage, a detail, and how many epochs, or other units, are completed."""
        text = f"[{self.run}/{self.num_runs}] {self.title}: {stage}"
        if stage not in ROUTINE:
            self._print(text)
        text += detail
        self.first = self.first or (time.monotonic(), completed)
        if self.bar is not None:
            completed += (self.run - 1) * self.epochs
            self.bar.update(self.task, completed=completed, description=text)
        elif time.monotonic() - self.printed_at >= LINE_SECONDS:
            self._print(text + self._left(completed, *self.first))

    def _left(self, completed: int, began: float, epochs_before: int) -> str:
        """How long it all will take, at this run's pace; nothing before its first epoch here."""
        if completed <= epochs_before:
            return ""
        pace = (time.monotonic() - began) / (completed - epochs_before)
        seconds = pace * (self.epochs * (self.num_runs - self.run + 1) - completed)
        return f", about {duration(seconds)} left" if seconds > 0 else ""

    def conclude(self, scores: str) -> None:
        """The run has ended with these scores."""
        text = f"[{self.run}/{self.num_runs}] {self.title}: {scores}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.run * self.epochs, description=text)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        self.printed_at = time.monotonic()


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, whichever has a number of a few digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
