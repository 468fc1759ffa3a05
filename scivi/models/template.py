"""``Template``: all that a researcher writes, as plain functions in one frozen value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn

from scivi.errors import TemplateError, listed
from scivi.inputs.fields import Field, check_fields
from scivi.models import showing

Story = Callable[[Any, Any, Any], None]


@dataclass(frozen=True)
class NoPrior:
    """The prior of a template whose model has no number to set."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A scientific model with its guide: what is fitted, never how.

    To vary one, use ``dataclasses.replace(template, prior=..., guide=...)``.

    Args:
        name: short name, shown in reports.
        fields: the table that the model needs, by field name.
        rows: the dim, or dims, whose entries may be minibatched, each on its own.
        model: ``(batch, prior, nets) -> None``; pyro sample sites, the generative story.
        dims: every latent, deterministic or derived site that is reported, with the names of its dims. A
            latent that is not listed is auxiliary: fitted, but not reported.
        guide: ``(batch, prior, nets) -> None``, or one of the families in ``scivi.models.guides``; "auto" is
            the one of ``scivi.models.mixtures``, placed by importance sampling until its weights are good;
            None is the mean-field normal over all latents.
        nets: ``(sizes, prior) -> nn.Module``, everything learnable, made afresh at each call; None if there
            is none.
        prior: frozen dataclass of the model's numbers, each with unit and source.
        simulate: ``(sizes, prior, generator) -> (table, truth)``, both ``xarray.Dataset``; None runs the
            model forward.
        derive: ``(batch, prior, nets, values) -> {name: tensor}``, what is reported besides sites: worked out
            of a draw once the fit is done, and so no burden on its steps. ``values`` are those of all sites,
            by name; draws lead, and what comes back has them in front of its ``dims``.
        units: unit of each reported site; "1" where absent.
        sizes: of dims that no field has: a number (a latent dimension), or the name of the dim that it
            equals.
        coords: labels along such dims.
        validate: ``(values, coords) -> faults``, from fields and the labels of all dims to sentences on what
            is wrong with the data; it sees what the fields' supports cannot say. It is asked even where
            entries are off their support, so that all faults are told at once. Of a table of more than a
            million entries it sees the fields without rows alone.
        plan: fields of a ``Plan`` that serve this template better than their defaults, such as JSON holds;
            ``fit`` takes them where it is given no plan.
        distinct: whether labels of rows must be distinct.
        made: if a function made it, that function as "module:name" and the settings, by keyword and such as
            JSON holds, with which it makes it again (but for its prior); so a saved fit finds its template.

    Raises:
        TemplateError: listing every fault.

    Notes:
        ``memo`` is where the engine keeps what it has compiled of this template, so that a second fit in the
        same process does not compile again. It is no part of the value: a copy begins with none.
    """

    memo: ClassVar[dict[Any, Any]]  # each template's own; as a class variable it is no field
    name: str
    fields: Mapping[str, Field]
    rows: str | tuple[str, ...]
    model: Story
    dims: Mapping[str, tuple[str, ...]]
    guide: Any = None
    nets: Callable[[Mapping[str, int], Any], nn.Module] | None = None
    prior: Any = NoPrior()
    simulate: Callable[..., tuple[Any, Any]] | None = None
    derive: Callable[[Any, Any, Any, Mapping[str, Any]], Mapping[str, Any]] | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    coords: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    validate: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]] | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    distinct: bool = False
    made: tuple[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        rows = (self.rows,) if isinstance(self.rows, str) else tuple(self.rows)
        object.__setattr__(self, "rows", rows)
        dims = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in self.dims.items()}
        for name, value in (
            ("fields", self.fields),
            ("dims", dims),
            ("units", self.units),
            ("sizes", self.sizes),
            ("plan", self.plan),
        ):
            object.__setattr__(self, name, MappingProxyType(dict(value)))
        object.__setattr__(self, "coords", MappingProxyType({k: tuple(v) for k, v in self.coords.items()}))
        object.__setattr__(self, "memo", {})
        faults = self._faults()
        if self.made is not None:
            maker, settings = self.made
            try:
                settings = json.loads(json.dumps(dict(settings), allow_nan=False))
            except (TypeError, ValueError) as error:
                faults.append(f'made: the settings of "{maker}" must be such as JSON holds: {error}')
            object.__setattr__(self, "made", (maker, MappingProxyType(dict(settings))))
        if faults:
            raise TemplateError(listed(f'template "{self.name}" cannot be used:', faults))

    def __repr__(self) -> str:
        return showing.short(self)

    def _repr_html_(self) -> str:
        return showing.page(self)

    def _faults(self) -> list[str]:
        faults = check_fields(self.fields)
        of_fields = {d for f in self.fields.values() if isinstance(f, Field) for d in f.dims}
        known = of_fields | set(self.sizes)
        if not self.rows:
            faults.append("rows names no dim")
        faults += [
            f'rows "{row}" is a dim of no field; fields have {sorted(of_fields)}'
            for row in self.rows
            if row not in of_fields
        ]
        for site, dims in self.dims.items():
            unknown = [d for d in dims if d not in known]
            if unknown:
                faults.append(
                    f'site "{site}" has dims {unknown} that no field has; give their size in sizes='
                )
            if {"chain", "draw"} & set(dims):
                faults.append(
                    f'site "{site}": "chain" and "draw" are added to every result; leave them out of dims'
                )
        faults += [
            f'unit given for "{site}", which dims does not list'
            for site in self.units
            if site not in self.dims
        ]
        faults += [
            f'site "{site}" lies along "{row}": only the first row dim, "{self.rows[0]}", is reported'
            for site, dims in self.dims.items()
            for row in self.rows[1:]
            if row in dims
        ]
        if not callable(self.model):
            faults.append("model must be a function")
        params = getattr(self.prior, "__dataclass_params__", None)
        if isinstance(self.prior, type) or params is None or not params.frozen:
            faults.append("prior must be a value of a frozen dataclass")
        return faults

    def all_sizes(self, of_data: Mapping[str, int]) -> dict[str, int]:
        """Sizes of all dims, those of the data and the template's own."""
        own = {d: of_data[n] if isinstance(n, str) else n for d, n in self.sizes.items()}
        return {**of_data, **own}

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the fields that the model scores."""
        return tuple(name for name, f in self.fields.items() if f.role == "observed")

    @property
    def told(self) -> dict[str, Field]:
        """The fields that a result holds: all but those along a row dim other than the first."""
        return {name: f for name, f in self.fields.items() if not set(f.dims) & set(self.rows[1:])}

    @property
    def row_dims(self) -> tuple[str, ...]:
        """The dims that may be minibatched, always as a tuple."""
        return tuple(self.rows)

    def prior_numbers(self) -> dict[str, Any]:
        """The prior as plain values, for provenance."""
        return asdict(self.prior)
