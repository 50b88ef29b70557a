"""`vvae-fast density`: flows of several lengths fitted to several energies, each once; one table, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vvae_fast.nn.planar import PlanarFlow
from vvae_fast.train.base.extras import require
from vvae_fast.train.base.files import DivergedError, RunError, check_equal, make_folder, read_json, write_json
from vvae_fast.train.base.memory import telling_memory
from vvae_fast.train.base.output import make_console, print_lines
from vvae_fast.train.base.progress import Progress
from vvae_fast.train.density.energies import TAPER_START, TAPER_WIDTH
from vvae_fast.train.density.figure import plot_fits
from vvae_fast.train.density.fit import BOX, POINTS, Divergence, FitConfig, Restart, fit, make_grid
from vvae_fast.train.run.folder import locked

RESULTS, FIGURE = "results.json", "figure.png"
QUADRATURE = {"box": BOX, "points": POINTS, "taper_start": TAPER_START, "taper_width": TAPER_WIDTH}
PARAMETERS = ("u", "w", "b")
COLUMN_WIDTH = 16


def density(configs: Sequence[FitConfig], out: Path, fresh: bool) -> tuple[list[dict], list[dict]]:
    """Fits every configuration that `out` does not have yet; prints the table, writes results.json and the figure.

    Returns the records of the configurations, as in results.json, and of the fits that diverged: {"config", "reason"}.
    results.json keeps its other records too. The next call tries diverged fits again.

    Raises:
        RunError: before anything is fitted, if results.json is not this command's, or if it has a fit of the same
            energy and length with another configuration and `fresh` is False.
        KeyboardInterrupt: on Ctrl-C; the next call continues after the last finished fit.
    """
    require("matplotlib.figure")  # if it is missing, fail now and not after the fits
    make_folder(out)
    with locked(out):
        path = out / RESULTS
        _check_owner(out)
        records = {} if fresh or not path.exists() else _load(path)
        diverged: dict[str, dict] = {}
        for config in configs:
            if config.label in records:
                check_equal(config.to_json(), records[config.label]["config"], path)
        with Progress(len(configs), configs[0].restarts * configs[0].iterations) as progress:
            for config in configs:
                progress.start(config.label)
                if config.label in records:
                    progress.show("already finished", "", 0)
                else:
                    try:
                        records[config.label] = _fit(config, progress)
                    except DivergedError as error:
                        diverged[config.label] = {"config": config.to_json(), "reason": str(error)}
                    content = {"quadrature": QUADRATURE, "fits": list(records.values())}
                    write_json(path, {**content, "diverged": list(diverged.values())} if diverged else content)
                ended = config.label not in diverged
                progress.conclude(f"KL {records[config.label]['kl']:.4f}" if ended else "diverged")
        wanted = [records[config.label] for config in configs if config.label in records]
        if wanted:
            print_table(wanted)
            plot_records(wanted, out / FIGURE)
        for failed in diverged.values():
            print(f"diverged: {failed['reason']}")
    print(f"\n{path} {f'and {FIGURE} beside it are' if wanted else 'is'} written.")
    return wanted, list(diverged.values())


def _check_owner(out: Path) -> None:
    """Raises RunError if a file to be written exists and is not this command's."""
    path = out / RESULTS
    if not path.exists():
        if (out / FIGURE).exists():
            raise RunError(f"{out / FIGURE} is there, but no {RESULTS}: it would be overwritten; choose another --out")
    elif not read_json(path).keys() >= {"quadrature", "fits"}:
        raise RunError(
            f"{path} is not a result of vvae-fast density and will not be overwritten; remove it (--fresh will not) or "
            "choose another --out"
        )


def _fit(config: FitConfig, progress: Progress) -> dict:
    def report(iterations: int) -> None:
        progress.show("training", f", iteration {iterations}/{config.restarts * config.iterations}", iterations)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step is too small for several threads, and sums over the grid keep their order
    try:
        with telling_memory("fitting", "lower --steps"):
            return to_record(config, fit(config, make_grid(), report))
    finally:
        torch.set_num_threads(threads)


def to_record(config: FitConfig, restarts: Sequence[Restart]) -> dict:
    """A fit's record in results.json: the best restart's divergence and parameters, and every restart's KL."""
    best = restarts[0]
    return {
        "config": config.to_json(),
        **best.divergence._asdict(),
        "seed": best.seed,
        "restarts": {str(restart.seed): restart.divergence.kl for restart in restarts},
        "flow": {name: getattr(best.flow, name).tolist() for name in PARAMETERS},
    }


def load_flow(record: dict) -> PlanarFlow:
    """The float64 flow of a record."""
    flow = PlanarFlow(2, record["config"]["num_steps"]).double().requires_grad_(False)
    flow.load_state_dict({name: torch.tensor(record["flow"][name], dtype=torch.float64) for name in PARAMETERS})
    return flow


def plot_records(records: Sequence[dict], path: Path) -> None:
    """Draws the figure of some records."""
    fits = []
    for record in records:
        divergence = Divergence(*(record[name] for name in Divergence._fields))
        fits.append((FitConfig(**record["config"]), load_flow(record), divergence))
    plot_fits(fits, path)


def _load(path: Path) -> dict[str, dict]:
    """The records of a results.json by their labels."""
    content = read_json(path)
    try:
        quadrature = dict(content["quadrature"])
        records = {FitConfig(**record["config"]).label: record for record in content["fits"]}
        for record in records.values():
            load_flow(record)
            Divergence(*(float(record[name]) for name in Divergence._fields))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RunError(f"{path} is not a result of vvae-fast density; remove it or use --fresh") from error
    check_equal(QUADRATURE, quadrature, path)
    return records


def print_table(records: Sequence[dict]) -> None:
    """One row for each energy, one column for each length: KL(q || p) in nats."""
    box, table_module = (require(f"rich.{name}") for name in ("box", "table"))
    kls = {(record["config"]["energy"], record["config"]["num_steps"]): record["kl"] for record in records}
    energies, steps = (list(dict.fromkeys(keys)) for keys in zip(*kls, strict=True))
    table = table_module.Table(box=box.MARKDOWN)
    for heading in ("target", *(f"K = {num_steps}" for num_steps in steps)):
        table.add_column(heading, justify="left" if heading == "target" else "right", no_wrap=True)
    for energy in energies:
        cells = [f"{kls[energy, k]:.4f}" if (energy, k) in kls else "-" for k in steps]  # "-": diverged
        table.add_row(energy, *cells)
    screen = make_console()
    screen.width = max(screen.width, COLUMN_WIDTH * (1 + len(steps)))  # cells are never cut
    print_lines(screen, table)
    error = max(abs(record["mass"] - 1) for record in records)
    legend = (
        f"KL(q || p) in nats, midpoint rule on [-{BOX:g}, {BOX:g}]^2 with {POINTS} x {POINTS} points, the least of "
        f"{records[0]['config']['restarts']} restarts; the integral of q is 1 within {error:.0e}."
    )
    screen.print(legend, soft_wrap=True)
