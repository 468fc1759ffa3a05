"""Published PEtab problems at their published optimum, and small ones for each rule of the format."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.integrate import solve_ivp
from torch import Tensor

from domains.kinetics import experiments, petab_tables
from domains.kinetics.experiments import Experiments, prepare
from domains.kinetics.petab_problems import Observable, Problem, faults_of_data
from scivi.errors import DataError, TemplateError, Unsupported
from scivi.ode.solve import solve

pytest.importorskip("libsbml", reason="python-libsbml reads SBML")
pytest.importorskip("petab", reason="petab reads the problem's file")

ROOT = Path(__file__).resolve().parents[3]
BOEHM = ROOT / "data" / "kinetics" / "Boehm_JProteomeRes2014"
BRUNO = ROOT / ".." / "shared" / "data" / "kinetics" / "petab" / "Bruno_JExpBot2016"
# negative log likelihood at the nominal values: AMICI, tests/benchmark_models/benchmark_models.yaml
PUBLISHED = {"Boehm": (BOEHM, 138.22199693517703), "Bruno": (BRUNO, -46.688176988431806)}


def nominal(problem: Problem) -> Tensor:
    """Of the estimated parameters, on the linear scale."""
    return torch.tensor([each.nominal for each in problem.estimated], dtype=torch.float64)


def on_scales(problem: Problem, values: Tensor) -> Tensor:
    """Estimated parameters on their own scales, from those on the linear one (*draw, estimated)."""
    scales = {"lin": lambda x: x, "log": torch.log, "log10": torch.log10}
    return torch.stack([scales[p.scale](values[..., k]) for k, p in enumerate(problem.estimated)], -1)


def opened(name: str) -> tuple[Problem, xr.Dataset, float]:
    folder, objective = PUBLISHED[name]
    if not folder.exists():
        pytest.skip(f"waits for the problem of {name}, which is not part of the repository")
    return (*petab_tables.read(folder), objective)


def by_radau(ready: Experiments, p: Tensor, y0: Tensor, times: np.ndarray) -> Tensor:
    """States (condition, moment, state) by SciPy, one condition at a time."""
    found = []
    for k, (q, start) in enumerate(zip(p.unsqueeze(1), y0, strict=True)):

        def of(name: str, t: float, y: np.ndarray, q: Tensor = q) -> np.ndarray:
            function = getattr(ready.system, name)
            return function(torch.tensor([t], dtype=torch.float64), torch.tensor(y)[None], q)[0].numpy()

        grid, back = np.unique(times[k], return_inverse=True)
        solved = solve_ivp(
            lambda t, y, of=of: of("rate", t, y),
            (0.0, grid[-1]),
            start.numpy(),
            "Radau",
            grid,
            jac=lambda t, y, of=of: of("jacobian", t, y),
            rtol=1e-10,
            atol=1e-12,
        )
        found.append(torch.tensor(solved.y.T[back]))
    return torch.stack(found)


def objective(ready: Experiments, data: xr.Dataset, scaled: Tensor, states: Tensor | None = None) -> Tensor:
    """Negative log likelihood at parameters on their own scales, with the states given or solved for."""
    values = experiments.unscaled(ready.problem, scaled)
    settings, times = ready.settings(values), torch.tensor(data["time"].values)
    if states is None:
        stops = torch.tensor(ready.stops) if ready.stops.size else None
        solved = solve(ready.system, settings.p, settings.y0, times, stops=stops, rtol=1e-8, atol=1e-11)
        assert bool(solved.ok.all())
        states = solved.values
    override = torch.tensor(data["override"].values) if "override" in data else None
    mean, sd = ready.observed(times, states, settings.context, values, override)
    measured = torch.tensor(data["measured"].values)
    return -experiments.log_likelihood(ready.problem, measured, mean, sd).sum()


@pytest.mark.parametrize("name", PUBLISHED)
def test_objective_at_the_published_optimum(name):
    problem, data, published = opened(name)
    ready, known = prepare(problem), nominal(problem)
    assert faults_of_data(problem, {k: v.values for k, v in data.items()}, data.coords) == []
    found = objective(ready, data, on_scales(problem, known))
    assert float(found) == pytest.approx(published, abs=1e-3)
    settings = ready.settings(known)
    states = by_radau(ready, settings.p, settings.y0, data["time"].values)
    found = objective(ready, data, on_scales(problem, known), states)
    assert float(found) == pytest.approx(published, abs=1e-4)  # AMICI's own tolerances


@pytest.mark.parametrize("name", PUBLISHED)
def test_trajectories_are_those_of_radau(name):
    problem, data, _ = opened(name)
    ready = prepare(problem)
    settings = ready.settings(nominal(problem))
    expected = by_radau(ready, settings.p, settings.y0, data["time"].values)
    found = solve(
        ready.system,
        settings.p,
        settings.y0,
        torch.tensor(data["time"].values),
        rtol=1e-8,
        atol=1e-11,
        method="rodas5p",
    )
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-7)  # of what either is solved to


def test_gradient_vanishes_at_the_optimum_of_boehm():
    problem, data, _ = opened("Boehm")
    ready = prepare(problem)
    scaled = on_scales(problem, nominal(problem)).requires_grad_()
    objective(ready, data, scaled).backward()
    assert scaled.grad is not None
    inside = [each.lower is not None and each.nominal > 1.01 * each.lower for each in problem.estimated]
    assert sum(inside) == 8  # k_exp_hetero is on its lower bound
    assert float(scaled.grad[torch.tensor(inside)].norm()) <= 0.05


def test_gradient_is_that_of_differences():
    problem, data, _ = opened("Boehm")
    ready = prepare(problem)
    at = (on_scales(problem, nominal(problem)) + 0.03).requires_grad_()
    along = torch.linspace(-1, 1, len(at), dtype=torch.float64)
    objective(ready, data, at).backward()
    assert at.grad is not None
    with torch.no_grad():
        h = 1e-4
        slope = (objective(ready, data, at + h * along) - objective(ready, data, at - h * along)) / (2 * h)
    assert float(at.grad @ along) == pytest.approx(float(slope), rel=1e-4)  # h^2, and tolerance / h


def test_totals_are_weighed_by_the_volumes_of_their_conditions():
    problem, data, _ = opened("Boehm")
    ready = prepare(problem)
    settings = ready.settings(nominal(problem))
    states = by_radau(ready, settings.p, settings.y0, data["time"].values)
    totals = torch.tensor(ready.totals[0]) @ states[0].T
    assert totals.shape == (2, 16)
    torch.testing.assert_close(totals, totals[:, :1].expand(-1, 16), rtol=1e-8, atol=1e-6)  # of the solution
    sized = replace(problem, conditions={"model1_data1": {"nuc": 0.9}})
    assert prepare(sized).totals[0].tolist() == (ready.totals[0] * [1, 1, 1, 1, 1, 2, 2, 2]).tolist()


def test_particles_and_conditions_are_a_batch():
    problem, data, _ = opened("Bruno")
    ready = prepare(problem)
    values = nominal(problem) * torch.tensor([[1.0], [1.1], [0.9]])
    settings = ready.settings(values)
    assert settings.p.shape == (3, 6, 6)
    assert settings.y0.shape == (3, 6, 7)
    states = torch.rand(3, 6, 7, 7, dtype=torch.float64)
    times, override = torch.tensor(data["time"].values), torch.tensor(data["override"].values)
    mean, sd = ready.observed(times, states, settings.context, values, override)
    assert mean.shape == sd.shape == (3, 6, 7, 5)
    one = ready.settings(values[1])
    torch.testing.assert_close(settings.p[1], one.p)
    again, _ = ready.observed(times, states[1], one.context, values[1], override)
    torch.testing.assert_close(mean[1], again)


# A small problem: a decay in two steps, with all that PEtab's tables can say.

XML = """<sbml xmlns="http://www.sbml.org/sbml/level2/version4" level="2" version="4"><model id="decay">
<listOfCompartments><compartment id="cell" size="2"/></listOfCompartments>
<listOfSpecies>
<species id="A" compartment="cell" initialConcentration="1"/>
<species id="B" compartment="cell" initialConcentration="0"/>
<species id="food" compartment="cell" initialConcentration="0" boundaryCondition="true"/></listOfSpecies>
<listOfParameters><parameter id="k1" value="1"/><parameter id="k2" value="2"/><parameter id="on" value="100"/>
<parameter id="twice" value="0" constant="false"/></listOfParameters>
<listOfRules><assignmentRule variable="twice"><math xmlns="http://www.w3.org/1998/Math/MathML">
<apply><times/><cn>2</cn><ci>B</ci></apply></math></assignmentRule></listOfRules>
<listOfReactions>%s</listOfReactions></model></sbml>"""
STEP = """<reaction id="%s" reversible="false">%s<kineticLaw>
<math xmlns="http://www.w3.org/1998/Math/MathML"><apply><times/><ci>cell</ci>%s</apply></math></kineticLaw></reaction>"""
INPUT = """<piecewise><piece><ci>food</ci><apply><geq/><csymbol encoding="text"
definitionURL="http://www.sbml.org/sbml/symbols/time">t</csymbol><ci>on</ci></apply></piece>
<otherwise><cn>0</cn></otherwise></piecewise>"""


def step(name: str, left: str, right: str, rate: str) -> str:
    sides = [
        f'<{side}><speciesReference species="{each}"/></{side}>' if each else ""
        for side, each in (("listOfReactants", left), ("listOfProducts", right))
    ]
    return STEP % (name, "".join(sides), rate)


MODEL = XML % (
    step("r1", "A", "B", "<ci>k1</ci><ci>A</ci>")
    + step("r2", "B", "", "<ci>k2</ci><ci>B</ci>")
    + step("r3", "", "A", INPUT)
)
TABLES = {
    "parameters": """parameterId|parameterScale|lowerBound|upperBound|nominalValue|estimate|\
objectivePriorType|objectivePriorParameters
k1|log10|1e-3|1e3|0.5|1|parameterScaleNormal|0;2
scale_a|log|1e-3|1e3|3|1
start|lin|0|10|4|1
sd_b|lin|0|10|0.2|0
sd_c|lin|0.01|10|0.7|1
""",
    "conditions": """conditionId|conditionName|A|k2|food|on
plain|nothing set|NaN|||
begun|A set by a parameter|start|3|5|1
rest|equilibrated|0|1|7|0
pulse|simulated|NaN|3||2
""",
    "observables": """observableId|observableFormula|noiseFormula|observableTransformation|noiseDistribution
obs_a|observableParameter1_obs_a * A + observableParameter2_obs_a|noiseParameter1_obs_a|lin|normal
obs_b|twice + 0.1|sd_c + 0.1 * obs_b|log10|laplace
obs_t|B + time * k2|noiseParameter1_obs_t|log|
""",
    "measurements": """observableId|preequilibrationConditionId|simulationConditionId|measurement|time|\
observableParameters|noiseParameters
obs_a||plain|2.5|1|scale_a;0.25|sd_b
obs_a||plain|2.0|1|scale_a;0.25|sd_b
obs_a||plain|1.5|0.5|scale_a;0.5|0.3
obs_a||begun|9|1|2;0|sd_c
obs_b||begun|1.2|2||
obs_b|rest|pulse|3.1|0||
obs_t|rest|pulse|6.0|1.5||0.5
obs_b|rest|pulse|4.0|inf||
""",
}


def written(folder: Path, changes: dict[str, tuple[str, str]] | None = None, xml: str = MODEL) -> Path:
    """The small problem in a folder, with some text of some tables put in place of other."""
    names = {kind: f"{kind}.tsv" for kind in TABLES}
    for kind, name in names.items():
        old, new = (changes or {}).get(kind, ("", ""))
        assert old in TABLES[kind]
        text = TABLES[kind].replace(old, new) if old else TABLES[kind]
        (folder / name).write_text(text.replace("|", "\t"))
    (folder / "model.xml").write_text(xml)
    problem = (
        f"format_version: 1\nparameter_file: {names['parameters']}\nproblems:\n"
        f"- condition_files: [{names['conditions']}]\n  measurement_files: [{names['measurements']}]\n"
        f"  observable_files: [{names['observables']}]\n  sbml_files: [model.xml]\n"
    )
    (folder / "small.yaml").write_text(problem)
    return folder


def test_petab_tables_become_labelled_arrays(tmp_path):
    problem, data = petab_tables.read(written(tmp_path))
    assert problem.rows == (("plain", ""), ("begun", ""), ("pulse", "rest"))
    assert [each.name for each in problem.observables] == [
        "obs_a[scale_a, sd_b]",
        "obs_a[scale_a]",
        "obs_a[sd_c]",
        "obs_b",
        "obs_t",
    ]
    assert problem.observables[0].formula == "scale_a * A + observableParameter2_obs_a"
    assert problem.observables[0].slots == ("observableParameter2_obs_a",)
    assert problem.observables[3].noise == "sd_c + 0.1 * (twice + 0.1)"
    assert data["time"].values.tolist() == [[0.5, 1, 1], [1, 2, 2], [0, 1.5, math.inf]]
    plain = data.sel(condition="plain")
    assert plain["measured"].sel(observable="obs_a[scale_a, sd_b]").values.tolist()[1:] == [2.5, 2.0]
    assert plain["measured"].sel(observable="obs_a[scale_a]").values.tolist()[0] == 1.5
    assert plain["override"].sel(observable="obs_a[scale_a]")[0].values.tolist() == [0.5, 0.3]
    assert int(data["measured"].notnull().sum()) == 8
    assert problem.parameters[0].prior == "parameterScaleNormal"
    assert problem.parameters[0].prior_parameters == (0.0, 2.0)
    assert [each.name for each in problem.estimated] == ["k1", "scale_a", "start", "sd_c"]
    assert Problem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem


def test_petab_conditions_set_parameters_and_initial_values(tmp_path):
    ready = prepare(petab_tables.read(written(tmp_path))[0])
    values = torch.tensor([0.5, 3.0, 4.0, 0.7], dtype=torch.float64)
    settings, before = ready.settings(values), ready.before(values)
    assert ready.system.states == ("A", "B")
    assert settings.y0.tolist() == [[1, 0], [4, 0], [1, 0]]
    assert before.y0.tolist() == [[1, 0], [4, 0], [0, 0]]
    assert ready.equilibrated.tolist() == [False, False, True]
    assert ready.carried.tolist() == [[False, False], [False, False], [True, True]]
    assert ready.stops.tolist() == [[100], [1], [2]]
    assert ready.totals.shape == (3, 0, 2)
    y = torch.tensor([[2.0, 3.0]] * 3, dtype=torch.float64)
    late = torch.full((3,), 1e3, dtype=torch.float64)
    # dA/dt = food - k1 A, dB/dt = k1 A - k2 B; what "pulse" does not set of food is as in "rest"
    rates = [[0 - 1, 1 - 2 * 3], [5 - 1, 1 - 3 * 3], [7 - 1, 1 - 3 * 3]]
    assert ready.system.rate(late, y, settings.p).tolist() == rates
    assert ready.system.rate(late, y, before.p)[2].tolist() == [7 - 1, 1 - 1 * 3]


def test_petab_likelihood_is_that_of_its_definition(tmp_path):
    problem, data = petab_tables.read(written(tmp_path))
    ready = prepare(problem)
    values = torch.tensor([0.5, 3.0, 4.0, 0.7], dtype=torch.float64)
    y = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = ready.settings(values)
    times = torch.tensor(np.where(np.isinf(data["time"]), 99.0, data["time"]))
    mean, sd = ready.observed(times, y, settings.context, values, torch.tensor(data["override"].values))
    found = experiments.log_likelihood(problem, torch.tensor(data["measured"].values), mean, sd)
    a, b = y[..., 0].numpy(), y[..., 1].numpy()

    def normal(m: float, mu: float, s: float) -> float:
        return -0.5 * math.log(2 * math.pi * s**2) - 0.5 * ((m - mu) / s) ** 2

    def laplace10(m: float, b: float) -> float:
        mu = 2 * b + 0.1
        s = 0.7 + 0.1 * mu
        return -math.log(2 * s * m * math.log(10)) - abs(math.log10(m) - math.log10(mu)) / s

    expected = [
        (0, 1, 0, normal(2.5, 3 * a[0, 1] + 0.25, 0.2)),
        (0, 2, 0, normal(2.0, 3 * a[0, 2] + 0.25, 0.2)),
        (0, 0, 1, normal(1.5, 3 * a[0, 0] + 0.5, 0.3)),
        (1, 0, 2, normal(9.0, 2 * a[1, 0], 0.7)),
        (1, 1, 3, laplace10(1.2, b[1, 1])),
        (2, 0, 3, laplace10(3.1, b[2, 0])),
        (2, 1, 4, normal(math.log(6.0), math.log(b[2, 1] + 1.5 * 3), 0.5) - math.log(6.0)),
        (2, 2, 3, laplace10(4.0, b[2, 2])),
    ]
    for row, moment, kind, value in expected:
        assert float(found[row, moment, kind]) == pytest.approx(value, rel=1e-12)  # rounding
    assert float(found.sum()) == pytest.approx(sum(value for *_, value in expected), rel=1e-12)
    with pytest.raises(DataError, match="need numbers of their own"):
        ready.observed(times, y, settings.context, values)


def test_petab_likelihood_has_finite_gradients_where_nothing_was_measured_or_a_mean_is_negative():
    kinds = (Observable("a", "A", "1", "log10"), Observable("b", "A", "1"))
    measured = torch.tensor([[[2.0, math.nan], [math.nan, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    mean = torch.tensor([[[1.0, math.nan], [-1.0, 1.0], [-1.0, 2.0]]], dtype=torch.float64).requires_grad_()
    problem = replace(petab_tables.read(BOEHM)[0], observables=kinds)
    found = experiments.log_likelihood(problem, measured, mean, torch.ones_like(mean))
    found.sum().backward()
    assert mean.grad is not None
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(found).all()
    assert float(found[0, 2, 0].detach()) < -1e4
    assert found[0, 0, 1] == found[0, 1, 0] == 0


def test_values_that_a_condition_makes_infinite_are_named(tmp_path):
    problem, _ = petab_tables.read(written(tmp_path))
    parameters = {**problem.network.parameters, "late": "1 / on"}
    late = replace(problem, network=replace(problem.network, parameters=parameters))
    with pytest.raises(DataError, match='under the condition "rest" values are not finite: late'):
        prepare(late)
    first = replace(problem.network.reactions[0], rate="A / on")
    with pytest.raises(DataError, match=r"under some condition these are not finite:\n  - 1/on"):
        prepare(replace(problem, network=replace(problem.network, reactions=(first,))))


def test_scales_of_parameters_are_undone(tmp_path):
    problem, _ = petab_tables.read(written(tmp_path))
    scaled = torch.tensor([[-1.0, 0.5, 2.0, 0.3]], dtype=torch.float64)
    values = experiments.unscaled(problem, scaled)
    torch.testing.assert_close(values, torch.tensor([[0.1, math.exp(0.5), 2.0, 0.3]], dtype=torch.float64))


FAULTS = {
    "parameters": ("scale_a|log|1e-3|1e3|3|1\n", "scale_a|log|0|many|3|2\nk1|lin|0|1|1|1\nk1|ln|2|1|1|1\n"),
    "conditions": ("plain|nothing set|NaN|||\n", "plain|nothing set|-1|ghost||\nplain|||||\n"),
    "observables": ("obs_t|B + time * k2", "obs_t|Z + time * k2"),
    "measurements": (
        "obs_b||begun|1.2|2||\n",
        "obs_b||nowhere|1.2|2||\nobs_z||begun|1|1||\nobs_b||begun|nan|-2||\n"
        "obs_a||begun|1|1|2|0.1\nobs_b||begun|-1|1||\n",
    ),
}


def test_all_faults_of_a_petab_problem_are_listed_at_once(tmp_path):
    with pytest.raises(DataError) as told:
        petab_tables.read(written(tmp_path, FAULTS))
    for part in (
        'parameters.tsv, line 3: upperBound is "many", which is no number',
        'parameters.tsv, line 3: estimate is "2"; it must be 0 or 1',
        "there are two parameters k1",
        "parameter \"k1\": its scale is 'ln'",
        'parameter "k1": its bounds are 2.0 and 1.0',
        'conditions.tsv, line 3: there is a condition "plain" already',
        'there is no condition "nowhere"',
        'observable "obs_t": its formula uses "Z", which nothing defines',
        'measurements.tsv, line 7: there is no observable "obs_z"',
        'measurements.tsv, line 8: time is "-2" and measurement "nan"',
        'measurements.tsv, line 9: observableParameters is "2"; "obs_a" needs 2',
        'measurements.tsv, line 10: measurement is -1; on the log scale of "obs_b" it must be above 0',
    ):
        assert re.search(re.escape(part), str(told.value)), part


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        (
            "conditions",
            "conditionName|A",
            "conditionName|ghost",
            '"ghost" is neither a parameter nor a species',
        ),
        ("conditions", "conditionName|A|k2", "conditionName|A|k1", '"k1" is in the parameter table as well'),
        (
            "conditions",
            "begun|A set by a parameter|start",
            "begun||strat",
            '"A" is "strat", which is no parameter',
        ),
        (
            "conditions",
            "rest|equilibrated|0",
            "rest|equilibrated|-2",
            '"A" is -2; it must be finite and >= 0',
        ),
        ("conditions", "food|on", "food|twice", '"twice" has a rule'),
        (
            "parameters",
            "sd_b|lin|0|10|0.2",
            "sd_b|lin|0|10|",
            "it is not estimated, and has no nominal value",
        ),
        ("parameters", "parameterScaleNormal|0;2", "cauchy|0;2", "its prior is 'cauchy'"),
        (
            "observables",
            "observableId|observableFormula",
            "observableId|formula",
            'has no column "observableFormula"',
        ),
    ],
)
def test_a_fault_of_a_petab_table_is_named(tmp_path, kind, old, new, message):
    with pytest.raises(DataError, match=re.escape(message)):
        petab_tables.read(written(tmp_path, {kind: (old, new)}))


def test_what_petab_has_and_we_have_not_is_refused(tmp_path):
    with pytest.raises(Unsupported, match='observableTransformation "sqrt" of "obs_a"'):
        petab_tables.read(written(tmp_path, {"observables": ("lin|normal", "sqrt|normal")}))
    folder = written(tmp_path)
    text = (folder / "small.yaml").read_text()
    (folder / "small.yaml").write_text(text.replace("format_version: 1", "format_version: 2.0.0"))
    with pytest.raises(Unsupported, match=r"PEtab 2\.0\.0; version 1 is"):
        petab_tables.read(folder)
    (folder / "small.yaml").write_text(text.replace("[model.xml]", "[model.xml, other.xml]"))
    with pytest.raises(Unsupported, match="2 SBML models; one is"):
        petab_tables.read(folder / "small.yaml")


def test_petab_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(DataError, match="holds 0 YAML files"):
        petab_tables.read(tmp_path)
    (tmp_path / "small.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"small\.yaml\" cannot be read"):
        petab_tables.read(tmp_path)
    (tmp_path / "small.yaml").write_text("a: 1")
    with pytest.raises(DataError, match='is no PEtab problem: it has no "format_version"'):
        petab_tables.read(tmp_path)
    folder = written(tmp_path)
    (folder / "conditions.tsv").unlink()
    (folder / "measurements.tsv").unlink()
    with pytest.raises(
        DataError, match=r"(?s)conditions.tsv cannot be read.*measurements.tsv cannot be read"
    ):
        petab_tables.read(folder)


def test_moments_of_jumps_cannot_be_estimated(tmp_path):
    changes = {"conditions": ("begun|A set by a parameter|start|3|5|1", "begun||start|3|5|start")}
    problem, _ = petab_tables.read(written(tmp_path, changes))
    with pytest.raises(Unsupported, match='rates jump at time on, which depends on start, in "begun"'):
        prepare(problem)
    known = [
        replace(each, nominal=4.0, is_estimated=False) if each.name == "start" else each
        for each in problem.parameters
    ]
    assert prepare(replace(problem, parameters=tuple(known))).stops.tolist() == [[100], [4], [2]]


def test_compartments_that_change_after_equilibration_are_refused(tmp_path):
    problem, _ = petab_tables.read(written(tmp_path))
    sizes = {"plain": 2.0, "begun": 2.0, "rest": 1.0, "pulse": 2.0}
    resized = {k: {**sets, "cell": sizes[k]} for k, sets in problem.conditions.items()}
    with pytest.raises(Unsupported, match='the size of "cell" is 1 in "rest" and 2 in "pulse"'):
        prepare(replace(problem, conditions=resized))


def test_petab_data_that_contradict_their_problem_are_told(tmp_path):
    problem, data = petab_tables.read(written(tmp_path))
    values = {name: array.values.copy() for name, array in data.items()}
    values["time"][0, :2], values["time"][1, 0], values["measured"][1, 1, 3] = (2.0, 1.0), math.nan, -3.0
    values["measured"][0, 0, 0] = math.inf
    found = faults_of_data(problem, values, {"condition": np.array(["a", "b", "c"])})
    assert found == [
        "the conditions are a, b, c; the problem has plain, begun, pulse",
        'condition "plain": the times are out of order',
        'condition "begun": times must be numbers >= 0',
        "1 measurements are infinite",
        'observable "obs_b": 1 measurements are not above 0, on a log scale',
    ]
    assert "they need (3, 2)" in faults_of_data(problem, {**values, "time": values["time"][:2, :2]})[0]


def test_a_problem_that_cannot_be_read_back_says_why(tmp_path):
    problem, _ = petab_tables.read(written(tmp_path))
    table = problem.to_dict()
    del table["rows"]
    table["observables"][1] |= {"colour": 1}
    with pytest.raises(TemplateError, match=r'(?s)"rows" is missing.*observables, 2: there is no "colour"'):
        Problem.from_dict(table)


def test_a_missing_petab_is_named(monkeypatch, tmp_path):
    shutil.copytree(BOEHM, tmp_path / "copy")
    monkeypatch.setitem(sys.modules, "petab.v1", None)
    with pytest.raises(Unsupported, match=re.escape('pip install "scivi[kinetics]"')):
        petab_tables.read(tmp_path / "copy")
