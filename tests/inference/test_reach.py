"""What a guide's own draws cannot show: modes left out, tails, and observations that count twice."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import scivi
from scivi import Field, Plan, Template
from scivi.analysis import report
from scivi.models.guides import JointNormal, MeanField

ZERO = {"y": np.zeros(1)}
SHARE = 0.75  # of the mode at -4


def one(model, guide, dims=("u",), **more):
    """A template of one row whose posterior is the model's own density."""
    fields = {"y": Field(("row",), role="observed")}
    return Template(
        name="one", rows="row", model=model, fields=fields, dims=dict.fromkeys(dims, ()), guide=guide, **more
    )


def two_modes(batch, prior, nets):
    """Normals at -4 and 4, sd 1 and .5."""
    zero = torch.zeros(()).to(batch.y)
    u = pyro.sample("u", dist.Normal(zero, 20.0))
    places, sd = torch.tensor([4.0, -4.0]).to(zero), torch.tensor([1.0, 0.5]).to(zero)
    shares = dist.Categorical(torch.tensor([SHARE, 1 - SHARE]).to(zero))
    with batch.plate("row"):
        batch.observe("y", dist.MixtureSameFamily(shares, dist.Normal(u.unsqueeze(-1) + places, sd)))


@pytest.mark.parametrize("family", [JointNormal, MeanField])
def test_a_mode_that_the_guide_leaves_out_is_told_with_its_share(family):
    """The density is exactly two normals, but for a prior of sd 20 that favours neither: shares are exact."""
    fit = scivi.fit(
        one(two_modes, family()), ZERO, Plan(steps=800, lr=2e-2, seed=1, compile="off"), progress=False
    )
    tree = scivi.draw(fit, ZERO, 1000)
    at = tree["posterior"]["u"].values
    assert min((at < 0).mean(), (at > 0).mean()) < 0.01  # one of them
    finish, left = fit.provenance["fit"]["finish"], SHARE if at.mean() > 0 else 1 - SHARE
    assert finish["modes"] == 2
    assert finish["unseen_modes"] == pytest.approx(left, abs=0.01)
    found = report(tree)
    assert found.attrs["verdict"] == "do not trust"
    assert not bool(found["ok"].sel(check="modes"))


def test_a_right_guide_leaves_out_nothing():
    def model(batch, prior, nets):
        u = pyro.sample("u", dist.Normal(torch.zeros(()).to(batch.y), 1.0))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(u, 1.0))

    fit = scivi.fit(one(model, JointNormal()), ZERO, Plan(), progress=False)
    finish = fit.provenance["fit"]["finish"]
    assert (finish["modes"], finish["unseen_modes"], finish["missed"]) == (1, 0.0, 0.0)
    assert report(scivi.draw(fit, ZERO, 1000)).attrs["verdict"] == "trust"


def test_models_with_networks_are_not_searched():
    def model(batch, prior, nets):
        u = pyro.sample("u", dist.Normal(torch.zeros(()).to(batch.y), 1.0))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(nets(u.reshape(-1, 1)).reshape(u.shape), 1.0))

    template = one(model, JointNormal(), nets=lambda sizes, prior: nn.Linear(1, 1))
    fit = scivi.fit(template, ZERO, Plan(steps=5), progress=False)
    assert "modes" not in fit.provenance["fit"]["finish"]


@pytest.mark.parametrize("rows_per_batch", [None, 5])
def test_observations_that_count_more_than_once_are_told(rows_per_batch):
    """By a scale of the model's own; that of minibatches is no such."""
    data = {"y": np.random.default_rng(0).normal(size=20)}

    def fitted(by):
        def model(batch, prior, nets):
            u = pyro.sample("u", dist.Normal(torch.zeros(()).to(batch.y), 3.0))
            with batch.plate("row"), poutine.scale(scale=by):
                batch.observe("y", dist.Normal(u, 1.0))

        plan = Plan(steps=20, rows_per_batch=rows_per_batch)
        return scivi.fit(one(model, JointNormal()), data, plan, progress=False)

    right, wrong = fitted(1.0), fitted(10.0)
    assert right.provenance["weights"] == {}
    assert wrong.provenance["weights"] == {"y": pytest.approx(10.0)}
    found = report(scivi.draw(wrong, data, 1000))
    assert found.attrs["verdict"] == "trust with care"
    assert "y counts 10 times in the posterior." in found["sentence"].values
