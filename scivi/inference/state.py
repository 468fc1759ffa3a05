"""``State`` of a running fit, ``Fit`` of a finished one; atomic save, exact resume, provenance.

Longer than 400 lines because the files of running and of finished fits are written and read in one way.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from scivi.errors import CheckpointError, TemplateError, listed
from scivi.files import sweep, write_atomically
from scivi.inference import showing
from scivi.inference.plan import Plan
from scivi.inference.scores import quiet
from scivi.inference.team import Team
from scivi.inputs.batches import Batch, some_field
from scivi.inputs.features import Basis, Features
from scivi.inputs.feed import Feed
from scivi.models.binding import Bound, bind, stream_seed
from scivi.models.mixtures import AdaptedGuide
from scivi.models.named import import_template, is_as_made, made_again, reference_of
from scivi.models.template import Template
from scivi.version import version

FORMAT = 1  # of saved fits and checkpoints
_OF_A_BASIS = ("mean", "scale", "directions")


@dataclass
class State:
    """A running fit: mutable, private to it, and all that is needed to go on.

    Args:
        bound: pair with the parameters that are being learnt.
        optimiser: torch's.
        feed: of minibatches.
        random: state of torch's generator for the sampling stream.
        step: steps taken.
        window: sums since the last entry of the history, on the device.
        history: entries, oldest first.
        lr_factor: product of the halvings after divergences.
        restarts: what happened at each divergence.
        decay_from, decay_steps: the final fall of the learning rate, once the stop rule has begun it.
        wall_s: seconds spent, over all runs.
        finish: what the start and the finish of the globals found.
        stopped: why the fit ended; empty while it runs.
        engine: how steps are taken, and why so; of this run, not of the checkpoint.
        good: what ``pack`` told at the last entry of the history, to which a divergence goes back.
        team: the processes that take its steps together.
    """

    bound: Bound
    optimiser: torch.optim.Optimizer
    feed: Feed
    random: Tensor
    step: int = 0
    window: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    lr_factor: float = 1.0
    restarts: list[dict[str, Any]] = field(default_factory=list)
    decay_from: int | None = None
    decay_steps: int | None = None
    wall_s: float = 0.0
    finish: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    good: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    team: Team = field(default_factory=Team)

    _PLAIN = (
        "step",
        "history",
        "lr_factor",
        "restarts",
        "decay_from",
        "decay_steps",
        "wall_s",
        "finish",
        "stopped",
    )

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return any(p.requires_grad for p in self.bound.nets.parameters())

    @property
    def device(self) -> torch.device:
        """Where steps are taken."""
        return some_field(self.bound.example).device

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Run on the state's own random stream; the process's is put back afterwards."""
        device = self.device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), quiet():
            if cuda:
                torch.cuda.set_rng_state(self.random, device)
            else:
                torch.set_rng_state(self.random)
            yield
            self.random = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as named tensors (copies) and plain values."""
        tensors = {f"nets.{k}": v.detach().clone() for k, v in self.bound.nets.state_dict().items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            for name, value in slots.items():
                tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value).detach().clone()
        tensors |= {f"window.{k}": v.detach().clone() for k, v in self.window.items()}
        tensors["random"] = self.random.clone()
        plain = {name: getattr(self, name) for name in self._PLAIN}
        plain |= {"cursor": self.feed.state(), "rows_per_batch": self.feed.rows_per_batch}
        return tensors, json.loads(json.dumps(plain))

    def unpack(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Become what ``pack`` described."""
        some = next(self.bound.nets.parameters(), torch.zeros(()))
        self.bound.nets.load_state_dict(_under(tensors, "nets."))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "optimiser.").items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value.clone()
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": slots, "param_groups": groups})
        self.window = {k: v.to(some.device).clone() for k, v in _under(tensors, "window.").items()}
        self.random = tensors["random"].clone()
        for name in self._PLAIN:
            setattr(self, name, json.loads(json.dumps(plain[name])))
        self.feed.rows_per_batch = plain["rows_per_batch"]
        self.feed.restore(plain["cursor"])


@dataclass(frozen=True, eq=False)
class Fit:
    """A finished fit: a value that owns its parameters.

    Args:
        bound: model and guide with their learnt parameters, gradients off.
        coords: labels of the dims that are not rows.
        plan: how it was fitted.
        history: dataset over "log": step, objective and the rest.
        provenance: template, prior numbers, data, versions, and how the fit ended.
        seen: smallest and largest value of each field along the rows, by ``<field>.min`` and ``<field>.max``.
        features: a few numbers of some rows, beside which ``analysis.drift`` puts those of others; None of a
            fit that was saved before there were any.
        population: weighted draws of what few rows share, (draw, D), on the guide's unbounded scale; their
            log weights are in the provenance. None where the fit has not ended so.
    """

    bound: Bound
    coords: Mapping[str, list[Any]]
    plan: Plan
    history: xr.Dataset
    provenance: Mapping[str, Any]
    seen: Mapping[str, Tensor]
    features: Features | None = None
    population: Tensor | None = None

    @property
    def template(self) -> Template:
        """What was fitted."""
        return self.bound.template

    @property
    def nets(self) -> nn.Module:
        """All learnt numbers, in one module."""
        return self.bound.nets

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every dim of the data of the fit."""
        return self.bound.example.sizes

    def __repr__(self) -> str:
        ended, objective = self.provenance["fit"], self.history.get("objective")
        value = ""
        if objective is not None and len(objective):
            value = f", objective {float(objective[-1]):.6g} nats per row"
        steps = f"{ended['steps']} steps, stopped by {ended['stopped']}"
        return f'Fit of "{self.template.name}" to {dict(self.sizes)}: {steps}{value}'

    def _repr_html_(self) -> str:
        return showing.page(self)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "scivi": version(),
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def save_state(state: State, path: str | Path, identity: Mapping[str, Any]) -> None:
    """Write a checkpoint: one file, put in place whole.

    Between two entries of the history it holds the state twice: as it is, to lose no step, and as it was at
    the last entry, so that a later divergence goes back as far as in a fit that was never stopped.

    Args:
        state: of the running fit.
        path: of the file.
        identity: what a resumed fit must share (template, prior, plan, data).
    """
    tensors, plain = state.pack()
    header = {"format": str(FORMAT), "plain": json.dumps(plain), "identity": json.dumps(identity)}
    if state.window and state.good is not None:
        tensors |= {f"good.{name}": value for name, value in state.good[0].items()}
        header["good"] = json.dumps(state.good[1])
    write_atomically(Path(path), to_bytes({k: v.contiguous() for k, v in tensors.items()}, header))


def load_state(state: State, path: str | Path, identity: Mapping[str, Any]) -> None:
    """Take up a checkpoint.

    Raises:
        CheckpointError: it is damaged, or belongs to another template, plan or data; the message lists what
            differs.
    """
    tensors, header = _read_tensors(Path(path))
    if header.get("format") != str(FORMAT):
        raise CheckpointError(f'"{path}" has format {header.get("format")}; this version reads {FORMAT}.')
    theirs, ours = json.loads(header["identity"]), json.loads(json.dumps(dict(identity)))
    different = [
        f"{k}: there {theirs.get(k)!r}, here {ours.get(k)!r}"
        for k in sorted({*theirs, *ours})
        if theirs.get(k) != ours.get(k)
    ]
    if different:
        raise CheckpointError(
            listed(
                f'"{path}" belongs to another fit; resume with what it was begun with, or remove it:',
                different,
            )
        )
    state.unpack(tensors, json.loads(header["plain"]))
    if "good" in header:
        state.good = (_under(tensors, "good."), json.loads(header["good"]))
    if state.stopped == "signal":  # it was asked to stop, and is now asked to go on
        state.stopped = ""


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise CheckpointError(f'there is no file "{path}".')
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'"{path}" cannot be read as safetensors: {error}.') from None


def save(fit: Fit, directory: str | Path) -> Path:
    """Write a fit: ``fit.json``, tensors in safetensors, ``history.nc``. No code is stored.

    ``fit.json`` names its tensors by their content and is written last, so that a reader meets the old fit or
    the new.

    Args:
        fit: what to write.
        directory: made if absent.

    Returns:
        The directory.
    """
    directory = Path(directory)
    example = fit.bound.example
    groups = {"nets": fit.nets.state_dict(), "example": example.values, "mask": example.observed_mask}
    groups |= {"index": example.index, "seen": fit.seen, "features": _packed(fit.features)}
    tensors = {f"{group}.{k}": v for group, named in groups.items() for k, v in named.items()}
    tensors |= {} if fit.population is None else {"population": fit.population}
    content = to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    name = f"tensors-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    made = fit.template.made if is_as_made(fit.template) else None  # a part may have been replaced since
    meta = {
        "format": FORMAT,
        "tensors": name,
        "template": fit.template.name,
        "made": made and [made[0], dict(made[1])],
        "reference": None if made else reference_of(fit.template),
        "prior": fit.template.prior_numbers(),
        "plan": fit.plan.to_dict(),
        "sizes": dict(fit.sizes),
        "coords": {k: list(v) for k, v in fit.coords.items()},
        "provenance": dict(fit.provenance),
    }
    if fit.features is not None:
        meta["features"] = {"names": list(fit.features.names), "constants": list(fit.features.constants)}
    write_atomically(directory / name, content)
    write_atomically(directory / "history.nc", bytes(fit.history.to_netcdf(engine="h5netcdf")))
    write_atomically(directory / "fit.json", json.dumps(meta, indent=1).encode())
    for old in directory.glob("tensors-*.safetensors"):
        if old.name != name:
            old.unlink()
    sweep(directory, "tensors-*.safetensors")  # their name is their content's: the next write has another
    return directory


def load(directory: str | Path, template: Template | None = None) -> Fit:
    """Read a fit that ``save`` wrote.

    Args:
        directory: of the fit.
        template: the template, if it can be neither imported by the name under which it was saved nor made
            again (a notebook's own).

    Raises:
        CheckpointError: nothing or something damaged is there; the template has changed since.
        TemplateError: the template cannot be imported.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / "fit.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f'there is no fit in "{directory}": it has no fit.json.') from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f'"{directory / "fit.json"}" is damaged: {error}.') from None
    if meta["format"] != FORMAT:
        raise CheckpointError(f'"{directory}" has format {meta["format"]}; this version reads {FORMAT}.')
    if template is None and meta.get("made"):
        template = made_again(*meta["made"])
    if template is None:
        if meta["reference"] is None:
            raise CheckpointError(
                f'the template "{meta["template"]}" was not importable when "{directory}" was saved; pass '
                f"it: load(directory, template)."
            )
        template = import_template(meta["reference"])
    numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["prior"].items()}
    template = replace(template, prior=type(template.prior)(**numbers))
    tensors, _ = _read_tensors(directory / meta["tensors"])
    plan = Plan.from_dict(meta["plan"])
    values, masks, index = (_under(tensors, f"{group}.") for group in ("example", "mask", "index"))
    bound = bind(template, Batch(values, masks, meta["sizes"], template.row_dims, index), plan.seed)
    try:
        bound.nets.load_state_dict(_under(tensors, "nets."))
    except RuntimeError as error:
        raise CheckpointError(
            f'"{directory}" does not fit template "{template.name}" as it is now: {error}'
        ) from None
    history = xr.load_dataset(directory / "history.nc", engine="h5netcdf")
    seen, features = _under(tensors, "seen."), _unpacked(_under(tensors, "features."), meta.get("features"))
    population = tensors.get("population")
    return Fit(freeze(bound), meta["coords"], plan, history, meta["provenance"], seen, features, population)


def _packed(features: Features | None) -> dict[str, Tensor]:
    """Numbers of features as named tensors."""
    if features is None:
        return {}
    found = {"values": features.values, "constants": np.array(list(features.constants.values()), float)}
    for name, basis in features.bases.items():
        found |= {f"{name}.{part}": getattr(basis, part) for part in _OF_A_BASIS}
    return {name: torch.from_numpy(np.asarray(value, order="C")) for name, value in found.items()}


def _unpacked(tensors: Mapping[str, Tensor], named: Mapping[str, list[str]] | None) -> Features | None:
    """What ``_packed`` was given; None of a fit without features."""
    if named is None:
        return None
    arrays = {name: value.numpy() for name, value in tensors.items()}
    constants = dict(zip(named["constants"], arrays["constants"].tolist(), strict=True))
    wide = sorted({name.split(".")[0] for name in arrays if "." in name})
    bases = {name: Basis(*(arrays[f"{name}.{part}"] for part in _OF_A_BASIS)) for name in wide}
    return Features(tuple(named["names"]), arrays["values"], constants, bases)


def freeze(bound: Bound) -> Bound:
    """The pair with gradients off and its modules in evaluation mode."""
    bound.nets.eval().requires_grad_(False)
    return bound


def new_state(bound: Bound, feed: Feed, plan: Plan, team: Team) -> State:
    """The state of a fit that has not taken a step."""
    parameters = [p for p in bound.nets.parameters() if p.requires_grad]
    some = some_field(bound.example)
    if not parameters:
        if bound.template.plan.get("steps") != 0 and not isinstance(bound.nets.guide, AdaptedGuide):
            raise TemplateError(
                f'template "{bound.template.name}": neither model nor guide has anything to learn. If that '
                f"is meant, since the guide works out each posterior by itself, say so by "
                f'Template(plan={{"steps": 0}}).'
            )
        # An optimiser takes one at least.
        parameters = [torch.zeros(0, device=some.device, requires_grad=True)]
    if plan.optimiser == "adam":
        optimiser = torch.optim.Adam(parameters, lr=plan.lr, fused=True)
    else:
        optimiser = torch.optim.SGD(parameters, lr=plan.lr, momentum=0.9)
    generator = torch.Generator(device=some.device)
    generator.manual_seed(stream_seed(plan.seed, "sampling"))
    return State(bound, optimiser, feed, generator.get_state(), team=team)
