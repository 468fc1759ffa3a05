"""What the fits of a study have found, side by side: one tree, and one table of diagnostics and verdicts.

    /diagnostics             one entry for each fit along "fit", the study's axes as coordinates
    /<template>/<data>       posteriors, dims (plan, prior, seed, chain, draw, ...)

Written fit by fit: memory does not grow with their number. Loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from scivi.analysis import skeleton
from scivi.analysis.page import SIGN, TONE
from scivi.errors import StudyError
from scivi.files import put, remove
from scivi.studies.folder import Standing, place, standings
from scivi.studies.manifest import Manifest

VARIANTS = ("plan", "prior", "seed")
_NUMBERS = ("score", "score_se", "steps", "wall_s", "number")
_WORDS = ("verdict", "stopped", "cause", "message", "host")
_HEAD = ("verdict", "score", "plan", "prior", "seed", "steps", "seconds", "why")
_ZARR = 2  # zarr 3 has no settled way to store labels yet


def names(manifest: Manifest) -> tuple[dict[str, str], dict[str, str]]:
    """Short names of templates and data, as short as tells them apart."""
    templates = list(dict.fromkeys(row.template for row in manifest.rows))
    paths = list(dict.fromkeys(row.data for row in manifest.rows))
    modules = [t.replace(":", ".").split(".") for t in templates]
    return _short(modules, templates), _short([Path(p).parts for p in paths], paths)


def _short(parts: Sequence[Sequence[str]], whole: Sequence[str]) -> dict[str, str]:
    """The fewest last parts, joined by "-", that differ; "template" as a last part says nothing."""
    kept = [p[:-1] if len(p) > 1 and p[-1] == "template" else p for p in parts]
    for n in range(1, max(map(len, kept), default=1) + 1):
        found = ["-".join(p[-n:]) for p in kept]
        if len(set(found)) == len(found):
            return dict(zip(whole, found, strict=True))
    return dict(zip(whole, whole, strict=True))


def diagnostics(folder: Path, manifest: Manifest | None = None) -> xr.Dataset:
    """Dim fit: state, verdict, score (nats, by leave-one-out), steps, seconds, cause of failure, attempts.

    The study's axes are coordinates along fit.
    """
    manifest = manifest or Manifest.read(folder)
    found = standings(folder, manifest)
    templates, data = names(manifest)
    axes: dict[str, list[Any]] = {
        "template": [templates[s.row.template] for s in found],
        "data": [data[s.row.data] for s in found],
        **{name: [getattr(s.row, name) for s in found] for name in VARIANTS},
    }
    columns: dict[str, Any] = {"state": [s.state for s in found]}
    columns |= {name: np.array([s.told.get(name, np.nan) for s in found], float) for name in _NUMBERS}
    columns |= {name: [str(s.told.get(name) or "") for s in found] for name in _WORDS}
    columns["why"] = ["\n".join(s.told.get("why", [])) for s in found]
    coords = {"fit": [s.row.id for s in found]} | {n: ("fit", v) for n, v in axes.items()}
    table = xr.Dataset({n: ("fit", v) for n, v in columns.items()}, coords).rename(number="attempts")
    table["score"].attrs["units"] = table["score_se"].attrs["units"] = "nat"
    table["wall_s"].attrs["units"] = "s"
    return table


def gather(folder: Path, to: Path | None = None) -> Path:
    """Write posteriors and diagnostics of a study into one .zarr or .nc; what has not ended is missing.

    Args:
        folder: of the study.
        to: ``gathered.zarr`` in it if None.

    Returns:
        What was written.

    Raises:
        StudyError: the draws of fits that stand side by side have different sizes.
    """
    manifest = Manifest.read(folder)
    to = folder / "gathered.zarr" if to is None else to
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_name(f".{to.name}.{os.getpid()}.part")  # two may gather at the same time
    whole = aside.with_suffix(".nc")
    try:
        table = diagnostics(folder, manifest)
        table.to_zarr(aside, group="diagnostics", mode="w", consolidated=False, zarr_format=_ZARR)
        for group, fits in _groups(folder, manifest).items():
            _write_group(aside, group, fits, folder)
        import zarr

        zarr.consolidate_metadata(str(aside), zarr_format=_ZARR)
        if to.suffix == ".nc":
            with xr.open_datatree(aside, engine="zarr", chunks=None) as tree:
                tree.to_netcdf(whole, engine="h5netcdf")
            put(whole, to)
        else:
            put(aside, to)
    finally:
        remove(aside)
        remove(whole)
    return to


def _groups(folder: Path, manifest: Manifest) -> dict[str, list[Standing]]:
    """The fits that are done, by template and data."""
    templates, data = names(manifest)
    found: dict[str, list[Standing]] = {}
    for standing in standings(folder, manifest):
        if standing.state == "done":
            row = standing.row
            found.setdefault(f"{templates[row.template]}/{data[row.data]}", []).append(standing)
    return found


def _write_group(store: Path, group: str, fits: Sequence[Standing], folder: Path) -> None:
    """One template's posteriors of one data set, each fit at its place along the axes."""
    labels = {name: list(dict.fromkeys(getattr(s.row, name) for s in fits)) for name in VARIANTS}
    first = _posterior(folder, fits[0])
    _lay_out(store, group, first, labels)
    import zarr

    node: Any = zarr.open_group(str(store), path=group, mode="r+", zarr_format=_ZARR)
    for standing in fits:
        draws = _posterior(folder, standing)
        if dict(draws.sizes) != dict(first.sizes):
            raise StudyError(
                f'"{standing.row.label}" has draws of sizes {dict(draws.sizes)}, "{fits[0].row.label}" of '
                f"{dict(first.sizes)}: they cannot stand side by side."
            )
        at = tuple(labels[name].index(getattr(standing.row, name)) for name in VARIANTS)
        for name, variable in draws.data_vars.items():
            node[str(name)][at] = variable.values
        draws.close()


def _posterior(folder: Path, standing: Standing) -> xr.Dataset:
    fit = place(folder, standing.row)
    netcdf = fit / "posterior.nc"
    path, engine = (netcdf, "h5netcdf") if netcdf.exists() else (fit / "posterior.zarr", "zarr")
    return xr.open_dataset(path, group="posterior", engine=engine, decode_timedelta=False)


def _lay_out(store: Path, group: str, like: xr.Dataset, labels: Mapping[str, list[Any]]) -> None:
    """Empty arrays for all fits of a group, with labels: NaN where there is no fit."""
    import zarr

    coords = {**{n: c for n, c in like.coords.items() if n in like.dims}, **labels}
    xr.Dataset(coords=coords).to_zarr(store, group=group, mode="a", consolidated=False, zarr_format=_ZARR)
    node = zarr.open_group(str(store), path=group, mode="r+", zarr_format=_ZARR)
    for name, variable in like.data_vars.items():
        kind = variable.dtype if variable.dtype.kind == "f" else np.dtype("float64")
        array = node.create_array(
            str(name),
            shape=(*map(len, labels.values()), *variable.shape),
            chunks=(*(1 for _ in labels), *variable.shape),
            dtype=kind,
            fill_value=np.nan,
        )
        array.attrs.update({**variable.attrs, "_ARRAY_DIMENSIONS": [*VARIANTS, *map(str, variable.dims)]})


def ranked(table: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    """Fits of each template and data set, the best score first; those without one last."""
    keys = [f"{t} / {d}" for t, d in zip(table["template"].values, table["data"].values, strict=True)]
    for key in dict.fromkeys(keys):
        some = table.isel(fit=[k == key for k in keys])
        order = np.argsort(-some["score"].fillna(-np.inf).values, kind="stable")
        yield key, some.isel(fit=order)


def page(folder: Path) -> str:
    """A page that says which fits of a study can be trusted, side by side."""
    manifest = Manifest.read(folder)
    table = diagnostics(folder, manifest)
    counts = {s: int((table["state"] == s).sum()) for s in dict.fromkeys(table["state"].values)}
    top = "".join(f"<th>{name}</th>" for name in _HEAD)
    body = []
    for key, some in ranked(table):
        best = float(some["score"].max())
        lines = [_line(some.isel(fit=k), best, folder) for k in range(some.sizes["fit"])]
        grid = f"<table><tr>{top}</tr>{''.join(lines)}</table>"
        box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(key)}">{grid}</div>'
        body.append(f"<h2>{escape(key)}</h2>{box}")
    told = ", ".join(f"{n} {state}" for state, n in counts.items())
    note = "Score: expected log density of held-out entries in nats, with its standard error, less the best."
    return skeleton.PAGE.substitute(
        title=escape(manifest.name),
        verdict="study",
        style=skeleton.STYLE,
        subtitle=escape(f"{len(manifest.rows)} fits: {told}. {note}"),
        body="".join(body),
    )


def _line(fit: xr.Dataset, best: float, folder: Path) -> str:
    """A fit as a line of the page's table."""
    told = {str(name): np.asarray(value).item() for name, value in fit.variables.items()}
    word = told["verdict"] or told["state"]
    of_word = TONE.get(word, "")
    tone = {"good": "pass", "care": "warn", "bad": "fail"}.get(of_word, "mute")
    link = f"fits/{told['fit']}/report.html"
    shown = f'<a href="{link}">{escape(word)}</a>' if (folder / link).exists() else escape(word)
    shown = f'<span aria-hidden="true">{SIGN[of_word]}</span> {shown}' if of_word else shown
    why = told["why"] or ": ".join(filter(None, (told["cause"], told["message"])))
    cells = [
        f'<td class="mark {tone}">{shown}</td>',
        f'<td class="n">{_score(told["score"], best, told["score_se"])}</td>',
        *(f"<td>{escape(str(told[name]))}</td>" for name in VARIANTS),
        *(f'<td class="n">{_whole(told[name])}</td>' for name in ("steps", "wall_s")),
        f'<td class="soft">{"<br>".join(escape(why).splitlines())}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _score(value: float, best: float, error: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.1f} ± {error:.1f}" if value == best else f"{value - best:+.1f} ± {error:.1f}"


def _whole(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else ""
