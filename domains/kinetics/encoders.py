"""An encoder of experiments: from the measurements of each to a normal factor of its own parameters.

The factor stands for the likelihood of an experiment's theta, those of its parameters that vary:

    x = (theta - centre) / width,   factor(x) ~ exp(h . (x - m) - (x - m)' L (x - m) / 2)
    L = D (sum_i a_i a_i') D,   h = D sum_i a_i s_i

with a direction a_i and a residual s_i of each measurement i, seen beside the mean of all of them, and a
place m and a diagonal D of the whole. It is multiplied by the population's Normal(mean, scatter), exactly. So
an experiment without data has the population as its posterior, missing measurements count for nothing, and
their order for nothing.

References:
    Zaheer et al. 2017, Deep Sets, arXiv:1703.06114.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from domains.kinetics import experiments as ready
from domains.kinetics.petab_problems import Parameter, Problem
from domains.kinetics.priors import LN
from domains.kinetics.simulation import Form, Simulated, simulated
from scivi.models import normals
from scivi.models.networks import perceptron

FARTHEST = 8.0  # sd of levels, times or shared parameters beyond which it sees no more (our choice)
MOST_STRETCH = 4.0  # ln of a factor of fifty: more is no correction (our choice)
WIDTH = 64  # of the maps (our choice)
OWN = ("at_rest", "override")  # fields that a table may lack


@dataclass(frozen=True, slots=True)
class Population:
    """What was fixed when a template was made.

    Args:
        form: what is solved, and how.
        varying: places, among the estimated parameters, of those that vary.
    """

    form: Form
    varying: tuple[int, ...]

    @property
    def problem(self) -> Problem:
        """Of one experiment."""
        return self.form.problem

    @property
    def shared(self) -> tuple[int, ...]:
        """Places of the parameters that do not vary."""
        return tuple(k for k in range(len(self.problem.estimated)) if k not in self.varying)

    def parameters(self, places: Sequence[int]) -> tuple[Parameter, ...]:
        """The estimated parameters at some places."""
        return tuple(self.problem.estimated[k] for k in places)

    def ln_bases(self, like: Tensor) -> Tensor:
        """Natural log of the base of each varying parameter's scale (parameter,)."""
        return like.new_tensor([LN[each.scale] or 1.0 for each in self.parameters(self.varying)])

    @property
    def moves(self) -> bool:
        """Whether a shared parameter changes a solution, and not only how it is observed."""
        net, sets = self.problem.network, self.problem.conditions.values()
        named = {value for each in sets for value in each.values()} | {*net.parameters}
        return any(each.name in named for each in self.parameters(self.shared))

    def seen(self, theta: Tensor, shared: Tensor | None, values: Mapping[str, Tensor]) -> Simulated:
        """Experiments solved and observed: dims (*draw, experiment, moment, ...), without one for conditions.

        Where shared parameters change the observation alone, no gradient by them goes through the solution.

        Args:
            theta: what varies (*draw, experiment, parameter).
            shared: what does not (*draw, 1, shared_parameter) or (shared_parameter,); None if all vary.
            values: fields by name: ``time``, and perhaps ``at_rest`` and ``override``.
        """
        time, own = values["time"].unsqueeze(1), {n: values[n].unsqueeze(1) for n in OWN if n in values}
        still = shared is None or self.moves or not shared.requires_grad
        every = self.every(theta, shared if still else cast(Tensor, shared).detach())
        found = simulated(self.form, every, time, **own)
        if not still:
            made, value = self.form.made, ready.unscaled(self.problem, self.every(theta, shared).double())
            override = own["override"].double() if "override" in own else None
            context = made.settings(value).context
            mean, sd = made.observed(time.double(), found.y, context, value, override)
            found = found._replace(mean=mean, sd=sd)
        y, mean, sd = (x.squeeze(-3) for x in found[:3])
        return Simulated(y, mean, sd, found.ok.squeeze(-1))

    def every(self, theta: Tensor, shared: Tensor | None) -> Tensor:
        """All estimated parameters, in the problem's order (*draw, experiment, estimated)."""
        columns = dict(zip(self.varying, theta.unbind(-1), strict=True))
        if shared is not None:
            columns |= dict(zip(self.shared, shared.unbind(-1), strict=True))
        return torch.stack(torch.broadcast_tensors(*(columns[k] for k in sorted(columns))), -1)


class Start(NamedTuple):
    """A population to start at: (parameter,), (parameter,) and (shared_parameter,)."""

    mean: Tensor
    scatter: Tensor
    shared: Tensor


class Measurements(NamedTuple):
    """What the encoder sees of experiments, measurements of all moments and observables in one row.

    Args:
        features: (experiment, measurement, feature).
        present: whether it was measured (experiment, measurement).
    """

    features: Tensor
    present: Tensor


class Encoder(nn.Module):
    """From an experiment's measurements to a normal factor of its parameters; see the module's docstring.

    Args:
        population: whose observables it reads, and whose parameters it tells of.
    """

    # Of (theta - centre) / width; of levels (observable,), of ln(1 + time / first), of the shared parameters.
    first: Tensor
    centre: Tensor
    width: Tensor
    level_mean: Tensor
    level_sd: Tensor
    late_mean: Tensor
    late_sd: Tensor
    shared_mean: Tensor
    shared_sd: Tensor

    def __init__(self, population: Population) -> None:
        super().__init__()
        problem, d, s = population.problem, len(population.varying), len(population.shared)
        self.is_log = tuple(each.is_log for each in problem.observables)
        n, self.dims = len(self.is_log), d
        pairs = (("centre", "width", d), ("level_mean", "level_sd", n), ("late_mean", "late_sd", 1))
        for mean, sd, size in (*pairs, ("shared_mean", "shared_sd", s)):
            self.register_buffer(mean, torch.zeros(size))
            self.register_buffer(sd, torch.ones(size))
        features = 3 + n + problem.n_slots
        self.register_buffer("first", torch.ones(1))
        self.element = perceptron(features, WIDTH, (WIDTH,))
        self.whole = perceptron(WIDTH + 1, WIDTH, (WIDTH,))
        self.factor = perceptron(features + WIDTH, d + 1, (WIDTH, WIDTH))
        self.place = perceptron(WIDTH + s, 2 * d, (WIDTH,), last=0.1)

    def read(self, values: Mapping[str, Tensor], present: Tensor) -> Measurements:
        """The measurements of a table.

        Args:
            values: fields by name.
            present: whether it was measured (experiment, moment, observable).
        """
        measured, time = values["measured"], values["time"]
        n = measured.shape[-1]
        is_log = torch.tensor(self.is_log, device=measured.device)
        level = torch.where(present, measured, 1.0)
        level = torch.where(is_log, torch.where(is_log, level, 1.0).log(), level)
        level = (level - self.level_mean) / self.level_sd
        late = (torch.log1p(time / self.first) - self.late_mean) / self.late_sd
        rest = values.get("at_rest", torch.zeros_like(time))
        parts = [level.clamp(-FARTHEST, FARTHEST).unsqueeze(-1)]
        parts += [
            x[..., None, None].expand(*measured.shape, 1) for x in (late.clamp(-FARTHEST, FARTHEST), rest)
        ]
        parts.append(torch.eye(n).to(measured).expand(*measured.shape, n))
        if "override" in values:
            parts.append(values["override"])
        features = torch.where(present.unsqueeze(-1), torch.cat(parts, -1), 0.0)
        return Measurements(features.flatten(-3, -2), present.flatten(-2))

    def forward(
        self, seen: Measurements, mean: Tensor, scatter: Tensor, shared: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean (*draw, experiment, parameter) and Cholesky factor of the covariance of theta.

        Args:
            seen: of experiments.
            mean: of the population (*draw, 1 or experiment, parameter), or (parameter,).
            scatter: likewise.
            shared: likewise (.., shared_parameter).
        """
        there = seen.present.to(seen.features).unsqueeze(-1)
        count = there.sum(-2)
        pooled = (self.element(seen.features) * there).sum(-2) / count.clamp_min(1.0)
        told = self.whole(torch.cat([pooled, torch.log1p(count)], -1))
        each = torch.cat([seen.features, told.unsqueeze(-2).expand(*there.shape[:-1], -1)], -1)
        direction, residual = (self.factor(each) * there).split([self.dims, 1], -1)
        precision, push = direction.mT @ direction, (direction * residual).sum(-2)
        if shared is not None:
            away = ((shared - self.shared_mean) / self.shared_sd).clamp(-FARTHEST, FARTHEST)
            shape = torch.broadcast_shapes(away.shape[:-1], told.shape[:-1])
            told = torch.cat([told.expand(*shape, -1), away.expand(*shape, -1)], -1)
        at, stretch = self.place(told).split(self.dims, -1)
        stretch = stretch.clamp(-MOST_STRETCH, MOST_STRETCH).exp()
        precision = stretch.unsqueeze(-1) * precision * stretch.unsqueeze(-2)
        of_prior = (self.width / scatter).square()
        pull = of_prior * (mean - self.centre) / self.width + stretch * push
        pull = pull + (precision @ at.unsqueeze(-1)).squeeze(-1)
        tril = normals.inverse_tril(precision + torch.diag_embed(of_prior))
        x = (tril @ (tril.mT @ pull.unsqueeze(-1))).squeeze(-1)
        return self.centre + self.width * x, self.width.unsqueeze(-1) * tril
