"""The CITE-seq template: its parts against its docstring, and a fit against the truth of a simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy import stats
from torch import Tensor

import scivi
from domains.genomics import citeseq, expression
from domains.genomics.cell_networks import LEAST_SCALE
from domains.genomics.citeseq import EXAMPLE
from domains.genomics.panels import Panel, Prior
from scivi.analysis.verdict import checks, measure
from scivi.errors import DataError
from scivi.inference.objective import prepare
from scivi.inference.opening import open_data
from scivi.inputs.batches import Batch, chunks
from scivi.models.binding import Bound, bind, seeded
from scivi.models.template import Template

SMALL: dict[str, Any] = {"hidden": 16, "n_latent": 3}
ALONE = replace(
    EXAMPLE,
    batches=("1",),
    log_ambient=EXAMPLE.log_ambient[:1],
    log_fractions=(),
    has_empties=False,
    isotypes=(),
)
QUICK = scivi.Plan(steps=2, rows_per_batch=16, estimator="trace", newton=False, compile="off", stop=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        citeseq.template,
        citeseq.make(ALONE, hidden=16),
        citeseq.make(replace(EXAMPLE, has_empties=False), hidden=16),
    ],
    ids=["all there is", "proteins of one batch", "without empties"],
)
def test_every_law_holds(template):
    found = scivi.check(template, seed=1)
    broken = {str(law): str(found.detail.sel(law=law).values) for law in found.law.values[~found.ok.values]}
    assert broken == {}


def simulated(template: Template, n: int = 20, m: int = 14, seed: int = 0) -> tuple[xr.Dataset, xr.Dataset]:
    return scivi.simulate(template, {"cell": n, "droplet": m}, seed=seed)


def whole(template: Template, table: Any) -> Batch:
    source = open_data(template, table)
    return next(chunks(source, template.fields, template.row_dims, 10**6, torch.device("cpu"), torch.float64))


def bound_to(template: Template, table: Any) -> tuple[Bound, Batch, dict[str, Tensor]]:
    """The pair with large weights, in evaluation mode; the batch; and a draw of all latents."""
    batch = whole(template, table)
    bound = bind(template, batch, seed=3)
    bound.nets.eval()
    with seeded(1), torch.no_grad():
        for parameter in bound.nets.own.of_proteins.parameters():  # type: ignore[union-attr]
            parameter.add_(torch.randn_like(parameter))
        trace = poutine.trace(bound.guide).get_trace(batch)
    return (
        bound,
        batch,
        {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"},
    )


def proteins_of(bound: Bound, batch: Batch, values: dict[str, Tensor]) -> Any:
    return citeseq.proteins(batch, values, bound.nets.own, form_of(bound.template))  # type: ignore[arg-type]


def form_of(template: Template) -> Any:
    return template.model.keywords["form"]  # type: ignore[attr-defined]


@torch.no_grad()
def derived(bound: Bound, batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    template = bound.template
    with seeded(5):
        return template.derive(batch, template.prior, bound.nets.own, values)  # type: ignore[misc,return-value]


@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
def test_a_foreground_is_half_as_bright_again_whatever_the_networks_say(shift):
    template = citeseq.make(EXAMPLE, **SMALL)
    bound, batch, values = bound_to(template, simulated(template)[0])
    with torch.no_grad():
        bound.nets.own.start[0].add_(shift)  # type: ignore[union-attr,index]
        found = proteins_of(bound, batch, values)
    rise = found.foreground.log_mean - found.background.log_mean
    assert float(rise.min()) >= math.log(1.5) - 1e-12  # rounding of a sum in double precision
    if shift < 0:
        np.testing.assert_allclose(rise, math.log(1.5), rtol=1e-9)  # reached, not only approached from afar
    else:
        assert float(rise.max()) > math.log(3)


def test_an_isotype_control_is_foreground_in_one_of_a_thousand():
    template = citeseq.make(EXAMPLE, **SMALL)
    bound, batch, values = bound_to(template, simulated(template)[0])
    with torch.no_grad():
        found = proteins_of(bound, batch, values)
    isotype = np.isin(EXAMPLE.proteins, EXAMPLE.isotypes)
    chance = found.logits.sigmoid().numpy()
    np.testing.assert_allclose(chance[:, isotype], 1e-3)
    assert not np.isclose(chance[:, ~isotype], 1e-3).any()
    assert chance[:, ~isotype].std() > 0.1  # the others follow the cell's state


def test_background_level_has_all_its_parts():
    """Ambient, efficiency and droplet factor add up, each at the place of the cell's batch."""
    template = citeseq.make(EXAMPLE, **SMALL)
    bound, batch, values = bound_to(template, simulated(template)[0])
    with torch.no_grad():
        found = proteins_of(bound, batch, values)
    place = batch.batch.long().numpy()
    level = (citeseq.ambient(values) + values["log_efficiency"]).numpy()[place]
    np.testing.assert_allclose(found.background.log_mean, level + values["droplet_factor"].numpy()[:, None])
    assert len(set(place.tolist())) == 2


def log_density(template: Template, table: xr.Dataset, site: str, given: dict[str, Tensor]) -> float:
    """Of a site, scaled, at latents that are given; those of droplets are 0."""
    batch = whole(template, table)
    bound = bind(template, batch, seed=3)
    bound.nets.eval()
    given = given | {"empty_factor": torch.zeros(batch.sizes["droplet"], dtype=torch.float64)}
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(bound.model, data=given)).get_trace(batch)
        trace.compute_log_prob()
    return float(trace.nodes[site]["log_prob_sum"])


@pytest.mark.parametrize("site", ["empty_adt", "empty_factor"])
def test_empties_weigh_no_more_than_the_cells(site):
    """Of 20 cells and 10, 20 and 40 droplets that repeat themselves: whole weight, whole, and half."""
    template = citeseq.make(EXAMPLE, **SMALL)
    table, _ = simulated(template, 20, 10)
    _, _, values = bound_to(template, table)
    names = ("log_empty", "log_kappa", "log_kappa_protein", "scatter", "droplet_scatter")
    names = (*names, "log_background_dispersion")
    given = {name: values[name] for name in (*names, "log_efficiency")}
    tables = [table.isel(droplet=np.tile(np.arange(10), times)) for times in (1, 2, 4)]
    one, two, four = (log_density(template, t, site, given) for t in tables)
    assert two == pytest.approx(2 * one, rel=1e-12)
    assert four == pytest.approx(two, rel=1e-12)


def test_empties_are_background_over_kappa():
    """The log density of a droplet against scipy's, where neither it nor its factor scatters."""
    template = citeseq.make(EXAMPLE, **SMALL)
    table, _ = simulated(template, 20, 10)
    _, _, values = bound_to(template, table)
    values["scatter"] = torch.full_like(values["scatter"], 1e-12)
    names = ("log_empty", "log_kappa", "log_kappa_protein", "scatter", "droplet_scatter")
    names = (*names, "log_background_dispersion")
    given = {name: values[name] for name in (*names, "log_efficiency")}
    found = log_density(template, table, "empty_adt", given)
    place = np.array([EXAMPLE.batches.index(b) for b in table["empty_batch"].values])
    level = values["log_empty"] + values["log_efficiency"]
    mean, theta = np.exp(level.numpy()[place]), np.exp(values["log_background_dispersion"].numpy())
    truth = stats.nbinom.logpmf(table["empty_adt"].values, theta, theta / (theta + mean))
    assert found == pytest.approx(truth.sum(), rel=1e-9)


def test_efficiency_of_capture_is_left_out_of_what_is_reported():
    """What moves from the ambient to the efficiency changes no likelihood, and what is reported by it."""
    template = citeseq.make(EXAMPLE, **SMALL)
    bound, batch, values = bound_to(template, simulated(template)[0])
    moved = torch.linspace(-0.5, 0.7, 12, dtype=torch.float64).reshape(2, 6)
    other = values | {
        "log_empty": values["log_empty"] - moved,
        "log_efficiency": values["log_efficiency"] + moved,
    }
    one, two = (derived(bound, batch, v) for v in (values, other))
    of_cells = moved[batch.batch.long()]
    torch.testing.assert_close(one["foreground"], two["foreground"])
    torch.testing.assert_close(two["denoised"], one["denoised"] * (-of_cells).exp())
    torch.testing.assert_close(two["log_background"], one["log_background"] - of_cells)


def with_gaps(table: xr.Dataset) -> xr.Dataset:
    """The same, with entries, a whole cell and a whole protein of cells missing, and some of droplets."""
    gaps = table.copy(deep=True)
    rng = np.random.default_rng(0)
    for name in ("adt", "empty_adt"):
        gaps[name].values[rng.random(gaps[name].shape) < 0.2] = np.nan
    gaps["adt"].values[3], gaps["adt"].values[:, 2] = np.nan, np.nan
    return gaps


@pytest.mark.parametrize("training", [False, True])
def test_what_stands_under_the_mask_changes_nothing(training):
    template = citeseq.make(EXAMPLE, **SMALL)
    bound, batch, values = bound_to(template, with_gaps(simulated(template)[0]))
    bound.nets.train(training)
    other = replace(
        batch,
        values={
            name: torch.where(batch.observed_mask[name], value, value + 977.0)
            if name in batch.observed_mask
            else value
            for name, value in batch.values.items()
        },
    )
    assert set(batch.observed_mask) == {"adt", "empty_adt"}
    objective = prepare(bound, batch, replace(QUICK, dtype="float64"))
    found = []
    for one in (batch, other):
        with seeded(0):
            value = objective.evaluate(one)
        slopes = torch.autograd.grad(value.loss, list(bound.nets.parameters()), allow_unused=True)
        found.append([value.loss.detach(), *(s for s in slopes if s is not None)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert bool(torch.isfinite(one).all())
    bound.nets.eval()
    for name, value in derived(bound, batch, values).items():
        assert torch.equal(derived(bound, other, values)[name], value), name


def test_of_a_protein_that_was_not_counted_the_state_tells():
    template = citeseq.make(EXAMPLE, **SMALL)
    bound, batch, values = bound_to(template, with_gaps(simulated(template)[0]))
    with torch.no_grad():
        found = proteins_of(bound, batch, values)
    told, hidden = derived(bound, batch, values), ~batch.observed_mask["adt"]
    chance = found.logits.sigmoid()
    torch.testing.assert_close(told["foreground"][hidden], chance[hidden])
    without = (-values["log_efficiency"]).exp()[batch.batch.long()]
    torch.testing.assert_close(told["denoised"][hidden], (chance * found.foreground.mean * without)[hidden])
    torch.testing.assert_close(told["foreground"][~hidden], found.foreground_prob(batch.adt)[~hidden])
    assert not torch.isclose(told["foreground"], chance)[~hidden].all()


@pytest.fixture(scope="module")
def quick() -> tuple[scivi.Fit, xr.Dataset]:
    template = citeseq.make(EXAMPLE, **SMALL)
    table, _ = simulated(template)
    return scivi.fit(template, table, QUICK, progress=False), table


def test_a_saved_fit_finds_its_template_and_draws_the_same(quick, tmp_path):
    fit, table = quick
    again = scivi.load(scivi.save(fit, tmp_path / "fit"))
    assert again.template.made == fit.template.made
    assert citeseq.panel_of(again.template) == EXAMPLE
    one, two = (scivi.draw(f, table, 5, seed=4) for f in (fit, again))
    xr.testing.assert_equal(one["posterior"].to_dataset(), two["posterior"].to_dataset())
    xr.testing.assert_equal(one["sample_stats"].to_dataset(), two["sample_stats"].to_dataset())


def test_results_are_labelled(quick):
    fit, table = quick
    posterior = scivi.draw(fit, table, 5)["posterior"]
    for name in ("foreground", "log_background", "denoised"):
        assert posterior[name].dims == ("chain", "draw", "cell", "protein")
    assert list(posterior["protein"].values) == list(EXAMPLE.proteins)
    assert list(posterior["batch"].values) == list(EXAMPLE.batches)
    assert float(posterior["foreground"].min()) >= 0
    assert float(posterior["foreground"].max()) <= 1
    assert posterior["denoised"].attrs["units"] == "count"
    assert "droplet" not in posterior.dims  # only the cells are told of


def test_expected_counts_have_the_background_that_denoised_leaves_out(quick):
    fit, table = quick
    result = scivi.draw(fit, table, 6)
    found, posterior = expression.expected_counts(result), result["posterior"]
    assert found.dims == ("cell", "protein")
    present, below = posterior["foreground"].values[0], np.exp(posterior["log_background"].values[0])
    by_hand = (posterior["denoised"].values[0] + (1 - present) * below).mean(0)
    np.testing.assert_allclose(found.values, by_hand, rtol=1e-6)


def test_cells_alone_are_read_by_a_fit_that_knew_empties(quick):
    """New cells of which no empties are at hand: one droplet of which nothing was counted stands in."""
    fit, table = quick
    none = xr.Dataset(
        {"empty_adt": (("droplet", "protein"), np.full((1, 6), np.nan)), "empty_batch": ("droplet", ["1"])}
    )
    cells = xr.merge([table.drop_dims("droplet").isel(cell=slice(0, 7)), none])
    tree = scivi.draw(fit, cells, 4)
    assert tree["posterior"].sizes["cell"] == 7
    assert np.isfinite(tree["sample_stats"]["lp"]).all()


@pytest.mark.parametrize("dropped", ["adt", "rna", "empty_adt"])
def test_a_count_that_is_none_is_one_error_with_its_place(dropped):
    template = citeseq.make(EXAMPLE, **SMALL)
    table, _ = simulated(template)
    row = table[dropped].dims[0]
    column = table[dropped].dims[1]
    for value in (-1.0, 2.5, np.inf):
        wrong = table.copy(deep=True)
        wrong[dropped].values[5, 2] = wrong[dropped].values[9, 1] = value
        with pytest.raises(DataError) as caught:
            scivi.fit(template, wrong, QUICK, progress=False)
        told = str(caught.value)
        assert f'field "{dropped}": 2 of {table[dropped].size} entries are not whole numbers >= 0' in told
        assert f"the first is {value} at {row}=5, {column}=2" in told
        assert told.count("\n") == 1


def test_a_missing_rna_count_is_one_error_with_its_place():
    template = citeseq.make(EXAMPLE, **SMALL)
    table, _ = simulated(template)
    table["rna"].values[5, 2] = np.nan
    with pytest.raises(DataError, match=r'"rna".*at cell=5, gene=2'):
        scivi.fit(template, table, QUICK, progress=False)


def annotated(table: xr.Dataset) -> anndata.AnnData:
    """A simulated table as users bring theirs."""
    obs = pd.DataFrame({"lane": table["batch"].values}, index=[f"c{k}" for k in table["cell"].values])
    data = anndata.AnnData(table["rna"].values.astype(np.float32), obs)
    data.obsm["protein_expression"] = pd.DataFrame(
        table["adt"].values, index=obs.index, columns=list(EXAMPLE.proteins)
    )
    return data


def droplets(table: xr.Dataset) -> anndata.AnnData:
    obs = pd.DataFrame({"lane": table["empty_batch"].values})
    obs.index = pd.Index([f"d{k}" for k in range(len(obs))])
    data = anndata.AnnData(obs=obs)
    data.obsm["protein_expression"] = pd.DataFrame(
        table["empty_adt"].values, index=obs.index, columns=list(EXAMPLE.proteins)
    )
    return data


def test_from_data_to_draws():
    table, _ = simulated(citeseq.make(EXAMPLE, **SMALL))
    template, data = citeseq.from_data(
        annotated(table), batch="lane", isotypes=("IgG1",), empties=droplets(table), **SMALL
    )
    panel = citeseq.panel_of(template)
    assert (panel.proteins, panel.batches, panel.isotypes) == (EXAMPLE.proteins, ("1", "2"), ("IgG1",))
    assert panel.has_empties
    fit = scivi.fit(template, data, QUICK, progress=False)
    posterior = scivi.draw(fit, data, 3)["posterior"]
    assert list(posterior["cell"].values) == [f"c{k}" for k in range(20)]
    assert np.isfinite(posterior["foreground"]).all()


def test_a_negative_count_that_stands_for_missing_is_told_when_the_reader_was_not():
    table, _ = simulated(citeseq.make(EXAMPLE, **SMALL))
    data = annotated(table)
    data.obsm["protein_expression"].iloc[5, 2] = -1
    with pytest.raises(DataError, match=r'field "adt": 1 of 120 .* the first is -1.0 at cell=5, protein=2'):
        scivi.fit(*citeseq.from_data(data, batch="lane", **SMALL), QUICK, progress=False)


# A hard experiment: a foreground is 2.2 to 3.7 times the background, which counts alone tell badly.
HARD = Panel(
    proteins=(*"ABCDEFG", "IgG"),
    batches=("1", "2"),
    log_ambient=((2.0, 1.5, 1.0, 1.5, 0.5, 2.0, 1.0, 0.5), (2.2, 1.7, 1.2, 1.7, 0.7, 2.0, 1.5, 0.7)),
    log_fold=(*(7 * [0.8]), 0.5),
    share=(*(7 * [0.3]), 0.02),
    log_fractions=tuple(math.log(1 / 40) + 0.5 * math.sin(g) for g in range(40)),
    isotypes=("IgG",),
    has_empties=True,
)
STEPS = 400


@pytest.fixture(scope="module")
def fitted() -> dict[str, Any]:
    """Fits of 1 and of 400 steps to 600 cells and 300 empties, their draws, and the truth."""
    template = citeseq.make(HARD, hidden=64, n_latent=6, prior=Prior(kappa_protein_sd=0.02))
    table, truth = scivi.simulate(template, {"cell": 600, "droplet": 300}, seed=0)
    plan = replace(
        QUICK, steps=STEPS, rows_per_batch=128, lr=1e-2, kl_warmup=120, beta_start=0.1, warmup=0.2, decay=0.5
    )
    plans = {"fitted": plan, "begun": replace(plan, steps=1, kl_warmup=0)}
    fits = {name: scivi.fit(template, table, p, progress=False) for name, p in plans.items()}
    drawn = {name: scivi.draw(f, table, 50)["posterior"] for name, f in fits.items()}
    return drawn | {"truth": truth, "table": table, "fit": fits["fitted"]}


def auroc(score: np.ndarray, present: np.ndarray) -> float:
    """Mean over proteins of the chance that a foreground has a higher score than a background."""
    found = []
    for own, is_present in zip(score.T, present.T.astype(bool), strict=True):
        u = stats.mannwhitneyu(own[is_present], own[~is_present]).statistic
        found.append(u / is_present.sum() / (~is_present).sum())
    return float(np.mean(found))


@pytest.mark.slow
def test_foreground_of_a_simulation_is_told(fitted):
    """Of 7 proteins in 600 cells a mean AUROC has a sampling error of .005: the bar is some 5 from either.

    Here it is .924 when fitted (.88 at another seed, where types are more alike), .836 when begun, and .800
    of the counts themselves.
    """
    truth = fitted["truth"]["foreground"].values
    scores = {k: fitted[k]["foreground"].mean(("chain", "draw")).values for k in ("fitted", "begun")}
    of = {k: auroc(score[:, :7], truth[:, :7]) for k, score in scores.items()}
    assert of["begun"] < 0.86 < 0.89 < of["fitted"]
    assert auroc(fitted["table"]["adt"].values[:, :7], truth[:, :7]) < 0.86
    assert scores["fitted"][:, 7].mean() < 0.01  # the isotype control
    brier = {k: ((score - truth) ** 2).mean() for k, score in scores.items()}
    assert brier["fitted"] < 0.11 < 0.25 < brier["begun"]


@pytest.mark.slow
def test_levels_of_a_simulation_are_recovered(fitted):
    """Ambient and efficiency together, which counts tell: rms error .09 after so short a fit, .21 before."""
    truth, error = fitted["truth"]["log_ambient"].values, {}
    for name in ("fitted", "begun"):
        mean = fitted[name].mean(("chain", "draw"))
        level = (mean["log_ambient"] + mean["log_efficiency"]).values
        error[name] = float(np.sqrt(((level - truth) ** 2).mean()))
    assert error["fitted"] < 0.12 < 0.18 < error["begun"]
    ambient = fitted["fitted"]["log_ambient"].mean(("chain", "draw")).values
    # alone it is known to the prior of the efficiency, .3, which both batches' mean shares: .2
    assert np.sqrt(((ambient - truth) ** 2).mean()) < 0.2
    kappa = fitted["fitted"]["log_kappa"].mean(("chain", "draw")).values
    # of 600 cells and 300 empties, and the fit's shortness
    np.testing.assert_allclose(kappa, -0.5, atol=0.15)


@pytest.mark.slow
def test_a_planted_collapse_of_the_states_is_told(fitted):
    """An encoder that gives every cell the prior of its state: six units collapsed, as the verdict says."""
    table, names = fitted["table"], [f"z[{k}]" for k in range(6)]

    def judged(fit: scivi.Fit) -> tuple[dict[str, bool], Any]:
        tree = scivi.draw(fit, table, 50)
        found = scivi.analysis.collapse(tree)
        units = dict(zip(found["variable"].values.tolist(), found["ok"].values.tolist(), strict=True))
        check = next(c for c in checks(tree, measure(tree)) if c.name == "active units")
        return units, check

    units, check = judged(fitted["fit"])
    assert sum(units[n] for n in names) >= 2
    kept = {name: value.clone() for name, value in fitted["fit"].nets.state_dict().items()}
    heads = fitted["fit"].nets.own.encoder.heads
    with torch.no_grad():
        for name in ("loc", "scale", "correlation"):
            heads[name].weight.zero_()
            heads[name].bias.fill_(math.log(math.expm1(1 - LEAST_SCALE)) if name == "scale" else 0.0)
    units, check = judged(fitted["fit"])
    fitted["fit"].nets.load_state_dict(kept)
    assert not any(units[n] for n in names)
    assert not check.ok
    assert check.counts == "care"
