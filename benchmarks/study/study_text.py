"""The sentences of docs/results.md. Every number and direction in them is computed from the results."""

from dataclasses import replace

from benchmarks.flow.loops import PLAIN
from benchmarks.study import study_gaps
from benchmarks.study.study_results import OURS, VANILLA_MODEL, Results
from vvae_fast.train.run.runconfig import AMORTIZED, FULL, UNMATCHED
from vvae_fast.train.study.compare import Model
from vvae_fast.train.study.spread import CLEAR, Spread


def introduction(studies: list[Results]) -> str:
    *names, last = [f"`{results.study.name}`" for results in studies]
    return f"""# Vanilla VAE against flow VAE: results

The vanilla VAE has a diagonal Gaussian posterior. The other models move its samples through K planar steps
(Rezende & Mohamed 2015). The parameters of the steps are shared by all data points, or the encoder computes them for
each data point (amortized).{_of_others(studies)} The studies here are {", ".join(names)} and {last};
[study.md](study.md) says how to run them. Figure 3 of Rezende & Mohamed, flows on four energies, is in
[density.md](density.md).

`make results` writes this page from the files in [results](results). Each study has the `results.json` that
`vvae-fast compare` wrote, and the `epochs.json` that `benchmarks/study/epochs.py` wrote. No number here is typed by
hand, except those that others published, in `published.yaml`.

- -ELBO: the bound that is trained, here with 50 posterior samples. NLL: -log p(x) by importance sampling from the
  encoder's posterior q. Their difference, the gap, says how tight the bound is. Smaller is better.
- This NLL is too high where q misses the true posterior, by a different amount for each model (Cremer et al. 2018).
  A study whose inference gaps were measured has the NLL with samples from q*, the best posterior for each row, too.
- KL: divergence of the posterior from the prior, a part of -ELBO.
- Active units: dimensions of z_K, the decoder's input, whose posterior mean has a variance above 0.01 over the
  test set (Burda et al. 2016). The mean is estimated twice, from two halves of 50 samples. The covariance of the two
  estimates is that variance, without the variance of the samples. Planar steps do not move z along the axes, so with
  a flow all dimensions of z_K may be active although few directions are used.
- A difference is called clear if its mean over the seeds is more than {CLEAR:g} standard deviations of the seeds'
  differences."""


def _of_others(studies: list[Results]) -> str:
    """The studies with other flows, where there are any."""
    names = " and ".join(f"`{results.study.name}`" for results in studies if not results.is_planar)
    return f" In {names} some are Sylvester or Householder flows; L layers of M units stand under K." if names else ""


def findings(results: Results) -> str:
    """What helps, by how much, and what does not, compared with the vanilla VAE, seed by seed."""
    parts = [_family_sentence(results, family) for family in results.families]
    parts.append(_against_full_heads(results))
    parts += study_gaps.findings(results) or [_where_the_gain_is(results)]
    parts += [_matched(results, model) for model in results.runs if model.matched != UNMATCHED]
    parts.append(_cost(results))
    return "\n".join(f"- {part}" for part in parts if part)


def _family_sentence(results: Results, family: str) -> str:
    models = results.flows(family)
    nlls = {model: results.difference(model, "nll") for model in models}
    listed = "; ".join(f"{model.length}: {nll.text(sign=True)}" for model, nll in nlls.items())
    said = verdict(list(nlls.values()))
    return f"**{family[0].upper() + family[1:]} flows {said}.** NLL less the vanilla VAE's, in nats: {listed}."


def _against_full_heads(results: Results) -> str:
    """What a head's rank costs, seed by seed."""
    differences = []
    for family in results.families:
        for model in results.flows(family):
            full = replace(model, rank=FULL)
            if model != full and full in results.runs:
                nll = results.difference(model, "nll", full).text(sign=True)
                differences.append(f"{model.series} {model.length}: {nll}")
    return f"NLL minus that of full heads, in nats: {'; '.join(differences)}." if differences else ""


def verdict(differences: list[Spread]) -> str:
    """A verdict in words on the differences between flows of several lengths and the vanilla VAE."""
    helping = sum(x.is_clear and x.mean < 0 for x in differences)
    harming = sum(x.is_clear and x.mean > 0 for x in differences)
    count = len(differences)
    if count == 1:
        return "help clearly" if helping else "harm clearly" if harming else "make no clear difference"
    if helping == count:
        return "help at every length"
    if helping == 0 and harming == 0:
        return "make no clear difference at any length"
    if harming == 0:
        return f"help clearly at {helping} of {count} lengths, with no clear difference elsewhere"
    if helping == 0:
        return f"harm clearly at {harming} of {count} lengths, and help clearly at none"
    return f"help clearly at {helping} of {count} lengths and harm clearly at {harming}"


def best(results: Results, family: str) -> Model:
    """The model of a family with the smallest mean NLL."""
    return min(results.flows(family), key=lambda model: results.score(model, "nll").mean)


def _where_the_gain_is(results: Results) -> str:
    model = best(results, AMORTIZED)
    neg_elbo, nll, gap = (results.difference(model, key) for key in ("neg_elbo", "nll", "gap"))
    kind = "" if results.is_planar else "planar "
    return (
        f"The best amortized {kind}flow, {model.length}, changes -ELBO by {neg_elbo.text(sign=True)} nats: "
        f"{nll.text(sign=True)} in the NLL, {gap.text(sign=True)} in the bound's gap, "
        f"which is {results.score(VANILLA_MODEL, 'gap').text()} without a flow. How much of it comes from a better "
        "model is not measured: better inference lowers this NLL too."
    )


def _matched(results: Results, model: Model) -> str:
    """What the flow gains over a vanilla VAE with as many parameters."""
    wide = results.runs[model][0]["num_parameters"]
    text = (
        f"**A vanilla VAE with {wide:,} parameters**, as many as amortized K = {model.matched} has or a few more, "
        f"changes the NLL by {results.difference(model, 'nll').text(sign=True)} nats"
    )
    flow = Model(AMORTIZED, model.matched)
    if flow not in results.runs:
        return f"{text}."
    rest = results.difference(flow, "nll", model)
    own = results.difference(flow, "nll")
    if not rest.is_clear:
        explained = ": the flow's parameters explain its gain" if own.is_clear and own.mean < 0 else ""
        said = f"no clear difference{explained}"
    else:
        said = "not explained by its parameters" if rest.mean < 0 else "so the parameters help more without a flow"
    return f"{text}, that flow by {own.text(sign=True)}. Between the two are {rest.text(sign=True)} nats, {said}."


def _cost(results: Results) -> str:
    """How long an epoch takes with the longest flow of each family, compared with the vanilla VAE."""
    vanilla = results.seconds(VANILLA_MODEL, OURS)
    if vanilla is None:
        return ""
    parts = []
    for family in results.families:
        model = results.flows(family)[-1]
        ours, loop = (results.seconds(model, backend) for backend in (OURS, PLAIN))
        beside = f" ({loop / vanilla:.1f} times with the {PLAIN})" if loop else ""
        parts.append(f"{family} {model.length} {ours / vanilla:.2f} times as long{beside}")
    return f"An epoch takes, compared with the vanilla VAE: {'; '.join(parts)}."


def limitations(studies: list[Results]) -> str:
    """What these numbers cannot show."""
    samples = "; ".join(f"{x.study.name}: {x.study.settings['num_samples']:,}" for x in studies)
    seeds = "; ".join(f"{x.study.name}: {len(x.study.seeds)}" for x in studies)
    epochs = "; ".join(f"{x.study.name}: {x.study.settings['epochs']:,}" for x in studies)
    return f"""## Limitations

- The budgets are small (epochs, {epochs}). Models that train longer may differ less, or in another way.
- Importance sampling overestimates the NLL, more so if the posterior fits badly or the samples are few ({samples}).
  A part of a difference in NLL may come from these estimates.{_of_gaps(studies)}
- The deviations come from few seeds ({seeds}), for initialisation, order and noise. They do not contain the error of a
  finite test set, which is the same for all models.
- All models of a study use one learning rate. It was not tuned for each model.
- An amortized flow's head adds parameters (see the tables). {_of_parameters(studies)}
{_not_run(studies)}- In all models the prior is a standard normal, and the decoder factorises over pixels.
- The full MNIST protocol, [mnist_mlp](../configs/mnist_mlp.yaml), and the convolutional protocol of van den Berg et al.
  (2018), [mnist_conv](../configs/mnist_conv.yaml), run the same way on a GPU. This page has no results of them."""


def _of_parameters(studies: list[Results]) -> str:
    """In which studies a vanilla VAE has as many parameters as a flow VAE."""
    names = [f"`{x.study.name}`" for x in studies if any(model.matched != UNMATCHED for model in x.runs)]
    if not names:
        return "No vanilla VAE with as many parameters was trained."
    have = "has" if len(names) == 1 else "have"
    return f"Only {' and '.join(names)} {have} a vanilla VAE with as many, for one length of the flow."


def _not_run(studies: list[Results]) -> str:
    """The models of the studies' files that have no results."""
    lines = []
    for results in studies:
        labels = ", ".join(model.label for model in results.study.models if model not in results.runs)
        lines += [f"- Models of `{results.study.name}` that were not run yet: {labels}.\n"] if labels else []
    return "".join(lines)


def _of_gaps(studies: list[Results]) -> str:
    """What the gaps cannot show, where any were measured."""
    if not any(map(study_gaps.measured, studies)):
        return ""
    return """
  How much is in the tables with q*. Adam fits q* from the encoder's posterior and may miss a better one: the NLL from
  q* is then too high as well."""


def conclusions(studies: list[Results]) -> str:
    """The verdicts of all studies."""
    lines = [f"- `{results.study.name}`: {_of_families(results)}." for results in studies]
    return "\n".join(["## Conclusions", "", *lines])


def _of_families(results: Results) -> str:
    parts = []
    for family in results.families:
        model = best(results, family)
        said = verdict([results.difference(flow, "nll") for flow in results.flows(family)])
        nll = results.difference(model, "nll").text(sign=True)
        parts.append(f"{model.title} flows {said}; their best, {model.length}, changes the NLL by {nll} nats")
    parts += filter(None, [study_gaps.conclusion(results)])
    return ". ".join(part[0].upper() + part[1:] for part in parts)
