"""Small SBML models, one feature each: what is taken over, and what is refused by name."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from domains.kinetics import rates, sbml
from domains.kinetics.networks import Network
from scivi.errors import DataError, Unsupported

pytest.importorskip("libsbml", reason="python-libsbml reads SBML")

CELL = '<compartment id="cell" size="2" constant="true"/><compartment id="bath" size="10" constant="true"/>'
TIME = '<csymbol encoding="text" definitionURL="http://www.sbml.org/sbml/symbols/time"> t </csymbol>'
FLAGS = 'hasOnlySubstanceUnits="false" boundaryCondition="false" constant="false"'
A = f'<species id="A" compartment="cell" initialConcentration="3" {FLAGS}/>'
B = f'<species id="B" compartment="bath" initialConcentration="1" {FLAGS}/>'
K = '<parameter id="k" value="0.5" constant="true"/>'


def math(content: str) -> str:
    return f'<math xmlns="http://www.w3.org/1998/Math/MathML">{content}</math>'


def times(*factors: str) -> str:
    return f"<apply><times/>{''.join(factors)}</apply>"


def ci(name: str) -> str:
    return f"<ci>{name}</ci>"


def reaction(
    rate: str, *, left: str = "A", right: str = "B", law: str = "", flags: str = 'fast="false"'
) -> str:
    sides = [
        f'<{side}><speciesReference species="{s}" stoichiometry="1" constant="true"/></{side}>' if s else ""
        for side, s in (("listOfReactants", left), ("listOfProducts", right))
    ]
    return (
        f'<reaction id="r" reversible="false" {flags}>{"".join(sides)}'
        f"<kineticLaw>{math(rate)}{law}</kineticLaw></reaction>"
    )


LEAK = reaction(times(ci("k"), ci("cell"), ci("A")))


def model(
    *,
    species: str = A + B,
    parameters: str = K,
    reactions: str = LEAK,
    compartments: str = CELL,
    functions: str = "",
    starts: str = "",
    rules: str = "",
    after: str = "",
    attributes: str = "",
) -> str:
    parts = (
        ("listOfFunctionDefinitions", functions),
        ("listOfCompartments", compartments),
        ("listOfSpecies", species),
        ("listOfParameters", parameters),
        ("listOfInitialAssignments", starts),
        ("listOfRules", rules),
        ("listOfReactions", reactions),
    )
    inner = "".join(f"<{tag}>{content}</{tag}>" for tag, content in parts if content)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<sbml xmlns="http://www.sbml.org/sbml/level3/version1/core" level="3" version="1">'
        f'<model id="m" {attributes}>{inner}{after}</model></sbml>'
    )


def rate_at(found: Network, time: float, y: list[float]) -> list[float]:
    system = rates.compiled(found, ())
    at = torch.tensor([y], dtype=torch.float64)
    return system.rate(torch.tensor([time], dtype=torch.float64), at, at[:, :0])[0].tolist()


def test_concentrations_in_two_compartments():
    found = sbml.parse(model())
    assert found.species == ("A", "B")
    assert dict(found.initial) == {"A": 3.0, "B": 1.0}
    assert dict(found.parameters) == {"cell": 2.0, "bath": 10.0, "k": 0.5}
    assert dict(found.volumes) == {"A": "cell", "B": "bath"}
    assert rate_at(found, 0.0, [3.0, 1.0]) == pytest.approx([-1.5, 0.3])


def test_amounts_are_not_divided_by_a_volume():
    amount = A.replace('hasOnlySubstanceUnits="false"', 'hasOnlySubstanceUnits="true"')
    found = sbml.parse(model(species=amount + B))
    assert found.initial["A"] == "3.0 * cell"
    assert rate_at(found, 0.0, [6.0, 1.0]) == pytest.approx([-6.0, 0.6])
    given = A.replace("initialConcentration", "initialAmount")
    assert sbml.parse(model(species=given + B)).initial["A"] == "3.0 / cell"


def test_functions_locals_time_and_rules_are_put_in_place():
    bound = "".join(f"<bvar>{ci(name)}</bvar>" for name in ("x", "n"))
    function = math(f"<lambda>{bound}<apply><power/>{ci('x')}{ci('n')}</apply></lambda>")
    local = '<listOfLocalParameters><localParameter id="k" value="7"/></listOfLocalParameters>'
    called = "<apply><ci>pow2</ci><ci>A</ci><cn>2</cn></apply>"
    found = sbml.parse(
        model(
            functions=f'<functionDefinition id="pow2">{function}</functionDefinition>',
            reactions=reaction(times(ci("k"), called, ci("drive")), law=local),
            parameters=K
            + '<parameter id="drive" constant="false"/><parameter id="v" value="-1" constant="false"/>',
            rules=(
                f'<assignmentRule variable="drive">{math(times(ci("k"), TIME))}</assignmentRule>'
                f'<rateRule variable="v">{math(times(ci("r"), ci("v")))}</rateRule>'
            ),
        )
    )
    assert found.parameters["r_k"] == 7.0
    assert found.species == ("A", "B", "v")
    assert found.signed == ("v",)
    flux = 7.0 * 3.0**2 * (0.5 * 4.0)
    assert rate_at(found, 4.0, [3.0, 1.0, -1.0]) == pytest.approx([-flux / 2, flux / 10, -flux])


def test_initial_assignments_may_use_parameters_and_species():
    starts = f'<initialAssignment symbol="B">{math(times(ci("k"), ci("A")))}</initialAssignment>'
    starts += f'<initialAssignment symbol="k">{math(times(ci("cell"), "<cn>4</cn>"))}</initialAssignment>'
    found = sbml.parse(model(starts=starts))
    assert found.initial["B"] == "(k * A)"
    assert found.parameters["k"] == "(cell * 4)"


def test_what_no_reaction_changes_is_a_parameter():
    food = A.replace('boundaryCondition="false"', 'boundaryCondition="true"')
    found = sbml.parse(model(species=food + B))
    assert found.species == ("B",)
    assert found.held == ("A",)
    assert found.parameters["A"] == 3.0
    assert rate_at(found, 0.0, [1.0]) == pytest.approx([0.3])


@pytest.mark.parametrize(
    ("mathml", "value"),
    [
        ("<apply><root/><degree><cn>3</cn></degree><cn>8</cn></apply>", 2.0),
        ("<apply><log/><logbase><cn>2</cn></logbase><cn>8</cn></apply>", 3.0),
        ("<apply><log/><cn>1000</cn></apply>", 3.0),
        ('<cn type="e-notation"> 1.5 <sep/> -2 </cn>', 0.015),
        ('<cn type="rational"> 1 <sep/> 4 </cn>', 0.25),
        ("<apply><minus/><cn>-3</cn></apply>", 3.0),
        ("<apply><divide/><pi/><exponentiale/></apply>", 3.141592653589793 / 2.718281828459045),
        ("<piecewise><piece><cn>1</cn><apply><lt/><cn>0</cn>" + TIME + "<cn>2</cn></apply></piece>"
         "<otherwise><cn>5</cn></otherwise></piecewise>", 1.0),
        ("<piecewise><piece><cn>1</cn><apply><or/><apply><gt/>" + TIME + "<cn>3</cn></apply>"
         "<apply><not/><true/></apply></apply></piece><otherwise><cn>5</cn></otherwise></piecewise>", 5.0),
    ],
)  # fmt: skip
def test_mathml_is_written_as_it_is_meant(mathml, value):
    found = sbml.parse(model(reactions=reaction(mathml, left="")))
    assert rate_at(found, 1.0, [1.0]) == pytest.approx([value / 10.0])


def test_long_sums_are_read():
    terms = "".join("<cn>1</cn><apply><minus/><cn>2</cn></apply>" for _ in range(600))
    found = sbml.parse(model(reactions=reaction(f"<apply><plus/>{terms}{ci('A')}</apply>", left="")))
    assert rate_at(found, 0.0, [1.0]) == pytest.approx([(-600 + 3.0) / 10.0])
    assert rates.fluxes(found).rates[0].free_symbols


DELAY = (
    '<apply><csymbol encoding="text" definitionURL="http://www.sbml.org/sbml/symbols/delay">delay</csymbol>'
    "<ci>A</ci><cn>1</cn></apply>"
)
EVENT = (
    '<listOfEvents><event id="push" useValuesFromTriggerTime="true">'
    '<trigger initialValue="true" persistent="true">'
    + math(f"<apply><gt/>{TIME}<cn>1</cn></apply>")
    + "</trigger></event></listOfEvents>"
)
REFUSED = {
    "event": ({"after": EVENT}, 'the event "push"'),
    "algebraic": ({"rules": f"<algebraicRule>{math(ci('k'))}</algebraicRule>"}, "an algebraic rule"),
    "delay": ({"reactions": reaction(times(ci("k"), DELAY))}, '"delay" in a formula'),
    "fast": ({"reactions": LEAK.replace('fast="false"', 'fast="true"')}, 'the fast reaction "r"'),
    "factor": ({"attributes": 'conversionFactor="k"'}, 'the conversion factor "k"'),
    "own factor": (
        {"species": A.replace('id="A"', 'id="A" conversionFactor="k"') + B},
        'the conversion factor of "A"',
    ),
    "no law": (
        {"reactions": re.sub("<kineticLaw>.*</kineticLaw>", "", LEAK)},
        'the reaction "r", which has no kinetic law',
    ),
    "stoichiometry": (
        {"reactions": LEAK.replace('species="A" stoichiometry="1"', 'species="A"')},
        'the stoichiometry of "A" in "r", which is not given',
    ),
    "spline": (
        {"reactions": reaction(f"<apply>{ci('spline_pos5')}{TIME}<cn>0</cn></apply>")},
        'function "spline_pos5", which the model does not define',
    ),
    "factorial": (
        {"reactions": reaction("<apply><factorial/><ci>A</ci></apply>")},
        '"factorial" in a formula',
    ),
    "infinite": ({"reactions": reaction("<infinity/>")}, 'the number "inf" in a formula'),
    "growing": (
        {"rules": f'<assignmentRule variable="cell">{math(TIME)}</assignmentRule>'},
        'the size of compartment "cell", which changes',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_network_has_not_is_refused_by_name(name):
    parts, message = REFUSED[name]
    with pytest.raises(Unsupported, match=re.escape(message)):
        sbml.parse(model(**parts))


def test_stoichiometry_by_formula_is_refused_in_level_2():
    text = f"""<sbml xmlns="http://www.sbml.org/sbml/level2/version4" level="2" version="4"><model id="m">
        <listOfCompartments><compartment id="cell" size="1"/></listOfCompartments>
        <listOfSpecies><species id="A" compartment="cell" initialAmount="1"/></listOfSpecies>
        <listOfReactions><reaction id="r"><listOfReactants><speciesReference species="A"><stoichiometryMath>
        {math("<cn>2</cn>")}</stoichiometryMath></speciesReference></listOfReactants>
        <kineticLaw>{math(ci("A"))}</kineticLaw></reaction></listOfReactions></model></sbml>"""
    with pytest.raises(Unsupported, match='the stoichiometry of "A" in "r", which is a formula'):
        sbml.parse(text)


def test_packages_that_change_the_equations_are_refused():
    inner = '<comp:submodel comp:id="inner" comp:modelRef="other"/>'
    text = model(after=f"<comp:listOfSubmodels>{inner}</comp:listOfSubmodels>").replace(
        '<sbml xmlns="http://www.sbml.org/sbml/level3/version1/core"',
        '<sbml xmlns="http://www.sbml.org/sbml/level3/version1/core" comp:required="true" '
        'xmlns:comp="http://www.sbml.org/sbml/level3/version1/comp/version1"',
    )
    with pytest.raises(Unsupported, match='the package "comp"'):
        sbml.parse(text)
    assert sbml.parse(re.sub("<comp:listOf.*</comp:listOfSubmodels>", "", text)).species == ("A", "B")


def test_everything_refused_is_told_at_once():
    rules = f"<algebraicRule>{math(ci('k'))}</algebraicRule>"
    with pytest.raises(Unsupported, match=r'(?s)"m" uses what.*the event "push".*algebraic.*"delay"'):
        sbml.parse(model(after=EVENT, rules=rules, reactions=reaction(DELAY)))


def test_all_faults_of_a_model_are_told_at_once():
    bare = A.replace('initialConcentration="3"', "")
    text = model(
        species=bare + B.replace('"1"', '"-1"'),
        parameters='<parameter id="k" constant="true"/>',
        reactions=reaction(times(ci("k"), ci("ghost"))),
    )
    with pytest.raises(DataError) as told:
        sbml.parse(text)
    for part in ('"k" has no value', '"A" has no value', 'uses "ghost"', 'initial value of "B" is -1'):
        assert part in str(told.value)
    assert sbml.parse(text.replace('"-1"', '"1"').replace("ghost", "A"), given={"A", "k"}).initial["A"] == 0.0


def test_compartments_without_a_size_are_told_of():
    text = model(compartments=CELL.replace('size="10" ', ""))
    with pytest.warns(UserWarning, match="compartments without a size have size 1: bath"):
        assert sbml.parse(text).parameters["bath"] == 1.0


def test_what_is_no_sbml_is_refused(tmp_path):
    with pytest.raises(DataError, match="no valid SBML"):
        sbml.parse("<sbml><model")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        sbml.read(tmp_path / "model.xml")


def test_a_missing_libsbml_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libsbml", None)
    with pytest.raises(Unsupported, match=re.escape('pip install "scivi[kinetics]"')):
        sbml.parse(model())
