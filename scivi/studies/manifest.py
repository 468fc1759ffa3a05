"""A study file becomes a manifest: one row for each fit, under a hash of everything that decides its result.

    seeds = [0, 1, 2]                            # of each fit
    draws = 500

    [resources]                                  # of one fit, for the cluster
    time = "02:00:00"
    memory = "4G"

    [plans.long]                                 # what differs from the template's own plan
    steps = 20000

    [priors.wide]                                # numbers of the prior that differ
    effect_sd = 10.0

    [[fits]]
    template = "domains.astrophysics.photons:template"
    data = "fields/*.nc"
    plans = ["default", "long"]
    priors = ["default", "wide"]

A study holds names and numbers only. Nothing here loads torch, or a template's module.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scivi.catalogue import near
from scivi.errors import PlanError, StudyError, listed
from scivi.files import write_json
from scivi.inference.plan import Plan
from scivi.studies.job import Job
from scivi.version import version

DEFAULT = "default"  # plan and prior as the template has them
_HASHED = 12  # characters of a hash: two of a million fits are alike with a chance of .002


@dataclass(frozen=True)
class Resources:
    """What one fit asks of the cluster.

    Args:
        time: limit, as Slurm writes it: "HH:MM:SS", "D-HH:MM:SS" or minutes.
        memory: such as "4G".
        cpus: cores of a fit, and its threads.
        gpus: 0 for none.
        partition: None for the cluster's own.
        at_once: fits that run at the same time; None for as many as the cluster lets.
        warn_s: seconds before the limit at which a fit is told to save and make room.
        sbatch: further lines of options, such as "--account=name".
        before: shell lines before a fit, such as "module load python".
        python: that runs the fits, if it is another than the one that submits them.
    """

    time: str = "01:00:00"
    memory: str = "4G"
    cpus: int = 1
    gpus: int = 0
    partition: str | None = None
    at_once: int | None = None
    warn_s: int = 90
    sbatch: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    python: str = sys.executable

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Resources:
        """From plain values."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Row:
    """One fit of a study.

    Args:
        id: hash of everything that decides the result, and name of the fit's folder.
        template: as "module:name".
        data: path.
        plan, prior: names of the variants.
        seed: of every random number.
        changes: fields of the plan that differ from the template's own.
        numbers: of the prior, likewise.
        make, dims, columns, select, draws: as in ``Job``.
        data_hash: of the data's content.
    """

    id: str
    template: str
    data: str
    plan: str
    prior: str
    seed: int
    changes: Mapping[str, Any]
    numbers: Mapping[str, Any]
    make: Mapping[str, Any]
    dims: Mapping[str, str]
    columns: Mapping[str, str]
    select: Mapping[str, list[str]]
    draws: int | None
    data_hash: str

    @property
    def job(self) -> Job:
        """What is run."""
        how = {**self.changes, "seed": self.seed}
        shared = {name: getattr(self, name) for name in ("make", "dims", "columns", "select", "draws")}
        return Job(self.template, Path(self.data), how, prior=self.numbers, **shared)

    @property
    def label(self) -> str:
        """The fit in words, as short as can be told from others."""
        name = self.template.rpartition(":")[0].rpartition(".")[2]
        parts = [name, Path(self.data).name, *(x for x in (self.plan, self.prior) if x != DEFAULT)]
        return f"{' '.join(parts)} #{self.seed}"


@dataclass(frozen=True)
class Manifest:
    """A study, expanded.

    Args:
        name: of the study.
        folder: where its file is.
        rows: its fits.
        resources: of each.
        retries: how often a fit is begun again whose machine has failed it.
        report: whether each fit leaves a page and figures.
    """

    name: str
    folder: str
    rows: tuple[Row, ...]
    resources: Resources = field(default_factory=Resources)
    retries: int = 2
    report: bool = True

    def write(self, folder: Path) -> None:
        """Put it into a study's folder."""
        write_json(folder / "study.json", {"version": version(), **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a study's folder.

        Raises:
            StudyError: there is none.
        """
        try:
            told = json.loads((folder / "study.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise StudyError(f'"{folder}" is no folder of a study: it has no study.json.') from None
        except json.JSONDecodeError as error:
            raise StudyError(f'"{folder / "study.json"}" is damaged: {error}.') from None
        rows = tuple(Row(**row) for row in told["rows"])
        asked = Resources.of(told["resources"])
        return cls(told["name"], told["folder"], rows, asked, told["retries"], told["report"])


# what each table of a study file holds
_TOP: dict[str, Any] = {
    **{"name": str, "seeds": list, "draws": int, "retries": int, "report": bool},
    **dict.fromkeys(("resources", "plans", "priors"), dict),
    "fits": list,
}
_OF_FITS: dict[str, Any] = {
    **dict.fromkeys(("template", "data"), (str, list)),
    **dict.fromkeys(("plans", "priors", "seeds"), list),
    **dict.fromkeys(("make", "dims", "columns", "select"), dict),
    "draws": int,
}
_OF_RESOURCES: dict[str, Any] = {
    "time": (str, int),
    **dict.fromkeys(("memory", "partition", "python"), str),
    **dict.fromkeys(("cpus", "gpus", "at_once", "warn_s"), int),
    **dict.fromkeys(("sbatch", "before"), list),
}
_WORDS = {str: "text", int: "a whole number", list: "a list", dict: "a table", bool: "true or false"}
_AT_LEAST_ONE = ("cpus", "at_once", "draws")


def expanded(path: str | Path) -> Manifest:
    """The manifest of a study file.

    Globs of data are relative to the file, and modules of templates are also looked for beside it.

    Raises:
        StudyError: it is no TOML, or cannot be used; every fault is listed.
    """
    path = Path(path).absolute()
    try:
        table = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise StudyError(f'there is no study file "{path}".') from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f'"{path}" is not valid TOML: {error}.') from None
    faults = [*_wrong(table, _TOP, "a study"), *_wrong(table.get("resources"), _OF_RESOURCES, "[resources]")]
    faults += _faults_of_variants(table)
    blocks = table.get("fits")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(b, dict) for b in blocks):
        faults.append("it has no [[fits]], which say what templates are fitted to which data")
        blocks = []
    rows: dict[str, Row] = {}
    for k, block in enumerate(blocks, 1):
        wrong = _faults_of_fits(block, table, path.parent)
        faults += [f"[[fits]] {k}: {fault}" for fault in wrong]
        whole = {"seeds": table.get("seeds", [0]), "draws": table.get("draws"), **block}
        for row in () if wrong or faults else _rows(whole, table, path.parent):
            if row.id in rows and (rows[row.id].plan, rows[row.id].prior) != (row.plan, row.prior):
                faults.append(f'two names for one fit: "{rows[row.id].label}" and "{row.label}"')
            rows[row.id] = row
    if faults:
        raise StudyError(listed(f'the study "{path}" cannot be used:', faults))
    asked = table.get("resources", {})
    asked |= {"time": str(asked["time"])} if "time" in asked else {}
    rest = {name: table[name] for name in ("retries", "report") if name in table}
    name = table.get("name", path.stem)
    return Manifest(name, str(path.parent), tuple(rows.values()), Resources.of(asked), **rest)


def _wrong(table: Any, known: Mapping[str, Any], what: str) -> list[str]:
    """Names that a table does not have, and values of another type."""
    faults = []
    for name, value in (table if isinstance(table, dict) else {}).items():
        if name not in known:
            guess = near(name, known) or f"; it has {', '.join(known)}"
            faults.append(f'{what} has no "{name}"{guess}')
            continue
        kinds = known[name] if isinstance(known[name], tuple) else (known[name],)
        if type(value) not in kinds:  # and not isinstance: true is no number
            words = " or ".join(_WORDS[k] for k in kinds)
            faults.append(f"{what}: {name} = {value!r}; it must be {words}")
        elif type(value) is int and value < (name in _AT_LEAST_ONE):
            faults.append(f"{what}: {name} = {value!r}; that is too few")
    return faults


def _faults_of_variants(table: Mapping[str, Any]) -> list[str]:
    faults = []
    for kind in ("plans", "priors"):
        variants = table.get(kind)
        for name, values in (variants if isinstance(variants, dict) else {}).items():
            if not isinstance(values, dict):
                faults.append(f"[{kind}] {name} = {values!r}; write it as a table, [{kind}.{name}]")
            elif kind == "plans" and "seed" in values:
                faults.append(f"[plans.{name}] has a seed; seeds are an axis of the study of their own")
            elif kind == "plans":
                try:
                    Plan.from_dict(values)
                except (PlanError, TypeError) as error:
                    faults.append(f"[plans.{name}]: {error}")
    return faults


def _faults_of_fits(block: Mapping[str, Any], table: Mapping[str, Any], folder: Path) -> list[str]:
    """What is wrong with one [[fits]]."""
    faults = _wrong(block, _OF_FITS, "it")
    faults += [f'it has no "{name}"' for name in ("template", "data") if name not in block]
    for template in _several(block.get("template", [])):
        if _source_files(template, folder) is None:
            faults.append(f'template "{template}": write it as module:name, of a module that can be found')
    for pattern in _several(block.get("data", [])):
        if not isinstance(pattern, str) or not _matching(pattern, folder):
            faults.append(f'data "{pattern}": no file of that name')
    for kind in ("plans", "priors"):
        known = table.get(kind)
        for name in _several(block.get(kind, [])):
            if name != DEFAULT and not (isinstance(known, dict) and name in known):
                faults.append(f"there is no [{kind}.{name}]")
    seeds = block.get("seeds", table.get("seeds", [0]))
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        faults.append(f"seeds = {seeds}; they must be whole numbers of at least 0")
    return faults


def _rows(block: Mapping[str, Any], table: Mapping[str, Any], folder: Path) -> Iterator[Row]:
    """Every fit that one [[fits]] asks for."""
    paths = sorted({path for pattern in _several(block["data"]) for path in _matching(pattern, folder)})
    hashes = {path: _hash_of_data(Path(path)) for path in paths}
    plans, priors = (block.get(kind, [DEFAULT]) for kind in ("plans", "priors"))
    seeds: list[int] = block["seeds"]
    shared = {name: block.get(name, {}) for name in ("make", "dims", "columns", "select")}
    shared["draws"] = block.get("draws")
    for template in _several(block["template"]):
        code = _hash_of_files(_source_files(template, folder) or [])
        for (path, plan, prior), seed in itertools.product(itertools.product(paths, plans, priors), seeds):
            changes = table.get("plans", {}).get(plan, {})
            numbers = table.get("priors", {}).get(prior, {})
            decides = [version(), template, code, hashes[path], seed, changes, numbers, shared]
            found = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
            own = found[:_HASHED], template, path, plan, prior, seed, changes, numbers
            yield Row(*own, **shared, data_hash=hashes[path])


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matching(pattern: str, folder: Path) -> list[str]:
    """Paths of a glob, absolute."""
    return glob.glob(str(folder / pattern), recursive=True)


def _source_files(template: Any, folder: Path) -> list[Path] | None:
    """The source of a template's module, and of its neighbours in a package; None if it cannot be found."""
    if not isinstance(template, str) or not all(template.partition(":")):
        return None
    module = template.partition(":")[0]
    beside = folder.joinpath(*module.split(".")).with_suffix(".py")
    try:
        spec = None if beside.exists() else importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    file = beside if beside.exists() else Path(spec.origin) if spec is not None and spec.origin else None
    if file is None or not file.exists():
        return None
    return sorted(file.parent.glob("*.py")) if (file.parent / "__init__.py").exists() else [file]


def _hash_of_data(path: Path) -> str:
    """Of a file, or of all files of a folder (zarr)."""
    return _hash_of_files(sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])


def _hash_of_files(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        if len(paths) > 1:
            found.update(path.name.encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: found)
    return found.hexdigest()[:16]
