"""``calibrate``: simulation-based calibration of a template, from its prior to ranks, in one call.

Parameters are drawn from the prior and data from them; the data are fitted as a user would fit them, and the
rank of the true parameters among the posterior's draws is taken. Over many such data sets the ranks are
uniform if, and only if, the posteriors are right on average over the prior.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from scivi.analysis import ranks
from scivi.errors import DataError, FitError, PlanError, Unsupported
from scivi.inference.draws import draw
from scivi.inference.loop import fit
from scivi.inference.many import ESTIMATORS, fit_many
from scivi.inference.objective import prepare
from scivi.inference.opening import begin, open_data
from scivi.inference.plan import Plan
from scivi.inference.scores import quiet
from scivi.inference.simulate import simulate
from scivi.inference.state import Fit
from scivi.models.binding import seeded
from scivi.models.mixtures import AdaptedGuide
from scivi.models.template import Template

OVER = "simulation"  # the dim of repetitions, as ``analysis.sbc`` knows it
REPAID = 2000  # steps of all fits together that repay compiling one (as ``Plan.compile`` says)
FEWEST_DRAWS = 99  # fewer ranks than a hundred are coarser than the histogram of three hundred fits


def calibrate(
    template: Template,
    data: Any,
    *,
    fits: int = 300,
    draws: int = 999,
    plan: Plan | None = None,
    simulator: Template | None = None,
    new_rows: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Ranks of true parameters among posterior draws, over data sets simulated from the prior.

    ``analysis.sbc`` judges the ranks, ``analysis.plot_ranks`` draws them.

    Args:
        template: what is calibrated, with its own guide; its prior makes the parameters, its model run
            forward the data. Its ``simulate``, which may narrow the prior, is not used.
        data: a table, of which sizes, labels, given fields and gaps are used; or the sizes of the dims.
        fits: number of data sets.
        draws: of each posterior; a rank is one of draws + 1 numbers.
        plan: of each fit; the template's own if None. The seed is another in each.
        simulator: a template of the same fields, whose model makes the data in place of the first one's:
            where that sums latents out, one that samples them also tells their truth.
        new_rows: if not 0, one data set is simulated in place of many, and fitted without its last so many
            rows. Ranks are those of these rows' latents: the calibration of an amortised guide on rows that
            it has not seen. What rows share is drawn once, and its error common to all ranks: they are
            uniform only where rows share nothing, or are so many that the fit knows the globals exactly.
        seed: of everything.
        progress: show a progress bar.

    Returns:
        Dim simulation, or with ``new_rows`` that of the rows under this name: the rank of every reported site
        that the simulator's model has. Of sites that lie along rows the rank is that of one row of each data
        set, chosen at random, and of one entry along dims that no population has; so all entries of a
        variable are independent over simulations. Coordinate verdict: that on the posterior, or "diverged",
        where ranks are NaN. Attribute draws.

    Raises:
        DataError: the template refuses data that its own prior has made; the message says which. Narrow the
            prior. Or ``data`` does not fit the template.
        PlanError: fits, draws or new_rows is too small.
        Unsupported: new rows are asked of a guide that is not amortised.

    Notes:
        Costs ``fits`` fits. They are made all at once by ``fit_many`` where this takes the same steps as
        ``fit`` would, and else one after the other, which share a compiled step.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), arXiv:1804.06788.
    """
    numbers = (("fits", fits, 1), ("draws", draws, FEWEST_DRAWS), ("new_rows", new_rows, 0))
    if low := [f"{n} = {v}; at least {m}" for n, v, m in numbers if v < m]:
        raise PlanError(f"this calibration cannot be made: {', '.join(low)}.")
    maker = replace(simulator or template, simulate=None)
    plan = plan or Plan.from_dict(template.plan)
    if new_rows:
        return _of_new_rows(template, maker, data, plan, new_rows, draws, seed, progress)
    made = [_simulated(maker, data, _seeds(seed, k)[0]) for k in range(fits)]
    found = []
    with tqdm(total=fits, disable=not progress, desc=f"calibration of {template.name}", unit="fit") as bar:
        for k, one in enumerate(_fitted(template, [table for table, _ in made], plan, seed)):
            found.append(_ranked(template, one, *made[k], draws, _seeds(seed, k)))
            bar.update()
    joined = xr.concat([each for each, _ in found], OVER, join="outer")
    joined = joined.drop_vars(_constant([truth for _, truth in made]), errors="ignore")
    verdicts = np.array([word for _, word in found])
    return joined.assign_coords(verdict=(OVER, verdicts)).assign_attrs(draws=draws, template=template.name)


def _seeds(seed: int, k: int) -> list[int]:
    """Of the data, fit, draws and choice of row of a simulation, all independent."""
    return np.random.SeedSequence([seed, k]).generate_state(4).tolist()


def _simulated(maker: Template, data: Any, seed: int) -> tuple[xr.Dataset, xr.Dataset]:
    """A table and its truth; entries that ``data`` lack stay missing."""
    if isinstance(data, Mapping) and all(isinstance(n, int) for n in data.values()):
        return simulate(maker, data, seed=seed)
    source = open_data(maker, data)
    table, truth = simulate(maker, source.sizes, seed=seed, like=source)
    there = source.read({})
    for name in maker.observed:
        if there[name].dtype.kind == "f" and np.isnan(there[name]).any():
            table[name] = table[name].where(~np.isnan(there[name]))
    return table, truth


def _fitted(template: Template, tables: Sequence[xr.Dataset], plan: Plan, seed: int) -> Iterator[Fit | None]:
    """The fit of each table, in their order; None for one that diverged."""
    if len(tables) > 1 and _can_be_batched(template, _opened(template, tables[0], 0), plan):
        try:
            many = fit_many(template, xr.concat(tables, OVER, join="override"), OVER, plan, progress=False)
        except Unsupported:  # then one after the other
            pass
        else:
            yield from many.values()
            return
    compiles = plan.compile  # a compiled step serves all that follow: so it is repaid even by short fits
    if len(tables) > 1 and compiles == "auto" and plan.steps * len(tables) > REPAID:
        compiles = "on"
    for k, table in enumerate(tables):
        own = replace(plan, seed=_seeds(seed, k)[1], compile=compiles)
        try:
            one = fit(template, _opened(template, table, k), own, progress=False)
            if one.provenance["fit"]["engine"].get("steps") == "eager":  # it cannot be captured
                compiles = plan.compile
            yield _ended(one)
        except FitError:
            yield None


def _ended(one: Fit) -> Fit:
    """The same fit, unless a signal has stopped it: then all shall stop."""
    if one.provenance["fit"]["stopped"] == "signal":
        raise KeyboardInterrupt
    return one


def _opened(template: Template, table: xr.Dataset, k: int) -> Any:
    try:
        return open_data(template, table)
    except DataError as error:
        raise DataError(
            f'"{template.name}" refuses data that its own prior has made (simulation {k}); narrow the prior: '
            f"{error}"
        ) from error


def _can_be_batched(template: Template, source: Any, plan: Plan) -> bool:
    """Whether many fits at once take the steps that each would take by itself."""
    state = begin(template, source, plan)
    whole = plan.rows_per_batch is None or max(source.sizes.values()) <= plan.rows_per_batch
    if not (whole and state.learns and plan.steps) or isinstance(state.bound.nets.guide, AdaptedGuide):
        return False
    with seeded(0), quiet():
        return prepare(state.bound, state.bound.example, plan).estimator in ESTIMATORS


def _ranked(
    template: Template,
    one: Fit | None,
    table: xr.Dataset,
    truth: xr.Dataset,
    draws: int,
    seeds: Sequence[int],
) -> tuple[xr.Dataset, str]:
    """Ranks of a simulation, and the verdict on its fit."""
    place = _place(template, truth, seeds[3])
    planted = truth.isel(place, drop=True, missing_dims="ignore")
    if one is None:
        return xr.full_like(planted, np.nan, dtype=float), "diverged"
    tree = draw(one, table, draws, seed=seeds[2], progress=False)
    posterior = tree["posterior"].to_dataset().isel(place, drop=True, missing_dims="ignore")
    found = ranks(xr.DataTree.from_dict({"posterior": posterior}), planted, seed=seeds[3])
    return found, str(tree.attrs["verdict"])


def _place(template: Template, truth: xr.Dataset, seed: int) -> dict[str, int]:
    """One row, and one entry along each dim that rows alone have."""
    rng, rows = np.random.default_rng(seed), set(template.row_dims)
    shared = {d for name, dims in template.dims.items() if not set(dims) & rows for d in dims}
    return {str(d): int(rng.integers(n)) for d, n in truth.sizes.items() if d not in shared}


def _constant(truths: Sequence[xr.Dataset]) -> list[str]:
    """Variables of which the model leaves nothing open, such as the correlation of a lone band."""
    first, *others = truths
    return [str(n) for n in first.data_vars if others and all(t[n].identical(first[n]) for t in others)]


def _of_new_rows(
    template: Template,
    maker: Template,
    data: Any,
    plan: Plan,
    new_rows: int,
    draws: int,
    seed: int,
    progress: bool,
) -> xr.Dataset:
    """Ranks of the last rows of a simulated table, which the fit has not seen."""
    seeds, row = _seeds(seed, 0), template.row_dims[0]
    table, truth = _simulated(maker, data, seeds[0])
    n = table.sizes[row] - new_rows
    if n < 1:
        raise PlanError(f'new_rows = {new_rows}, but there are {table.sizes[row]} along "{row}" in all.')
    seen, new = table.isel({row: slice(n)}), table.isel({row: slice(n, None)})
    own = _ended(fit(template, _opened(template, seen, 0), replace(plan, seed=seeds[1]), progress=progress))
    tree = draw(own, new, draws, seed=seeds[2], progress=progress)
    local = [name for name, array in truth.data_vars.items() if row in array.dims]
    found = ranks(tree, truth[local].isel({row: slice(n, None)}), seed=seeds[3])
    place = {d: k for d, k in _place(template, found, seeds[3]).items() if d != row}
    found = found.isel(place, drop=True, missing_dims="ignore").drop_vars(row, errors="ignore")
    word = str(tree.attrs["verdict"])
    found = found.rename({row: OVER}).assign_coords(verdict=(OVER, np.full(new_rows, word)))
    return found.assign_attrs(draws=draws, template=template.name)
