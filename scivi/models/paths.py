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

# h_t (K, 1, *, T - 1) and h_(t+1) (K, L, *, T - 1) to log p(y_t | .); L is 1 if that depends on h_t alone.
Link = Callable[[Tensor, Tensor], Tensor]


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
        of_x = x * (self.now + 0.5 * self.now_now * x)
        return of_x + y * (self.ahead + self.now_ahead * x + 0.5 * self.ahead_ahead * y)

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


def _nodes(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Standard normal nodes and weights, each (n,)."""
    x, weight = np.polynomial.hermite_e.hermegauss(n)
    return like.new_tensor(x), like.new_tensor(weight / weight.sum())


def _spread(x: Tensor, coupled: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes (K,) as two coordinates in front of the dims of ``like``; the second is 0 unless ``coupled``."""
    ones = [1] * like.dim()
    return x.reshape(-1, 1, *ones), (x if coupled else 0 * x[:1]).reshape(1, -1, *ones)


def _fitted(link: Link, m: Moments, n: int, coupled: bool) -> Quadratics:
    """The least-squares quadratic of each link under the marginal of its ends."""
    x, weight = _nodes(n, m.mean)
    first = m.variance[..., :-1].sqrt()
    slope = m.covariance / first
    second = (m.variance[..., 1:] - slope.square()).clamp_min(1e-12).sqrt()
    zx, zy = _spread(x, coupled, first)
    ahead = m.mean[..., 1:] + slope * zx
    value = link(m.mean[..., :-1] + first * zx, ahead + second * zy if coupled else ahead)
    degrees = torch.stack([weight, weight * x, weight * (x * x - 1)])
    found = torch.tensordot(degrees, value, 1)
    if not coupled:
        a, aa = found[1, 0] / first, found[2, 0] / first.square()
        zero = torch.zeros_like(a)
        return Quadratics(m.mean, a, zero, aa.clamp_max(0.0), zero, zero)
    found = torch.einsum("dl,el...->de...", degrees, found)  # degrees in y, in x
    a, aa, b = found[0, 1] / first, found[0, 2] / first.square(), found[1, 0] / second
    ab, bb, tilt = found[1, 1] / first / second, found[2, 0] / second.square(), slope / first
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


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices (N, N, *): entry by entry, where `matmul` of many small ones would take them one by one."""
    found = left[:, :1] * right[:1]
    for k in range(1, len(right)):
        found = torch.addcmul(found, left[:, k : k + 1], right[k : k + 1])
    return found


def _first_of_product(matrices: Tensor) -> Tensor:
    """Log of the first entry of M_1 M_2 ... M_T, from (N, N, *, T)."""
    log, rounds = matrices.new_zeros(matrices.shape[2:-1]), 0
    while matrices.shape[-1] > 1:
        if rounds % 3 == 0:  # products of eight stay well inside single precision
            size = matrices.detach().abs().amax((0, 1))
            log, matrices = log + size.log().sum(-1), matrices / size
        n = matrices.shape[-1]
        pairs = _product(matrices[..., 0 : n - n % 2 : 2].contiguous(), matrices[..., 1::2].contiguous())
        matrices = torch.cat([pairs, matrices[..., n - 1 :]], -1) if n % 2 else pairs
        rounds += 1
    return log + matrices[0, 0, ..., 0].log()


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
    rest = (1 - correlation.square()).clamp_min(1e-12).sqrt()
    x, weight = _nodes(accuracy.nodes, mean)
    zx, zy = _spread(x, coupled, correlation)
    h_now, h_ahead = now + sd[..., :-1] * zx, ahead + sd[..., 1:] * correlation * zx
    if coupled:
        h_ahead = h_ahead + sd[..., 1:] * rest * zy
    ratio = (link(h_now, h_ahead) - near.at(h_now, h_ahead)).exp()
    matrices = _in_polynomials(ratio, x, weight, accuracy.terms, correlation, rest)
    return constant + _first_of_product(matrices), chain


def _in_polynomials(
    ratio: Tensor, x: Tensor, weight: Tensor, terms: int, correlation: Tensor, rest: Tensor
) -> Tensor:
    """The matrices M_t, (terms, terms, *, T - 1), from exp r_t at the nodes, (K, L, *, T - 1).

    The second end of a link is c x + s y with independent x and y, and Hermite polynomials of a sum are

        H_m(c x + s y) = sum_j binom(m, j)^(1/2) s^j c^(m - j) H_j(y) H_(m - j)(x).

    So the sum over nodes is two of matrix products with constants, whatever the correlation c is: over y with
    H_j(y), then over x with H_n(x) H_(m - j)(x).
    """
    hermite = _hermite(x, terms)
    powers = [torch.ones_like(correlation)]
    for _ in range(1, terms):
        powers.append(powers[-1] * correlation)
    power = torch.stack(powers)
    shape, weighed = correlation.shape, weight[:, None] * hermite
    coupled = ratio.shape[1] > 1
    of_y = weighed.mT @ ratio.flatten(2) if coupled else ratio.flatten(2)  # (K, j, *)

    def of_degree(j: int) -> Tensor:
        root = x.new_tensor([math.comb(k + j, j) ** 0.5 for k in range(terms - j)])
        table = weighed.unsqueeze(-1) * (hermite[:, : terms - j] * root).unsqueeze(-2)
        found = (table.flatten(1).mT @ of_y[:, j]).reshape(terms, terms - j, *shape)
        return found * power[: terms - j]

    matrices = of_degree(terms - 1 if coupled else 0)
    for j in reversed(range(terms - 1 if coupled else 0)):
        matrices = of_degree(j) + pad(matrices * rest, (0, 0) * len(shape) + (1, 0))
    return matrices
