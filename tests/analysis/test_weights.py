from __future__ import annotations

import numpy as np
import pytest

from scivi.analysis import reliability, row_reliability
from scivi.errors import DataError


def test_exact_guide_has_equal_weights(catalogue):
    found = reliability(catalogue(rows=8))
    assert float(found["k_hat"][0]) == 0
    np.testing.assert_allclose(found["ess"], 1000, rtol=1e-6)  # lp and log_q each sum 17 float64 terms
    np.testing.assert_allclose(found["shift_sd"], 0, atol=1e-6)
    assert bool(found["ok"].all())
    assert list(found["variable"].values[:2]) == ["mu", "z[J0000]"]


def test_reweighting_finds_the_exact_mean_under_a_shifted_guide(catalogue, exact):
    tree = catalogue(rows=8, draws=4000, global_shift=0.5)
    found = reliability(tree).sel(variable="mu")
    mean, sd = exact(tree)
    error = float(found["shift_mcse"]) + 1 / 4000**0.5  # of the correction, and of the raw mean, in sd
    np.testing.assert_allclose(float(found["shift_sd"]), -0.5, atol=4 * error)
    np.testing.assert_allclose(float(found["corrected_mean"]), mean, atol=4 * error * sd)
    assert not bool(found["ok"])


def test_narrow_guide_is_refused(catalogue):
    found = reliability(catalogue(rows=8, scale=0.4))
    assert float(found["k_hat"][0]) > 0.7
    assert not found["ok"].any()


def test_many_rows_make_the_joint_k_hat_meaningless(catalogue):
    found = reliability(catalogue(rows=600, scale=0.85))  # each row's KL is 0.02 nats
    assert float(found["k_hat"][0]) > 0.7
    assert found.attrs["decisive"] == 0
    assert list(found["variable"].values) == ["mu"]
    assert not found["ok"].any()
    assert reliability(catalogue(rows=600)).attrs["decisive"] == 1  # a small one is good news at any size


def test_worst_chain_counts(catalogue):
    tree = catalogue(rows=8, chains=2)
    stats = tree["sample_stats"].to_dataset()
    log_q = stats["log_q"].values.copy()
    log_q[1] += np.random.default_rng(0).normal(0, 3, log_q.shape[1])
    tree["sample_stats"] = stats.assign(log_q=(("chain", "draw"), log_q))
    found = reliability(tree)
    assert float(found["k_hat"][0]) == 0
    assert float(found["k_hat"][1]) > 0.7
    assert not found["ok"].any()


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25])
def test_row_k_hat_and_gap_against_closed_form(catalogue, scale):
    found = row_reliability(catalogue(rows=400, draws=4000, scale=scale))
    # log w = u^2 (1 - c^2) / 2, u a unit normal: u^2 / 2 has an exponential tail, k -> 1 - c^2 (c > 1: <= 0)
    k = float(found["k_hat"].median())
    assert (
        k < 0.25 if scale > 1 else abs(k - (1 - scale**2)) < 0.15
    )  # approach is logarithmic; prior pulls to 0.5
    kl = -np.log(scale) + (scale**2 - 1) / 2
    # KL(q || p) of two normals; beside Monte Carlo error p(x_i | mu) varies by about 0.002 nats with mu
    np.testing.assert_allclose(float(found["gap"].median()), kl, atol=0.01 + (0.05 if scale < 0.6 else 0))
    assert bool((found["ok"] == (found["k_hat"] <= 0.7)).all())


def test_row_blocks_do_not_change_numbers(catalogue):
    tree = catalogue(rows=30, draws=100, chains=2, scale=0.7)
    whole, pieces = row_reliability(tree), row_reliability(tree, block=600)
    np.testing.assert_allclose(pieces["k_hat"], whole["k_hat"], rtol=1e-10)  # same numbers, other row batches
    assert pieces["source"].values[0] == "J0000"


def test_outside_and_gap_are_carried(catalogue):
    tree = catalogue(rows=80, draws=50)
    tree["sample_stats"] = (
        tree["sample_stats"].to_dataset().assign(amortisation_gap=("source", np.full(80, 0.1)))
    )
    found = row_reliability(tree)
    assert int(found["outside"].sum()) == 2
    assert float(found["amortisation_gap"][0]) == 0.1
    assert found["outside"].dtype == bool


def test_no_row_weights_is_an_error_with_advice(catalogue):
    with pytest.raises(DataError, match=r'no "row_log_weight".*Use reliability'):
        row_reliability(catalogue(rows=5, draws=30, method="nuts"))


def test_joint_gap_is_the_divergence_in_closed_form(catalogue):
    found = reliability(catalogue(rows=8, draws=4000, scale=0.9))
    kl = 9 * (-np.log(0.9) + (0.9**2 - 1) / 2)  # nine normals narrowed alike: chain rule of KL
    np.testing.assert_allclose(
        float(found["gap"][0]), kl, atol=4 * (2 * kl / 4000) ** 0.5
    )  # variance of log w: 2 KL
