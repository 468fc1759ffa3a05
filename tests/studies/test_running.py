"""A study on this machine: killed, stopped, out of disk, run twice at once; and what is gathered of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from filelock import FileLock

from scivi.studies.folder import claimed, standings
from scivi.studies.manifest import Manifest, expanded
from scivi.studies.task import main, run_row
from tests.studies.material import LONG, TEMPLATE, environment, schools, scivi, states

pytestmark = pytest.mark.slow

STUDY = f"""
draws = 40
report = false
retries = 1
[plans.short]
steps = 60
{LONG}
[[fits]]
template = "my_model:schools"
data = "schools_*.nc"
plans = ["PLAN"]
seeds = [SEEDS]
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_model.py").write_text(TEMPLATE)
    for k in range(2):
        schools(tmp_path / f"schools_{k}.nc", seed=k)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def study(here: Path, plan: str = "short", seeds: str = "0, 1") -> Path:
    path = here / "study.toml"
    path.write_text(STUDY.replace("PLAN", plan).replace("SEEDS", seeds))
    return path


def begun(here: Path, plan: str, seeds: str = "0") -> tuple[Path, Manifest]:
    """A study's folder in which nothing has run."""
    manifest = expanded(study(here, plan, seeds))
    manifest.write(here / "out")
    return here / "out", manifest


def task(here: Path, folder: Path, row_id: str, **more: str) -> subprocess.Popen[bytes]:
    call = [sys.executable, "-m", "scivi.studies.task", str(folder), "--fit", row_id]
    env = environment(here, PACE=".005", **more)
    with (here / "task.txt").open("w") as out:
        return subprocess.Popen(call, env=env, stdout=out, stderr=out)


def until_it_steps(folder: Path, process: subprocess.Popen[bytes]) -> None:
    while not any((s.last.get("step") or 0) > 100 for s in standings(folder)):
        assert process.poll() is None, "it ended"
        time.sleep(0.1)


def posterior(folder: Path, row_id: str) -> xr.Dataset:
    return xr.load_dataset(folder / "fits" / row_id / "posterior.nc", group="posterior", engine="h5netcdf")


def test_a_study_runs_and_is_gathered(here):
    env = environment(here)
    told = scivi(
        "study", "run", study(here), "--out", here / "out", "--jobs", "2", "--gather", env=env
    ).stdout
    assert "4 fits, 4 to run" in told
    assert "4 done" in told
    bare = environment(here, torch=False)
    assert {fit["state"] for fit in states(here / "out", bare).values()} == {"done"}
    tree = xr.open_datatree(here / "out" / "gathered.zarr", engine="zarr", chunks=None)
    assert dict(tree["schools/schools_1.nc"].sizes) == {
        "plan": 1,
        "prior": 1,
        "seed": 2,
        "chain": 1,
        "draw": 40,
    }
    row = next(r for r in Manifest.read(here / "out").rows if (r.seed, "1.nc" in r.data) == (1, True))
    own = posterior(here / "out", row.id)
    gathered = tree["schools/schools_1.nc"].sel(plan="short", prior="default", seed=1)
    np.testing.assert_array_equal(gathered["mu"].values, own["mu"].values)
    assert set(tree["diagnostics/verdict"].values) <= {"trust", "trust with care", "do not trust"}
    assert np.isfinite(tree["diagnostics/score"].values).all()
    scivi("study", "gather", here / "out", "--out", here / "all.nc", env=bare)
    with xr.open_datatree(here / "all.nc", engine="h5netcdf") as again:
        xr.testing.assert_equal(
            again["schools/schools_0.nc"].to_dataset(), tree["schools/schools_0.nc"].to_dataset()
        )
    scivi("study", "report", here / "out", env=bare)
    assert "schools_1.nc" in (here / "out" / "study.html").read_text()


def test_mean_and_score_are_those_of_the_normal_model(here):
    """One fit of the study beside its closed form: normal effects of known sd, normal prior of sd 5.

    200 draws of the posterior have a mean with an error of .07 of its sd; leave-one-out has its own error of
    some tenths of a nat, from the same draws.
    """
    path = study(here, "default", "0")
    path.write_text(path.read_text().replace("draws = 40", "draws = 200"))
    scivi("study", "run", path, "--out", here / "out", "--quiet", env=environment(here))
    data = xr.load_dataset(here / "schools_0.nc", engine="h5netcdf")
    weight = 1 / data["sd"].values ** 2

    def exact(keep):
        precision = weight[keep].sum() + 1 / 25
        return (weight * data["effect"].values)[keep].sum() / precision, precision**-0.5

    mean, sd = exact(np.arange(40))
    fit = next(s for s in standings(here / "out") if "schools_0" in s.row.data)
    draws = posterior(here / "out", fit.row.id)["mu"].values
    assert abs(draws.mean() - mean) < 0.3 * sd
    left_out = 0.0
    for i in range(40):
        m, s = exact(np.arange(40) != i)
        spread = np.hypot(s, data["sd"].values[i])
        left_out += (
            -0.5 * ((data["effect"].values[i] - m) / spread) ** 2 - np.log(spread) - 0.5 * np.log(2 * np.pi)
        )
    assert fit.told["score"] == pytest.approx(left_out, abs=1.0)


def test_a_fit_that_the_study_does_not_have_is_told(here, capsys):
    folder, _ = begun(here, "short")
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--fit", "other"])
    assert ended.value.code == 2
    assert "has no fit other" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_fit_that_is_stopped_or_killed_goes_on_to_the_same_numbers(here, how):
    folder, manifest = begun(here, "long")
    first, other = manifest.rows
    process = task(here, folder, first.id)
    until_it_steps(folder, process)
    process.send_signal(how)
    process.wait()
    stopped = how == signal.SIGTERM
    assert process.returncode == (75 if stopped else -signal.SIGKILL)
    assert standings(folder)[0].state == ("stopped" if stopped else "vanished")
    assert not list(folder.rglob("*.part"))
    assert run_row(folder, manifest, first) == "done"
    assert json.loads((folder / "fits" / first.id / "result.json").read_text())["number"] == (
        1 if stopped else 2
    )
    whole = here / "whole"
    manifest.write(whole)
    assert run_row(whole, manifest, first) == "done"
    xr.testing.assert_identical(posterior(folder, first.id), posterior(whole, first.id))
    assert standings(folder)[1].state == "waiting"
    assert other.id not in os.listdir(folder / "fits")


def test_a_fit_whose_process_is_always_killed_is_given_up(here):
    folder, manifest = begun(here, "long")
    row = manifest.rows[0]
    for _ in range(2):  # the first time, and one retry
        process = task(here, folder, row.id)
        while not (folder / "fits" / row.id / "history.jsonl").exists():
            time.sleep(0.05)
        process.kill()
        process.wait()
        (folder / "fits" / row.id / "history.jsonl").unlink(missing_ok=True)
    assert run_row(folder, manifest, row) == "failed"
    standing = standings(folder)[0]
    assert standing.cause == "machine: begun 2 times, and the process was gone each time"
    assert "2 to run" in scivi("study", "retry", folder, env=environment(here)).stdout
    assert [s.state for s in standings(folder)] == ["done", "done"]


def test_two_runs_on_one_folder_do_not_meet(here):
    folder, manifest = begun(here, "short")
    row = manifest.rows[0]
    with claimed(folder / "fits" / row.id) as mine:
        assert mine
        assert standings(folder)[0].state == "running"
        process = task(here, folder, row.id)
        assert process.wait() == 75
        assert f"{row.id} busy" in (here / "task.txt").read_text()
    assert standings(folder)[0].state == "waiting"


def test_two_commands_on_one_folder_are_told(here):
    env, fit = environment(here), ("fit", "my_model:schools", here / "schools_0.nc", "--out", here / "out")
    (here / "out").mkdir()
    with FileLock(here / "out" / ".fit.lock"):
        told = scivi(*fit, "--steps", 20, env={**env, "PYTHONPATH": f"{env['PYTHONPATH']}:{here}"}, code=1)
    assert "is in use: another process is fitting there" in told.stderr
    assert {p.name for p in (here / "out").iterdir()} == {".fit.lock"}


def tmpfs(path: Path, options: str) -> None:
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "small"
    tmpfs(path, "size=96k")
    yield path
    subprocess.run(["umount", str(path)], check=False)


def test_a_full_disk_leaves_nothing_half_written(here, small_disk):
    manifest = expanded(study(here, "short", "0"))
    folder = small_disk / "out"
    manifest.write(folder)
    (small_disk / "ballast").write_bytes(b"0" * 40_000)
    env = environment(here)
    told = scivi("study", "run", study(here, "short", "0"), "--out", folder, env=env, code=1).stderr
    assert "could not be ended" in told
    assert "No space left" in (folder / "log" / "local.txt").read_text() + standings(folder)[0].cause
    assert not list(folder.rglob("*.part"))
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert "2 to run" in scivi("study", "retry", folder, env=environment(here)).stdout
    assert [s.state for s in standings(folder)] == ["done", "done"]


def test_a_folder_that_cannot_be_written_is_told(here):
    if os.geteuid() != 0:
        read_only = here / "out"
        read_only.mkdir()
        read_only.chmod(0o500)
    else:  # whom permissions do not stop
        read_only = here / "out"
        tmpfs(read_only, "ro")
    try:
        told = scivi("study", "run", study(here), "--out", read_only, env=environment(here), code=1).stderr
    finally:
        subprocess.run(["umount", str(read_only)], check=False, capture_output=True)
    assert told.startswith(("scivi: Read-only file system", "scivi: Permission denied"))
    assert "Traceback" not in told


def test_no_study_there_is_one_sentence(here):
    for verb in ("status", "watch", "gather", "report", "retry", "cancel", "snakefile"):
        told = scivi("study", verb, here / "nowhere", env=environment(here), code=1).stderr
        assert "is no folder of a study" in told
