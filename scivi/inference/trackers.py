"""Trackers that many know, as recorders: TensorBoard, MLflow, and a file that Prometheus collects.

TensorBoard and MLflow come with the extra "track". Prometheus needs no package: its text format is a line a
number, and a client library would spare less than its registry costs.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from scivi.errors import PlanError, listed, missing_extra
from scivi.files import write_atomically
from scivi.inference.plan import Plan
from scivi.inference.recorder import Recorder
from scivi.models.template import Template
from scivi.version import version

KNOWN = (
    "tensorboard or tensorboard=FOLDER",
    "mlflow, mlflow=FOLDER or mlflow=ADDRESS (http://..., sqlite:///...)",
    "prometheus or prometheus=FILE.prom",
)
# First characters of the data's hash, in names and labels (our choice: enough to tell data apart).
HASHED = 12
_AT_ONCE = 100  # parameters that MLflow takes in one call
_LONGEST = 500  # characters of a parameter (MLflow takes 6000 at most; more than this nobody reads)


def about(template: Template, source: Any, plan: Plan) -> dict[str, Any]:
    """What a tracker says once of a fit.

    Args:
        template: that is fitted.
        source: its data, opened.
        plan: how.

    Returns:
        template, data (hash of all entries), sizes, version, prior and plan, as plain values.
    """
    told = {"template": template.name, "data": source.fingerprint, "sizes": dict(source.sizes)}
    return {**told, "version": version(), "prior": template.prior_numbers(), "plan": plan.to_dict()}


def tracker(text: str, out: str | Path, about: Mapping[str, Any]) -> Recorder:
    """The recorder that a word names, as in ``scivi fit --track``.

    Args:
        text: "tensorboard", "mlflow" or "prometheus"; after "=", where to, if not into ``out``.
        out: folder of the fit, whose path names the fit.
        about: of the fit, from ``about``.

    Raises:
        PlanError: there is no such tracker; the message lists those that there are.
        Unsupported: its package is not installed.
    """
    word, _, where = text.partition("=")
    if word == "tensorboard":
        return TensorBoard(where or Path(out) / "tensorboard", about)
    if word == "mlflow":
        return MLflow(where or Path(out) / "mlflow", run_name=str(out), about=about)
    if word == "prometheus":
        labels = {"template": about["template"], "data": str(about["data"])[:HASHED]}
        labels |= {"version": about["version"], "fit": str(out)}
        return Prometheus(where or Path(out) / "scivi.prom", labels)
    raise PlanError(listed(f'"{text}" is no tracker; there are:', KNOWN))


class TensorBoard:
    """Every number of an entry as a scalar of TensorBoard, by step.

    What a killed run has written from the step on at which this one begins is hidden by TensorBoard.

    Args:
        folder: of the event files: ``tensorboard --logdir FOLDER``.
        about: shown once as text.

    Raises:
        Unsupported: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any] | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_extra("tensorboard", "track") from None
        self.folder, self.about, self._open = Path(folder), about, SummaryWriter
        self._writer: Any = None

    def write(self, entry: Mapping[str, float]) -> None:
        """Add an entry."""
        step = int(entry["step"])
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=step)
            if self.about is not None:
                told = json.dumps(self.about, indent=1)
                self._writer.add_text("fit", f"```\n{told}\n```", step)
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run of MLflow: sizes, prior and plan as parameters, the rest of what it is about as tags.

    Every number of an entry is a metric, by step.

    Args:
        where: a folder, in which MLflow keeps its database mlflow.db (``mlflow ui --backend-store-uri
            sqlite:///FOLDER/mlflow.db``), or the address of a server or database.
        experiment: whose run it is; made if there is none of this name.
        run_name: None lets MLflow choose one.
        about: told once.

    Raises:
        Unsupported: a package of the extra is not installed.
        PlanError: the address does not answer.

    Notes:
        A fit that is resumed is a run of its own, of the same name. A run that was closed counts as finished,
        however the fit ended. MLflow reports its own use to its makers unless the environment has
        ``DO_NOT_TRACK=true``.
    """

    def __init__(
        self,
        where: str | Path,
        experiment: str = "scivi",
        run_name: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        address, folder = str(where), None
        try:
            if "://" not in address:  # MLflow no longer takes plain files
                import alembic  # noqa: F401  # pyright: ignore[reportMissingImports]
                import sqlalchemy  # noqa: F401  # pyright: ignore[reportMissingImports]

                folder = Path(where).absolute()
                address = f"sqlite:///{folder / 'mlflow.db'}"
            from mlflow.entities import Metric, Param, RunTag  # pyright: ignore[reportMissingImports]
            from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
            from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing_extra(error.name or "mlflow", "track") from None
        self._metric, self._refused = Metric, MlflowException
        kept = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            kept = (folder / "artifacts").as_uri()
        told = dict(about or {})
        tags = [RunTag(f"scivi.{n}", str(v)) for n, v in told.items() if not isinstance(v, Mapping)]
        groups = {n: v for n, v in told.items() if isinstance(v, Mapping)}
        parameters = [Param(name, text[:_LONGEST]) for name, text in _flat(groups)]
        try:
            self._client = MlflowClient(tracking_uri=address)
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment, kept)
            self.run = self._client.create_run(number, run_name=run_name).info.run_id
            self._client.log_batch(self.run, tags=tags)
            for first in range(0, len(parameters), _AT_ONCE):
                self._client.log_batch(self.run, params=parameters[first : first + _AT_ONCE])
        except MlflowException as error:
            raise PlanError(f'MLflow cannot be used at "{address}": {error}') from None

    def write(self, entry: Mapping[str, float]) -> None:
        """Log an entry."""
        now, step = int(time.time() * 1000), int(entry["step"])
        metrics = [self._metric(n, float(v), now, step) for n, v in entry.items() if n != "step"]
        try:
            self._client.log_batch(self.run, metrics=metrics)
        except self._refused as error:
            raise RuntimeError(str(error)) from error

    def close(self) -> None:
        """End the run."""
        try:
            self._client.set_terminated(self.run)
        except self._refused as error:
            raise RuntimeError(str(error)) from error


def _flat(groups: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Names such as plan.steps and plan.stop.window, and values in words."""
    for name, value in groups.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", str(value)


class Prometheus:
    """The latest entry as a file for the textfile collector of Prometheus's node_exporter.

    Put in place whole at each entry, and left behind with ``scivi_running`` 0. That a fit has died shows in
    ``node_textfile_mtime_seconds``, which node_exporter adds.

    Args:
        file: its name must end in .prom; node_exporter collects no others.
        labels: of every number. Files that are collected together must differ in one of them.

    Raises:
        PlanError: file or labels cannot be used; every fault is listed.

    References:
        Prometheus documentation, "Text-based format", version 0.0.4.
    """

    def __init__(self, file: str | Path, labels: Mapping[str, str]) -> None:
        self.file, self.labels = Path(file), {name: str(value) for name, value in labels.items()}
        faults = [
            f'label "{name}": a name has letters, digits and "_", and begins with neither a digit nor "__"'
            for name in labels
            if not re.fullmatch(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", name)
        ]
        faults += [
            f'label "{name}" is given to some numbers already'
            for name in ("site", "device")
            if name in labels
        ]
        if self.file.suffix != ".prom":
            faults.append(f'"{file}": node_exporter collects files whose names end in .prom, and no others')
        if faults:
            raise PlanError(listed("Prometheus cannot be told so:", faults))
        self._entry: Mapping[str, float] = {"step": 0, "wall_s": 0.0}
        self._rate = math.nan

    def write(self, entry: Mapping[str, float]) -> None:
        """Replace the file."""
        seconds = entry["wall_s"] - self._entry["wall_s"]
        self._rate = (entry["step"] - self._entry["step"]) / seconds if seconds > 0 else math.nan
        self._entry = dict(entry)
        self._put(running=True)

    def close(self) -> None:
        """Say that the fit has ended."""
        if self._entry["step"]:
            self._put(running=False)

    def _put(self, running: bool) -> None:
        write_atomically(self.file, exposition(self._families(running), self.labels).encode())

    def _families(self, running: bool) -> Iterator[Family]:
        entry = self._entry
        rate = self._rate if running else 0.0
        yield "scivi_running", "gauge", "1 while the fit runs, 0 once it has ended.", [({}, float(running))]
        yield "scivi_steps_total", "counter", "Steps taken.", [({}, entry["step"])]
        yield "scivi_steps_per_second", "gauge", "Steps per second between the last entries.", [({}, rate)]
        for name, (key, words) in _GAUGES.items():
            if key in entry:
                yield name, "gauge", words, [({}, entry[key])]
        parts = [({"site": k.removeprefix("part_")}, v) for k, v in entry.items() if k.startswith("part_")]
        words = "Share of a site in the bound, nats per row; of a latent, its KL divergence with a minus."
        yield "scivi_part_nats_per_row", "gauge", words, parts
        memory = resident_bytes()
        own = [] if memory is None else [({}, float(memory))]
        yield "scivi_host_memory_bytes", "gauge", "Resident memory of the process.", own
        words = "Memory of a GPU that the process has taken."
        yield "scivi_gpu_memory_bytes", "gauge", words, [*_gpu_memory()]


_GAUGES = {  # by name: key of the entry, and what it is
    "scivi_objective_nats_per_row": ("objective", "Mean negative bound since the entry before."),
    "scivi_gradient_norm": ("grad_norm", "Mean norm of the gradient since the entry before."),
    "scivi_learning_rate": ("lr", "Learning rate."),
    "scivi_loader_share": ("loader_share", "Share of the time that steps waited for their batches."),
}

Family = tuple[str, str, str, list[tuple[dict[str, str], float]]]  # name, type, help; labels and values


def exposition(families: Iterator[Family], labels: Mapping[str, str]) -> str:
    r"""Families of numbers in the text format of Prometheus; one without numbers is left out.

    Args:
        families: name, type, help, and a list of labels of their own and values.
        labels: of all of them.

    Example:
        >>> print(exposition(iter([("a_b", "gauge", "What.", [({}, 0.5)])]), {"fit": 'runs\\"x"'}), end="")
        # HELP a_b What.
        # TYPE a_b gauge
        a_b{fit="runs\\\"x\""} 0.5
    """
    lines = []
    for name, kind, words, values in families:
        if values:
            text = words.replace("\\", "\\\\").replace("\n", "\\n")
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for own, value in values:
            both = ",".join(f'{n}="{_escaped(v)}"' for n, v in {**labels, **own}.items())
            lines.append(f"{name}{{{both}}} {_number(value)}" if both else f"{name} {_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"


def resident_bytes() -> int | None:
    """Memory that this process has now; None where the system does not tell as Linux does."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _gpu_memory() -> Iterator[tuple[dict[str, str], float]]:
    """By GPU what torch has reserved there; of those that this process uses."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for k in range(torch.cuda.device_count()):
            if taken := torch.cuda.memory_reserved(k):
                yield {"device": f"cuda:{k}"}, float(taken)
