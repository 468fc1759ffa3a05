"""Peaks of densities whose shape is known."""

from __future__ import annotations

import torch

from scivi.models.search import TAIL, peak


def slope_of(density):
    """Value and gradient of a log density."""

    def slope(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = density(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    return slope


def test_a_normal_is_found_exactly_in_every_row():
    g = torch.Generator().manual_seed(0)
    root = 0.5 * torch.randn(7, 4, 4, generator=g, dtype=torch.float64) + torch.eye(4)
    covariance, mean = root @ root.mT, torch.randn(7, 4, generator=g, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    found = peak(slope_of(normal.log_prob), torch.zeros(7, 4, dtype=torch.float64), steps=200)
    spread = found.tril @ found.tril.mT
    limited = torch.linalg.eigvalsh(covariance)[:, -1] < 9.0  # wider directions are cut
    assert limited.any()
    torch.testing.assert_close(found.loc, mean, atol=0.02, rtol=0.0)
    torch.testing.assert_close(spread[limited], covariance[limited], rtol=1e-4, atol=1e-4)
    assert float(found.skew[limited].abs().max()) < 1e-4


def test_quantiles_of_a_skewed_density_are_nearly_those_of_the_peak():
    """A log-gamma variable with shape 4 (skewness -.53), in its own coordinate and a normal one across.

    The quantiles of the peak's bend at noise -1.64, 0, 1.64 against scipy's; a normal at the mode misses the
    outer ones by .23 and .24.
    """
    from scipy import stats

    def density(x):
        return 4 * x[..., 0] - x[..., 0].exp() - 0.5 * x[..., 1].square()

    found = peak(slope_of(density), torch.zeros(1, 2, dtype=torch.float64))
    z = torch.tensor([-1.6449, 0.0, 1.6449], dtype=torch.float64)
    k = found.skew[0, 0]
    bend = torch.sinh((torch.asinh(z) + k) * TAIL) - torch.sinh(k * TAIL)
    bent = found.loc[0, 0] + found.tril[0, 0, 0] * bend / (TAIL * torch.cosh(k * TAIL))
    wanted = torch.tensor(stats.loggamma(4).ppf([0.05, 0.5, 0.95]))
    assert float((bent[1] - wanted[1]).abs()) < 0.03
    assert float((bent - wanted).abs().max()) < 0.35  # the heavier tails reach further out on purpose
    assert float(found.skew[0, 0]) < -0.05


def test_a_flat_direction_gets_a_bounded_width():
    found = peak(slope_of(lambda x: -0.5 * x[..., 0].square() + 0 * x[..., 1]), torch.zeros(2, 2).double())
    assert torch.isfinite(found.tril).all()
    assert float(found.tril.square().sum(-1).sqrt()[:, 1].max()) <= 3.0 * 2.5 * 1.2


def test_undefined_values_are_stepped_back_from():
    """A density that ends at 1 and has its mode at .5, from a start near the end."""

    def density(x):
        return torch.log1p(-x[..., 0]) + x[..., 0].log()

    found = peak(slope_of(density), torch.full((1, 1), 0.95, dtype=torch.float64))
    assert abs(float(found.loc) - 0.5) < 0.05
