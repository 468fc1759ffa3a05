"""Daily shocks of mean 0 and variance 1: normal, Student-t, and a t with two different tails.

The last is Jones and Faddy's (2003): with a and b half the degrees of freedom of the lower and the upper
tail, and w = x / sqrt(a + b + x^2),

    f(x) = (1 + w)^(a + 1/2) (1 - w)^(b + 1/2) / (2^(a + b - 1) B(a, b) sqrt(a + b)),     e = (x - mean) / sd

Far out it falls as |x|^-(2 a + 1) below and as x^-(2 b + 1) above; equal tails make it a t. It is smooth
everywhere, where two halves of a t put together have a bend that quadrature does not like.

References:
    Jones and Faddy 2003, JRSS B 65, 159, doi:10.1111/1467-9868.00378.
"""

from __future__ import annotations

import math

import torch
from scipy import special
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def log_density(e: Tensor, nu: Tensor | None = None, nu_upper: Tensor | None = None) -> Tensor:
    """Log density of shocks.

    Args:
        e: shocks, (*).
        nu: degrees of freedom, above 2, of both tails, or of the lower one; None for a normal.
        nu_upper: of the upper tail, above 2; None for those of the lower.
    """
    if nu is None:
        return -0.5 * e.square() - _HALF_LOG_2PI
    if nu_upper is None:
        constant = torch.lgamma(0.5 * (nu + 1)) - torch.lgamma(0.5 * nu) - 0.5 * (math.pi * (nu - 2)).log()
        return constant - 0.5 * (nu + 1) * torch.log1p(e.square() / (nu - 2))
    a, b, mean, sd = _standard(nu, nu_upper)
    # log(1 +- w) = +-asinh(t) - log(1 + t^2) / 2 of t = x / sqrt(a + b); torch.asinh takes ten times as long
    size = (a + b).sqrt()
    t = mean / size + sd / size * e
    root = (1 + t.square()).sqrt()
    asinh = torch.copysign((t.abs() + root).log(), t)
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    constant = sd.log() - (a + b - 1) * math.log(2.0) - log_beta - size.log()
    return constant - (a + b + 1) * root.log() + (a - b) * asinh


def cumulative(e: Tensor, nu: Tensor | None = None, nu_upper: Tensor | None = None) -> Tensor:
    """Cumulative probability of shocks (*), by SciPy: no gradients."""
    if nu is None:
        return torch.special.ndtr(e)
    a, b, mean, sd = _standard(nu, nu_upper)
    x = mean + sd * e
    share = 0.5 * (1 + x / (a + b + x.square()).sqrt())
    return torch.as_tensor(special.betainc(a.numpy(), b.numpy(), share.numpy()))


def quantile(p: Tensor, nu: Tensor | None = None, nu_upper: Tensor | None = None) -> Tensor:
    """The shocks below which these probabilities (*) lie, by SciPy: no gradients."""
    if nu is None:
        return torch.special.ndtri(p)
    a, b, mean, sd = _standard(nu, nu_upper)
    share = torch.as_tensor(special.betaincinv(a.numpy(), b.numpy(), p.numpy()))
    rest = torch.as_tensor(special.betaincinv(b.numpy(), a.numpy(), 1 - p.numpy()))  # 1 - share, exact near 1
    return ((a + b).sqrt() * (share - rest) / (2 * (share * rest).sqrt()) - mean) / sd


def _standard(nu: Tensor, nu_upper: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The numbers a and b, and mean and sd of the x that they belong to."""
    a, b = 0.5 * nu, 0.5 * (nu if nu_upper is None else nu_upper)
    ratio = torch.lgamma(a - 0.5) - torch.lgamma(a) + torch.lgamma(b - 0.5) - torch.lgamma(b)
    mean = 0.5 * (a - b) * (a + b).sqrt() * ratio.exp()
    square = 0.25 * (a + b) * ((a - b).square() + a + b - 2) / ((a - 1) * (b - 1))
    return a, b, mean, (square - mean.square()).sqrt()


def sample(
    shape: torch.Size | tuple[int, ...],
    like: Tensor,
    nu: Tensor | None = None,
    nu_upper: Tensor | None = None,
) -> Tensor:
    """Shocks of a shape, in the dtype and on the device of ``like``; degrees of freedom broadcast to it."""
    if nu is None:
        return torch.randn(shape, dtype=like.dtype, device=like.device)
    a, b, mean, sd = _standard(nu, nu_upper)
    up, down = (torch._standard_gamma(n.expand(shape).contiguous()).clamp_min(1e-20) for n in (a, b))
    return ((a + b).sqrt() * (up - down) / (2 * (up * down).sqrt()) - mean) / sd
