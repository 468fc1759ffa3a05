"""Posteriors of rates as a PEtab parameter table, for tools that start from one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pandas as pd
import xarray as xr

from domains.kinetics.kinetics import form_of
from scivi.errors import DataError
from scivi.models import Template

PROB = 0.9  # of the intervals (our choice)
LINEAR: dict[str, Callable[[float], float]] = {"lin": float, "log": math.exp, "log10": partial(pow, 10.0)}


def parameter_table(template: Template, result: xr.DataTree, *, prob: float = PROB) -> pd.DataFrame:
    """The problem's parameter table with posterior medians as nominal values.

    pandas writes it: ``.to_csv("parameters.tsv", sep=chr(9))``.

    Args:
        template: made by ``kinetics.make``.
        result: of ``scivi.draw`` or ``scivi.nuts``.
        prob: of the intervals, equal tails.

    Returns:
        By parameterId: parameterScale, lowerBound, upperBound, nominalValue, estimate, as PEtab 1 has them,
        and posteriorLower and posteriorUpper; all on the linear scale. What is not estimated keeps its value.

    Raises:
        DataError: the result has no theta of these parameters.
    """
    problem = form_of(template).problem
    posterior = result["posterior"].to_dataset()
    if "theta" not in posterior or posterior.sizes.get("parameter") != len(problem.estimated):
        raise DataError(f'the posterior has no "theta" of {len(problem.estimated)} parameters.')
    tails = [(1 - prob) / 2, 0.5, (1 + prob) / 2]
    bounds = posterior["theta"].quantile(tails, ("chain", "draw")).transpose("parameter", "quantile").values
    found = {each.name: row for each, row in zip(problem.estimated, bounds, strict=True)}
    lines = []
    for each in problem.parameters:
        line = {"parameterId": each.name, "parameterScale": each.scale}
        line |= {"lowerBound": each.lower, "upperBound": each.upper, "nominalValue": each.nominal}
        line["estimate"] = int(each.is_estimated)
        if each.name in found:
            low, middle, high = (LINEAR[each.scale](value) for value in found[each.name])
            line |= {"nominalValue": middle, "posteriorLower": low, "posteriorUpper": high}
        lines.append(line)
    return pd.DataFrame(lines).set_index("parameterId")
