"""Scattered counts and the mixture of them against scipy's negative binomial on a dense grid of t."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import special, stats
from torch import Tensor

from scivi.inputs.batches import Batch
from scivi.models import foreground as module
from scivi.models.binding import seeded
from scivi.models.foreground import ForegroundBackground, ScatteredCounts

# The posterior of t is nowhere narrower than .09 here, so that the trapezoid has no error that could be seen
T = np.linspace(-12, 12, 1601)
STEP = T[1] - T[0]
LEAST = -15.0  # nats; less probable counts are held to nothing
ERROR = 0.007  # nats; the worst that a search over the box below found is .0067, at the first of the corners

# count, level, scatter, theta: where the search found the largest errors, and the corners of the box
CORNERS = [
    (886, 1.81, 1.5, 0.5),
    (126, 0.3, 1.25, 0.5),
    (0, 300, 1.0, 50),
    (3, 300, 1.5, 1.0),
    (149, 1.02, 1.4, 0.97),
    (5000, 53, 1.5, 50),
    (0, 0.3, 0.02, 0.5),
    (0, 300, 0.02, 0.5),
    (5000, 300, 1.5, 0.5),
    (300, 300, 0.02, 50),
]


def cases(n: int = 800) -> tuple[np.ndarray, ...]:
    """Count, log level, scatter and theta: likely counts and, half of them, any; 0 to 5000, .3 to 300, ..."""
    rng = np.random.default_rng(0)
    level, scatter, theta = (10 ** rng.uniform(*np.log10(ends), n) for ends in BOX)
    t = rng.normal(size=n) * 1.5
    count = rng.poisson(rng.gamma(theta) / theta * np.minimum(level * np.exp(scatter * t), 4e3))
    count = np.where(rng.random(n) < 0.5, np.floor(10 ** rng.uniform(0, np.log10(5001), n)), count)
    columns = np.concatenate([np.array(CORNERS).T, [count.clip(0, 5000), level, scatter, theta]], 1)
    return columns[0], np.log(columns[1]), columns[2], columns[3]


BOX = ((0.3, 300.0), (0.02, 1.5), (0.5, 50.0))


def log_joint(count: np.ndarray, log_mean: np.ndarray, scatter: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Log p(n, t) on the grid, (case, t)."""
    mean = np.exp(log_mean[:, None] + scatter[:, None] * T)
    theta = theta[:, None]
    return stats.nbinom.logpmf(count[:, None], theta, theta / (theta + mean)) + stats.norm.logpdf(T)


def exactly(*numbers: np.ndarray) -> np.ndarray:
    """Log p(n)."""
    return special.logsumexp(log_joint(*numbers), axis=1) + np.log(STEP)


def posterior(*numbers: np.ndarray) -> np.ndarray:
    """p(t | n) on the grid, summing to 1."""
    return special.softmax(log_joint(*numbers), axis=1)


@pytest.fixture(scope="module")
def known() -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The cases that are likely enough, and their log probability."""
    numbers = cases()
    truth = exactly(*numbers)
    likely = truth > LEAST
    return tuple(column[likely] for column in numbers), truth[likely]


def made(
    numbers: tuple[np.ndarray, ...], dtype: torch.dtype = torch.float64
) -> tuple[ScatteredCounts, Tensor]:
    count, log_mean, scatter, theta = (torch.tensor(x, dtype=dtype) for x in numbers)
    return ScatteredCounts(log_mean, scatter, theta, validate_args=True), count


def test_log_prob_is_the_integral_of_scipys_density(known):
    numbers, truth = known
    assert len(truth) > 600  # the box is held to something
    fn, count = made(numbers)
    error = np.abs(fn.log_prob(count).numpy() - truth)
    assert error.max() < ERROR
    assert np.quantile(error, 0.9) < 1e-5  # eleven nodes are exact to this but in the tails


def test_single_precision_has_the_rounding_of_its_sums(known):
    """Of n rise and (n + theta) rise, each a rounding of 6e-8 in a number of up to 16 or so."""
    numbers, _ = known
    fn, count = made(numbers)
    single, same = made(numbers, torch.float32)
    error = np.abs((single.log_prob(same).double() - fn.log_prob(count)).numpy())
    assert (error < 1e-6 * (numbers[0] + numbers[3] + 10)).all()


def test_slopes_are_those_of_the_integral(known):
    """Central differences of 1e-4 are off by 1e-7; the rule by 1 % of a slope, where its value is off too."""
    (count, log_mean, scatter, theta), _ = known
    leaves = [torch.tensor(x).requires_grad_(True) for x in (log_mean, scatter, np.log(theta))]
    fn = ScatteredCounts(leaves[0], leaves[1], leaves[2].exp(), validate_args=False)
    slopes = torch.autograd.grad(fn.log_prob(torch.tensor(count)).sum(), leaves)
    up, down = np.exp(1e-4), np.exp(-1e-4)
    truth = [
        exactly(count, log_mean + 1e-4, scatter, theta) - exactly(count, log_mean - 1e-4, scatter, theta),
        exactly(count, log_mean, scatter + 1e-4, theta) - exactly(count, log_mean, scatter - 1e-4, theta),
        exactly(count, log_mean, scatter, theta * up) - exactly(count, log_mean, scatter, theta * down),
    ]
    for slope, difference in zip(slopes, truth, strict=True):
        error = np.abs(slope.numpy() - difference / 2e-4) / (1 + np.abs(difference / 2e-4))
        assert error.max() < 0.01
        assert np.quantile(error, 0.9) < 1e-4


@pytest.mark.parametrize("level", [0.3, 5.0, 60.0])
@pytest.mark.parametrize(("scatter", "theta"), [(0.02, 0.5), (0.4, 6.0), (1.0, 2.0), (1.5, 50.0)])
def test_probabilities_sum_to_one(level, scatter, theta):
    """Errors of the rule weigh as much as the counts at which they are made."""
    count, mean = np.arange(5001), level * np.exp(scatter * T)
    beyond = (stats.norm.pdf(T) * STEP) @ stats.nbinom.sf(count[-1], theta, theta / (theta + mean))
    fn = ScatteredCounts(*(torch.tensor(x, dtype=torch.float64) for x in (np.log(level), scatter, theta)))
    total = float(fn.log_prob(torch.tensor(count).double()).exp().sum())
    assert total + beyond == pytest.approx(1, abs=3e-4)  # scatter 1.5: 1.8e-4


def test_expected_level_is_that_of_the_integral(known):
    """The worst that a search over the box found is .038, of 3 counts at level 300, scatter 1.5, theta 1."""
    numbers, _ = known
    fn, count = made(numbers)
    level = np.exp(numbers[1][:, None] + numbers[2][:, None] * T)
    error = np.abs(fn.expected(count).numpy() / (posterior(*numbers) * level).sum(1) - 1)
    assert error.max() < 0.04
    assert np.quantile(error, 0.95) < 1e-3


def test_draws_given_a_count_have_the_moments_of_the_integral():
    """As wide as the posterior and a step of the grid, which adds step**2 / 3 to the variance at most.

    Monte Carlo errors of n draws are 1 and .7 / sqrt(n) of a sd; four of them.
    """
    n = 10_000
    numbers = tuple(column[10:50] for column in cases(400))
    truth = exactly(*numbers)
    numbers = tuple(column[truth > -10] for column in numbers)
    weight, scatter = posterior(*numbers), numbers[2]
    mean = (weight * T).sum(1)
    sd = ((weight * T**2).sum(1) - mean**2) ** 0.5
    fn, count = made(numbers)
    fn = fn.expand(torch.Size((n, len(mean))))
    with seeded(0):
        drawn = fn.draw(count.expand(n, -1)).numpy()
    z = (drawn / scatter - mean) / sd
    assert z.shape == (n, len(mean))
    assert np.abs(z.mean(0)).max() < 4 / n**0.5 + 0.005  # and what lies beyond the ends of the grid
    step = 2 * module._REACH / (module._GRID - 1)
    assert (z.std(0) > 1 - 4 * 0.7 / n**0.5 - 0.005).all()
    assert (z.std(0) < (1 + step**2 / 3) ** 0.5 + 4 * 0.7 / n**0.5 + 0.01).all()  # skew makes it wider yet
    with seeded(0):
        np.testing.assert_array_equal(fn.draw(count.expand(n, -1)).numpy(), drawn)


def test_without_scatter_it_is_the_negative_binomial():
    numbers = cases(300)
    numbers = (numbers[0], numbers[1], np.zeros_like(numbers[2]), numbers[3])
    fn, count = made(numbers)
    level, theta = np.exp(numbers[1]), numbers[3]
    truth = stats.nbinom.logpmf(numbers[0], theta, theta / (theta + level))
    # scipy takes differences of log gammas of 5000, which are some 4e4: a hundred roundings of it
    np.testing.assert_allclose(fn.log_prob(count), truth, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fn.expected(count), level, rtol=1e-12)
    assert not fn.draw(count).any()


def moments(level: float, scatter: float, theta: float) -> tuple[float, float]:
    """Mean and variance of a count whose log mean is normal."""
    mean, square = level * np.exp(scatter**2 / 2), level**2 * np.exp(2 * scatter**2)
    return mean, mean + square * (1 + 1 / theta) - mean**2


def assert_drawn_with(drawn: np.ndarray, mean: float, variance: float) -> None:
    """Within 4 standard errors, that of the variance from the draws' fourth moment."""
    n = len(drawn)
    assert drawn.mean() == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)
    fourth = ((drawn - drawn.mean()) ** 4).mean()
    assert drawn.var() == pytest.approx(variance, abs=4 * ((fourth - variance**2) / n) ** 0.5)


def test_samples_have_the_moments_of_a_scattered_count():
    n = 100_000
    fn = ScatteredCounts(*(torch.tensor(x, dtype=torch.float64) for x in (np.log(7.0), 0.4, 6.0)))
    with seeded(0):
        drawn = fn.sample((n,)).numpy()
    assert_drawn_with(drawn, *moments(7.0, 0.4, 6.0))
    assert float(fn.mean) == pytest.approx(7.0 * np.exp(0.08))
    none = np.exp(exactly(*(np.array([x]) for x in (0, np.log(7.0), 0.4, 6.0))))[0]
    assert (drawn == 0).mean() == pytest.approx(none, abs=4 * (none / n) ** 0.5)  # 4 standard errors


# The mixture. Numbers of three proteins: log background, scatter, log fold, logit, both dispersions.
MIXED = np.array(
    [[2.0, 0.3, 1.5, 0.4, 4.0, 9.0], [0.2, 0.05, 0.41, -3.0, 1.0, 30.0], [4.0, 0.9, 3.0, 2.0, 20.0, 2.0]]
).T


def mixed(shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64) -> ForegroundBackground:
    return ForegroundBackground(
        *(torch.tensor(x, dtype=dtype).expand(shape) for x in MIXED), validate_args=True
    )


def parts(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log p(n, v = 0) and log p(n, v = 1), (case, protein)."""
    columns = []
    for log_background, scatter, log_fold, logit, low, high in MIXED.T:
        background, foreground = (
            exactly(count, *(np.full(len(count), x) for x in (log_mean, scatter, theta)))
            for log_mean, theta in ((log_background, low), (log_background + log_fold, high))
        )
        columns.append((background + special.log_expit(-logit), foreground + special.log_expit(logit)))
    return tuple(np.array(columns).transpose(1, 2, 0))


COUNTS = np.unique(np.concatenate([np.arange(12), np.geomspace(12, 400, 12).astype(int)])).astype(float)


def test_mixture_is_that_of_the_integrals():
    low, high = parts(COUNTS)
    value = torch.tensor(COUNTS).unsqueeze(-1).expand(-1, 3)
    likely = np.logaddexp(low, high) > LEAST
    found = mixed().expand(torch.Size((len(COUNTS), 3)))
    assert likely.mean() > 0.5
    np.testing.assert_allclose(
        found.log_prob(value).numpy()[likely], np.logaddexp(low, high)[likely], atol=ERROR
    )
    for joint, truth in zip(found.joint(value), (low, high), strict=True):
        some = truth > LEAST
        np.testing.assert_allclose(joint.numpy()[some], truth[some], atol=ERROR)


def test_foreground_probability_is_that_of_bayes():
    """An error of .007 nats in either part is one of .0035 in their ratio at a half."""
    low, high = parts(COUNTS)
    found = mixed().foreground_prob(torch.tensor(COUNTS).unsqueeze(-1)).numpy()
    likely = np.logaddexp(low, high) > LEAST
    np.testing.assert_allclose(found[likely], special.expit(high - low)[likely], atol=ERROR / 2)
    assert found.min() < 0.1 < 0.9 < found.max()


def test_parts_that_no_count_reaches_leave_no_nan():
    """Of a level of e^-40 and a count of thousands, and of logits whose probability rounds to 0 or 1."""
    numbers = torch.tensor([[-40.0, 0.5, 1.0, 90.0, 6.0, 6.0], [6.0, 0.5, 3.0, -90.0, 6.0, 6.0]]).unbind(1)
    leaves = [x.clone().requires_grad_(True) for x in numbers]
    fn = ForegroundBackground(*leaves)
    for count in (0.0, 1.0, 4000.0):
        value = fn.log_prob(torch.full((2,), count))
        assert bool(torch.isfinite(value).all())
        assert float(value.detach().max()) <= 1e-6
        for slope in torch.autograd.grad(value.sum(), leaves):
            assert bool(torch.isfinite(slope).all())
        assert bool(torch.isfinite(fn.draw_log_background(torch.full((2,), count), torch.rand(2))).all())


def test_samples_of_the_mixture_have_its_moments():
    n = 100_000
    with seeded(0):
        drawn = mixed().sample((n,)).numpy()
    assert drawn.shape == (n, 3)
    for k, (log_background, scatter, log_fold, logit, low, high) in enumerate(MIXED.T):
        p = special.expit(logit)
        (m0, v0), (m1, v1) = (
            moments(np.exp(x), scatter, theta)
            for x, theta in ((log_background, low), (log_background + log_fold, high))
        )
        mean = (1 - p) * m0 + p * m1
        assert_drawn_with(drawn[:, k], mean, (1 - p) * v0 + p * v1 + p * (1 - p) * (m1 - m0) ** 2)
        assert float(mixed().mean[k]) == pytest.approx(mean)


def test_draws_of_the_background_are_those_of_the_part_that_was_drawn():
    """Mean of log background given the count, both parts weighed by their probability."""
    n, count = 20_000, np.array([15.0, 2.0, 90.0])
    fn = mixed((n, 3))
    value = torch.tensor(count).expand(n, 3)
    with seeded(0):
        drawn = fn.draw_log_background(value, fn.foreground_prob(value)).numpy()
    for k, (log_background, scatter, log_fold, logit, low, high) in enumerate(MIXED.T):
        mean, log_weight = [], []
        for log_mean, theta, log_prior in (
            (log_background, low, special.log_expit(-logit)),
            (log_background + log_fold, high, special.log_expit(logit)),
        ):
            numbers = tuple(np.array([x]) for x in (count[k], log_mean, scatter, theta))
            mean.append(log_background + scatter * float((posterior(*numbers) * T).sum()))
            log_weight.append(exactly(*numbers)[0] + log_prior)
        truth = float(special.softmax(log_weight) @ mean)
        assert drawn[:, k].mean() == pytest.approx(
            truth, abs=4 * drawn[:, k].std() / n**0.5 + 0.005 * scatter
        )


def test_a_missing_entry_adds_nothing_and_the_others_stay():
    values = torch.tensor([[3.0, 0.0, 70.0], [9.0, 1.0, 2.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    fn = mixed((2, 3))

    def scored(masks: dict[str, Tensor], values: Tensor = values) -> Tensor:
        batch = Batch({"n": values}, masks, {"row": 2}, ("row",))

        def model() -> None:
            with batch.plate("row"):
                batch.observe("n", fn.to_event(1))

        site = poutine.trace(model).get_trace().nodes["n"]
        return site["fn"].log_prob(site["value"])

    single = fn.log_prob(values)
    torch.testing.assert_close(scored({}), single.sum(-1))
    torch.testing.assert_close(scored({"n": mask}), (single * mask).sum(-1))
    other = torch.where(mask, values, torch.full_like(values, 5.0))
    assert torch.equal(scored({"n": mask}), scored({"n": mask}, other))


@pytest.mark.parametrize(
    "function",
    [
        lambda shape: ScatteredCounts(*(torch.tensor(x).float().expand(shape) for x in MIXED[[0, 1, 4]])),
        lambda shape: mixed(shape, torch.float32),
    ],
    ids=["one", "mixture"],
)
def test_shapes_broadcast_and_expand(function: Callable[..., ScatteredCounts | ForegroundBackground]):
    fn, value = function((3,)), torch.tensor([0.0, 2.0, 9.0])
    assert fn.batch_shape == fn.mean.shape == (3,)
    assert fn.sample((7,)).shape == (7, 3)
    assert fn.sample().dtype == torch.float32
    wider = fn.expand(torch.Size((4, 2, 3)))
    assert wider.batch_shape == wider.mean.shape == wider.sample().shape == (4, 2, 3)
    assert wider.to_event(1).log_prob(value.expand(4, 2, 3)).shape == (4, 2)
    torch.testing.assert_close(wider.log_prob(value.expand(4, 2, 3)), fn.log_prob(value).expand(4, 2, 3))
    assert fn.to_event(1).expand(torch.Size((5,))).log_prob(value).shape == (5,)


def test_draws_lead_what_cells_and_proteins_have():
    """Of 5 draws over 4 cells and 3 proteins, each parameter with the dims that it varies along."""
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64) + 0.2

    level, scatter, fold, logit = some(5, 4, 3), some(5, 1, 3), some(5, 4, 3), some(5, 4, 3)
    low, high = some(5, 1, 3) * 5, some(3) * 5
    value = torch.poisson(some(4, 3) * 5, generator=random)
    fn = ForegroundBackground(level, scatter, fold, logit, low, high)
    assert fn.batch_shape == (5, 4, 3)
    found = fn.log_prob(value)
    for d in range(5):
        one = ForegroundBackground(level[d], scatter[d], fold[d], logit[d], low[d], high)
        torch.testing.assert_close(found[d], one.log_prob(value))
        torch.testing.assert_close(fn.foreground_prob(value)[d], one.foreground_prob(value))
        torch.testing.assert_close(fn.foreground.expected(value)[d], one.foreground.expected(value))
    assert fn.draw_log_background(value, fn.foreground_prob(value)).shape == (5, 4, 3)


def test_what_is_no_parameter_or_no_count_is_refused():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="scatter"):
        ScatteredCounts(one, -one, one, validate_args=True)
    with pytest.raises(ValueError, match="dispersion"):
        ForegroundBackground(one, one, one, one, one, 0 * one, validate_args=True)
    for fn in (ScatteredCounts(one, one, one, validate_args=True), mixed()):
        with pytest.raises(ValueError, match="support"):
            fn.log_prob(torch.tensor(-1.0))
