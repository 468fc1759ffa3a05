"""Flows: a family over all latents together for posteriors that no normal fits, and conditional flows.

References:
    Durkan et al. 2019, NeurIPS, arXiv:1906.04032 (neural splines).
    Papamakarios et al. 2017, NeurIPS, arXiv:1705.07057 (masked affine layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyro.distributions as dist
from torch import Tensor, nn

from scivi.models.guides import (
    JointGuide,
    JointNormalGuide,
    Slot,
    Start,
    TrilAffine,
    refuse_discrete,
    slots_of,
)
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

    A normal of full rank, bent by the flow before it is placed. As ``JointNormal`` it needs the full batch if
    there are latents per row. Gradients of one draw are too noisy for it: take several particles and the
    estimator "stl", as ``Plan(particles=32, estimator="stl")``.

    Args:
        spec: shape of the flow.
        scale: starting standard deviation.
    """

    spec: FlowSpec = field(default_factory=lambda: FlowSpec(transforms=3))
    scale: float = 0.1

    def build(self, sites: Sequence[Site], starts: Start, nesting: int) -> nn.Module:
        """See ``Family.build``."""
        refuse_discrete(sites, "flow")
        slots, start = slots_of(sites, starts)
        return JointFlowGuide(slots, start, self.scale, self.spec, nesting)


class JointFlowGuide(JointGuide):
    """The module of ``Flow``: ``flow`` bends standard normal noise, ``normal`` says where it comes to lie."""

    def __init__(
        self, slots: Sequence[Slot], start: Tensor, scale: float, spec: FlowSpec, nesting: int
    ) -> None:
        super().__init__(slots, nesting)
        self.normal = JointNormalGuide(slots, start, scale, None, nesting)
        self.flow = conditional_flow(start.numel(), 0, spec)

    def distribution(self) -> dist.TorchDistribution:
        """The flow, carried to place and width."""
        place = TrilAffine(self.normal.loc, self.normal.scale_tril)
        return dist.TransformedDistribution(self.flow(None), [place])
