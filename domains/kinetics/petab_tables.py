"""PEtab 1 problems from their files: the problem, and its measurements as labelled arrays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import xarray as xr

from domains.kinetics import sbml
from domains.kinetics.networks import Value
from domains.kinetics.petab_cells import NEEDED, Row, as_value, is_empty, number, rows_of
from domains.kinetics.petab_measurements import dataset, measurements
from domains.kinetics.petab_problems import DISTRIBUTIONS, SCALES, Parameter, Problem
from scivi.errors import DataError, Unsupported, listed, missing_extra


def read(path: str | os.PathLike[str]) -> tuple[Problem, xr.Dataset]:
    """A PEtab problem and its measurements.

    Args:
        path: of the YAML file, or of a folder with one.

    Returns:
        The problem, and a data set of ``measured`` (condition, moment, observable), NaN where nothing was
        measured, and ``time`` (condition, moment). Times are in order and may be infinite, which is the
        steady state; repeated measurements are further moments of the same time; conditions with fewer
        moments than others repeat their last time. If measurements bring numbers of their own for scales or
        noise, they are ``override`` (condition, moment, observable, slot), 1 where nothing was measured.

    Raises:
        DataError: listing every fault of every table and of the model.
        Unsupported: listing all that is not offered, and what is wrong besides; or petab or python-libsbml is
            not installed.

    Warns:
        UserWarning: nominal values of estimated parameters are outside of their bounds.
    """
    folder, config, name = _opened(path)
    wrong: dict[str, list[str]] = {kind: [] for kind in NEEDED}
    tables = {kind: rows_of(folder, config[kind], kind, wrong[kind]) for kind in NEEDED}
    faults = [fault for each in wrong.values() for fault in each]
    whole = not faults
    refused = _refused(tables["observable"]) if not wrong["observable"] else []
    parameters = tuple(_parameter(row, faults) for row in tables["parameter"]) if whole else ()
    conditions = _conditions(tables["condition"], faults) if whole else {}
    everywhere = set.intersection(*map(set, conditions.values())) if conditions else set()
    model = os.path.join(folder, config["sbml"])
    network = None
    try:
        network = sbml.read(model, given={*everywhere, *(p.name for p in parameters)})
    except Unsupported as error:
        refused.append(_within(config["sbml"], error))
    except DataError as error:
        if whole or not os.path.isfile(model):  # else values may be missing that the tables give
            faults.append(_within(config["sbml"], error))
    if whole and not any(each.is_estimated for each in parameters):
        faults.append("no parameter is estimated")
    if whole:
        kinds, rows, measured = measurements(tables, faults)
        if network is not None:
            problem = Problem(network, parameters, kinds, conditions, rows, name)
            faults += problem.faults()
            if not (faults or refused):
                _warn_of_nominal_values(problem)
                return problem, dataset(problem, measured)
    faults = list(dict.fromkeys(faults))
    if refused:
        also = [f"besides, this is wrong: {fault}" for fault in faults]
        raise Unsupported(listed(f'the problem "{name}" needs what is not offered:', [*refused, *also]))
    raise DataError(listed(f'the problem "{name}" cannot be used:', faults))


def _within(name: str, error: Exception) -> str:
    """An error of one file, further in."""
    told = str(error).replace("\n", "\n  ")
    return told if name in told.partition("\n")[0] else f"{name}: {told}"


def _warn_of_nominal_values(problem: Problem) -> None:
    """Of estimated parameters: outside of the bounds they may be of another unit than these."""
    outside = [
        f"{each.name} ({each.nominal:g})"
        for each in problem.estimated
        if each.nominal is not None and not each.lower <= each.nominal <= each.upper  # type: ignore[operator]
    ]
    if outside:
        told = f"{len(outside)} nominal values are outside of the bounds; a fit does not use them"
        warnings.warn(f"{problem.name}: {told}: {', '.join(outside)}", stacklevel=3)


def _opened(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any], str]:
    """The folder of a problem, the files of each kind of table, and the problem's name."""
    try:
        from petab.v1 import yaml
    except ImportError:
        raise missing_extra("petab", "kinetics") from None
    path = os.fspath(path)
    if os.path.isdir(path):
        found = sorted(each for each in os.listdir(path) if each.endswith((".yaml", ".yml")))
        if len(found) != 1:
            raise DataError(
                f'"{path}" holds {len(found)} YAML files; give the path of the one that is meant.'
            )
        path = os.path.join(path, found[0])
    try:
        config = yaml.load_yaml(path)
    except OSError as error:
        raise DataError(f'"{path}" cannot be read: {error.strerror}.') from None
    except (ValueError, yaml.yaml.YAMLError) as error:
        raise DataError(f'"{path}" cannot be read as YAML: {error}') from None
    name = os.path.splitext(os.path.basename(path))[0]
    if not isinstance(config, dict) or "format_version" not in config:
        raise DataError(f'"{path}" is no PEtab problem: it has no "format_version".')
    version, problems = str(config["format_version"]), config.get("problems")
    refused = [] if version.split(".")[0] == "1" else [f"PEtab {version}; version 1 is"]
    faults: list[str] = []
    if not isinstance(problems, list) or not all(isinstance(each, dict) for each in problems):
        if not refused:  # version 2 has no such list
            faults.append(f'"problems" is {problems!r}; it must be a list of what the problem consists of')
        problems = []
    elif len(problems) != 1:
        refused.append(f"{len(problems)} problems in one file; one is")
    only = problems[0] if problems else {}
    files = {
        kind: _files(only, f"{kind}_files", faults) for kind in ("condition", "observable", "measurement")
    }
    files["parameter"] = _files(config, "parameter_file", faults)
    models = _files(only, "sbml_files", faults)
    if only and len(models) != 1:
        refused.append(f"{len(models)} SBML models; one is")
    refused += [
        f'"{each}"' for each in ("mapping_files", "model_files", "extensions") if {**config, **only}.get(each)
    ]
    if refused:
        raise Unsupported(listed(f'the problem "{name}" needs what is not offered:', [*refused, *faults]))
    if faults:
        raise DataError(listed(f'the problem "{name}" cannot be read:', faults))
    return os.path.dirname(path), {**files, "sbml": models[0]}, name


def _files(table: dict[str, Any], key: str, faults: list[str]) -> list[str]:
    """Names of files, of which there may be one or several."""
    found = table.get(key) or []
    names = [found] if isinstance(found, str) else found
    if isinstance(names, list) and all(isinstance(each, str) for each in names):
        return names
    faults.append(f'"{key}" is {found!r}; it must be the name of a file, or a list of such')
    return []


def _parameter(row: Row, faults: list[str]) -> Parameter:
    prior = "" if is_empty(row.get("objectivePriorType", "")) else row["objectivePriorType"]
    text = row.get("objectivePriorParameters", "")
    numbers = [] if is_empty(text) else [as_value(each) for each in text.split(";") if each.strip()]
    if any(isinstance(each, str) for each in numbers):
        faults.append(f'{row[""]}: objectivePriorParameters are "{text}", which are no numbers')
        numbers = []
    flag = number(row, "estimate", faults)
    if flag not in (0, 1):
        faults.append(f'{row[""]}: estimate is "{row["estimate"]}"; it must be 0 or 1')
    return Parameter(
        name=row["parameterId"],
        scale=row.get("parameterScale") or "lin",
        lower=number(row, "lowerBound", faults),
        upper=number(row, "upperBound", faults),
        nominal=number(row, "nominalValue", faults),
        is_estimated=flag != 0,
        prior=prior,
        prior_parameters=tuple(float(each) for each in numbers),
    )


def _conditions(rows: Sequence[Row], faults: list[str]) -> dict[str, dict[str, Value]]:
    found: dict[str, dict[str, Value]] = {}
    for row in rows:
        if row["conditionId"] in found:
            faults.append(f'{row[""]}: there is a condition "{row["conditionId"]}" already')
        cells = {name: text for name, text in row.items() if name not in {"", "conditionId", "conditionName"}}
        found[row["conditionId"]] = {k: as_value(text) for k, text in cells.items() if not is_empty(text)}
    return found


def _refused(rows: Sequence[Row]) -> list[str]:
    found = []
    for row in rows:
        for column, allowed in (("observableTransformation", SCALES), ("noiseDistribution", DISTRIBUTIONS)):
            text = row.get(column, "")
            if not is_empty(text) and text not in allowed:
                found.append(f'{column} "{text}" of "{row["observableId"]}"; there are {", ".join(allowed)}')
    return found
