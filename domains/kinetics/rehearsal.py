"""The rehearsal of an encoder: it practises on simulated experiments, near the population of the data.

Each round simulates experiments at the times of the measured ones, of populations about a guess; has the
encoder learn the density of the parameters that made each one, given its population; and guesses again, from
what the encoder says of the data (expectation and maximisation). The first guess is as wide as the prior.

A simulated experiment costs one solution without a gradient, and its noise is drawn anew whenever it is seen.
So an encoder learns from thousands what some hundred measured ones cannot teach it. None of this is the
posterior: the template's population and encoder are fitted to the data afterwards.

References:
    Papamakarios and Murray 2016, arXiv:1605.06376 (posteriors learnt from simulations, in rounds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from tqdm.auto import tqdm

from domains.kinetics import experiments as ready
from domains.kinetics.encoders import Encoder, Population, Start
from domains.kinetics.kinetics import Noise
from domains.kinetics.priors import ParameterPrior
from domains.kinetics.simulation import Simulated
from scivi.errors import DataError

# All are our choice.
ROUNDS, EXPERIMENTS = 4, 4096
STEPS, FEWER = 3000, 4  # of the last round; a round before has so many times fewer
AT_ONCE, LEARNING_RATE, LONGEST = 128, 1e-2, 10.0  # experiments in a step; Adam's, at its highest; gradient
MOST_FAILED = 0.5  # share of simulated experiments that may fail
E_STEPS = 12  # of the guess


def rehearse(
    population: Population,
    scatter: float,
    values: Mapping[str, Tensor],
    present: Tensor,
    *,
    rounds: int,
    experiments: int,
    steps: int,
    progress: bool,
) -> tuple[Start, Encoder]:
    """A population near that of the data, and an encoder that knows its surroundings.

    Args:
        population: what the experiments are.
        scatter: ln units, scale of its prior.
        values: the fields of the data, by name; any number above 0 where nothing was measured.
        present: whether it was measured (experiment, moment, observable).
        rounds: of the rehearsal.
        experiments: simulated in each.
        steps: of learning in the last; those before have a quarter of them.
        progress: show a progress bar.

    Raises:
        DataError: more than half of the simulated experiments could not be solved.
    """
    encoder, guess = Encoder(population), None
    _set_scales(encoder, values, present)
    for number in range(rounds):
        about = _about(population, scatter, guess, len(present), experiments)
        rehearsal = _simulated(population, about, values, present)
        _refer(encoder, rehearsal.about, guess)
        n = steps if number + 1 == rounds else max(1, steps // FEWER)
        what = f"rehearsal, round {number + 1} of {rounds}"
        with tqdm(disable=not progress, desc=what, total=n, unit="step") as bar:
            _practise(encoder, population, rehearsal, n, bar)
        guess = _estimate(encoder, population, values, present, rehearsal.about)
    assert guess is not None
    return guess, encoder


class Populations(NamedTuple):
    """Of simulated experiments: the population of each, and its parameters, (experiment, ...)."""

    mean: Tensor
    scatter: Tensor
    shared: Tensor | None
    theta: Tensor


class Rehearsal(NamedTuple):
    """Simulated experiments: what is expected of their measurements, and when and how they were made."""

    about: Populations
    found: Simulated
    values: Mapping[str, Tensor]
    present: Tensor


def _set_scales(encoder: Encoder, values: Mapping[str, Tensor], present: Tensor) -> None:
    """How the encoder measures levels and times: by those of the data."""
    for k, is_log in enumerate(encoder.is_log):
        level = values["measured"][..., k][present[..., k]]
        level = level.log() if is_log else level
        if len(level) > 1:
            encoder.level_mean[k], encoder.level_sd[k] = level.mean(), level.std().clamp_min(1e-6)
    time = values["time"]
    if bool((time > 0).any()):
        encoder.first[0] = time[time > 0].min()
    late = torch.log1p(time / encoder.first)
    encoder.late_mean[0], encoder.late_sd[0] = late.mean(), late.std().clamp_min(1e-3)


def _about(population: Population, scatter: float, guess: Start | None, rows: int, n: int) -> Populations:
    """Populations about a guess, each with an experiment.

    The guess is believed to a few of the standard errors that so many rows leave: wide enough for the
    posterior of the population, and narrow enough for the encoder to know all of it.
    """
    like, d = torch.zeros(()), len(population.varying)
    common = ParameterPrior(population.parameters(population.shared), like)
    if guess is None:
        drawn = ParameterPrior(population.parameters(population.varying), like).sample(torch.Size([n]))
        theta = drawn + scatter / population.ln_bases(like) * torch.randn(n, d)
        shared = common.sample(torch.Size([n])) if population.shared else None
        return Populations(theta.mean(0).expand(n, -1), theta.std(0).expand(n, -1), shared, theta)
    error = 1 / math.sqrt(rows)
    width = guess.scatter * ((0.1 + 2 * error) * torch.randn(n, d)).exp()
    mean = guess.mean + (0.1 + 2 * error) * guess.scatter * torch.randn(n, d)
    shared = None
    if population.shared:
        bounds = biject_to(common.support)
        at = bounds.inv(guess.shared)
        shared = bounds(at + 0.2 * torch.randn(n, len(at)))
    return Populations(mean, width, shared, mean + width * torch.randn(n, d))


def _simulated(
    population: Population, about: Populations, values: Mapping[str, Tensor], present: Tensor
) -> Rehearsal:
    """Experiments solved at the times of measured ones; those that cannot be solved are left out."""
    rows = torch.randint(len(present), (len(about.theta),))
    own = {name: value[rows] for name, value in values.items()}
    with torch.no_grad():
        found = population.seen(about.theta, about.shared, own)
    ok = found.ok & torch.isfinite(found.mean).flatten(1).all(1) & torch.isfinite(found.sd).flatten(1).all(1)
    failed = 1.0 - float(ok.double().mean())
    if failed > MOST_FAILED:
        raise DataError(
            f"{failed:.0%} of the simulated experiments could not be solved. Narrow the priors or bounds of "
            "the parameters, raise max_steps, or loosen rtol."
        )
    shared = None if about.shared is None else about.shared[ok]
    kept = Populations(about.mean[ok], about.scatter[ok], shared, about.theta[ok])
    solved = Simulated(*(x[ok] for x in found))
    return Rehearsal(kept, solved, {n: v[ok] for n, v in own.items()}, present[rows][ok])


def _refer(encoder: Encoder, about: Populations, guess: Start | None) -> None:
    """The point and the scale that the encoder reckons from."""
    encoder.centre.copy_(about.mean.mean(0) if guess is None else guess.mean)
    encoder.width.copy_(about.scatter.mean(0) if guess is None else guess.scatter)
    if about.shared is not None:
        encoder.shared_mean.copy_(about.shared.mean(0))
        encoder.shared_sd.copy_(about.shared.std(0).clamp_min(1e-6))


def _practise(encoder: Encoder, population: Population, rehearsal: Rehearsal, steps: int, bar: Any) -> None:
    """Learn the density of the parameters that made each experiment, its noise drawn anew at each step."""
    about, found, n = rehearsal.about, rehearsal.found, len(rehearsal.present)
    optimiser = torch.optim.Adam(encoder.parameters(), LEARNING_RATE)
    course = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with bar:
        for step in range(steps):
            some = torch.randint(n, (min(n, AT_ONCE),))
            noise = Noise(population.problem, found.mean[some].float(), found.sd[some].float())
            values = {name: value[some] for name, value in rehearsal.values.items()}
            values["measured"] = noise.sample()
            seen = encoder.read(values, rehearsal.present[some] & torch.isfinite(values["measured"]))
            shared = None if about.shared is None else about.shared[some]
            mean, tril = encoder(seen, about.mean[some], about.scatter[some], shared)
            with pyro.validation_enabled(False):
                density = dist.MultivariateNormal(mean, scale_tril=tril).log_prob(about.theta[some])
            optimiser.zero_grad()
            (-density.mean()).backward()
            if bool(torch.isfinite(nn.utils.clip_grad_norm_(encoder.parameters(), LONGEST))):
                optimiser.step()
            course.step()
            if step % 50 == 49:
                bar.set_postfix(nats=f"{-float(density.detach().mean()):.3f}", refresh=False)
            bar.update()


def _estimate(
    encoder: Encoder,
    population: Population,
    values: Mapping[str, Tensor],
    present: Tensor,
    about: Populations,
) -> Start:
    """The population that makes what the encoder says of the data most likely, roughly."""
    seen = encoder.read(values, present)
    mean, scatter = encoder.centre.clone(), encoder.width.clone()
    measured = torch.where(present, values["measured"], math.nan)
    common = ParameterPrior(population.parameters(population.shared), mean)
    bounds = biject_to(common.support)
    at = torch.zeros(0) if about.shared is None else bounds.inv(about.shared).mean(0)
    at.requires_grad_()
    climb = torch.optim.Adam([at], 0.5)
    course = torch.optim.lr_scheduler.ExponentialLR(climb, 0.8)
    for _ in range(E_STEPS):
        with torch.no_grad():
            shared = None if about.shared is None else bounds(at)
            theta, tril = encoder(seen, mean, scatter, shared)
            mean = theta.mean(0)
            spread = (theta - mean).square().mean(0) + tril.square().sum(-1).mean(0)
            scatter = spread.sqrt()
        if about.shared is not None:
            found = population.seen(theta, bounds(at), values)
            each = ready.log_likelihood(population.problem, measured, found.mean, found.sd)
            each = torch.where(found.ok[:, None, None], each, 0.0)
            climb.zero_grad()
            (-each.sum() - common.log_prob(bounds(at))).backward()
            climb.step()
            course.step()
    inside = ParameterPrior(population.parameters(population.varying), mean)
    edge = 1e-3 * (inside.high - inside.low)
    mean = torch.maximum(torch.minimum(mean, inside.high - edge), inside.low + edge)
    return Start(mean, scatter, at.detach() if about.shared is None else bounds(at).detach())
