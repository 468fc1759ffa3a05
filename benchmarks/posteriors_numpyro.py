"""The models of ``posteriors`` as a user of NumPyro writes them; names are Stan's, b is diamonds' beta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import deterministic, sample
from numpyro.distributions import constraints

FLAT = dist.ImproperUniform(constraints.real, (), ())
FLAT_POSITIVE = dist.ImproperUniform(constraints.positive, (), ())


def flat(n: int) -> Any:
    """Of so many numbers."""
    return dist.ImproperUniform(constraints.real_vector, (), (n,))


def linear(y: Any, x: Any) -> None:
    """Linear regression."""
    beta, sigma = sample("beta", flat(x.shape[-1])), sample("sigma", FLAT_POSITIVE)
    sample("y", dist.Normal(x @ beta, sigma), obs=y)


def kidscore(y: Any, x: Any) -> None:
    """The same with a prior of sigma."""
    beta, sigma = sample("beta", flat(x.shape[-1])), sample("sigma", dist.HalfCauchy(2.5))
    sample("y", dist.Normal(x @ beta, sigma), obs=y)


def autoregression(y: Any, x: Any) -> None:
    """Of order K."""
    alpha = sample("alpha", dist.Normal(0.0, 10.0))
    beta = sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[-1]]).to_event(1))
    sigma = sample("sigma", dist.HalfCauchy(2.5))
    sample("y", dist.Normal(alpha + x @ beta, sigma), obs=y)


def diamonds(y: Any, x: Any) -> None:
    """Linear regression on centred X."""
    b = sample("b", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    intercept = sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


def schools(y: Any, sd: Any) -> None:
    """Not centred."""
    mu, tau = sample("mu", dist.Normal(0.0, 5.0)), sample("tau", dist.HalfCauchy(5.0))
    z = sample("z", dist.Normal(0.0, 1.0).expand([len(sd)]).to_event(1))
    sample("y", dist.Normal(deterministic("theta", mu + tau * z), sd), obs=y)


def garch(y: Any, sigma1: Any) -> None:
    """Order (1, 1)."""
    mu, alpha0 = sample("mu", FLAT), sample("alpha0", FLAT_POSITIVE)
    alpha1 = sample("alpha1", dist.Beta(1.0, 2.0))
    beta1 = deterministic("beta1", (1 - alpha1) * sample("share", dist.Uniform(0.0, 1.0)))

    def step(variance: Any, before: Any) -> tuple[Any, Any]:
        after = alpha0 + alpha1 * (before - mu) ** 2 + beta1 * variance
        return after, after

    first = jnp.square(sigma1[0])
    rest = jax.lax.scan(step, first, y[:-1])[1]
    sample("y", dist.Normal(mu, jnp.sqrt(jnp.concatenate([first[None], rest]))), obs=y)


def gaussian_process(y: Any, x: Any) -> None:
    """Squared exponential."""
    rho = sample("rho", dist.Gamma(25.0, 4.0))
    alpha, sigma = sample("alpha", dist.HalfNormal(2.0)), sample("sigma", dist.HalfNormal(1.0))
    away = x[0][:, None] - x[0]
    covariance = alpha**2 * jnp.exp(-(away**2) / (2 * rho**2)) + sigma * jnp.eye(x.shape[-1])
    sample("y", dist.MultivariateNormal(0.0, covariance), obs=y[0])


def mixture(y: Any) -> None:
    """Of two normals; the constant by which a prior of sorted values is larger does not matter."""
    mu = sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    sample("prior of mu", dist.Normal(mu, 2.0).to_event(1), obs=jnp.zeros(2))
    sigma = sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = sample("theta", dist.Beta(5.0, 5.0))
    chances = dist.Categorical(jnp.stack([theta, 1 - theta]))
    sample("y", dist.MixtureSameFamily(chances, dist.Normal(mu, sigma)), obs=y)


def hidden_states(y: Any) -> None:
    """Two states, summed out."""
    mu = sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    sample("prior of mu", dist.Normal(mu, 1.0).to_event(1), obs=jnp.array([3.0, 10.0]))
    rows = [sample(f"theta{k}", dist.Dirichlet(jnp.ones(2))) for k in (1, 2)]
    transition = jnp.log(jnp.stack(rows))
    seen = dist.Normal(mu, 1.0).log_prob(y[0][:, None])

    def step(state: Any, now: Any) -> tuple[Any, None]:
        return jax.nn.logsumexp(state[:, None] + transition, 0) + now, None

    last = jax.lax.scan(step, seen[0], seen[1:])[0]
    sample("y", dist.Delta(0.0, log_density=jax.nn.logsumexp(last)), obs=0.0)


OF: Mapping[str, Callable[..., None]] = {
    "eight_schools-eight_schools_noncentered": schools,
    "kidiq-kidscore_interaction": kidscore,
    "arK-arK": autoregression,
    "garch-garch11": garch,
    "gp_pois_regr-gp_regr": gaussian_process,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "hmm_example-hmm_example": hidden_states,
    "diamonds-diamonds": diamonds,
    "nes1980-nes": linear,
    "mesquite-logmesquite": linear,
    "earnings-earn_height": linear,
}
