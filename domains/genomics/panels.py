"""What a CITE-seq experiment measured, the levels to begin at, and the numbers of the model of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from scivi.errors import TemplateError, listed


@dataclass(frozen=True)
class Panel:
    """Proteins and batches of an experiment, with levels read off its counts; ``cells.table`` makes one.

    Args:
        proteins: their names, in the order of the data.
        batches: names of the batches.
        log_ambient: log mean count that a protein has without being there, by batch and protein: of empty
            droplets, where there are any, else the low mode of the cells.
        log_fold: log ratio of the high mode to the low one, by protein.
        share: of the cells in the high mode, by protein.
        log_fractions: log of each gene's share of all RNA counts; empty if RNA was not counted.
        isotypes: those of the proteins that no cell carries.
        has_empties: whether empty droplets were counted.
    """

    proteins: tuple[str, ...]
    batches: tuple[str, ...]
    log_ambient: tuple[tuple[float, ...], ...]
    log_fold: tuple[float, ...]
    share: tuple[float, ...]
    log_fractions: tuple[float, ...] = ()
    isotypes: tuple[str, ...] = ()
    has_empties: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Panel:
        """From what ``to_dict`` gave, or JSON made of it."""
        names = [f.name for f in fields(cls)]
        faults = [f'there is no "{n}" in a panel' for n in table if n not in names]
        faults += [
            f'"{f.name}" is missing' for f in fields(cls) if f.default is MISSING and f.name not in table
        ]
        if faults:
            raise TemplateError(listed("the panel cannot be read:", faults))
        return cls(**{name: _tuples(value) for name, value in table.items()})

    def faults(self) -> list[str]:
        """What cannot be right in it."""
        k, t = len(self.batches), len(self.proteins)
        shapes = {
            "log_ambient": [len(row) for row in self.log_ambient] == [t] * k,
            "log_fold": len(self.log_fold) == t,
            "share": len(self.share) == t and all(0 < s < 1 for s in self.share),
        }
        faults = [
            f"{name} does not fit {k} batches and {t} proteins" for name, fits in shapes.items() if not fits
        ]
        levels = {"log_ambient": sum(self.log_ambient, ()), "log_fold": self.log_fold}
        levels["log_fractions"] = self.log_fractions
        faults += [f"{name} is not finite" for name, v in levels.items() if not all(map(math.isfinite, v))]
        for what, names in (("proteins", self.proteins), ("batches", self.batches)):
            if len(set(names)) < len(names) or not names:
                faults.append(f"the names of the {what} must be different, and there must be one")
        if unknown := sorted({*self.isotypes} - {*self.proteins}):
            faults.append(f"isotype controls that are no protein of the panel: {', '.join(unknown)}")
        return faults


@dataclass(frozen=True)
class Prior:
    """Numbers of the model; levels are natural logs of counts. Our choice where no source is given."""

    dispersion_sd: float = 1.5  # ln; of the genes' inverse dispersions about 1
    ambient_sd: float = 0.5  # ln count; of the background level about the panel's
    kappa: float = -0.5  # ln; a cell's background over that of an empty droplet (see docs/citeseq.md)
    kappa_sd: float = 0.5  # ln
    kappa_protein_sd: float = 0.2  # ln; by how much a protein's own differs from it
    scatter: float = 0.5  # ln; half-normal scale of the background's scatter, and of the droplets' factor
    # Centre of the proteins' inverse dispersions; 6.6 in Mule et al.'s empties.
    protein_dispersion: float = 6.0
    protein_dispersion_sd: float = 1.0  # ln
    efficiency_sd: float = 0.3  # ln; of a batch's efficiency of capture, protein by protein
    fold_sd: float = 0.5  # ln; by how much a protein's fold differs between cells' states, roughly
    logit_sd: float = 1.5  # ln; by how much the foreground's log odds do


@dataclass(frozen=True)
class Form:
    """What is fixed when a template is made.

    Args:
        panel: what was measured.
        n_latent: dimensions of a cell's state.
        hidden: width of the networks.
        dropout: share of hidden units that are left out while fitting.
        reference: number of batches of the fit that these cells are mapped onto; 0 if they stand alone.
    """

    panel: Panel
    n_latent: int
    hidden: int
    dropout: float
    reference: int

    @property
    def n_batches(self) -> int:
        """How many batches there are."""
        return len(self.panel.batches)

    @property
    def has_rna(self) -> bool:
        """Whether RNA was counted."""
        return bool(self.panel.log_fractions)

    @property
    def n_read(self) -> int:
        """Batches that the encoder can tell apart: none if there is but one."""
        known = self.reference or self.n_batches
        return known if known > 1 else 0

    @property
    def n_shifts(self) -> int:
        """Batches with a shift of their own in the decoders."""
        return self.n_batches if self.n_batches > 1 or self.reference else 0

    @property
    def has_efficiency(self) -> bool:
        """Whether efficiencies of capture can be told from levels of the ambient: by several batches."""
        return self.n_batches > 1


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
