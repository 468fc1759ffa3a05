from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from scivi.models.counts import log_rising

START = torch.tensor([1e-6, 0.02, 0.7, 1.0, 13.0, 4e3], dtype=torch.float64)
N = torch.tensor([[0, 1, 2, 9, 60, 300]] * len(START))


def exactly(order: int) -> np.ndarray:
    """Of each start and count the value, or its derivative of that order, in 50 digits."""
    with mpmath.workdps(50):
        rows = []
        for start, counts in zip(START.tolist(), N.tolist(), strict=True):
            s = mpmath.mpf(start)
            if order == 0:
                rows.append([float(mpmath.loggamma(s + n) - mpmath.loggamma(s)) for n in counts])
            else:
                at = order - 1
                rows.append([float(mpmath.polygamma(at, s + n) - mpmath.polygamma(at, s)) for n in counts])
    return np.array(rows)


def test_value_and_derivatives_are_those_of_log_gammas_in_fifty_digits():
    start = START.clone().requires_grad_(True)
    found = log_rising(start, N, 300)
    np.testing.assert_allclose(found.detach(), exactly(0), rtol=1e-13)  # 300 terms are added
    for order in (1, 2, 3):
        below = torch.autograd.grad(found.sum(), start, create_graph=True)[0]
        np.testing.assert_allclose(below.detach(), exactly(order).sum(1), rtol=1e-12)  # likewise, and powers
        found = below


def test_slopes_have_slopes():
    start = torch.tensor([0.02, 0.7, 13.0], dtype=torch.float64).requires_grad_(True)
    counts = torch.tensor([[0, 1, 7], [3, 3, 0], [9, 2, 1]])
    assert torch.autograd.gradcheck(lambda s: log_rising(s, counts, 9), (start,))
    assert torch.autograd.gradgradcheck(lambda s: log_rising(s, counts, 9), (start,))


@pytest.mark.parametrize("shape", [(1,), (4, 3), (4, 1), (2, 4, 3)])
def test_start_may_be_shared_or_of_many_draws(shape):
    start = (torch.rand(shape, dtype=torch.float64) + 0.1).requires_grad_(True)
    counts = torch.tensor([[0, 1, 7, 2], [3, 3, 0, 5], [9, 2, 1, 9]])
    found = log_rising(start, counts, 9)
    assert found.shape == (*shape[:-1], 3, 4)
    full = start.unsqueeze(-1)
    truth = torch.lgamma(full + counts) - torch.lgamma(full)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13)
    weight = torch.rand_like(found)  # so that a slope in the wrong place shows
    mine, theirs = (torch.autograd.grad((weight * x).sum(), start)[0] for x in (found, truth))
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
