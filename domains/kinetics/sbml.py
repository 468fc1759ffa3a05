"""SBML models as networks. What a network cannot say is refused by name, all at once.

A species is what its symbol means in formulas: a concentration, or an amount where ``hasOnlySubstanceUnits``
is set. Compartments become parameters of constant size. Units and constraints are not looked at.

References:
    Hucka et al. 2019, The Systems Biology Markup Language, Level 3 Version 2 Core, doi 10.1515/jib-2019-0021.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from os import PathLike, fspath
from typing import Any

from domains.kinetics.networks import Network, Reaction, Value
from domains.kinetics.sbml_formulas import Writer
from scivi.errors import DataError, Unsupported, listed, missing_extra

_IDLE = {"layout", "render", "groups", "fbc", "l3v2extendedmath"}  # packages that add no equations


def read(path: str | PathLike[str], *, given: Collection[str] = ()) -> Network:
    """The network of an SBML file, as ``parse`` makes it.

    Raises:
        DataError: the file cannot be read, or the model is faulty; every fault is listed.
        Unsupported: it uses what a network has not, all listed; or python-libsbml is not installed.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read(), given=given)
    except OSError as error:
        raise DataError(f'"{fspath(path)}" cannot be read: {error.strerror}.') from None
    except UnicodeDecodeError as error:
        raise DataError(f'"{fspath(path)}" is no text in UTF-8: {error}.') from None


def parse(text: str, *, given: Collection[str] = ()) -> Network:
    """The network of an SBML model, Level 2 or 3.

    A species that nothing changes, or that is a boundary condition without a rule, becomes a parameter.

    Args:
        text: XML.
        given: names of parameters, species and compartments that get their values from elsewhere: they may
            lack one, and are 0 till then.

    Raises:
        DataError: listing every fault of the model.
        Unsupported: listing all that a network has not, and what is wrong besides; or python-libsbml is not
            installed.
    """
    try:
        import libsbml
    except ImportError:
        raise missing_extra("python-libsbml", "kinetics") from None
    document = libsbml.readSBMLFromString(text)
    problems = [document.getError(k) for k in range(document.getNumErrors())]
    faults = [
        f"line {each.getLine()}: {each.getMessage().strip()}"
        for each in problems
        if each.getSeverity() >= libsbml.LIBSBML_SEV_ERROR
        and each.getErrorId() != libsbml.MissingXMLEncoding  # which XML lets be missing: it is UTF-8 then
    ]
    model = document.getModel()
    if faults or model is None:
        raise DataError(listed("this is no valid SBML:", faults or ["there is no model"]))
    return _Reader(libsbml, document, model).network(given)


class _Reader:
    """The parts of one model, as they are taken over into a network."""

    def __init__(self, libsbml: Any, document: Any, model: Any) -> None:
        self.document, self.model = document, model
        self.writer = Writer(libsbml, model)
        self.locals = {
            new: local
            for reaction in model.getListOfReactions()
            for local, new in zip(_locals(reaction), self._renamed(reaction).values(), strict=True)
        }
        self.rates = {r.getId(): self._rate(r) for r in model.getListOfReactions()}
        self.changes = {r.getId(): self._change(r) for r in model.getListOfReactions()}
        self.changed = {species for change in self.changes.values() for species in change}
        rules = [each for each in model.getListOfRules() if each.getMath() is not None]
        self.assigned = {r.getVariable(): self._write(r.getMath()) for r in rules if r.isAssignment()}
        self.slopes = {r.getVariable(): self._write(r.getMath()) for r in rules if r.isRate()}
        starts = [each for each in model.getListOfInitialAssignments() if each.getMath() is not None]
        self.starts = {each.getSymbol(): self._write(each.getMath()) for each in starts}
        self.species = {each.getId(): each for each in model.getListOfSpecies()}
        self.compartments = {each.getId(): each for each in model.getListOfCompartments()}
        self.parameters = {each.getId(): each for each in model.getListOfParameters()}

    def network(self, given: Collection[str]) -> Network:
        refused = [*_refused(self.document, self.model), *self._refused_names(), *self.writer.refused]
        faults = [*_repeated(self.model), *self._homeless()]
        found = None
        if not faults:
            found, lacking = self._made(given)
            twice = self._twice_ruled()
            told = [f'"{name}"' for name in twice] + (["finite number", "no species"] if refused else [])
            faults = [f'"{name}" has no value' for name in lacking] + [*twice.values()]
            faults += [each for each in found.faults() if not any(name in each for name in told)]
        name = self.model.getId() or "network"
        if refused:
            also = [f"besides, this is wrong: {each}" for each in faults]
            what = [*dict.fromkeys(refused), *also]
            raise Unsupported(listed(f'"{name}" uses what a network has not:', what))
        if faults or found is None:
            raise DataError(listed(f'the model "{name}" cannot be used:', faults))
        return found

    def _made(self, given: Collection[str]) -> tuple[Network, list[str]]:
        """The network, and the names that lack a value."""
        states = [s for s in self.species if s in self.changed or s in self.slopes]
        states += [p for p in self.parameters if p in self.slopes]
        dense = [s for s in states if s in self.changed and self._is_concentration(self.species[s])]
        free = [n for n in (*self.compartments, *self.parameters, *self.species) if n not in self.assigned]
        values = {name: self._value(name) for name in (*free, *self.locals)}
        lacking = [n for n, v in values.items() if v is None and n not in given]
        unsized = [name for name in lacking if name in self.compartments]
        if unsized:
            warnings.warn(f"compartments without a size have size 1: {', '.join(unsized)}", stacklevel=5)
        known = {n: float(n in unsized) if v is None else v for n, v in values.items()}
        made = [Reaction(name, change, self.rates[name]) for name, change in self.changes.items()]
        made += [Reaction(f"d{name}/dt", {name: 1.0}, slope) for name, slope in self.slopes.items()]
        found = Network(
            species=tuple(states),
            reactions=tuple(made),
            parameters={n: v for n, v in known.items() if n not in states},
            initial={n: known[n] for n in states if n in known},
            assignments=self.assigned,
            volumes={s: self.species[s].getCompartment() for s in dense},
            signed=tuple(p for p in self.parameters if p in self.slopes),
            held=tuple(s for s in self.species if s in known and s not in states),
            name=self.model.getId() or "network",
        )
        return found, [name for name in lacking if name not in unsized]

    def _homeless(self) -> Iterable[str]:
        """Species in compartments that are not there."""
        for name, species in self.species.items():
            if (home := species.getCompartment()) not in self.compartments:
                yield f'species "{name}" is in the compartment "{home}", which is not there'

    def _twice_ruled(self) -> dict[str, str]:
        """What several things decide on: the fault of each name."""
        ruled = [rule.getVariable() for rule in self.model.getListOfRules() if not rule.isAlgebraic()]
        found = {name: f'"{name}" has {n} rules' for name, n in Counter(ruled).items() if n > 1}
        both = [name for name in ruled if name in self.changed]
        return found | {name: f'"{name}" has a rule, and reactions change it as well' for name in both}

    def _value(self, name: str) -> Value | None:
        """What a name starts from; None if the model does not say."""
        if name in self.starts:
            return self.starts[name]
        if name in self.compartments:
            size = self.compartments[name]
            return float(size.getSize()) if size.isSetSize() and math.isfinite(size.getSize()) else None
        if name in self.species:
            return self._initial(self.species[name])
        found = {**self.parameters, **self.locals}[name]
        return float(found.getValue()) if found.isSetValue() and math.isfinite(found.getValue()) else None

    def _initial(self, species: Any) -> Value | None:
        volume = species.getCompartment()
        amount = float(species.getInitialAmount()) if species.isSetInitialAmount() else math.nan
        level = float(species.getInitialConcentration()) if species.isSetInitialConcentration() else math.nan
        dense = self._is_concentration(species)
        own, other = (level, amount) if dense else (amount, level)
        if math.isfinite(own) or other == 0:
            return own if math.isfinite(own) else 0.0
        if not math.isfinite(other):
            return None
        return f"{other!r} {'/' if dense else '*'} {volume}"

    def _is_concentration(self, species: Any) -> bool:
        point = self.compartments[species.getCompartment()].getSpatialDimensionsAsDouble() == 0
        return not species.getHasOnlySubstanceUnits() and not point

    def _change(self, reaction: Any) -> dict[str, float]:
        """Of species that it may change."""
        found: dict[str, float] = {}
        for sign, references in ((-1, reaction.getListOfReactants()), (1, reaction.getListOfProducts())):
            for reference in references:
                name, species = reference.getSpecies(), self.model.getSpecies(reference.getSpecies())
                if species is None or not (species.getBoundaryCondition() or species.getConstant()):
                    found[name] = found.get(name, 0.0) + sign * reference.getStoichiometry()
        return {name: by for name, by in found.items() if by}

    def _renamed(self, reaction: Any) -> dict[str, str]:
        """Names of parameters of one reaction alone, made such that no others have them."""
        new = {}
        for local in _locals(reaction):
            name = f"{reaction.getId()}_{local.getId()}"
            while self.model.getElementBySId(name) is not None:
                name += "_"
            new[local.getId()] = name
        return new

    def _rate(self, reaction: Any) -> str:
        law = reaction.getKineticLaw()
        return "0" if law is None else self.writer.write(law.getMath(), self._renamed(reaction))

    def _write(self, node: Any) -> str:
        """A formula in which the name of a reaction is its rate."""
        return self.writer.write(node, {name: f"({rate})" for name, rate in self.rates.items()})

    def _refused_names(self) -> Iterable[str]:
        for name in {**self.assigned, **self.slopes}:
            if name in self.compartments:
                yield f'the size of compartment "{name}", which changes'
            elif name not in {**self.species, **self.parameters}:
                yield f'a rule for "{name}"'
        for name in self.starts:
            if name not in {**self.species, **self.parameters, **self.compartments}:
                yield f'an initial assignment of "{name}"'


def _locals(reaction: Any) -> list[Any]:
    law = reaction.getKineticLaw()
    both = () if law is None else (*law.getListOfParameters(), *law.getListOfLocalParameters())
    return list({each.getId(): each for each in both}.values())  # Level 3 gives them by either name


def _repeated(model: Any) -> Iterable[str]:
    """Names that more than one thing has."""
    kinds = {
        "species": model.getListOfSpecies(),
        "parameter": model.getListOfParameters(),
        "compartment": model.getListOfCompartments(),
        "reaction": model.getListOfReactions(),
        "function": model.getListOfFunctionDefinitions(),
    }
    held: dict[str, list[str]] = {}
    for kind, found in kinds.items():
        for each in found:
            held.setdefault(each.getId(), []).append(kind)
    for name, named in held.items():
        if len(named) > 1:
            yield f'"{name}" is the name of several: {", ".join(named)}'


def _refused(document: Any, model: Any) -> Iterable[str]:
    """Features of a model that a network has not."""
    for k in range(document.getNumPlugins()):
        package = document.getPlugin(k).getPackageName()
        parts = model.getPlugin("comp")
        if package not in _IDLE and not (package == "comp" and parts and not parts.getNumSubmodels()):
            yield f'the package "{package}"'
    for k in range(document.getNumUnknownPackages()):
        yield f'the package "{document.getUnknownPackagePrefix(k)}"'
    for event in model.getListOfEvents():
        yield f'the event "{event.getId() or event.getName() or "without a name"}"'
    for rule in model.getListOfRules():
        if rule.isAlgebraic():
            yield "an algebraic rule"
    if model.isSetConversionFactor():
        yield f'the conversion factor "{model.getConversionFactor()}"'
    for species in model.getListOfSpecies():
        if species.isSetConversionFactor():
            yield f'the conversion factor of "{species.getId()}"'
    for reaction in model.getListOfReactions():
        name = reaction.getId()
        if reaction.isSetFast() and reaction.getFast():
            yield f'the fast reaction "{name}"'
        if reaction.getKineticLaw() is None or reaction.getKineticLaw().getMath() is None:
            yield f'the reaction "{name}", which has no kinetic law'
        for reference in [*reaction.getListOfReactants(), *reaction.getListOfProducts()]:
            if reference.isSetStoichiometryMath():
                yield f'the stoichiometry of "{reference.getSpecies()}" in "{name}", which is a formula'
            elif not math.isfinite(reference.getStoichiometry()):
                yield f'the stoichiometry of "{reference.getSpecies()}" in "{name}", which is not given'
