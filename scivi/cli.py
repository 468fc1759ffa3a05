"""The command line: arguments become the verbs of the library, and nothing else.

What a verb needs is imported inside it, so that ``--help`` is quick and ``scivi report`` runs without torch.
Longer than 400 lines because fourteen signatures with their help are most of it.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from scivi.catalogue import OURS, offers
from scivi.errors import FitError, SciVIError, missing_extra
from scivi.extras import extra_of
from scivi.inference.plan import Plan
from scivi.studies import commands as studies
from scivi.studies import job as jobs
from scivi.summaries import calibration, described, lines, sizes_of, tree_at

ERROR, NOT_TRUSTED, STOPPED_BY_SIGNAL = 1, 3, 75  # 2 is wrong usage; 75 is "try again" in sysexits.h


class _Commands(TyperGroup):
    """Commands whose errors are messages, not tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        if str(Path.cwd()) not in sys.path:  # for templates in the folder one is in
            sys.path.insert(0, str(Path.cwd()))
        try:
            return super().invoke(ctx)
        except SciVIError as error:
            typer.echo(f"scivi: {error}", err=True)
            raise typer.Exit(NOT_TRUSTED if isinstance(error, FitError) else ERROR) from None
        except ModuleNotFoundError as error:
            if (extra := extra_of(error.name or "")) is None:
                raise
            typer.echo(f"scivi: {missing_extra(str(error.name), extra)}", err=True)
            raise typer.Exit(ERROR) from None
        except OSError as error:  # a full disk, a folder that cannot be written
            where = f' "{error.filename}"' if error.filename else ""
            typer.echo(f"scivi: {error.strerror or error}{where and ':'}{where}", err=True)
            raise typer.Exit(ERROR) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fit a scientific model by amortised variational inference, and say whether to believe the fit.",
    epilog="\b\nExit codes:\n  0   done\n  1   data, plan or template unusable, or a law broken\n"
    "  2   wrong usage\n"
    "  3   the fit diverged, or, with --strict, the verdict is: do not trust\n"
    "  75  stopped by a signal; go on with --resume\n\n"
    "\b\nExample:\n"
    "  scivi fit domains.astrophysics.photons:template data/chandra_ic2395.nc --out results/ic2395",
)


app.add_typer(studies.app, name="study")


def _repeated(flag: str, metavar: str, help: str) -> Any:
    """An option that may be given several times."""
    return typer.Option(flag, default_factory=list, show_default=False, metavar=metavar, help=help)


CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Plan).items() if get_origin(hint) is Literal}


def _one_of(name: str) -> Any:
    """An option that takes one of the words which a field of the plan allows."""
    return typer.Option(show_default=False, help=f"{', '.join(CHOICES[name])}.")


_OTHERS = "; ".join(f"{name}: {', '.join(CHOICES[name])}" for name in ("optimiser", "schedule"))

_seed = typer.Option(min=0, help="Seed of every random number.")

TemplateName = Annotated[
    str,
    typer.Argument(metavar="TEMPLATE", help='As "module:name": a template, or a function from DATA to one.'),
]
Data = Annotated[Path, typer.Argument(metavar="DATA", help=".h5ad, .nc, .zarr, .csv, .tsv, .ecsv or .fits.")]
Out = Annotated[Path, typer.Option("--out", help="File to write: .nc, or .zarr if draws exceed memory.")]
Prior = Annotated[list[str], _repeated("--prior", "NAME=VALUE", "Change a number of the prior.")]
Make = Annotated[
    list[str], _repeated("--make", "NAME=VALUE", "Argument of a function TEMPLATE, such as guide=flow.")
]
Dim = Annotated[list[str], _repeated("--dim", "OLD=NEW", "Rename a dim of the data.")]
Column = Annotated[list[str], _repeated("--column", "FIELD=COLUMN", "Where a field is: counts=X.")]
Select = Annotated[list[str], _repeated("--select", "DIM=A,B", "Keep these labels of a dim.")]
Draws = Annotated[int, typer.Option(min=1, help="Posterior draws.")]
Seed = Annotated[int, _seed]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary; errors only.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 3 if the verdict is: do not trust.")]


@app.command(
    epilog="\b\nExamples:\n  scivi fit domains.astrophysics.photons:template field.nc --out results/field\n"
    "  scivi fit my_model:schools schools.csv --out results/schools --steps 2000 --prior effect_sd=10\n"
    "  scivi fit domains.astrophysics.photons:template field.ecsv --out results/field \\\n"
    "      --dim src=source --select band=soft,hard --set clip=none"
)
def fit(
    ctx: typer.Context,
    template: TemplateName,
    data: Data,
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that the fit leaves.")],
    plan: Annotated[Path | None, typer.Option(help="Plan as TOML; flags and --set override it.")] = None,
    steps: Annotated[int | None, typer.Option(help="The most steps taken.")] = None,
    rows_per_batch: Annotated[str | None, typer.Option(help='Rows in a minibatch, or "all".')] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    estimator: Annotated[str | None, _one_of("estimator")] = None,
    particles: Annotated[int | None, typer.Option(help="Guide samples per step.")] = None,
    seed: Annotated[int | None, _seed] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, _one_of("dtype")] = None,
    compile: Annotated[str | None, _one_of("compile")] = None,
    setting: Annotated[list[str], _repeated("--set", "NAME=VALUE", f"Any field of the plan ({_OTHERS}).")],
    make: Make,
    prior: Prior,
    dim: Dim,
    column: Column,
    select: Select,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1, help="Posterior draws; 1000, or as few as 100 where rows are many.", show_default=False
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html and figures.")] = True,
    track: Annotated[
        list[str],
        _repeated("--track", "TRACKER", "tensorboard, mlflow or prometheus; =PLACE if not in --out."),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if any.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier fit in --out.")] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that share each minibatch.")
    ] = 1,
    strict: Strict = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a template to data; leave fit, history, posterior, figures and report in a folder."""
    # Longer than 60 lines because each flag of the command is a parameter with its words of help.
    how = _changes(setting, ctx.params)
    base = None if plan is None else Plan.from_toml(plan).to_dict()
    job = _job(template, data, prior, dim, column, select, make, plan=how, base=base, draws=draws)
    beside: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "report": report, "track": track}
    device = job.plan_of({}).device  # a plan that cannot be used is told before anything is begun
    from scivi.inference.processes import launch, place

    if processes > 1 and place(os.environ) is None:
        raise typer.Exit(launch(processes, sys.argv[1:]))
    from scivi.inference.team import group

    with group(device) as team:
        summary = jobs.run(job, out, **beside, progress=not quiet)
    if team.rank:  # the first process speaks
        return
    if summary["stopped"] == "signal":
        _tell({**summary, "next": "the same command with --resume"}, as_json, quiet)
        raise typer.Exit(STOPPED_BY_SIGNAL)
    _tell(summary, as_json, quiet)
    _exit_unless_fit(summary, strict)


@app.command(
    "predict",
    help="As draw, with the posterior predictive; missing entries of the data are forecast.",
    epilog="\b\nExample:\n  scivi predict results/field field_with_gaps.nc --out forecasts.nc",
)
@app.command(epilog="\b\nExample:\n  scivi draw results/field new_sources.nc --out new_posterior.nc")
def draw(
    ctx: typer.Context,
    fit: Annotated[Path, typer.Argument(metavar="FIT", help="Folder of a fit.")],
    data: Data,
    *,
    out: Out,
    more: Annotated[list[Path], _repeated("--with", "FIT", "One more fit, as a chain of its own.")],
    template: Annotated[
        str | None, typer.Option(help="Its TEMPLATE, as fit takes it, if the fit does not say.")
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Improve poorly approximated rows one by one.")
    ] = False,
    draws: Draws = 1000,
    seed: Seed = 0,
    dim: Dim,
    column: Column,
    select: Select,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw the posterior of rows, seen in the fit or new."""
    from scivi.inference import draws as verbs
    from scivi.inference.state import load

    what = source = None
    job = _job(template or "", data, [], dim, column, select)
    if template is not None:
        what, source = job.opened()
    fits = [load(_fit_folder(folder), template=what) for folder in (fit, *more)]
    if source is None:
        source = jobs.opened(fits[0].template, data, job.dims, job.columns, job.select)
    drawn = verbs.predict if ctx.info_name == "predict" else verbs.draw
    how: dict[str, Any] = {"seed": seed, "to": out, "refine": refine, "progress": not quiet}
    tree = drawn(fits if len(fits) > 1 else fits[0], source, draws, **how)
    _tell({"posterior": str(out), "sizes": sizes_of(tree["posterior"])}, as_json, quiet)


@app.command(
    epilog="\b\nExamples:\n"
    "  scivi nuts domains.astrophysics.photons:template field.nc --rows 1000 --out nuts.nc\n"
    "  scivi report results/field/posterior.nc --reference nuts.nc"
)
def nuts(
    template: TemplateName,
    data: Data,
    *,
    out: Out,
    fit: Annotated[
        Path | None, typer.Option(help="A fit: chains start at it, its networks are held fixed.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Take a seeded subset of so many rows.")] = None,
    draws: Draws = 1000,
    warmup: Annotated[
        int | None, typer.Option(min=1, help="Warm-up draws of each chain; 500, or 200 with a fit.")
    ] = None,
    chains: Annotated[int, typer.Option(min=1, help="Number of chains.")] = 4,
    backend: Annotated[
        str, typer.Option(help="nutpie, pyro, or auto: nutpie where it is installed.")
    ] = "auto",
    seed: Seed = 0,
    prior: Prior,
    dim: Dim,
    column: Column,
    select: Select,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample the same model by NUTS, to compare."""
    what, source = _job(template, data, prior, dim, column, select).opened()
    from scivi.inference.nuts import nuts as sampled
    from scivi.inference.state import load

    given = None if fit is None else load(_fit_folder(fit), template=what)
    how: dict[str, Any] = {"draws": draws, "warmup": warmup, "chains": chains, "seed": seed, "rows": rows}
    tree = sampled(what, source, given=given, backend=backend, **how, to=out, progress=not quiet)
    _tell({"posterior": str(out), "sizes": sizes_of(tree["posterior"])}, as_json, quiet)


@app.command(
    epilog="\b\nExample:\n"
    "  scivi simulate domains.astrophysics.photons:template --size source=1000 --out sim.nc"
)
def simulate(
    template: Annotated[str, typer.Argument(metavar="TEMPLATE", help='As "module:name".')],
    *,
    out: Annotated[
        Path, typer.Option("--out", help="File for the table; NAME_truth beside it has the truth.")
    ],
    size: Annotated[list[str], _repeated("--size", "DIM=N", "Size of a dim; one for each dim.")],
    seed: Seed = 0,
    prior: Prior,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate data from a template's model, with the truth."""
    what = jobs.template_called(template, _values(prior, "--prior"))
    sizes = _values(size, "--size")
    if wrong := [f"--size {name}={n}" for name, n in sizes.items() if not isinstance(n, int) or n < 1]:
        raise typer.BadParameter(f"{', '.join(wrong)}: a size is a whole number of at least 1.")
    from scivi.inference.simulate import simulate as simulated
    from scivi.inference.trees import save_tree

    table, truth = simulated(what, sizes, seed=seed)
    beside = out.with_name(f"{out.stem}_truth{out.suffix}")
    save_tree(table, out)
    save_tree(truth, beside)
    _tell({"table": str(out), "truth": str(beside), "sizes": sizes_of(table)}, as_json, quiet)


@app.command(epilog="\b\nExample:\n  scivi report results/field/posterior.nc --reference nuts.nc")
def report(
    posterior: Annotated[Path, typer.Argument(metavar="POSTERIOR", help="From fit, draw, predict or nuts.")],
    *,
    reference: Annotated[
        Path | None, typer.Option(help="A posterior to compare with, from NUTS say.")
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="The truth, if the data are simulated.")] = None,
    to: Annotated[
        Path | None, typer.Option(help="The page; by default report.html beside POSTERIOR.")
    ] = None,
    strict: Strict = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge a posterior: one page, one verdict, and why."""
    page = posterior.with_name("report.html") if to is None else to
    summary = jobs.judge(
        tree_at(posterior),
        page,
        reference=None if reference is None else tree_at(reference),
        truth=None if truth is None else tree_at(truth).to_dataset(),
    )
    _tell(summary, as_json, quiet)
    _exit_unless_fit(summary, strict)


@app.command(epilog="\b\nExample:\n  scivi check my_model:schools --data schools.csv")
def check(
    template: TemplateName,
    *,
    data: Annotated[
        Path | None, typer.Option(help="Where given fields come from; else from their support.")
    ] = None,
    seed: Seed = 0,
    prior: Prior,
    dim: Dim,
    column: Column,
    select: Select,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold a template to the laws that every template obeys; exit with 1 if it breaks one."""
    if data is None:
        what, source = jobs.template_called(template, _values(prior, "--prior")), None
    else:
        what, source = _job(template, data, prior, dim, column, select).opened()
    from scivi.laws import check as checked

    table = checked(what, like=source, seed=seed)
    columns = [table[name].values.tolist() for name in ("law", "ok", "detail")]
    laws = [{"law": law, "ok": ok, "detail": detail} for law, ok, detail in zip(*columns, strict=True)]
    if as_json:
        typer.echo(json.dumps(laws, indent=2))
    elif not quiet:
        for law in laws:
            typer.echo(f"{'ok ' if law['ok'] else 'NOT'}  {law['law']}: {law['detail']}")
    if not all(law["ok"] for law in laws):
        raise typer.Exit(ERROR)


@app.command(
    epilog="\b\nExample:\n"
    "  scivi sbc domains.astrophysics.photons:template --data field.nc --fits 300 --out ranks.nc"
)
def sbc(
    template: TemplateName,
    *,
    data: Annotated[Path, typer.Option(help="Data whose sizes, given fields and gaps are simulated.")],
    out: Annotated[Path, typer.Option("--out", help="File for the ranks, .nc; beside it a figure, .png.")],
    fits: Annotated[int, typer.Option(min=2, help="Data sets that are simulated and fitted.")] = 300,
    new_rows: Annotated[
        int,
        typer.Option(min=0, help="In place of many fits: one, and ranks of so many rows it has not seen."),
    ] = 0,
    draws: Annotated[int, typer.Option(min=99, help="Posterior draws of each fit.")] = 999,
    simulator: Annotated[
        str | None,
        typer.Option(help="Template whose model makes the data, as TEMPLATE, with the same prior."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan as TOML; the template's own if absent.")] = None,
    seed: Seed = 0,
    make: Make,
    prior: Prior,
    dim: Dim,
    column: Column,
    select: Select,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate a template on data simulated from its prior; exit with 1 if ranks are not uniform."""
    what, source = _job(template, data, prior, dim, column, select, make).opened()
    other = None if simulator is None else jobs.template_called(simulator, _values(prior, "--prior"))
    how: dict[str, Any] = {"fits": fits, "new_rows": new_rows, "draws": draws, "seed": seed}
    how |= {"plan": None if plan is None else Plan.from_toml(plan), "simulator": other}
    from matplotlib.figure import Figure

    from scivi.analysis import plot_ranks
    from scivi.analysis import sbc as judged
    from scivi.inference.trees import save_tree
    from scivi.sbc import calibrate

    ranks = calibrate(what, source, **how, progress=not quiet)
    save_tree(ranks, out)
    figure = out.with_suffix(".png")
    drawn = Figure()
    plot_ranks(ranks, ax=drawn)
    drawn.savefig(figure, dpi=120)
    table = judged(ranks)
    _tell({"ranks": str(out), "figure": str(figure), **calibration(ranks, table)}, as_json, quiet)
    if not bool(table["ok"].all()):
        raise typer.Exit(ERROR)


@app.command(epilog="\b\nExamples:\n  scivi info results/field\n  scivi info field.h5ad")
def info(
    path: Annotated[Path, typer.Argument(help="Folder of a fit, a posterior, or data.")],
    *,
    as_json: Json = False,
) -> None:
    """Say what is in a folder or file, and where it comes from."""
    _tell(described(path), as_json, quiet=False)


@app.command(epilog="\b\nExample:\n  scivi watch results")
def watch(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a fit, or of many at any depth.")],
    *,
    once: Annotated[bool, typer.Option("--once", help="Show them once.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Follow fits by their histories in the terminal. Works without torch."""
    from scivi.watch import watch as watched

    watched(folder, once=once, interval=interval)


@app.command(epilog="\b\nExample:\n  scivi doctor --json")
def doctor(*, as_json: Json = False) -> None:
    """Say what is installed, what this machine has, and what installs the rest."""
    from scivi.doctor import examine
    from scivi.doctor import lines as shown

    found = examine()
    for line in [json.dumps(found, indent=2)] if as_json else shown(found):
        typer.echo(line)


@app.command(epilog="\b\nExample:\n  scivi new my_model --into models")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the module; a Python identifier.")],
    *,
    into: Annotated[Path, typer.Option(help="Folder; made if absent.")] = Path(),
) -> None:
    """Write a template to begin with, its test and a notebook."""
    from scivi.starter import next_steps, write

    for path in write(name, into):
        typer.echo(f"wrote {path}")
    typer.echo(next_steps(name, into))


@app.command(epilog="\b\nExamples:\n  scivi templates\n  scivi templates my_model")
def templates(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="Or module, of yours.")] = OURS,
    *,
    as_json: Json = False,
) -> None:
    """List what can be given as TEMPLATE, without loading it."""
    found = offers(package)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    width = max((len(one.reference) for one in found), default=0)
    for one in found:
        typer.echo(f"{one.reference:{width}}  {one.about}")


def main() -> None:
    """Run the command line."""
    # On a shared node waiting threads must give their core up: spinning ones cost tens of times (measured).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _job(
    template: str,
    data: Path,
    prior: Sequence[str],
    dim: Sequence[str],
    column: Sequence[str],
    select: Sequence[str],
    make: Sequence[str] = (),
    **more: Any,
) -> jobs.Job:
    """What the arguments ask for."""
    return jobs.Job(
        template,
        data,
        make=_values(make, "--make"),
        prior=_values(prior, "--prior"),
        dims=_pairs(dim, "--dim"),
        columns=_pairs(column, "--column"),
        select={name: labels.split(",") for name, labels in _pairs(select, "--select").items()},
        **more,
    )


def _changes(settings: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the plan that ``--set`` names, and those that flags name, which come after."""
    given = {f.name: flags[f.name] for f in fields(Plan) if flags.get(f.name) is not None}
    table = _values(settings, "--set") | given
    if isinstance(rows := table.get("rows_per_batch"), str):
        table["rows_per_batch"] = _value(rows)
    return table


def _fit_folder(folder: Path) -> Path:
    return folder / "fit" if (folder / "fit").is_dir() else folder


def _exit_unless_fit(summary: Mapping[str, Any], strict: bool) -> None:
    if summary.get("stopped") == "diverged" or (strict and summary.get("verdict") == "do not trust"):
        raise typer.Exit(NOT_TRUSTED)


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """``["a=1"]`` as a dict."""
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise typer.BadParameter(f'{option} "{text}": write it as NAME=VALUE.')
    return {name.strip(): value.strip() for name, _, value in (text.partition("=") for text in texts)}


def _values(texts: Sequence[str], option: str) -> dict[str, Any]:
    """The same with TOML values."""
    return {name: _value(text) for name, text in _pairs(texts, option).items()}


def _value(text: str) -> Any:
    """A TOML value, "none", or else the text itself."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _tell(summary: Mapping[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    elif not quiet:
        for line in lines(summary):
            typer.echo(line)


if __name__ == "__main__":
    main()
