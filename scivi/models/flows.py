"""Flows: a family over all latents together for posteriors that no normal fits, and conditional flows.

References:
    Durkan et al. 2019, NeurIPS, arXiv:1906.04032 (neural splines).
    Papamakarios et al. 2017, NeurIPS, arXiv:1705.07057 (masked affine layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import pyro.distributions as dist
from torch import Tensor, nn

from scivi.models.guides import JointGuide, JointNormalGuide, Slot, Start, refuse_discrete, slots_of
from scivi.models.normals import TrilAffine
from scivi.models.sites import Site


@dataclass(frozen=True, slots=True)
class FlowSpec:
    """Shape of a flow: neural splines or masked affine layers of zuko.

    Args:
        kind: "spline" (Durkan et al. 2019) or "affine" (Papamakarios et al. 2017).
        transforms: layers.
        hidden: widths of the conditioner.
    """

    kind: Literal["spline", "affine"] = "spline"
    transforms: int = 2
    hidden: tuple[int, ...] = (64, 64)


def conditional_flow(features: int, context: int, spec: FlowSpec | None = None) -> nn.Module:
    """A zuko flow over ``features`` numbers given ``context``; ``flow_distribution`` samples from it."""
    import zuko

    spec = spec or FlowSpec()
    makers = {"spline": zuko.flows.NSF, "affine": zuko.flows.MAF}
    return makers[spec.kind](
        features, context=context, transforms=spec.transforms, hidden_features=spec.hidden
    )


def flow_distribution(flow: nn.Module, context: Tensor) -> dist.TorchDistribution:
    """The flow's distribution given a context (*batch, context), as pyro takes it."""
    from pyro.contrib.zuko import ZukoToPyro

    return ZukoToPyro(flow(context))


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow over all latents together on the unbounded scale, for one-sided, bent or flat posteriors.

    Standard normal noise z becomes the latents x in three stages: x = place(bend(shape(z))). The layers of
    ``spec`` give edges and plateaus, affine layers bend, a normal of full rank places. Splines reach from -5
    to 5 and act on the noise, which is always there; on the latents they would follow a curve but slowly.

    As ``JointNormal`` it needs the full batch if there are latents per row. Gradients of one draw are too
    noisy for it: take several particles and the estimator "stl", as ``Plan(particles=32, estimator="stl")``;
    with few its tails are short, and 128 cost little more where the model is cheap.

    Args:
        spec: the layers next to the noise.
        scale: starting standard deviation.
        bends: masked affine layers between them and the place; two, so that each latent can bend any other
            (our choice).
    """

    spec: FlowSpec = field(default_factory=lambda: FlowSpec(transforms=1))
    scale: float = 0.1
    bends: int = 2

    def build(self, sites: Sequence[Site], starts: Start, nesting: int) -> nn.Module:
        """See ``Family.build``."""
        refuse_discrete(sites, "flow")
        slots, start = slots_of(sites, starts)
        return JointFlowGuide(slots, start, self.scale, self.spec, nesting, self.bends)


class JointFlowGuide(JointGuide):
    """The module of ``Flow``: ``flow`` shapes and bends standard normal noise, ``normal`` places it."""

    def __init__(
        self, slots: Sequence[Slot], start: Tensor, scale: float, spec: FlowSpec, nesting: int, bends: int = 2
    ) -> None:
        super().__init__(slots, nesting)
        self.normal = JointNormalGuide(slots, start, scale, None, nesting)
        self.flow = _bent(start.numel(), spec, bends)

    def distribution(self) -> dist.TorchDistribution:
        """The flow, carried to place and width."""
        place = TrilAffine(self.normal.loc, self.normal.scale_tril)
        return dist.TransformedDistribution(self.flow(None), [place])


def _bent(features: int, spec: FlowSpec, bends: int) -> nn.Module:
    """The layers of ``spec`` after ``bends`` masked affine ones: zuko counts from the draw to the noise."""
    import zuko

    bend, shape = (
        cast(Any, conditional_flow(features, 0, each))
        for each in (replace(spec, kind="affine", transforms=bends), spec)
    )
    return zuko.lazy.Flow([*bend.transform.transforms, *shape.transform.transforms], shape.base)
