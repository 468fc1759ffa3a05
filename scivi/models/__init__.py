"""The words that templates are written in."""

from scivi.inputs.batches import Batch
from scivi.inputs.fields import Field
from scivi.models import counts, distributions, guides, networks, normals
from scivi.models.guides import JointNormal, MeanField
from scivi.models.template import Template

__all__ = [
    "Batch",
    "Field",
    "JointNormal",
    "MeanField",
    "Template",
    "counts",
    "distributions",
    "guides",
    "networks",
    "normals",
]
