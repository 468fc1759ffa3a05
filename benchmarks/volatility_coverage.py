"""Do corrected intervals of stochastic volatility hold the truth as often as they say?

    python benchmarks/volatility_coverage.py --json volatility_coverage.json

--series of --days days are simulated by the template (`volatility.simulate`: phi from .93 to .985, sigma from
.15 to .35), fitted as one table, and drawn. Intervals are central ones of draws weighed by their
Pareto-smoothed importance weights. Of a hundred series, a coverage of .9 has a Monte Carlo error of .03.

Figures:
    covered_50_PARAMETER, covered_90_PARAMETER: share of the series whose interval holds the truth.
    z_mean_PARAMETER, z_sd_PARAMETER: of (truth - corrected mean) / corrected sd.
    path_covered_90: share of all days whose log variance lies in its interval.
    k_hat_above: share of the series whose k-hat is above .7.
    effective_least: fewest effective draws of a series.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from record import use_threads, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def quantiles(values: np.ndarray, weight: np.ndarray, probabilities: list[float]) -> np.ndarray:
    """Weighted quantiles over draws (draw, ...), (probability, ...)."""
    order = np.argsort(values, 0)
    share = np.cumsum(np.take_along_axis(np.broadcast_to(weight, values.shape), order, 0), 0)
    sorted_values = np.take_along_axis(values, order, 0)
    places = [np.expand_dims((share < p).sum(0).clip(max=len(values) - 1), 0) for p in probabilities]
    return np.concatenate([np.take_along_axis(sorted_values, place, 0) for place in places])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", type=int, default=100, help="how many")
    parser.add_argument("--days", type=int, default=1000, help="of each")
    parser.add_argument("--draws", type=int, default=1000, help="of the posterior")
    parser.add_argument("--errors", default="normal", choices=["normal", "t", "skew_t"])
    parser.add_argument("--leverage", action="store_true", help="with leverage")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads()

    import scivi
    from domains.finance import volatility
    from scivi.analysis import pareto

    template = volatility.make(given.errors, given.leverage, drift=False)
    data, truth = scivi.simulate(template, {"series": given.series, "day": given.days}, seed=given.seed)
    tree = scivi.draw(scivi.fit(template, data), data, given.draws)
    log_weight = tree["sample_stats"]["row_log_weight"].values[0].astype(float)
    smoothed, k_hat = pareto.smooth(np.nan_to_num(log_weight.T, nan=-np.inf))
    weight = np.exp(smoothed).T  # (draw, series)
    figures: dict[str, float] = {}
    for name in [n for n in template.dims if n != "log_variance" and n != "log_variance_next"]:
        values, true = tree["posterior"][name].values[0], truth[name].values
        low, lower, upper, high = quantiles(values, weight, [0.05, 0.25, 0.75, 0.95])
        mean = (weight * values).sum(0)
        z = (true - mean) / np.sqrt((weight * (values - mean) ** 2).sum(0))
        figures |= {
            f"covered_50_{name}": float(((lower <= true) & (true <= upper)).mean()),
            f"covered_90_{name}": float(((low <= true) & (true <= high)).mean()),
            f"z_mean_{name}": float(z.mean()),
            f"z_sd_{name}": float(z.std()),
        }
    path, inside = tree["posterior"]["log_variance"], []
    for k in range(given.series):
        low, high = quantiles(path.values[0, :, k], weight[:, k, None], [0.05, 0.95])
        inside.append(
            ((low <= truth["log_variance"].values[k]) & (truth["log_variance"].values[k] <= high)).mean()
        )
    figures["path_covered_90"] = float(np.mean(inside))
    figures["k_hat_above"] = float((k_hat > 0.7).mean())
    figures["effective_least"] = float(pareto.effective_size(smoothed).min())
    for name, value in figures.items():
        print(f"{name:>22} {value:.4g}")
    settings = {"series": given.series, "days": given.days, "draws": given.draws, "seed": given.seed}
    write_json(given.json, "Do corrected intervals hold the truth as often as they say?", figures, settings)


if __name__ == "__main__":
    main()
