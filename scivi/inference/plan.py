"""How to fit: one frozen value, every knob a field, nothing of what is fitted."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from scivi import shown
from scivi.errors import PlanError, listed


@dataclass(frozen=True, slots=True)
class Plateau:
    """Stop when the averaged objective no longer improves.

    The objective of the last quarter of the steps is compared with that of the quarter before; the fit goes
    on while the improvement exceeds both ``tolerance`` standard errors of the difference and ``least``, or
    while that error is more than twice ``least``, so that nothing can be told. Then the learning rate falls
    to zero over as many steps as were taken.

    Args:
        window: fewest steps in each of the two windows.
        tolerance: standard errors (our choice: 2, so that noise alone continues one time in forty).
        least: nats per row (our choice: a percent of what a reader would call a better fit).
        min_steps: never stop before this many steps.
    """

    window: int = 100
    tolerance: float = 2.0
    least: float = 0.005
    min_steps: int = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """How a template is fitted. Every field has a default that needs no tuning.

    Args:
        steps: the most steps taken; 0 leaves the guide as it begins.
        rows_per_batch: rows in a minibatch; None takes all rows at every step (refused above 100 000).
        rows_per_batch_max: if larger, the minibatch doubles up to it whenever the gradient's signal-to-noise
            ratio falls under ``grow_below``.
        grow_below: that ratio: norm of the averaged gradient over root mean square gradient, in (0, 1).
        lr: learning rate of Adam, or of SGD.
        optimiser: "adam" or "sgd" (with momentum 0.9), both torch's own.
        schedule: "warmup-stable-decay" rises over ``warmup`` of the steps, stays, and falls by a half cosine
            over the last ``decay`` of them; the fall begins early if the stop rule says so.
        warmup, decay: fractions of ``steps``.
        clip: largest gradient norm, in nats per row; None for no clipping.
        particles: guide samples per step ("trace", "analytic", "stl", "enumerate") or per row ("iwae").
        estimator: "auto" ("marginal" where it can be had, "enumerate" where there are discrete latents, else
            "trace"), "trace" (pathwise where possible, else score function with leave-one-out control
            variate), "analytic" (closed-form KL where torch knows one), "stl" (sticking the landing, Roeder
            et al. 2017), "enumerate" (discrete latents that the guide leaves out are summed exactly), "iwae"
            (importance-weighted bound per row, Burda et al. 2016), "marginal" (local latents integrated on
            guide-placed nodes).
        nodes: Gauss-Hermite nodes per local dimension of "marginal"; in two and three dimensions training
            takes 5 at most, and the Newton finish all.
        newton: after "marginal", finish the global latents by Newton on the full marginal. A pair that has
            nothing else to learn takes no more steps than one entry of the history.
        kl_warmup: steps over which the weight of the KL part rises from ``beta_start`` to ``beta``.
        beta_start, beta: that weight; 1 is the bound itself.
        dtype: "float32" or "float64".
        device: "cpu", "cuda", "cuda:1", ...; never chosen in silence.
        compile: "auto" captures and compiles the step of a fit that is still going after a thousand steps,
            with as many to come; "on" at once; "off" never. A step that cannot be captured runs eagerly, and
            the provenance of the fit says why.
        seed: of initial values, row order and sampling, as three separate streams.
        log_every: steps between two entries of the history.
        save_every_s: seconds between two checkpoints.
        resident_bytes: rows are kept in memory if they take at most so much there, in narrow types; else they
            are streamed from where they are, in an order that is shuffled within groups of stored chunks.
        restarts: how often a diverged fit goes back to its last good state with half the learning rate.
        stop: the stop rule; None runs all steps.

    Raises:
        PlanError: listing every value that cannot be used.
    """

    steps: int = 5000
    rows_per_batch: int | None = 512
    rows_per_batch_max: int | None = None
    grow_below: float = 0.05
    lr: float = 5e-3
    optimiser: Literal["adam", "sgd"] = "adam"
    schedule: Literal["constant", "warmup-stable-decay"] = "warmup-stable-decay"
    warmup: float = 0.02
    decay: float = 0.3
    clip: float | None = 10.0
    particles: int = 1
    estimator: Literal["auto", "trace", "analytic", "stl", "enumerate", "iwae", "marginal"] = "auto"
    nodes: int = 7
    newton: bool = True
    kl_warmup: int = 0
    beta_start: float = 0.0
    beta: float = 1.0
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0
    log_every: int = 50
    save_every_s: float = 60.0
    resident_bytes: int = 2**31
    restarts: int = 2
    stop: Plateau | None = Plateau()

    def __post_init__(self) -> None:
        if isinstance(self.stop, Mapping):
            object.__setattr__(self, "stop", _plateau(self.stop))
        faults = [*_faults_of_numbers(self), *_faults_of_choices(self)]
        if faults:
            raise PlanError(listed("this plan cannot be used:", faults))

    def __repr__(self) -> str:
        return shown.call(self)

    def _repr_html_(self) -> str:
        return shown.box("how to fit", "Plan", shown.settings(self))

    def lr_at(self, step: int, decay_from: int | None = None, decay_steps: int | None = None) -> float:
        """Learning rate of a step.

        Args:
            step: number of the step, from 0.
            decay_from: step at which the final decay begins; None for the planned one.
            decay_steps: length of the decay; None for the planned one.
        """
        if self.schedule == "constant":
            return self.lr
        length = max(1, round(self.decay * self.steps)) if decay_steps is None else max(1, decay_steps)
        start = self.steps - length if decay_from is None else decay_from
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - start) / length)))
        return self.lr * rise * (0.999 * fall + 0.001)

    def beta_at(self, step: int) -> float:
        """Weight of the KL part at a step."""
        if self.kl_warmup <= 0:
            return self.beta
        return self.beta_start + (self.beta - self.beta_start) * min(1.0, step / self.kl_warmup)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and words, ready for JSON or TOML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Plan:
        """A plan from plain values; unknown names are an error that lists the known ones.

        TOML has no None: "none" stands for it, and "all" for that of ``rows_per_batch``.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(table) - known)
        if unknown:
            names = ", ".join(repr(name) for name in unknown)
            raise PlanError(f"a plan has no {names}. It has: {', '.join(sorted(known))}.")
        plain: dict[str, Any] = {k: None if v in ("none", "all") else v for k, v in table.items()}
        return cls(**plain)

    @classmethod
    def from_toml(cls, path: str | Path) -> Plan:
        """A plan from a TOML file, at top level or under ``[plan]``."""
        try:
            table = tomllib.loads(Path(path).read_text())
        except FileNotFoundError:
            raise PlanError(f'there is no plan file "{path}".') from None
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f'"{path}" is not valid TOML: {error}.') from None
        return cls.from_dict(table.get("plan", table))


def _plateau(table: Mapping[str, Any]) -> Plateau:
    known = {f.name for f in fields(Plateau)}
    if unknown := sorted(set(table) - known):
        raise PlanError(f"stop has no {unknown}. It has: {', '.join(sorted(known))}.")
    return Plateau(**table)


def _faults_of_numbers(plan: Plan) -> list[str]:
    least = {"steps": 0, "particles": 1, "nodes": 1, "kl_warmup": 0, "log_every": 1, "restarts": 0, "seed": 0}
    least["resident_bytes"] = 0
    faults = []
    for name, low in least.items():
        value = getattr(plan, name)
        if not _is_whole(value, low):
            faults.append(f"{name} = {value!r}; it must be a whole number of at least {low}")
    for name in ("rows_per_batch", "rows_per_batch_max"):
        value = getattr(plan, name)
        if value is not None and not _is_whole(value, 1):
            faults.append(f"{name} = {value!r}; it must be a whole number of at least 1, or None")
    for name in ("lr", "save_every_s", "beta", "clip"):
        value = getattr(plan, name)
        if not (name == "clip" and value is None) and not (_is_number(value) and 0 < value < math.inf):
            faults.append(f"{name} = {value!r}; it must be a number above 0")
    for name in ("warmup", "decay", "grow_below", "beta_start"):
        value = getattr(plan, name)
        if not (_is_number(value) and 0 <= value <= 1):
            faults.append(f"{name} = {value!r}; it must lie between 0 and 1")
    return faults


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _faults_of_choices(plan: Plan) -> list[str]:
    hints = get_type_hints(Plan)
    faults = [
        f"{name} = {getattr(plan, name)!r}; it must be one of {', '.join(map(repr, get_args(hints[name])))}"
        for name in ("estimator", "schedule", "optimiser", "dtype", "compile")
        if getattr(plan, name) not in get_args(hints[name])
    ]
    if plan.estimator == "iwae" and plan.particles < 2:
        faults.append('estimator = "iwae" needs particles >= 2 (5 to 50 are usual)')
    if plan.stop is not None and not isinstance(plan.stop, Plateau):
        faults.append(f"stop = {plan.stop!r}; it must be a Plateau or None")
    elif plan.stop is not None and not (
        plan.stop.window >= 1
        and plan.stop.min_steps >= 1
        and plan.stop.tolerance >= 0
        and plan.stop.least >= 0
    ):
        faults.append(
            f"stop = {plan.stop}; window and min_steps must be at least 1, tolerance and least at least 0"
        )
    return faults
