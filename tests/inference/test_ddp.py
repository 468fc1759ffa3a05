"""Two processes as one fit, against one process. Run as a program, this file is one of the two.

The two run all of ``CASES`` one after the other, once, and leave what they found in a folder, a file each.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import scivi
from domains.astrophysics import photons
from domains.genomics import citeseq
from domains.genomics.citeseq import EXAMPLE
from scivi.cli import app
from scivi.errors import FitError, PlanError
from scivi.inference import draws, processes
from scivi.inference.loop import fit, train
from scivi.inference.objective import prepare
from scivi.inference.opening import begin, open_data
from scivi.inference.plan import Plan
from scivi.inference.processes import LOST, Place, first_host, launch, place
from scivi.inference.state import State, load, save
from scivi.inference.step import restore_random, update
from scivi.inference.team import Team, group
from scivi.inputs.feed import Feed
from scivi.inputs.sources import open_source
from scivi.models.template import Template
from tests.inference.conjugate import FIELDS, OFF, hierarchy, plan, rows, shared
from tests.inference.test_loop import LIMITS, STEEP, limited
from tests.inference.test_loop import Place as Point

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300  # for the two processes; they take some 20 s of two idle cores
DATA = rows(41)
CELLS = citeseq.make(replace(EXAMPLE, log_fractions=()), n_latent=2, hidden=8)
# Nothing is random but the order of rows: the same numbers, to rounding, for any number of processes.
STILL = replace(
    shared,
    guide=lambda batch, prior, nets: pyro.sample("mu", dist.Delta(nets.loc)),
    nets=lambda sizes, prior: Point(),
)
STEPS, DRAWS = 30, 16  # of the objective's and gradient's means


def subject(name: str) -> tuple[Template, xr.Dataset]:
    if name == "photons":
        return photons.template, scivi.simulate(photons.template, {"source": 60, "band": 1}, seed=3)[0]
    return CELLS, scivi.simulate(CELLS, {"cell": 30, "droplet": 20}, seed=3)[0]


def fixed(**knobs: Any) -> Plan:
    """A plan that leaves parameters where they are, but for 1e-9 of them."""
    return plan(**{"steps": STEPS, "lr": 1e-13, "clip": None, "schedule": "constant", "seed": 4, **knobs})


def gradient(state: State) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in state.bound.nets.parameters() if p.grad is not None])


# ------------------------------------------------------------------ what both one and two processes run


def noisy_numbers(name: str) -> dict[str, list]:
    """Objective, and gradient in three directions, of the whole minibatch at every step."""
    template, data = subject(name)
    knobs = fixed(estimator="trace", rows_per_batch=9, particles=DRAWS)
    state = begin(template, open_data(template, data), knobs)
    objective = prepare(state.bound, state.bound.example, knobs)
    n = sum(p.numel() for p in state.bound.nets.parameters())
    ways = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / n**0.5
    found: dict[str, list] = {"objective": [], "gradient": []}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(STEPS):
            found["objective"].append(float(update(state, objective, knobs).objective))
            held = [torch.zeros_like(p) if p.grad is None else p.grad for p in state.bound.nets.parameters()]
            found["gradient"].append((ways @ torch.cat([g.reshape(-1) for g in held])).tolist())
    return found


def exact_numbers() -> dict[str, list]:
    """Objective and gradient of "marginal", all processes at the same draw of the globals."""
    template, data = subject("photons")
    found: dict[str, list] = {"objective": [], "gradient": [], "norm": []}
    for size in (33, None):
        knobs = fixed(estimator="marginal", rows_per_batch=size)
        state = begin(template, open_data(template, data), knobs)
        objective = prepare(state.bound, state.bound.example, knobs)
        state.team.streams = Team().streams  # type: ignore[method-assign]
        with torch.random.fork_rng():
            for _ in range(3):
                restore_random(state.team.streams(seed_of(knobs), state.step, torch.device("cpu")))
                found["objective"].append(float(update(state, objective, knobs).objective))
                found["gradient"].append(gradient(state).tolist())
        found["norm"].append(float(state.window["grad_norm"]))
    return found


def seed_of(knobs: Plan) -> int:
    from scivi.models.binding import stream_seed

    return stream_seed(knobs.seed, "sampling")


# ------------------------------------------------------------------ what the two processes run


def bits(nets: torch.nn.Module) -> str:
    held = [t.detach().numpy().tobytes() for t in (*nets.parameters(), *nets.buffers())]
    return hashlib.sha256(b"".join(held)).hexdigest()


def told(done: scivi.Fit) -> dict[str, Any]:
    history = done.history.drop_vars(["wall_s", "loader_share"], errors="ignore")
    kept = ("stopped", "steps", "restarts", "finish", "engine", "processes")
    return {
        "history": {str(k): v.values.tolist() for k, v in history.items()},
        "nets": {k: v.tolist() for k, v in done.nets.state_dict().items()},
        "bits": bits(done.nets),
        "fit": {k: done.provenance["fit"][k] for k in kept},
    }


def parameters_case(team: Team, folder: Path) -> Any:
    """Bits after each step."""
    found = {}
    for name, knobs in (
        ("photons", plan(steps=12, rows_per_batch=9, log_every=1, dtype="float32")),
        ("cells", plan(steps=12, rows_per_batch=9, log_every=1, estimator="trace", dtype="float32")),
    ):
        template, data = subject(name)
        state = begin(template, open_data(template, data), knobs)
        seen = [bits(state.bound.nets)]
        for now in train(template, data, knobs, state=state):
            seen.append(bits(now.state.bound.nets))
        done = fit(template, data, replace(knobs, steps=3), progress=False)
        found[name] = {"steps": seen, "finished": bits(done.nets)}
    return found


STOPPING = {
    "random": (hierarchy(OFF), {"rows_per_batch": 7, "newton": True, "steps": 60}),
    "still": (STILL, {"rows_per_batch": 7, "estimator": "trace", "steps": 60, "lr": 0.05}),
}


def stopping_case(team: Team, folder: Path) -> Any:
    """A fit that is not stopped, one that a signal to the second process stops, and the same taken up."""
    found, following = {}, Feed.next
    for name, (template, knobs) in STOPPING.items():
        whole = plan(log_every=10, seed=2, **knobs)
        own = folder / f"{name} written by {team.rank}"  # of the second process nothing may be there
        paths = {"record": own / "history.jsonl", "checkpoint": own / "unstopped"}
        unstopped = fit(template, DATA, whole, progress=False, **paths)
        taken = 0

        def signalled(feed: Feed) -> Any:
            nonlocal taken
            taken += 1
            if taken == 25 and team.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return following(feed)

        Feed.next = signalled  # type: ignore[method-assign]
        both = folder / f"{name} checkpoint"
        stopped = fit(template, DATA, whole, progress=False, checkpoint=both)
        Feed.next = following  # type: ignore[method-assign]
        team.wait()  # for the first one's copy
        if team.rank == 0:
            (folder / f"{name} stopped").write_bytes(both.read_bytes())
        resumed = fit(template, DATA, whole, progress=False, checkpoint=both, resume=True)
        found[name] = {"unstopped": told(unstopped), "stopped": told(stopped), "resumed": told(resumed)}
    return found


DIVERGING = plan(
    steps=100, log_every=10, estimator="trace", optimiser="sgd", schedule="constant", lr=1.5, clip=None,
    dtype="float32",
)  # fmt: skip


def diverging_case(team: Team, folder: Path) -> Any:
    """A divergence that both go back from, and one of a row that only the second process has."""
    gone_back = fit(STILL, DATA, DIVERGING, progress=False)
    try:
        fit(limited, LIMITS, STEEP, progress=False)
    except FitError as error:
        return {"gone_back": told(gone_back), "site": error.site, "rows": error.rows, "step": error.step}
    return {}


def disagreeing_case(team: Team, folder: Path) -> Any:
    """Other data, another seed."""
    try:
        fit(STILL, rows(41 + team.rank), plan(steps=2, seed=team.rank), progress=False)
    except PlanError as error:
        return str(error)
    return ""


def drawing_case(team: Team, folder: Path) -> Any:
    """Draws into one store; more chunks than processes, and fewer."""
    template, data = subject("cells")
    done = fit(template, data, plan(steps=3, rows_per_batch=9, estimator="trace"), progress=False)
    if team.rank == 0:
        save(done, folder / "cells")
    sizes = {}
    for at_once in (7, 100):
        draws.rows_at_once = lambda bound, row, draws, n=at_once: n
        tree = draws.predict(done, data, 20, seed=5, to=folder / f"{at_once}.zarr")
        sizes[at_once] = dict(tree["posterior/z"].sizes)
        tree.close()
    kept = draws.draw(done, data, 20, seed=5, to=folder / f"{team.rank}.nc")
    return {"sizes": sizes, "lp": kept["sample_stats/lp"].values.tolist()}


CASES: dict[str, Callable[[Team, Path], Any]] = {
    "photons": lambda team, folder: noisy_numbers("photons"),
    "cells": lambda team, folder: noisy_numbers("cells"),
    "exact": lambda team, folder: exact_numbers(),
    "parameters": parameters_case,
    "stopping": stopping_case,
    "diverging": diverging_case,
    "disagreeing": disagreeing_case,
    "drawing": drawing_case,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with group() as team:
        for name, case in CASES.items():
            begun = time.perf_counter()
            found = case(team, folder)
            (folder / f"{name}.{team.rank}.json").write_text(json.dumps(found))
            print(name, round(time.perf_counter() - begun, 1), file=sys.stderr)


# ------------------------------------------------------------------ the tests


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the two processes have left what they found."""
    folder = tmp_path_factory.mktemp("ddp")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    children = []
    for rank in range(2):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "tests.inference.test_ddp", str(folder)]
        with (folder / f"said.{rank}").open("wb") as said:
            children.append(subprocess.Popen(command, env=own, cwd=ROOT, stderr=said))
    end = time.monotonic() + LIMIT_S
    try:
        for child in children:
            child.wait(max(0.1, end - time.monotonic()))
    finally:
        for child in children:
            child.kill()
            child.wait()
    said = [(folder / f"said.{rank}").read_text() for rank in range(2)]
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    return folder


def both(left: Path, name: str) -> list[Any]:
    return [json.loads((left / f"{name}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photons", "cells"])
def test_ddp_objective_and_gradient_are_those_of_one_process_in_expectation(name, left):
    first, second = both(left, name)
    assert first == second  # both are told the mean
    one = noisy_numbers(name)
    for what in ("objective", "gradient"):
        gap = np.asarray(first[what]) - np.asarray(one[what])  # of the same minibatch: of the draws alone
        error = gap.std(0, ddof=1) / len(gap) ** 0.5
        assert (error > 0).all()
        # 4 standard errors of 30 pairs: by chance alone one time in 2500 for each of the eight numbers
        assert (np.abs(gap.mean(0)) < 4 * error).all(), (gap.mean(0), error)


@pytest.mark.slow
def test_ddp_objective_and_gradient_without_draws_are_those_of_one_process(left):
    first, second = both(left, "exact")
    assert first == second
    one = exact_numbers()
    for what in ("objective", "norm"):
        np.testing.assert_allclose(first[what], one[what], rtol=1e-5)
    for ours, theirs in zip(first["gradient"], one["gradient"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photons", "cells"])
def test_ddp_parameters_have_the_same_bits_after_every_step(name, left):
    first, second = (found[name] for found in both(left, "parameters"))
    assert first == second
    assert len(set(first["steps"])) == len(first["steps"]) == 13


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STOPPING))
def test_ddp_a_signal_to_one_process_stops_both_and_resume_is_exact(name, left):
    first, second = (found[name] for found in both(left, "stopping"))
    assert first == second
    assert first["stopped"]["fit"]["stopped"] == "signal"
    assert first["stopped"]["fit"]["steps"] == 25  # the step that it fell into
    assert first["resumed"]["fit"]["stopped"] == "steps"
    assert first["resumed"] == first["unstopped"]
    assert first["unstopped"]["fit"]["processes"] == 2
    assert first["unstopped"]["fit"]["engine"] == {"steps": "eager"}
    method = first["unstopped"]["fit"]["finish"].get("method")
    assert method == ("importance sampling" if name == "random" else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STOPPING))
def test_ddp_only_the_first_process_writes(name, left):
    assert {p.name for p in left.glob(f"{name} written by *")} == {f"{name} written by 0"}
    written = left / f"{name} written by 0"
    assert {p.name for p in written.iterdir()} == {"history.jsonl", "unstopped"}
    steps = [json.loads(line)["step"] for line in (written / "history.jsonl").read_text().splitlines()]
    assert steps == both(left, "stopping")[0][name]["unstopped"]["history"]["step"]
    assert not list(left.glob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STOPPING))
def test_ddp_a_fit_of_two_is_taken_up_by_one(name, left):
    template, knobs = STOPPING[name]
    whole = plan(log_every=10, seed=2, **knobs)
    done = fit(template, DATA, whole, progress=False, checkpoint=left / f"{name} stopped", resume=True)
    two = both(left, "stopping")[0][name]
    assert (done.provenance["fit"]["stopped"], done.provenance["fit"]["processes"]) == ("steps", 1)
    assert told(done)["history"]["objective"][:2] == two["unstopped"]["history"]["objective"][:2]
    if name == "still":  # the same rows in the same order: 60 steps of float64 rounding
        one = told(fit(template, DATA, whole, progress=False))
        for found in (told(done), two["unstopped"]):
            assert found["nets"]["own.loc"] == pytest.approx(one["nets"]["own.loc"], rel=1e-10)
            for key in ("objective", "objective_sd", "grad_norm", "part_y", "part_mu", "lr"):
                np.testing.assert_allclose(found["history"][key], one["history"][key], rtol=1e-9, err_msg=key)


@pytest.mark.slow
def test_ddp_a_divergence_is_the_same_for_all_and_names_rows_of_any(left):
    first, second = both(left, "diverging")
    assert first == second
    one = told(fit(STILL, DATA, DIVERGING, progress=False))
    assert first["gone_back"]["fit"]["restarts"] == one["fit"]["restarts"] != []
    with pytest.raises(FitError) as caught:
        fit(limited, LIMITS, STEEP, progress=False)
    assert (first["site"], first["rows"]) == ("y", [7])
    assert (caught.value.site, caught.value.rows) == ("y", (7,))


@pytest.mark.slow
def test_ddp_processes_of_different_fits_are_refused(left):
    first, second = both(left, "disagreeing")
    assert first == second
    assert "the 2 processes of this fit were given different plan, data;" in first


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [7, 100])
def test_ddp_draws_in_one_store_are_those_of_one_process(at_once, left, monkeypatch):
    monkeypatch.setattr(draws, "rows_at_once", lambda bound, row, draws: at_once)
    _, data = subject("cells")
    one = draws.predict(load(left / "cells", CELLS), data, 20, seed=5)
    with xr.open_datatree(left / f"{at_once}.zarr", engine="zarr", chunks=None) as two:
        assert set(two.children) == set(one.children)
        for name, group in one.children.items():
            there = two[name].to_dataset()
            assert set(there.variables) == set(group.to_dataset().variables)
            for key, value in group.to_dataset().variables.items():
                # sums over rows in another order: float64 rounding of lp and log_q
                if value.dtype.kind in "fiub":
                    np.testing.assert_allclose(there[key].values, value.values, rtol=1e-9, err_msg=str(key))
                else:
                    np.testing.assert_array_equal(there[key].values, value.values, err_msg=str(key))
                assert there[key].attrs.get("units") == value.attrs.get("units"), key
    assert both(left, "drawing")[0]["sizes"] == both(left, "drawing")[1]["sizes"]
    assert not list(left.glob(".*zarr*"))


@pytest.mark.slow
def test_ddp_draws_elsewhere_are_written_by_the_first_alone(left):
    first, second = both(left, "drawing")
    assert first["lp"] == second["lp"]
    assert (left / "0.nc").exists()
    assert not (left / "1.nc").exists()


# ------------------------------------------------------------------ without other processes


def test_ddp_every_process_and_step_has_a_stream_of_its_own():
    cpu = torch.device("cpu")
    teams = [Team(), Team(0, 2), Team(1, 2)]
    drawn = [
        [bytes(t.streams(seed, step, cpu)[cpu].numpy()) for seed in (1, 2) for step in (0, 1)] for t in teams
    ]
    assert drawn[0] == drawn[1]
    assert len({state for of_one in drawn[1:] for state in of_one}) == 8


@pytest.mark.parametrize("size", [7, None])
@pytest.mark.parametrize("held", ["table", "narrow", "streamed"])
def test_ddp_shares_make_up_the_batch_of_one_process(held, size):
    how = {"table": {}, "narrow": {"table_bytes": 0}, "streamed": {"resident_bytes": 0}}[held]
    data = {"y": np.arange(3000, dtype=np.float32) if held == "streamed" else np.arange(41, dtype=np.float32)}

    def feed(rank: int, of: int) -> Feed:
        source = open_source(data, FIELDS, ("row",))
        cpu = torch.device("cpu")
        return Feed(source, FIELDS, ("row",), size, 3, cpu, torch.float32, share=(rank, of), **how)

    whole, shares = feed(0, 1), [feed(rank, 3) for rank in range(3)]
    for _ in range(1000 if held == "streamed" and size else 12):  # over epochs, and over groups of blocks
        batch, parts = whole.next(), [share.next() for share in shares]
        assert torch.equal(batch.y, torch.cat([part.y for part in parts]))
        assert torch.equal(batch.y, torch.cat([part.index["row"] for part in parts]).to(batch.y))
        assert [len(part.y) for part in parts] == (
            [2, 2, 3] if size else [len(batch.y) // 3 + (k > 0) * (len(batch.y) % 3 > 0) for k in range(3)]
        )
    assert all(share.state() == whole.state() for share in shares)
    for one in (whole, *shares):
        one.close()


def test_ddp_a_batch_of_fewer_rows_than_processes_is_refused():
    source = open_source(DATA, FIELDS, ("row",))
    with pytest.raises(PlanError, match="a batch of 2 rows cannot be shared by 3 processes"):
        Feed(source, FIELDS, ("row",), 2, 0, torch.device("cpu"), torch.float32, share=(0, 3))


SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu3", "SLURM_STEP_NUM_TASKS": "8"}
SRUN |= {"SLURM_LOCALID": "1", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[07-09]"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Place(1, 4, 1, "env://")),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        (SRUN, Place(3, 8, 1, "tcp://gpu07:20372")),
        ({**SRUN, "MASTER_PORT": "5", "MASTER_ADDR": "b"}, Place(3, 8, 1, "tcp://b:5")),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (BATCH, None),  # a batch script is one process, whatever was asked for
        ({**SRUN, **TORCHRUN}, Place(1, 4, 1, "env://")),  # torchrun started by srun
    ],
)
def test_ddp_a_process_knows_its_place(environment, expected):
    assert place(environment) == expected


def test_ddp_a_torn_environment_is_refused():
    with pytest.raises(PlanError, match="RANK is set, as torchrun does, but not MASTER_ADDR, MASTER_PORT"):
        place({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node3", "node3"),
        ("a,b", "a"),
        ("n[01-04]", "n01"),
        ("n[7,9]-ib", "n7-ib"),
        ("gpu-a[007]", "gpu-a007"),
    ],
)
def test_ddp_the_first_machine_of_a_list(nodes, host):
    assert first_host(nodes) == host


PROGRAM = """
import os, sys, time
rank, how = os.environ["RANK"], sys.argv[1]
print("said by", rank, flush=True)
if how == "both" or how == "second" and rank == "1":
    sys.exit(f"scivi: field x is missing, says {how}")
if how == "second":
    time.sleep(60)
if how == "lost":
    sys.exit("scivi: LOST" if rank == "0" else "scivi: cause")
if how == "stopped":
    time.sleep(0.2 if rank == "0" else 0)
    sys.exit(75 if rank == "0" else 0)
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("well", 0, 0), ("second", 1, 1), ("both", 1, 1), ("stopped", 75, 0), ("lost", 1, 1)],
)
def test_ddp_a_failing_process_ends_the_others_and_is_heard_once(
    how, code, said, tmp_path, monkeypatch, capfd
):
    (tmp_path / "program.py").write_text(PROGRAM.replace("LOST", LOST))
    monkeypatch.setattr(processes, "GRACE_S", 1.0)
    assert launch(2, [how], program=(str(tmp_path / "program.py"),)) == code
    out, err = capfd.readouterr()
    assert out == "said by 0\n"
    assert err.count("scivi: cause" if how == "lost" else "scivi: field x is missing") == said


WAITING = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(60)
"""


def test_ddp_a_signal_goes_on_to_all_processes(tmp_path):
    (tmp_path / "program.py").write_text(WAITING)

    def ask() -> None:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    before = signal.getsignal(signal.SIGTERM)
    assert launch(2, [str(tmp_path)], program=(str(tmp_path / "program.py"),)) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    asking.join()


@pytest.mark.slow
def test_ddp_the_command_line_leaves_what_one_process_would(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subject("photons")[1].to_netcdf("table.nc", engine="h5netcdf")
    command = ["fit", "domains.astrophysics.photons:template", "table.nc", "--steps", "20", "--draws", "40"]
    command += ["--rows-per-batch", "9", "--no-report", "--set", "newton=false", "--set", "log_every=10"]
    assert CliRunner().invoke(app, [*command, "--out", "1"]).exit_code == 0
    two = [sys.executable, "-m", "scivi.cli", *command, "--processes", "2"]
    subprocess.run([*two, "--out", "2"], check=True, timeout=LIMIT_S)
    assert capfd.readouterr().out.count("verdict: ") == 1
    names = [{str(path.relative_to(n)) for path in Path(n).rglob("*")} for n in ("1", "2")]
    stable = [{name for name in own if "tensors-" not in name} for own in names]  # named by their content
    assert stable[0] == stable[1]
    lines = [Path(n, "history.jsonl").read_text().splitlines() for n in ("1", "2")]
    assert [[json.loads(line)["step"] for line in own] for own in lines] == [[10, 20]] * 2
    trees = [xr.load_datatree(f"{n}/posterior.nc", engine="h5netcdf") for n in ("1", "2")]
    assert trees[0]["posterior"].sizes == trees[1]["posterior"].sizes
    assert [json.loads(tree.attrs["provenance"])["fit"]["processes"] for tree in trees] == [1, 2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
