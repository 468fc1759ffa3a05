"""``bind``: a template and an example of its data become a model/guide pair with parameters of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import _InverseTransform

from scivi.errors import TemplateError, listed
from scivi.inputs.batches import Batch, some_field
from scivi.models.guides import Family, MeanField
from scivi.models.mixtures import Adapted
from scivi.models.sites import Site, latent_sites, nesting_of, row_dim_of, sample_sites, value_of, weight_of
from scivi.models.template import Template

_PRIOR_RUNS = 15  # prior draws whose median starts a ready-made guide, as in Pyro's init_to_median
_STREAMS = {"init": 0, "order": 1, "sampling": 2, "draws": 3, "reach": 4}
_T = TypeVar("_T")


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named stream of randomness; streams of one seed are independent."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (_STREAMS[name] + 1) * 0xBF58476D1CE4E5B9) & (2**63 - 1)
    return mixed ^ (mixed >> 31)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run torch with a seed, and put the process's random states back afterwards."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Typed(Messenger):
    """Distributions of a model or guide in the dtype of its data.

    A plain number, as in ``Normal(0.0, 1.0)``, becomes a tensor of torch's default dtype, and so would the
    draws. A number of the prior has been rounded to that dtype by then: 6e-8 of it, if it is float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_sample(self, msg: dict[str, Any]) -> None:  # type: ignore[override]
        msg["fn"] = _in_dtype(msg["fn"], self.dtype)


def _in_dtype(found: Any, dtype: torch.dtype) -> Any:
    """A distribution whose floating tensors have a dtype; the very same where they have it already."""
    if isinstance(found, Tensor):
        return found.to(dtype) if found.is_floating_point() else found
    if type(found) in (list, tuple):
        parts = [_in_dtype(part, dtype) for part in found]
        return found if all(a is b for a, b in zip(parts, found, strict=True)) else type(found)(parts)
    if not isinstance(found, Distribution | Transform) or isinstance(found, nn.Module):
        return found  # a module's parameters are moved with the nets
    if isinstance(found, _InverseTransform):
        made = _in_dtype(found.inv, dtype)
        return found if made is found.inv else made.inv
    own = {name: value for name, value in vars(found).items() if name != "_inv"}  # a transform's inverse
    other = {name: _in_dtype(value, dtype) for name, value in own.items()}
    if all(value is own[name] for name, value in other.items()):
        return found
    # Constructors differ from family to family; what they leave in an instance does not.
    made = object.__new__(type(found))
    made.__dict__.update(other, **({"_inv": None} if isinstance(found, Transform) else {}))
    return made


def _typed(batch: Batch) -> Any:
    """A context in which distributions have the dtype of a batch's data."""
    dtype = some_field(batch).dtype
    needed = dtype.is_floating_point and dtype != torch.get_default_dtype()
    return _Typed(dtype) if needed else ExitStack()


class Nets(nn.Module):
    """Everything learnable of one fit: the template's own nets, and those of a ready-made guide."""

    def __init__(self, own: nn.Module | None, guide: nn.Module | None) -> None:
        super().__init__()
        self.own, self.guide = own, guide


class _Holder(nn.Module):
    """Lets ``functional_call`` put other values in place of the nets' parameters while a function runs."""

    def __init__(self, nets: nn.Module) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, run: Callable[[], _T]) -> _T:
        return run()


@dataclass(frozen=True, eq=False)
class Bound:
    """A model/guide pair with its own parameters.

    Args:
        template: what was bound.
        nets: everything learnable.
        sites: latent sites of the model.
        nesting: dims taken by plates.
        example: the rows it was bound to.
        weights: how many times observed sites count, of those that do not count once.
    """

    template: Template
    nets: Nets
    sites: tuple[Site, ...]
    nesting: int
    example: Batch
    weights: Mapping[str, float]

    def model(self, batch: Batch) -> None:
        """The template's generative story."""
        with _typed(batch):
            self.template.model(batch, self.template.prior, self.nets.own)

    def guide(self, batch: Batch) -> None:
        """The approximate posterior."""
        with _typed(batch):
            if self.nets.guide is not None:
                self.nets.guide(batch)
            else:
                self.template.guide(batch, self.template.prior, self.nets.own)

    def values(self, batch: Batch, trace: poutine.Trace) -> dict[str, Tensor]:
        """All that a run of the model has to report, what the template derives of it too, by name."""
        return _values(self.template, batch, self.nets.own, trace)

    def holding(self, parameters: Mapping[str, Tensor], run: Callable[[], _T]) -> _T:
        """Run a function with other values in place of the nets' parameters."""
        return torch.func.functional_call(
            _Holder(self.nets), {f"nets.{k}": v for k, v in parameters.items()}, (run,)
        )

    def frozen(self, run: Callable[[], _T]) -> _T:
        """Run a function through whose parameters no gradient flows."""
        return self.holding({k: v.detach() for k, v in self.nets.named_parameters()}, run)

    @property
    def amortised(self) -> bool:
        """Whether the guide can be asked about rows that the fit has not seen."""
        guide = self.nets.guide
        return guide is None or bool(guide.amortised)

    @property
    def local(self) -> tuple[Site, ...]:
        """Latent sites inside a row dim."""
        return tuple(s for s in self.sites if s.row_dim is not None)


def bind(template: Template, example: Batch, seed: int) -> Bound:
    """Make a model/guide pair with fresh parameters.

    Args:
        template: what to bind.
        example: a few rows of the data, or all; its ``sizes`` are those of the full data. It fixes the dtype
            and the device of the parameters.
        seed: of the initial values.

    Raises:
        TemplateError: the guide is no function and no family; the model cannot be run; sites and dims
            disagree.
    """
    some = some_field(example)
    with seeded(stream_seed(seed, "init"), some.device):
        sizes = dict(example.sizes)
        own = template.nets(sizes, template.prior) if template.nets is not None else None
        own = own.to(some.device, some.dtype) if own is not None else None
        runs = _prior_runs(template, example, own)
        sites, nesting = latent_sites(runs[0], sizes, template.row_dims), nesting_of(*runs)
        _check_sites(template, runs[0], sites, frozenset(_values(template, example, own, runs[0])))
        guide = _guide_module(template, runs, sites, nesting)
    nets = Nets(own, guide)
    return Bound(
        template, nets.to(some.device, some.dtype), sites, nesting, example, _weights(template, runs[0])
    )


def _weights(template: Template, run: poutine.Trace) -> dict[str, float]:
    """Of the sites that stand for what is reported: other row dims may weigh what they like."""
    others = template.row_dims[1:]
    seen = ((n, s) for n, s in sample_sites(run) if s["is_observed"] and row_dim_of(s, others) is None)
    return {name: weight for name, site in seen if abs((weight := weight_of(site)) - 1) > 1e-6}


def _prior_runs(template: Template, example: Batch, own: nn.Module | None) -> list[poutine.Trace]:
    n_runs = 1 if callable(template.guide) and not isinstance(template.guide, Family) else _PRIOR_RUNS
    traced = poutine.trace(template.model)
    with torch.no_grad(), _typed(example):
        return [traced.get_trace(example, template.prior, own) for _ in range(n_runs)]


def _guide_module(
    template: Template, runs: list[poutine.Trace], sites: tuple[Site, ...], nesting: int
) -> nn.Module | None:
    family = MeanField() if template.guide is None else template.guide
    family = Adapted() if family == "auto" else family
    if isinstance(family, Family):
        starts = {s.name: [value_of(run, s.name).detach() for run in runs] for s in sites}
        return family.build(sites, starts, nesting)
    if not callable(family):
        raise TemplateError(
            f'template "{template.name}": guide is {type(family).__name__}; it must be a function '
            f'(batch, prior, nets), a family such as MeanField(), "auto", or None.'
        )
    return None


@torch.no_grad()
def _values(template: Template, batch: Batch, own: nn.Module | None, run: poutine.Trace) -> dict[str, Tensor]:
    found = {name: value_of(run, name) for name, node in run.nodes.items() if node["type"] == "sample"}
    derive = template.derive
    return found if derive is None else {**found, **derive(batch, template.prior, own, found)}


def _check_sites(
    template: Template, run: poutine.Trace, sites: tuple[Site, ...], known: frozenset[str]
) -> None:
    scored = {name for name, node in run.nodes.items() if node["type"] == "sample"}
    faults = [
        f'dims lists "{name}", but the model has no such site' for name in template.dims if name not in known
    ]
    observed = set(template.observed)
    faults += [
        f'observed field "{name}" is never scored: call batch.observe("{name}", ...)'
        for name in observed - scored
    ]
    for site in sites:
        if site.name in template.dims and len(site.shape) != len(template.dims[site.name]):
            faults.append(
                f'site "{site.name}" has shape {site.shape}, but dims says {template.dims[site.name]}: '
                f"name one dim for each axis"
            )
    if faults:
        raise TemplateError(listed(f'template "{template.name}" and its model disagree:', sorted(faults)))
