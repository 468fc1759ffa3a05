from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.ops.indexing import Vindex
from scipy import stats
from torch import nn

from scivi.analysis import report
from scivi.errors import DataError, TemplateError, TrustWarning, Unsupported
from scivi.inference import draws as draws_module
from scivi.inference.draws import draw, predict
from scivi.inference.gather import rows_at_once
from scivi.inference.loop import fit
from scivi.inference.simulate import simulate
from scivi.inference.state import Fit, load, save
from scivi.inputs.fields import Field
from scivi.models.template import Template
from tests.inference import conjugate
from tests.inference.conjugate import (
    EXACT,
    NOISE,
    PRIOR,
    ROW_SD,
    SHRINK,
    SPREAD,
    hierarchy,
    log_evidence,
    make_exact,
    plan,
    rows,
)

QUICK = plan(steps=2, log_every=1, lr=1e-9, estimator="trace")
DATA, N = rows(15), 15
LABELLED = xr.Dataset({"y": ("row", DATA["y"])}, {"row": [f"star {k}" for k in range(N)]})


def exact_fit(data=LABELLED, coefficients=EXACT) -> Fit:
    """A fit whose population is exact, and whose rows are as exact as their coefficients."""
    template = replace(hierarchy(coefficients), units={"mu": "mag", "z": "mag"})
    done = fit(template, data, QUICK, progress=False)
    y = np.asarray(data["y"])
    make_exact(done.bound, torch.as_tensor(y[~np.isnan(y)]))
    return done


@pytest.fixture(scope="module")
def exact() -> Fit:
    return exact_fit()


def mean_of(values: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over draws, and its Monte Carlo standard error."""
    return values.mean(("chain", "draw")).values, (
        values.std(("chain", "draw")) / values.sizes["draw"] ** 0.5
    ).values


def test_draws_of_an_exact_guide_have_the_moments_of_the_posterior(exact):
    tree = draw(exact, LABELLED, 4000, seed=1)
    y = torch.as_tensor(DATA["y"])
    mu, variance = (float(x) for x in conjugate.posterior_of_mu(y, SPREAD))
    mean, error = mean_of(tree.posterior.mu)
    assert mean == pytest.approx(mu, abs=4 * error)  # 4 standard errors of 4000 draws
    assert float(tree.posterior.mu.std()) == pytest.approx(variance**0.5, rel=4 / 8000**0.5)  # the same
    mean, error = mean_of(tree.posterior.z)
    assert (abs(mean - (SHRINK * DATA["y"] + (1 - SHRINK) * mu)) < 4 * error).all()
    sd = (ROW_SD**2 + (1 - SHRINK) ** 2 * variance) ** 0.5
    np.testing.assert_allclose(tree.posterior.z.std(("chain", "draw")), sd, rtol=4 / 8000**0.5)
    mean, error = mean_of(tree.prior.mu)
    assert mean == pytest.approx(0.0, abs=4 * error)
    assert float(tree.prior.mu.std()) == pytest.approx(PRIOR, rel=4 / 8000**0.5)


def test_every_weight_of_an_exact_guide_is_the_evidence(exact):
    stats_of = draw(exact, LABELLED, 50, seed=1).sample_stats
    evidence = float(log_evidence(torch.as_tensor(DATA["y"]), SPREAD))
    np.testing.assert_allclose(stats_of.lp - stats_of.log_q, evidence, atol=1e-5)  # EXACT is kept in float32
    np.testing.assert_allclose(stats_of.global_log_weight, evidence, atol=1e-5)
    assert not stats_of.poor.any()
    assert not stats_of.outside.any()


def test_row_weights_and_log_likelihood_are_those_of_scipy(exact):
    tree = draw(exact, LABELLED, 20, seed=1)
    mu, z = tree.posterior.mu.values[..., None], tree.posterior.z.values
    np.testing.assert_allclose(tree.log_likelihood.y, stats.norm(z, NOISE).logpdf(DATA["y"]), rtol=1e-6)
    truth = stats.norm(mu, (SPREAD**2 + NOISE**2) ** 0.5).logpdf(
        DATA["y"]
    )  # log p(y_i | mu), whatever z was drawn
    np.testing.assert_allclose(tree.sample_stats.row_log_weight, truth, atol=1e-5)  # EXACT is kept in float32


@pytest.mark.parametrize("ending", [None, "zarr"])
def test_log_densities_are_in_nats_and_fields_in_their_own_unit(exact, tmp_path, ending):
    tree = predict(exact, LABELLED, 5, to=tmp_path / f"draws.{ending}" if ending else None)
    assert {v.attrs["units"] for v in tree.log_likelihood.data_vars.values()} == {"nat"}
    units = {str(name): v.attrs["units"] for name, v in tree.sample_stats.data_vars.items()}
    flags = {"outside": "1", "poor": "1"}
    assert units == dict.fromkeys(units, "nat") | flags
    assert tree.observed_data.y.attrs["units"] == tree.posterior_predictive.y.attrs["units"] != "nat"


def test_results_are_labelled(exact):
    tree = predict(exact, LABELLED, 7, seed=1)
    assert tree.posterior.z.dims == ("chain", "draw", "row")
    assert tree.posterior.mu.dims == ("chain", "draw")
    assert tree.posterior.z.attrs["units"] == "mag"
    assert dict(tree.posterior.sizes) == {"chain": 1, "draw": 7, "row": N}
    for group in ("posterior", "log_likelihood", "observed_data", "sample_stats", "posterior_predictive"):
        assert tree[group]["row"].values.tolist() == [f"star {k}" for k in range(N)], group
    np.testing.assert_allclose(tree.observed_data.y, DATA["y"])
    assert {"lp", "log_q", "row_log_weight", "outside", "poor"} <= set(tree.sample_stats.data_vars)
    assert tree.history.step.values.tolist() == [1, 2]
    told = json.loads(tree.attrs["provenance"])
    assert (told["template"], told["method"], told["draws"], told["draw_seed"]) == ("hierarchy", "svi", 7, 1)
    assert told["data"]["sizes"] == {"row": N}
    assert "created" in told


def test_seeds_decide_the_draws_and_the_process_stream_stays(exact):
    torch.manual_seed(4)
    one, other, third = (draw(exact, LABELLED, 5, seed=s).posterior.to_dataset() for s in (0, 0, 1))
    after = torch.rand(2)
    torch.manual_seed(4)
    assert torch.equal(after, torch.rand(2))
    xr.testing.assert_equal(one, other)
    assert not np.array_equal(one.z, third.z)


def test_rows_in_chunks_follow_the_same_globals(exact, monkeypatch):
    whole = draw(exact, LABELLED, 10, seed=2)
    monkeypatch.setattr("scivi.inference.gather.AT_ONCE", 40)  # four rows at a time
    parts = predict(exact, LABELLED, 10, seed=2)
    assert {n: v.dims for n, v in parts.posterior.data_vars.items()} == {
        n: v.dims for n, v in whole.posterior.data_vars.items()
    }
    xr.testing.assert_equal(parts.posterior.mu, whole.posterior.mu)
    assert parts.posterior_predictive.y.shape == (1, 10, N)
    evidence = float(log_evidence(torch.as_tensor(DATA["y"]), SPREAD))
    np.testing.assert_allclose(
        parts.sample_stats.lp - parts.sample_stats.log_q, evidence, atol=1e-5
    )  # float32 of EXACT
    centred = parts.posterior.z - (SHRINK * parts.observed_data.y + (1 - SHRINK) * parts.posterior.mu)
    assert float(centred.std()) == pytest.approx(ROW_SD, rel=4 / 300**0.5)  # 4 standard errors of 150 numbers


def test_rows_never_seen_get_their_posterior_in_one_pass(exact):
    new = {"y": np.array([0.0, 1.5, 40.0])}
    tree = draw(exact, new, 2000, seed=3)
    given = SHRINK * new["y"] + (1 - SHRINK) * tree.posterior.mu.values[..., None]
    residual = tree.posterior.z.values - given
    np.testing.assert_allclose(residual.mean((0, 1)), 0, atol=4 * ROW_SD / 2000**0.5)  # 4 standard errors
    assert tree.sample_stats.outside.values.tolist() == [
        False,
        False,
        True,
    ]  # 40 is beyond all that the fit has seen
    told = json.loads(tree.attrs["provenance"])
    assert told["data"]["sizes"] == {"row": 3}
    assert told["fit_data"]["sizes"] == {"row": N}


def test_several_fits_are_chains(exact):
    other = fit(exact.template, LABELLED, replace(QUICK, seed=1, steps=3), progress=False)
    tree = draw([exact, other], LABELLED, 6, seed=0)
    assert tree.posterior.z.dims == ("chain", "draw", "row")
    assert tree.posterior.sizes["chain"] == 2
    assert not np.array_equal(tree.posterior.z[0], tree.posterior.z[1])
    assert tree.history.objective.shape == (2, 3)
    assert bool(np.isnan(tree.history.objective[0, 2]))
    assert tree.sample_stats.lp.shape == (2, 6)
    xr.testing.assert_equal(tree.posterior.z[0], draw(exact, LABELLED, 6, seed=0).posterior.z[0])
    with pytest.raises(Unsupported, match="needs at least one fit"):
        draw([], LABELLED)


def test_a_guide_with_a_factor_per_row_knows_nothing_of_others():
    table = replace(hierarchy(), guide=None, nets=None)
    done = fit(table, DATA, QUICK, progress=False)
    assert draw(done, DATA, 5).posterior.z.shape == (1, 5, N)
    with pytest.raises(Unsupported, match="one factor for each row of the fit and knows nothing of others"):
        draw(done, {"y": DATA["y"] + 1e-9}, 5)


def test_a_missing_entry_is_forecast_from_the_population():
    holed = {"y": DATA["y"].copy()}
    holed["y"][[2, 7]] = np.nan
    done = exact_fit(holed)
    assert float(done.seen["y.max"]) == pytest.approx(np.nanmax(holed["y"]))
    tree = predict(done, holed, 3000, seed=5)
    assert np.isnan(tree.observed_data.y.values[[2, 7]]).all()
    z, y = tree.posterior.z.values[0], tree.posterior_predictive.y.values[0]
    np.testing.assert_allclose((y - z).mean(0), 0, atol=4 * NOISE / 3000**0.5)  # 4 standard errors
    np.testing.assert_allclose((y - z).std(0), NOISE, rtol=4 / 6000**0.5)
    assert not tree.log_likelihood.y.values[..., 2].any()
    weight = tree.sample_stats.row_log_weight.values[0]
    mu = tree.posterior.mu.values[0]  # the guide knows no gaps: it takes y at its feasible value, 0
    place, width = (1 - SHRINK) * mu, ROW_SD
    truth = stats.norm(mu, SPREAD).logpdf(z[:, 2]) - stats.norm(place, width).logpdf(z[:, 2])
    np.testing.assert_allclose(weight[:, 2], truth, atol=1e-4)  # float32 of EXACT, at z up to 4 sd


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_a_written_tree_is_read_back(exact, tmp_path, ending):
    path = tmp_path / "made" / f"draws.{ending}"
    tree = predict(exact, LABELLED, 5, seed=0, to=path)
    with xr.open_datatree(path, engine="h5netcdf" if ending == "nc" else "zarr") as found:
        assert sorted(found.groups) == sorted(tree.groups)
        for group in tree.groups[1:]:
            xr.testing.assert_equal(found[group].to_dataset(), tree[group].to_dataset())
        assert found.attrs["provenance"] == tree.attrs["provenance"]
        assert found["posterior"].z.attrs["units"] == "mag"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rows_written_as_they_come_are_those_held_in_memory(exact, tmp_path, monkeypatch):
    monkeypatch.setattr("scivi.inference.gather.AT_ONCE", 40)  # four rows at a time
    held = predict(exact, LABELLED, 10, seed=2)
    path = tmp_path / "draws.zarr"
    for _ in range(2):  # the second replaces the first
        written = predict(exact, LABELLED, 10, seed=2, to=path)
        for group in held.groups[1:]:
            xr.testing.assert_identical(written[group].to_dataset().load(), held[group].to_dataset())
    assert [p.name for p in tmp_path.iterdir()] == ["draws.zarr"]


@pytest.mark.parametrize("ending", [None, "nc", "zarr"])
def test_the_verdict_is_written_on_the_posterior(exact, tmp_path, ending):
    to = ending and tmp_path / f"draws.{ending}"
    good = predict(exact, LABELLED, 400, to=to)
    assert good.attrs["verdict"] == "trust with care"  # exact, but after two steps no one can tell
    told = {key: good.attrs[key] for key in ("verdict", "why", "advice")}
    assert told == report(good).attrs  # no more rows than are examined either way
    if to:
        with xr.open_datatree(to, engine="h5netcdf" if ending == "nc" else "zarr") as read:
            assert {key: read.attrs[key] for key in told} == told
    assert draw(exact, LABELLED, 10).attrs["verdict"] == "not judged"


def test_predictions_of_a_posterior_that_is_far_off_come_with_a_warning():
    bad = exact_fit(coefficients=(*EXACT[:2], 1.8, float(np.log(0.25))))
    with pytest.warns(TrustWarning, match="do not trust these predictions: .* have a k-hat above 0.7"):
        assert predict(bad, LABELLED, 400).attrs["verdict"] == "do not trust"


def test_a_drawing_that_fails_leaves_nothing_behind(exact, tmp_path, monkeypatch):
    monkeypatch.setattr("scivi.inference.gather.AT_ONCE", 40)
    real, calls = draws_module.reported, []

    def fails_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(draws_module, "reported", fails_later)
    with pytest.raises(MemoryError):
        draw(exact, LABELLED, 10, to=tmp_path / "draws.zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("progress", [True, False])
def test_what_takes_long_shows_a_bar_over_the_rows(exact, monkeypatch, capsys, progress):
    monkeypatch.setattr(draws_module, "SILENT_S", 0.0)
    monkeypatch.setattr(draws_module, "rows_at_once", lambda *_: 4)
    draw(exact, LABELLED, 10, progress=progress)
    assert ("15/15" in capsys.readouterr().err) is progress


def test_a_given_number_has_no_axis_in_the_model_nor_in_the_result():
    def model(batch, prior, nets):
        assert batch.spread.shape == ()
        mu = pyro.sample("mu", dist.Normal(0.0, batch.spread))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(mu, 1.0))

    fields = {"y": Field(("row",), "observed"), "spread": Field(())}
    template = Template(name="number", fields=fields, rows="row", model=model, dims={"mu": ()})
    table = LABELLED.assign(spread=2.0)
    tree = draw(fit(template, table, QUICK, progress=False), table, 3)
    assert tree.constant_data.spread.dims == ()
    assert float(tree.constant_data.spread) == 2.0


@pytest.mark.slow
def test_refining_mends_rows_that_the_guide_serves_badly_and_measures_the_gap():
    shift, log_sd = 1.8, float(np.log(0.25))
    bad = exact_fit(coefficients=(*EXACT[:2], shift, log_sd))
    before, after = (draw(bad, LABELLED, 500, seed=2, refine=r).sample_stats for r in (False, True))
    assert before.poor.all()
    truth = (
        0.5 * ((np.exp(2 * log_sd) + shift**2) / ROW_SD**2 - 1) - log_sd + np.log(ROW_SD)
    )  # KL of two normals
    np.testing.assert_allclose(
        after.amortisation_gap, truth, rtol=0.05
    )  # 32 low-discrepancy points for E x**2

    def share(weight):
        weight = weight.values[0]
        normal = np.exp(weight - weight.max(0))
        normal = normal / normal.sum(0)
        return 1 / (normal**2).sum(0) / len(weight)

    # given the globals a refined row is exact but for the error of its fit
    assert share(before.row_log_weight).max() < 0.2 < 0.5 < share(after.row_log_weight).min()
    tree = draw(bad, LABELLED, 500, seed=2, refine=True)
    residual = tree.posterior.z - (SHRINK * tree.observed_data.y + (1 - SHRINK) * tree.posterior.mu)
    np.testing.assert_allclose(
        residual.mean(("chain", "draw")), 0, atol=5 * ROW_SD / 500**0.5 + 0.02
    )  # and fit error
    np.testing.assert_allclose(residual.std(("chain", "draw")), ROW_SD, rtol=4 / 1000**0.5 + 0.03)
    between = np.corrcoef(residual.values[0].T) - np.eye(N)
    assert (
        abs(between).max() < 5 / 500**0.5
    )  # rows are drawn each on its own: 5 standard errors for 105 pairs


def test_a_single_draw_of_rows_outside_is_refined_too(exact):
    far = LABELLED.assign(y=LABELLED.y + 100)
    tree = draw(exact, far, 1, seed=2, refine=True)
    assert tree.sample_stats.outside.all()
    assert np.isfinite(tree.sample_stats.amortisation_gap).all()
    residual = tree.posterior.z - (SHRINK * far.y + (1 - SHRINK) * tree.posterior.mu)
    assert abs(residual).max() < 5 * ROW_SD  # of 15 normal numbers


def test_lp_less_log_q_of_refined_rows_is_their_weight():
    bad = exact_fit(coefficients=(*EXACT[:2], 1.8, float(np.log(0.25))))
    stats_of = draw(bad, LABELLED, 200, seed=2, refine=True).sample_stats
    evidence = float(log_evidence(torch.as_tensor(DATA["y"]), SPREAD))
    np.testing.assert_allclose(
        (stats_of.lp - stats_of.log_q).mean(), evidence, atol=0.1
    )  # nats: 15 rows, .005 each


def test_rows_that_need_no_refining_have_no_gap(exact):
    stats_of = draw(exact, LABELLED, 100, seed=0, refine=True).sample_stats
    assert np.isnan(stats_of.amortisation_gap).all()


# Two components: every row's responsibilities given their places have a closed form
WEIGHTS, PLACES, WIDTH = np.array([0.35, 0.65]), np.array([-0.5, 1.2]), 0.8


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_sd = nn.Parameter(torch.tensor(PLACES)), nn.Parameter(torch.tensor([-2.0, -2.0]))


def mixture_model(batch, prior, nets):
    places = pyro.sample("places", dist.Normal(torch.zeros(2).to(batch.y), 3.0).to_event(1))
    with batch.plate("row"):
        which = pyro.sample("which", dist.Categorical(torch.as_tensor(WEIGHTS).to(batch.y)))
        batch.observe("y", dist.Normal(Vindex(places)[..., which], WIDTH))


def places_guide(batch, prior, nets):
    pyro.sample("places", dist.Normal(nets.loc, nets.log_sd.exp()).to_event(1))


mixture = Template(
    name="mixture",
    fields={"y": Field(("row",), "observed")},
    rows="row",
    model=mixture_model,
    guide=places_guide,
    nets=lambda sizes, prior: Places(),
    dims={"places": ("component",), "which": ("row",)},
    sizes={"component": 2},
)


def mixture_terms(places: np.ndarray) -> np.ndarray:
    """log weight + log density of each component, (draw, row, component)."""
    return np.log(WEIGHTS) + stats.norm(places[:, None], WIDTH).logpdf(DATA["y"][:, None])


def test_discrete_latents_that_were_summed_are_drawn_by_their_responsibilities():
    done = fit(mixture, DATA, replace(QUICK, estimator="enumerate"), progress=False)
    tree = draw(done, DATA, 4000, seed=0)
    terms = mixture_terms(tree.posterior.places.values[0])
    responsibility = np.exp(terms[..., 1] - np.logaddexp(terms[..., 0], terms[..., 1]))
    error = (responsibility * (1 - responsibility)).mean(0) ** 0.5 / 4000**0.5
    which = tree.posterior.which.values[0]
    assert (abs(which.mean(0) - responsibility.mean(0)) < 4 * error).all()  # 4 standard errors
    assert tree.posterior.which.dims == ("chain", "draw", "row")


def test_weights_of_summed_latents_are_those_of_the_sum():
    done = fit(mixture, DATA, replace(QUICK, estimator="enumerate"), progress=False)
    tree = draw(done, DATA, 30, seed=0)
    places = tree.posterior.places.values[0]
    marginal = np.logaddexp(*np.moveaxis(mixture_terms(places), -1, 0)).sum(1)
    prior = stats.norm(0, 3).logpdf(places).sum(1)
    guide = stats.norm(PLACES, np.exp(-2.0)).logpdf(places).sum(1)
    found = (tree.sample_stats.lp - tree.sample_stats.log_q).values[0]
    np.testing.assert_allclose(
        found, marginal + prior - guide, atol=1e-5
    )  # float32 rounding of two training steps
    rows_of = np.logaddexp(*np.moveaxis(mixture_terms(places), -1, 0))
    np.testing.assert_allclose(tree.sample_stats.row_log_weight.values[0], rows_of, atol=1e-5)


def banded_model(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_zeros(3), 1.0).to_event(1))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu, 1.0).to_event(1))


@pytest.mark.parametrize(
    "labels", [["soft", "medium", "hard"], np.array(["2020-01-01", "2020-01-02", "2020-01-05"], "M8[ns]")]
)
def test_labels_survive_saving_and_must_be_those_of_the_fit(labels, tmp_path):
    banded = Template(
        name="banded",
        fields={"y": Field(("row", "band"), "observed")},
        rows="row",
        model=banded_model,
        dims={"mu": ("band",)},
    )
    data = xr.Dataset({"y": (("row", "band"), np.zeros((4, 3)))}, {"band": labels})
    again = load(save(fit(banded, data, QUICK, progress=False), tmp_path), banded)
    np.testing.assert_array_equal(draw(again, data, 3).posterior.band, labels)
    with pytest.raises(DataError, match=r"other labels than those of the fit; .*\n  - .band.: \["):
        draw(again, data.isel(band=[2, 1, 0]), 3)


def test_dims_that_do_not_fit_are_told_when_drawing():
    def model(batch, prior, nets):
        mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), 1.0))
        pyro.deterministic("pair", torch.stack([mu, mu]).reshape(-1))  # does not take leading dims
        with batch.plate("row"):
            batch.observe("y", dist.Normal(mu, 1.0))

    dims, sizes = {"mu": (), "pair": ("two", "three")}, {"two": 2, "three": 3}
    bad = replace(conjugate.shared, model=model, guide=None, nets=None, dims=dims, sizes=sizes)
    with pytest.raises(TemplateError, match='site "pair"'):
        draw(fit(bad, DATA, QUICK, progress=False), DATA, 4)


def test_a_simulation_without_a_maker_runs_the_model_forward():
    table, truth = simulate(hierarchy(), {"row": 5000}, seed=2)
    again, _ = simulate(hierarchy(), {"row": 5000}, seed=2)
    xr.testing.assert_equal(table, again)
    assert table.y.dims == ("row",)
    assert float((table.y - truth.z).std()) == pytest.approx(NOISE, rel=4 / 10_000**0.5)  # 4 standard errors
    assert float((truth.z - truth.mu).std()) == pytest.approx(SPREAD, rel=4 / 10_000**0.5)
    with pytest.raises(TemplateError, match=r"simulate needs the size of \['row'\]"):
        simulate(hierarchy(), {})


def test_a_simulation_with_given_fields_takes_them_from_a_table():
    template = replace(
        conjugate.shared,
        fields={"y": Field(("row",), "observed"), "sd": Field(("row",))},
        model=lambda batch, prior, nets: _known_sd(batch),
    )
    like = pd.DataFrame({"y": np.zeros(6), "sd": [1e-6, 1e-6, 1e-6, 1e6, 1e6, 1e6]})
    table, truth = simulate(template, {}, seed=0, like=like)
    np.testing.assert_allclose(table.sd, like.sd)
    residual = abs(table.y - truth.mu).values
    assert residual[:3].max() < 1e-4 < 1e3 < residual[3:].min()


def _known_sd(batch):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), 1.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu, batch.sd))


def with_residual(counted: list[int]) -> Template:
    """The hierarchy that also reports rows less their places, and a shift of mu by two bands."""

    def derive(batch, prior, nets, values):
        counted.append(1)
        shift = torch.tensor([0.0, 1.0]).to(batch.y)
        return {"residual": batch.y - values["z"], "shifted": values["mu"] + shift}

    dims = {"mu": (), "z": ("row",), "residual": ("row",), "shifted": ("band",)}
    return replace(hierarchy(), derive=derive, dims=dims, sizes={"band": 2}, units={"residual": "mag"})


@pytest.mark.parametrize("ending", [None, "zarr"])
def test_derived_values_are_reported_beside_the_sites(tmp_path, monkeypatch, ending):
    done = fit(with_residual([]), LABELLED, QUICK, progress=False)
    monkeypatch.setattr("scivi.inference.gather.AT_ONCE", 40)  # four rows at a time
    tree = predict(done, LABELLED, 10, seed=2, to=tmp_path / f"draws.{ending}" if ending else None)
    posterior = tree.posterior
    assert posterior.residual.dims == ("chain", "draw", "row")
    assert posterior.residual["row"].values.tolist() == [f"star {k}" for k in range(N)]
    assert posterior.residual.attrs["units"] == "mag"
    # in float64, what was drawn and what was derived of it are of the same draw
    np.testing.assert_allclose(posterior.residual, DATA["y"] - posterior.z, rtol=0, atol=1e-12)
    assert posterior.shifted.dims == ("chain", "draw", "band")
    np.testing.assert_allclose(posterior.shifted, posterior.mu.values[..., None] + [0.0, 1.0], atol=1e-12)
    assert set(tree.prior.data_vars) == {"mu"}  # what is derived is derived of a posterior
    _, truth = simulate(with_residual([]), {"row": 5})
    assert set(truth.data_vars) == {"mu", "z"}


def test_a_template_that_derives_draws_what_it_would_without():
    one, two = (fit(t, LABELLED, QUICK, progress=False) for t in (with_residual([]), hierarchy()))
    one, two = (draw(f, LABELLED, 5, seed=2) for f in (one, two))
    for group in ("sample_stats", "log_likelihood"):
        xr.testing.assert_equal(one[group].to_dataset(), two[group].to_dataset())
    xr.testing.assert_equal(one.posterior.to_dataset()[["mu", "z"]], two.posterior.to_dataset())


def test_nothing_is_derived_while_fitting():
    """Once, on the example, when the template is bound; then once for each chunk that is drawn."""
    counted, calls = [], []
    for steps in (2, 30):
        done = fit(with_residual(counted), LABELLED, replace(QUICK, steps=steps), progress=False)
        calls.append(len(counted))
        counted.clear()
    assert calls == [1, 1]
    draw(done, LABELLED, 5)
    assert len(counted) == 1


def test_a_name_that_is_neither_site_nor_derived_is_told():
    template = replace(with_residual([]), dims={"mu": (), "z": ("row",), "excess": ("row",)}, units={})
    with pytest.raises(TemplateError, match='dims lists "excess", but the model has no such site'):
        fit(template, LABELLED, QUICK, progress=False)


def test_a_derived_value_of_another_shape_is_told():
    template = replace(
        with_residual([]), derive=lambda batch, prior, nets, values: {"residual": values["z"][..., :3]},
        dims={"mu": (), "z": ("row",), "residual": ("row",)},
    )  # fmt: skip
    done = fit(template, LABELLED, QUICK, progress=False)
    with pytest.raises(TemplateError, match=r'site "residual" has shape \(4, 3\) over 4 draws, which is not'):
        draw(done, LABELLED, 4)


def two_plates_model(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), PRIOR))
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(mu, SPREAD))
        batch.observe("y", dist.Normal(z, NOISE))
    with batch.plate("other"):
        w = pyro.sample("w", dist.Normal(mu, SPREAD))
        batch.observe("v", dist.Normal(w.unsqueeze(-1) + batch.v.new_zeros(2), NOISE).to_event(1))


def two_plates_guide(batch, prior, nets):
    """Given mu the rows' factors are exact."""
    mu = nets.globals(batch)["mu"]
    with batch.plate("row"):
        pyro.sample("z", dist.Normal(SHRINK * batch.y + (1 - SHRINK) * mu, ROW_SD))
    with batch.plate("other"):
        precision = 1 / SPREAD**2 + 2 / NOISE**2
        mean = (mu / SPREAD**2 + batch.v.sum(-1) / NOISE**2) / precision
        pyro.sample("w", dist.Normal(mean, precision**-0.5))


TWO_PLATES = Template(
    name="two plates",
    fields={"y": Field(("row",), "observed"), "v": Field(("other", "pair"), "observed")},
    rows=("row", "other"),
    model=two_plates_model,
    guide=two_plates_guide,
    nets=lambda sizes, prior: conjugate.Amortised(*EXACT),
    dims={"mu": (), "z": ("row",)},
)


@pytest.mark.parametrize("at_once", [2**20, 40, 10])
def test_rows_along_a_second_dim_are_walked_in_chunks_of_their_own(at_once, monkeypatch):
    """lp less log_q is log p(mu) p(y, v | mu) / q(mu), with z and w integrated in closed form."""
    rng = np.random.default_rng(0)
    y, v = DATA["y"], 0.7 + rng.normal(size=(23, 2))
    data = {"y": (("row",), y), "v": (("other", "pair"), v)}
    done = fit(TWO_PLATES, data, QUICK, progress=False)
    monkeypatch.setattr("scivi.inference.gather.AT_ONCE", at_once)  # all, four or one at a time
    tree = predict(done, data, 10, seed=2)
    mu, nets = tree.posterior.mu.values[0], done.bound.nets.own
    guide = stats.norm(float(nets.globals.loc), float(nets.globals.log_diag.exp())).logpdf(mu)
    of_rows = stats.norm(mu[:, None], (SPREAD**2 + NOISE**2) ** 0.5).logpdf(y).sum(1)
    together = NOISE**2 * np.eye(2) + SPREAD**2
    of_others = np.array([stats.multivariate_normal([m, m], together).logpdf(v).sum() for m in mu])
    truth = stats.norm(0, PRIOR).logpdf(mu) + of_rows + of_others - guide
    found = tree.sample_stats.lp - tree.sample_stats.log_q
    np.testing.assert_allclose(found.values[0], truth, rtol=1e-9)
    assert set(tree.posterior.data_vars) == {"mu", "z"}
    assert list(tree.log_likelihood.data_vars) == list(tree.posterior_predictive.data_vars) == ["y"]
    assert list(tree.observed_data.data_vars) == ["y"]
    assert "other" not in tree.posterior.dims


def test_draws_of_a_second_dim_follow_the_seed_and_the_globals_of_the_first(monkeypatch):
    data = {"y": (("row",), DATA["y"]), "v": (("other", "pair"), np.zeros((23, 2)))}
    done = fit(TWO_PLATES, data, QUICK, progress=False)
    monkeypatch.setattr("scivi.inference.gather.AT_ONCE", 40)
    one, two, other = (draw(done, data, 10, seed=s) for s in (2, 2, 3))
    xr.testing.assert_equal(one.sample_stats.to_dataset(), two.sample_stats.to_dataset())
    assert not np.array_equal(one.sample_stats.lp, other.sample_stats.lp)


def test_rows_with_many_entries_are_taken_fewer_at_a_time(monkeypatch):
    data = {"y": (("row",), DATA["y"]), "v": (("other", "pair"), np.zeros((23, 2)))}
    bound = fit(TWO_PLATES, data, QUICK, progress=False).bound
    monkeypatch.setattr("scivi.inference.gather.ENTRIES_AT_ONCE", 100)
    assert (rows_at_once(bound, "row", 10), rows_at_once(bound, "other", 10)) == (10, 5)
    assert rows_at_once(bound, "other", 1000) == 1
