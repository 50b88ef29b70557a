"""How a run ended, for its result and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

FINISHED, STOPPED, DIVERGED = "finished", "stopped", "diverged"
STATUSES = (FINISHED, STOPPED, DIVERGED)
OUTCOME = ("status", "epochs_done", "epochs_planned", "reason")  # keys of a result


def of_training(history: Sequence[dict], planned: int, stopped: bool, counted_from: int = 0) -> dict[str, object]:
    """The OUTCOME of a training with these records of epochs (see VAEModule); `stopped`: before the planned epochs.

    The training diverged if the last validation -ELBO is not finite. Otherwise only early stopping ends it early, which
    counts from the epoch `counted_from`.
    """
    last, best = history[-1]["val_neg_elbo"], best_epoch(history[counted_from:])
    if best is None or not math.isfinite(last):
        return _outcome(DIVERGED, history, planned, f"the validation -ELBO is {last}")
    if stopped:
        return _outcome(STOPPED, history, planned, f"no better validation -ELBO since epoch {best + 1}")
    return _outcome(FINISHED, history, planned, None)


def with_scores(outcome: dict, scores: dict[str, float]) -> dict[str, object]:
    """The OUTCOME of a run whose training ended with `outcome`, and whose scores on the test set are these."""
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if not bad or outcome["status"] == DIVERGED:
        return outcome
    return {**outcome, "status": DIVERGED, "reason": f"{bad[0]} on the test set is {scores[bad[0]]}"}


def best_epoch(history: Sequence[dict]) -> int | None:
    """The epoch with the smallest finite validation -ELBO, the first of equals; None if there is none."""
    finite = [record for record in history if math.isfinite(record["val_neg_elbo"])]
    return min(finite, key=lambda record: record["val_neg_elbo"])["epoch"] if finite else None


def is_over(outcome: dict, epochs: int) -> bool:
    """Whether a run with this OUTCOME has nothing left to train if `epochs` epochs are requested."""
    return outcome["status"] != FINISHED or outcome["epochs_done"] >= epochs


def describe(result: dict) -> str:
    """How the run of a result ended, in words."""
    text = f"{result['status']} after {result['epochs_done']} of {result['epochs_planned']} epochs"
    if result["reason"] is not None:
        text += f": {result['reason']}"
    if result["status"] != DIVERGED:
        return text
    if result["best_epoch"] is None:
        return f"{text}; no epoch to evaluate; lower --lr, with --fresh"
    return f"{text}; the scores are those of epoch {result['best_epoch'] + 1}; lower --lr, with --fresh"


def _outcome(status: str, history: Sequence[dict], planned: int, reason: str | None) -> dict[str, object]:
    return {"status": status, "epochs_done": len(history), "epochs_planned": planned, "reason": reason}
