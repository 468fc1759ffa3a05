"""Many similar experiments: one reaction network, whose rates differ somewhat from experiment to experiment.

A problem with one condition describes an experiment. For experiment e, a parameter v that varies and one s
that does not, each on its own scale (ln or log10 for those that vary), moment m and observable o:

    mean_v     ~ prior of the parameter             as the problem says
    scatter_v  ~ HalfNormal(prior.scatter)          in ln units, whatever the scale
    shared_s   ~ prior of the parameter
    theta_ev   ~ Normal(mean_v, scatter_v)
    dy_e/dt    = f(t, y_e, k(theta_e, shared)),     y_e(0) = y0(theta_e, shared)
    t_o(measured_emo) ~ Normal or Laplace(t_o(mean of o at y_e(t_em)), sd of o)    t_o: as it is, or a log

Mean, scatter and shared have a joint normal. An experiment's theta is amortised, by an encoder of its
measurements (``encoders``) that has practised on simulated ones (``rehearsal``).

Longer than 400 lines because what is wrong with descriptions and measurements is told beside what reads them.

References:
    Lindstrom and Bates 1990, Biometrics 46, 673, doi:10.2307/2532087 (nonlinear mixed effects).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from domains.kinetics import experiments as ready
from domains.kinetics import rehearsal
from domains.kinetics.encoders import OWN, Encoder, Population, Start
from domains.kinetics.kinetics import Counter, Noise
from domains.kinetics.petab_problems import Problem, faults_of_levels
from domains.kinetics.priors import LN, ParameterPrior
from domains.kinetics.rehearsal import rehearse
from domains.kinetics.simulation import FLOOR, Form
from scivi.errors import DataError, TemplateError, listed
from scivi.models import Batch, Template, guides
from scivi.ode.solve import Method

# Each step solves the experiments of a batch on nodes ** varying points; the encoder has practised already.
PLAN = {"steps": 30, "rows_per_batch": 64, "lr": 1e-3}
DIMS = {"measured": ("experiment", "moment", "observable"), "time": ("experiment", "moment")}


@dataclass(frozen=True)
class Prior:
    """Numbers of the model besides the priors of the problem's parameters."""

    scatter: float = 1.0  # ln units, half-normal scale: experiments may differ by a factor of e. Our choice


def model(batch: Batch, prior: Prior, nets: Nets, *, population: Population) -> None:
    """The generative story of the module's docstring."""
    like, common = batch.measured, population.parameters(population.shared)
    mean = pyro.sample("mean", ParameterPrior(population.parameters(population.varying), like))
    scale = prior.scatter / population.ln_bases(like)
    scatter = pyro.sample("scatter", dist.HalfNormal(scale).to_event(1))
    shared = pyro.sample("shared", ParameterPrior(common, like)) if common else None
    with batch.plate("experiment"):
        theta = pyro.sample("theta", dist.Normal(mean, scatter).to_event(1))
        found = population.seen(theta, shared, batch.values)
        nets.counter.count(found.ok)
        pyro.factor("unsolved", torch.where(found.ok, 0.0, FLOOR).to(like))
        with poutine.mask(mask=cast(Any, found.ok)):
            noise = Noise(population.problem, found.mean.to(like), found.sd.to(like))
            batch.observe("measured", noise.to_event(2))


def derive(
    batch: Batch, prior: Prior, nets: Nets, values: Mapping[str, Tensor], *, population: Population
) -> dict[str, Tensor]:
    """Of a draw: values as they are, what is expected of each measurement, whether the solution failed."""
    like, theta = batch.measured, values["theta"]
    found = population.seen(theta, values.get("shared"), batch.values)
    return {
        "value": (theta * population.ln_bases(theta)).exp(),
        "expected": found.mean.to(like),
        "failed": (~found.ok).to(like),
    }


class Nets(nn.Module):
    """The guide's own, and the count of failures."""

    def __init__(self, shared: guides.JointNormalGuide, encoder: Encoder) -> None:
        super().__init__()
        self.globals, self.encoder, self.counter = shared, encoder, Counter()


def prior_start(population: Population, prior: Prior) -> Start:
    """The median of the priors of mean and shared, and the mean of that of the scatter."""
    like = torch.zeros(())

    def middle(places: Sequence[int]) -> Tensor:
        every = ParameterPrior(population.parameters(places), like).each
        return torch.stack([_middle(p) for p in every]) if every else torch.zeros(0)

    scatter = math.sqrt(2 / math.pi) * (prior.scatter / population.ln_bases(like))
    return Start(middle(population.varying), scatter, middle(population.shared))


def _middle(prior: Any) -> Tensor:
    """A prior's median, moved in by a thousandth of its range where that ends at a bound."""
    edge = 1e-3 * (prior.high - prior.low)
    return prior.sample(torch.tensor(0.5)).clamp(prior.low + edge, prior.high - edge)


def nets(
    sizes: Mapping[str, int],
    prior: Prior,
    *,
    population: Population,
    start: Start | None,
    practised: Mapping[str, Tensor] | None,
) -> Nets:
    """The joint normal at its start, and the encoder, as it was after the rehearsal if there was one."""
    places = {"mean": population.varying, "shared": population.shared}
    begun, like = start or prior_start(population, prior), torch.zeros(())
    supports: dict[str, constraints.Constraint] = {
        name: ParameterPrior(population.parameters(each), like).support
        for name, each in places.items()
        if each
    }
    supports["scatter"] = constraints.positive
    values = {name: value for name, value in begun._asdict().items() if name in supports}
    encoder = Encoder(population)
    with torch.no_grad():
        encoder.centre.copy_(begun.mean)
        encoder.width.copy_(begun.scatter)
    if practised is not None:
        encoder.load_state_dict(dict(practised))
    return Nets(guides.global_normal(supports, values, scale=0.05), encoder)


def guide(batch: Batch, prior: Prior, nets: Nets) -> None:
    """Joint normal for the population; for each experiment the encoder's normal given the population."""
    values = nets.globals(batch)
    mask = batch.observed_mask.get("measured")
    present = torch.ones_like(batch.measured, dtype=torch.bool) if mask is None else mask
    seen = nets.encoder.read(batch.values, present)
    mean, tril = nets.encoder(seen, values["mean"], values["scatter"], values.get("shared"))
    with batch.plate("experiment"):
        pyro.sample("theta", dist.MultivariateNormal(mean, scale_tril=tril))


class _PositiveWhere(constraints.Constraint):
    """Numbers of a last dim that are above 0 where a log is taken of them."""

    lower_bound = 0.0

    def __init__(self, is_log: Sequence[bool]) -> None:
        self.is_log = torch.tensor(is_log)

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) | ~self.is_log & torch.isfinite(value)


def make(
    problem: Problem | Mapping[str, Any],
    *,
    varying: Sequence[str],
    start: Mapping[str, Sequence[float]] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-7,
    max_steps: int = 2000,
    method: Method = "rodas5p",
    prior: Prior | None = None,
) -> Template:
    """A template of many experiments that one problem describes.

    Args:
        problem: with one condition; or its ``to_dict``.
        varying: names of the parameters that differ from experiment to experiment.
        start: of the joint normal: "mean", "scatter" and "shared", on the parameters' scales; the prior's
            centre if None.
        rtol: of a solution (our choice: noise of a hundredth hides an error of a hundredth of that).
        atol: of a solution, in the units of the states.
        max_steps: of a solution.
        method: of ``scivi.ode.solve``. The explicit ones take one step size for all experiments, and with
            times of their own for each one step at least from each to the next.
        prior: numbers of the model.

    Raises:
        TemplateError: listing every fault.
    """
    if isinstance(problem, Mapping):
        problem = Problem.from_dict(problem)
    varying = (varying,) if isinstance(varying, str) else tuple(varying)
    faults = [
        *problem.faults(),
        *_faults_of_varying(problem, varying),
        *_faults_of_start(problem, varying, start),
    ]
    if prior is not None and not prior.scatter > 0:
        faults.append(f"prior.scatter is {prior.scatter}; it must be above 0")
    if faults:
        raise TemplateError(listed("these experiments cannot be described:", dict.fromkeys(faults)))
    names = [each.name for each in problem.estimated]
    form = Form(ready.prepare(problem), rtol, atol, max_steps, method)
    population = Population(form, tuple(sorted(names.index(name) for name in varying)))
    settings: dict[str, Any] = {"rtol": rtol, "atol": atol, "max_steps": max_steps, "method": method}
    settings |= {"problem": problem.to_dict(), "varying": [names[k] for k in population.varying]}
    settings["start"] = None if start is None else {k: list(map(float, v)) for k, v in start.items()}
    is_log = [each.is_log for each in problem.observables]
    support = (
        constraints.positive if all(is_log) else _PositiveWhere(is_log) if any(is_log) else constraints.real
    )
    local, common = ("experiment", "parameter"), population.parameters(population.shared)
    dims = {"mean": ("parameter",), "scatter": ("parameter",), "theta": local, "value": local}
    dims |= {"shared": ("shared_parameter",)} if common else {}
    dims |= {"expected": DIMS["measured"], "failed": ("experiment",)}
    labels = {"parameter": tuple(each.label for each in population.parameters(population.varying))}
    labels |= {"shared_parameter": tuple(each.label for each in common)} if common else {}
    begun = None if start is None else Start(*(torch.tensor(start.get(k, ())) for k in Start._fields))
    return Template(
        name=f"{problem.name}, many experiments",
        fields=ready.fields(problem, "experiment", support),
        rows="experiment",
        model=partial(model, population=population),
        dims=dims,
        guide=guide,
        nets=partial(nets, population=population, start=begun, practised=None),
        prior=prior or Prior(),
        derive=partial(derive, population=population),
        sizes={name: len(each) for name, each in labels.items()},
        coords=labels,
        validate=partial(_validate, observables=tuple(each.name for each in problem.observables)),
        plan={**PLAN, "nodes": {1: 5, 2: 3}.get(len(population.varying), 2)},
        distinct=True,
        made=("domains.kinetics.populations:make", settings),
    )


def from_data(
    data: tuple[Problem, Any],
    *,
    varying: Sequence[str],
    rounds: int = rehearsal.ROUNDS,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> tuple[Template, dict[str, Any]]:
    """The template of a problem and measurements, its encoder rehearsed, and the table for ``scivi.fit``.

    Args:
        data: (problem, measurements): ``measured`` (experiment, moment, observable), NaN where nothing was,
            and ``time`` (experiment, moment) or (moment,), in order; as a Dataset, or a mapping from names to
            (dims, values). Experiments with fewer moments repeat their last time with nothing measured.
        varying: names of the parameters that differ from experiment to experiment.
        rounds: of the rehearsal; 0 for none.
        seed: of the rehearsal.
        progress: show a progress bar of the rehearsal.
        **options: of ``make``.

    Raises:
        TemplateError: listing every fault of the problem and of ``varying``.
        DataError: listing every fault of the measurements, or more than half of the simulated experiments
            could not be solved.
    """
    problem, measurements = data
    template = make(problem, varying=varying, **options)
    columns = table(population_of(template).problem, measurements)
    return rehearsed(template, columns, rounds=rounds, seed=seed, progress=progress), columns


def table(problem: Problem, measurements: Any) -> dict[str, Any]:
    """The table that a template reads, checked.

    Raises:
        DataError: listing every fault.
    """
    if isinstance(measurements, xr.Dataset):
        measurements = {
            n: (a.dims, a.values) for n, a in {**measurements.data_vars, **measurements.coords}.items()
        }
    columns = {
        str(n): (tuple(c[0]) if not isinstance(c[0], str) else (c[0],), np.asarray(c[1]))
        for n, c in measurements.items()
    }
    faults = [f'"{name}" is missing' for name in DIMS if name not in columns]
    allowed = {"measured": [DIMS["measured"]], "time": [DIMS["time"], DIMS["time"][1:]]}
    faults += [
        f'"{name}" has dims {columns[name][0]}; it needs {" or ".join(map(str, each))}'
        for name, each in allowed.items()
        if name in columns and columns[name][0] not in each
    ]
    if not faults:
        measured, time = (np.asarray(columns[name][1], float) for name in ("measured", "time"))
        if time.ndim == 1:
            time = np.broadcast_to(time, (len(measured), len(time))).copy()
        columns["time"] = (DIMS["time"], time)
        faults = _faults_of_measurements(problem, measured, time)
        if "observable" in columns:
            names = [each.name for each in problem.observables]
            faults += _validate({}, {"observable": columns["observable"][1]}, observables=names)
    if faults:
        raise DataError(listed("these measurements cannot be used:", faults))
    return columns


def population_of(template: Template) -> Population:
    """What was fixed when a template was made by ``make``."""
    return cast(Any, template.model).keywords["population"]


def rehearsed(
    template: Template,
    columns: Mapping[str, Any],
    *,
    rounds: int = rehearsal.ROUNDS,
    experiments: int = rehearsal.EXPERIMENTS,
    steps: int = rehearsal.STEPS,
    seed: int = 0,
    progress: bool = True,
) -> Template:
    """The template with an encoder that has practised, and a start near the data; see ``rehearsal``.

    Args:
        template: made by ``make``.
        columns: the table of the measurements.
        rounds: of the rehearsal; none leaves the template as it is.
        experiments: simulated in each.
        steps: of learning in the last; those before have a quarter of them.
        seed: of everything.
        progress: show a progress bar.

    Raises:
        DataError: more than half of the simulated experiments could not be solved.

    Notes:
        What the encoder has learnt is no part of ``template.made``. A saved fit holds it; but the template
        that is made again for that fit would begin another without it.
    """
    if rounds < 1:
        return template
    population, names = population_of(template), ("measured", "time", *OWN)
    values = {n: torch.as_tensor(np.asarray(columns[n][1], np.float32)) for n in names if n in columns}
    present = ~values["measured"].isnan()
    values["measured"] = torch.where(present, values["measured"], 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guess, encoder = rehearse(
            population,
            template.prior.scatter,
            values,
            present,
            rounds=rounds,
            experiments=experiments,
            steps=steps,
            progress=progress,
        )
    settings = {**cast(Any, template.made)[1], "start": {n: v.tolist() for n, v in guess._asdict().items()}}
    again = make(**settings, prior=template.prior)
    weights = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
    return replace(again, nets=partial(cast(Any, again.nets), practised=weights))


def _faults_of_varying(problem: Problem, varying: Sequence[str]) -> list[str]:
    estimated = {each.name: each for each in problem.estimated}
    found = [] if varying else ["varying names no parameter: then kinetics.make is the template"]
    for name in dict.fromkeys(varying):
        if name not in estimated:
            found.append(
                f'varying: there is no estimated parameter "{name}"; there are {", ".join(estimated)}'
            )
        elif LN.get(estimated[name].scale) is None:
            found.append(
                f'varying: "{name}" is on the scale "{estimated[name].scale}"; what varies needs log or log10'
            )
    found += [
        f'varying names "{name}" twice' for name in dict.fromkeys(varying) if list(varying).count(name) > 1
    ]
    if len(problem.rows) != 1:
        rows = ", ".join(problem.labels)
        found.append(f"the problem has {len(problem.rows)} conditions ({rows}); one describes an experiment")
    return found


def _faults_of_start(
    problem: Problem, varying: Sequence[str], start: Mapping[str, Sequence[float]] | None
) -> list[str]:
    if start is None:
        return []
    n = len(set(varying))
    wanted = {"mean": n, "scatter": n, "shared": len(problem.estimated) - n}
    found = [
        f'start has "{name}"; it may have mean, scatter and shared' for name in start if name not in wanted
    ]
    return found + [
        f"start: {name} has {len(start.get(name, ()))} numbers; it needs {size}"
        for name, size in wanted.items()
        if len(start.get(name, ())) != size
    ]


def _faults_of_measurements(problem: Problem, measured: np.ndarray, time: np.ndarray) -> list[str]:
    n = len(problem.observables)
    if time.shape != measured.shape[:2] or measured.shape[2] != n:
        return [
            f"measured is {measured.shape} and time {time.shape}; they need (experiment, moment, {n}) and "
            "(experiment, moment)"
        ]
    unreal = ~np.isfinite(time) | (time < 0)
    found = []
    if unreal.any():
        found.append(f"{int(unreal.any(1).sum())} experiments have times that are no numbers >= 0")
    back = (np.diff(np.where(unreal, 0.0, time), axis=1) < 0).any(1) & ~unreal.any(1)
    if back.any():
        found.append(
            f"{int(back.sum())} experiments have their times out of order, row {int(back.argmax())} first"
        )
    return [*found, *faults_of_levels(problem, measured)]


def _validate(
    values: Mapping[str, np.ndarray], coords: Mapping[str, Any], *, observables: Sequence[str]
) -> list[str]:
    """The observables of the data are those of the problem; places alone say nothing."""
    given = [str(name) for name in np.asarray(coords["observable"]).tolist()]
    if given == list(observables) or given == [str(k) for k in range(len(observables))]:
        return []
    return [f"the observables are {', '.join(given)}; the problem has {', '.join(observables)}"]
