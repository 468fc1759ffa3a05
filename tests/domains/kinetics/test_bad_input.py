"""What careless users hand in: one error each, which names every fault and nothing besides.

Longer than 400 lines because each fault stands beside the words in which it is told.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import scivi
from domains.kinetics import kinetics, petab_tables, sbml
from domains.kinetics.networks import Network, Reaction, network
from domains.kinetics.petab_problems import Observable, Parameter, Problem, faults_of_data
from scivi.errors import DataError, TemplateError, Unsupported
from scivi.ode import mass_action
from tests.domains.kinetics import test_sbml as xml

ROOT = Path(__file__).resolve().parents[3]
BOEHM = ROOT / "data" / "kinetics" / "Boehm_JProteomeRes2014"
NAMES = {
    "yaml": "Boehm_JProteomeRes2014.yaml",
    "model": "model_Boehm_JProteomeRes2014.xml",
    "parameters": "parameters_Boehm_JProteomeRes2014.tsv",
    "conditions": "experimentalCondition_Boehm_JProteomeRes2014.tsv",
    "observables": "observables_Boehm_JProteomeRes2014.tsv",
    "measurements": "measurementData_Boehm_JProteomeRes2014.tsv",
}
needs_petab = pytest.mark.usefixtures("petab")


@pytest.fixture
def petab() -> None:
    pytest.importorskip("libsbml", reason="python-libsbml reads SBML")
    pytest.importorskip("petab", reason="petab reads the problem's file")


def faults_in(error: Any) -> list[str]:
    """The lines of an error, but for its title."""
    return [line.strip().removeprefix("- ") for line in str(error.value).splitlines()[1:]]


# --- written by hand


def test_reactions_that_are_none_are_told_with_all_else():
    with pytest.raises(TemplateError) as told:
        network(
            {
                "A -> B -> C": "k",
                "-2 A -> B": "k",
                "1.5 A -> B": "k",
                "A -> B": None,
                "B -> 0": -1.0,
                "A + B <-> D": "k",
                3: "k",
                "A + lost -> B": "k * gone",
            },  # type: ignore[dict-item]
            initial={"A": [1.0], "B": -0.5, "C": 1.0, "E": 0.0},  # type: ignore[dict-item]
            parameters={"k": None},  # type: ignore[dict-item]
        )
    assert faults_in(told) == [
        '"A -> B -> C" is no reaction; write one like "A + B -> C"',
        '"-2 A -> B": "-2 A" is no species; write "A" or "2 A"',
        '"A + B <-> D" needs two rates, forth and back',
        '"3" is no reaction; write one like "A + B -> C"',
        '"1.5 A -> B": mass action needs whole numbers of reactants; write the rate out',
        '"A -> B": its rate is None; it must be a formula, or a number >= 0',
        '"B -> 0": its rate is -1.0; it must be a formula, or a number >= 0',
        'the value of "k" is None; it must be a number or a formula',
        'the value of "A" is [1.0]; it must be a number or a formula',
        'the rate of "A + lost -> B" uses "gone", which nothing defines',
        'species "lost" has no initial value',
        'there is an initial value of "E", which is no species',
        'the initial value of "B" is -0.5; it cannot be negative',
    ]


def test_stoichiometry_that_is_no_number_and_species_that_are_missing():
    faulty = Network(
        ("A", "B"),
        (
            Reaction("r", {"A": "two", "B": np.inf, "ghost": 1.0}, "A"),  # type: ignore[dict-item]
            Reaction("s", {"A": np.nan}, "lost"),
        ),
        {"cell": "wide"},
        {"A": 1.0},
        volumes={"A": "cell", "B": None},  # type: ignore[dict-item]
    )
    assert faulty.faults() == [
        'the value of "cell" uses "wide", which nothing defines',
        '"r" changes "ghost", which is no species',
        '"r" changes "A" by \'two\', which is no finite number',
        '"r" changes "B" by inf, which is no finite number',
        'the rate of "s" uses "lost", which nothing defines',
        '"s" changes "A" by nan, which is no finite number',
        'species "B" has no initial value',
        'the volume of "B" is None; it must be above 0',
    ]
    assert Network((), (), {}, {}).faults() == ["there are no species"]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ([], "it is [], and no table of what a network has"),
        ({"species": [], "reactions": 2, "parameters": {}, "initial": {}}, '"reactions" is 2, and no list'),
        (
            {"species": [], "reactions": [1], "parameters": {}, "initial": {}},
            "reaction 1: it is 1, and no table of what a reaction has",
        ),
        (
            {
                "species": [],
                "reactions": [{"name": "r", "change": 5, "rate": "1"}],
                "parameters": {},
                "initial": {},
            },
            'reaction 1: "change" is 5, and no table',
        ),
        (
            {"species": [], "reactions": [], "parameters": [1], "initial": {}},
            '"parameters" is [1], and no table',
        ),
    ],
)
def test_plain_values_that_are_no_network(table, fault):
    with pytest.raises(TemplateError) as told:
        Network.from_dict(table)
    assert fault in faults_in(told)


def test_reactions_of_mass_action_are_told_of_together():
    with pytest.raises(TemplateError) as told:
        mass_action([(0, 0, 1), (2,), (0.5,)], np.array([[np.nan, 1.0], [1.0, -1.0]]), ["A"], ["k"])  # type: ignore[list-item]
    assert faults_in(told) == [
        "there are reactants of 3 reactions, and 2 columns",
        "some of the stoichiometry is not finite",
        "reaction 0 has 3 reactants; two are the most",
        "reaction 1 has reactants [2]; there are 2 states",
        "reaction 2 has reactants [0.5]; there are 2 states",
        "there are 1 names of states; the stoichiometry has 2",
        "there are 1 names of parameters; the stoichiometry has 2",
    ]
    with pytest.raises(TemplateError, match="the stoichiometry is no table of numbers"):
        mass_action([(0,)], [["one"]])  # type: ignore[arg-type]


def decay(**changes: Any) -> Problem:
    """A -> B at k, both seen, the second on a log scale."""
    made = network({"A -> B": "k"}, initial={"A": "a0", "B": 0.5}, parameters={"k": 1.0, "a0": 1.0})
    parts: dict[str, Any] = {
        "network": made,
        "parameters": (Parameter("k", "log10", 1e-3, 1e3, 1.0), Parameter("sd", "lin", 0.01, 1.0, 0.1)),
        "observables": (Observable("A seen", "A", "sd"), Observable("B seen", "B", "sd", "log")),
        "conditions": {"c": {}},
        "rows": (("c", ""),),
    }
    return Problem(**{**parts, **changes})


def table(**changes: Any) -> dict[str, Any]:
    made = {
        "time": (("condition", "moment"), [[0.1, 0.5, 1.0]]),
        "measured": (("condition", "moment", "observable"), [[[0.9, 0.6], [0.6, 0.9], [0.4, 1.1]]]),
        "condition": (("condition",), ["c"]),
        "observable": (("observable",), ["A seen", "B seen"]),
    }
    return made | changes


def test_the_problem_by_hand_is_in_order():
    assert decay().faults() == []
    scivi.fit(kinetics.make(decay()), table(), scivi.Plan(steps=1, stop=None), progress=False)


PRIORS = {
    "scale": (Parameter("k", prior="normal", lower=0, upper=1, prior_parameters=(0.0, -1.0)),
              "its prior 'normal' has 0.0; -1.0; its scale must be above 0"),
    "number": (Parameter("k", prior="normal", lower=0, upper=1, prior_parameters=(0.0, np.nan)),
               "its prior 'normal' has 0.0; nan, which are no finite numbers"),
    "nothing left": (Parameter("k", prior="uniform", lower=0, upper=1, prior_parameters=(2.0, 3.0)),
                     "its prior 'uniform' has 2.0; 3.0; between these and its bounds nothing is left"),
    "nothing left, log10": (
        Parameter("k", "log10", 1.0, 10.0, prior="parameterScaleUniform", prior_parameters=(2.0, 3.0)),
        "its prior 'parameterScaleUniform' has 2.0; 3.0; between these and its bounds nothing is left"),
    "below 0": (Parameter("k", prior="logNormal", lower=-1, upper=1, prior_parameters=(0.0, 1.0)),
                "its lower bound is -1; the prior 'logNormal' has nothing below 0"),
    "infinite": (Parameter("k", lower=0, upper=np.inf),
                 "its bounds are 0 and inf; the lower must be below the upper, both finite"),
    "text": (Parameter("k", lower="0", upper=1.0),  # type: ignore[arg-type]
             "its bounds are 0 and 1.0; the lower must be below the upper, both finite"),
    "reversed": (Parameter("k", lower=2.0, upper=1.0),
                 "its bounds are 2.0 and 1.0; the lower must be below the upper, both finite"),
    "nominal": (Parameter("k", lower=0.0, upper=1.0, nominal=np.inf),
                "its nominal value is inf; it must be a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRIORS)
def test_bounds_and_priors_that_leave_nothing(name):
    parameter, fault = PRIORS[name]
    assert parameter.faults() == [f'parameter "k": {fault}']


def test_amounts_and_scales_below_0_are_told_however_they_are_given():
    parameters = (
        Parameter("k", "log10", 1e-3, 1e3, 1.0),
        Parameter("sd", "lin", -1.0, 1.0, 0.1),
        Parameter("less", nominal=-2.0, is_estimated=False),
        Parameter("a0", "lin", -3.0, 1.0, 0.1),
        Parameter("typo", "lin", 0.0, 1.0, 0.1),
    )
    observables = (
        Observable("A seen", "A", "sd"),
        Observable("B seen", "B", "0", "log"),
        Observable("both", "A + B", "less / 4"),
        Observable("twice", "2 * A", "ln(less)"),
    )
    conditions = {"c": {}, "by name": {"B": "less", "a0": 1.0}}
    problem = decay(parameters=parameters, observables=observables, conditions=conditions)
    assert problem.faults() == ['condition "by name": "a0" is in the parameter table as well']
    problem = decay(parameters=parameters, observables=observables, conditions={"c": {"B": "less"}})
    assert problem.faults() == [
        'parameter "typo" is estimated, and used nowhere in the network or the observables',
        'under the condition "c" the initial value of "A" may be as low as -3, the lower bound of "a0"; '
        "it must be finite and >= 0",
        'under the condition "c" the initial value of "B" is -2; it must be finite and >= 0',
        'observable "A seen": its noise may be as low as -1, the lower bound of "sd"; it must be above 0',
        'observable "B seen": its noise is 0; it must be above 0',
        'observable "both": its noise is -0.5; it must be above 0',
        'observable "twice": its noise is no finite real number; it must be above 0',
    ]


def test_a_problem_whose_parts_do_not_fit_is_told_at_once():
    with pytest.raises(TemplateError) as told:
        kinetics.make(
            decay(
                parameters=(Parameter("k", "ln", 1e-3, 1e3), Parameter("A", nominal=1.0, is_estimated=False)),
                observables=(Observable("A seen", "ghost", None),),  # type: ignore[arg-type]
                conditions={"c": {"B": None, "a0": "lost"}},
                rows=(("c", "before"),),
            )
        )
    assert faults_in(told) == [
        "parameter \"k\": its scale is 'ln'; it must be one of lin, log, log10",
        'parameter "A" is a species or has a rule in the network',
        'condition "c": "B" is None; it must be finite and >= 0',
        'condition "c": "a0" is "lost", which is no parameter',
        'there is no condition "before"',
        'observable "A seen": its formula uses "ghost", which nothing defines',
        'observable "A seen": its noise is None; it must be a number or a formula',
    ]
    empty = decay(observables=(), rows=())
    assert empty.faults()[-2:] == [
        "nothing is simulated: there are no rows",
        "nothing is measured: there are no observables",
    ]


BAD = table(
    time=(("condition", "moment"), [[1.0, 0.5, 2.0]]),
    measured=(("condition", "moment", "observable"), [[[0.9, -0.6], [np.nan, 0.0], [-0.4, 1.1]]]),
    observable=(("observable",), ["A seen", "B sen"]),
)
TOLD_OF_BAD = [
    "the observables are A seen, B sen; the problem has A seen, B seen",
    'condition "c": the times are out of order',
    'observable "B seen": 2 measurements are not above 0, on a log scale',
]


def test_rows_that_are_no_pairs_and_conditions_that_are_no_table():
    with pytest.raises(TemplateError) as told:
        decay(rows=("c", ("c", ""), ("c", "b", "a")))
    assert faults_in(told) == [
        "'c' is no pair; write (condition, \"\") or (condition, before)",
        "('c', 'b', 'a') is no pair; write (condition, \"\") or (condition, before)",
    ]
    for change, fault in (
        ({"rows": ["ab"]}, "'ab' is no pair; write (condition, \"\") or (condition, before)"),
        ({"rows": [["c"]]}, "['c'] is no pair; write (condition, \"\") or (condition, before)"),
        ({"conditions": [1]}, '"conditions" is [1], and no table'),
        ({"conditions": {"c": 2}}, 'conditions: "c" is 2, and no table'),
    ):
        with pytest.raises(TemplateError) as told:
            Problem.from_dict({**decay().to_dict(), **change})
        assert faults_in(told) == [fault]


def test_times_and_measurements_are_told_together():
    values = {name: np.asarray(BAD[name][1]) for name in ("time", "measured")}
    coords = {name: BAD[name][1] for name in ("condition", "observable")}
    assert faults_of_data(decay(), values, coords) == TOLD_OF_BAD


def test_a_table_by_hand_is_refused_before_anything_is_solved():
    with pytest.raises(DataError) as told:
        scivi.fit(kinetics.make(decay()), BAD, scivi.Plan(steps=1), progress=False)
    assert faults_in(told) == TOLD_OF_BAD


def test_measurements_by_hand_are_refused_before_the_search():
    measured = xr.Dataset(
        {name: (BAD[name][0], np.asarray(BAD[name][1])) for name in ("time", "measured")},
        {name: BAD[name][1] for name in ("condition", "observable")},
    )
    with pytest.raises(DataError) as told:
        kinetics.from_data((decay(), measured), starts=2, progress=False)
    assert faults_in(told) == TOLD_OF_BAD


# --- PEtab


def altered(folder: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of Boehm's problem. A change is (old, new), each once; a text; bytes; or None, to remove."""
    copy = folder / "copy"
    shutil.copytree(BOEHM, copy)
    for kind, change in changes.items():
        path = copy / NAMES[kind]
        if change is None:
            path.unlink()
        elif isinstance(change, bytes):
            path.write_bytes(change)
        elif isinstance(change, str):
            path.write_text(change)
        else:
            text = path.read_text()
            for old, new in change:
                assert old in text, (kind, old)
                text = text.replace(old, new, 1)
            path.write_text(text)
    return copy


MEASURED = "pSTAT5A_rel\t\tmodel1_data1\t"  # of the first 16 lines, times from 0.0
MANY = {
    "parameters": [
        ("k_exp_hetero\tk_{exp,hetero}\tlog10\t1E-05\t100000", "k_exp_hetero\t\tlog10\t10\t1"),
        ("k_exp_homo\tk_{exp,homo}\tlog10\t1E-05", "k_exp_homo\t\tlog10\tlow"),
        ("k_phos\tk_{phos}", "k_fos\t"),
    ],
    "conditions": [
        ("conditionName\n", "conditionName\tSTAT5A\tghost\n"),
        ("condition1", "condition1\t-1\t2"),
    ],
    "observables": [("200 * pApA * specC17", "200 * lost * specC17"), ("lin\tnormal", "log10\tnormal")],
    "measurements": [
        (f"{MEASURED}7.90107299873911\t0.0", f"{MEASURED}-7.9\t0.0"),
        (f"{MEASURED}66.3634939682528\t2.5", f"{MEASURED}66.4\t-2.5"),
        (f"{MEASURED}81.1713239165337\t5.0", f"{MEASURED}much\t5.0"),
        (f"{MEASURED}94.7303080627876\t10.0", f"{MEASURED}NaN\t10.0"),
        ("pSTAT5B_rel\t\tmodel1_data1", "pSTAT5C_rel\t\tmodel1_data1"),
        ("pSTAT5B_rel\t\tmodel1_data1", "pSTAT5C_rel\t\tmodel1_data1"),
        ("rSTAT5A_rel\t\tmodel1_data1", "rSTAT5A_rel\t\tmodel1_data2"),
    ],
}
TOLD = [
    'parameters_Boehm_JProteomeRes2014.tsv, line 4: lowerBound is "low", which is no number',
    "measurementData_Boehm_JProteomeRes2014.tsv, line 2: measurement is -7.9; on the log scale of "
    '"pSTAT5A_rel" it must be above 0',
    'measurementData_Boehm_JProteomeRes2014.tsv, line 3: time is "-2.5" and measurement "66.4"; they must be '
    "a time >= 0 and a finite number",
    'measurementData_Boehm_JProteomeRes2014.tsv, line 4: measurement is "much", which is no number',
    'measurementData_Boehm_JProteomeRes2014.tsv, line 5: time is "10.0" and measurement "NaN"; they must be '
    "a time >= 0 and a finite number",
    'measurementData_Boehm_JProteomeRes2014.tsv, line 18 and 1 more: there is no observable "pSTAT5C_rel"',
    'parameter "k_exp_hetero": its bounds are 10.0 and 1.0; the lower must be below the upper, both finite',
    'parameter "k_exp_homo": its bounds are None and 100000.0; the lower must be below the upper, '
    "both finite",
    'condition "model1_data1": "STAT5A" is -1; it must be finite and >= 0',
    'condition "model1_data1": "ghost" is neither a parameter nor a species of the network',
    'there is no condition "model1_data2"',
    'observable "pSTAT5A_rel": its formula uses "lost", which nothing defines',
]


@needs_petab
def test_a_petab_folder_with_many_faults_is_one_error(tmp_path):
    with pytest.raises(DataError) as told:
        petab_tables.read(altered(tmp_path, MANY))
    assert faults_in(told) == TOLD


@needs_petab
@pytest.mark.slow
def test_the_command_line_tells_the_same_without_a_traceback(tmp_path):
    """Takes the start of a process, some five seconds."""
    call = [sys.executable, "-m", "scivi.cli", "fit", "domains.kinetics.kinetics:from_data"]
    call = [*call, str(altered(tmp_path, MANY)), "--out", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("scivi: the problem ")
    assert [line.removeprefix("  - ") for line in done.stderr.splitlines()[1:]] == TOLD


HEADER = "observableId\tsimulationConditionId\tmeasurement\ttime"
PROBLEM = "format_version: 1\nparameter_file: p.tsv\nproblems:"
FOLDERS = {
    "no yaml": ({"yaml": None}, "holds 0 YAML files; give the path of the one that is meant"),
    "a table": ({"yaml": "a\tb\n1\t2\n"}, "cannot be read as YAML"),
    "bytes": ({"yaml": b"\xff\xfe\x00\x80"}, "cannot be read as YAML"),
    "a list": ({"yaml": "- 1\n"}, 'it has no "format_version"'),
    "no problems": ({"yaml": "format_version: 1\n"}, '"problems" is None; it must be a list'),
    "problems in words": ({"yaml": f"{PROBLEM} [x]\n"}, "\"problems\" is ['x']; it must be a list"),
    "one problem": ({"yaml": f"{PROBLEM}\n  sbml_files: [m]\n"}, "\"problems\" is {'sbml_files': ['m']}"),
    "numbers": ({"yaml": f"{PROBLEM}\n- sbml_files: [m]\n  condition_files: 3\n"},
                '"condition_files" is 3; it must be the name of a file, or a list of such'),
    "nothing named": ({"yaml": f"{PROBLEM}\n- sbml_files: [m]\n"}, "there is no condition table"),
    "no such table": ({"measurements": None}, "Data_Boehm_JProteomeRes2014.tsv cannot be read: No"),
    "no such model": ({"model": None}, "model_Boehm_JProteomeRes2014.xml\" cannot be read: No such file"),
    "model of bytes": ({"model": b"\xff\xfe\x80"}, "is no text in UTF-8"),
    "model in words": ({"model": "hello"}, "this is no valid SBML"),
    "no measurements": ({"measurements": HEADER + "\n"}, "there are no rows"),
    "empty": ({"measurements": ""}, 'has no column "measurement"'),
    "commas": ({"measurements": HEADER.replace("\t", ",")}, "separated by tabs"),
    "twice": ({"measurements": HEADER + "\ttime\n"}, 'has 2 columns "time"'),
    "too long": ({"conditions": "conditionId\nmodel1_data1\t3\n"}, '"3" stands in none of the 1 columns'),
    "no name": ({"conditions": "conditionId\tA\n\t3\n"}, "line 2: conditionId is empty"),
    "latin": ({"conditions": "conditionId\nå\n".encode("latin-1")}, "can't decode byte"),
    "not known": ({"parameters": [("k_phos\t", "k_fos\t")]}, '"k_fos" is estimated, and used nowhere'),
    "noise of 0": ({"measurements": [("\tsd_pSTAT5A_rel", "\t0")]}, "the scale of noise must be above 0"),
    "start below 0": ({"parameters": [("\t0.693", "\t1.1")]},
                      'the initial value of "STAT5B" is -20.76; it must be finite'),
}  # fmt: skip


@needs_petab
@pytest.mark.parametrize("name", FOLDERS)
def test_a_petab_folder_is_refused_in_words(tmp_path, name):
    changes, words = FOLDERS[name]
    with pytest.raises(DataError) as told:
        kinetics.from_data(altered(tmp_path, changes), progress=False)
    assert words in str(told.value)


@needs_petab
def test_every_file_that_is_missing_is_named_with_the_others(tmp_path):
    with pytest.raises(DataError) as told:
        petab_tables.read(altered(tmp_path, {k: None for k in NAMES if k != "yaml"}))
    named = [fault.split(" cannot be read")[0].rpartition("/")[2].strip('"') for fault in faults_in(told)]
    assert sorted(named) == sorted(name for kind, name in NAMES.items() if kind != "yaml")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        petab_tables.read(tmp_path / "nowhere.yaml")


@needs_petab
def test_what_is_not_offered_is_told_with_what_is_wrong(tmp_path):
    """Both kinds of fault, of tables and of the model, in one error."""
    event = (
        '<listOfEvents><event id="push"><trigger><math xmlns="http://www.w3.org/1998/Math/MathML"><true/></math>'
        "</trigger></event></listOfEvents></model>"
    )
    changes = {
        "model": [("</model>", event)],
        "observables": [("lin\tnormal", "sqrt\tnormal"), ("lin\tnormal", "lin\tcauchy")],
        "measurements": [(f"{MEASURED}66.3634939682528\t2.5", f"{MEASURED}66.4\t-2.5")],
    }
    with pytest.raises(Unsupported) as told:
        petab_tables.read(altered(tmp_path, changes))
    for words in (
        'observableTransformation "sqrt" of "pSTAT5A_rel"',
        'noiseDistribution "cauchy" of "pSTAT5B_rel"',
        'the event "push"',
        'besides, this is wrong: measurementData_Boehm_JProteomeRes2014.tsv, line 3: time is "-2.5"',
    ):
        assert words in str(told.value)


@needs_petab
def test_petab_of_version_2_is_refused_whatever_else_it_says(tmp_path):
    text = "format_version: 2.0.0\nparameter_files: [a]\nmodel_files: {m: {location: x, language: sbml}}\n"
    with pytest.raises(Unsupported) as told:
        petab_tables.read(altered(tmp_path, {"yaml": text}))
    assert faults_in(told) == ["PEtab 2.0.0; version 1 is", '"model_files"']


@needs_petab
def test_nothing_to_estimate_is_an_error(tmp_path):
    rows = (BOEHM / NAMES["parameters"]).read_text().splitlines()
    fixed = "\n".join([rows[0], *(row[: row.rindex("\t")] + "\t0" for row in rows[1:])])
    with pytest.raises(DataError) as told:
        petab_tables.read(altered(tmp_path, {"parameters": fixed}))
    assert faults_in(told) == ["no parameter is estimated"]


@needs_petab
def test_nominal_values_outside_of_the_bounds_are_warned_of(tmp_path):
    change = [("k_imp_homo\tk_{imp,homo}\tlog10\t1E-05\t100000", "k_imp_homo\t\tlog10\t1E-05\t100")]
    with pytest.warns(UserWarning, match=r"1 nominal values are outside of the bounds.*: k_imp_homo \(9"):
        petab_tables.read(altered(tmp_path, {"parameters": change}))


# --- SBML


def called(*names: str) -> str:
    return f"<apply>{''.join(names)}</apply>"


SBML: dict[str, tuple[dict[str, str], type[Exception], list[str]]] = {
    "compartments": (
        {"compartments": ""},
        DataError,
        [
            'species "A" is in the compartment "cell", which is not there',
            'species "B" is in the compartment "bath", which is not there',
        ],
    ),
    "names": (
        {"species": xml.A + xml.A + xml.B, "parameters": xml.K + xml.K, "reactions": xml.LEAK + xml.LEAK},
        DataError,
        [
            '"A" is the name of several: species, species',
            '"k" is the name of several: parameter, parameter',
            '"r" is the name of several: reaction, reaction',
        ],
    ),
    "species": (
        {
            "reactions": xml.LEAK.replace('species="B"', 'species="ghost"'),
            "species": xml.A.replace('"3"', '"-3"'),
        },
        DataError,
        ['"r" changes "ghost", which is no species', 'the initial value of "A" is -3; it cannot be negative'],
    ),
    "twice ruled": (
        {
            "rules": f'<rateRule variable="A">{xml.math(xml.ci("k"))}</rateRule>'
            f'<assignmentRule variable="B">{xml.math(xml.ci("k"))}</assignmentRule>'
        },
        DataError,
        [f'"{name}" has a rule, and reactions change it as well' for name in "AB"],
    ),
    "stoichiometry": (
        {"reactions": xml.LEAK.replace('stoichiometry="1"', 'stoichiometry="INF"')},
        Unsupported,
        [f'the stoichiometry of "{name}" in "r", which is not given' for name in "AB"],
    ),
    "arguments": (
        {"reactions": xml.reaction(called("<power/>", xml.ci("A")))},
        Unsupported,
        ['"power" of 1 arguments'],
    ),
    "calls itself": (
        {
            "functions": '<functionDefinition id="f">'
            + xml.math(f"<lambda><bvar>{xml.ci('x')}</bvar>{called(xml.ci('f'), xml.ci('x'))}</lambda>")
            + "</functionDefinition>",
            "reactions": xml.reaction(called(xml.ci("f"), xml.ci("A"))),
        },
        Unsupported,
        ['function "f", which calls itself'],
    ),
    "all kinds": (
        {
            "after": xml.EVENT,
            "rules": f"<algebraicRule>{xml.math(xml.ci('k'))}</algebraicRule>",
            "reactions": xml.reaction(xml.times(xml.ci("k"), xml.DELAY)),
            "attributes": 'conversionFactor="k"',
            "species": xml.A.replace('"3"', '"-3"') + xml.B,
            "parameters": '<parameter id="k" constant="true"/>',
        },
        Unsupported,
        [
            'the event "push"',
            "an algebraic rule",
            'the conversion factor "k"',
            '"delay" in a formula',
            'besides, this is wrong: "k" has no value',
            'besides, this is wrong: the initial value of "A" is -3; it cannot be negative',
        ],
    ),
}  # fmt: skip


@needs_petab
@pytest.mark.parametrize("name", SBML)
def test_an_sbml_model_is_refused_in_words(name):
    parts, kind, faults = SBML[name]
    with pytest.raises(kind) as told:
        sbml.parse(xml.model(**parts))
    assert faults_in(told) == faults


@needs_petab
def test_two_models_are_refused_and_a_missing_encoding_is_not():
    text = xml.model()
    with pytest.raises(DataError, match="Only one <model> element is permitted"):
        sbml.parse(text.replace("</sbml>", text[text.index("<model") :]))
    assert sbml.parse(text.replace(' encoding="UTF-8"', "")) == sbml.parse(text)
