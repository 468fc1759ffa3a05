"""How good is the normal of what rows share: importance weights of its draws, with every row integrated."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from scivi.inference import marginal
from scivi.inputs.batches import chunks, some_field
from scivi.models.binding import Bound

FEWEST = 50  # draws, fewer of which say nothing about the weights' tail
AT_ONCE = 2**19  # nodes x rows (our choice: a few MB a tensor)


def weigh_globals(bound: Bound, source: Any, theta: Tensor, most: int) -> np.ndarray | None:
    """Log p(data | globals) + log prior - log q of draws of the globals, all rows of the data integrated.

    Args:
        bound: a trained pair.
        source: data.
        theta: draws of the globals on the unbounded scale, (draw, D).
        most: rows x nodes x draws that are affordable; fewer draws are weighed if need be.

    Returns:
        Of the first draws, (draw,); None if fewer than 50 are affordable, no row is to be integrated, or the
        marginal cannot be had.
    """
    module, template = marginal.global_module(bound), bound.template
    if module is None or not bound.amortised:
        return None
    some, plan = some_field(bound.example), marginal.layout(bound, bound.example)
    if plan.refusal is not None or not plan.sites:  # with nothing to integrate, lp - log_q is it already
        return None
    per_dim = {1: 15, 2: 9}.get(plan.dims, 5)
    n_nodes = marginal.n_nodes(plan.dims, per_dim)
    n = min(len(theta), most // (n_nodes * source.sizes[template.row_dims[0]]))
    if n < FEWEST:
        return None
    theta, size = theta[:n], max(64, AT_ONCE // n_nodes)
    total = -module.distribution().log_prob(theta).double()
    for s in range(n):
        total[s] += marginal.log_prior(bound, module, theta[s], bound.example)
    for batch in chunks(source, template.fields, template.row_dims, size, some.device, some.dtype):
        for s in range(n):
            total[s] += marginal.log_marginal(bound, module, theta[s], batch, plan, per_dim)
    return total.cpu().numpy()
