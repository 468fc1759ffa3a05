"""A study file becomes one row for each fit, or one error that lists every fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from scivi.errors import StudyError
from scivi.studies.executors import script, snakefile
from scivi.studies.manifest import Manifest, expanded
from tests.studies.material import TEMPLATE, schools

STUDY = """
seeds = [0, 1]
draws = 30
[resources]
time = "02:00:00"
memory = "2G"
at_once = 5
sbatch = ["--account=mine"]
[plans.long]
steps = 900
clip = "none"
[priors.wide]
effect_sd = 20.0
[[fits]]
template = "my_model:schools"
data = "schools_*.nc"
plans = ["default", "long"]
priors = ["default", "wide"]
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "my_model.py").write_text(TEMPLATE)
    for k in range(2):
        schools(tmp_path / f"schools_{k}.nc", seed=k)
    return tmp_path


def study(here: Path, text: str) -> Path:
    path = here / "study.toml"
    path.write_text(text)
    return path


def test_a_study_is_the_product_of_its_axes(here):
    rows = expanded(study(here, STUDY)).rows
    assert len({row.id for row in rows}) == len(rows) == 2 * 2 * 2 * 2
    wide = next(row for row in rows if (row.plan, row.prior, row.seed) == ("long", "wide", 1))
    assert (
        wide.job.plan_of({"steps": 5, "lr": 0.1}).to_dict().items()
        >= {"steps": 900, "lr": 0.1, "seed": 1, "clip": None}.items()
    )
    assert wide.job.prior == {"effect_sd": 20.0}
    assert wide.label == "my_model schools_0.nc long wide #1"


def test_a_manifest_is_read_as_it_was_written(here, tmp_path):
    found = expanded(study(here, STUDY))
    found.write(tmp_path / "out")
    assert Manifest.read(tmp_path / "out") == found


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a number of the plan", lambda here: (here / "study.toml").write_text(STUDY.replace("900", "901"))),
        (
            "a number of the prior",
            lambda here: (here / "study.toml").write_text(STUDY.replace("20.0", "21.0")),
        ),
        ("the data", lambda here: schools(here / "schools_0.nc", seed=7)),
        ("the template", lambda here: (here / "my_model.py").write_text(TEMPLATE + "# changed\n")),
    ],
)
def test_whatever_decides_a_result_changes_the_hash(here, what, change):
    path = study(here, STUDY)
    before = {row.id for row in expanded(path).rows}
    change(here)
    after = {row.id for row in expanded(path).rows}
    assert before != after, what
    assert before & after or what == "the template"  # of fits that it does not touch


def test_names_and_resources_do_not(here):
    before = [row.id for row in expanded(study(here, STUDY)).rows]
    renamed = (
        STUDY.replace('"long"', '"longer"').replace("plans.long", "plans.longer").replace('"2G"', '"3G"')
    )
    assert [row.id for row in expanded(study(here, renamed)).rows] == before


BAD = """
seed = [1]
draws = 0
[resources]
memory = 4
[plans.long]
steps = -1
seed = 3
[plans]
short = 3
[[fits]]
template = "no_such_module:x"
data = "nothing*.nc"
plans = ["longer"]
[[fits]]
data = "schools_0.nc"
"""


def test_every_fault_is_listed_at_once(here):
    with pytest.raises(StudyError) as found:
        expanded(
            study(
                here,
                BAD.replace(
                    "[plans.long]\nsteps = -1\nseed = 3\n[plans]\nshort = 3",
                    "[plans]\nshort = 3\nlong = {steps = -1}\nlost = {seed = 3}",
                ),
            )
        )
    told = str(found.value)
    for words in (
        'has no "seed"; did you mean "seeds"?',
        "draws = 0",
        "memory = 4; it must be text",
        "steps = -1; it must be a whole number of at least 0",
        "[plans.lost] has a seed",
        "[plans] short = 3; write it as a table",
        '[[fits]] 1: template "no_such_module:x"',
        '[[fits]] 1: data "nothing*.nc": no file of that name',
        "[[fits]] 1: there is no [plans.longer]",
        '[[fits]] 2: it has no "template"',
    ):
        assert words in told, told


@pytest.mark.parametrize(
    ("text", "words"), [("fits = 3", "[[fits]]"), ("x = ", "not valid TOML"), ("", "no [[fits]]")]
)
def test_no_study_is_told_as_such(here, text, words):
    with pytest.raises(StudyError, match=words.replace("[", r"\[")):
        expanded(study(here, text))


def test_one_fit_under_two_names_is_a_fault(here):
    twice = STUDY.replace("[priors.wide]", "[plans.again]\nsteps = 900\nclip = 'none'\n[priors.wide]")
    with pytest.raises(StudyError, match="two names for one fit"):
        expanded(study(here, twice.replace('"long"]', '"long", "again"]')))


def test_the_batch_script_asks_for_what_the_study_says(here, tmp_path):
    found = expanded(study(here, STUDY))
    told = script(tmp_path / "out", found, [row.id for row in found.rows])
    for option in (
        "--array=0-15%5",
        "--time=02:00:00",
        "--mem=2G",
        "--account=mine",
        "--requeue",
        "--signal=B:TERM@90",
    ):
        assert f"#SBATCH {option}\n" in told
    assert "gres" not in told


def test_a_snakefile_has_every_fit(here, tmp_path):
    found = expanded(study(here, STUDY))
    told = snakefile(tmp_path / "out", found)
    assert all(row.id in told for row in found.rows)
    compile(told.split("rule all")[0], "Snakefile", "exec")
