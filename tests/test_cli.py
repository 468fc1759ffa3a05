"""The command line: what it says, writes and returns. Slow tests run whole fits of 40 rows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from scivi.cli import app
from scivi.errors import DataError
from scivi.inference.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("fit", "draw", "predict", "nuts", "simulate", "report", "check", "sbc", "info", "study", "watch")
COMMANDS += ("doctor", "new", "templates")

TEMPLATES = """
from dataclasses import dataclass
import pyro
import pyro.distributions as dist
from torch.distributions import constraints
from scivi.inputs.fields import Field
from scivi.models.template import Template

@dataclass(frozen=True)
class Prior:
    effect_sd: float = 5.0
    spread: float = 5.0

def model(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(0.0, prior.effect_sd))
    tau = pyro.sample("tau", dist.HalfCauchy(prior.spread))
    with batch.plate("school"):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        batch.observe("effect", dist.Normal(theta, batch.sd))

schools = Template(
    name="schools", rows="school", model=model, prior=Prior(),
    fields={
        "effect": Field(("school",), role="observed", unit="points"),
        "sd": Field(("school",), support=constraints.positive, unit="points"),
    },
    dims={"mu": (), "tau": (), "theta": ("school",)},
)

def from_file(path, name=None):
    import xarray as xr
    from dataclasses import replace
    table = xr.load_dataset(path, engine="h5netcdf")
    name = name or f"{table.sizes['school']} schools"
    return replace(schools, name=name), table.rename(sd="error")

def nothing(path):
    return None

def two(path):
    return path, schools
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a template and data, where the user stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    sys.modules.pop("my_model", None)
    (tmp_path / "my_model.py").write_text(TEMPLATES)
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    rng = np.random.default_rng(0)
    sd = rng.uniform(5, 15, 40)
    effect = rng.normal(rng.normal(3.0, 4.0, 40), sd)
    table = xr.Dataset({"effect": ("school", effect), "sd": ("school", sd)})
    table.to_netcdf("schools.nc", engine="h5netcdf")
    table.to_dataframe().to_csv("schools.csv", index=False)
    (-table).rename(school="pupil").to_netcdf("bad.nc", engine="h5netcdf")
    yield tmp_path
    sys.modules.pop("my_model", None)


def scivi(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_help_shows_every_command_the_exit_codes_and_an_example():
    text = scivi("--help").output
    for word in (*COMMANDS, "Exit codes", "--strict", "scivi fit domains.astrophysics.photons:template"):
        assert word in text


def test_help_of_fit_has_every_word_that_a_plan_allows():
    hints = {name: hint for name, hint in get_type_hints(Plan).items() if get_origin(hint) is Literal}
    assert set(hints) == {"estimator", "schedule", "optimiser", "dtype", "compile"}
    text = " ".join(scivi("fit", "--help").output.split())
    for name, hint in hints.items():
        assert ", ".join(get_args(hint)) in text, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command):
    assert f"  scivi {command} " in scivi(command, "--help").output


@pytest.mark.parametrize(
    "answer",
    [
        "import scivi",
        "from scivi.cli import app; app(['--help'], standalone_mode=False)",
        "from scivi.cli import app; app(['study', '--help'], standalone_mode=False)",
        "from scivi.cli import app; app(['templates'], standalone_mode=False)",
    ],
)
def test_what_needs_an_answer_at_once_loads_nothing_heavy(answer):
    heavy = {"torch", "pyro", "numpy", "xarray", "pandas", "matplotlib", "anndata"}
    code = f"import sys; {answer}; print('loaded:', *{heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1].split() == ["loaded:"]


@pytest.mark.parametrize(
    "arguments", [(), ("fit",), ("fit", "a:b", "c.nc"), ("nothing",), ("draw", "--draws", "0")]
)
def test_wrong_usage_is_2(arguments):
    assert CliRunner().invoke(app, list(arguments)).exit_code == 2


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("nowhere:template", 'no module "nowhere"'),
        ("my_model:school", 'no template "school"'),
        ("my_model:model", "no function of DATA so called; it has ['schools']"),
        ("my_model:dist", 'no template "dist"'),
        ("my_model:nothing", '"my_model:nothing" returned NoneType; it must return a template and data'),
        ("my_model:two", "returned a tuple of PosixPath, Template"),
        ("my_model", "module:name"),
        ("broken:template", 'module "broken" needs "no_such_package_at_all", which is not installed'),
        ("my_modle:schools", 'there is no module "my_modle"; did you mean "my_model:schools"?'),
        ("my_model:schols", "it has ['schools']; did you mean \"schools\"?"),
        (
            "domains.genomics.citeseeq:from_data",
            'no module "domains.genomics.citeseeq"; did you mean "domains.genomics.citeseq:from_data"?',
        ),
        ("domains.astrophysics.photons:templat", 'did you mean "template"?'),
    ],
)
def test_a_template_that_cannot_be_found_is_1(here, template, words):
    result = scivi("fit", template, "schools.nc", "--out", "out", code=1)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("out").exists()


def test_a_missing_extra_is_named(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "nutpie", None)
    (here / "sampled.py").write_text("import nutpie\n")
    (here / "late.py").write_text("def from_data(data):\n    import nutpie\n")
    for template in ("sampled:template", "late:from_data"):
        told = scivi("fit", template, "schools.nc", "--out", "out", code=1).stderr
        assert (
            told == 'scivi: "nutpie" is not installed. It comes with the extra: pip install "scivi[nuts]".\n'
        )


def test_without_data_the_nearest_template_is_told_too(here):
    told = scivi("check", "my_model:schols", code=1).stderr
    assert told == (
        'scivi: module "my_model" has no template "schols"; it has [\'schools\']; did you mean "schools"?\n'
    )


def test_templates_lists_what_a_package_offers(here):
    found = json.loads(scivi("templates", "--json").stdout)
    references = {one["reference"]: one for one in found}
    assert references["domains.genomics.citeseq:from_data"]["takes_data"]
    assert not references["domains.astrophysics.photons:template"]["takes_data"]
    about = "Photon counts of a catalogue of sources, in one or more bands."
    assert references["domains.astrophysics.photons:template"]["about"] == about
    for reference, one in references.items():  # as the modules themselves have them
        module, _, name = reference.partition(":")
        value = getattr(importlib.import_module(module), name)
        assert callable(value) == one["takes_data"], reference
    assert scivi("templates", "my_model").stdout.split() == ["my_model:schools"]
    assert 'there is no package "nothing"' in scivi("templates", "nothing", code=1).stderr


def test_new_writes_a_template_and_says_what_is_next(here):
    told = scivi("new", "bird_calls", "--into", "models").stdout
    assert "scivi check bird_calls:template" in told
    assert (here / "models" / "bird_calls.py").exists()
    assert "exists already" in scivi("new", "bird_calls", "--into", "models", code=1).stderr
    assert "must be a Python identifier" in scivi("new", "bird calls", code=1).stderr


def test_a_function_makes_template_and_data(here, monkeypatch):
    arguments = ("fit", "my_model:from_file", "schools.nc", "--out", "out", "--column", "sd=error")
    seen = {}

    def fit(template, source, plan, **how):
        seen.update(template=template, source=source)
        raise DataError("seen")

    monkeypatch.setattr("scivi.inference.loop.fit", fit)
    scivi(*arguments, "--prior", "spread=2", code=1)
    assert (seen["template"].name, seen["template"].prior.spread) == ("40 schools", 2.0)
    assert seen["source"].sizes == {"school": 40}
    assert 'field "sd" is missing' in scivi(*arguments[:-2], code=1).stderr
    assert (
        'there is no "absent.nc"'
        in scivi("nuts", "my_model:from_file", "absent.nc", "--out", "o", code=1).stderr
    )


def test_a_function_is_given_its_arguments(here, monkeypatch):
    function = ("fit", "my_model:from_file", "schools.nc", "--out", "out", "--column", "sd=error")
    seen = {}

    def fit(template, source, plan, **how):
        seen.update(name=template.name)
        raise DataError("seen")

    monkeypatch.setattr("scivi.inference.loop.fit", fit)
    scivi(*function, "--make", "name=few schools", code=1)
    assert seen == {"name": "few schools"}
    assert "unexpected keyword argument 'colour'" in scivi(*function, "--make", "colour=1", code=1).stderr
    told = scivi("fit", "my_model:schools", "schools.nc", "--out", "out", "--make", "name=x", code=1).stderr
    assert "there is nothing to make" in told


@pytest.mark.parametrize("command", [("simulate", "--size", "school=5", "--out", "s.nc"), ("check",)])
def test_without_data_a_template_is_needed(here, command):
    verb, *options = command
    told = scivi(verb, "my_model:from_file", *options, code=1).stderr
    assert '"my_model:from_file" is a function; without data a template is needed' in told
    assert "Its module has ['schools']." in told


def test_data_that_do_not_fit_are_1_and_tell_every_fault(here):
    result = scivi("fit", "my_model:schools", "bad.nc", "--out", "out", code=1)
    assert 'field "effect" has dims ("pupil",)' in result.stderr
    assert 'field "sd" has dims ("pupil",)' in result.stderr
    result = scivi("fit", "my_model:schools", "bad.nc", "--out", "out", "--dim", "pupil=school", code=1)
    assert 'field "sd": 40 of 40 entries are not numbers > 0' in result.stderr
    result = scivi("fit", "my_model:schools", "absent.nc", "--out", "out", code=1)
    assert 'there is no "absent.nc"' in result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "-1"), "steps = -1; it must be a whole number of at least 0"),
        (("--estimator", "elbo"), "estimator = 'elbo'; it must be one of"),
        (("--rows-per-batch", "many"), "rows_per_batch = 'many'"),
        (("--set", "stepz=3"), "a plan has no 'stepz'"),
        (("--set", "stop={windw=3}"), "windw"),
        (("--plan", "absent.toml"), 'there is no plan file "absent.toml"'),
        (("--prior", "effect=3"), 'it has no "effect"; it has effect_sd, spread; did you mean "effect_sd"?'),
        (("--prior", "spread=wide"), "spread = wide; it must be of type float, as 5.0 is"),
    ],
)
def test_a_plan_or_prior_that_cannot_be_used_is_1(here, options, words):
    assert words in scivi("fit", "my_model:schools", "schools.nc", "--out", "out", *options, code=1).stderr


def test_a_pair_without_equals_is_wrong_usage(here):
    result = scivi("fit", "my_model:schools", "schools.nc", "--out", "out", "--prior", "spread", code=2)
    assert "NAME=VALUE" in result.output
    result = scivi("simulate", "my_model:schools", "--size", "school=few", "--out", "s.nc", code=2)
    assert "a size is a whole number" in result.output


def test_flags_override_settings_and_settings_the_file(here):
    from scivi.cli import _changes
    from scivi.inference.plan import Plan
    from scivi.studies.job import Job

    flags = {"steps": 12, "rows_per_batch": "all", "template": "not a field of the plan"}
    changes = _changes(["lr=0.2", "steps=11", "clip=none"], flags)
    job = Job("a:b", Path("c"), changes, base={"steps": 10, "lr": 0.1, "seed": 3})
    assert job.plan_of({"seed": 9}) == Plan(steps=12, lr=0.2, seed=3, rows_per_batch=None, clip=None)


def test_an_earlier_fit_is_not_overwritten(here):
    (here / "out" / "fit").mkdir(parents=True)
    result = scivi("fit", "my_model:schools", "schools.nc", "--out", "out", code=1)
    assert '"out" holds a fit. Choose another --out, or give --resume or --overwrite.' in result.stderr


def test_info_tells_what_is_in_data(here):
    told = json.loads(scivi("info", "schools.nc", "--json").stdout)
    assert told["columns"]["sd"] == {"dims": ["school"], "shape": [40], "dtype": "float64"}
    assert "sd: dims (row), shape (40), dtype float64" in scivi("info", "schools.csv").stdout
    assert 'there is no "absent"' in scivi("info", "absent", code=1).stderr
    (here / "empty").mkdir()
    assert "neither a fit nor data" in scivi("info", "empty", code=1).stderr


def test_info_shows_no_unfinished_files(here):
    (here / "results").mkdir()
    (here / "schools.nc").rename(here / "results" / "schools.nc")
    (here / "results" / ".posterior.nc.12345.part").write_bytes(b"half")
    (here / "results" / ".posterior.nc.part").write_bytes(b"half")
    told = json.loads(scivi("info", "results", "--json").output)
    assert set(told) == {"folder", "schools.nc"}


def posterior(path: Path, shift: float) -> Path:
    """A tree of a normal mean under a guide that is right, or moved by some sd."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 1000))
    log_q, lp = -0.5 * z**2, -0.5 * (z + shift) ** 2
    tree = xr.DataTree.from_dict(
        {
            "/": xr.Dataset(attrs={"provenance": json.dumps({"template": "mean", "method": "svi"})}),
            "posterior": xr.Dataset({"mu": (("chain", "draw"), z + shift)}),
            "sample_stats": xr.Dataset({"lp": (("chain", "draw"), lp), "log_q": (("chain", "draw"), log_q)}),
        }
    )
    tree.to_netcdf(path, engine="h5netcdf")
    return path


def test_report_judges_a_posterior_from_disk(here):
    good, bad = posterior(here / "good.nc", 0.0), posterior(here / "bad.nc", 6.0)
    told = json.loads(scivi("report", good, "--to", "pages/good.html", "--json").stdout)
    assert told["verdict"] != "do not trust"
    assert Path(told["report"]).read_text().startswith("<!")
    assert "verdict: do not trust" in scivi("report", bad).stdout
    assert (here / "report.html").exists()
    assert scivi("report", bad, "--strict", "--quiet", code=3).stdout == ""
    told = json.loads(scivi("info", good, "--json").stdout)
    assert told["groups"]["posterior"] == {"chain": 1, "draw": 1000}
    assert told["provenance"]["template"] == "mean"


def test_report_of_what_is_no_posterior_is_1(here):
    assert "no posterior that can be read" in scivi("report", "my_model.py", code=1).stderr
    assert 'there is no "absent.nc"' in scivi("report", "absent.nc", code=1).stderr
    scivi("report", "schools.nc", code=1)


def test_report_runs_without_torch(here):
    path = posterior(here / "good.nc", 0.0)
    code = f"""
import sys
class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pyro"):
            raise ImportError(name)
sys.meta_path.insert(0, Refused)
from scivi.cli import app
from scivi.inference.plan import Plan
app(["report", {str(path)!r}])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "verdict: " in run.stdout


# ---------------------------------------------------------------- with the engine

FIT = "fit my_model:schools --steps 60 --rows-per-batch all --set log_every=20 --draws 50".split()


@pytest.mark.slow
def test_fit_draw_predict_and_report(here):
    told = json.loads(scivi(*FIT, "schools.nc", "--out", "out", "--prior", "effect_sd=10", "--json").stdout)
    assert told["verdict"] in ("trust", "trust with care", "do not trust")
    assert told["stopped"] == "steps"
    for name in ("fit", "history.nc", "history.jsonl", "posterior.nc", "report.html", "figures"):
        assert (here / "out" / name).exists(), name
    assert list((here / "out" / "figures").glob("*.png"))
    with xr.open_datatree("out/posterior.nc", engine="h5netcdf") as tree:
        assert tree["posterior/theta"].sizes == {"chain": 1, "draw": 50, "school": 40}
        assert "posterior_predictive" in tree.children
        assert json.loads(tree.attrs["provenance"])["prior"] == {"effect_sd": 10.0, "spread": 5.0}
    assert "provenance" in scivi("info", "out").stdout

    scivi("draw", "out", "schools.csv", "--dim", "row=school", "--draws", "30", "--out", "drawn.nc")
    scivi("predict", "out/fit", "schools.nc", "--draws", "20", "--out", "predicted.zarr")
    told = json.loads(scivi("info", "predicted.zarr", "--json").stdout)
    assert told["groups"]["posterior_predictive"]["draw"] == 20
    scivi("report", "drawn.nc", "--to", "drawn.html")


@pytest.mark.slow
def test_the_same_command_gives_the_same_draws_and_a_resumed_fit_too(here):
    for name in ("one", "two"):
        scivi(*FIT, "schools.nc", "--out", name, "--no-report", "--quiet")
    scivi(*FIT, "schools.nc", "--out", "two", "--no-report", "--quiet", "--resume")
    scivi(*FIT, "schools.nc", "--out", "one", "--no-report", "--quiet", "--overwrite")
    steps = [
        [json.loads(line)["step"] for line in (here / name / "history.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert steps[0] == steps[1] == sorted(set(steps[0]))  # of one fit, whatever was there before
    one, two = (xr.open_datatree(f"{name}/posterior.nc", engine="h5netcdf") for name in ("one", "two"))
    xr.testing.assert_equal(one["posterior"].to_dataset(), two["posterior"].to_dataset())
    one.close(), two.close()


@pytest.mark.slow
def test_every_verb_takes_a_function_of_the_data(here):
    made, column = ("my_model:from_file", "schools.nc"), ("--column", "sd=error", "--quiet")
    scivi(*(FIT[0], made[0], *FIT[2:]), made[1], "--out", "out", "--no-report", *column)
    with xr.open_datatree("out/posterior.nc", engine="h5netcdf") as tree:
        assert json.loads(tree.attrs["provenance"])["template"] == "40 schools"
    scivi("draw", "out", made[1], "--template", made[0], "--draws", "5", "--out", "drawn.nc", *column)
    few = ("--draws", "5", "--warmup", "5", "--chains", "1", "--rows", "10")
    scivi("nuts", *made, "--fit", "out", "--out", "nuts.nc", *few, *column)
    laws = json.loads(scivi("check", made[0], "--data", made[1], "--column", "sd=error", "--json").stdout)
    assert all(law["ok"] for law in laws)


@pytest.mark.slow
def test_nuts_is_compared_by_report(here):
    scivi(*FIT, "schools.nc", "--out", "out", "--no-report", "--quiet")
    few = ("--draws", "30", "--warmup", "30", "--chains", "1", "--quiet")
    scivi("nuts", "my_model:schools", "schools.nc", "--fit", "out", "--rows", "10", "--out", "nuts.nc", *few)
    told = json.loads(scivi("report", "out/posterior.nc", "--reference", "nuts.nc", "--json").stdout)
    assert told["verdict"]


@pytest.mark.slow
def test_check_tells_each_law(here):
    laws = json.loads(scivi("check", "my_model:schools", "--data", "schools.nc", "--json").stdout)
    assert laws
    assert all(law["ok"] for law in laws)


@pytest.mark.slow
def test_simulated_data_are_data(here):
    sizes = ("--size", "source=40", "--size", "band=1")
    template = "domains.astrophysics.photons:template"
    told = json.loads(scivi("simulate", template, *sizes, "--seed", "1", "--out", "sim.nc", "--json").stdout)
    assert told["sizes"]["source"] == 40
    assert (here / "sim_truth.nc").exists()
    assert "n_on" in scivi("info", "sim.nc").stdout


@pytest.mark.slow
def test_sbc_leaves_ranks_a_figure_and_a_table(here):
    plan = here / "quick.toml"
    plan.write_text('steps = 20\nestimator = "trace"\nstop = "none"\n')
    arguments = ("--data", "schools.nc", "--fits", "8", "--draws", "99", "--plan", plan, "--out", "ranks.nc")
    result = CliRunner().invoke(app, ["sbc", "my_model:schools", *map(str, arguments), "--json"])
    assert result.exit_code in (0, 1), result.output  # of eight fits either may be
    told = json.loads(result.stdout)
    assert set(told["uniform"]) == {"mu", "tau", "theta"}
    assert sum(told["verdicts"].values()) == 8
    ranks = xr.load_dataset("ranks.nc", engine="h5netcdf")
    assert dict(ranks.sizes) == {"simulation": 8}
    assert ranks.attrs["draws"] == 99
    assert Path("ranks.png").stat().st_size > 1000
    assert result.exit_code == (0 if all(row["ok"] for row in told["uniform"].values()) else 1)
