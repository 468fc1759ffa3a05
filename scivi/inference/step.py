"""One update: objective, gradient, clipping, optimiser; sums are kept on the device.

Processes that share a fit average objective and gradient between them before the clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from scivi.errors import FitError
from scivi.inference.objective import Objective, Value
from scivi.inference.plan import Plan
from scivi.inference.scores import log_prob
from scivi.inference.state import State
from scivi.inference.team import HEED, moving
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound, stream_seed
from scivi.models.sites import plates_of, sample_sites


def update(state: State, objective: Objective, plan: Plan) -> Value:
    """Take one step: the state moves on by one, and its window takes the numbers in.

    Args:
        state: changed in place.
        objective: of the state's pair.
        plan: learning rate, clipping and KL weight are read.
    """
    _seed_step(state, plan)
    before = [b.clone() for b in moving(state.bound.nets)] if state.team.size > 1 else []
    batch = state.feed.next()
    value = objective.evaluate(batch, plan.beta_at(state.step))
    state.optimiser.zero_grad(set_to_none=True)
    value.loss.backward()
    if state.team.size > 1:
        value = _averaged(state, value, batch, before)
    limit = float("inf") if plan.clip is None else plan.clip
    norm = nn.utils.clip_grad_norm_(objective.bound.nets.parameters(), limit)
    lr = state.lr_factor * plan.lr_at(state.step, state.decay_from, state.decay_steps)
    for group in state.optimiser.param_groups:
        group["lr"] = lr
    state.optimiser.step()
    state.step += 1
    _add(state.window, value, norm)
    return value


def _seed_step(state: State, plan: Plan) -> None:
    """Let each of several processes draw a step's random numbers from a stream of its own."""
    if state.team.size > 1:
        seed = stream_seed(plan.seed, "sampling")
        restore_random(state.team.streams(seed, state.step, state.device))


def _averaged(state: State, value: Value, batch: Batch, before: list[Tensor]) -> Value:
    """Gradient, objective and parts of the whole minibatch, of which this process has its share."""
    team, first = state.team, state.bound.template.row_dims[0]
    of_all = state.feed.size_of(first) or batch.sizes[first]
    numbers = {"objective": value.objective, **{f"part_{k}": v for k, v in value.parts.items()}}
    weight = batch.n_rows(first) * team.size / of_all
    look = state.device.type == "cpu" or state.step % HEED == 0
    means, asked = team.average(state.bound.nets, before, numbers, weight, look)
    if asked:
        state.stopped = "signal"
    return Value(value.loss, means["objective"], {k: means[f"part_{k}"] for k in value.parts})


def _add(window: dict[str, Tensor], value: Value, norm: Tensor) -> None:
    entries = {"objective": value.objective, "square": value.objective.square(), "grad_norm": norm.detach()}
    entries |= {f"part_{k}": v for k, v in value.parts.items()}
    entries["n"] = torch.ones_like(value.objective)
    for name, number in entries.items():
        window[name] = window[name] + number.double() if name in window else number.double()


def read_window(window: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the window: one wait on the device for all of them."""
    names = list(window)
    sums = dict(zip(names, torch.stack([window[n] for n in names]).tolist(), strict=True))
    n = sums.pop("n")
    mean = {name: total / n for name, total in sums.items()}
    spread = max(0.0, mean.pop("square") - mean["objective"] ** 2)
    return {**mean, "objective_sd": (spread * n / max(1.0, n - 1)) ** 0.5, "window_steps": n}


def is_finite(window: Mapping[str, Tensor]) -> bool:
    """Whether objective and gradient were finite at every step of the window."""
    return bool(torch.isfinite(window["objective"] + window["grad_norm"])) if window else True


def signal_to_noise(optimiser: torch.optim.Optimizer) -> float:
    """Norm of Adam's averaged gradient over the root of its averaged square.

    1 for no noise, 0 for noise alone.
    """
    first, second = 0.0, 0.0
    for group in optimiser.param_groups:
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        for parameter in group["params"]:
            slots: dict[str, Any] = optimiser.state.get(parameter, {})
            if "exp_avg" not in slots:
                return 1.0
            t = float(slots["step"])
            first += float(slots["exp_avg"].square().sum()) / (1 - beta1**t) ** 2
            second += float(slots["exp_avg_sq"].sum()) / (1 - beta2**t)
    return (first / second) ** 0.5 if second > 0 else 1.0


def diagnose(state: State, objective: Objective, plan: Plan, steps: int) -> FitError:
    """Take the last steps again, one by one, to name the step, the site and the rows at which a fit diverged.

    Args:
        state: restored to before the divergence; changed in place.
        objective: of its pair.
        plan: of the fit.
        steps: how many to take at most.
    """
    for _ in range(steps):
        tensors, plain = state.pack()
        random = random_states(state.device)
        cursor = state.feed.state()
        update(state, objective, plan)
        if is_finite(state.window):
            continue
        step, gradient = state.step - 1, _bad_gradient(objective.bound)
        state.unpack(tensors, plain)
        batch = state.feed.next()
        state.feed.restore(cursor)
        restore_random(random)
        _seed_step(state, plan)
        found = state.team.each(_bad_site(objective.bound, batch))  # of each process's own rows
        site = next((site for site, _ in found if site), None)
        rows = tuple(row for other, own in found if other == site for row in own)
        what = (
            f'the log density of site "{site}" is not finite'
            if site
            else f"the gradient of {gradient} is not finite"
        )
        where = f" in rows {list(rows[:5])}{' ...' if len(rows) > 5 else ''}" if rows else ""
        return FitError(
            f"the fit diverged at step {step}: {what}{where}. Lower the learning rate (now {plan.lr:g}), "
            f"look at those rows, or give the site a prior that keeps it in range.",
            step=step,
            site=site,
            rows=rows,
        )
    return FitError(
        f"the fit diverged near step {state.step}, but not when the steps were taken again.", step=state.step
    )


def random_states(device: torch.device) -> dict[torch.device, Tensor]:
    """Where torch's generators stand: the CPU's, and that of a device which has its own."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | ({device: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random(states: Mapping[torch.device, Tensor]) -> None:
    """Put them back."""
    for device, random in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(random, device)
        else:
            torch.set_rng_state(random)


def _bad_gradient(bound: Bound) -> str:
    for name, parameter in bound.nets.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f'parameter "{name}"'
    return "all parameters together"  # each is finite, and their norm is not


def _bad_site(bound: Bound, batch: Batch) -> tuple[str | None, tuple[int, ...]]:
    """First site of guide or model whose log density is not finite, and its rows."""
    with torch.no_grad():
        guide = poutine.trace(bound.guide).get_trace(batch)
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(batch)
    row = bound.template.row_dims[0]
    for trace in (guide, model):
        for name, site in sample_sites(trace):
            bad = ~torch.isfinite(log_prob(site))
            if not bool(bad.any()):
                continue
            dims = plates_of(site)
            if row not in dims:
                return name, ()
            places = bad.movedim(dims[row], 0).unsqueeze(-1).flatten(1).any(1).nonzero().flatten()
            index = batch.index[row][places] if row in batch.index else places
            return name, tuple(int(i) for i in index)
    return None, ()
