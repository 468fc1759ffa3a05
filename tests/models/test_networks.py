from __future__ import annotations

import pytest
import torch

from scivi.models.binding import seeded
from scivi.models.networks import SequenceEncoder, perceptron


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [False, True])
def test_a_perceptron_has_the_widths_it_is_given_and_learns_everywhere(norm):
    net = perceptron(5, 3, (8, 4), norm=norm)
    out = net(random(6, 2, 5))
    assert out.shape == (6, 2, 3)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    plain = 5 * 8 + 8 + 8 * 4 + 4 + 4 * 3 + 3
    assert sum(p.numel() for p in net.parameters()) == plain + (2 * (8 + 4) if norm else 0)


def test_a_correction_starts_at_zero():
    assert float(perceptron(5, 3, last=0.0)(random(6, 5)).detach().abs().max()) == 0.0
    with seeded(0):
        whole = perceptron(5, 3)(random(6, 5)).detach()
    with seeded(0):
        tenth = perceptron(5, 3, last=0.1)(random(6, 5)).detach()
    torch.testing.assert_close(tenth, 0.1 * whole)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_sequence_sees_as_far_as_it_says_on_both_sides(batch):
    net, steps = SequenceEncoder(2, 3, width=4, layers=3), random(*batch, 64, 2)
    out = net(steps)
    assert out.shape == (*batch, 64, 3)
    changed = steps.clone()
    changed[..., 32, :] += 1.0
    moved = (net(changed) - out).abs().reshape(-1, 64, 3).amax(
        (0, 2)
    ) > 1e-7  # float32 rounding of numbers of order one
    reach = (torch.arange(64) - 32).abs() < 2**3
    assert bool(moved[32])
    assert not bool(moved[~reach].any())
    assert bool(moved[32 - 7])
    assert bool(moved[32 + 7])
