"""The rates of each locus: what they depend on, and what its own reads tell of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from domains.genomics import transmission
from domains.genomics.reads import Errors, seen
from domains.genomics.transmission import Reproduction
from scivi.models import Batch, sum_product
from scivi.models.sum_product import Matrix, Tree, Vector

RATES = ("gain", "loss")
LEAST = 0.7  # nats: no rate is above a half, where gain and loss would change names (our choice)
NODES = 4  # in each of two dimensions, of the quadrature behind the guide (our choice)


@dataclass(frozen=True)
class Form:
    """What is fixed when a template is made.

    Args:
        tree: the pedigree, collapsed to what the reads can tell apart.
        reproduction: how a generation passes on.
        contexts: of the loci.
        annotations: names of fields that shift the rates.
        heterogeneous: whether loci of one context differ.
        equilibrium: whether the founder's states are those that the rates lead to in the end.
        most_reads: the most reads of a sample at a locus.
    """

    tree: Tree
    reproduction: Reproduction
    contexts: tuple[str, ...]
    annotations: tuple[str, ...]
    heterogeneous: bool
    equilibrium: bool
    most_reads: int

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the genotypes."""
        return transmission.states(self.reproduction)


def event(value: Tensor, dims: int) -> Tensor:
    """A global value as (*draws, *event): without the place that the plate of loci leaves in its shape."""
    return value.squeeze(-1 - dims) if value.dim() > dims else value


@dataclass(frozen=True)
class Loci:
    """What the rates of a batch's loci depend on.

    Args:
        member: 1 where a locus is of a context, (contexts, loci).
        annotation: (annotations, loci), or None.
    """

    member: Tensor
    annotation: Tensor | None

    @classmethod
    def of(cls, batch: Batch, form: Form) -> Loci:
        """Those of a batch."""
        places = torch.arange(len(form.contexts), device=batch.total.device)
        member = (batch.context == places[:, None]).to(batch.total.dtype)
        values = [batch.values[name] for name in form.annotations]
        return cls(member, torch.stack(values) if values else None)

    def each(self, by_context: Tensor) -> Tensor:
        """The value of each locus's context: from (*, contexts) to (*, loci)."""
        return (by_context.unsqueeze(-1) * self.member).sum(-2)

    def log_rate(self, values: Mapping[str, Tensor], name: str, z: Tensor | None) -> Tensor:
        """Natural log of the rate "gain" or "loss" of each locus, ln(1 / generation), (*, loci)."""
        rate = self.each(event(values[f"log_{name}"], 1))
        if self.annotation is not None:
            effect = event(values[f"{name}_effect"], 1)
            rate = rate + (effect.unsqueeze(-1) * self.annotation).sum(-2)
        return rate if z is None else rate + values[f"{name}_sigma"] * z


def passed_on(
    loci: Loci, values: Mapping[str, Tensor], z: Sequence[Tensor] | None, form: Form
) -> tuple[Matrix, Vector]:
    """One generation and the founder's states, at each locus, whose z of gain and of loss are given."""
    gain, loss = (
        loci.log_rate(values, name, None if z is None else z[k]).clamp_max(-LEAST).exp()
        for k, name in enumerate(RATES)
    )
    step = transmission.step(form.reproduction, gain, loss)
    if form.equilibrium:
        return step, transmission.equilibrium(form.reproduction, gain, loss)
    founder = event(values["founder"], 2)
    return step, tuple(loci.each(founder[..., k]) for k in range(len(form.states)))


def completed(values: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    """The latents that loci share, and what follows from them: ln of the median rates, chances of errors."""
    found = dict(values)
    for name in RATES:
        level = values[f"log_mean_{name}"]
        spread = values[f"{name}_sigma"].square().unsqueeze(-1) / 2 if form.heterogeneous else 0.0
        found[f"log_{name}"] = level - spread
    # none above a half, where reads would tell the opposite of what they say
    return found | {name: values[f"{name}_doubled"] / 2 for name in ("nonconversion", "inappropriate")}


def errors_of(values: Mapping[str, Tensor]) -> Errors:
    """The errors of sequencing, in the shapes that reads take them in."""
    shared = [values[name] for name in ("inappropriate", "overdispersion")]
    return Errors(event(values["nonconversion"], 1), *(v if v.dim() else v.unsqueeze(0) for v in shared))


def moments(batch: Batch, values: Mapping[str, Tensor], form: Form) -> tuple[Tensor, Tensor]:
    """Mean of z, (*, loci, 2), and Cholesky factor of its covariance, given all that loci share.

    They are those of the posterior where there is one draw of what loci share. Of many draws the reads'
    part is worked out once, at their mean, and joined with each draw's own prior.
    """
    loci = Loci.of(batch, form)
    n_draws = event(values["log_gain"], 1).dim() - 1
    if not n_draws:
        return _of_one_draw(batch, loci, values, form)
    at = {name: value.flatten(0, n_draws - 1).mean(0).squeeze(0) for name, value in values.items()}
    mean, tril = _of_one_draw(batch, loci, at, form)
    expected, sigma = _prior_of(loci, at)
    inverse = torch.cholesky_inverse(tril)
    precision = (inverse - torch.eye(2).to(inverse)) / (sigma.unsqueeze(-1) * sigma.unsqueeze(-2))
    slope = (inverse @ mean.unsqueeze(-1)).squeeze(-1) / sigma
    here, scatter = _prior_of(loci, values)
    information = slope - (precision @ (here - expected).unsqueeze(-1)).squeeze(-1)
    joint = precision * scatter.unsqueeze(-1) * scatter.unsqueeze(-2) + torch.eye(2).to(precision)
    tril = _inverse_cholesky(joint)
    mean = tril @ (tril.mT @ (scatter * information).unsqueeze(-1))
    return mean.squeeze(-1), tril


def _prior_of(loci: Loci, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Expected log rates (*, loci, 2), and their scatter, (2,) or (draws, 1, 2)."""
    expected = torch.stack([loci.log_rate(values, name, None) for name in RATES], -1)
    return expected, torch.stack([values[f"{name}_sigma"] for name in RATES], -1)


def _of_one_draw(batch: Batch, loci: Loci, values: Mapping[str, Tensor], form: Form) -> tuple[Tensor, Tensor]:
    """Mean of z, (loci, 2), and Cholesky factor of its covariance, given one draw of what loci share.

    Twice by Gauss-Hermite quadrature: on nodes of the prior, then on nodes placed by what these gave, for
    loci of which many events tell much.
    """
    mask = batch.observed_mask.get("methylated")
    total = batch.total if mask is None else batch.total * mask
    methylated = torch.minimum(batch.methylated, total)
    given = seen(methylated, total, errors_of(values), len(form.states), form.most_reads)
    x, w = np.polynomial.hermite_e.hermegauss(NODES)
    nodes = [total.new_tensor(e.reshape(-1, 1)) for e in np.meshgrid(x, x, indexing="ij")]
    log_weight = total.new_tensor(np.log(np.multiply.outer(w, w) / w.sum() ** 2).reshape(-1, 1))
    # coordinates apart: a compiler makes a single loop of them and the tree
    z, tilt = nodes, torch.zeros_like(log_weight)
    for last in (False, True):
        log_p = sum_product.log_likelihood(form.tree, given, *passed_on(loci, values, z, form))
        weight = torch.softmax(log_p + tilt + log_weight, 0)
        mean = [(weight * e).sum(0) for e in z]
        u, v = (e - m for e, m in zip(z, mean, strict=True))
        a = (weight * u.square()).sum(0).clamp_min(0.01).sqrt()  # no variance is below .01
        b = (weight * u * v).sum(0) / a
        c = ((weight * v.square()).sum(0) - b.square()).clamp_min(0.01).sqrt()
        if not last:
            z = [mean[0] + a * nodes[0], mean[1] + b * nodes[0] + c * nodes[1]]
            tilt = 0.5 * (nodes[0].square() + nodes[1].square() - z[0].square() - z[1].square())
    return torch.stack(mean, -1), _lower(a, b, c)


def _inverse_cholesky(precision: Tensor) -> Tensor:
    """Cholesky factor of the inverse of 2 x 2 matrices, whose eigenvalues are held above .2.

    A likelihood that is no normal can seem to widen the prior: where the scatter is larger than at the point
    where that was found, by more than there is.
    """
    half = 0.5 * (precision[..., 0, 0] + precision[..., 1, 1])
    differ = 0.5 * (precision[..., 0, 0] - precision[..., 1, 1])
    least = half - (differ.square() + precision[..., 0, 1].square()).sqrt()
    lift = (0.2 - least).clamp_min(0.0)
    p, q, r = precision[..., 0, 0] + lift, precision[..., 0, 1], precision[..., 1, 1] + lift
    a = (r / (p * r - q * q)).sqrt()
    return _lower(a, -q / r * a, r.rsqrt())


def _lower(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, torch.zeros_like(a)], -1), torch.stack([b, c], -1)], -2)
