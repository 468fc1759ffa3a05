"""The template of docs/write-your-own.md, run as the page has it.

Is the verdict honest, and is full rank better?
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr

import scivi
from scivi.models.guides import JointNormal

PAGE = Path(__file__).resolve().parents[1] / "docs" / "write-your-own.md"
TABLE = xr.Dataset(  # Rubin 1981, table 1
    {
        "effect": ("school", [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sd": ("school", [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    },
    {"school": list("ABCDEFGH")},
)
# Ten particles: with one, the noise of the last steps is as large as what full rank gains.
PLAN = scivi.Plan(rows_per_batch=None, particles=10, seed=0)
DRAWS = 20_000  # so that the gaps' Monte Carlo error is a fraction of their difference


def first_cell() -> str:
    found = re.search(r"```\{code-cell\} python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def exact_means() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and sd of mu, tau and theta by summing over ln(tau).

    Given tau all else is normal (Gelman et al., BDA3, 5.4).
    """
    y, s, scale = TABLE["effect"].values, TABLE["sd"].values, 5.0
    tau = np.exp(np.linspace(np.log(1e-4), np.log(2e3), 20_001))[:, None]
    variance = s**2 + tau**2
    precision = 1 / scale**2 + (1 / variance).sum(1, keepdims=True)
    centre = (y / variance).sum(1, keepdims=True) / precision
    log_w = np.log(tau) - np.log1p((tau / scale) ** 2) - 0.5 * np.log(precision) + 0.5 * centre**2 * precision
    log_w = log_w - 0.5 * (np.log(variance) + y**2 / variance).sum(1, keepdims=True)
    w = np.exp(log_w - log_w.max())
    w /= w.sum()
    keep = s**2 / variance
    theta, spread = (1 - keep) * y + keep * centre, keep * tau**2 + keep**2 / precision

    def moments(mean: np.ndarray, variance: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        first = (w * mean).sum(0)
        return first, np.sqrt((w * (mean**2 + variance)).sum(0) - first**2)

    return {"mu": moments(centre, 1 / precision), "tau": moments(tau, 0.0), "theta": moments(theta, spread)}


def worst_error(tree: xr.DataTree) -> float:
    """Largest error of a posterior mean, in exact posterior sd."""
    posterior = tree["posterior"].dataset
    return max(
        float(np.abs((posterior[name].mean(("chain", "draw")).values - mean) / sd).max())
        for name, (mean, sd) in exact_means().items()
    )


@pytest.fixture(scope="module")
def ran() -> Any:
    space: dict[str, Any] = {"__name__": "eight_schools"}
    exec(compile(first_cell(), str(PAGE), "exec", dont_inherit=True), space)
    schools = space["schools"]
    full_rank, auto = replace(schools, guide=JointNormal()), replace(schools, guide="auto")
    trees = [
        scivi.draw(scivi.fit(template, TABLE, PLAN, progress=False), TABLE, draws=DRAWS, seed=0, correct=how)
        for template, how in ((schools, False), (full_rank, False), (auto, None))
    ]
    nuts = scivi.nuts(schools, TABLE, draws=400, warmup=200, chains=2, seed=0, progress=False)
    return SimpleNamespace(mean_field=trees[0], full_rank=trees[1], auto=trees[2], nuts=nuts)


def test_the_template_of_the_page_takes_less_than_forty_lines() -> None:
    assert len(first_cell().splitlines()) < 40


@pytest.mark.slow
def test_mean_field_on_eight_schools_is_not_trusted(ran: Any) -> None:
    assert scivi.analysis.report(ran.mean_field).attrs["verdict"] != "trust"


@pytest.mark.slow
def test_the_nuts_reference_agrees_with_the_exact_posterior(ran: Any) -> None:
    posterior = ran.nuts["posterior"].dataset
    error = scivi.analysis.compare(ran.full_rank, ran.nuts)["shift_mcse"]
    for name, (mean, sd) in exact_means().items():
        off = (posterior[name].mean(("chain", "draw")).values - mean) / sd
        # ten means at once: 3.5 Monte Carlo errors, of which the effective size is itself uncertain
        assert np.abs(off).max() < 3.5 * float(error.sel(variable=name)), name


@pytest.mark.slow
def test_full_rank_has_the_smaller_gap(ran: Any) -> None:
    found = [scivi.analysis.reliability(tree) for tree in (ran.mean_field, ran.full_rank)]
    gaps = [float(f["gap"].max()) for f in found]
    # error of log mean(w) by the delta method: sqrt(1 / ess - 1 / n); that of mean(log w) is far smaller
    mcse = sum(1 / float(f["ess"].min()) - 1 / DRAWS for f in found) ** 0.5
    assert gaps[1] < gaps[0] - 2 * mcse


@pytest.mark.slow
def test_full_rank_is_nearer_to_nuts_and_to_the_exact_posterior(ran: Any) -> None:
    near = [scivi.analysis.compare(t, ran.nuts)["shift_worst"].max() for t in (ran.mean_field, ran.full_rank)]
    exact = [worst_error(t) for t in (ran.mean_field, ran.full_rank)]
    # the error of NUTS is common to both sides: what is left is that of two sets of DRAWS independent draws
    mcse = (2 / DRAWS) ** 0.5
    assert float(near[1]) < float(near[0]) - 2 * mcse
    assert exact[1] < exact[0] - 2 * mcse


@pytest.mark.slow
def test_auto_is_trusted_and_exact(ran: Any) -> None:
    """A third of 80,000 proposals is effective: ten means and sds within 4 errors of 1 / sqrt(20,000)."""
    assert scivi.analysis.report(ran.auto).attrs["verdict"] == "trust"
    assert float(scivi.analysis.reliability(ran.auto)["ess"].min()) > 80_000 / 3
    assert worst_error(ran.auto) < 4 * (2 / DRAWS) ** 0.5
    posterior = ran.auto["posterior"].dataset
    for name, (_, sd) in exact_means().items():
        # tau's tail is that of a half-Cauchy tamed by the data: its sd has twice the error of a normal's
        np.testing.assert_allclose(posterior[name].std(("chain", "draw")).values, sd, rtol=8 / DRAWS**0.5)
