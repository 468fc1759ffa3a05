"""Counts in a source and a background aperture: what every template made of such pairs shares.

A source has K pairs of apertures: one in each band, or one at each epoch. For source i and pair k, with log
brightness u (natural log of a flux in the unit that ``exposure`` is per) and log background v (natural log of
the expected background counts in the source aperture):

    u_i      ~ Normal(mu, tril tril')
    v_ik     ~ Normal(background_mu_k, background_sigma_k)
    n_on_ik  ~ Poisson(E_ik f_ik exp(u_ik) + exp(v_ik))
    n_off_ik ~ Poisson(exp(v_ik) / alpha_ik + E_ik g_ik exp(u_ik))

E is exposure x effective area (counts per unit flux), f and g are the fractions of the point-spread function
inside the source and the background aperture, alpha is the ratio of source to background area (exposure
included). A template says what mu and tril are.

Three treatments of the background: "hierarchical" learns its distribution (above), "flat" puts a flat prior
on each exp(v) >= 0 and sums it out exactly, "known" takes the field ``background``.

The guide is a normal at the Laplace approximation of each source, bent by sinh-arcsinh and corrected by a
small network on clamped features. The corrections are in units of the source's own posterior sd in ln(flux):
they vanish as counts grow and the Laplace approximation becomes exact, so that the guide stays right far
outside the range it was trained on.

References:
    Primini and Kashyap 2014, ApJ 796, 24, doi:10.1088/0004-637X/796/1/24 (apertures and background).
    Loredo 2004, AIP Conf. Proc. 735, 195, arXiv:astro-ph/0409387 (populations from counts with selection).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from scivi.inputs.fields import Field
from scivi.models import Batch, guides, normals
from scivi.models.distributions import PoissonOverBackground

Background = Literal["hierarchical", "flat", "known"]
VPrior = tuple[Tensor, Tensor, float]  # of v: mean, precision, slope of the log density
N_FEATURES, N_OUTPUTS = 12, 9  # per pair of apertures: what ``features`` gives, what ``guide`` takes


def fields(dim: str, background: Background) -> dict[str, Field]:
    """The columns of a table of aperture counts.

    Args:
        dim: what tells the pairs of a source apart, such as "band".
        background: "flat" conditions on ``n_off``, "known" takes ``background`` in its place.
    """
    dims = ("source", dim)
    whole = constraints.nonnegative_integer
    positive = constraints.positive
    nonnegative = constraints.nonnegative
    off = Field(dims, "observed", whole, "ct", "counts in the background aperture")
    found = {
        "n_on": Field(dims, "observed", whole, "ct", "counts in the source aperture"),
        "n_off": replace(off, role="given") if background == "flat" else off,
        "alpha": Field(dims, "given", positive, "1", "source over background area x exposure"),
        "exposure": Field(dims, "given", positive, "ct / flux", "counts per unit flux", default=1.0),
        "source_fraction": Field(dims, "given", positive, "1", "PSF in source aperture", default=1.0),
        "spill_fraction": Field(dims, "given", nonnegative, "1", "PSF in background aperture", default=0.0),
    }
    if background == "known":
        del found["n_off"]
        found["background"] = Field(dims, "given", positive, "ct", "expected background in source aperture")
    return found


@dataclass(frozen=True)
class Population:
    """The globals, as the rows need them; K pairs of apertures in a source.

    Args:
        mu: mean log brightness, ln flux, (*, K).
        tril: lower Cholesky factor of its covariance, ln flux, (*, K, K).
        background_mu: mean log background, ln ct, (*, K); None unless the background is "hierarchical".
        background_sigma: scatter of it, ln ct, (*, K); None likewise.
    """

    mu: Tensor
    tril: Tensor
    background_mu: Tensor | None
    background_sigma: Tensor | None

    @property
    def sigma(self) -> Tensor:
        """Scatter of the log brightness, (*, K)."""
        return self.tril.square().sum(-1).sqrt()

    @property
    def background(self) -> tuple[Tensor, Tensor]:
        """Mean and scatter of the log background, which "hierarchical" learns; the others have none."""
        return cast(tuple[Tensor, Tensor], (self.background_mu, self.background_sigma))


def normal(mu: Tensor, tril: Tensor) -> dist.TorchDistribution:
    """Normal with mean ``mu`` (*, K) and Cholesky factor ``tril`` (*, K, K), event (K,)."""
    if mu.shape[-1] == 1:
        return dist.Normal(mu, tril[..., 0]).to_event(1)
    return dist.MultivariateNormal(mu, scale_tril=tril)


def observe(batch: Batch, u: Tensor, pop: Population, background: Background, cut: int = 0) -> None:
    """Score the counts of each source; to be called within the plate of the sources.

    Args:
        batch: the rows, with the fields of ``fields``.
        u: log brightness, ln flux, (*, source, K).
        pop: the population.
        background: as in ``fields``.
        cut: fewest counts in the first pair with which a source is in the table at all; the chance of that is
            divided out. 0 for no cut.
    """
    source = batch.exposure * batch.source_fraction * u.exp()
    if background == "flat":
        counts = PoissonOverBackground(source, batch.n_off + 1, 1 / batch.alpha)
        batch.observe("n_on", counts.to_event(1))
        return
    if background == "hierarchical":
        level = pyro.sample("log_background", dist.Normal(*pop.background).to_event(1)).exp()
    else:
        level = batch.background
    batch.observe("n_on", dist.Poisson(source + level).to_event(1))
    if background == "hierarchical":
        spill = batch.exposure * batch.spill_fraction * u.exp()
        batch.observe("n_off", dist.Poisson(level / batch.alpha + spill).to_event(1))
    if cut:
        pyro.factor("selection", -_log_detected(batch, pop, cut))


def _log_detected(batch: Batch, pop: Population, cut: int) -> Tensor:
    """Log P(n_on >= cut in the first pair | population), each source, by Gauss-Hermite quadrature."""
    x, w, y, q = (
        torch.as_tensor(a, dtype=batch.alpha.dtype, device=batch.alpha.device)
        for n_nodes in (15, 7)
        for a in np.polynomial.hermite_e.hermegauss(n_nodes)
    )
    u = pop.mu[..., 0, None] + pop.sigma[..., 0, None] * x
    rate = (batch.exposure * batch.source_fraction)[..., 0, None] * u.exp()
    if pop.background_mu is None or pop.background_sigma is None:
        p = torch.special.gammainc(torch.full_like(rate, cut), rate + batch.background[..., 0, None])
        return (p * (w / w.sum())).sum(-1).log()
    level = (pop.background_mu[..., 0, None] + pop.background_sigma[..., 0, None] * y).exp()
    total = rate.unsqueeze(-1) + level.unsqueeze(-2)
    p = torch.special.gammainc(torch.full_like(total, cut), total)
    return (p * (w / w.sum()).unsqueeze(-1) * (q / q.sum())).sum((-1, -2)).log()


@dataclass(frozen=True)
class Counts:
    """A batch's counts and constants for one evaluation, each (source, K); missing counts weigh nothing.

    Args:
        n, m: counts in the source and the background aperture, ct, 0 where missing.
        on, off: 1 where they are there, 0 where they are missing or not scored.
        gain, spill: counts per unit flux in the source and the background aperture, ct / flux.
        alpha: source over background area x exposure.
    """

    n: Tensor
    m: Tensor
    on: Tensor
    off: Tensor
    gain: Tensor
    spill: Tensor
    alpha: Tensor


def counts_of(batch: Batch, background: Background) -> Counts:
    """The counts of a batch under a treatment of the background."""

    def weight(name: str) -> Tensor:
        mask = batch.observed_mask.get(name)
        return torch.ones_like(batch.alpha) if mask is None else mask.to(batch.alpha.dtype)

    none = torch.zeros_like(batch.alpha)
    m, off = (none, none) if background == "known" else (batch.n_off, weight("n_off"))
    gain, spill = batch.exposure * batch.source_fraction, batch.exposure * batch.spill_fraction
    on = weight("n_on")
    return Counts(batch.n_on * on, m * off, on, off, gain, spill, batch.alpha)


def background_start(
    batch: Batch, pop: Population, c: Counts, background: Background
) -> tuple[Tensor, VPrior]:
    """Where a search for the modes starts in v (source, K), and the prior of v."""
    ones = torch.ones_like(pop.mu)
    if background == "known":
        level = batch.background.log()
        return level + 0 * c.n, (level, 1e8 * ones, 0.0)
    if background == "hierarchical":
        floor, sigma = pop.background
        v_prior = (floor, sigma.pow(-2), 0.0)
    else:
        v_prior = (0 * ones, 1e-6 * ones, 1.0)  # a flat density in exp(v) is exp(v) in v
        floor = -2 * ones
    return torch.where(c.off * c.m > 0, torch.log((c.m + 0.5) * c.alpha), floor), v_prior


class Slopes(NamedTuple):
    """Derivatives of a source's log density in (u, v), without the prior of u; each (*, K).

    ``gu`` and ``gv`` are the gradient, ``huu``, ``hvv`` and ``huv`` the negative Hessian, in which a pair of
    apertures touches no other.
    """

    gu: Tensor
    gv: Tensor
    huu: Tensor
    hvv: Tensor
    huv: Tensor


def slopes(u: Tensor, v: Tensor, c: Counts, pop: Population, v_prior: VPrior) -> Slopes:
    """Derivatives at log brightness ``u`` and log background ``v``, both (*, K).

    Where the observed curvature of a pair is not positive definite beside the weakest that the prior can add,
    the expected one stands in. (A covariance is at most K times its diagonal, so the prior adds at least
    sigma**-2 / K.)
    """
    v_mean, v_precision, v_slope = v_prior
    s, b, g, o = c.on * c.gain * u.exp(), c.on * v.exp(), c.off * c.spill * u.exp(), c.off * v.exp() / c.alpha
    on, off = (s + b).clamp_min(1e-30), (g + o).clamp_min(1e-30)
    a, d = c.n / on, c.m / off
    gu = a * s - s + d * g - g
    gv = a * b - b + d * o - o - (v - v_mean) * v_precision + v_slope
    cross = a * s * b / on + d * g * o / off
    huu, hvv, huv = s + g - cross, b + o - cross, cross
    least = pop.sigma.pow(-2) / u.shape[-1]
    hvv_all = hvv + v_precision
    bad = (hvv_all <= 0) | (
        (huu + least) * hvv_all - huv.square() <= 1e-4 * (huu.abs() + least) * hvv_all.abs()
    )
    huu = torch.where(bad, s * s / on + g * g / off, huu)
    hvv = torch.where(bad, b * b / on + o * o / off, hvv) + v_precision
    huv = torch.where(bad, s * b / on + g * o / off, huv)
    return Slopes(gu, gv, huu, hvv, huv)


class Laplace(NamedTuple):
    """Normal approximation of each source: v given u is independent from pair to pair.

    Args:
        u, v: mode, ln flux and ln ct, (*, K).
        u_tril: lower Cholesky factor of the covariance of u, (*, K, K).
        v_sd: standard deviation of v given u, (*, K).
        slope: change of the mean of v with u, (*, K).
    """

    u: Tensor
    v: Tensor
    u_tril: Tensor
    v_sd: Tensor
    slope: Tensor


Base = Callable[[Batch, Population, Counts, Background], Laplace]


def by_precision(batch: Batch, pop: Population, c: Counts, background: Background) -> Laplace:
    """Laplace approximation, by way of the inverse of the population's covariance.

    For a covariance far from singular: the rest is lost to rounding.
    """
    k = pop.mu.shape[-1]
    precision = torch.cholesky_inverse(pop.tril) if k > 1 else pop.tril.square().reciprocal()
    v, v_prior = background_start(batch, pop, c, background)
    net = c.n - v.exp()
    faint = net < 5
    u = torch.where(faint & (net < 0.5), pop.mu + 0 * net, torch.log(net.clamp_min(0.5) / c.gain))
    u = torch.where(faint, 0.5 * (u + pop.mu), u)

    def derivatives(point: Tensor) -> tuple[Tensor, Tensor]:
        u, v = point.chunk(2, -1)
        d = slopes(u, v, c, pop, v_prior)
        gu = d.gu - ((u - pop.mu).unsqueeze(-2) @ precision).squeeze(-2)
        top = torch.cat([torch.diag_embed(d.huu) + precision, torch.diag_embed(d.huv)], -1)
        bottom = torch.cat([torch.diag_embed(d.huv), torch.diag_embed(d.hvv)], -1)
        return torch.cat([gu, d.gv], -1), torch.cat([top, bottom], -2)

    start = torch.cat(torch.broadcast_tensors(u, v), -1)
    mode, tril = normals.laplace(derivatives, start, steps=6)
    u_tril, v_sd = tril[..., :k, :k], tril[..., k:, k:].diagonal(dim1=-2, dim2=-1)
    slope = tril[..., k:, :k].diagonal(dim1=-2, dim2=-1) / u_tril.diagonal(dim1=-2, dim2=-1)
    return Laplace(mode[..., :k], mode[..., k:], u_tril, v_sd, slope)


def features(at: Laplace, pop: Population, c: Counts) -> Tensor:
    """Features of a source (*, N_FEATURES x K), feature by feature, each clamped.

    Beyond the range of training the correction stays what it was.
    """
    u, v, v_sd = at.u, at.v, at.v_sd
    u_sd = at.u_tril.square().sum(-1).sqrt()
    source, level = c.gain * u.exp(), v.exp()
    if pop.background_mu is not None and pop.background_sigma is not None:
        v_place = (v - pop.background_mu) / pop.background_sigma
    else:
        v_place = v / 2
    n, m = c.n.clamp(max=600.0), c.m.clamp(max=600.0)
    share = source / (source + level)
    third = c.n * share * (1 - share)  # third derivatives of the log density, which set the skew
    parts = [
        ((third * (1 - 2 * share) - source) * u_sd**3).clamp(-2, 2),
        ((third * (2 * share - 1) - level - level / c.alpha) * v_sd**3).clamp(-2, 2),
        ((u - pop.mu) / pop.sigma).clamp(-4, 4),
        (u_sd / pop.sigma).log().clamp(-5, 0.5) + 1,
        v_place.clamp(-4, 4),
        v_sd.log().clamp(-4, 1) + 1,
        at.slope.clamp(-3, 0),
        torch.log1p(n) - 2,
        torch.log1p(m) - 2,
        (n + 0.375).sqrt() / 3 - 1,
        source.log().clamp(-3, 6.4) / 2,
        share,
    ]
    return torch.cat(torch.broadcast_tensors(*parts), -1)


class Nets(nn.Module):
    """The guide's own: one joint normal for the population, one small network for all sources.

    Args:
        population: the joint normal.
        correct: from features (*, N_FEATURES x K) to corrections (*, N_OUTPUTS x K).
    """

    def __init__(self, population: guides.JointNormalGuide, correct: nn.Module) -> None:
        super().__init__()
        self.globals, self.correct = population, correct


def guide(
    batch: Batch, nets: Nets, pop: Population, *, background: Background, base: Base = by_precision
) -> None:
    """Skewed Laplace for each source given the population.

    Args:
        batch: the rows.
        nets: whose ``correct`` is used.
        pop: the population, drawn from the guide before.
        background: as in ``fields``.
        base: what finds the Laplace approximation.
    """
    with torch.no_grad():
        c = counts_of(batch, background)
        at = base(batch, pop, c, background)
        u0, v0, u_tril, v_sd, slope = at
        u_sd = u_tril.square().sum(-1).sqrt()
        u_size, v_size = (sd.clamp(max=1.0).unsqueeze(-2) for sd in (u_sd, v_sd))
        seen = features(at, pop, c)
    out = nets.correct(seen).unflatten(-1, (N_OUTPUTS, u0.shape[-1]))
    shift, widen, skew, tail = (out[..., :4, :] * u_size).clamp(-2, 2).unbind(-2)
    v_shift, v_widen, v_bend, v_skew, v_tail = (out[..., 4:, :] * v_size).clamp(-2, 2).unbind(-2)
    with batch.plate("source"):
        tril = u_tril * widen.exp().unsqueeze(-2)
        u = pyro.sample("log_brightness", normals.skew_normal(u0 + shift * u_sd, tril, skew, tail.exp()))
        if background == "hierarchical":
            centre = v0 + v_shift * v_sd + (slope + v_bend) * (u - u0)
            v_tril = torch.diag_embed(v_sd * v_widen.exp())
            pyro.sample("log_background", normals.skew_normal(centre, v_tril, v_skew, v_tail.exp()))
