"""Gaussian chains against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

from scivi.models.chains import Autoregressive, Elimination, GaussianChain, times

LENGTHS = (1, 2, 3, 4, 5, 8, 17, 64, 101)


def dense(length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Diagonal, links, shift of two chains, and their precisions as full matrices."""
    g = torch.Generator().manual_seed(seed)
    diagonal = 2.2 + torch.rand(2, length, generator=g, dtype=torch.float64)
    off = torch.rand(2, length - 1, generator=g, dtype=torch.float64) * 2 - 1
    shift = torch.randn(2, length, generator=g, dtype=torch.float64)
    matrix = torch.diag_embed(diagonal)
    if length > 1:
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return diagonal, off, shift, matrix


@pytest.mark.parametrize("length", LENGTHS)
def test_moments_and_density_are_those_of_the_dense_normal(length):
    diagonal, off, shift, matrix = dense(length)
    chain = GaussianChain(diagonal, off, shift)
    covariance = torch.linalg.inv(matrix)
    normal = MultivariateNormal((covariance @ shift[..., None])[..., 0], precision_matrix=matrix)
    found = chain.moments()
    x = torch.randn(5, 2, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found.mean, normal.mean, **close)
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=-2, dim2=-1), **close)
    torch.testing.assert_close(found.covariance, covariance.diagonal(1, -2, -1), **close)
    torch.testing.assert_close(chain.log_prob(x), normal.log_prob(x), **close)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_draw_is_a_linear_map_of_noise_whose_square_is_the_covariance(length):
    diagonal, off, shift, matrix = (a[0] for a in dense(length))
    eliminated = Elimination(diagonal, off)
    root = torch.func.jacrev(lambda noise: eliminated.solve(shift, noise))(torch.zeros(length).double())
    torch.testing.assert_close(root @ root.mT, torch.linalg.inv(matrix), rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_the_dense_density():
    diagonal, off, shift, _ = (a[0] for a in dense(9))
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    parts = tuple(a.clone().requires_grad_(True) for a in (diagonal, off, shift))
    assert torch.autograd.gradcheck(lambda d, e, s: GaussianChain(d, e, s).log_prob(x), parts)
    assert torch.autograd.gradcheck(lambda d, e, s: GaussianChain(d, e, s).moments(), parts)


@pytest.mark.parametrize("phi", [0.5, 0.999, -0.7])
def test_an_autoregression_has_the_stationary_covariance(phi):
    like = torch.ones((), dtype=torch.float64)
    path = Autoregressive(0.3 * like, phi * like, 0.2 * like, 30)
    t = torch.arange(30, dtype=torch.float64)
    covariance = (
        0.04
        / (1 - phi**2)
        * torch.sign(torch.tensor(phi)) ** (t - t[:, None])
        * abs(phi) ** (t - t[:, None]).abs()
    )
    normal = MultivariateNormal(0.3 + 0 * t, covariance)
    x = 0.3 + torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(path.log_prob(x), normal.log_prob(x), rtol=1e-8, atol=1e-8)
    diagonal, off = path.precision()
    chain = GaussianChain(diagonal, off, times(diagonal, off, path.mean))
    torch.testing.assert_close(chain.moments().variance, path.variance, rtol=1e-9, atol=1e-9)


def test_an_autoregression_of_one_entry_is_its_stationary_normal():
    like = torch.ones((), dtype=torch.float64)
    one = Autoregressive(0.3 * like, 0.9 * like, 0.2 * like, 1)
    normal = torch.distributions.Normal(0.3 * like, 0.2 / (1 - 0.81) ** 0.5)
    torch.testing.assert_close(one.log_prob(like[None]), normal.log_prob(like))


def test_draws_of_an_autoregression_vary_as_they_should():
    """Lag-one correlation of 1e5 steps: error sqrt((1 - phi^2) / 1e5) = .0014."""
    torch.manual_seed(0)
    like = torch.ones((), dtype=torch.float64)
    x = Autoregressive(0 * like, 0.9 * like, like, 500).rsample((200,))
    found = (x[:, 1:] * x[:, :-1]).mean() / x.square().mean()
    assert abs(float(found) - 0.9) < 0.005
    assert float(x.square().mean() * (1 - 0.81)) == pytest.approx(1.0, abs=0.05)  # 3 x .014


def test_a_matrix_that_is_not_positive_definite_has_no_determinant():
    assert Elimination(torch.tensor([1.0, 0.1, 1.0]), torch.tensor([0.9, 0.9])).log_determinant.isnan()
