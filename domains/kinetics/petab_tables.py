"""PEtab 1 problems from their files: the problem, and its measurements as labelled arrays."""

from __future__ import annotations

import os
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
        Unsupported: listing all that is not offered; or petab or python-libsbml is not installed.
    """
    folder, config, name = _opened(path)
    faults: list[str] = []
    tables = {kind: rows_of(folder, config[kind], kind, faults) for kind in NEEDED}
    if faults:
        raise DataError(listed(f'the problem "{name}" cannot be read:', faults))
    if refused := _refused(tables["observable"]):
        raise Unsupported(listed(f'the problem "{name}" needs what is not offered:', refused))
    parameters = tuple(_parameter(row, faults) for row in tables["parameter"])
    conditions = _conditions(tables["condition"], faults)
    everywhere = set.intersection(*map(set, conditions.values())) if conditions else set()
    network = None
    try:
        network = sbml.read(
            os.path.join(folder, config["sbml"]), given={*everywhere, *(p.name for p in parameters)}
        )
    except DataError as error:
        faults.append(str(error))
    kinds, rows, measured = measurements(tables, faults)
    if network is not None:
        problem = Problem(network, parameters, kinds, conditions, rows, name)
        faults += problem.faults()
        if not faults:
            return problem, dataset(problem, measured)
    raise DataError(listed(f'the problem "{name}" cannot be used:', dict.fromkeys(faults)))


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
    except (OSError, ValueError, yaml.yaml.YAMLError) as error:
        raise DataError(f'"{path}" cannot be read: {error}') from None
    name = os.path.splitext(os.path.basename(path))[0]
    if not isinstance(config, dict) or "format_version" not in config:
        raise DataError(f'"{path}" is no PEtab problem: it has no "format_version".')
    version, problems = str(config["format_version"]), config.get("problems", [])
    refused = [] if version.split(".")[0] == "1" else [f"PEtab {version}; version 1 is"]
    if len(problems) != 1:
        refused.append(f"{len(problems)} problems in one file; one is")
    only = problems[0] if problems else {}
    if len(only.get("sbml_files", ())) != 1:
        refused.append(f"{len(only.get('sbml_files', ()))} SBML models; one is")
    refused += [
        f'"{each}"' for each in ("mapping_files", "model_files", "extensions") if {**config, **only}.get(each)
    ]
    if refused:
        raise Unsupported(listed(f'the problem "{name}" needs what is not offered:', refused))
    files = {kind: only.get(f"{kind}_files", []) for kind in ("condition", "observable", "measurement")}
    files["parameter"] = config.get("parameter_file", [])
    listed_files = {k: [v] if isinstance(v, str) else list(v) for k, v in files.items()}
    return os.path.dirname(path), {**listed_files, "sbml": only["sbml_files"][0]}, name


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
