"""``scivi study``: plan many fits in one file, run them anywhere, read them together.

What a word needs is imported inside it, so that ``scivi --help`` is quick.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scivi.files import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

    from scivi.studies.folder import Standing

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Plan many fits in one file, run them here or on Slurm, and read them together.",
    epilog="\b\nExample:\n  scivi study run study.toml --out results --jobs 4 --gather",
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a study.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
SHOWN = 40  # fits of a table in a terminal; those that run and those that failed come first
_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "vanished": "red", "stopped": "yellow"}


@app.command(
    epilog="\b\nExamples:\n  scivi study run study.toml --out results --jobs 2\n"
    "  scivi study run study.toml --out results --executor slurm --gather"
)
def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="TOML file.")],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder of the study; what is in it is not repeated.")],
    executor: Annotated[
        Literal["local", "slurm"], typer.Option(help="Processes of this machine, or Slurm arrays.")
    ] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Processes of the local executor.")] = 1,
    gather: Annotated[bool, typer.Option("--gather", help="Gather at the end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; errors only.")] = False,
) -> None:
    """Run every fit of a study that has not ended; the same file runs on a laptop and on a cluster."""
    from scivi.studies import executors
    from scivi.studies.manifest import expanded

    sys.path.insert(0, str(study.absolute().parent))
    manifest = expanded(study)
    if dry_run:
        for row in manifest.rows:
            typer.echo(f"{row.id}  {row.label}")
        return
    manifest.write(out)
    rows = executors.unfinished(out, manifest)
    if not quiet:
        typer.echo(f"{len(manifest.rows)} fits, {len(rows)} to run.")
    if executor == "slurm":
        executors.slurm(out, manifest, rows, gather)
        if not quiet:
            typer.echo(f"Submitted. scivi study watch {out}")
        return
    from rich.console import Console
    from rich.live import Live

    from scivi.studies.folder import standings
    from scivi.studies.task import AGAIN

    console = Console(stderr=True, quiet=quiet)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def look() -> None:
            if console.is_terminal:
                live.update(_table(standings(out, manifest)), refresh=True)

        try:
            if rows:
                executors.local(out, manifest, rows, jobs, look)
        except KeyboardInterrupt:
            typer.echo("Stopped; the same command goes on.", err=True)
            raise typer.Exit(AGAIN) from None
    if gather:
        from scivi.studies.gather import gather as gathered

        typer.echo(str(gathered(out)))
    if not quiet:
        _print(standings(out, manifest))


@app.command()
def status(folder: Folder, *, as_json: Json = False) -> None:
    """Say how every fit stands. Works without torch."""
    from scivi.studies.folder import standings

    found = standings(folder)
    if as_json:
        typer.echo(json.dumps([_plain(s) for s in found], indent=1))
    else:
        _print(found)


@app.command()
def watch(
    folder: Folder, *, every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0
) -> None:
    """Follow a study in the terminal, until all fits have ended. Works without torch."""
    from rich.console import Console
    from rich.live import Live

    from scivi.studies.folder import ENDED, standings
    from scivi.studies.manifest import Manifest

    manifest, console = Manifest.read(folder), Console()
    if not console.is_terminal:
        _print(standings(folder, manifest))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = standings(folder, manifest)
            live.update(_table(found), refresh=True)
            if all(s.state in ENDED for s in found):
                return
            try:
                time.sleep(every)
            except KeyboardInterrupt:
                return


@app.command()
def gather(
    folder: Folder,
    *,
    to: Annotated[Path | None, typer.Option("--out", help=".zarr or .nc; gathered.zarr in FOLDER.")] = None,
) -> None:
    """Put posteriors, diagnostics and verdicts into one file. Works without torch."""
    from scivi.studies.gather import gather as gathered

    typer.echo(str(gathered(folder, to)))


@app.command()
def report(
    folder: Folder,
    *,
    to: Annotated[Path | None, typer.Option("--out", help="The page; study.html in FOLDER.")] = None,
) -> None:
    """Say which fits can be trusted, side by side, the best held-out score first. Works without torch."""
    from rich.console import Console
    from rich.table import Table

    from scivi.studies.gather import diagnostics, page, ranked

    path = folder / "study.html" if to is None else to
    write_atomically(path, page(folder).encode())
    for key, some in ranked(diagnostics(folder)):
        table = Table("verdict", "score (nats)", "plan", "prior", "seed", title=key, title_justify="left")
        for k in range(some.sizes["fit"]):
            fit = some.isel(fit=k)
            score = float(fit["score"])
            shown = f"{score:.1f} ± {float(fit['score_se']):.1f}" if score == score else ""
            words = [str(fit[n].item()) for n in ("plan", "prior", "seed")]
            table.add_row(str(fit["verdict"].item()) or str(fit["state"].item()), shown, *words)
        Console().print(table)
    typer.echo(str(path))


@app.command()
def retry(
    folder: Folder,
    *,
    all_causes: Annotated[
        bool, typer.Option("--all", help="Also what failed by its data, its plan, or divergence.")
    ] = False,
    executor: Annotated[Literal["local", "slurm"], typer.Option(help="As in run.")] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Processes of the local executor.")] = 1,
) -> None:
    """Begin again what the machine made fail, and what vanished."""
    from scivi.studies import executors
    from scivi.studies.manifest import Manifest

    manifest = Manifest.read(folder)
    executors.retry(folder, manifest, all_causes=all_causes)
    rows = executors.unfinished(folder, manifest)
    typer.echo(f"{len(rows)} to run.")
    if rows and executor == "slurm":
        executors.slurm(folder, manifest, rows)
    elif rows:
        executors.local(folder, manifest, rows, jobs)


@app.command()
def cancel(folder: Folder) -> None:
    """Stop all fits that run or are queued; what they have is kept."""
    from scivi.studies import executors
    from scivi.studies.manifest import Manifest

    Manifest.read(folder)
    typer.echo(f"{executors.cancel(folder)} told to stop.")


@app.command()
def snakefile(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the study; made if absent.")],
    *,
    study: Annotated[Path | None, typer.Option(help="TOML file, if FOLDER holds no study yet.")] = None,
) -> None:
    """Write a Snakefile that runs the study, for sites that use Snakemake."""
    from scivi.studies import executors
    from scivi.studies.manifest import Manifest, expanded

    if study is not None:
        sys.path.insert(0, str(study.absolute().parent))
        expanded(study).write(folder)
    manifest = Manifest.read(folder)
    write_atomically(folder / "Snakefile", executors.snakefile(folder, manifest).encode())
    typer.echo(str(folder / "Snakefile"))


def _plain(standing: Standing) -> dict[str, Any]:
    row = standing.row
    axes = {name: getattr(row, name) for name in ("template", "data", "plan", "prior", "seed")}
    return {"id": row.id, "label": row.label, **axes, "state": standing.state, **standing.told} | {
        "last": dict(standing.last)
    }


def _print(found: list[Standing]) -> None:
    from rich.console import Console

    Console().print(_table(found))


def _table(found: list[Standing]) -> Table:
    """Counts above, fits below."""
    from rich.table import Column, Table

    from scivi.studies.folder import STATES

    counts = Counter(s.state for s in found)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    table = Table(Column("fit", no_wrap=True), title=told, title_justify="left")
    for name in ("state", "step", "steps/s", "nats/row"):
        table.add_column(name, no_wrap=True)
    table.add_column("verdict or cause", min_width=16)
    first = ("running", "failed", "vanished", "stopped")
    shown = sorted(found, key=lambda s: first.index(s.state) if s.state in first else len(first))[:SHOWN]
    for s in shown:
        step, wall = s.told.get("steps", s.last.get("step")), s.told.get("wall_s", s.last.get("wall_s"))
        rate = f"{step / wall:.1f}" if step and wall else ""
        objective = f"{s.last['objective']:.5g}" if "objective" in s.last else ""
        end = s.cause or str(s.told.get("verdict", ""))
        state = f"[{_COLOURS[s.state]}]{s.state}[/]" if s.state in _COLOURS else s.state
        table.add_row(
            s.row.label, state, str(step or ""), rate, objective, end.splitlines()[0] if end else ""
        )
    if len(found) > len(shown):
        table.caption = f"and {len(found) - len(shown)} more"
    return table
