"""24 fits on a real Slurm: preemption, a lost node, bad data, nothing repeated, a local run's numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import scivi
from domains.astrophysics import photons
from tests.studies.material import LONG, TEMPLATE, environment, schools, states
from tests.studies.material import scivi as command

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

STUDY = f"""
draws = 50
report = false

[resources]
time = "10"
memory = "900M"

[plans.short]
steps = 100

{LONG}
[[fits]]
template = "my_model:schools"
data = "schools_*.nc"
plans = ["long"]
seeds = [0, 1, 2]

[[fits]]
template = "my_model:schools"
data = "schools_*.nc"
plans = ["short"]
seeds = [0, 1, 2]

[[fits]]
template = "domains.astrophysics.photons:template"
data = "field.nc"
plans = ["short"]
seeds = [0, 1, 2, 3, 4, 5]

[[fits]]
template = "domains.finance.volatility:from_data"
data = "prices.csv"
seeds = [0, 1, 2, 3, 4]

[[fits]]
template = "my_model:schools"
data = "bad.nc"
plans = ["short"]
"""
FEW_MINUTES = 900.0


@dataclass
class Story:
    """What was done and seen."""

    here: Path
    env: dict[str, str]
    preempted: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)


def until(done, what: str) -> Any:
    """What ``done`` says as soon as that is something."""
    end = time.monotonic() + FEW_MINUTES
    while not (found := done()):
        assert time.monotonic() < end, what
        time.sleep(0.5)
    return found


def under_way(story: Story, node: str) -> set[str]:
    """Labels of the long fits that take their steps on a node."""
    call = ["squeue", "--noheader", "--array", f"--nodelist={node}", "--states=R", "--format=%A"]
    there = subprocess.run(call, env=story.env, capture_output=True, text=True, check=True).stdout.split()
    found = states(story.here / "cluster", story.env).items()
    return {
        name
        for name, fit in found
        if fit.get("job") in there and fit["plan"] == "long" and 0 < fit["last"].get("step", 0) < 700
    }


def stopped(story: Story) -> set[str]:
    """Labels of the fits that have saved themselves on a signal, and wait."""
    found = states(story.here / "cluster", story.env)
    return {name for name, fit in found.items() if fit.get("stopped") is True}


@pytest.fixture(scope="module")
def story(tmp_path_factory, slurm):
    here = tmp_path_factory.mktemp("study")
    (here / "my_model.py").write_text(TEMPLATE)
    for k in range(2):
        schools(here / f"schools_{k}.nc", seed=k)
    schools(here / "bad.nc", seed=9, sd=-1.0)
    table, _ = scivi.simulate(photons.template, {"source": 40}, seed=0)
    table.to_netcdf(here / "field.nc", engine="h5netcdf")
    walk = np.exp(0.01 * np.random.default_rng(0).standard_t(6, (300, 2)).cumsum(0))
    days = pd.date_range("2020-01-01", periods=300, name="day")
    pd.DataFrame(100 * walk, days, ["a", "b"]).to_csv(here / "prices.csv")
    (here / "study.toml").write_text(STUDY)
    story = Story(here, environment(here, SLURM_CONF=slurm, PACE=".03"))
    study = ("study", "run", here / "study.toml", "--out", here / "cluster", "--executor", "slurm")
    command(*study, env=story.env)
    run(story)
    return story


def run(story: Story) -> None:
    """From the first steps of the long fits, of which each takes half a minute, to the end of all."""
    until(lambda: under_way(story, "n1"), "a long fit runs on the first node")
    urgent = ["sbatch", "--partition=urgent", "--nodelist=n1", "--exclusive", "--wrap=sleep 1"]
    subprocess.run(urgent, env=story.env, check=True, capture_output=True, cwd=story.here)
    story.preempted = until(lambda: stopped(story), "a preempted fit has saved itself")
    story.lost = until(lambda: under_way(story, "n2"), "a long fit runs on the second node")
    node = ["scontrol", "update", "nodename=n2"]
    subprocess.run([*node, "state=down", "reason=test"], env=story.env, check=True)
    until(lambda: not under_way(story, "n2"), "the node's fits are gone")
    subprocess.run([*node, "state=resume"], env=story.env, check=False)
    until(lambda: ended(story), "all fits end")


def ended(story: Story) -> bool:
    found = states(story.here / "cluster", story.env)
    return all(fit["state"] in ("done", "failed") for fit in found.values())


def test_all_fits_end_and_bad_data_are_named(story):
    found = states(story.here / "cluster", story.env)
    assert len(found) == 24
    assert Counter(fit["state"] for fit in found.values()) == {"done": 23, "failed": 1}
    failed = found["my_model bad.nc short #0"]
    assert failed["cause"] == "DataError"
    assert "sd" in failed["message"]
    assert failed["number"] == 1  # of attempts: the same would happen again


def test_a_preempted_fit_and_those_of_a_lost_node_went_on(story):
    assert story.preempted
    assert story.lost
    found = states(story.here / "cluster", story.env)
    assert all(found[name]["state"] == "done" for name in story.preempted | story.lost)
    logs = "".join(p.read_text() for p in (story.here / "cluster" / "log").glob("*.txt"))
    assert "NODE FAILURE" in logs


def test_what_exists_is_not_repeated(story):
    folder, study = story.here / "cluster", story.here / "study.toml"
    before = {p: p.stat().st_mtime_ns for p in folder.glob("fits/*/result.json")}
    told = command("study", "run", study, "--out", folder, "--executor", "slurm", env=story.env).stdout
    assert "24 fits, 0 to run" in told
    lost = next(p for p in before if '"done"' in p.read_text())
    shutil.rmtree(lost.parent)
    told = command("study", "run", study, "--out", folder, "--executor", "slurm", env=story.env).stdout
    assert "24 fits, 1 to run" in told
    until(lost.exists, "the fit is there again")
    after = {p: p.stat().st_mtime_ns for p in before if p != lost}
    assert after == {p: when for p, when in before.items() if p != lost}


def test_gathered_it_equals_the_same_study_run_here(story):
    """Bit for bit: stopped, killed and resumed fits have the numbers of those that ran through."""
    folder, study = story.here / "cluster", story.here / "study.toml"
    here = environment(story.here)
    command("study", "run", study, "--out", story.here / "here", "--jobs", "2", "--quiet", env=here)
    bare = environment(story.here, torch=False, SLURM_CONF=story.env["SLURM_CONF"])
    for place in (folder, story.here / "here"):
        command("study", "gather", place, env=bare)
    there, here = (
        xr.open_datatree(p / "gathered.zarr", engine="zarr", chunks=None)
        for p in (folder, story.here / "here")
    )
    groups = {node.path for node in there.leaves} - {"/diagnostics"}
    assert groups == {
        "/schools/schools_0.nc",
        "/schools/schools_1.nc",
        "/photons/field.nc",
        "/from_data/prices.csv",
    }
    for group in groups:
        xr.testing.assert_identical(there[group].to_dataset(), here[group].to_dataset())
    assert dict(there["schools/schools_0.nc"].sizes) == {
        "plan": 2,
        "prior": 1,
        "seed": 3,
        "chain": 1,
        "draw": 50,
    }
    same = ["state", "verdict", "score", "steps", "cause"]
    xr.testing.assert_equal(there["diagnostics"].to_dataset()[same], here["diagnostics"].to_dataset()[same])


def test_login_commands_need_no_torch(story):
    bare = environment(story.here, torch=False, SLURM_CONF=story.env["SLURM_CONF"])
    assert "23 done, 1 failed" in command("study", "status", story.here / "cluster", env=bare).stdout
    assert "23 done, 1 failed" in command("study", "watch", story.here / "cluster", env=bare).stdout
    command("study", "report", story.here / "cluster", env=bare)
    page = (story.here / "cluster" / "study.html").read_text()
    assert set(re.findall("<h2>(.*?)</h2>", page)) == {
        "schools / schools_0.nc",
        "schools / schools_1.nc",
        "schools / bad.nc",
        "photons / field.nc",
        "from_data / prices.csv",
    }
    assert page.count('href="fits/') == 0  # the study asks for no pages of its fits
    assert page.count(">failed<") == 1
