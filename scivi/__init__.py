"""Fit a scientist's generative model by amortised variational inference, and say whether to believe it.

Public names are resolved on first use, so that ``scivi.analysis`` loads on a machine without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scivi import analysis, errors, models
    from scivi.inference.draws import draw, predict
    from scivi.inference.loop import fit, train
    from scivi.inference.many import fit_many
    from scivi.inference.nuts import nuts
    from scivi.inference.plan import Plan
    from scivi.inference.simulate import simulate
    from scivi.inference.state import Fit, load, save
    from scivi.inputs.fields import Field
    from scivi.laws import check
    from scivi.models.template import Template
    from scivi.sbc import calibrate

    __version__: str

__all__ = [
    "Field",
    "Fit",
    "Plan",
    "Template",
    "analysis",
    "calibrate",
    "check",
    "draw",
    "errors",
    "fit",
    "fit_many",
    "load",
    "models",
    "nuts",
    "predict",
    "save",
    "simulate",
    "train",
]

_HOMES = {
    "Field": "scivi.inputs.fields",
    "Template": "scivi.models.template",
    "Plan": "scivi.inference.plan",
    "Fit": "scivi.inference.state",
    "simulate": "scivi.inference.simulate",
    "calibrate": "scivi.sbc",
    "check": "scivi.laws",
    "fit": "scivi.inference.loop",
    "fit_many": "scivi.inference.many",
    "train": "scivi.inference.loop",
    "draw": "scivi.inference.draws",
    "predict": "scivi.inference.draws",
    "nuts": "scivi.inference.nuts",
    "save": "scivi.inference.state",
    "load": "scivi.inference.state",
}
_MODULES = ("analysis", "errors", "models")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("scivi.version").version()
    if name in _MODULES:
        return importlib.import_module(f"scivi.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f'module "scivi" has no attribute "{name}"; it has {", ".join(__all__)}.')


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
