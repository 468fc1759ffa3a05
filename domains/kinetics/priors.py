"""Priors of parameters, each on a scale of its own and within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from domains.kinetics.petab_problems import Parameter

LN = {"lin": None, "log": 1.0, "log10": math.log(10.0)}  # ln of the scale's base; None where it is linear
FAMILIES = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}
KINDS = {  # PEtab's word: family, and the scale it is of ("" for the parameter's own)
    "uniform": ("uniform", "lin"),
    "normal": ("normal", "lin"),
    "laplace": ("laplace", "lin"),
    "logNormal": ("normal", "log"),
    "logLaplace": ("laplace", "log"),
    "parameterScaleUniform": ("uniform", ""),
    "parameterScaleNormal": ("normal", ""),
    "parameterScaleLaplace": ("laplace", ""),
    "": ("uniform", ""),
}


@dataclass(frozen=True, slots=True)
class _Prior:
    """One parameter's: of x = (base of ``of``) log of the value, where s is the value on its own scale."""

    family: str
    own: str
    of: str
    low: float  # bounds of s
    high: float
    first: float  # centre, or lower end, of x
    second: float  # sd or scale, or upper end

    def x(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """From s to x and ln |dx/ds|."""
        own, of = LN[self.own], LN[self.of]
        if self.own == self.of:
            return s, torch.zeros_like(s)
        if of is None:  # x = exp(own s)
            return (own * s).exp(), own * s + math.log(own)  # type: ignore[operator]
        ln = s.log() if own is None else own * s
        slope = -ln if own is None else torch.full_like(s, math.log(own))
        return ln / of, slope - math.log(of)

    def s(self, x: Tensor) -> Tensor:
        """From x to s."""
        own, of = LN[self.own], LN[self.of]
        if self.own == self.of:
            return x
        ln = x.log() if of is None else of * x
        return ln.exp() if own is None else ln / own

    def base(self, like: Tensor) -> Any:
        """The distribution of x without bounds."""
        first, second = like.new_tensor(self.first), like.new_tensor(self.second)
        return FAMILIES[self.family](first, second, validate_args=False)

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cumulative probability at the bounds."""
        at = [self.base(like).cdf(self.x(like.new_tensor(end))[0]) for end in (self.low, self.high)]
        return at[0], at[1]

    def log_prob(self, s: Tensor) -> Tensor:
        x, slope = self.x(s)
        if self.family == "uniform":
            return slope - math.log(self.second - self.first)
        low, high = self.ends(s)
        return self.base(s).log_prob(x) + slope - (high - low).log()

    def sample(self, u: Tensor) -> Tensor:
        """From uniform numbers."""
        if self.family == "uniform":
            return self.s(self.first + u * (self.second - self.first))
        low, high = self.ends(u)
        return self.s(self.base(u).icdf(low + u * (high - low))).clamp(self.low, self.high)


def _prior(each: Parameter) -> _Prior:
    assert each.lower is not None
    assert each.upper is not None
    own = LN[each.scale]
    low, high = (
        float(end) if own is None else (math.log(end) / own if end > 0 else -math.inf)
        for end in (each.lower, each.upper)
    )
    family, of = KINDS[each.prior]
    of = of or each.scale
    first, second = map(float, each.prior_parameters or (low, high))
    found = _Prior(family, each.scale, of, low, high, first, second)
    if family == "uniform":  # the bounds cut it
        cut = [float(found.x(torch.tensor(end, dtype=torch.float64))[0]) for end in (low, high)]
        found = replace(found, first=max(first, cut[0]), second=min(second, cut[1]))
    return found


class ParameterPrior(TorchDistribution):
    """Independent priors of parameters on their own scales, cut at their bounds.

    A parameter without a prior is uniform on its scale between its bounds. A prior on another scale than the
    parameter's brings the derivative of the one scale by the other.

    Args:
        parameters: with bounds.
        like: of whose type and device the densities are.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, parameters: Sequence[Parameter | _Prior], like: Tensor, batch_shape: Sequence[int] = ()
    ) -> None:
        self.each = [_prior(p) if isinstance(p, Parameter) else p for p in parameters]
        self.like = like
        self.low, self.high = (
            like.new_tensor([getattr(p, end) for p in self.each]) for end in ("low", "high")
        )
        super().__init__(torch.Size(batch_shape), torch.Size([len(self.each)]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """Between the bounds."""
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> TorchDistribution:
        """The same for each entry of a batch."""
        return ParameterPrior(self.each, self.like, batch_shape)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Parameters (*sample, *batch, parameter)."""
        with torch.no_grad():
            u = torch.rand(self._extended_shape(torch.Size(sample_shape)), dtype=self.like.dtype)
            u = u.to(self.like.device)
            return torch.stack([p.sample(x) for p, x in zip(self.each, u.unbind(-1), strict=True)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (*batch)."""
        parts = [p.log_prob(x) for p, x in zip(self.each, value.unbind(-1), strict=True)]
        return torch.stack(parts, -1).sum(-1)
