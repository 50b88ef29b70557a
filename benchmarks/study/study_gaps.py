"""The part of docs/results.md on inference gaps: how each NLL was estimated, and what the gain of a flow consists of.

Every number and direction is computed from the results.
"""

import itertools
import statistics

from benchmarks.report.tables import table
from benchmarks.study.study_results import VANILLA_MODEL, Results
from vvae_fast.train.run.gaps import FEW, SHARES
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.spread import Spread

NLL, NLL_OPTIMAL, NEG_ELBO, APPROXIMATION, AMORTIZATION = (
    f"gaps.scores.{name}.mean" for name in ("nll", "nll_optimal", "neg_elbo", "approximation_gap", "amortization_gap")
)
PARTS = {NLL_OPTIMAL: "model", APPROXIMATION: "family", AMORTIZATION: "encoder"}


def measured(results: Results) -> list[Model]:
    """The models of the study whose gaps were measured, in the order of the tables; none without the vanilla VAE's."""
    models = [model for model in results.in_order if all("gaps" in run for run in results.runs[model])]
    return models if VANILLA_MODEL in models else []


def section(results: Results) -> list[str]:
    """The tables of estimates and gaps, their figure and what they say; nothing where no gaps were measured."""
    models = measured(results)
    if not models:
        return []
    settings = results.runs[VANILLA_MODEL][0]["gaps"]["settings"]
    how = (
        f"How each NLL was estimated: by importance sampling, above with {results.study.settings['num_samples']:,} "
        f"samples from the encoder's posterior q of each row of the test set; below with S samples of each of its "
        f"first {settings['num_points']:,} rows, from q and from q*. q* is the best posterior of the model's own "
        f"family for that row alone, after {settings['iterations']:,} iterations of Adam. Effective: the median over "
        f"the rows of the effective sample size. Few: rows where it is below {FEW}."
    )
    return [
        how,
        estimates_table(results, models),
        "-ELBO = NLL from q* + approximation gap (what the family lacks) + amortization gap (what the encoder "
        "lacks), on the same rows. Over rows: standard deviation over the rows.",
        gaps_table(results, models),
        f"![Approximation and amortization gap of each model](results/{results.study.name}_gaps.svg)",
    ]


def estimates_table(results: Results, models: list[Model]) -> str:
    """The NLL from q and from q* for numbers of samples, and how far it can be trusted."""
    counts = [row["num_samples"] for row in results.runs[VANILLA_MODEL][0]["gaps"]["by_samples"]]
    proposals = {"nll": "q", "nll_optimal": "q*"}
    columns = ["model", "K", *(f"{q}, S = {count:,}" for q in proposals.values() for count in counts)]
    columns += [f"{word}, {q}" for word in ("effective", "few") for q in proposals.values()]
    lines = []
    for model in models:
        pairs = itertools.product(proposals, range(len(counts)))
        nlls = [results.score(model, f"gaps.by_samples.{row}.{key}").text() for key, row in pairs]
        sizes = [f"{results.score(model, f'gaps.scores.{name}.median').mean:.1f}" for name in SHARES]
        shares = [f"{results.score(model, f'gaps.{share}').mean:.1%}" for share in SHARES.values()]
        lines.append([model.title, str(model.num_steps), *nlls, *sizes, *shares])
    return table(columns, lines)


def gaps_table(results: Results, models: list[Model]) -> str:
    """-ELBO and its three parts."""
    columns = ["model", "K", "-ELBO", "NLL from q*"]
    columns += ["approximation gap", "over rows", "amortization gap", "over rows"]
    lines = []
    for model in models:
        cells = [results.score(model, key).text() for key in (NEG_ELBO, NLL_OPTIMAL)]
        for key in (APPROXIMATION, AMORTIZATION):
            over_rows = results.score(model, key.replace("mean", "std")).mean
            cells += [results.score(model, key).text(), f"{over_rows:.2f}"]
        lines.append([model.title, str(model.num_steps), *cells])
    return table(columns, lines)


def findings(results: Results) -> list[str]:
    """What the gain of each family's best flow consists of, and what the NLL from q says of it."""
    models = measured(results)
    sentences = [] if not models else [_share_of_encoder(results)]
    for family in results.families:
        flows = [model for model in results.flows(family) if model in models]
        if flows:
            best = min(flows, key=lambda model: results.score(model, NLL_OPTIMAL).mean)
            sentences.append(_gain(results, best))
            sentences.append(_correction(results, best))
    return sentences


def _share_of_encoder(results: Results) -> str:
    runs = [run["gaps"]["scores"] for run in results.runs[VANILLA_MODEL]]
    encoder, family = (
        statistics.mean(run[name]["mean"] for run in runs) for name in ("amortization_gap", "approximation_gap")
    )
    total = encoder + family
    more = "encoder" if encoder > family else "family"
    part = max(encoder, family) / total
    return f"Without a flow {part:.0%} of log p(x) - ELBO, which is {total:.2f} nats, is what the {more} lacks."


def _gain(results: Results, model: Model) -> str:
    """A flow's change of -ELBO in its three parts."""
    parts = {what: results.difference(model, key) for key, what in PARTS.items()}
    listed = ", ".join(f"{part.text(sign=True)} from {_quality(part)} {what}" for what, part in parts.items())
    change = results.difference(model, NEG_ELBO).text(sign=True)
    text = f"**{model.label}**, the best of its family by the NLL from q*, changes -ELBO by {change} nats: {listed}."
    encoder, family = parts["encoder"], parts["family"]
    gains = [part for part in (encoder, family) if part.is_clear and part.mean < 0]
    if not gains:
        return f"{text} It makes neither inference part clearly smaller."
    more, less = ("encoder", "family") if encoder.mean < family.mean else ("family", "encoder")
    return f"{text} Of inference, it helps the {more} more than the {less}."


def _quality(part: Spread) -> str:
    if not part.is_clear:
        return "a not clearly different"
    return "a better" if part.mean < 0 else "a worse"


def _correction(results: Results, model: Model) -> str:
    """How much the NLL from q takes for a better model although it is better inference."""
    plain, optimal = (results.difference(model, key) for key in (NLL, NLL_OPTIMAL))
    taken = results.difference_of(model, _tightness)
    loose = [results.score(x, NLL).mean - results.score(x, NLL_OPTIMAL).mean for x in (VANILLA_MODEL, model)]
    text = (
        f"Judged by the NLL from q, which this page used to take for the model's, {plain.text(sign=True)} nats would "
        f"be the model's and not {optimal.text(sign=True)}. The NLL from q is too high where q misses p(z | x), "
        f"compared with that from q* by {loose[0]:.2f} nats without a flow and {loose[1]:.2f} with it"
    )
    if not taken.is_clear:
        return f"{text}, which is no clear difference."
    if taken.mean > 0:
        return f"{text}. So it counted {taken.text()} nats of better inference as a better model."
    return f"{text}. So it hid {(-taken.mean):.2f} ± {taken.deviation:.2f} nats of a better model."


def _tightness(run: dict) -> float:
    """The NLL from q* less that from q: near 0 where q fits as well."""
    return run["gaps"]["scores"]["nll_optimal"]["mean"] - run["gaps"]["scores"]["nll"]["mean"]


def conclusion(results: Results) -> str:
    """The best flow's gain in one sentence; empty where no gaps were measured."""
    flows = [model for model in measured(results) if model.num_steps > 0]
    if not flows:
        return ""
    best = min(flows, key=lambda model: results.score(model, NLL_OPTIMAL).mean)
    parts = [f"{what} {results.difference(best, key).text(sign=True)}" for key, what in PARTS.items()]
    return f"The change of -ELBO by {best.label}, the best by the NLL from q*, in nats: {', '.join(parts)}"
