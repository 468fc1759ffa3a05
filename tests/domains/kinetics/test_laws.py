"""The kinetics template and the laws of every template; chains side by side and one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tqdm.auto import tqdm

import scivi
from domains.kinetics import kinetics
from domains.kinetics.networks import network
from domains.kinetics.petab_problems import Observable, Parameter, Problem
from scivi.inference.chains import Chain, Length, nutpie_chain, nutpie_chains

DOSES = (0.5, 1.0, 2.0, 4.0, 8.0)


def decay() -> tuple[scivi.Template, dict[str, Any]]:
    """A -> B at k from five doses, A seen with noise; the table is of a rate of 1."""
    names = [f"dose {dose:g}" for dose in DOSES]
    problem = Problem(
        network({"A -> B": "k"}, initial={"A": "dose", "B": 0.0}, parameters={"k": 1.0, "dose": 1.0}),
        (Parameter("k", "log10", 1e-2, 1e2, 1.0), Parameter("sd", "lin", 0.01, 1.0, 0.1)),
        (Observable("A seen", "A", "sd"),),
        {name: {"dose": dose} for name, dose in zip(names, DOSES, strict=True)},
        tuple((name, "") for name in names),
        "decay",
    )
    time = np.tile(np.linspace(0.2, 2.0, 4), (len(DOSES), 1))
    noise = 0.1 * np.random.default_rng(0).standard_normal(time.shape)
    table = {
        "time": (("condition", "moment"), time),
        "measured": (
            ("condition", "moment", "observable"),
            (np.array(DOSES)[:, None] * np.exp(-time) + noise)[..., None],
        ),
        "condition": (("condition",), names),
        "observable": (("observable",), ["A seen"]),
    }
    return kinetics.make(problem, method="rodas5p"), table


@pytest.mark.slow
def test_the_kinetics_template_obeys_the_laws():
    template, table = decay()
    found = scivi.check(template, table, seed=1)
    broken = {str(law): str(found.detail.sel(law=law).values) for law in found.law.values[~found.ok.values]}
    assert broken == {}


MEAN, SD, SLANT = (1.0, -2.0, 0.5), (1.0, 0.3, 2.0), 0.8


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Log density and gradient of x0, x1, x2 - SLANT x0 ~ Normal(MEAN, SD), at points (..., 3).

    Term by term, so that a point's bits are the same alone and among others.
    """
    a, b, c = x.unbind(-1)
    ra, rb, rc = (a - MEAN[0]) / SD[0], (b - MEAN[1]) / SD[1], (c - SLANT * a - MEAN[2]) / SD[2]
    slope = torch.stack([-ra / SD[0] + SLANT * rc / SD[2], -rb / SD[1], -rc / SD[2]], -1)
    return -0.5 * (ra * ra + rb * rb + rc * rc), slope


@pytest.fixture(scope="module")
def both() -> tuple[list[Chain], list[Chain], list[int]]:
    """Four chains one by one, the same side by side, and how many points there were in each call then."""
    pytest.importorskip("nutpie", reason="chains side by side are nutpie's")
    firsts = list(torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3))
    length, seeds, asked = Length(draws=400, warmup=200), [3, 1, 4, 1_000_003], []

    def many(points: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(points))
        return normal(points)

    with tqdm(disable=True) as bar:
        alone = [nutpie_chain(normal, x, length, s, bar) for x, s in zip(firsts, seeds, strict=True)]
        return alone, nutpie_chains(many, firsts, length, seeds, bar), asked


@pytest.mark.slow
def test_chains_side_by_side_are_those_one_by_one(both):
    alone, together, asked = both
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.path, other.path)
        assert one.gradients == other.gradients
        for name, numbers in one.stats.items():
            np.testing.assert_array_equal(numbers, other.stats[name])
    assert len({float(chain.path[0, 0]) for chain in together}) == len(together)  # each has its own seed
    assert sum(asked) == sum(chain.gradients for chain in together)
    assert np.median(asked) == len(together)  # they wait for each other, till the first has ended


@pytest.mark.slow
def test_chains_side_by_side_are_of_the_normal(both):
    """Moments in closed form. 1600 draws, a quarter as many effective: .05 sd of a mean, .035 of an sd."""
    draws = torch.cat([chain.path for chain in both[1]]).numpy()
    mean = np.array([MEAN[0], MEAN[1], MEAN[2] + SLANT * MEAN[0]])
    sd = np.array([SD[0], SD[1], np.hypot(SD[2], SLANT * SD[0])])
    assert np.abs((draws.mean(0) - mean) / sd).max() < 4 * 0.05
    np.testing.assert_allclose(draws.std(0), sd, rtol=4 * 0.035)
