from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn
from torch.distributions import constraints

import scivi
from domains.astrophysics import photons
from scivi.errors import DataError
from scivi.laws import LAWS, check
from scivi.models.guides import JointNormal, MeanField
from tests.schools import schools

SCHOOLS = schools(dist.HalfNormal)
TABLE = xr.Dataset({"effect": ("school", [28.0, 8.0, -3.0, 7.0]), "sd": ("school", [15.0, 10.0, 16.0, 11.0])})


def reads_model(batch, prior, nets):
    cg, chg = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("cg", "chg"))
    with batch.plate("locus"):
        logits = torch.where(batch.context == 0, cg, chg)
        batch.observe("methylated", dist.Binomial(batch.total, logits=logits))


READS = scivi.Template(
    name="reads",
    rows="locus",
    model=reads_model,
    fields={
        "methylated": scivi.Field("locus", "observed", constraints.nonnegative_integer, at_most="total"),
        "total": scivi.Field("locus", support=constraints.positive_integer),
        "context": scivi.Field("locus", labels=("CG", "CHG"), default="CHG"),
        "effort": scivi.Field("locus", support=constraints.positive),
        "used": scivi.Field("locus", support=constraints.positive, at_most="effort"),
    },
    dims={"cg": (), "chg": ()},
)
TEMPLATES = {
    "photons": photons.template,
    "photons, flat": photons.flat,
    "photons, known": photons.known,
    "schools, mean field": replace(SCHOOLS, guide=MeanField()),
    "schools, joint normal": replace(SCHOOLS, guide=JointNormal()),
    "reads": READS,
}


SLOW = ("photons, flat", "photons, known", "schools, joint normal")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TEMPLATES]
)
def test_every_law_holds_for(name):
    found = check(TEMPLATES[name], seed=1)
    broken = {str(law): str(found.detail.sel(law=law).values) for law in found.law.values[~found.ok.values]}
    assert broken == {}
    assert found.attrs["ok"] == 1
    assert found.law.values.tolist() == list(LAWS)


class Level(nn.Module):
    def __init__(self, idle: bool = False) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-1.0))
        if idle:
            self.idle = nn.Parameter(torch.zeros(3))


def level_model(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(level, 1.0))


def level_guide(batch, prior, nets):
    pyro.sample("level", dist.Normal(nets.loc, nets.log_scale.exp()))


LEVEL = scivi.Template(
    name="level",
    rows="row",
    model=level_model,
    guide=level_guide,
    nets=lambda sizes, prior: Level(),
    fields={"y": scivi.Field(("row",), role="observed")},
    dims={"level": ()},
)


def test_the_template_that_is_planted_with_faults_has_none_before():
    assert check(LEVEL).attrs["ok"] == 1


def misses_a_latent(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(level + slope, 1.0))


def has_one_too_many(batch, prior, nets):
    level_guide(batch, prior, nets)
    pyro.sample("slope", dist.Normal(nets.loc, 1.0))


def scales_nothing(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(batch.y)):
        batch.observe("y", dist.Normal(level, 1.0))


def takes_a_parameter_of_the_process(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    with batch.plate("row"):
        batch.observe("y", dist.Normal(level, noise))


def sums_over_draws(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(0.0, 5.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(level.sum() + 0 * level, 1.0))


def writes_into_its_data(batch, prior, nets):
    batch.y.sub_(1.0)
    level_model(batch, prior, nets)


def draws_from_another_stream(batch, prior, nets):
    offset = float(np.random.default_rng().normal())
    level = pyro.sample("level", dist.Normal(offset, 5.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(level, 1.0))


def has_no_gradient(batch, prior, nets):
    pyro.sample("level", dist.Normal(nets.loc, nets.log_scale.exp().detach()))


class Forgetful(Level):
    """Keeps what it starts from outside of its state."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Forgetful.made += 1
        self.shift = torch.tensor(float(Forgetful.made))


def forgetful_guide(batch, prior, nets):
    pyro.sample("level", dist.Normal(nets.loc + nets.shift, nets.log_scale.exp()))


def wrong_truth(sizes, prior, generator):
    rng = np.random.default_rng(generator.initial_seed())
    table = xr.Dataset({"y": ("row", rng.normal(size=sizes["row"]))})
    return table, xr.Dataset({"levels": ((), 0.0)})


def planted(**changes):
    return replace(LEVEL, **changes)


PLANTED = {  # by law and template, the words in which the law fails
    "a latent without a factor": ("guide", planted(model=misses_a_latent), "no factor for ['slope']"),
    "a factor without a latent": (
        "guide",
        planted(guide=has_one_too_many),
        "samples ['slope'], which the model does not have",
    ),
    "a plate that does not scale": (
        "minibatch",
        planted(model=scales_nothing),
        "is every site of a row inside batch.plate",
    ),
    "a parameter of the process": (
        "parameter store",
        planted(model=takes_a_parameter_of_the_process),
        "pyro.param or pyro.module put ['noise']",
    ),
    "wrong dims": (
        "sites",
        planted(dims={"level": ("row",)}),
        "site \"level\" has shape (), but dims says ('row',)",
    ),
    "a sum over draws": ("particles", planted(model=sums_over_draws), "leading dims are left alone"),
    "data written to": ("untouched data", planted(model=writes_into_its_data), "['y'] were written to"),
    "an unseeded stream": (
        "same seed",
        planted(model=draws_from_another_stream),
        "draws from an unseeded stream",
    ),
    "a factor of fixed width": (
        "gradients",
        planted(guide=has_no_gradient),
        "no gradient reaches ['own.log_scale']",
    ),
    "a parameter without use": (
        "gradients",
        planted(nets=lambda sizes, prior: Level(idle=True)),
        "no gradient reaches ['own.idle']",
    ),
    "a number outside of the state": (
        "save and load",
        planted(nets=lambda sizes, prior: Forgetful(), guide=forgetful_guide),
        "is all that was learnt in nets",
    ),
    "a truth of no site": ("simulate", planted(simulate=wrong_truth), 'truth "levels" is not in dims'),
}


@pytest.mark.eager  # a captured step has no second look at what is planted
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_caught_by_its_law(fault):
    law, template, words = PLANTED[fault]
    found = check(template)
    assert found.attrs["ok"] == 0
    assert not bool(found.ok.sel(law=law))
    assert words in str(found.detail.sel(law=law).values)


def test_a_template_that_cannot_be_bound_is_told_once():
    found = check(replace(LEVEL, model=lambda batch, prior, nets: batch.z))
    assert 'the batch has no field "z"' in str(found.detail.sel(law="sites").values)
    assert (found.detail[1:] == "not tried: the template cannot be bound").all()


@pytest.mark.slow
def test_laws_and_simulations_keep_to_words_and_bounds():
    words = {"context": ("locus", ["CHG", "CG", "CHG"]), "total": ("locus", [9, 1, 5])}
    given = {
        "methylated": ("locus", [3, 1, 0]),
        "effort": ("locus", np.ones(3)),
        "used": ("locus", np.ones(3)),
    }
    assert check(READS, like=xr.Dataset({**words, **given})).attrs["ok"] == 1
    table, _ = scivi.simulate(READS, {"locus": 50}, seed=1, like=xr.Dataset({**words, **given}))
    assert table.context.values.tolist() == ["CHG", "CG", "CHG"]
    assert (table.methylated <= table.total).all()


def test_data_that_do_not_fit_are_the_callers_fault():
    with pytest.raises(DataError, match='"sd"'):
        check(SCHOOLS, like=TABLE.drop_vars("sd"))


@pytest.mark.slow
def test_what_does_not_apply_says_so_and_data_may_be_short():
    before = TABLE.copy(deep=True)
    found = check(replace(SCHOOLS, guide=JointNormal()), like=TABLE)
    assert found.attrs["ok"] == 1
    assert "not applicable: the joint guide" in str(found.detail.sel(law="minibatch").values)
    assert TABLE.identical(before)


@pytest.mark.slow
def test_recovery_tells_honest_intervals_from_shifted_ones():
    honest = check(replace(LEVEL, guide=None, nets=None), recovery=8)
    assert bool(honest.ok.sel(law="recovery")), str(honest.detail.sel(law="recovery").values)
    shifted = check(replace(LEVEL, simulate=simulates_another_level), recovery=4)
    assert not bool(shifted.ok.sel(law="recovery"))
    assert "level[0] covered 0 of 4 times at 90%" in str(shifted.detail.sel(law="recovery").values)


def simulates_another_level(sizes, prior, generator):
    rng = np.random.default_rng(generator.initial_seed())
    level = rng.normal(0.0, 5.0)
    table = xr.Dataset({"y": ("row", rng.normal(level + 2.0, 1.0, sizes["row"]))})
    return table, xr.Dataset({"level": ((), level)})
