"""What few rows share: draws taken from the weighted ones with which a fit ends, against a sum over a grid.

Rows y_i ~ N(z_i, 1), z_i ~ N(0, tau), tau ~ HalfNormal(1). Eight rows do not tell tau well, so that its
logarithm has a long lower tail, which no normal has. The guide of a row is its posterior given tau.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import halfnorm, norm
from torch import nn
from torch.distributions import constraints

from scivi.analysis import reliability, report
from scivi.errors import Unsupported
from scivi.inference.draws import draw
from scivi.inference.loop import fit
from scivi.inference.plan import Plan
from scivi.inference.state import Fit, load, save
from scivi.inputs.fields import Field
from scivi.models.guides import global_normal
from scivi.models.template import Template

Y = 2.5 * np.array([-0.9, 0.3, 1.2, -0.4, 0.1, 0.8, -1.1, 0.5])


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.globals = global_normal({"tau": constraints.positive}, {"tau": torch.tensor(0.5)})


def model(batch: Any, prior: Any, nets: Any) -> None:
    tau = pyro.sample("tau", dist.HalfNormal(batch.y.new_tensor(1.0)))
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(0.0, tau))
        batch.observe("y", dist.Normal(z, 1.0))


def guide(batch: Any, prior: Any, nets: Any) -> None:
    tau = nets.globals(batch)["tau"]
    share = tau.square() / (1 + tau.square())
    with batch.plate("row"):
        pyro.sample("z", dist.Normal(share * batch.y, share.sqrt()))


template = Template(
    name="scatter", fields={"y": Field(("row",), "observed")}, rows="row", model=model, guide=guide,
    nets=lambda sizes, prior: Nets(), dims={"tau": (), "z": ("row",)},
)  # fmt: skip


def fit_from(seed: int) -> Fit:
    return fit(template, {"y": Y}, Plan(steps=50, seed=seed), progress=False)


@pytest.fixture(scope="module")
def fitted():
    return fit_from(0)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Values of tau, evenly spread in the logarithm from e^-12, and their posterior probabilities."""
    tau = np.exp(np.linspace(-12.0, 2.0, 4000))
    log_p = halfnorm.logpdf(tau) + norm.logpdf(Y[:, None], 0.0, np.sqrt(1 + tau**2)).sum(0) + np.log(tau)
    p = np.exp(log_p - log_p.max())
    return tau, p / p.sum()


def test_draws_have_the_tail_that_no_normal_has(fitted):
    """Of four fits: over eight, the shares of one scatter by .009 (of .02), .014 (.1, .9) and .028 (.5)."""
    tau, p = grid()
    wanted = np.array([0.02, 0.1, 0.5, 0.9])
    places = tau[np.searchsorted(p.cumsum(), wanted)]
    shares: dict[bool | None, np.ndarray] = {None: np.zeros(4), False: np.zeros(4)}
    for each in (fitted, *map(fit_from, (1, 2, 3))):
        for correct in shares:
            tree = draw(each, {"y": Y}, 2000, seed=1, correct=correct)
            found = np.sort(tree["posterior"]["tau"].values.ravel())
            shares[correct] += np.searchsorted(found, places) / 2000 / 4
    assert (np.abs(shares[None] - wanted) < 3 * np.array([0.009, 0.014, 0.028, 0.014]) / 2).all()
    # Log tau has .010 below its lowest fiftieth in a normal with the posterior's own moments.
    assert shares[False][0] < 0.010


def test_draws_have_its_mean_and_carry_their_weights(fitted):
    tau, p = grid()
    tree = draw(fitted, {"y": Y}, 2000, seed=1)
    mean, sd = float(p @ tau), float((p @ (tau - p @ tau) ** 2) ** 0.5)
    assert tree["posterior"]["tau"].mean() == pytest.approx(mean, abs=3 * sd / 600**0.5)  # 600 effective
    assert tree["sample_stats"]["proposal_log_weight"].shape == (1, 640)
    assert "log_q" not in tree["sample_stats"]
    assert "row_log_weight" in tree["sample_stats"]


def test_the_rows_follow_them(fitted):
    """E[z_i] = y_i E[tau^2 / (1 + tau^2)]: 2000 draws of z with an sd of .8, and 600 of tau."""
    tau, p = grid()
    tree = draw(fitted, {"y": Y}, 2000, seed=2)
    expected = Y * float(p @ (tau**2 / (1 + tau**2)))
    np.testing.assert_allclose(tree["posterior"]["z"].mean(("chain", "draw")), expected, atol=0.07)


def test_the_report_says_of_what_the_draws_are(fitted):
    checks = report(draw(fitted, {"y": Y}, 1000))
    told = checks["sentence"].sel(check="k-hat").item()
    assert told.startswith("Draws of what rows share were taken from 640 by their importance weights")
    assert bool(checks["ok"].sel(check="k-hat"))


def test_new_rows_follow_what_the_rows_of_the_fit_have_told(fitted):
    new = {"y": np.array([0.0, 3.0])}
    there, here = (draw(fitted, data, 500, seed=3)["posterior"]["tau"].values for data in ({"y": Y}, new))
    np.testing.assert_array_equal(there, here)


def test_new_rows_do_not_weigh_what_rows_share(fitted):
    """Their likelihood knows nothing of the rows of the fit: it corrects and condemns nothing."""
    new, own = {"y": np.full(10, 9.0)}, replace(fitted, population=None)
    tree = draw(own, new, 500, seed=3)
    found = report(tree)
    assert "proposal_log_weight" not in tree["sample_stats"]
    assert not {"k-hat", "gap", "joint k-hat"} & set(found["check"].values)
    assert "population k-hat" in found["check"].values
    joint = reliability(tree)
    assert float(joint["k_hat"].item()) > 0.7  # which the report would have to call "do not trust"


def test_a_saved_fit_draws_the_same_and_a_resumed_one_too(fitted, tmp_path):
    save(fitted, tmp_path / "fit")
    expected = draw(fitted, {"y": Y}, 100)["posterior"]
    read = draw(load(tmp_path / "fit", template), {"y": Y}, 100)["posterior"]
    np.testing.assert_array_equal(read["tau"], expected["tau"])
    np.testing.assert_array_equal(read["z"], expected["z"])
    how: dict[str, Any] = {"progress": False, "checkpoint": tmp_path / "state"}
    fit(template, {"y": Y}, Plan(steps=50, seed=0), **how)
    again = fit(template, {"y": Y}, Plan(steps=50, seed=0), **how, resume=True)
    np.testing.assert_array_equal(draw(again, {"y": Y}, 100)["posterior"]["tau"], expected["tau"])
    assert "points" not in again.provenance["fit"]["finish"]


def test_only_all_latents_together_can_be_insisted_on(fitted):
    with pytest.raises(Unsupported, match="cannot be corrected as a whole"):
        draw(fitted, {"y": Y}, 100, correct=True)
