"""`vvae-fast gaps`: the inference gaps of a trained VAE on its test set, in one table and in gaps.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast.nn.gaps import InferenceGaps, inference_gaps
from vvae_fast.train.base.environment import describe_environment
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import RunError, make_folder, read_json, write_json
from vvae_fast.train.base.memory import telling_memory
from vvae_fast.train.base.output import make_console
from vvae_fast.train.base.progress import Progress
from vvae_fast.train.data.loaders import EvalLoader
from vvae_fast.train.data.sets import describe
from vvae_fast.train.run import processes
from vvae_fast.train.run.folder import GAPS, locked
from vvae_fast.train.run.runs import Trained

PERCENT = 100  # units of the progress bar
HEADINGS = {  # a score's key: its row in the table
    "neg_elbo": "-ELBO",
    "nll": "NLL, drawn from q",
    "nll_optimal": "NLL, drawn from q*",
    "effective_sample_size": "effective sample size, q",
    "effective_sample_size_optimal": "effective sample size, q*",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
}


class GapSettings(NamedTuple):
    """How the gaps are measured; num_points None is all of the test set, num_steps None the model's K."""

    num_points: int | None
    num_steps: int | None
    iterations: int
    num_samples: int


def gaps(trained: Trained, settings: GapSettings, out: Path) -> dict[str, Any]:
    """Measures the gaps of the first rows of the test set, prints the table and writes gaps.json in `out`.

    Returns:
        the content of gaps.json: of each of HEADINGS the mean, std and standard_error over the data points in "scores",
        and each data point's value in "points".

    Raises:
        RunError: if gaps.json in `out` is not this command's, another process works in `out`, the settings do not fit
            the model, or memory runs out.
    """
    make_folder(out)
    _check_owner(out / GAPS)
    with locked(out):
        with telling_memory("fitting", "free some, data points are fitted in chunks of a fixed size"):
            points = _measure(trained, settings)
        content = {
            **{name: getattr(trained.config, name) for name in ("model", "num_steps", "rank", "seed")},
            "epoch": trained.epoch,
            "settings": {**settings._asdict(), "num_points": len(points["nll"])},
            "scores": {name: _statistics(values) for name, values in points.items()},
            "points": {name: values.tolist() for name, values in points.items()},
            "dataset": describe(trained.dataset),
            "config": trained.config.to_json(),
            "environment": describe_environment(None),
        }
        write_json(out / GAPS, content)
    print_table(content)
    print(f"\n{out / GAPS} is written.")
    return content


def _check_owner(path: Path) -> None:
    if path.exists() and not read_json(path).keys() >= {"scores", "points"}:
        raise RunError(f"{path} is not of vvae-fast gaps and will not be overwritten; choose another --out")


def _measure(trained: Trained, settings: GapSettings) -> dict[str, Tensor]:
    """Each data point's scores by the keys of HEADINGS, float64 [B] on the CPU."""
    own = trained.config.num_steps
    if settings.num_steps is not None and settings.num_steps < own:
        raise RunError(f"--steps must be at least the model's {own}, got {settings.num_steps}; leave it out")
    device = processes.device()
    x = next(iter(EvalLoader(trained.dataset.test[: settings.num_points], len(trained.dataset.test)))).to(device)
    with Progress(1, PERCENT) as progress:
        progress.start(trained.config.name)

        def report(done: int, total: int) -> None:
            progress.show("fitting", f", iteration {done}/{total}", PERCENT * done // total)

        found = inference_gaps(
            trained.vae.to(device),
            x,
            num_steps=settings.num_steps,
            iterations=settings.iterations,
            num_samples=settings.num_samples,
            generator=torch.Generator(device).manual_seed(trained.config.seed),
            progress=report,
        )
        points = {name: values.double().cpu() for name, values in _scores(found).items()}
        progress.conclude(", ".join(f"{HEADINGS[name]} {points[name].mean():.2f}" for name in list(points)[-2:]))
    return points


def _scores(found: InferenceGaps) -> dict[str, Tensor]:
    return {
        "neg_elbo": -found.elbo,
        "nll": -found.plain.log_likelihood,
        "nll_optimal": -found.log_likelihood,
        "effective_sample_size": found.plain.effective_sample_size,
        "effective_sample_size_optimal": found.effective_sample_size,
        "approximation_gap": found.approximation_gap,
        "amortization_gap": found.amortization_gap,
    }


def _statistics(values: Tensor) -> dict[str, float]:
    """The mean, and the sample standard deviation over the data points with the mean's error; of one point NaN."""
    std = values.std().item() if len(values) > 1 else math.nan
    return {"mean": values.mean().item(), "std": std, "standard_error": std / math.sqrt(len(values))}


def print_table(content: dict[str, Any]) -> None:
    """One row for each score: its mean, standard deviation and standard error over the data points."""
    box, table_module = (require(f"rich.{name}") for name in ("box", "table"))
    table = table_module.Table(box=box.MARKDOWN)
    for heading in ("", "mean", "std", "standard error"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, heading in HEADINGS.items():
        values = content["scores"][name]
        table.add_row(heading, *(f"{value:.3f}" if math.isfinite(value) else "-" for value in values.values()))
    screen = make_console()
    screen.print(table)
    settings = content["settings"]
    legend = (
        f"{settings['num_points']} data points of the test set, in nats; {settings['num_samples']} samples of "
        f"each. q: the encoder's posterior; q*: the best of its family, {settings['iterations']} iterations of Adam."
    )
    screen.print(legend, soft_wrap=True)
