"""A Gaussian path summed out of a model: the chain nearest to its posterior, and exactly what that leaves.

    p(y, h | u) = N(h; AR(1) of u) prod_t p(y_t | h_t, h_(t+1), u)

**The chain.** Every link's log density is replaced by the quadratic that is nearest to it, in least squares
under the chain itself; minus its curvature and its slope are added to the prior's precision and shift
(numerically accelerated importance sampling; also the fixed point of the chain nearest in KL(q || p)). Means
over neighbours are taken on Gauss-Hermite nodes. One node would be Laplace's approximation, which errs by
some hundredths of a nat a day where errors have heavy tails.

**What it leaves.** With z_t the path standardised under the chain q,

    p(y | u) = Z E_q[prod_t exp r_t(z_t, z_(t+1))],     r_t = log p(y_t | .) - its quadratic,

and Z known in closed form. In orthonormal Hermite polynomials H_n a step of q is a diagonal matrix (Mehler),
and exp r_t a small full one,

    M_t[n, m] = E_q[H_n(z_t) exp r_t H_m(z_(t+1))],

so that the expectation is the first entry of M_1 M_2 ... M_T: a product that a tree takes in log2 T rounds.
Six polynomials leave thousandths of a nat over two thousand days, whatever the correlation of neighbours: a
grid would have to resolve the width of a step. The value does not depend on the quadratics but for what the
polynomials cut off. They may be found at one u, and serve all u near it.

References:
    Koopman, Lucas and Scharth 2015, Journal of Business and Economic Statistics 33, 114.
    Opper and Archambeau 2009, Neural Computation 21, 786.
    Mehler 1866, Journal fuer die reine und angewandte Mathematik 66, 161.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from scivi.models.chains import Autoregressive, GaussianChain, Moments, times

Link = Callable[[Tensor, Tensor], Tensor]  # h_t and h_(t+1), (K, *, T - 1), to log p(y_t | .) likewise


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How finely a path is summed out.

    Args:
        fit: Gauss-Hermite nodes per dimension where quadratics are fitted.
        nodes: per dimension, of what they leave.
        terms: Hermite polynomials.
        steps: in which quadratics are found, at most.
        full: of these, how many before they are halved.
        tolerance: end of that, when no mean moves by more, in sd.
    """

    fit: int = 5
    nodes: int = 9
    terms: int = 6
    steps: int = 30
    full: int = 5
    tolerance: float = 1e-2


class Quadratics(NamedTuple):
    """Each link's log density, nearly: slopes and curvatures about a path.

    Args:
        centre: (*, T).
        now, ahead: slopes in h_t and h_(t+1), (*, T - 1).
        now_now, now_ahead, ahead_ahead: second derivatives, (*, T - 1).
    """

    centre: Tensor
    now: Tensor
    ahead: Tensor
    now_now: Tensor
    now_ahead: Tensor
    ahead_ahead: Tensor

    def at(self, now: Tensor, ahead: Tensor) -> Tensor:
        """Their values, (*, T - 1)."""
        x, y = now - self.centre[..., :-1], ahead - self.centre[..., 1:]
        bent = self.now_now * x.square() + 2 * self.now_ahead * x * y + self.ahead_ahead * y.square()
        return self.now * x + self.ahead * y + 0.5 * bent

    def towards(self, other: Quadratics, share: float) -> Quadratics:
        """A share of the way to others, written about their centre."""
        step = other.centre - self.centre
        x, y = step[..., :-1], step[..., 1:]
        now = self.now + self.now_now * x + self.now_ahead * y
        ahead = self.ahead + self.now_ahead * x + self.ahead_ahead * y
        mine = (now, ahead, self.now_now, self.now_ahead, self.ahead_ahead)
        return Quadratics(other.centre, *(a + share * (b - a) for a, b in zip(mine, other[1:], strict=True)))

    def posterior(self, prior: Autoregressive) -> GaussianChain:
        """The chain that prior and quadratics make."""
        diagonal, off = prior.precision()
        own_diagonal, own_off = -_ends(self.now_now, self.ahead_ahead), -self.now_ahead
        shift = times(diagonal, off, prior.mean) + _ends(self.now, self.ahead)
        shift = shift + times(own_diagonal, own_off, self.centre)
        return GaussianChain(diagonal + own_diagonal, off + own_off, shift, validate_args=False)


def _ends(now: Tensor, ahead: Tensor) -> Tensor:
    """What links give to their left and right ends, added up along the path, (*, T)."""
    return pad(now, (0, 1)) + pad(ahead, (1, 0))


def _nodes(n: int, coupled: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal nodes in two coordinates and weights, each (K,); the second is 0 unless ``coupled``."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    w = w / w.sum()
    if not coupled:
        first, second, weight = x, 0 * x, w
    else:
        first, second = (a.ravel() for a in np.meshgrid(x, x, indexing="ij"))
        weight = np.outer(w, w).ravel()
    return like.new_tensor(first), like.new_tensor(second), like.new_tensor(weight)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Nodes (K,) in front of the dims of ``like``."""
    return values.reshape(-1, *[1] * like.dim())


def _fitted(link: Link, m: Moments, n: int, coupled: bool) -> Quadratics:
    """The least-squares quadratic of each link under the marginal of its ends."""
    x, y, weight = _nodes(n, coupled, m.mean)
    first = m.variance[..., :-1].sqrt()
    slope = m.covariance / first
    second = (m.variance[..., 1:] - slope.square()).clamp_min(1e-12).sqrt()
    zx, zy = _spread(x, first), _spread(y, first)
    value = link(m.mean[..., :-1] + first * zx, m.mean[..., 1:] + slope * zx + second * zy)

    def mean(factor: Tensor) -> Tensor:
        return torch.tensordot(weight * factor, value, 1)

    a, aa = mean(x) / first, mean(x * x - 1) / first.square()
    if not coupled:
        zero = torch.zeros_like(a)
        return Quadratics(m.mean, a, zero, aa.clamp_max(0.0), zero, zero)
    tilt = slope / first
    b, ab, bb = mean(y) / second, mean(x * y) / first / second, mean(y * y - 1) / second.square()
    bent = _concave(aa - 2 * tilt * ab + tilt.square() * bb, ab - tilt * bb, bb)
    return Quadratics(m.mean, a - tilt * b, b, *bent)


def _concave(aa: Tensor, ab: Tensor, bb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The symmetric matrices with rows (aa, ab) and (ab, bb), positive eigenvalues set to 0.

    Far out, a heavy tail bends upwards; with enough of that no chain would be left.
    """
    middle, half = 0.5 * (aa + bb), 0.5 * (aa - bb)
    radius = torch.hypot(half, ab)
    low = (middle - radius).clamp_max(0.0)
    share = 0.5 * low / radius.clamp_min(1e-30)
    bad = middle + radius > 0
    parts = (share * (radius - half), -share * ab, share * (radius + half))
    aa, ab, bb = (torch.where(bad, mine, own) for mine, own in zip(parts, (aa, ab, bb), strict=True))
    return aa, ab, bb


def quadratics(
    prior: Autoregressive, link: Link, coupled: bool, accuracy: Accuracy, start: Quadratics | None = None
) -> Quadratics:
    """The quadratics of the chain nearest to a path's posterior, (*, T).

    Args:
        prior: of the path.
        link: log densities of the data of each link.
        coupled: whether they depend on h_(t+1).
        accuracy: how finely.
        start: those of other parameters, to begin with.
    """
    return settled(prior, link, coupled, accuracy, start)[0]


@torch.no_grad()
def settled(
    prior: Autoregressive, link: Link, coupled: bool, accuracy: Accuracy, start: Quadratics | None = None
) -> tuple[Quadratics, Tensor]:
    """``quadratics``, and how far the last step but one moved a mean of each path, in sd, (*)."""
    if start is None:
        m = Moments(prior.mean, 0.1 * prior.variance, 0.09 * prior.variance[..., 1:])
    else:
        m = start.posterior(prior).moments()
    found, far = _fitted(link, m, accuracy.fit, coupled), m.mean[..., 0]
    for taken in range(accuracy.steps):
        chain = found.posterior(prior)
        variance, covariance = chain.elimination.spread()
        step = chain.mean - m.mean
        far = (step.abs() / variance.sqrt()).amax(-1)
        # Of log variance: a factor e^2.
        step = step * (2.0 / step.abs().amax(-1, keepdim=True).clamp_min(2.0))
        m = Moments(m.mean + step, variance, covariance)
        # full steps end soon, or go to and fro, as with very heavy tails: then half steps end
        found = found.towards(_fitted(link, m, accuracy.fit, coupled), 1.0 if taken < accuracy.full else 0.5)
        if bool((far < accuracy.tolerance).all()):
            break
    return found, far


def _hermite(x: Tensor, terms: int) -> Tensor:
    """Orthonormal Hermite polynomials, (*, terms)."""
    out = [torch.ones_like(x), x]
    for n in range(1, terms - 1):
        out.append((x * out[-1] - math.sqrt(n) * out[-2]) / math.sqrt(n + 1))
    return torch.stack(out[:terms], -1)


def _first_of_product(matrices: Tensor) -> Tensor:
    """Log of the first entry of M_1 M_2 ... M_T, from (*, T, N, N)."""
    log, rounds = matrices.new_zeros(matrices.shape[:-3]), 0
    while matrices.shape[-3] > 1:
        if rounds % 3 == 0:  # products of eight stay well inside single precision
            size = matrices.detach().abs().amax((-1, -2), keepdim=True)
            log, matrices = log + size.log().sum((-1, -2, -3)), matrices / size
        n = matrices.shape[-3]
        pairs = matrices[..., 0 : n - n % 2 : 2, :, :] @ matrices[..., 1::2, :, :]
        matrices = torch.cat([pairs, matrices[..., n - 1 :, :, :]], -3) if n % 2 else pairs
        rounds += 1
    return log + matrices[..., 0, 0, 0].log()


def log_sum(
    prior: Autoregressive, link: Link, near: Quadratics, coupled: bool, accuracy: Accuracy
) -> tuple[Tensor, GaussianChain]:
    """Log of the sum over all paths, (*), and the chain that is near to their posterior.

    Differentiable in whatever prior and link depend on. NaN where the quadratics are so far off that no chain
    or no positive sum comes of them.

    Args:
        prior: of the path.
        link: log densities of the data of each link.
        near: from ``quadratics``, at the same parameters or others close by.
        coupled: whether links depend on h_(t+1).
        accuracy: how finely.
    """
    chain = near.posterior(prior)
    mean, variance, covariance = chain.moments()
    now, ahead = mean[..., :-1], mean[..., 1:]
    constant = prior.log_prob(mean) + near.at(now, ahead).sum(-1) - chain.log_prob(mean)
    sd = variance.sqrt()
    correlation = covariance / (sd[..., 1:] * sd[..., :-1])
    x, y, weight = _nodes(accuracy.nodes, coupled, mean)
    zx, zy = _spread(x, correlation), _spread(y, correlation)
    z_ahead = correlation * zx + (1 - correlation.square()).clamp_min(1e-12).sqrt() * zy
    h_now, h_ahead = now + sd[..., :-1] * zx, ahead + sd[..., 1:] * z_ahead
    ratio = (link(h_now, h_ahead) - near.at(h_now, h_ahead)).exp()
    # GEMMs with constant matrices, whatever the correlation is
    constants, powers = _tables(accuracy.terms, x, y, weight, coupled)
    weighed = (ratio.flatten(1).mT @ constants).unflatten(0, ratio.shape[1:])
    if not coupled:
        matrices = weighed.unflatten(-1, (accuracy.terms, accuracy.terms))
        matrices = matrices * correlation[..., None, None].pow(powers[0])
    else:
        rest = (1 - correlation.square()).clamp_min(1e-12).sqrt()
        share = correlation.unsqueeze(-1).pow(powers[0]) * rest.unsqueeze(-1).pow(powers[1])
        matrices = (weighed.unflatten(-1, (accuracy.terms, -1)) * share.unsqueeze(-2)) @ powers[2]
    return constant + _first_of_product(matrices), chain


def _tables(
    terms: int, x: Tensor, y: Tensor, weight: Tensor, coupled: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Weights of the nodes that make the matrices M_t from the ratios at the nodes.

    The second end of a link is c x + s y with independent x and y, and Hermite polynomials of a sum are

        H_m(c x + s y) = sum_k binom(m, k)^(1/2) c^k s^(m - k) H_k(x) H_(m - k)(y).

    Returns:
        Weights (K, terms x columns), a column for each k and m - k; and powers of c, powers of s, and what
        adds the columns of one m, (columns, terms). Not coupled: a column is m, and its power of c.
    """
    of_x, of_y = _hermite(x, terms), _hermite(y, terms)
    if not coupled:
        both = weight[:, None, None] * of_x.unsqueeze(-1) * of_x.unsqueeze(-2)
        return both.flatten(1), (torch.arange(terms, device=x.device),)
    k, j = (a.flatten() for a in torch.meshgrid(torch.arange(terms), torch.arange(terms), indexing="ij"))
    k, j = (a[k + j < terms].to(x.device) for a in (k, j))
    root = torch.tensor([math.comb(int(a + b), int(a)) ** 0.5 for a, b in zip(k, j, strict=True)]).to(x)
    columns = of_x[:, k] * of_y[:, j] * root
    add = torch.nn.functional.one_hot(k + j, terms).to(x)
    return (weight[:, None, None] * of_x.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(1), (k, j, add)
