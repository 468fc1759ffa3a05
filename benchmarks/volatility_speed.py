"""How fast is stochastic volatility fitted, beside a loop over days and beside NUTS?

    python benchmarks/volatility_speed.py --json volatility_speed.json

Gradients are of one ELBO of the basic model (normal errors, no leverage): parameters and path drawn from a
guide, float32, validation off, in turns in one process. Pyro's side loops over days by `pyro.markov`; ours
draws the path from a Gaussian chain and scores it in one call. What `scivi.fit` takes, the exact sum over all
paths with its gradient, from nothing on, is timed beside them.

The posterior of the last 2000 days of the S&P 500 is `scivi.fit` and `scivi.draw` of --draws, weights and
paths included; NUTS is NumPyro's, four chains of 600 and 1000 steps one after the other, compilation included
(tests/domains/finance/sv_oracles.py). The hundred series are simulated, 2000 days each, drawn and weighed as
one table.

Gradients on one thread, posteriors on two, NUTS likewise; wall time.

Figures:
    vs_markov_t2000: Pyro's time over ours, 2000 days; median of the repeats.
    vs_markov_least, vs_markov_most: over the repeats.
    sum_vs_markov_t2000: Pyro's time over that of the sum over all paths and its gradient.
    b32_over_b1: our time of 32 series over that of one. sum_b32_over_b1: likewise of the sum.
    t2000_over_t250: our time of 2000 days over that of 250. sum_t2000_over_t250: likewise of the sum.
    svi_s, nuts_s: seconds for one series.
    svi_over_nuts_time_1: their ratio.
    svi_over_nuts_time_100: seconds for the hundred series over a hundred times those of NUTS for one.
    hundred_over_one: seconds for the hundred series over those of one, 2000 days simulated likewise.
    worst_shift: largest error of a parameter's mean, in NUTS sd. worst_ratio: farthest ratio of sd from 1.
    effective: effective draws of --draws. nuts_effective: the least of NUTS's parameters.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from record import THREADS, use_threads, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DAYS = 2000


def markov(days: int) -> Callable[[], None]:
    """One ELBO gradient with a loop over days."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Trace_ELBO

    pyro.clear_param_store()
    y = torch.randn(1, days)

    def parameters():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        phi = 2 * pyro.sample("phi", dist.Beta(20.0, 1.5)) - 1
        return mu, phi, pyro.sample("sigma", dist.HalfNormal(1.0))

    def model():
        mu, phi, sigma = parameters()
        h = mu
        with pyro.plate("series", 1):
            for t in pyro.markov(range(days)):
                wide = sigma if t else sigma / (1 - phi**2).sqrt()
                h = pyro.sample(f"h{t}", dist.Normal(mu + phi * (h - mu), wide))
                pyro.sample(f"y{t}", dist.Normal(0.0, (0.5 * h).exp()), obs=y[:, t])

    def guide():
        pyro.sample("mu", dist.Normal(pyro.param("a", torch.zeros(())), 0.1))
        pyro.sample("phi", dist.Beta(pyro.param("b", torch.tensor(200.0)), 4.0))
        pyro.sample("sigma", dist.LogNormal(pyro.param("c", torch.tensor(-1.5)), 0.1))
        shrink, shift = pyro.param("d", torch.full((days,), 0.9)), pyro.param("e", torch.zeros(days))
        width, h = pyro.param("f", torch.full((days,), -1.0)), torch.zeros(())
        with pyro.plate("series", 1):
            for t in pyro.markov(range(days)):
                h = pyro.sample(f"h{t}", dist.Normal(shrink[t] * h + shift[t], width[t].exp()))

    return lambda: Trace_ELBO().loss_and_grads(model, guide)


def chain(series: int, days: int) -> Callable[[], None]:
    """One ELBO gradient with the path in one call."""
    import torch

    from domains.finance.likelihood import Story
    from scivi.models.chains import GaussianChain

    y = torch.randn(series, days)
    at = torch.tensor([0.0, 0.95, 0.3]).expand(series, 3).clone().requires_grad_(True)
    pseudo = torch.zeros(2, series, days + 1, requires_grad=True)

    def gradient() -> None:
        mu, phi, sigma = (at + 0.01 * torch.randn(series, 3)).unbind(-1)
        story = Story(mu, phi, sigma)
        prior, (place, log_weight) = story.path(days), pseudo
        diagonal, off = prior.precision()
        weight = log_weight.exp()
        shift = (1 - phi)[..., None] * (mu / sigma.square())[..., None] + weight * place
        guide = GaussianChain(diagonal + weight, off, shift, validate_args=False)
        h = guide.rsample()
        link = story.link(y)
        value = prior.log_prob(h) + link(h[..., :-1], h[..., 1:]).sum(-1) - guide.log_prob(h)
        torch.autograd.grad(value.sum(), [at, pseudo])

    return gradient


def summed(series: int, days: int) -> Callable[[], None]:
    """The sum over all paths and its gradient by the parameters, from the returns on."""
    import torch

    from domains.finance.likelihood import Story

    y = torch.randn(series, days)

    def gradient() -> None:
        at = torch.tensor([0.0, 0.95, 0.3]).expand(series, 3).clone().requires_grad_(True)
        story = Story(*at.unbind(-1))
        value = story.log_likelihood(y, None, story.near(y, None))
        torch.autograd.grad(value.sum(), at)

    return gradient


def timed(run: Callable[[], None], times: int = 1) -> float:
    """Seconds of one run, the mean of some."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def gradients(repeats: int) -> dict[str, float]:
    """All that is said of gradients."""
    import pyro
    import torch

    pyro.enable_validation(False)
    torch.set_num_threads(1)
    loop = markov(DAYS)
    runs = {"one": chain(1, DAYS), "many": chain(32, DAYS), "short": chain(1, 250)}
    runs |= {"sum": summed(1, DAYS), "sum_many": summed(32, DAYS), "sum_short": summed(1, 250)}
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in ("loop", *runs)}
    for _ in range(repeats):
        found["loop"].append(timed(loop))
        for name, run in runs.items():
            found[name].append(timed(run, 10 if name in ("one", "short", "many") else 4))
    pyro.clear_param_store()

    def ratio(a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(found[a], found[b], strict=True)]

    against = ratio("loop", "one")
    return {
        "vs_markov_t2000": median(against),
        "vs_markov_least": min(against),
        "vs_markov_most": max(against),
        "sum_vs_markov_t2000": median(ratio("loop", "sum")),
        "b32_over_b1": median(ratio("many", "one")),
        "sum_b32_over_b1": median(ratio("sum_many", "sum")),
        "t2000_over_t250": median(ratio("one", "short")),
        "sum_t2000_over_t250": median(ratio("sum", "sum_short")),
    }


def posteriors(draws: int, repeats: int) -> dict[str, float]:
    """One series beside NUTS, and a hundred."""
    import arviz_stats
    import numpy as np
    import torch

    torch.set_num_threads(THREADS)

    import scivi
    from domains.finance import volatility
    from tests.domains.finance.sv_oracles import by_nuts, sp500
    from tests.domains.finance.test_volatility import BASIC, corrected, drawn

    data, seconds, nuts_seconds, nuts = sp500(DAYS), [], [], {}
    by_nuts(data["returns"].values[0, :100], leverage=False, warmup=5, draws=5)  # compiled for another length
    for k in range(repeats):
        start = time.perf_counter()
        tree, weight, _, effective = drawn(BASIC, data, draws, seed=k)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        nuts = by_nuts(data["returns"].values[0], leverage=False)
        nuts_seconds.append(time.perf_counter() - start)
    shift, ratio = [], []
    for name in ("mu", "phi", "sigma"):
        mean, sd = corrected(tree["posterior"][name].values[0, :, 0], weight)
        shift.append(abs(mean - nuts[name].mean()) / nuts[name].std())
        ratio.append(sd / nuts[name].std())
    many, _ = scivi.simulate(BASIC, {"series": 100, "day": DAYS}, seed=0)
    template = volatility.make("normal", leverage=False, drift=False)
    spent = {}
    for name, table in (("one", many.isel(series=[0])), ("many", many)):
        start = time.perf_counter()
        scivi.draw(scivi.fit(template, table, progress=False), table, draws)
        spent[name] = time.perf_counter() - start
    one, other = median(seconds), median(nuts_seconds)
    effective_nuts = [
        float(arviz_stats.ess(nuts[name].reshape(4, -1), chain_axis=0, draw_axis=1))
        for name in ("mu", "phi", "sigma")
    ]
    return {
        "svi_s": one,
        "nuts_s": other,
        "svi_over_nuts_time_1": one / other,
        "svi_over_nuts_time_100": spent["many"] / (100 * other),
        "hundred_over_one": spent["many"] / spent["one"],
        "worst_shift": float(max(shift)),
        "worst_ratio": float(max(ratio, key=lambda r: abs(np.log(r)))),
        "effective": effective,
        "nuts_effective": min(effective_nuts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1000, help="of the posterior")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is timed")
    parser.add_argument("--part", choices=["gradients", "posteriors", "both"], default="both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    figures: dict[str, float] = {}
    use_threads()
    if given.part != "posteriors":
        figures |= gradients(given.repeats)
    if given.part != "gradients":
        figures |= posteriors(given.draws, given.repeats)
    for name, value in figures.items():
        print(f"{name:>24} {value:.4g}")
    settings = {"draws": given.draws, "repeats": given.repeats}
    write_json(given.json, "How fast is stochastic volatility fitted?", figures, settings)


if __name__ == "__main__":
    main()
