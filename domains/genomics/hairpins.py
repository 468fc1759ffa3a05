"""Methylation of both strands of single DNA molecules: how faithfully is it copied at cell division?

A hairpin ties the two strands of a molecule together, so that both are read after bisulfite treatment. One is
the parent, which was there before replication; the other, the daughter, was made new. At site j a parent
strand is methylated before division with probability m_j. The enzymes then methylate the daughter opposite a
methylated parent (maintenance, mu_j) or opposite an unmethylated one (de novo, delta_d), and may methylate
the parent anew (delta_p). For true states (parent, daughter) after division:

    logit mu_j ~ Normal(logit_mean, logit_scatter),    logit_scatter = softplus(logit_spread)
    logit m_j  ~ Normal(density_logit_mean, density_logit_scatter),   likewise
    P(1, 1) = m mu       + (1 - m) delta_p delta_d
    P(1, 0) = m (1 - mu) + (1 - m) delta_p (1 - delta_d)
    P(0, 1) =              (1 - m) (1 - delta_p) delta_d
    P(0, 0) =              (1 - m) (1 - delta_p) (1 - delta_d)

An unmethylated cytosine is read as methylated with probability b (failed conversion), a methylated one as
unmethylated with probability c (inappropriate conversion). Which strand of a molecule is the parent is not
known, but it is the same one at all sites: with r the reads, E the reading errors and pi the probability that
the first strand is the parent, 1/2 unless something is known,

    p(r) = pi prod_j sum_t P_j(t) E(r_j1 | t_1) E(r_j2 | t_2)
         + (1 - pi) prod_j sum_t P_j(t) E(r_j2 | t_1) E(r_j1 | t_2).

Three templates. ``template`` is the above. ``stationary`` puts m_j where division leaves it unchanged, m =
(delta_p + delta_d) / (1 - mu + delta_p + delta_d); since the de novo rates are common to all sites, it puts
differences of density down to maintenance. ``in_vitro`` is of daughters made in a tube on parent strands that
are all methylated (m = 1): sites are independent there, and each mu_j is integrated by quadrature.

Sites of a molecule are independent given the parent. An enzyme that walks along the strand makes neighbours
alike, and intervals are then too narrow: compare ``changes`` of the data with those of replicated data.

Longer than 400 lines because cells and tube are two models of one table, with a simulator for both.

References:
    Fu, Genereux, Stoeger, Laird and Stephens 2010, Ann. Appl. Stat. 4, 871, doi:10.1214/09-AOAS297 (there
        delta and c vary with the site as well).
    Laird et al. 2004, PNAS 101, 204, doi:10.1073/pnas.2536758100 (hairpins; failed conversion).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from scivi.inputs.fields import Field
from scivi.models import Batch, Template, guides, normals
from scivi.models.networks import perceptron


@dataclass(frozen=True)
class Prior:
    """Numbers of the model: medians as published, widths our choice."""

    logit_mean: float = 2.0  # of maintenance; .88. Our choice
    logit_mean_sd: float = 2.0  # 95 % from .13 to .998
    logit_spread_sd: float = 1.3  # scatter: median .69, 95 % from .08 to 2.6. Our choice
    density_logit_mean: float = 0.0  # of the parent strand before division. Our choice
    density_logit_mean_sd: float = 2.0
    density_logit_spread_sd: float = 1.3  # as above
    de_novo: float = 0.07  # median; Fu et al. 2010, abstract, daughter strand
    de_novo_logit_sd: float = 1.5  # 95 % from .004 to .59
    failed_conversion: float = 0.004  # median; Laird et al. 2004, table 1
    failed_conversion_logit_sd: float = 0.5
    inappropriate_conversion: float = 0.016  # median; Fu et al. 2010, abstract
    inappropriate_conversion_logit_sd: float = 0.5  # their 80 % interval, .009 to .023, is of about .4


RATES = {  # largest value; beyond a half, reads would tell the opposite of what they say
    "de_novo_parent": 1.0,
    "de_novo_daughter": 1.0,
    "failed_conversion": 0.5,
    "inappropriate_conversion": 0.5,
}
PRIORS = {name: name for name in RATES} | {"de_novo_parent": "de_novo", "de_novo_daughter": "de_novo"}
ERRORS = ("failed_conversion", "inappropriate_conversion")


def log_reads(pairs: Tensor, failed: Tensor, inappropriate: Tensor) -> Tensor:
    """Log probability of what is read of a pair of cytosines, the true states summed out.

    Args:
        pairs: probability of the true (parent, daughter), (*lead, site, 2, 2).
        failed: b, (*lead).
        inappropriate: c, (*lead).

    Returns:
        (*lead, site, 3, 3): parent and daughter each read 0, read 1, not read.
    """
    ones = torch.ones_like(failed)
    unmethylated = torch.stack([1 - failed, failed, ones], -1)
    methylated = torch.stack([inappropriate, 1 - inappropriate, ones], -1)
    error = torch.stack([unmethylated, methylated], -2).unsqueeze(-3)
    read = error.mT @ pairs @ error
    return read.clamp_min(torch.finfo(read.dtype).tiny).log()


def pairs_of(m: Tensor, mu: Tensor, delta_p: Tensor, delta_d: Tensor) -> Tensor:
    """Probability of the true (parent, daughter) after division, (*lead, site, 2, 2).

    Args:
        m: log odds of it, (*lead, site).
        mu: log odds of it, (*lead, site).
        delta_p: probability, (*lead).
        delta_d: probability, (*lead).
    """
    parent, daughter = (torch.stack([1 - x, x], -1).unsqueeze(-2) for x in (delta_p, delta_d))
    anew = (-m).sigmoid()[..., None, None] * parent.unsqueeze(-1) * daughter.unsqueeze(-2)
    kept = m.sigmoid().unsqueeze(-1) * torch.stack([(-mu).sigmoid(), mu.sigmoid()], -1)
    return anew + torch.stack([torch.zeros_like(kept), kept], -2)


class Hairpins(TorchDistribution):
    """Reads (site, 2) of molecules, of which either strand may be the parent.

    Args:
        log_read: as ``log_reads`` gives it, (*lead, site, 3, 3); lead ends in 1, for the molecules, or is ().
        first_is_parent: probability that the first strand is the parent, (molecule).
        there: False where a read is missing, (molecule, site, 2); None if all are there.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support: ClassVar[constraints.Constraint] = constraints.independent(constraints.boolean, 2)

    def __init__(
        self,
        log_read: Tensor,
        first_is_parent: Tensor,
        there: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.log_read, self.first_is_parent, self.there = log_read, first_is_parent, there
        batch_shape = torch.broadcast_shapes(log_read.shape[:-3], first_is_parent.shape)
        super().__init__(batch_shape, torch.Size((log_read.shape[-3], 2)), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Hairpins:
        """The same distribution over a larger batch."""
        first = self.first_is_parent.expand(batch_shape)
        return Hairpins(self.log_read, first, self.there, validate_args=False)

    def by_parent(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log probability of reads with the first and with the second strand as parent, each (*batch)."""
        state = value.long()
        if self.there is not None:
            state = torch.where(self.there, state, 2)
        first, second = state.unbind(-1)
        # The ninth is the pair of which nothing is read.
        table = self.log_read.flatten(-2)[..., :8].flatten(-2)

        def total(parent: Tensor, daughter: Tensor) -> Tensor:
            found = functional.one_hot(3 * parent + daughter, 9)[..., :8].flatten(-2).to(table.dtype)
            return (found * table).sum(-1)

        log_p, log_q = self.first_is_parent.log(), torch.log1p(-self.first_is_parent)
        return log_p + total(first, second), log_q + total(second, first)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of reads (*batch, site, 2), the parent summed out."""
        return torch.logaddexp(*self.by_parent(value))

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Reads of molecules; none is missing."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            first = torch.bernoulli(self.first_is_parent.expand(shape))[..., None, None].bool()
            read = dist.Categorical(logits=self.log_read[..., :2, :2].flatten(-2))
            code = read.expand(torch.Size((*shape, self.event_shape[0]))).sample()
            parent, daughter = code // 2, code % 2
            either = torch.stack([parent, daughter], -1), torch.stack([daughter, parent], -1)
            return torch.where(first, *either).to(self.log_read.dtype)


def rate(log_odds: Tensor, most: float) -> Tensor:
    """A probability below ``most``, from log odds of its share of that."""
    return most * log_odds.sigmoid()


def sample_rate(name: str, prior: Prior, like: Tensor) -> Tensor:
    """The site of one rate: its log odds are normal."""
    centre, sd = log_odds_of(name, prior)
    log_odds = pyro.sample(f"{name}_logit", dist.Normal(centre + like, sd))
    return pyro.deterministic(f"{name}_prob", rate(log_odds, RATES[name]))


def log_odds_of(name: str, prior: Prior) -> tuple[float, float]:
    """Mean and sd of the log odds of a rate's share of its largest value."""
    share = getattr(prior, PRIORS[name]) / RATES[name]
    return math.log(share / (1 - share)), getattr(prior, f"{PRIORS[name]}_logit_sd")


def sample_scatter(name: str, sd: float, like: Tensor) -> Tensor:
    """Scatter, softplus(spread) with spread ~ Normal(0, sd).

    Few sites leave it open whether there is any scatter: its posterior is then far from normal in its log,
    of which zero is the infinite end, and near to it in spread.
    """
    spread = pyro.sample(f"{name}_spread", dist.Normal(like, sd))
    return pyro.deterministic(f"{name}_scatter", functional.softplus(spread))


def sample_maintenance(prior: Prior, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scatter over sites of the log odds of maintenance."""
    mean = pyro.sample("logit_mean", dist.Normal(prior.logit_mean + like, prior.logit_mean_sd))
    scatter = sample_scatter("logit", prior.logit_spread_sd, like)
    pyro.deterministic("median_maintenance_prob", mean.sigmoid())
    return mean, scatter


def model(batch: Batch, prior: Prior, nets: nn.Module | None, *, stationary: bool) -> None:
    """The generative story of the module's docstring, molecule by molecule."""
    zero = batch.first_is_parent_prob.new_zeros(())
    zeros = zero.expand(batch.sizes["site"])
    mean, scatter = sample_maintenance(prior, zero)
    rates = {name: sample_rate(name, prior, zero) for name in RATES}
    delta_p, delta_d = rates["de_novo_parent"], rates["de_novo_daughter"]
    if stationary:
        # Reads tell m well, and m tells mu: the data fix mu itself, and not its place among the sites.
        each = dist.Normal(mean.unsqueeze(-1) + zeros, scatter.unsqueeze(-1))
        mu = pyro.sample("logit_maintenance", each.to_event(1))
        m = (delta_p + delta_d).log().unsqueeze(-1) - functional.logsigmoid(-mu)
    else:
        z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
        mu = mean.unsqueeze(-1) + scatter.unsqueeze(-1) * z
        level = dist.Normal(prior.density_logit_mean + zero, prior.density_logit_mean_sd)
        centre = pyro.sample("density_logit_mean", level)
        width = sample_scatter("density_logit", prior.density_logit_spread_sd, zero)
        each = dist.Normal(centre.unsqueeze(-1) + zeros, width.unsqueeze(-1))
        m = pyro.sample("logit_density", each.to_event(1))
    pyro.deterministic("maintenance_prob", mu.sigmoid(), event_dim=1)
    pyro.deterministic("density_prob", m.sigmoid(), event_dim=1)
    log_read = log_reads(pairs_of(m, mu, delta_p, delta_d), *(rates[name] for name in ERRORS))
    with batch.plate("molecule"):
        reads = Hairpins(log_read, batch.first_is_parent_prob, batch.observed_mask.get("methylated"))
        # Not by batch.observe, which would drop a whole molecule for one missing read.
        seen = pyro.sample("methylated", reads, obs=None if batch.predicting else batch.methylated)
        first, second = reads.by_parent(seen)
        pyro.deterministic("parent_is_first_prob", (first - second).sigmoid())


def model_in_vitro(batch: Batch, prior: Prior, nets: nn.Module | None) -> None:
    """The same with m = 1: a parent is methylated, whatever is read of it, its daughter by maintenance."""
    zero = batch.methylated.new_zeros(())
    mean, scatter = sample_maintenance(prior, zero)
    failed, inappropriate = (sample_rate(name, prior, zero) for name in ERRORS)
    with batch.plate("site"):
        mu = pyro.sample("logit_maintenance", dist.Normal(mean, scatter))
        pyro.deterministic("maintenance_prob", mu.sigmoid())
        daughter = mu.sigmoid() * (1 - inappropriate) + (-mu).sigmoid() * failed
        read = torch.stack(torch.broadcast_tensors(1 - inappropriate, daughter), -1)
        read = read.unsqueeze(-2).expand(*read.shape[:-1], batch.sizes["molecule"], 2)
        batch.observe("methylated", dist.Bernoulli(read).to_event(2))


class Nets(nn.Module):
    """The guide's own for ``in_vitro``: a joint normal of the globals and a small network of all sites."""

    def __init__(self, population: guides.JointNormalGuide) -> None:
        super().__init__()
        self.globals = population
        self.correct = perceptron(3, 4, (16,), last=0.1)


def nets(sizes: Mapping[str, int], prior: Prior) -> Nets:
    """They start at the prior's centre."""
    start = {"logit_mean": prior.logit_mean, "logit_spread": 0.0}
    start |= {f"{name}_logit": log_odds_of(name, prior)[0] for name in ERRORS}
    values = {name: torch.tensor(value) for name, value in start.items()}
    return Nets(guides.global_normal(dict.fromkeys(start, constraints.real), values))


def guide_in_vitro(batch: Batch, prior: Prior, nets: Nets) -> None:
    """Joint normal for the globals; skewed Laplace for each site given them."""
    values = nets.globals(batch)
    mean, scatter = values["logit_mean"], functional.softplus(values["logit_spread"])
    failed, inappropriate = (rate(values[f"{name}_logit"], RATES[name]) for name in ERRORS)
    with torch.no_grad():
        mask = batch.observed_mask.get("methylated")
        there = torch.ones_like(batch.methylated) if mask is None else mask.to(batch.methylated)
        n = there[..., 1].sum(-1)
        k = (there * batch.methylated)[..., 1].sum(-1)
        span = 1 - failed - inappropriate

        def derivatives(point: Tensor) -> tuple[Tensor, Tensor]:
            mu = point.squeeze(-1)
            p = failed + span * mu.sigmoid()
            slope = span * mu.sigmoid() * (-mu).sigmoid()
            gradient = (k / p - (n - k) / (1 - p)) * slope - (mu - mean) / scatter.square()
            precision = n * slope.square() / (p * (1 - p)) + scatter.pow(-2)
            return gradient.unsqueeze(-1), precision[..., None, None]

        start = (n * torch.logit((k + 0.5) / (n + 1)) + 4 * mean) / (n + 4)  # a read tells about a quarter
        mode, tril = (x.squeeze(-1) for x in normals.laplace(derivatives, start.unsqueeze(-1), steps=8))
        sd = tril.squeeze(-1)
        lean = (mode - mean) / scatter
        seen = torch.stack([(sd / scatter).clamp(max=1.0), lean.clamp(-4, 4), (mode / 4).clamp(-2, 2)], -1)
    size = sd.clamp(max=1.0).unsqueeze(-1)  # the corrections vanish as reads grow
    shift, widen, skew, tail = (nets.correct(seen) * size).clamp(-2, 2).unbind(-1)
    with batch.plate("site"):
        noise = dist.Normal(torch.zeros_like(sd), torch.ones_like(sd))
        bend = normals.SinhArcsinh(skew, tail.exp())
        carry = dist.transforms.AffineTransform(mode + shift * sd, sd * widen.exp(), cache_size=1)
        pyro.sample("logit_maintenance", dist.TransformedDistribution(noise, [bend, carry]))


def changes(reads: xr.DataArray) -> xr.DataArray:
    """Share of neighbouring sites of a strand that are read differently.

    Fewer in the data than in replicated ones: sites of a molecule are alike, and intervals are too narrow.

    Args:
        reads: 0, 1 and NaN, with the dims site, molecule, strand; others, such as draw, are kept.
    """
    return abs(reads.diff("site")).mean(("site", "molecule", "strand"))


def two_strands(values: Mapping[str, np.ndarray], coords: Mapping[str, np.ndarray]) -> list[str]:
    """Fault of a table whose dim strand has not two entries."""
    n = len(coords["strand"])
    if n == 2:
        return []
    return [f'dim "strand" has {n} entries; a molecule has 2. Give both; what was not read is missing (NaN)']


def simulate(
    sizes: Mapping[str, int], prior: Prior, generator: torch.Generator, *, stationary: bool, in_vitro: bool
) -> tuple[xr.Dataset, xr.Dataset]:
    """Molecules of a population that is drawn from the prior, and the truth; a tenth of the reads is missing.

    Args:
        sizes: "molecule" and "site".
        prior: all of it.
        generator: its seed is that of the numbers drawn here, by numpy.
        stationary: as in ``make``.
        in_vitro: as in ``make``; no parent is read.
    """
    rng = np.random.default_rng(generator.initial_seed())
    n, j = sizes["molecule"], sizes["site"]

    def expit(x: np.ndarray | float) -> np.ndarray:
        return 1 / (1 + np.exp(-np.asarray(x)))

    def drawn(name: str) -> np.ndarray:
        centre, sd = log_odds_of(name, prior)
        return RATES[name] * expit(rng.normal(centre, sd))

    mean = rng.normal(prior.logit_mean, prior.logit_mean_sd)
    scatter = np.logaddexp(0, rng.normal(0, prior.logit_spread_sd))
    mu = expit(rng.normal(mean, scatter, j))
    truth = {"logit_mean": ((), mean), "logit_scatter": ((), scatter), "maintenance_prob": (("site",), mu)}
    truth["median_maintenance_prob"] = ((), expit(mean))
    rates = {name: drawn(name) for name in (ERRORS if in_vitro else RATES)}
    truth |= {f"{name}_prob": ((), value) for name, value in rates.items()}
    delta_p, delta_d = rates.get("de_novo_parent", 0.0), rates.get("de_novo_daughter", 0.0)
    if in_vitro:
        m = np.ones(j)
    elif stationary:
        m = (delta_p + delta_d) / (1 - mu + delta_p + delta_d)
    else:
        centre = rng.normal(prior.density_logit_mean, prior.density_logit_mean_sd)
        wide = np.logaddexp(0, rng.normal(0, prior.density_logit_spread_sd))
        m = expit(rng.normal(centre, wide, j))
        truth |= {"density_logit_mean": ((), centre), "density_logit_scatter": ((), wide)}
    before = rng.random((n, j)) < m
    parent = before | (rng.random((n, j)) < delta_p)
    daughter = rng.random((n, j)) < np.where(before, mu, delta_d)
    true = np.stack([parent, daughter], -1)
    failed, inappropriate = (rates[name] for name in ERRORS)
    read = (rng.random(true.shape) < np.where(true, 1 - inappropriate, failed)).astype(float)
    read[rng.random(read.shape) < 0.1] = np.nan
    coords = {"molecule": np.arange(n), "strand": ["first", "second"], "site": np.arange(j)}
    if in_vitro:
        read[..., 0] = np.nan
    else:
        swapped = rng.random(n) < 0.5
        read[swapped] = read[swapped, :, ::-1]
        truth |= {"density_prob": (("site",), m)}
    table = xr.Dataset({"methylated": (("molecule", "site", "strand"), read)}, coords)
    return table, xr.Dataset(truth, {"site": coords["site"]})


def make(*, stationary: bool = False, in_vitro: bool = False, prior: Prior | None = None) -> Template:
    """A template of hairpin reads.

    Args:
        stationary: the density of methylation before division is the one that division leaves unchanged; it
            makes for much narrower intervals of the de novo rates, if it is true.
        in_vitro: every parent strand is methylated, and is the first; the second was made in the tube.
        prior: numbers of the model.

    Raises:
        ValueError: ``stationary`` and ``in_vitro`` exclude each other.

    Notes:
        In vitro the fit is as good as exact. Otherwise the unknown parents couple all sites, and the guide is
        one normal of all latents, which makes logit_scatter too narrow: of 169 molecules with 22 sites (human
        FMR1) its sd was half of that by NUTS, and the others .74 to 1.1 of it. The report tells so; take
        ``scivi.nuts`` for the final word, which has minutes to do. Of the plans tried, estimator="stl" with
        8 particles, lr=2e-2 and rows_per_batch=None came nearest.
    """
    if stationary and in_vitro:
        raise ValueError(
            "in_vitro has methylated parents only, which no rates of division keep so; choose one."
        )
    dims: dict[str, tuple[str, ...]] = {
        "maintenance_prob": ("site",),
        "median_maintenance_prob": (),
        "logit_mean": (),
        "logit_scatter": (),
    }
    dims |= {f"{name}_prob": () for name in (ERRORS if in_vitro else RATES)}
    if not in_vitro:
        dims |= {"density_prob": ("site",), "parent_is_first_prob": ("molecule",)}
        dims |= {} if stationary else {"density_logit_mean": (), "density_logit_scatter": ()}
    order = ("site", "molecule", "strand") if in_vitro else ("molecule", "site", "strand")
    doc = "1 if read as methylated (unconverted), 0 if not; missing where not read"
    fields = {"methylated": Field(order, "observed", constraints.boolean, doc=doc)}
    if not in_vitro:
        doc = "probability that the first strand is the parent: 1 or 0 where it is known"
        fields["first_is_parent_prob"] = Field(
            ("molecule",), "given", constraints.unit_interval, doc=doc, default=0.5
        )
    return Template(
        name="hairpins" + (", in vitro" if in_vitro else ", stationary" if stationary else ""),
        fields=fields,
        rows="site" if in_vitro else "molecule",
        model=model_in_vitro if in_vitro else partial(model, stationary=stationary),
        dims=dims,
        guide=guide_in_vitro if in_vitro else guides.JointNormal(),
        nets=nets if in_vitro else None,
        prior=prior or Prior(),
        simulate=partial(simulate, stationary=stationary, in_vitro=in_vitro),
        units={"logit_mean": "logit", "logit_scatter": "logit"},
        validate=two_strands,
    )


template = make()
stationary = make(stationary=True)
in_vitro = make(in_vitro=True)
