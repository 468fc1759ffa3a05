"""Of a posterior: states and observables between the measurements, and which directions the data fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from domains.kinetics.kinetics import form_of
from domains.kinetics.search import target_of
from domains.kinetics.simulation import simulated
from scivi.analysis.figures import Panels, titled
from scivi.errors import DataError
from scivi.models import Template

if TYPE_CHECKING:
    from scivi.analysis.figures import Where

DRAWS, TIMES = 200, 200  # enough for a band whose ends are quantiles of 5 and 95 % (our choice)


def _theta(result: xr.DataTree, draws: int) -> torch.Tensor:
    """Some draws (draw, parameter), evenly spread."""
    if "theta" not in result["posterior"]:
        raise DataError('the result has no "theta": it is of another template.')
    flat = (
        result["posterior"]["theta"].stack(sample=("chain", "draw")).transpose("sample", "parameter").values
    )
    some = np.linspace(0, len(flat) - 1, min(draws, len(flat))).round().astype(int)
    return torch.as_tensor(flat[some], dtype=torch.float64)


def bands(
    template: Template,
    result: xr.DataTree,
    times: Sequence[float] | None = None,
    *,
    probs: Sequence[float] = (0.05, 0.5, 0.95),
    draws: int = DRAWS,
) -> xr.Dataset:
    """Quantiles of states and of what is expected of observables, at any times.

    Args:
        template: made by ``kinetics.make``.
        result: of ``scivi.draw`` or ``scivi.nuts``.
        times: in order, in the problem's unit; from 0 to the last that was measured if not given.
        probs: of the quantiles.
        draws: of the posterior that are solved.

    Returns:
        ``state`` (prob, condition, time, species) and ``expected`` (prob, condition, time, observable);
        ``failed``, the share of solutions that did not come through (condition,).
    """
    form = form_of(template)
    problem = form.problem
    if times is None:
        last = np.asarray(result["constant_data"]["time"]).max()
        times = list(np.linspace(0.0, last, TIMES))
    grid = torch.as_tensor(times, dtype=torch.float64).expand(len(problem.rows), -1)
    with torch.no_grad():
        found = simulated(form, _theta(result, draws), grid)
    ok = found.ok[..., None, None].numpy()
    state, expected = (np.where(ok, x.numpy(), np.nan) for x in (found.y, found.mean))
    coords = {
        "prob": list(probs),
        "condition": list(problem.labels),
        "time": list(times),
        "species": list(problem.network.species),
        "observable": [each.name for each in problem.observables],
    }
    columns = {
        "state": (("prob", "condition", "time", "species"), np.nanquantile(state, probs, axis=0)),
        "expected": (("prob", "condition", "time", "observable"), np.nanquantile(expected, probs, axis=0)),
        "failed": (("condition",), 1.0 - found.ok.double().mean(0).numpy()),
    }
    return xr.Dataset(columns, coords)


def identifiability(template: Template, result: xr.DataTree, table: Any) -> xr.Dataset:
    """What the measurements say of each direction in the space of parameters, beside what the prior says.

    The eigenvectors of the information that is expected of the measurements at the posterior's median, on the
    unbounded scale, and the curvature of the prior there. A direction of which the prior says more than the
    data is not identified by them, whatever the intervals look like.

    Args:
        template: made by ``kinetics.make``.
        result: of ``scivi.draw`` or ``scivi.nuts``.
        table: of the measurements, as the template reads it.

    Returns:
        By ``direction``, least known first: ``information`` of the data, ``prior`` of the prior, ``ok`` (the
        data say more), and ``loading`` (direction, parameter).
    """
    form = form_of(template)
    target = target_of(form, table)
    median = _theta(result, DRAWS).median(0).values
    x = target.unbounded(median).unsqueeze(0)
    data, prior = (part[0] for part in target.curvatures(x))
    values, vectors = torch.linalg.eigh(data)
    of_prior = (vectors * (prior @ vectors)).sum(0)
    names = [each.label for each in form.problem.estimated]
    columns = {
        "information": (("direction",), values.clamp_min(0.0).numpy()),
        "prior": (("direction",), of_prior.numpy()),
        "ok": (("direction",), (values > of_prior).numpy()),
        "loading": (("direction", "parameter"), vectors.T.numpy()),
    }
    return xr.Dataset(columns, {"parameter": names})


def plot_bands(
    found: xr.Dataset, result: xr.DataTree, condition: str | None = None, *, ax: Where = None
) -> Any:
    """What is expected of each observable, with its band, and the measurements.

    Args:
        found: of ``bands``.
        result: of ``scivi.draw`` or ``scivi.nuts``.
        condition: label; the first if not given.
        ax: one of matplotlib's Axes for each observable; an empty Figure; None for a new one.

    Returns:
        The Axes, or an array of them if there are several observables.

    Raises:
        DataError: not as many axes are given.
    """
    condition = condition or str(found["condition"].values[0])
    here = found.sel(condition=condition)
    names = [str(name) for name in found["observable"].values]
    inside = float(found["prob"][-1] - found["prob"][0])
    panels = Panels(ax, len(names), (3.6 * len(names), 3.0))
    data = result["observed_data"]["measured"].sel(condition=condition)
    time = result["constant_data"]["time"].sel(condition=condition)
    for each, name in zip(panels.each, names, strict=True):
        curves = here["expected"].sel(observable=name).values  # (prob, time)
        each.fill_between(
            here["time"], curves[0], curves[-1], alpha=0.3, lw=0, label=f"expected, {inside:.0%}"
        )
        each.plot(here["time"], curves[len(curves) // 2], lw=1.2)
        each.plot(time, data.sel(observable=name), "o", ms=3.5, color="black", label="measured")
        titled(each, "time", title=name)
    panels.each[0].legend(frameon=False, fontsize=8)
    return panels.told
