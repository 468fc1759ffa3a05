from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from scipy.spatial import KDTree
from scipy.stats import ks_2samp, mannwhitneyu, permutation_test, rankdata

from scivi.analysis import conformal, drift, two_samples
from scivi.analysis.fit_rules import drifted
from scivi.analysis.plots import plot_drift
from scivi.errors import DataError

NAMES = ["n_on[soft]", "n_on[hard]", "exposure", "spectrum: direction 1"]


def rows(n: int, rng: np.random.Generator) -> np.ndarray:
    """Counts, counts that follow them, a smooth number and a rare one, (row, feature)."""
    soft = rng.poisson(5 * rng.gamma(2.0, 0.5, n))
    return np.stack([soft, rng.poisson(soft + 1), rng.lognormal(0, 1, n), rng.random(n) < 0.03], 1).astype(
        "f4"
    )


def tree(new: np.ndarray, known: np.ndarray, names: list[str] = NAMES, area: float = 0.25) -> xr.DataTree:
    """What draws carry of new rows and of the fit's."""
    found = xr.Dataset(
        {
            "feature_values": (("source", "feature"), new),
            "fit_values": (("fit_row", "feature"), known),
            "constant_values": ("constant", [area]),
            "fit_constants": ("constant", [0.25]),
        },
        {"feature": names, "constant": ["area"], "source": [f"s{k}" for k in range(len(new))]},
    )
    return xr.DataTree.from_dict({"features": found})


def pair(n: int = 300, known: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rows(n, rng), rows(known, rng)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "known"), [(40, 80), (3, 50)])
def test_false_alarms_are_as_many_as_alpha_says(n, known):
    at_most, repeats = [], 300
    for seed in range(repeats):
        found = drift(tree(*pair(n, known, seed)), alpha=0.1, seed=seed)
        assert found.attrs["drifted"] == (found.attrs["p_value"] <= 0.1)
        at_most.append(found.attrs["p_value"] <= 0.1)
    # exact by exchangeability but for ties, which make it less; binomial sd (.1 x .9 / 300)^.5 = .017
    assert 0.1 - 3 * 0.017 < np.mean(at_most) < 0.1 + 3 * 0.017


def test_distances_over_all_divisions_are_those_of_scipy():
    new, known = pair(30, 50)
    new[:5, 0] = np.nan  # missing entries do not count
    members, values = two_samples.memberships(30, 80, 0), np.concatenate([new, known])
    for column in values.T:
        distance, size = two_samples.ks_distances(column, members)
        there = np.isfinite(column)
        for k in range(0, 1000, 100):
            mine = members[:, k].astype(bool)
            theirs = ks_2samp(column[mine & there], column[~mine & there])
            np.testing.assert_allclose(distance[k], theirs.statistic, rtol=1e-12)
            assert size[k] == (mine & there).sum() * (~mine & there).sum() / there.sum()


def test_a_p_value_by_permutation_is_that_of_scipy():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.45, 1, 40), rng.normal(0, 1, 60)
    distance, _ = two_samples.ks_distances(np.r_[a, b], two_samples.memberships(40, 100, 0))
    ours = (1 + (distance[1:] >= distance[0] - 1e-12).sum()) / 1000
    theirs = permutation_test(
        (a, b), lambda x, y: ks_2samp(x, y, method="asymp").statistic, n_resamples=999,
        alternative="greater", vectorized=False, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert 0.01 < theirs.pvalue < 0.5
    # each is a binomial share of 999 divisions
    error = (2 * theirs.pvalue * (1 - theirs.pvalue) / 999) ** 0.5
    np.testing.assert_allclose(ours, theirs.pvalue, atol=4 * error)


def test_the_change_of_ranks_is_the_z_of_mann_and_whitney():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1, 60), rng.normal(0, 1, 90)
    of = two_samples.memberships(60, 150, 0).T.astype(np.float32)
    change = two_samples.changes(rankdata(np.r_[a, b])[:, None].astype(np.float32), of)[0, 0]
    u = mannwhitneyu(a, b, method="asymptotic", use_continuity=False).statistic
    z = abs(u - 60 * 90 / 2) / (60 * 90 * 151 / 12) ** 0.5
    np.testing.assert_allclose(change, z, rtol=1e-4)  # sums of 60 ranks in float32


def test_neighbours_are_those_of_a_tree():
    places = np.random.default_rng(0).normal(size=(300, 3))
    near, far = two_samples.neighbours(places)
    distance, index = KDTree(places).query(places, 11)
    np.testing.assert_array_equal(np.sort(near, 1), np.sort(index[:, 1:], 1))
    np.testing.assert_allclose(far, distance[:, -1], atol=1e-5)  # rounded to that


def test_shifted_fields_are_named_with_their_numbers():
    new, known = pair()
    new[:, 2] *= 3
    found = drift(tree(new, known))
    assert found.attrs["drifted"] is True
    assert list(found["variable"].values) == [*NAMES, *two_samples.JOINT, "area"]
    assert list(found["ok"].values[[0, 1, 2, 3, 7]]) == [True, True, False, True, True]
    one = found.sel(variable="exposure")
    np.testing.assert_allclose(float(one["ks"]), ks_2samp(new[:, 2], known[:, 2]).statistic, rtol=1e-12)
    low, middle, high = np.quantile(known[:, 2], [0.158655, 0.5, 0.841345])
    shift = (np.median(new[:, 2]) - middle) / ((high - low) / 2)
    np.testing.assert_allclose(float(one["shift_sd"]), shift, rtol=1e-6)
    assert float(one["p_value"]) == 0.001
    assert bool(one["matters"])


def test_a_change_of_dependence_alone_is_seen_and_its_features_named():
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(900, 1))
    all_rows = (rng.normal(size=(900, 4)) + shared) / 2**0.5  # correlations of a half
    all_rows[:300, 1] = rng.normal(size=300)  # of one feature, gone in the new rows
    found = drift(tree(all_rows[:300], all_rows[300:]))
    assert list(found["ok"].values[:5]) == [True] * 4 + [False]
    assert found["variable"].values[4] == "dependence"
    assert "n_on[hard]" in found.attrs["dependence_of"]


def test_a_rare_word_that_became_common_is_heard():
    new, known = pair()
    new[:60, 3] = 1
    assert not bool(drift(tree(new, known)).sel(variable=NAMES[3])["ok"])


def test_a_certain_but_small_difference_is_told_and_does_not_matter():
    rng = np.random.default_rng(0)
    new, known = rng.normal(0.18, 1, (2000, 1)), rng.normal(0, 1, (2000, 1))
    found = drift(tree(new, known, ["t"]))
    assert found.attrs["drifted"] is True
    one = found.sel(variable="t")
    assert not bool(one["ok"])
    assert not bool(one["matters"])  # .18 sd is a distance of .07


def test_absent_entries_and_changed_constants_are_faults():
    new, known = pair(100, 200)
    absent = new.copy()
    absent[:, 1] = np.inf
    found = drift(tree(absent, known))
    assert found.attrs["drifted"] is True
    assert found.attrs["p_value"] > 0.05
    assert not bool(found.sel(variable="n_on[hard]")["present"])
    found = drift(tree(new, known, area=0.5))
    assert found.attrs["drifted"] is True
    assert not bool(found.sel(variable="area")["ok"])
    assert bool(found["ok"].values[:-1].all())


def test_directions_of_rows_with_other_entries_are_left_out():
    new, known = pair(100, 200)
    new[:, 3] = np.inf
    found = drift(tree(new, known))
    assert found.attrs["drifted"] is False
    assert NAMES[3] not in found["variable"].values


def test_entries_that_went_missing_are_no_fault_by_themselves():
    new, known = pair(1, 200, 1)
    known[:50, 0] = np.nan
    new[:, 0] = np.nan
    found = drift(tree(new, known))
    assert found.attrs["drifted"] is False
    assert list(found["n"].values[:2]) == [0, 1]
    assert list(found["missing_reference"].values[:2]) == [0.25, 0.0]


def test_row_p_values_are_uniform_for_rows_of_the_same_kind():
    rng, p_value = np.random.default_rng(0), []
    for _ in range(800):
        every = np.exp(2 * rng.standard_normal((41, 3)))  # of heavy tails
        p_value.append(conformal.row_p_values(every[:1], every[1:])[0][0])
    for level in (0.1, 0.25, 0.5):
        error = (level * (1 - level) / 800) ** 0.5
        exact = np.floor(level * 41 + 1e-9) / 41  # p-values are multiples of 1 / 41
        np.testing.assert_allclose(np.mean(np.array(p_value) <= level + 1e-9), exact, atol=3.5 * error)


def test_a_row_p_value_is_the_rank_among_scores_worked_out_one_by_one():
    rng = np.random.default_rng(2)
    known, new = rng.normal(size=(60, 2)), rng.normal(1.5, 1, (5, 2))
    found, score = conformal.row_p_values(new, known)
    places, mine = two_samples.scaled(known, known), two_samples.scaled(new, known)
    for k in range(5):
        every = np.vstack([places, mine[k]])
        tenth = np.sort(KDTree(every).query(every, 11)[0], 1)[:, -1]
        np.testing.assert_allclose(score[k], tenth[-1], atol=1e-5)
        assert found[k] == (tenth >= tenth[-1] - 1e-9).sum() / 61


def test_strange_rows_are_flagged_and_their_features_named():
    new, known = pair(50, 1500, 1)
    new[7, 2], new[9, 0] = 500.0, 300.0
    found = drift(tree(new, known))
    assert set(found["source"].values[~found["row_ok"].values]) == {"s7", "s9"}
    assert found["row_feature"].sel(source="s7") == "exposure"
    assert found["row_feature"].sel(source="s9") == "n_on[soft]"
    assert float(found["row_shift_sd"].sel(source="s7")) > 50


def test_flagged_rows_are_those_of_benjamini_and_hochberg():
    # the example of their paper, table 1 and section 4.1: four hypotheses at .05
    p_value = [
        0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
        0.6528, 0.7590, 1.0,
    ]  # fmt: skip
    order = np.random.default_rng(0).permutation(15)
    found = conformal.discoveries(np.array(p_value)[order], 0.05)
    assert set(order[found]) == {0, 1, 2, 3}


def test_one_row_has_its_own_p_value():
    new, known = pair(1, 200)
    usual, strange = drift(tree(new, known)), drift(tree(new * 0 + 1e4, known))
    assert usual.attrs["note"].startswith("1 new rows show only large shifts")
    assert bool(usual["row_ok"].all())
    assert float(strange["row_p_value"][0]) == 1 / 201
    assert not bool(strange["row_ok"].any())


def test_many_rows_are_read_some_at_a_time(monkeypatch):
    new, known = pair(300, 200)
    once = drift(tree(new, known))
    module = __import__("scivi.analysis.drift", fromlist=["drift"])
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 64)
    monkeypatch.setattr(two_samples, "_BLOCK", 2000)
    xr.testing.assert_allclose(once, drift(tree(new, known)))
    monkeypatch.setattr(module, "MOST_ROWS", 100)
    some = drift(tree(new, known))
    assert (some.attrs["n"], some.attrs["n_reference"], some.sizes["source"]) == (100, 100, 300)


def test_other_data_can_stand_for_those_of_the_fit():
    new, known = pair()
    other, _ = pair(seed=1)
    other[:, 2] *= 3
    new[:, 2] *= 3
    assert drift(tree(new, known), tree(other, known)).attrs["drifted"] is False
    assert drift(tree(new, known), tree(known, known)).attrs["drifted"] is True
    of_another_fit = drift(tree(new, known), tree(other, known[::-1]))
    assert NAMES[3] not in of_another_fit["variable"].values
    with pytest.raises(DataError, match="no feature in common"):
        drift(tree(new, known), tree(other, known, list("abcd")))


def test_trees_without_features_are_refused():
    with pytest.raises(DataError, match="the tree has no features of the fit's rows"):
        drift(xr.DataTree())
    new, known = pair(5, 50)
    with pytest.raises(DataError, match="the reference has no features"):
        drift(tree(new, known), xr.DataTree())
    with pytest.raises(DataError, match="the tree has no rows"):
        drift(tree(new[:0], known))


def test_what_was_found_can_be_written_and_drawn(tmp_path):
    new, known = pair()
    found = drift(tree(new * 2, known))
    before = dict(mpl.rcParams)
    figure = Figure()
    assert list(plot_drift(found, ax=figure)) == figure.axes
    figure.canvas.draw()
    assert dict(mpl.rcParams) == before
    assert all(ax.get_xlabel() for ax in figure.axes)
    with pytest.raises(DataError, match="ax is 1 Axes: this drawing has 2 panels"):
        plot_drift(found, ax=Figure().subplots())
    found.attrs["drifted"] = int(found.attrs["drifted"])  # netCDF has no word for true
    found.to_netcdf(tmp_path / "drift.nc", engine="h5netcdf")
    again = xr.load_dataset(tmp_path / "drift.nc", engine="h5netcdf")
    np.testing.assert_array_equal(again["ok"].values, found["ok"].values)


def test_the_report_asks_for_care_where_a_difference_matters():
    new, known = pair()
    [usual] = drifted(drift(tree(new, known)))
    new[:, 2] *= 3
    [other] = drifted(drift(tree(new, known)))
    assert usual.ok
    assert (other.ok, other.counts) == (False, "care")
    assert "exposure (+" in other.sentence
    assert "Fit again" in other.advice
