"""What the neural volatility model learns: moves of states, shocks of returns, the guide's encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from domains.finance import shocks
from scivi.models.chains import GaussianChain
from scivi.models.networks import SequenceEncoder, perceptron

_SLOW, _FAST = (4.6, -2.3), (2.2, -1.2)  # logit of phi (.99, .9) and log scale, where the states begin
_LOG_PRECISION = -1.5  # of a pseudo-observation at the start: b of .2, some fifth of what a return tells
_MOST_SHIFT = 0.3  # of a state in a day by the network
_FARTHEST = 8.0  # standard deviations up to which a shock moves the states
_LEAST_NU = 2.05
_LOG_2PI = math.log(2 * math.pi)


class Step(NamedTuple):
    """A day's move: mean and log standard deviation of the next states, (*, state, day)."""

    loc: Tensor
    log_scale: Tensor


class Dynamics(nn.Module):
    """How states move and what returns they give; returns are in units of their series's scale.

    With h_t = level + sum_k x_kt and e_t = (y_t - drift) / exp(h_t / 2),

        x_k(t+1) = phi_k x_kt + f_k(x_t, e_t) + sigma_k (rho_k e_t + sqrt(1 - rho_k^2) exp(g_k(x_t, e_t)) eta)

    where f and g come of one network and are bounded. A missing e_t is summed out: of variance 1, it leaves
    rho = 0.

    Args:
        n_states: how many.
        width: of the network's hidden layer.
    """

    def __init__(self, n_states: int, width: int) -> None:
        super().__init__()
        self.logit_phi = nn.Parameter(torch.linspace(_SLOW[0], _FAST[0], n_states))
        self.log_sigma = nn.Parameter(torch.linspace(_SLOW[1], _FAST[1], n_states))
        self.atanh_rho = nn.Parameter(torch.full((n_states,), -0.4))
        self.level, self.drift = nn.Parameter(torch.tensor(-0.3)), nn.Parameter(torch.tensor(0.0))
        self.log_tails = nn.Parameter(torch.full((2,), math.log(8.0)))
        self.net = perceptron(n_states + 2, 2 * n_states, (width,), last=0.05)

    @property
    def phi(self) -> Tensor:
        """Persistence, (state,)."""
        return self.logit_phi.sigmoid()

    @property
    def rho(self) -> Tensor:
        """Leverage, the correlation of a return's shock with a state's, (state,)."""
        return self.atanh_rho.tanh()

    @property
    def tails(self) -> tuple[Tensor, Tensor]:
        """Degrees of freedom of the lower and the upper tail."""
        lower, upper = _LEAST_NU + self.log_tails.exp()
        return lower, upper

    def log_prior(self, sd: float) -> Tensor:
        """Log density of the network's weights, normal with this standard deviation."""
        return -0.5 * sum(((w / sd).square().sum() for w in self.net.parameters()), torch.zeros(()))

    def log_variance(self, x: Tensor) -> Tensor:
        """Log variance h of states (*, state, day), (*, day)."""
        return self.level + x.sum(-2)

    def shock(self, y: Tensor, x: Tensor) -> Tensor:
        """Shocks e of returns (*, day) and states (*, state, day)."""
        return (y - self.drift) * (-0.5 * self.log_variance(x)).exp()

    def log_likelihood(self, y: Tensor, x: Tensor) -> Tensor:
        """Log density of each return (*, day)."""
        return shocks.log_density(self.shock(y, x), *self.tails) - 0.5 * self.log_variance(x)

    def returns(self, x: Tensor) -> Tensor:
        """Returns drawn at states, (*, day)."""
        h = self.log_variance(x)
        return self.drift + (0.5 * h).exp() * shocks.sample(h.shape, h, *self.tails)

    def start(self) -> Tensor:
        """Log standard deviation of the first day's states, of mean 0, (state, 1): the linear part's."""
        return (self.log_sigma - 0.5 * torch.log1p(-self.phi.square()))[:, None]

    def step(self, x: Tensor, y: Tensor, present: Tensor | None = None) -> Step:
        """From a day's states (*, state, day) and return (*, day) to the next day's states."""
        return self.linear(x, y, present)[0]

    def linear(self, x: Tensor, y: Tensor, present: Tensor | None = None) -> tuple[Step, Tensor]:
        """The step, and by how much leverage moves each state with the log variance, (*, state, day)."""
        e = self.shock(y, x).clamp(-_FARTHEST, _FARTHEST)
        seen = torch.ones_like(e) if present is None else present.to(e).expand_as(e)
        e = e * seen
        inputs = torch.cat([x, torch.stack([torch.tanh(e / 3), seen], -2)], -2)
        shift, stretch = self.net(inputs.mT).mT.tanh().chunk(2, -2)
        rho = self.rho[:, None] * seen.unsqueeze(-2)
        sigma = self.log_sigma[:, None]
        kick = sigma.exp() * rho * e.unsqueeze(-2)
        loc = self.phi[:, None] * x + _MOST_SHIFT * shift + kick
        return Step(loc, sigma + 0.5 * torch.log1p(-rho.square()) + stretch), -0.5 * kick


@torch.no_grad()
def simulate(dynamics: Dynamics, n_windows: int, n_days: int) -> tuple[Tensor, Tensor]:
    """States (window, state, day) and returns (window, day) in units of their scale, day by day."""
    log_sd = dynamics.start()
    x = log_sd.exp() * torch.randn(n_windows, len(log_sd), 1, dtype=log_sd.dtype)
    states, returns = [], []
    for _ in range(n_days):
        states.append(x)
        returns.append(dynamics.returns(x))
        loc, log_scale = dynamics.step(x, returns[-1])
        x = loc + log_scale.exp() * torch.randn_like(loc)
    return torch.cat(states, -1), torch.cat(returns, -1)


class States(TorchDistribution):
    """States of all days given the returns of the days before, with event (state, day).

    The density of a path takes one call of the network for all days; to draw one takes a call a day.

    Args:
        dynamics: how states move.
        y: returns in units of their scale, (*, day).
        present: True where there is one; None if all are.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support: Any = constraints.independent(constraints.real, 2)
    has_rsample = False

    def __init__(self, dynamics: Dynamics, y: Tensor, present: Tensor | None = None) -> None:
        self.dynamics, self.y, self.seen = dynamics, y, present
        event = torch.Size((len(dynamics.phi), y.shape[-1]))
        super().__init__(y.shape[:-1], event, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> States:
        """The same over more dims."""
        return States(self.dynamics, self.y.expand(*batch_shape, self.y.shape[-1]), self.seen)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, (*)."""
        seen = None if self.seen is None else self.seen[..., :-1]
        loc, log_scale = self.dynamics.step(value[..., :-1], self.y[..., :-1], seen)
        first = _normal(value[..., :1], 0.0, self.dynamics.start())
        return first.sum((-1, -2)) + _normal(value[..., 1:], loc, log_scale).sum((-1, -2))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Paths, day by day."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            noise = torch.randn(shape, dtype=self.y.dtype, device=self.y.device)
            days = [self.dynamics.start().exp() * noise[..., :1]]
            for t in range(1, shape[-1]):
                seen = None if self.seen is None else self.seen[..., t - 1 : t]
                loc, log_scale = self.dynamics.step(days[-1], self.y[..., t - 1 : t], seen)
                days.append(loc + log_scale.exp() * noise[..., t : t + 1])
            return torch.cat(days, -1)


def _normal(x: Tensor, loc: Tensor | float, log_scale: Tensor) -> Tensor:
    return -0.5 * ((x - loc) * (-log_scale).exp()).square() - log_scale - 0.5 * _LOG_2PI


class Smoother(TorchDistribution):
    """Chains of states, one after the other, each given the ones before; event (state, day).

        q(x_k | x_1 ... x_(k-1)) ~ N(x_k1; 0, 1 / first_k)
            prod_t N(x_k(t+1); link_kt x_kt + cross_kt z_kt + kick_kt, 1 / weight_kt)
            prod_t N(a_kt; z_kt + x_kt, 1 / b_kt),     z_k = x_1 + ... + x_(k-1)

    What a return tells of is the sum of the states, so that each sees what the ones before have left of it.
    To draw or score a state is one call of a ``GaussianChain``.

    Args:
        steps: how the states move.
        a, b: pseudo-observations and their precisions, (*, state, day).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support: Any = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, steps: Steps, a: Tensor, b: Tensor) -> None:
        self.steps, self.a, self.b = steps, a, b
        super().__init__(a.shape[:-2], a.shape[-2:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Smoother:
        """The same over more dims."""
        a, b = (part.expand(*batch_shape, *part.shape[-2:]) for part in (self.a, self.b))
        return Smoother(self.steps, a, b)

    def _chain(self, k: int, before: Tensor) -> GaussianChain:
        pad, a, b = nn.functional.pad, self.a[..., k, :], self.b[..., k, :]
        first, link, cross, kick, weight = (part[..., k, :] for part in self.steps)
        pull = weight * (kick + cross * before[..., :-1])
        own = torch.cat([first.expand_as(weight[..., :1]), weight], -1) if weight.shape[-1] else first
        diagonal = own + pad(link.square() * weight, (0, 1)) + b
        shift = b * (a - before) + pad(pull, (1, 0)) - pad(link * pull, (0, 1))
        return GaussianChain(diagonal, -link * weight, shift, validate_args=False)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """Of each state and day, (*, state, day)."""
        return self._each(lambda chain: chain.mean)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, differentiable."""
        wider = self.expand(torch.Size((*sample_shape, *self.batch_shape)))
        return wider._each(lambda chain: chain.rsample())

    def _each(self, of: Callable[[GaussianChain], Tensor]) -> Tensor:
        """Each state found of its chain, given those before."""
        states, before = [], torch.zeros_like(self.a[..., 0, :])
        for k in range(self.event_shape[0]):
            states.append(of(self._chain(k, before)))
            before = before + states[-1]
        return torch.stack(states, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, (*)."""
        before = value.cumsum(-2) - value
        each = [self._chain(k, before[..., k, :]).log_prob(value[..., k, :]) for k in range(value.shape[-2])]
        return torch.stack(each).sum(0)


class Steps(NamedTuple):
    """The chains of a ``Smoother`` but for its pseudo-observations.

    Args:
        first: precision of the first day, (*, state, 1).
        link, cross, kick, weight: (*, state, day - 1).
    """

    first: Tensor
    link: Tensor
    cross: Tensor
    kick: Tensor
    weight: Tensor


class Encoder(nn.Module):
    """From returns to the smoother, in two passes.

    A network gives pseudo-observations. With them and the linear part of the dynamics the states are
    smoothed; about that path the dynamics are made linear, leverage and all, and the states are smoothed
    again. So the guide follows the model, and where nothing is known it is the model's linear part. The
    network also mends the links, kicks and weights that come of it.

    Args:
        n_states: how many.
        width: channels of the convolutions.
        layers: of convolutions, the last of which reaches 2 ** layers days to either side. What lies farther
            away is brought near by the chains.
    """

    def __init__(self, n_states: int, width: int, layers: int) -> None:
        super().__init__()
        self.net = SequenceEncoder(4, 5 * n_states, width, layers)
        with torch.no_grad():
            self.net.last.weight.mul_(0.1)
            self.net.last.bias.zero_()

    def forward(self, dynamics: Dynamics, y: Tensor, present: Tensor | None = None) -> Smoother:
        """The smoother of returns (*, day) in units of their scale."""
        seen = torch.ones_like(y) if present is None else present.to(y)
        size = 0.5 * (y.square() + 0.05).log()  # the offset: zeros are frequent in some series
        steps = torch.stack([size, torch.tanh(y / 2), y.clamp(-6, 6) / 2, torch.ones_like(y)], -1)
        outputs = self.net(steps * seen.unsqueeze(-1)).mT * seen.unsqueeze(-2)
        a, log_b, bend, lift, widen = outputs.unflatten(-2, (5, -1)).unbind(-3)
        b = (_LOG_PRECISION + log_b).exp() * seen.unsqueeze(-2)
        first, phi = (-2 * dynamics.start()).exp().expand_as(a[..., :1]), dynamics.phi[:, None]
        none, ones = torch.zeros_like(a[..., 1:]), torch.ones_like(a[..., 1:])
        weight = (-2 * dynamics.log_sigma[:, None]).exp() * ones
        near = Smoother(Steps(first, phi * ones, none, none, weight), 3 * a, b).mean
        move, slope = dynamics.linear(near[..., :-1], y[..., :-1], seen[..., :-1])
        bend, lift, widen = (0.3 * part[..., :-1].tanh() for part in (bend, lift, widen))
        link = phi + slope + bend
        kick = move.loc + lift - link * near[..., :-1] - slope * (near.cumsum(-2) - near)[..., :-1]
        weight = (-2 * move.log_scale + widen).exp()
        return Smoother(Steps(first, link, slope, kick, weight), 3 * a, b)


class Nets(nn.Module):
    """All that is learnt.

    Args:
        n_states: how many.
        width: of hidden layers and channels.
        layers: of the encoder.
    """

    def __init__(self, n_states: int, width: int, layers: int) -> None:
        super().__init__()
        self.dynamics = Dynamics(n_states, width)
        self.encoder = Encoder(n_states, width, layers)
