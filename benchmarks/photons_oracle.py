"""Exact posteriors of the photon-count population, by quadrature in float64 and without the engine.

Generative story, per source, one band, hierarchical background:

    u ~ Normal(mu, sigma)                         log brightness
    v ~ Normal(background_mu, background_sigma)   log of the background counts in the source aperture
    n_on ~ Poisson(exposure * exp(u) + exp(v))
    n_off ~ Poisson(exp(v) / alpha)

The four globals are handled in unconstrained coordinates, theta = (mu, log sigma, background_mu,
log background_sigma). Given theta the sources are independent and each has two latents, so that

    log p(data | theta) = sum_i log integral p(n_on_i, n_off_i, u, v | theta) du dv

is a sum of two-dimensional integrals, taken on Gauss-Hermite nodes at each source's own posterior mean and
covariance. Its gradient and Hessian follow from posterior moments of u and v (Louis's identity), without
automatic differentiation.

References:
    Naylor & Smith 1982, Applied Statistics 31, 214-225 (nodes at posterior mean and covariance).
    Louis 1982, JRSS B 44, 226-233, eq. 3.2 (observed information from complete-data moments).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

GLOBALS = ("mu", "log_sigma", "background_mu", "log_background_sigma")
# Our choice: bright and faint sources both common, 13 % with 0-2 counts, background of about one count.
TRUTH = torch.tensor([2.1, math.log(1.2), 0.0, math.log(0.6)], dtype=torch.float64)


@dataclass(frozen=True)
class Catalogue:
    """Sources as float64 columns, dims (source,); `u` and `v` are the values that made the counts."""

    n_on: Tensor
    n_off: Tensor
    log_exposure: Tensor
    log_alpha: Tensor
    u: Tensor
    v: Tensor
    row: Tensor

    def __len__(self) -> int:
        """Count the sources."""
        return len(self.n_on)

    def __getitem__(self, index: Tensor | slice) -> Catalogue:
        """Take some sources; `row` remembers where they stood."""
        return Catalogue(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class Prior:
    """Prior of the globals: normal means about 0, half-normal scales; defaults as in the photon template."""

    mu_sd: float = 5.0
    sigma_scale: float = 2.0
    background_mu_sd: float = 5.0
    background_sigma_scale: float = 1.0

    def log_density(self, theta: Tensor) -> Tensor:
        """Log density in unconstrained coordinates, so with the Jacobian of each log scale.

        Args:
            theta: the globals, dims (4,).
        """
        mean_sd = theta.new_tensor([self.mu_sd, self.background_mu_sd])
        scale = theta.new_tensor([self.sigma_scale, self.background_sigma_scale])
        mean, log_sigma = theta[0::2], theta[1::2]
        means = -0.5 * (mean / mean_sd).square() - mean_sd.log() - 0.5 * math.log(2 * math.pi)
        half_normal = -0.5 * (log_sigma.exp() / scale).square() - scale.log() + 0.5 * math.log(2 / math.pi)
        return (means + half_normal + log_sigma).sum()


def simulate(n: int, seed: int, log_rate: tuple[float, float] | None = None) -> Catalogue:
    """Draw sources from the population at `TRUTH`.

    log exposure ~ Normal(0, .5), alpha ~ Uniform(.02, .3): our choice, the spread of a Chandra field.

    Args:
        n: number of sources.
        seed: of the data alone.
        log_rate: if given, log(exposure * exp(u)) is uniform between these two numbers, not the population's.
    """
    random = np.random.default_rng(seed)
    mu, log_sigma, background_mu, log_background_sigma = TRUTH.tolist()
    u = random.normal(mu, math.exp(log_sigma), n)
    v = random.normal(background_mu, math.exp(log_background_sigma), n)
    log_exposure = random.normal(0.0, 0.5, n)
    alpha = random.uniform(0.02, 0.3, n)
    if log_rate is not None:
        u = random.uniform(*log_rate, n) - log_exposure
    n_on = random.poisson(np.exp(u + log_exposure) + np.exp(v))
    n_off = random.poisson(np.exp(v) / alpha)
    columns = (n_on, n_off, log_exposure, np.log(alpha), u, v)
    return Catalogue(*(torch.as_tensor(column, dtype=torch.float64) for column in columns), torch.arange(n))


def log_joint(u: Tensor, v: Tensor, rows: Catalogue, theta: Tensor) -> Tensor:
    """Log p(n_on, n_off, u, v | theta).

    Args:
        u: log brightness, dims (source, node).
        v: log background counts, dims (source, node).
        rows: the sources.
        theta: the globals, dims (4,).
    """
    n_on, n_off, log_exposure, log_alpha = (
        column[:, None] for column in (rows.n_on, rows.n_off, rows.log_exposure, rows.log_alpha)
    )
    background = v.exp()
    on = (u + log_exposure).exp() + background
    constant = -torch.lgamma(n_on + 1) - torch.lgamma(n_off + 1) - n_off * log_alpha - math.log(2 * math.pi)
    constant = constant - theta[1] - theta[3]
    prior = ((u - theta[0]) * (-theta[1]).exp()).square() + ((v - theta[2]) * (-theta[3]).exp()).square()
    return n_on * on.log() - on + n_off * v - background * (-log_alpha).exp() - 0.5 * prior + constant


def laplace(rows: Catalogue, theta: Tensor, iterations: int = 40) -> tuple[Tensor, Tensor]:
    """Find each source's joint mode of (u, v) by damped Newton, and the inverse of the Hessian there.

    Returns:
        Mode, dims (source, 2), and covariance, dims (source, 2, 2).
    """
    precision, background_precision = (-2 * theta[1]).exp(), (-2 * theta[3]).exp()
    net = (rows.n_on - rows.n_off * rows.log_alpha.exp()).clamp(min=0.5)
    u = (net * (net.log() - rows.log_exposure) + theta[0] * precision) / (net + precision)
    v = rows.n_off * ((rows.n_off + 0.5).log() + rows.log_alpha) + theta[2] * background_precision
    v = v / (rows.n_off + background_precision)
    for _ in range(iterations):
        source, background = (u + rows.log_exposure).exp(), v.exp()
        total, off = source + background, background * (-rows.log_alpha).exp()
        grad_u = rows.n_on * source / total - source - (u - theta[0]) * precision
        grad_v = rows.n_on * background / total - background - (v - theta[2]) * background_precision
        grad_v = grad_v + rows.n_off - off
        mixed = rows.n_on * source * background / total.square()
        h_uu, h_vv, h_uv = source - mixed + precision, background + off - mixed + background_precision, mixed
        # Where the Hessian is indefinite take the expected one (n_on replaced by its mean), which never is.
        poor = (h_uu <= 0) | (h_uu * h_vv - h_uv.square() <= 1e-6 * h_uu.abs() * h_vv.abs())
        h_uu = torch.where(poor, source.square() / total + precision, h_uu)
        h_vv = torch.where(poor, background.square() / total + off + background_precision, h_vv)
        h_uv = torch.where(poor, source * background / total, h_uv)
        determinant = h_uu * h_vv - h_uv.square()
        u = u + ((h_vv * grad_u - h_uv * grad_v) / determinant).clamp(-1.0, 1.0)
        v = v + ((h_uu * grad_v - h_uv * grad_u) / determinant).clamp(-1.0, 1.0)
    covariance = torch.stack([h_vv, -h_uv, -h_uv, h_uu], -1).reshape(-1, 2, 2) / determinant[:, None, None]
    return torch.stack([u, v], -1), covariance


@dataclass(frozen=True)
class Marginal:
    """log p(data | theta) with two derivatives, and each source's posterior mean and covariance of (u, v)."""

    value: float
    gradient: Tensor
    hessian: Tensor
    mean: Tensor
    covariance: Tensor


def marginal(
    rows: Catalogue, theta: Tensor, mean: Tensor, covariance: Tensor, nodes: int, chunk: int = 2000
) -> Marginal:
    """Integrate every source's (u, v) on nodes x nodes Gauss-Hermite points at given means and covariances.

    gradient = sum_i E[g_i], hessian = sum_i (E[H_i] + cov[g_i]), g and H the derivatives of the log joint.

    Args:
        rows: the sources.
        theta: the globals, dims (4,).
        mean: centres of the nodes, dims (source, 2).
        covariance: spread of the nodes, dims (source, 2, 2).
        nodes: number of points per dimension.
        chunk: sources at a time; memory is about 200 * chunk * nodes**2 bytes.
    """
    point, log_weight = _hermite(nodes)
    inverse_sigma, inverse_background_sigma = (-theta[1]).exp(), (-theta[3]).exp()
    value, gradient, hessian = 0.0, torch.zeros_like(theta), torch.zeros(4, 4, dtype=theta.dtype)
    means, covariances = [], []
    for some in torch.arange(len(rows)).split(chunk):
        root = torch.linalg.cholesky(covariance[some])
        offset = point @ root.mT
        u, v = (mean[some, None] + offset).unbind(-1)
        log_term = log_joint(u, v, rows[some], theta) + log_weight
        log_evidence = torch.logsumexp(log_term, 1)
        prob = (log_term - log_evidence[:, None]).exp_()
        a, b = (u - theta[0]) * inverse_sigma, (v - theta[2]) * inverse_background_sigma
        powers = torch.stack([torch.ones_like(a), a, a * a, b, b * b], 1)
        moments = (powers * prob[:, None]) @ powers.mT  # E[x_j x_k] for x = (1, a, a^2, b, b^2)
        value += float((log_evidence + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)).sum())
        first, second = _score_moments(moments, theta)
        gradient += first
        hessian += second
        scale = theta[1::2].exp()
        pair = moments[:, 1::2, 1::2] - moments[:, 0, 1::2, None] * moments[:, 0, None, 1::2]
        means.append(theta[0::2] + scale * moments[:, 0, 1::2])
        covariances.append(pair * scale[:, None] * scale)
    return Marginal(value, gradient, hessian, torch.cat(means), torch.cat(covariances))


def _hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Points of the product rule, dims (node, 2), and log(weight / standard normal weight function)."""
    x, weight = np.polynomial.hermite_e.hermegauss(nodes)
    point = torch.cartesian_prod(torch.as_tensor(x), torch.as_tensor(x))
    log_one = torch.as_tensor(np.log(weight) + 0.5 * x**2)
    return point, (log_one[:, None] + log_one).reshape(-1)


def _score_moments(moments: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sources of E[g] and E[H] + cov[g], from the moments of (1, a, a^2, b, b^2)."""
    unit = torch.ones_like(theta)
    unit[0::2] = (-theta[1::2]).exp()
    expected = moments[:, 0, 1:]
    covariance = moments[:, 1:, 1:] - expected[:, :, None] * expected[:, None, :]
    second = (unit[:, None] * covariance.sum(0)) * unit
    total = expected.sum(0)
    for at in (0, 2):
        second[at, at] -= len(moments) * unit[at].square()
        second[at, at + 1] -= 2 * total[at] * unit[at]
        second[at + 1, at] -= 2 * total[at] * unit[at]
        second[at + 1, at + 1] -= 2 * total[at + 1]
    shift = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64) * len(moments)
    return unit * total - shift, second


@dataclass(frozen=True)
class Population:
    """The posterior of the globals: mode, mean, covariance.

    `correction_sd` is how far (posterior sd, the largest of the globals) a last Newton step on twice as many
    nodes per dimension moved the mode; the error that is left is twenty times smaller.
    """

    mode: Tensor
    mean: Tensor
    covariance: Tensor
    newton_steps: int
    correction_sd: float

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviations of theta, dims (4,)."""
        return self.covariance.diagonal().sqrt()


def population(rows: Catalogue, log_prior: Callable[[Tensor], Tensor], nodes: int = 13) -> Population:
    """Find the posterior of the globals: Newton to the mode, then two orders of its expansion about the mode.

    In coordinates where the mode is 0 and the Hessian -I, T3 and T4 being the next derivatives of the log
    posterior,

        mean_i  = T3_ikk / 2
        cov_ij  = I + (T4_ijkk + T3_ikl T3_jkl + T3_ijk T3_kll) / 2

    T3 and T4 are central differences of exact Hessians. What is left out is of order n**-1.5 and n**-2.

    References:
        Tierney & Kadane 1986, JASA 81, 82-86 (orders of the expansion).
    """
    theta, at, steps = _mode(rows, log_prior, nodes)
    root = torch.linalg.cholesky(torch.linalg.inv(-(at.hessian + _derivatives(log_prior, theta)[2])))
    step = 0.5  # posterior sd; central differences err by step**2 times derivatives two orders up

    def whitened(point: Tensor) -> Tensor:
        hessian = marginal(rows, point, at.mean, at.covariance, nodes).hessian
        return root.T @ (hessian + _derivatives(log_prior, point)[2]) @ root

    centre = whitened(theta)
    up, down = ([whitened(theta + sign * step * column) for column in root.T] for sign in (1, -1))
    third = torch.stack([(plus - minus) / (2 * step) for plus, minus in zip(up, down, strict=True)], -1)
    fourth = sum((plus + minus - 2 * centre) / step**2 for plus, minus in zip(up, down, strict=True))
    trace = torch.einsum("ikk->i", third)
    loops = fourth + torch.einsum("ikl,jkl->ij", third, third) + torch.einsum("ijk,k->ij", third, trace)
    covariance = root @ (torch.eye(4, dtype=torch.float64) + 0.5 * loops) @ root.T
    finer = marginal(rows, theta, at.mean, at.covariance, 2 * nodes - 1)
    move = root.T @ (finer.gradient + _derivatives(log_prior, theta)[1])
    mode = theta + root @ move
    return Population(mode, mode + 0.5 * root @ trace, covariance, steps, float(move.abs().max()))


def _mode(rows: Catalogue, log_prior: Callable[[Tensor], Tensor], nodes: int) -> tuple[Tensor, Marginal, int]:
    """Newton with halving, from moments of crude estimates; nodes follow the sources' posteriors."""
    crude = (
        (rows.n_on - rows.n_off * rows.log_alpha.exp()).clamp(min=0.5).log() - rows.log_exposure,
        (rows.n_off + 0.5).log() + rows.log_alpha,
    )
    theta = torch.stack([f for x in crude for f in (x.mean(), x.std().clamp(min=0.1).log())])
    at = marginal(rows, theta, *laplace(rows, theta), nodes)
    for count in range(1, 31):
        prior_value, prior_gradient, prior_hessian = _derivatives(log_prior, theta)
        gradient = at.gradient + prior_gradient
        values, vectors = torch.linalg.eigh(-at.hessian - prior_hessian)
        move = vectors @ ((vectors.T @ gradient) / values.abs())
        gain = float(gradient @ move)  # twice the expected rise of the log posterior, nats
        if gain < 1e-8:
            return theta, at, count
        for halving in range(10):
            trial = theta + move * 0.5**halving
            after = marginal(rows, trial, at.mean, at.covariance, nodes)
            if after.value + float(log_prior(trial)) > at.value + prior_value - 1e-6:
                break
        theta, at = trial, after
    raise RuntimeError(f"no mode of the population in 30 Newton steps; the last promised {gain:.2g} nats")


def _derivatives(log_prior: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[float, Tensor, Tensor]:
    """Value, gradient and Hessian of the log prior."""
    gradient = torch.autograd.functional.jacobian(log_prior, theta)
    return float(log_prior(theta)), gradient, torch.autograd.functional.hessian(log_prior, theta)
