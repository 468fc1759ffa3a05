"""Fits of which it is known whether they are right: half of them good, half bad in a known way.

Each case is fitted and drawn as a user would, its verdict that of ``report(predict(fit, data))``, and held
against an oracle: reference draws of posteriordb, NUTS (``scivi.nuts``) on the right model, the photons'
quadrature, closed forms, or the values that made simulated rows.

A case says what was planted ("" for nothing). Whether it is then *good* or *bad* the oracle decides
(`Seen.kind`): planting does not always do harm, and what is not planted is not always good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import posteriors
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from photons_oracle import Catalogue, population
from photons_oracle import simulate as sources
from pyro import poutine
from scipy import stats
from torch import nn

import scivi
from domains.astrophysics import photons
from domains.finance import volatility
from domains.genomics import methylation
from domains.genomics.methylation import EXAMPLE
from domains.kinetics import kinetics, predators
from scivi import Field, Plan, Template
from scivi.errors import SciVIError
from scivi.models.guides import JointNormal, MeanField

DRAWS = 2000
GOOD_MEAN, GOOD_SD = 0.2, 1.2  # sd by which means may be off, and factor of sds, of a good case (our choice)
BAD_MEAN, BAD_SD = 0.5, 1.5  # beyond either a case is bad; in between it is not counted (our choice)
Oracle = Mapping[str, tuple[np.ndarray, np.ndarray]]  # by variable: mean and sd, in its dims


@dataclass(frozen=True)
class Seen:
    """What came of a case.

    Args:
        verdict: of the report, or "refused" where fit or draws ended in an error.
        why: its first reason, or the error.
        error: of the worst mean, in oracle sd; of many rows, the 95th percentile.
        factor: of the worst sd, likewise: the larger of sd over oracle sd and its inverse.
    """

    verdict: str
    why: str
    error: float = math.nan
    factor: float = math.nan

    @property
    def kind(self) -> str:
        """Good, bad, or in between."""
        if self.verdict == "refused" or self.error > BAD_MEAN or self.factor > BAD_SD:
            return "bad"
        return "good" if self.error <= GOOD_MEAN and self.factor <= GOOD_SD else "between"


@dataclass(frozen=True)
class Case:
    """One of them.

    Args:
        name: short.
        planted: what was done to it, "" for nothing.
        run: fits, draws, judges.
    """

    name: str
    planted: str
    run: Callable[[], Seen]


def judged(template: Template, data: Any, plan: Plan | None, oracle: Oracle, predictive: bool = True) -> Seen:
    """Fit, draw, report, and compare."""
    try:
        fit = scivi.fit(template, data, plan, progress=False)
        return said(scivi.draw(fit, data, DRAWS, predictive=predictive), oracle)
    except SciVIError as error:
        return Seen("refused", str(error).splitlines()[0])


def said(tree: xr.DataTree, oracle: Oracle) -> Seen:
    """The report's verdict of a tree, and how far its draws are from the oracle."""
    report = scivi.analysis.report(tree)
    posterior, shift, factor = tree["posterior"].to_dataset(), [0.0], [1.0]
    for name, (mean, sd) in oracle.items():
        draws = draws_of(posterior[name])
        ratio = draws.std(0) / sd
        worst = 1.0 if np.size(mean) <= 50 else 0.95
        shift.append(float(np.quantile(np.abs(draws.mean(0) - mean) / sd, worst)))
        factor.append(float(np.quantile(np.maximum(ratio, 1 / ratio), worst)))
    failed = report["sentence"].values[~report["ok"].values & (report["counts"].values != "note")]
    return Seen(report.attrs["verdict"], "; ".join(failed), max(shift), max(factor))


def draws_of(array: xr.DataArray) -> np.ndarray:
    """Draws of all chains, (draw, ...)."""
    values = array.transpose("chain", "draw", ...).values.astype(float)
    return values.reshape(-1, *values.shape[2:])


def beside_truth(tree: xr.DataTree, truth: Mapping[str, np.ndarray]) -> Seen:
    """The same beside the values that made many rows.

    Of z = (mean - truth) / sd over rows, a right posterior has z^2 of 1 on average, within three Monte Carlo
    errors: the error is the root of the excess beyond them, the factor the root of the average.
    """
    report = scivi.analysis.report(tree)
    posterior, worst = tree["posterior"].to_dataset(), 1.0
    for name, true in truth.items():
        draws = draws_of(posterior[name])
        z = (draws.mean(0) - true) / draws.std(0)
        square = (z**2).reshape(len(z), -1).mean(1)  # of each row
        most = 3 * square.std() / len(square) ** 0.5
        low, high = square.mean() - most, square.mean() + most
        worst = max(worst, low, 1 / high)
    failed = report["sentence"].values[~report["ok"].values & (report["counts"].values != "note")]
    return Seen(report.attrs["verdict"], "; ".join(failed), math.sqrt(worst - 1), math.sqrt(worst))


# posteriordb


@lru_cache
def of_posteriordb(name: str) -> tuple[Template, dict[str, Any], Oracle]:
    """Template, data, and moments of the reference draws in the template's variables."""
    one = posteriors.read(name)
    draws = one.reference.stack(sample=("chain", "draw")).transpose("parameter", "sample").values
    moments: dict[str, list[tuple[float, float]]] = {}
    for parameter, values in zip(one.reference["parameter"].values, draws, strict=True):
        moments.setdefault(str(parameter).partition("[")[0], []).append((values.mean(), values.std()))
    oracle = {}
    for name, found in moments.items():
        mean, sd = np.array(found).T
        oracle[name] = (mean, sd) if one.template.dims[name] else (mean[0], sd[0])
    return one.template, one.data, oracle


def posteriordb(name: str, guide: Any = "auto", plan: Plan | None = None) -> Seen:
    """One of them with a guide and a plan. The models are as they are: only the fit is in question."""
    template, data, oracle = of_posteriordb(name)
    return judged(replace(template, guide=guide), data, plan or Plan(), oracle, predictive=False)


# regressions of our own

SLOPES = np.array([0.8, -0.5, 0.3])


def poisson(batch: Any, prior: Any, nets: Any) -> None:
    """Counts with a log-linear mean."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3).to(batch.x), 2.0).to_event(1))
    with batch.plate("row"):
        batch.observe("y", dist.Poisson(_eta(batch.x, b).exp()))


def overdispersed(batch: Any, prior: Any, nets: Any) -> None:
    """The same with a dispersion."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3).to(batch.x), 2.0).to_event(1))
    size = pyro.sample("size", dist.LogNormal(torch.zeros(()).to(batch.x), 1.0))
    with batch.plate("row"):
        eta = _eta(batch.x, b)
        batch.observe("y", dist.NegativeBinomial(size, logits=eta - size.log()))


def normal(batch: Any, prior: Any, nets: Any) -> None:
    """A line with normal errors."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3).to(batch.x), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(2.0).to(batch.x)))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(_eta(batch.x, b), sigma))


def heavy(batch: Any, prior: Any, nets: Any) -> None:
    """The same with Student-t errors."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3).to(batch.x), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(2.0).to(batch.x)))
    with batch.plate("row"):
        batch.observe("y", dist.StudentT(2.0, _eta(batch.x, b), sigma))


def logistic(batch: Any, prior: Any, nets: Any) -> None:
    """Yes or no."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3).to(batch.x), 2.0).to_event(1))
    with batch.plate("row"):
        batch.observe("y", dist.Bernoulli(logits=_eta(batch.x, b)))


def hierarchy(batch: Any, prior: Any, nets: Any) -> None:
    """Twelve groups of counts, not centred."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).to(batch.x), 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(()).to(batch.x)))
    z = pyro.sample("z", dist.Normal(torch.zeros(12).to(batch.x), 1.0).to_event(1))
    with batch.plate("row"):
        batch.observe("y", dist.Poisson(_eta(batch.x, mu.unsqueeze(-1) + tau.unsqueeze(-1) * z).exp()))


def _eta(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    found = b.to(x) @ x.mT
    return found.squeeze(-2) if b.dim() > 1 and b.shape[-2] == 1 else found


def template_of(model: Callable[..., None], guide: Any = "auto", **dims: tuple[str, ...]) -> Template:
    """A regression as a template."""
    fields = {"y": Field(("row",), role="observed"), "x": Field(("row", "column"))}
    dims = dims or {"b": ("column",)}
    return Template(name=model.__name__, rows="row", model=model, fields=fields, dims=dims, guide=guide)


def rows(kind: str, seed: int, n: int = 150) -> dict[str, np.ndarray]:
    """Data of one of the regressions."""
    rng = np.random.default_rng(seed)
    if kind == "hierarchy":
        x = np.eye(12)[rng.integers(0, 12, n)]
        return {"x": x, "y": rng.poisson(np.exp(1.0 + x @ rng.normal(0, 0.7, 12))).astype(float)}
    x = np.column_stack([np.ones(n), rng.normal(size=(n, 2))])
    eta = x @ SLOPES
    made = {
        "poisson": lambda: rng.poisson(np.exp(eta)),
        "overdispersed": lambda: rng.poisson(np.exp(eta) * rng.gamma(0.5, 2.0, n)),
        "normal": lambda: eta + rng.normal(0, 0.7, n),
        "heavy": lambda: eta + 0.7 * rng.standard_t(1.5, n),
        "logistic": lambda: rng.random(n) < 1 / (1 + np.exp(-eta)),
    }
    return {"x": x, "y": made[kind]().astype(float)}


@lru_cache
def by_nuts(model: Callable[..., None], kind: str, seed: int, names: tuple[str, ...] = ("b",)) -> Oracle:
    """Four chains on the right model."""
    dims = {name: ("column",) if name in ("b", "z") else () for name in names}
    tree = scivi.nuts(
        template_of(model, **dims), rows(kind, seed), draws=1000, chains=4, seed=1, progress=False,
        backend="nutpie",
    )  # fmt: skip
    return {name: moment for name, moment in moments_of(tree).items() if name in names}


def regression(
    model: Callable[..., None],
    kind: str,
    seed: int,
    guide: Any = "auto",
    plan: Plan | None = None,
    **more: Any,
) -> Seen:
    """A model fitted to data of a kind, beside NUTS on the model of that kind."""
    right = globals()[kind]
    return judged(
        template_of(model, guide), rows(kind, seed), plan or Plan(), by_nuts(right, kind, seed), **more
    )


def counted(by: float, kind: str, seed: int) -> Seen:
    """Every observation counted so many times."""
    model = globals()[kind]

    def wrong(batch: Any, prior: Any, nets: Any) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3).to(batch.x), 2.0).to_event(1))
        with batch.plate("row"), poutine.scale(scale=by):
            eta = _eta(batch.x, b)
            batch.observe("y", dist.Poisson(eta.exp()) if kind == "poisson" else dist.Bernoulli(logits=eta))

    return judged(template_of(wrong), rows(kind, seed), Plan(), by_nuts(model, kind, seed))


def narrowed(kind: str, seed: int, by: float) -> Seen:
    """A joint normal whose sds were multiplied after the fit."""
    model, data = globals()[kind], rows(kind, seed)
    fit = scivi.fit(template_of(model, JointNormal()), data, Plan(), progress=False)
    guide = fit.bound.nets.guide
    with torch.no_grad():
        guide.set(guide.loc, by**2 * guide.scale_tril @ guide.scale_tril.mT)
    return said(scivi.predict(fit, data, DRAWS), by_nuts(model, kind, seed))


# shapes whose moments are known: funnels, bent ridges, two modes


def funnel(batch: Any, prior: Any, nets: Any) -> None:
    """Neal's, of nine: v ~ N(0, 3), z ~ N(0, e^(v / 2))."""
    zero = torch.zeros(()).to(batch.y)
    v = pyro.sample("v", dist.Normal(zero, 3.0))
    pyro.sample("z", dist.Normal(zero, (0.5 * v).exp().unsqueeze(-1)).expand((*v.shape, 8)).to_event(1))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(0 * v, 1.0))


def ridge(batch: Any, prior: Any, nets: Any) -> None:
    """A bent one: a ~ N(0, 1), b ~ N(2 a^2, .4): mean of b 2, variance 8.16."""
    a = pyro.sample("a", dist.Normal(torch.zeros(()).to(batch.y), 1.0))
    pyro.sample("b", dist.Normal(2 * a.square(), 0.4))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(0 * a, 1.0))


def pair(width: float, share: float) -> Callable[..., None]:
    """Two modes of u, at -4 (sd 1, the share as given) and at 4 (sd ``width``), under N(0, 20)."""

    def model(batch: Any, prior: Any, nets: Any) -> None:
        zero = torch.zeros(()).to(batch.y)
        u = pyro.sample("u", dist.Normal(zero, 20.0))
        places, sd = torch.tensor([4.0, -4.0]).to(zero), torch.tensor([1.0, width]).to(zero)
        shares = dist.Categorical(torch.tensor([share, 1 - share]).to(zero))
        with batch.plate("row"):
            batch.observe("y", dist.MixtureSameFamily(shares, dist.Normal(u.unsqueeze(-1) + places, sd)))

    return model


def two_modes(guide: Any, width: float, share: float, seed: int) -> Seen:
    """Its moments by sums on a grid."""
    u = np.linspace(-30, 30, 60_001)
    p = share * stats.norm.pdf(u, -4, 1) + (1 - share) * stats.norm.pdf(u, 4, width)
    p *= stats.norm.pdf(u, 0, 20)
    mean = (p * u).sum() / p.sum()
    sd = ((p * (u - mean) ** 2).sum() / p.sum()) ** 0.5
    return shape(pair(width, share), guide, {"u": (mean, sd)}, seed)


def shape(
    model: Callable[..., None], guide: Any, oracle: Mapping[str, tuple[float, float]], seed: int
) -> Seen:
    """A density that is its own posterior."""
    template = Template(
        name=model.__name__, rows="row", model=model, fields={"y": Field(("row",), role="observed")},
        dims=dict.fromkeys(oracle, ()), guide=guide,
    )  # fmt: skip
    moments = {name: (np.float64(mean), np.float64(sd)) for name, (mean, sd) in oracle.items()}
    return judged(template, {"y": np.zeros(1)}, Plan(seed=seed), moments, predictive=False)


# a latent for each row, read by a network


class Reader(nn.Module):
    """From a row's numbers to mean and log sd of its latents."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(columns, 32), nn.Tanh(), nn.Linear(32, 2))


def factor(batch: Any, prior: Any, nets: Any) -> None:
    """Six numbers around a multiple of one: z ~ N(0, 1), y_k ~ N(2 z, 1)."""
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).to(batch.y), 1.0))
        batch.observe("y", dist.Normal(2 * z.unsqueeze(-1), 1.0).expand([*z.shape, 6]).to_event(1))


def read_by_network(batch: Any, prior: Any, nets: Any) -> None:
    """Its guide."""
    with batch.plate("row"):
        loc, log_sd = nets.layers(batch.y).unbind(-1)
        pyro.sample("z", dist.Normal(loc, log_sd.exp()))


AMORTISED = Template(
    name="factor", rows="row", model=factor, guide=read_by_network,
    nets=lambda sizes, prior: Reader(6),
    fields={"y": Field(("row", "column"), role="observed")}, dims={"z": ("row",)},
)  # fmt: skip


def amortised(steps: int, away: float, seed: int, lr: float = 5e-3) -> Seen:
    """Fitted to 2000 rows, asked about 1000 new ones whose latent lies so far away; the oracle is exact."""
    rng = np.random.default_rng(seed)

    def made(z: np.ndarray) -> dict[str, np.ndarray]:
        return {"y": 2 * z[:, None] + rng.normal(size=(len(z), 6))}

    seen, new = made(rng.normal(size=2000)), made(rng.normal(size=1000) + away)
    fit = scivi.fit(AMORTISED, seen, Plan(steps=steps, stop=None, lr=lr, seed=seed), progress=False)
    exact = 2 * new["y"].sum(1) / 25, np.full(1000, 0.2)  # precision 1 + 6 x 4
    return said(scivi.predict(fit, new, 500), {"z": exact})


# templates


def as_table(some: Catalogue) -> xr.Dataset:
    """Sources as the photons' table."""
    from photons_fit import table_of

    return table_of(some)


@lru_cache
def catalogue(n: int, seed: int) -> tuple[Catalogue, Oracle]:
    """Sources, and the exact moments of what they share (mean, log scatter; of brightness, background)."""
    from photons_fit import prior

    some = sources(n, seed=30_000 + seed)
    exact = population(some, prior().log_density)
    return some, {"theta": (exact.mean.numpy(), exact.sd.numpy())}


def photon_population(n: int, seed: int, plan: Plan | None = None, narrow: float = 1.0) -> Seen:
    """The population of a catalogue beside quadrature."""
    some, oracle = catalogue(n, seed)
    fit = scivi.fit(photons.template, as_table(some), plan or Plan(seed=seed), progress=False)
    own = fit.nets.own.globals
    if narrow != 1:
        with torch.no_grad():
            own.set(own.loc, narrow**2 * own.scale_tril @ own.scale_tril.mT)
    tree = scivi.predict(fit, as_table(some), 500)
    return said(with_theta(tree), oracle)


def with_theta(tree: xr.DataTree) -> xr.DataTree:
    """The tree with the oracle's coordinates as one variable."""
    posterior = tree["posterior"].to_dataset()
    names = ("mu", "sigma", "background_mu", "background_sigma")
    found = [posterior[n].values.reshape(*posterior[n].shape[:2]) for n in names]
    theta = np.stack([v if k % 2 == 0 else np.log(v) for k, v in enumerate(found)], -1)
    tree = tree.copy()
    tree["posterior"] = tree["posterior"].to_dataset().assign(theta=(("chain", "draw", "coordinate"), theta))
    return tree


def new_photons(change: Callable[[xr.Dataset], xr.Dataset], seed: int) -> Seen:
    """A fit of 2000 sources asked about 1000 others, after their table was changed; beside what made them."""
    some = sources(3000, seed=40_000 + seed)
    fit = scivi.fit(photons.template, as_table(some[:2000]), Plan(seed=seed), progress=False)
    new = some[slice(2000, 3000)]
    tree = scivi.predict(fit, change(as_table(new)), 500)
    return beside_truth(tree, {"log_brightness": new.u.numpy()[:, None]})


@lru_cache
def loci(seed: int) -> tuple[Template, xr.Dataset, Oracle]:
    """Loci that share their rates, and moments of what they share by NUTS, genotypes summed out."""
    from methylation_accuracy import simulated

    table, _ = simulated(300, 1e-3, 3e-3, np.array([0.75, 0.01, 0.24]), np.random.default_rng(seed))
    template = methylation.make(EXAMPLE, contexts=("CG",), heterogeneous=False)
    how: dict[str, Any] = {"draws": 300, "warmup": 200, "chains": 2, "seed": 1, "progress": False}
    return template, table, moments_of(scivi.nuts(template, table, **how))


def moments_of(tree: xr.DataTree) -> Oracle:
    """Mean and sd of every variable."""
    posterior, over = tree["posterior"].to_dataset(), ("chain", "draw")
    return {str(n): (a.mean(over).values, a.std(over).values) for n, a in posterior.data_vars.items()}


def of_methylation(seed: int, swapped: bool = False) -> Seen:
    """What loci share, beside NUTS; with methylated reads taken for unmethylated ones, if swapped."""
    template, table, oracle = loci(seed)
    if swapped:
        table = table.assign(methylated=table["total"] - table["methylated"])
    return judged(template, table, None, oracle)


def of_volatility(seed: int, errors: Any = "normal", guide: Any = None) -> Seen:
    """Paths of simulated series, whose returns have such errors, as normal ones; beside the truth."""
    how: dict[str, Any] = {"leverage": False, "drift": False}
    data, truth = scivi.simulate(volatility.make(errors, **how), {"series": 30, "day": 500}, seed=seed)
    template = volatility.make("normal", **how)
    if guide is not None:
        template = replace(volatility.make("normal", path="sampled", **how), guide=guide)
    fit = scivi.fit(template, data, progress=False)
    tree = scivi.predict(fit, data, 300)
    return beside_truth(tree, {"log_variance": truth["log_variance"].values})


def of_predators(seed: int, plan: Plan | None = None, guide: Any = None) -> Seen:
    """Hares and lynxes beside posteriordb."""
    from kinetics_predators import DATA, REFERENCE, THEIRS, reference_draws

    measured = predators.read(DATA)
    template, table = kinetics.from_data((predators.problem(), measured), seed=seed, progress=False)
    if guide is not None:
        template = replace(template, guide=guide)
    ours = [p.name for p in predators.problem().parameters]
    reference = reference_draws(REFERENCE)[:, [list(THEIRS).index(name) for name in ours]]
    return judged(template, table, plan or Plan(seed=seed), {"theta": (reference.mean(0), reference.std(0))})


# which there are

FULL = Plan(estimator="trace", newton=False)
FEW = Plan(steps=50, estimator="trace", newton=False, stop=None)
LARGE = Plan(steps=1000, lr=1.0, estimator="trace", newton=False, stop=None, schedule="constant")
CORRELATED = (
    "kidiq-kidscore_interaction", "arK-arK", "garch-garch11", "gp_pois_regr-gp_regr", "nes1980-nes",
    "mesquite-logmesquite", "earnings-earn_height", "diamonds-diamonds",
)  # fmt: skip
RIGHT = {
    "poisson": poisson,
    "overdispersed": overdispersed,
    "normal": normal,
    "heavy": heavy,
    "logistic": logistic,
}


def cases() -> list[Case]:
    """All of them, in the order in which they run."""
    found: list[Case] = []

    def add(name: str, planted: str, run: Callable[..., Seen], *args: Any, **kwargs: Any) -> None:
        found.append(Case(name, planted, lambda: run(*args, **kwargs)))

    for name in posteriors.OF:
        short = name.partition("-")[0]
        add(f"{short}, auto", "", posteriordb, name)
        add(f"{short}, joint normal", "", posteriordb, name, JointNormal())
    for name in CORRELATED:
        add(f"{name.partition('-')[0]}, mean field", "mean field", posteriordb, name, MeanField(), FULL)
    for name in (*CORRELATED[:3], "eight_schools-eight_schools_noncentered"):
        short = name.partition("-")[0]
        add(f"{short}, 50 steps", "too few steps", posteriordb, name, JointNormal(), FEW)
        add(f"{short}, rate 1", "too large a step", posteriordb, name, JointNormal(), LARGE)
    for kind, model in RIGHT.items():
        for seed in (0, 1):
            add(f"{kind} regression {seed}, auto", "", regression, model, kind, seed)
        add(f"{kind} regression, joint normal", "", regression, model, kind, 2, JointNormal())
    for seed in range(4):
        add(f"over-dispersed counts {seed}", "Poisson", regression, poisson, "overdispersed", seed)
        add(f"heavy tails {seed}", "normal errors", regression, normal, "heavy", seed)
    for kind in ("poisson", "logistic"):
        for by in (10.0, 0.1):
            add(f"{kind} regression, rows x {by:g}", "scale off by ten", counted, by, kind, 0)
        for by in (0.3, 0.5):
            add(f"{kind} regression, sd x {by:g}", "too narrow globals", narrowed, kind, 0, by)
    for guide, of in (("auto", "auto"), (JointNormal(), "joint normal"), (MeanField(), "mean field")):
        planted = "" if of == "auto" else of
        add(f"funnel, {of}", planted or "funnel", shape, funnel, guide, {"v": (0.0, 3.0)}, 0)
        add(f"bent ridge, {of}", planted, shape, ridge, guide, {"a": (0.0, 1.0), "b": (2.0, 8.16**0.5)}, 0)
        for k, (width, share) in enumerate([(0.5, 0.25), (1.0, 0.5), (2.0, 0.8)]):
            add(f"two modes {k}, {of}", planted and "a mode left out", two_modes, guide, width, share, k)
    for seed, n in enumerate([600, 1000, 2000, 4000]):
        add(f"photons, {n} sources", "", photon_population, n, seed)
    for seed in (0, 1):
        add(f"photons by the ELBO {seed}", "population by the ELBO", photon_population, 2000, seed, FULL)
    add("photons, 20 steps", "too few steps", photon_population, 1000, 1, replace(FEW, steps=20))
    add("photons, sd x .3", "too narrow globals", photon_population, 1000, 1, narrow=0.3)
    changes: dict[str, tuple[str, Callable[[xr.Dataset], xr.Dataset]]] = {
        "nothing": ("", lambda t: t),
        "columns": ("swapped columns", lambda t: t.assign(n_on=t["n_off"], n_off=t["n_on"])),
        "exposure": ("drifted data", lambda t: t.assign(exposure=3 * t["exposure"])),
        "alpha": ("drifted data", lambda t: t.assign(alpha=t["alpha"] * 8)),
    }
    for name, (planted, change) in changes.items():
        add(f"new photons, {name}", planted, new_photons, change, 0)
    for seed in (0, 1):
        add(f"network {seed}", "", amortised, 6000, 0.0, seed)
        add(f"network, 30 steps, {seed}", "too few steps", amortised, 30, 0.0, seed)
        add(f"network, rows beyond {seed}", "rows beyond the range", amortised, 6000, 4.0 - 8 * seed, seed)
    add("network, rate 1", "too large a step", amortised, 2000, 0.0, 0, lr=1.0)
    for seed in (0, 1):
        add(f"methylation {seed}", "", of_methylation, seed)
    add("methylation, strands", "swapped columns", of_methylation, 0, swapped=True)
    for seed in (0, 1):
        add(f"volatility {seed}", "", of_volatility, seed)
    add("volatility, mean field", "mean field", of_volatility, 0, guide=MeanField())
    add("volatility, heavy tails", "normal errors", of_volatility, 0, errors="t")
    add("predators", "", of_predators, 0)
    add("predators, mean field", "mean field", of_predators, 0, replace(FULL, steps=300), MeanField())
    add("predators, 30 steps", "too few steps", of_predators, 0, replace(FEW, steps=30))
    return found


CASES = cases()
