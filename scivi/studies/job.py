"""One fit from names and numbers, and everything that it leaves in a folder.

``scivi fit`` runs one, each fit of a study is one. Torch is loaded when a job runs, not before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scivi.catalogue import near, neighbours, refuse_misspelt
from scivi.errors import CheckpointError, DataError, PlanError, TemplateError, listed
from scivi.files import locked
from scivi.inference.plan import Plan

if TYPE_CHECKING:
    import xarray as xr

    from scivi.models.template import Template

MOST_DRAWS, FEWEST_DRAWS = 1000, 100  # that a fit leaves of itself
NUMBERS = 2**25  # draws x observed entries beyond which it leaves fewer (our choice: some seconds, 130 MB)


@dataclass(frozen=True)
class Job:
    """What to fit, to what, and how.

    Args:
        template: as "module:name": a template, or a function from data to a template and data.
        data: path.
        plan: fields of the plan that differ from ``base``.
        base: the plan to begin with; None for the template's own.
        make: arguments of a function ``template``.
        prior: numbers of the prior that differ.
        dims: new names of dims, by old.
        columns: where fields are, by field.
        select: labels that are kept, by dim.
        draws: posterior draws; None for 1000, or as few as 100 where rows are many.
    """

    template: str
    data: Path
    plan: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] | None = None
    make: Mapping[str, Any] = field(default_factory=dict)
    prior: Mapping[str, Any] = field(default_factory=dict)
    dims: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    select: Mapping[str, list[str]] = field(default_factory=dict)
    draws: int | None = None

    def plan_of(self, own: Mapping[str, Any]) -> Plan:
        """The plan, given the template's own."""
        table = Plan.from_dict(own if self.base is None else self.base).to_dict() | dict(self.plan)
        try:
            return Plan.from_dict(table)
        except TypeError as error:  # a table under "stop" with names that a Plateau does not have
            raise PlanError(f"this plan cannot be used: {error}.") from None

    def opened(self) -> tuple[Template, Any]:
        """The template, and the data checked against it."""
        template, offered = imported(self.template)
        from scivi.models.template import Template

        data: Any = self.data
        if not isinstance(template, Template):
            template, data = self._made(template, offered)
        elif self.make:
            raise TemplateError(f'"{self.template}" is a template and no function: there is nothing to make.')
        template = with_prior(template, self.prior)
        return template, opened(template, data, self.dims, self.columns, self.select)

    def _made(self, maker: Any, offered: str) -> tuple[Template, Any]:
        """Template and data that a function makes of the data."""
        from scivi.models.template import Template

        try:
            signature(maker).bind(self.data)
        except (TypeError, ValueError):  # nothing, or nothing that can be called with one argument
            raise _absent(self.template, offered, ", and no function of DATA so called") from None
        if not self.data.exists():
            raise DataError(f'there is no "{self.data}".')
        try:
            found = maker(self.data, **self.make)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise TemplateError(f'"{self.template}" cannot be called so: {error}.') from None
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Template):
            return found
        kind = type(found).__name__
        if isinstance(found, tuple):
            kind = f"a tuple of {', '.join(type(part).__name__ for part in found) or 'nothing'}"
        raise TemplateError(
            f'"{self.template}" returned {kind}; it must return a template and data: (template, data).'
        )


def imported(reference: str) -> tuple[Any, str]:
    """What ``module:name`` names, None if nothing; and in words, the templates that the module has.

    Raises:
        TemplateError: there is no such module, and the nearest is told before torch is loaded; or as
            ``models.named.imported``.
        Unsupported: as ``models.named.imported``.
    """
    refuse_misspelt(reference)
    from scivi.models import named

    return named.imported(reference)


def template_called(reference: str, prior: Mapping[str, Any]) -> Template:
    """The template that ``module:name`` names, with numbers of its prior replaced.

    Raises:
        TemplateError: there is none so called, or it is a function, which needs data.
    """
    found, offered = imported(reference)
    from scivi.models.template import Template

    if isinstance(found, Template):
        return with_prior(found, prior)
    if callable(found):
        why = "is a function; without data a template is needed"
        raise TemplateError(f'"{reference}" {why}. Its module has {offered}.')
    raise _absent(reference, offered)


def _absent(reference: str, offered: str, besides: str = "") -> TemplateError:
    """The error for a name that a module does not have; the nearest is told, if any is near."""
    module, _, name = reference.partition(":")
    same = [other.partition(":")[2] for other in neighbours(reference) if other.startswith(f"{module}:")]
    guess = near(name, same) or "."
    return TemplateError(f'module "{module}" has no template "{name}"{besides}; it has {offered}{guess}')


def with_prior(template: Template, changes: Mapping[str, Any]) -> Template:
    """A template with some numbers of its prior replaced.

    Raises:
        TemplateError: listing the names that it does not have, and values of another type.
    """
    known = {f.name: getattr(template.prior, f.name) for f in fields(template.prior)}
    faults, values = [], {}
    for name, given in changes.items():
        value = tuple(given) if isinstance(given, list) else given
        if name not in known:
            has = ", ".join(known) or "no numbers"
            faults.append(f'it has no "{name}"; it has {has}{near(name, known)}')
            continue
        if isinstance(known[name], float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if known[name] is not None and not isinstance(value, type(known[name])):
            faults.append(
                f"{name} = {given}; it must be of type {type(known[name]).__name__}, as {known[name]!r} is"
            )
        values[name] = value
    if faults:
        raise TemplateError(listed(f'the prior of "{template.name}" cannot be changed so:', faults))
    return replace(template, prior=replace(template.prior, **values)) if values else template


def opened(
    template: Template,
    data: Any,
    dims: Mapping[str, str],
    columns: Mapping[str, str],
    select: Mapping[str, list[str]],
) -> Any:
    """Data as a source that fits the template, after renaming and selecting."""
    from scivi.inference.opening import open_data
    from scivi.inputs.sources import arranged, as_table

    if dims or columns or select:
        data = arranged(as_table(data), dims=dims, columns=columns, select=select)
    return open_data(template, data)


def run(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: bool = True,
    progress: bool = True,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Fit, and leave fit, history, posterior, figures and report in a folder.

    Args:
        job: what to fit.
        out: the folder; made if absent.
        resume: go on from the checkpoint in it, if any.
        overwrite: replace an earlier fit in it.
        report: write the page and figures too; without, there is still a verdict.
        progress: show a progress bar.
        track: trackers that are told of the history too, as ``scivi.inference.trackers.tracker`` takes them.

    Returns:
        Paths of what was written, how the fit ended ("stopped", "steps", "wall_s"), and, unless a signal
        stopped it, the verdict and why.

    Raises:
        CheckpointError: the folder holds a fit, and neither ``resume`` nor ``overwrite`` is given; or another
            process is fitting there.
        DataError, TemplateError, PlanError, FitError: as ``scivi.fit``.
    """
    how = job.plan_of({})  # a plan that cannot be used is told before anything is read
    template, source = job.opened()
    how = job.plan_of(template.plan)
    if (out / "fit").exists() and not (resume or overwrite):
        raise CheckpointError(f'"{out}" holds a fit. Choose another --out, or give --resume or --overwrite.')
    from scivi.inference import draws, loop, state, trackers, trees
    from scivi.inference.team import team

    first = team().rank == 0  # of several processes that share the fit: it writes
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".fit.lock") if first else nullcontext(True) as alone:
        if not alone:
            raise CheckpointError(f'"{out}" is in use: another process is fitting there.')
        history = out / "history.jsonl"
        if first and not resume:  # it would go on in the file of the fit before
            history.unlink(missing_ok=True)
        about = trackers.about(template, source, how)
        record = [history, *(trackers.tracker(word, out, about) for word in track)] if first else []
        kept: dict[str, Any] = {"record": record, "checkpoint": out / "checkpoint.safetensors"}
        result = loop.fit(template, source, how, **kept, resume=resume, progress=progress)
        if first:
            state.save(result, out / "fit")
            trees.save_tree(result.history, out / "history.nc")
        ended = result.provenance["fit"]
        summary: dict[str, Any] = {"fit": str(out / "fit"), "history": str(out / "history.nc")}
        summary |= {key: ended[key] for key in ("stopped", "steps", "wall_s") if key in ended}
        if ended["stopped"] == "signal":
            return summary
        n_draws, to = _amount(job.draws, result.template, source, out)
        if not first and to.suffix != ".zarr":  # which they write together
            return summary
        tree = draws.draw(result, source, n_draws, seed=how.seed, to=to, predictive=True, progress=progress)
        summary["posterior"] = str(to)
        if not first:
            return summary
        page, figures = (out / "report.html", out / "figures") if report else (None, None)
        return summary | judge(tree, page, figures)


def _amount(draws: int | None, template: Template, source: Any, out: Path) -> tuple[int, Path]:
    """How many draws a fit leaves, and the file: zarr, written as rows come, where they are many."""
    # observed entries, of which each draw makes a replicate
    entries = sum(math.prod(source.sizes[d] for d in template.fields[n].dims) for n in template.observed)
    if draws is None:
        draws = max(FEWEST_DRAWS, min(MOST_DRAWS, NUMBERS // max(1, entries)))
    return draws, out / ("posterior.zarr" if draws * entries > 8 * NUMBERS else "posterior.nc")


def judge(
    tree: xr.DataTree,
    page: Path | None,
    figures: Path | None = None,
    *,
    reference: xr.DataTree | None = None,
    truth: xr.Dataset | None = None,
) -> dict[str, Any]:
    """Write the report and figures, if asked; what a summary says of them.

    Args:
        tree: a posterior.
        page: to write, if any.
        figures: folder for them.
        reference: to compare with, as ``scivi.analysis.report`` takes it.
        truth: of simulated data, likewise.
    """
    from matplotlib.figure import Figure

    import scivi.analysis as analysis
    from scivi.analysis import groups
    from scivi.analysis.report import MOST_ROWS

    table = analysis.report(tree, to=page, reference=reference, truth=truth)
    summary = {"verdict": table.attrs["verdict"], "why": json.loads(table.attrs["why"])}
    summary |= {} if page is None else {"report": str(page)}
    if figures is None:
        return summary
    figures.mkdir(parents=True, exist_ok=True)
    tree = groups.some_rows(tree, MOST_ROWS)
    for name in ("population", "row_k", "catalogue", "predictive", "history"):
        figure = Figure()
        try:
            getattr(analysis, f"plot_{name}")(tree, ax=figure)
        except DataError:  # the posterior has nothing of what this one shows
            continue
        figure.savefig(figures / f"{name}.png", dpi=150)
    return {**summary, "figures": str(figures)}
