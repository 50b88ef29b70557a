"""docs/results.md, its figures and the README's table from the committed results of studies: `make results`.

Everything here is a function of docs/results/ and configs/: the same files give the same bytes. None of our numbers is
typed by hand.
"""

import sys
from pathlib import Path

import yaml

from benchmarks.flow.loops import PLAIN, REFERENCE
from benchmarks.report.front import between
from benchmarks.report.tables import table
from benchmarks.study import study_figures, study_gaps
from benchmarks.study.study_results import CONFIGS, FOLDER, OURS, ROOT, Results, Unusable, config_of, model_of, read_all
from benchmarks.study.study_text import conclusions, findings, introduction, limitations
from vvae_fast.train.study.compare import Model

PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
README_START, README_END, README_STUDY = "<!-- results -->\n", "<!-- /results -->", "mnist_gaps_cpu"
PUBLISHED = FOLDER / "published.yaml"
COLUMNS = ["model", "K", "-ELBO", "NLL", "gap", "KL", "active units", "parameters", "s / epoch", PLAIN, REFERENCE]
TITLES = {
    "digits": "Digits",
    "mnist_families_cpu": "MNIST, families of flows",
    "mnist_mlp_cpu": "MNIST, at a budget for two CPU cores",
    "mnist_gaps_cpu": "MNIST, where the gain comes from",
    "mnist_rank_cpu": "MNIST, ranks of the amortized flow's head",
    "mnist_rank_two_seeds": "MNIST, ranks of the amortized flow's head",
    "mnist_rank_layer_norm": "MNIST, heads of low rank with a layer norm",
    "mnist_rank_cut": "MNIST, a head cut to rank 32",
    "fashion_mlp_cpu": "FashionMNIST, at the same budget",
    "mnist_mlp_cpu_high_lr": "MNIST, the same at a higher learning rate",
}


def model_table(results: Results) -> str:
    """A row for each model: means and deviations over the seeds, and the seconds of an epoch with each loop."""
    lines = []
    for model in results.in_order:
        scores = [results.score(model, key).text() for key in ("neg_elbo", "nll", "gap", "kl")]
        active = results.score(model, "active_units").text(1)
        parameters = f"{results.runs[model][0]['num_parameters']:,}"
        seconds = [_seconds(results, model, backend) for backend in (OURS, PLAIN, REFERENCE)]
        lines.append([model.title, str(model.num_steps), *scores, active, parameters, *seconds])
    return table(COLUMNS, lines)


def timing(results: Results) -> str:
    """Where the seconds come from."""
    if results.epochs is None:
        return "The seconds were not measured."
    unmeasured = "" if results.has_seconds(PLAIN) else f" Those with the {PLAIN} were not measured."
    machine = results.epochs["environment"]
    where = machine["gpu"] or f"CPU time of one thread of {machine['processor']}"
    full = results.study.settings.get("full_epochs", 0)
    cut = (
        f" Those of a rank are of an epoch after the cut; the {full} before take as long as a full head's."
        if full
        else ""
    )
    return f"Medians of {results.epochs['rounds']} alternating rounds in one process, {where}.{unmeasured}{cut}"


def _seconds(results: Results, model: Model, backend: str) -> str:
    seconds = results.seconds(model, backend)
    if seconds is None or (model.num_steps == 0 and backend != OURS):
        return "-"
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.4f}"


def published_table(results: Results, published: list[dict]) -> str:
    """Our numbers beside published ones, which come from other protocols."""
    columns = ["model", "K", "ours: -ELBO", "ours: NLL", "theirs: -ELBO", "theirs: NLL", "theirs", "their protocol"]
    lines = []
    for row in published:
        model = model_of(row)
        ours = [results.score(model, key).text() if model in results.runs else "not run" for key in ("neg_elbo", "nll")]
        theirs = [row.get(key, "-") for key in ("neg_elbo", "nll")]
        lines.append([model.title, str(model.num_steps), *ours, *theirs, row["by"], row["protocol"]])
    return table(columns, lines)


def section(results: Results, published: list[dict]) -> str:
    """A study: its protocol, table, figure, findings, and published numbers."""
    name = results.study.name
    seeds = ", ".join(map(str, results.study.seeds))
    config = f"configs/{config_of(name).relative_to(CONFIGS)}"
    machine = results.environment
    where = machine["gpu"] or f"{machine['processor']}, torch {machine['torch']}"
    each = "rank" if results.is_planar else "family"
    parts = [
        f"## {TITLES.get(name, name)}",
        f"Protocol, [{config}](../{config}): {results.study.protocol}. Seeds {seeds}. {where}.",
        model_table(results),
        "Test set, nats per data point, mean ± standard deviation over the seeds. s / epoch: training time with this "
        f"package's flow; {PLAIN}: with the fastest Python loop over the flow's steps instead; {REFERENCE}: with this "
        "package's own loop. " + timing(results),
        f"![-ELBO, NLL and gap against K](results/{name}.svg)",
        *(
            [f"![NLL of each {each} against its cost](results/{name}_ranks.svg)"]
            if study_figures.ranks(results)
            else []
        ),
        *study_gaps.section(results),
        findings(results),
    ]
    if published:
        parts += [
            "These numbers were published for similar models under other protocols: do not compare them line by line.",
            published_table(results, published),
        ]
    return "\n\n".join(parts)


def page(studies: list[Results], published: dict[str, list[dict]]) -> str:
    """The text of docs/results.md."""
    sections = [section(results, published.get(results.study.name, [])) for results in studies]
    parts = [introduction(studies), *sections, limitations(studies), conclusions(studies)]
    return "\n\n".join(parts) + "\n"


def readme_section(studies: list[Results]) -> str:
    """The README's table: the scores of one study's models, and what of -ELBO the posterior loses."""
    (results,) = (study for study in studies if study.study.name == README_STUDY)
    keys = ("neg_elbo", "nll", study_gaps.APPROXIMATION, study_gaps.AMORTIZATION)
    lines = []
    for model in results.in_order:
        parameters = f"{results.runs[model][0]['num_parameters']:,}"
        lines.append([model.label, *(results.score(model, key).text() for key in keys), parameters])
    title, study, seeds = TITLES[README_STUDY].split(",")[0], results.study, len(results.study.seeds)
    how = (
        f"{title}, {study.settings['epochs']} epochs, {seeds} seeds, nats per data point. Approximation gap: "
        "what the posterior's family lacks. Amortization gap: what the encoder lacks. Matched: with as many parameters "
        "as the flow VAE."
    )
    columns = ["model", "-ELBO", "NLL", "approximation gap", "amortization gap", "parameters"]
    return f"{how}\n\n{table(columns, lines)}\n\n[More studies](docs/results.md), and what did not help.\n"


def main(folder: Path = FOLDER, path: Path = PAGE, readme: Path = README) -> int:
    """Writes the page and its figures, and the README's table of results."""
    try:
        studies = read_all(folder)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 1
    text = page(studies, yaml.safe_load((folder / PUBLISHED.name).read_text()))
    front_page = between(README_START, README_END, readme_section(studies), readme.read_text())
    path.write_text(text)
    readme.write_text(front_page)
    figures = [figure for results in studies for figure in study_figures.write_all(results, path.parent / "results")]
    print(f"written: {path.name} and {len(figures)} figures beside it; {readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
