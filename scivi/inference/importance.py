"""Importance weights of draws of a guide: cut, judged, and used to choose among the draws.

References:
    Ionides 2008, J. Comput. Graph. Stat. 17, 295, doi:10.1198/106186008X320456 (truncation).
    Vehtari, Simpson, Gelman, Yao, Gabry 2024, JMLR 25(72), arXiv:1507.02646 (k-hat).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

FEWEST = 25  # draws: a tail of five, the fewest that ArviZ fits
USABLE_K = 0.7  # above, weights cannot correct (Vehtari et al. 2024)


def truncated(log_weight: Tensor) -> Tensor:
    """Normalised weights, none above the mean weight times the root of their number; NaN weighs nothing."""
    log_weight = torch.where(torch.isnan(log_weight), -math.inf, log_weight)  # off the support: no weight
    most = torch.logsumexp(log_weight, 0) - 0.5 * math.log(len(log_weight))
    return torch.softmax(torch.minimum(log_weight, most), 0)


def pareto_k(log_weight: np.ndarray) -> float:
    """K-hat of importance weights: the shape of their upper tail; infinite if it cannot be told."""
    from arviz_stats.base.array import array_stats

    known = np.nan_to_num(log_weight, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    most = known.max()
    least = most - 700.0
    # of few draws, or where a few hold all, there is no tail to look at
    if len(known) < FEWEST or not np.isfinite(most) or (known > least).mean() < 0.5:
        return math.inf
    if np.ptp(known) < 1e-3:  # all the same, up to the rounding of log densities in single precision
        return 0.0
    return float(array_stats.psislw(-np.maximum(known, least))[1])  # which takes minus the logarithms


def chosen(values: Mapping[str, Tensor], log_weight: Tensor, draws: int) -> dict[str, Tensor]:
    """So many of the proposals (proposal, ...), each as often as its weight asks for, in random order.

    Systematic resampling: one place in each of as many equal parts of the weights, which is less noise than
    places drawn one by one. From torch's random stream.
    """
    share = truncated(log_weight)
    at = (torch.arange(draws) + torch.rand(1)).double() / draws
    places = torch.searchsorted(share.cumsum(0), at).clamp_max(len(share) - 1)[torch.randperm(draws)]
    return {name: value[places.to(value.device)] for name, value in values.items()}
