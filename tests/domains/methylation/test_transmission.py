from __future__ import annotations

from itertools import product

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from domains.genomics import alphabeta
from domains.genomics.transmission import REPRODUCTIONS, Reproduction, equilibrium, states, step
from scivi.models.sum_product import Matrix, powers

RATES = [(1e-8, 1e-8), (1e-8, 1e-2), (2e-4, 8e-4), (1e-2, 1e-6), (0.3, 0.1), (0.5, 0.5)]
CHANGES = {"U": 0, "M": 1}


def stacked(matrix: Matrix) -> np.ndarray:
    return torch.stack([torch.stack(row) for row in matrix]).numpy()


def of(
    reproduction: Reproduction, gain: float, loss: float, dtype: torch.dtype = torch.float64
) -> np.ndarray:
    return stacked(step(reproduction, *(torch.tensor(x, dtype=dtype) for x in (gain, loss))))


def enumerated(reproduction: Reproduction, gain, loss) -> np.ndarray:
    """One generation, copy by copy: which are passed on, and whether each changes."""
    change = [[1 - gain, gain], [loss, 1 - loss]]
    names = states(reproduction)
    found = np.full((len(names), len(names)), 0 * gain)
    for before, name in enumerate(names):
        copies = [CHANGES[letter] for letter in name]
        if reproduction == "selfing":  # each gamete draws one of the copies
            drawn = list(product(copies, copies))
        elif reproduction == "division":  # a strand is kept, and the other made after it
            drawn = [(copy,) for copy in copies]
        else:
            drawn = [tuple(copies)]
        for passed in drawn:
            for after in product((0, 1), repeat=len(passed)):
                chance = 1
                for one, other in zip(passed, after, strict=True):
                    chance = chance * change[one][other]
                kept = sum(passed) if reproduction == "division" else 0
                found[before, kept + sum(after)] += chance / len(drawn)
    return found


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize(("gain", "loss"), RATES)
def test_step_is_every_copy_enumerated(reproduction, gain, loss):
    found = of(reproduction, gain, loss)
    np.testing.assert_allclose(found, enumerated(reproduction, gain, loss), rtol=1e-13)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-15)
    assert found.min() >= 0


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize(("gain", "loss"), RATES)
def test_float32_keeps_the_digits_of_every_entry(reproduction, gain, loss):
    found = of(reproduction, gain, loss, torch.float32)
    with mpmath.workdps(40):
        rounded = [mpmath.mpf(float(np.float32(x))) for x in (gain, loss)]
        truth = enumerated(reproduction, *rounded).astype(np.float64)
    np.testing.assert_allclose(found, truth, rtol=5e-7)  # four roundings of 1.2e-7


@pytest.mark.parametrize(("gain", "loss"), RATES)
def test_eigenvalues_are_those_of_the_paper(gain, loss):
    x = 1 - gain - loss
    expected = {
        "selfing": [1, x, x * x / 2],  # Shahryary et al. 2020
        "clonal": [1, x, x * x],  # two copies, each by itself
        "haploid": [1, x],
        "division": [1, (1 + x) / 2, 0],  # a strand is old, and stays, or new, and remembers with x
    }
    for reproduction in REPRODUCTIONS:
        found = np.linalg.eigvals(of(reproduction, gain, loss))
        np.testing.assert_allclose(np.sort(found.real), np.sort(expected[reproduction]), atol=1e-13)


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize(("gain", "loss"), RATES)
def test_equilibrium_stays_as_it_is(reproduction, gain, loss):
    rates = [torch.tensor(x, dtype=torch.float64) for x in (gain, loss)]
    found = np.array([float(x) for x in equilibrium(reproduction, *rates)])
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(found @ of(reproduction, gain, loss), found, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize(("gain", "loss"), RATES[2:])
def test_equilibrium_is_where_many_generations_lead(reproduction, gain, loss):
    rates = [torch.tensor(x, dtype=torch.float64) for x in (gain, loss)]
    many = stacked(powers(step(reproduction, *rates), [2**17])[2**17])  # 1e-3 per step: 130 times its time
    expected = torch.stack(equilibrium(reproduction, *rates)).numpy()
    np.testing.assert_allclose(many, np.broadcast_to(expected, many.shape), rtol=1e-10)  # 17 squarings


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
def test_equilibrium_of_small_rates_keeps_its_digits_in_float32(reproduction):
    for gain, loss in RATES:
        both = [
            torch.stack(equilibrium(reproduction, *(torch.tensor(x, dtype=d) for x in (gain, loss)))).double()
            for d in (torch.float32, torch.float64)
        ]
        torch.testing.assert_close(*both, rtol=2e-6, atol=0)  # some ten roundings


@pytest.mark.parametrize(("reproduction", "somatic"), [("selfing", False), ("clonal", True)])
@pytest.mark.parametrize(("gain", "loss"), RATES)
def test_step_is_alphabetas(reproduction, somatic, gain, loss):
    theirs = alphabeta._transition(gain, loss, somatic)
    np.testing.assert_allclose(
        of(reproduction, gain, loss), theirs, rtol=1e-8, atol=1e-16
    )  # theirs subtracts
    puu = equilibrium(reproduction, *(torch.tensor(x, dtype=torch.float64) for x in (gain, loss)))[0]
    assert float(puu) == pytest.approx(alphabeta.equilibrium_puu(gain, loss, somatic=somatic), rel=1e-8)


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
def test_slopes_are_those_of_differences(reproduction):
    def function(gain: Tensor, loss: Tensor) -> Tensor:
        rows = step(reproduction, gain, loss)
        return torch.stack([*(x for row in rows for x in row), *equilibrium(reproduction, gain, loss)])

    rates = [torch.tensor(x, dtype=torch.float64).requires_grad_(True) for x in ([0.02, 0.3], [0.1, 0.4])]
    assert torch.autograd.gradcheck(function, rates)
