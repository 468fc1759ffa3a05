from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from scipy.stats import cauchy, expon, norm

from scivi.analysis import groups, loo, report

FINISH = {
    "method": "importance sampling",
    "draws": 800,
    "log_weight": (0.8 * norm.ppf((np.arange(800) + 0.5) / 800)).tolist(),
}
HEAVY = (2.0 * expon.ppf((np.arange(800) + 0.5) / 800)).tolist()  # weights of a Pareto law with k = 2


def why(found: xr.Dataset) -> str:
    return " ".join(json.loads(found.attrs["why"]))


def failed(found: xr.Dataset) -> set[str]:
    return set(found["check"].values[~found["ok"].values])


def test_exact_guide_is_trusted_and_says_why(catalogue):
    found = report(catalogue(rows=40))
    assert found.attrs["verdict"] == "trust"
    assert "k-hat 0.00" in why(found)
    assert json.loads(found.attrs["advice"]) == []
    assert set(found.data_vars) == {"value", "threshold", "ok", "counts", "sentence", "advice"}


@pytest.mark.parametrize(("rows", "finish"), [(8, None), (600, FINISH)])
def test_narrow_guide_is_not_trusted(catalogue, rows, finish):
    found = report(catalogue(rows=rows, scale=0.4, finish=finish))
    assert found.attrs["verdict"] == "do not trust"
    assert ("k-hat" if rows == 8 else "rows with poor weights") in failed(found)
    assert "richer guide" in found.attrs["advice"]


def test_shifted_guide_is_not_simply_trusted(catalogue):
    assert report(catalogue(rows=8, shift=0.5)).attrs["verdict"] != "trust"


def test_many_good_rows_need_a_check_of_the_population(catalogue):
    tree = catalogue(rows=600, scale=0.85)
    found = report(tree)
    assert found.attrs["verdict"] == "trust with care"
    assert failed(found) == {"population"}
    assert "Nothing vouches for the population variables (mu)" in why(found)
    assert report(catalogue(rows=600, scale=0.85, finish=FINISH)).attrs["verdict"] == "trust"


@pytest.mark.parametrize(
    ("change", "verdict", "check"),
    [
        ({"log_weight": HEAVY}, "do not trust", "population k-hat"),
        ({"log_weight": FINISH["log_weight"][::10]}, "trust with care", "population size"),
        ({"method": "finish", "step_sd": 0.01}, "trust with care", "population"),
    ],
)
def test_how_the_population_was_finished_counts(catalogue, change, verdict, check):
    found = report(catalogue(rows=600, scale=0.85, finish=FINISH | change))
    assert found.attrs["verdict"] == verdict
    assert check in failed(found)


def test_nuts_on_the_same_rows_vouches_or_refutes(catalogue):
    nuts = catalogue(rows=200, draws=500, chains=4, method="nuts", seed=9, extra=False)
    assert report(catalogue(rows=200, scale=0.85), reference=nuts).attrs["verdict"] == "trust"
    biased = report(catalogue(rows=200, scale=0.85, global_shift=2.0), reference=nuts)
    assert biased.attrs["verdict"] == "do not trust"
    assert failed(biased) == {"NUTS"}


@pytest.mark.parametrize(
    ("drop", "verdict"), [(0.0, "trust"), (0.08, "trust with care"), (0.3, "do not trust")]
)
def test_unfinished_fit(catalogue, history, drop, verdict):
    tree = catalogue(rows=40)
    tree["history"] = history(drop=drop)
    assert report(tree).attrs["verdict"] == verdict


def test_diverged_and_nan(catalogue):
    tree = catalogue(rows=10)
    made = json.loads(tree.attrs["provenance"])
    made["fit"]["stopped"] = "diverged"
    tree.attrs["provenance"] = json.dumps(made)
    assert "The fit diverged." in why(report(tree))
    tree["posterior"]["mu"][0, 3] = np.nan
    found = report(tree)
    assert found.attrs["verdict"] == "do not trust"
    assert "finite draws" in failed(found)


def test_truth_counts(catalogue):
    truth = catalogue(rows=300, draws=2, seed=5)["posterior"].to_dataset().isel(chain=0, draw=0, drop=True)
    assert report(catalogue(rows=300), truth=truth).attrs["verdict"] == "trust"
    found = report(catalogue(rows=300, shift=0.9), truth=truth)
    assert found.attrs["verdict"] == "do not trust"
    assert "coverage" in failed(found)


def test_nuts_tree_is_judged_as_markov_chains(catalogue):
    tree = catalogue(rows=10, draws=500, chains=4, method="nuts")
    found = report(tree)
    assert found.attrs["verdict"] == "trust"
    assert {"R-hat", "effective size", "divergences"} <= set(found["check"].values)
    assert report(catalogue(rows=10, draws=500, method="nuts")).attrs["verdict"] == "trust with care"


def mean_field_eight_schools(draws: int = 4000) -> xr.DataTree:
    """Mean field on eight schools (Rubin 1981), non-centred, fitted here by reparametrised gradients."""
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    s = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    rng = np.random.default_rng(0)

    def log_p(v: np.ndarray) -> np.ndarray:
        mu, lt, z = v[..., 0], v[..., 1], v[..., 2:]
        tau = np.exp(lt)
        site = norm.logpdf(y, mu[..., None] + tau[..., None] * z, s) + norm.logpdf(z)
        return norm.logpdf(mu, 0, 5) + cauchy.logpdf(tau, 0, 5) + np.log(2) + lt + site.sum(-1)

    def slope(v: np.ndarray) -> np.ndarray:
        mu, tau, z = v[..., :1], np.exp(v[..., 1:2]), v[..., 2:]
        r = (y - mu - tau * z) / s**2
        curve = 2 * (tau / 5) ** 2 / (1 + (tau / 5) ** 2)
        down = 1 - curve + (r * tau * z).sum(-1, keepdims=True)
        return np.concatenate([-mu / 25 + r.sum(-1, keepdims=True), down, -z + r * tau], -1)

    at, first, second = np.zeros((2, 10)), np.zeros((2, 10)), np.zeros((2, 10))  # means and log sds; Adam
    for step in range(1, 3001):
        noise = rng.normal(size=(20, 10))
        gradient = slope(at[0] + np.exp(at[1]) * noise)
        both = np.stack([gradient.mean(0), (gradient * noise).mean(0) * np.exp(at[1]) + 1])
        first, second = 0.9 * first + 0.1 * both, 0.999 * second + 0.001 * both**2
        at += (
            0.02 * (1 - step / 3001) * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        )
    v = at[0] + np.exp(at[1]) * rng.normal(size=(1, draws, 10))
    q = norm.logpdf(v, at[0], np.exp(at[1]))
    row = (
        norm.logpdf(y, v[..., :1] + np.exp(v[..., 1:2]) * v[..., 2:], s)
        + norm.logpdf(v[..., 2:])
        - q[..., 2:]
    )
    both, school = ("chain", "draw"), ("chain", "draw", "school")
    posterior = {"mu": (both, v[..., 0]), "tau": (both, np.exp(v[..., 1])), "z": (school, v[..., 2:])}
    stats = {"lp": (both, log_p(v)), "log_q": (both, q.sum(-1)), "row_log_weight": (school, row)}
    return xr.DataTree.from_dict({"posterior": xr.Dataset(posterior), "sample_stats": xr.Dataset(stats)})


def test_mean_field_on_eight_schools_is_not_trusted():
    tree = mean_field_eight_schools()
    found = report(tree)
    assert found.attrs["verdict"] != "trust"
    assert {"k-hat", "gap", "corrected means"} <= failed(found)
    for start in range(
        0, 4000, 1000
    ):  # nor with the draws of one call of draw, whatever k-hat they happen to show
        some = {g: tree[g].to_dataset().isel(draw=slice(start, start + 1000)) for g in tree.children}
        assert report(xr.DataTree.from_dict(some)).attrs["verdict"] != "trust"


def test_page_is_self_contained_escaped_and_complete(catalogue, tmp_path):
    tree = catalogue(rows=60, scale=0.4)
    made = json.loads(tree.attrs["provenance"])
    made["template"] = "a <b> & c"
    tree.attrs["provenance"] = json.dumps(made)
    nuts = catalogue(rows=60, draws=100, chains=2, method="nuts", extra=False)
    report(tree, reference=nuts, to=tmp_path / "new" / "report.html")
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp; c" in page
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)
    assert set(re.findall(r'src="([^,"]{0,22})', page)) == {"data:image/png;base64"}
    assert page.count("<figure>") == page.count("<figcaption>") == 6
    for part in (
        "Do not trust",
        "What to do next",
        "Population",
        "ln ct",
        "ten rows",
        "Beside NUTS",
        "Provenance",
    ):
        assert part in page


def test_a_bare_posterior_is_doubted_not_refused(catalogue, tmp_path):
    tree = xr.DataTree.from_dict({"posterior": catalogue(rows=5, draws=50)["posterior"].to_dataset()})
    found = report(tree, to=tmp_path / "bare.html")
    assert found.attrs["verdict"] == "trust with care"
    assert "No importance weights were stored" in why(found)


@pytest.mark.slow
def test_tree_from_disk_without_torch_gives_the_same_report(catalogue, tmp_path):
    tree = catalogue(rows=20, draws=100, scale=0.7)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    code = (
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'pyro', 'anndata'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "import xarray, scivi.analysis\n"
        "assert 'matplotlib' not in sys.modules and 'arviz_stats' not in sys.modules\n"
        f"tree = xarray.open_datatree({str(tmp_path / 'tree.nc')!r}, engine='h5netcdf')\n"
        f"found = scivi.analysis.report(tree, to={str(tmp_path / 'page.html')!r})\n"
        f"found.to_netcdf({str(tmp_path / 'report.nc')!r}, engine='h5netcdf')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    there, here = xr.open_dataset(tmp_path / "report.nc", engine="h5netcdf"), report(tree)
    assert there.attrs == here.attrs
    np.testing.assert_allclose(there["value"], here["value"], rtol=1e-12)
    there.close()


def test_some_rows_stand_for_all(catalogue):
    """A guide of .6 of the true sd: what 500 rows of 2000 tell, within 4 standard errors of what all do.

    Rows are drawn without replacement, which leaves sqrt(1 - 500 / 2000) of the error.
    """
    tree, rest = catalogue(rows=2000, draws=200, scale=0.6, extra=False), (1 - 500 / 2000) ** 0.5
    whole, some = report(tree), report(tree, rows=500)
    assert some.attrs["verdict"] == whole.attrs["verdict"] == "do not trust"
    assert "500 of 2,000 rows, chosen at random, were examined." in some["sentence"].values
    name, (all_, part) = "rows with poor weights", (groups.some_rows(tree, n) for n in (2000, 500))
    share = float(whole["value"].sel(check=name))
    error = rest * (share * (1 - share) / 500) ** 0.5
    assert abs(float(some["value"].sel(check=name)) - share) < 4 * error
    exact, estimate = loo(all_)["elpd"].item(), loo(part, share=0.25)
    assert abs(estimate["elpd"].item() - exact) < 4 * rest * estimate["se"].item()
    assert part.posterior.sizes["source"] == 500
    xr.testing.assert_identical(
        part.posterior.to_dataset(), tree.posterior.to_dataset().sel(source=part.posterior["source"].values)
    )
    assert groups.some_rows(tree, 2000) is tree


def test_a_broken_draw_is_found_among_rows_that_are_not_examined(catalogue):
    tree = catalogue(rows=300, draws=50, extra=False)
    kept = groups.some_rows(tree, 60).posterior["source"].values
    left = next(k for k, name in enumerate(tree.posterior["source"].values) if name not in kept)
    tree.posterior["z"].values[0, 3, left] = np.nan
    assert "1 of 15,050 posterior numbers are not finite." in why(report(tree, rows=60))
