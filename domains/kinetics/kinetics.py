"""Reaction kinetics: rates and what else is not known of a network, from measurements in several conditions.

For parameters theta, each on its own scale, condition c, moment m and observable o:

    theta        ~ prior                       as the problem says; uniform between the bounds if it does not
    dy_c/dt      = f(t, y_c, k_c(theta)),      y_c(0) = y0_c(theta), or the steady state of another condition
    mean_cmo, sd_cmo = observables of y_c(t_cm) and theta
    t_o(measured_cmo) ~ Normal or Laplace(t_o(mean_cmo), sd_cmo),   t_o: as it is, or a logarithm

The equations are solved in float64 for all draws and conditions at once (``scivi.ode``). Where a solution
fails, its condition gets a floor instead of a likelihood, without a gradient, and is counted.

The guide is a joint normal of theta on the unbounded scale, which begins at the best of many modes found by
``search`` if the template is made from data.

References:
    Schmiester et al. 2021, PLoS Comput. Biol. 17, e1008646, doi:10.1371/journal.pcbi.1008646 (PEtab).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from domains.kinetics import experiments as ready
from domains.kinetics import search
from domains.kinetics.petab_problems import Problem, faults_of_data
from domains.kinetics.priors import FAMILIES, LN, ParameterPrior
from domains.kinetics.simulation import FLOOR, Form, Simulated, simulated
from scivi.errors import DataError, FitError, TemplateError, listed
from scivi.models import Batch, Template, guides
from scivi.models.flows import Flow, JointFlowGuide
from scivi.models.guides import JointNormal, JointNormalGuide, MeanField
from scivi.ode.solve import Method

# Runs of the model before failures are looked at; share of solutions that may fail; solutions looked back on.
WARM_UP, MOST_FAILED, WINDOW = 20, 0.01, 1000  # our choices
# A flow learns from many draws at each step, and for a number of steps (our choice).
FLOWING = {"estimator": "stl", "particles": 32, "steps": 600, "lr": 0.01, "stop": None}
Guide = Literal["full rank", "low rank", "mean field", "flow"]
GUIDES: dict[str, guides.Family] = {
    "full rank": JointNormal(),
    "low rank": JointNormal(rank=4),
    "mean field": MeanField(),
    "flow": Flow(),
}


class Counter(nn.Module):
    """How many solutions there were, and how many failed, of late; no fit goes on with many."""

    runs: Tensor
    solutions: Tensor
    failed: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("runs", "solutions", "failed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def count(self, ok: Tensor) -> None:
        """Add what a run of the model came to while fitting.

        Raises:
            FitError: more than one in a hundred failed, after the first runs.
        """
        if not self.training:  # a fit stays as it is when it is drawn from
            return
        keep = max(0.0, 1.0 - ok.numel() / WINDOW)
        self.runs += 1
        self.solutions.mul_(keep).add_(ok.numel())
        self.failed.mul_(keep).add_(int((~ok).sum()))
        share = float(self.failed / self.solutions)
        if float(self.runs) > WARM_UP and share > MOST_FAILED:
            raise FitError(
                f"{share:.1%} of the last solutions failed, and {MOST_FAILED:.0%} may. Narrow the bounds or "
                "priors of the parameters, raise max_steps, or loosen rtol."
            )


class Noise(TorchDistribution):
    """Measurements, normal or Laplace about what is expected, as they are or on a log scale.

    Args:
        problem: whose observables say which.
        mean: (*batch).
        sd: scale of the noise (*batch), the last dim is that of the observables.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support: ClassVar[constraints.Constraint] = constraints.real

    def __init__(self, problem: Problem, mean: Tensor, sd: Tensor) -> None:
        self.problem, self.centre, self.sd = problem, mean, sd
        super().__init__(torch.broadcast_shapes(mean.shape, sd.shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """What is expected without noise."""
        return self.centre

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> TorchDistribution:
        """The same over a larger batch."""
        return Noise(self.problem, self.centre.expand(batch_shape), self.sd.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (*batch)."""
        is_log = torch.tensor([o.is_log for o in self.problem.observables], device=value.device)
        value = torch.where(is_log & (value <= 0), 1.0, value)  # 0 stands where nothing was measured
        value, mean, sd = torch.broadcast_tensors(value, self.centre, self.sd)
        return ready.log_likelihood(self.problem, value, mean, sd)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Measurements (*sample, *batch)."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            mean, sd = self.centre.expand(shape), self.sd.expand(shape)
            columns = []
            for k, each in enumerate(self.problem.observables):
                made, base = FAMILIES[each.distribution], LN[each.transformation]
                error = made(torch.zeros_like(sd[..., k]), sd[..., k], validate_args=False).sample()
                columns.append(mean[..., k] * (base * error).exp() if base else mean[..., k] + error)
            return torch.stack(columns, -1)


def _seen(batch: Batch, theta: Tensor, form: Form) -> Simulated:
    """The conditions of a batch, for theta (*draw, 1, parameter) or (parameter,)."""
    draws = theta.squeeze(-2) if theta.dim() > 1 else theta
    return simulated(
        form,
        draws,
        batch.time,
        rows=batch.index.get("condition"),
        at_rest=batch.values.get("at_rest"),
        override=batch.values.get("override"),
    )


def model(batch: Batch, prior: Any, nets: nn.Module, *, form: Form) -> None:
    """The generative story of the module's docstring."""
    theta = pyro.sample("theta", ParameterPrior(form.problem.estimated, batch.measured))
    found, like = _seen(batch, theta, form), batch.measured
    nets.count(found.ok)  # type: ignore[operator]
    mean, sd = found.mean.to(like), found.sd.to(like)
    with batch.plate("condition"):
        pyro.factor("unsolved", torch.where(found.ok, 0.0, FLOOR).to(like))
        with poutine.mask(mask=cast(Any, found.ok)):
            batch.observe("measured", Noise(form.problem, mean, sd).to_event(2))


def derive(
    batch: Batch, prior: Any, nets: nn.Module, values: Mapping[str, Tensor], *, form: Form
) -> dict[str, Tensor]:
    """Of a draw: what is expected of each measurement, and whether the solution failed."""
    found, like = _seen(batch, values["theta"], form), batch.measured
    return {"expected": found.mean.to(like), "failed": (~found.ok).to(like)}


@dataclass(frozen=True, slots=True)
class Begun:
    """A guide that begins at some values of theta, and with some covariance on the unbounded scale."""

    family: guides.Family
    start: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...] = ()

    def build(self, sites: Sequence[Any], starts: Any, nesting: int) -> nn.Module:
        """See ``Family.build``."""
        at = dict(starts)
        if self.start:
            at["theta"] = [torch.as_tensor(self.start).to(at["theta"][0])]
        module = self.family.build(sites, at, nesting)
        if self.covariance and isinstance(module, JointNormalGuide | JointFlowGuide):
            normal = module.normal if isinstance(module, JointFlowGuide) else module
            if normal.rank is None:
                normal.set(normal.loc.detach(), torch.as_tensor(self.covariance).to(normal.loc))
        return module


def make(
    problem: Problem | Mapping[str, Any],
    *,
    guide: Guide = "full rank",
    start: Sequence[float] = (),
    covariance: Sequence[Sequence[float]] = (),
    rtol: float = 1e-6,
    atol: float = 1e-9,
    max_steps: int = 2000,
    method: Method = "rodas5p",
) -> Template:
    """A template of a problem.

    Args:
        problem: or its ``to_dict``.
        guide: "full rank", "low rank" or "mean field" normal of theta; "flow" for posteriors with edges and
            plateaus, which takes some minutes.
        start: of theta, where the guide begins; the prior's centre if empty.
        covariance: of theta on the unbounded scale, with which a guide of full rank or a flow begins.
        rtol: of a solution.
        atol: of a solution, in the units of the states.
        max_steps: of a solution.
        method: of ``scivi.ode.solve``. There "auto" pays for a rough solution at every call; for the few
            entries of a batch here "rodas5p" is no slower where equations are not stiff.

    Raises:
        TemplateError: the problem contradicts itself, or there is no such guide.
    """
    if isinstance(problem, Mapping):
        problem = Problem.from_dict(problem)
    faults = problem.faults()
    if guide not in GUIDES:
        faults.append(f'there is no guide "{guide}"; there are {", ".join(GUIDES)}')
    n = len(problem.estimated)
    if not n:
        faults.append("no parameter is estimated")
    if start and len(start) != n:
        faults.append(f"start has {len(start)} numbers; {n} parameters are estimated")
    if covariance and np.shape(covariance) != (n, n):
        faults.append(f"covariance is {np.shape(covariance)}; {n} parameters are estimated")
    if faults:
        raise TemplateError(listed("the problem cannot be used:", faults))
    wide = tuple(tuple(map(float, row)) for row in covariance)
    form = Form(ready.prepare(problem), rtol, atol, max_steps, method)
    settings = {name: getattr(form, name) for name in ("rtol", "atol", "max_steps", "method")}
    settings |= {"problem": problem.to_dict(), "guide": guide, "start": list(map(float, start))}
    settings["covariance"] = [list(row) for row in wide]
    return Template(
        name=problem.name,
        fields=ready.fields(problem, "condition"),
        rows="condition",
        model=partial(model, form=form),
        dims={
            "theta": ("parameter",),
            "expected": ("condition", "moment", "observable"),
            "failed": ("condition",),
        },
        guide=Begun(GUIDES[guide], tuple(map(float, start)), wide),
        nets=_counter,
        derive=partial(derive, form=form),
        sizes={"parameter": n},
        coords={"parameter": tuple(each.label for each in problem.estimated)},
        validate=partial(_validate, problem=problem),
        plan=FLOWING if guide == "flow" else {},
        distinct=True,
        made=("domains.kinetics.kinetics:make", settings),
    )


def from_data(
    data: Any, *, starts: int = 16, seed: int = 0, progress: bool = True, **options: Any
) -> tuple[Template, dict[str, Any]]:
    """The template of a PEtab problem, and the table for ``scivi.fit``.

    From the command line: ``scivi fit domains.kinetics.kinetics:from_data problem.yaml --out results``.

    Args:
        data: path of a PEtab problem, its YAML file or the folder; or (problem, measurements).
        starts: of the search for the best mode, at which the guide begins; 0 for none.
        seed: of the search.
        progress: show a progress bar of the search.
        **options: of ``make``.

    Raises:
        DataError: listing every fault.
        Unsupported: listing all that is not offered.
    """
    from domains.kinetics import petab_tables

    problem, measured = data if isinstance(data, tuple) else petab_tables.read(data)
    columns = table(measured)
    template = make(problem, **options)
    seen = {name: np.asarray(column[1]) for name, column in columns.items()}
    if faults := faults_of_data(problem, seen, seen):
        raise DataError(listed(f'the measurements do not fit the problem "{problem.name}":', faults))
    if starts and not options.get("start"):
        found = search.modes(form_of(template), columns, starts=starts, seed=seed, progress=progress)
        begun = {"start": found.theta[0].tolist(), "covariance": found.covariance[0].tolist()}
        template = make(problem, **{**options, **begun})
    return template, columns


def table(measured: Any) -> dict[str, Any]:
    """The table that a template reads, of measurements as ``petab_tables.read`` gives them."""
    time = np.asarray(measured["time"].values, float)
    columns = {name: (a.dims, a.values) for name, a in measured.data_vars.items() if name != "time"}
    columns |= {name: (a.dims, a.values) for name, a in measured.coords.items()}
    dims = measured["time"].dims
    for_ever = np.isinf(time)
    if for_ever.any():
        last = np.where(for_ever, 0.0, time).max(-1, keepdims=True)
        columns["at_rest"] = (dims, for_ever.astype(float))
        time = np.where(for_ever, last, time)
    return {**columns, "time": (dims, time)}


def form_of(template: Template) -> Form:
    """What was fixed when a template was made by ``make``."""
    return cast(Any, template.model).keywords["form"]


def _counter(sizes: Mapping[str, int], prior: Any) -> nn.Module:
    return Counter()


def _validate(
    values: Mapping[str, np.ndarray], coords: Mapping[str, np.ndarray], *, problem: Problem
) -> list[str]:
    if not {"time", "measured"} <= {*values}:  # told by the check of fields
        return []
    # labels that the data lack are places
    named = {d: x for d, x in coords.items() if [*map(str, x)] != [*map(str, range(len(x)))]}
    return faults_of_data(problem, values, named)
