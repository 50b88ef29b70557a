"""`vvae-fast gaps`: the inference gaps of a trained VAE on its test set, in one table and in gaps.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast.nn.gaps import InferenceGaps, inference_gaps
from vvae_fast.nn.vae import VAE
from vvae_fast.train.base.environment import describe_environment
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import RunError, make_folder, read_json, write_json
from vvae_fast.train.base.memory import telling_memory
from vvae_fast.train.base.output import make_console, print_lines
from vvae_fast.train.base.progress import Progress
from vvae_fast.train.data.loaders import EvalLoader
from vvae_fast.train.data.sets import describe
from vvae_fast.train.run import processes
from vvae_fast.train.run.folder import GAPS, locked
from vvae_fast.train.run.runconfig import OWN_SETTINGS
from vvae_fast.train.run.runs import Trained

PERCENT = 100  # units of the progress bar
FEW = 10  # an effective sample size below this is few: the NLL of such a data point is far from certain
SHARES = {"effective_sample_size": "few_effective", "effective_sample_size_optimal": "few_effective_optimal"}
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
        the content of gaps.json, see `measure`.

    Raises:
        RunError: as `measure` does.
    """
    with Progress(1, PERCENT) as progress:
        content = measure(trained, settings, out, progress)
    print_table(content)
    print(f"\n{out / GAPS} is written.")
    return content


def measure(trained: Trained, settings: GapSettings, out: Path, progress: Progress) -> dict[str, Any]:
    """Measures the gaps of the first rows of the test set and writes gaps.json in `out`.

    Args:
        progress: of runs of PERCENT units; this is its next run.

    Returns:
        the content of gaps.json: of each of HEADINGS the mean, std, standard_error and median over the data points in
        "scores", and each data point's value in "points"; the values of SHARES, shares of the data points with an
        effective sample size below FEW; "by_samples": the mean NLL from q and q* for numbers of samples.

    Raises:
        RunError: if gaps.json in `out` is not this command's, another process works in `out`, the settings do not fit
            the model, or memory runs out.
    """
    make_folder(out)
    _check_owner(out / GAPS)
    progress.start(trained.config.name)
    with locked(out):
        with telling_memory("fitting", "free some, data points are fitted in chunks of a fixed size"):
            points, by_samples = _measure(trained, settings, progress)
        content = {
            **{name: getattr(trained.config, name) for name in OWN_SETTINGS},
            **_identity(trained, settings),
            "scores": {name: _statistics(values) for name, values in points.items()},
            **{share: (points[name] < FEW).double().mean().item() for name, share in SHARES.items()},
            "by_samples": by_samples,
            "points": {name: values.tolist() for name, values in points.items()},
            "dataset": describe(trained.dataset),
            "environment": describe_environment(None),
        }
        write_json(out / GAPS, content)
    progress.conclude(
        ", ".join(f"{HEADINGS[name]} {content['scores'][name]['mean']:.2f}" for name in list(HEADINGS)[-2:])
    )
    return content


def load_gaps(trained: Trained, settings: GapSettings, out: Path) -> dict[str, Any] | None:
    """The content of gaps.json in `out`, if the same weights and settings gave it; otherwise None."""
    if not (out / GAPS).exists():
        return None
    content = read_json(out / GAPS)
    wanted = {**_identity(trained, settings), "by_samples": content.get("by_samples")}  # older files lack it
    return content if wanted["by_samples"] and wanted.items() <= content.items() else None


def _identity(trained: Trained, settings: GapSettings) -> dict[str, Any]:
    """What decides the content of gaps.json."""
    most = len(trained.dataset.test)
    num_points = most if settings.num_points is None else min(settings.num_points, most)
    return {
        "epoch": trained.epoch,
        "settings": {**settings._asdict(), "num_points": num_points},
        "config": trained.config.to_json(),
    }


def _check_owner(path: Path) -> None:
    if path.exists() and not read_json(path).keys() >= {"scores", "points"}:
        raise RunError(f"{path} is not of vvae-fast gaps and will not be overwritten; choose another --out")


def _measure(trained: Trained, settings: GapSettings, progress: Progress) -> tuple[dict[str, Tensor], list[dict]]:
    """Each data point's scores by the keys of HEADINGS, float64 [B] on the CPU; and the NLL by numbers of samples."""
    own = trained.config.num_steps
    if settings.num_steps is not None and settings.num_steps < own:
        raise RunError(f"--steps must be at least the model's {own}, got {settings.num_steps}; leave it out")
    device = processes.device()
    vae = trained.vae.to(device)
    x = next(iter(EvalLoader(trained.dataset.test[: settings.num_points], len(trained.dataset.test)))).to(device)

    def report(done: int, total: int) -> None:
        progress.show("fitting", f", iteration {done}/{total}", PERCENT * done // total)

    def seeded() -> torch.Generator:
        return torch.Generator(device).manual_seed(trained.config.seed)

    found = inference_gaps(
        vae,
        x,
        num_steps=settings.num_steps,
        iterations=settings.iterations,
        num_samples=settings.num_samples,
        generator=seeded(),
        progress=report,
    )
    points = {name: values.double().cpu() for name, values in _scores(found).items()}
    rows = _by_samples(vae, x, found, settings.num_samples, seeded)
    last = {name: points[name].mean().item() for name in ("nll", "nll_optimal")}
    return points, [*rows, {"num_samples": settings.num_samples, **last}]


def _by_samples(
    vae: VAE, x: Tensor, found: InferenceGaps, num_samples: int, seeded: Callable[[], torch.Generator]
) -> list[dict]:
    """The mean NLL, with z from q and from q*, for the powers of ten from 10, below num_samples."""
    rows = []
    for count in (10**power for power in range(1, len(str(num_samples - 1)))):
        pair = (vae.importance(x, count, generator=seeded(), proposal=q) for q in (None, found.proposal))
        plain, optimal = (-estimate.log_likelihood.double().mean().item() for estimate in pair)
        rows.append({"num_samples": count, "nll": plain, "nll_optimal": optimal})
    return rows


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
    """The mean, the sample standard deviation over the data points with the mean's error, of one point NaN, and the
    median."""
    std = values.std().item() if len(values) > 1 else math.nan
    error, median = std / math.sqrt(len(values)), values.quantile(0.5).item()
    return {"mean": values.mean().item(), "std": std, "standard_error": error, "median": median}


def print_table(content: dict[str, Any]) -> None:
    """One row for each score: its mean, standard deviation, standard error and median over the data points; below, the
    NLL by numbers of samples."""
    box, table_module = (require(f"rich.{name}") for name in ("box", "table"))
    table = table_module.Table(box=box.MARKDOWN)
    for heading in ("", "mean", "std", "standard error", "median"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, heading in HEADINGS.items():
        values = content["scores"][name]
        table.add_row(heading, *(f"{value:.3f}" if math.isfinite(value) else "-" for value in values.values()))
    screen = make_console()
    print_lines(screen, table)
    settings = content["settings"]
    legend = (
        f"{settings['num_points']} data points of the test set, in nats; {settings['num_samples']} samples of "
        f"each. q: the encoder's posterior; q*: the best of its family, {settings['iterations']} iterations of Adam."
    )
    screen.print(legend, soft_wrap=True)
    for row in content["by_samples"]:
        line = f"NLL with {row['num_samples']} samples: from q {row['nll']:.3f}, from q* {row['nll_optimal']:.3f}."
        screen.print(line, soft_wrap=True)
