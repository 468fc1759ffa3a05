from __future__ import annotations

import re
from dataclasses import replace

import pytest

from scivi.errors import PlanError, Unsupported
from scivi.inference import trackers
from scivi.inference.loop import fit
from scivi.inference.opening import open_data
from scivi.inference.recorder import Recorder, Several
from scivi.inference.trackers import MLflow, Prometheus, TensorBoard, about, exposition, tracker
from tests.inference.conjugate import hierarchy, plan, rows, shared

ENTRY = {"step": 20, "objective": 1.25, "grad_norm": 0.5, "lr": 1e-3, "wall_s": 4.0, "loader_share": 0.125}
ENTRY |= {"part_y": -1.5, "part_mu": -0.25}
SHORT = plan(steps=30, log_every=10, estimator="trace")


def told() -> dict:
    return about(shared, open_data(shared, rows(8)), SHORT)


def numbers(text: str) -> dict[str, float]:
    """Value by name with labels, of text whose every line is one of the three forms of the format."""
    found = {}
    sample = re.compile(
        r'([a-zA-Z_:][a-zA-Z0-9_:]*(?:\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*\})?) ([-+.\w]+)'
    )
    assert text.endswith("\n")
    for line in text.splitlines():
        if not re.fullmatch(r"# (HELP|TYPE) \w+ .+", line):
            match = sample.fullmatch(line)
            assert match, line
            found[match[1]] = float(match[2])
    return found


# ---------------------------------------------------------------- Prometheus


def test_file_for_prometheus_is_as_its_documentation_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "resident_bytes", lambda: 4096)
    file = tmp_path / "made" / "fit.prom"
    prometheus = Prometheus(file, {"template": "shared mean"})
    assert isinstance(prometheus, Recorder)
    prometheus.write(ENTRY)
    assert file.read_text() == (
        "# HELP scivi_running 1 while the fit runs, 0 once it has ended.\n"
        "# TYPE scivi_running gauge\n"
        'scivi_running{template="shared mean"} 1.0\n'
        "# HELP scivi_steps_total Steps taken.\n"
        "# TYPE scivi_steps_total counter\n"
        'scivi_steps_total{template="shared mean"} 20.0\n'
        "# HELP scivi_steps_per_second Steps per second between the last entries.\n"
        "# TYPE scivi_steps_per_second gauge\n"
        'scivi_steps_per_second{template="shared mean"} 5.0\n'
        "# HELP scivi_objective_nats_per_row Mean negative bound since the entry before.\n"
        "# TYPE scivi_objective_nats_per_row gauge\n"
        'scivi_objective_nats_per_row{template="shared mean"} 1.25\n'
        "# HELP scivi_gradient_norm Mean norm of the gradient since the entry before.\n"
        "# TYPE scivi_gradient_norm gauge\n"
        'scivi_gradient_norm{template="shared mean"} 0.5\n'
        "# HELP scivi_learning_rate Learning rate.\n"
        "# TYPE scivi_learning_rate gauge\n"
        'scivi_learning_rate{template="shared mean"} 0.001\n'
        "# HELP scivi_loader_share Share of the time that steps waited for their batches.\n"
        "# TYPE scivi_loader_share gauge\n"
        'scivi_loader_share{template="shared mean"} 0.125\n'
        "# HELP scivi_part_nats_per_row Share of a site in the bound, nats per row; of a latent, its KL "
        "divergence with a minus.\n"
        "# TYPE scivi_part_nats_per_row gauge\n"
        'scivi_part_nats_per_row{template="shared mean",site="y"} -1.5\n'
        'scivi_part_nats_per_row{template="shared mean",site="mu"} -0.25\n'
        "# HELP scivi_host_memory_bytes Resident memory of the process.\n"
        "# TYPE scivi_host_memory_bytes gauge\n"
        'scivi_host_memory_bytes{template="shared mean"} 4096.0\n'
    )
    prometheus.write({**ENTRY, "step": 50, "wall_s": 6.0})
    assert numbers(file.read_text())['scivi_steps_per_second{template="shared mean"}'] == 15
    prometheus.close()
    found = numbers(file.read_text())
    assert found['scivi_running{template="shared mean"}'] == 0
    assert found['scivi_steps_total{template="shared mean"}'] == 50
    assert [path.name for path in file.parent.iterdir()] == ["fit.prom"]  # nothing half-written stays


AWKWARD = 'a\\b "quoted"\nsecond line, {braces} = ø'


def test_labels_and_numbers_of_every_kind_are_read_back_by_prometheus_own_parser(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser", reason="reads the file as Prometheus does")
    file = tmp_path / "fit.prom"
    odd = {"objective": float("nan"), "grad_norm": float("inf"), "lr": 1e-300, "part_y": float("-inf")}
    Prometheus(file, {"fit": AWKWARD}).write({**ENTRY, **odd})
    families = {f.name: f for f in parser.text_string_to_metric_families(file.read_text())}
    assert families["scivi_steps"].type == "counter"  # the parser takes "_total" off
    assert {f.type for name, f in families.items() if name != "scivi_steps"} == {"gauge"}
    values = {s.name: s.value for f in families.values() for s in f.samples}
    assert all(s.labels["fit"] == AWKWARD for f in families.values() for s in f.samples)
    assert values["scivi_gradient_norm"] == float("inf")
    assert values["scivi_learning_rate"] == 1e-300
    assert values["scivi_objective_nats_per_row"] != values["scivi_objective_nats_per_row"]


def test_label_values_are_escaped():
    text = exposition(
        iter([("a", "gauge", "Two\nlines.", [({}, 1.0)]), ("b", "gauge", "None.", [])]), {"l": AWKWARD}
    )
    assert text == (
        '# HELP a Two\\nlines.\n# TYPE a gauge\na{l="a\\\\b \\"quoted\\"\\nsecond line, {braces} = ø"} 1.0\n'
    )
    assert exposition(iter([("a", "gauge", "One.", [({}, float("-inf"))])]), {}).endswith("a -Inf\n")


def test_faults_of_a_file_for_prometheus_are_all_listed():
    with pytest.raises(PlanError) as caught:
        Prometheus("fit.txt", {"1st": "a", "__own": "b", "a-b": "c", "site": "d", "good_1": "e"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for word in ('"1st"', '"__own"', '"a-b"', '"site"', "fit.txt"):
        assert sum(word in line for line in lines) == 1, word


def test_a_fit_tells_prometheus_its_last_entry(tmp_path):
    recorder = tracker("prometheus", tmp_path, told())
    done = fit(shared, rows(8), SHORT, record=recorder, progress=False)
    found = numbers((tmp_path / "scivi.prom").read_text())
    labels = f'template="shared mean",data="{done.provenance["data"]["fingerprint"][:12]}"'
    labels += f',version="{done.provenance["versions"]["scivi"]}",fit="{tmp_path}"'
    assert found[f"scivi_steps_total{{{labels}}}"] == 30
    assert found[f"scivi_objective_nats_per_row{{{labels}}}"] == done.history.objective.values[-1]
    parts = [v for name, v in found.items() if name.startswith("scivi_part_nats_per_row")]
    assert sum(parts) == pytest.approx(-done.history.objective.values[-1], rel=1e-6)  # float32 sums
    assert found[f"scivi_host_memory_bytes{{{labels}}}"] > 1e7


# ---------------------------------------------------------------- TensorBoard


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Step and value by name, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_number_of_the_history_can_be_read_from_tensorboards_files(tmp_path):
    pytest.importorskip("tensorboard", reason='comes with the extra "track"')
    recorder = tracker(f"tensorboard={tmp_path / 'events'}", tmp_path, told())
    done = fit(shared, rows(8), SHORT, record=recorder, progress=False)
    found = scalars(tmp_path / "events")
    assert set(found) == {str(name) for name in done.history.data_vars} - {"step"}
    for name, values in found.items():
        assert [step for step, _ in values] == [10, 20, 30]
        expected = done.history[name].values.tolist()
        assert [value for _, value in values] == pytest.approx(expected, rel=1e-6), name  # float32 there


def test_what_a_killed_fit_told_tensorboard_after_its_checkpoint_is_hidden(tmp_path):
    pytest.importorskip("tensorboard", reason='comes with the extra "track"')
    killed = TensorBoard(tmp_path)
    for step in (10, 20, 30):
        killed.write({"step": step, "objective": 100.0 + step})
    again = TensorBoard(tmp_path)
    for step in (20, 30):
        again.write({"step": step, "objective": 200.0 + step})
    killed.close()
    again.close()
    assert scalars(tmp_path)["objective"] == [(10, 110.0), (20, 220.0), (30, 230.0)]


# ---------------------------------------------------------------- MLflow


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of MLflow's own dependencies
def test_mlflow_has_parameters_tags_and_every_number(tmp_path, monkeypatch):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason='comes with the extra "track"')
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    from mlflow.tracking import MlflowClient

    template = replace(hierarchy(), guide=None, nets=None)
    source = open_data(template, rows(8))
    recorder = tracker(f"mlflow={tmp_path}", tmp_path / "fit one", about(template, source, SHORT))
    done = fit(template, source, SHORT, record=recorder, progress=False)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("scivi")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", str(tmp_path / "fit one"))
    assert run.data.params["plan.steps"] == "30"
    assert (
        run.data.params["plan.stop.window"] == "100" if SHORT.stop else run.data.params["plan.stop"] == "None"
    )
    assert run.data.tags["scivi.template"] == template.name
    assert run.data.tags["scivi.data"] == done.provenance["data"]["fingerprint"]
    for name in (str(n) for n in done.history.data_vars if n != "step"):
        metrics = sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.step)
        assert [m.step for m in metrics] == [10, 20, 30]
        assert [m.value for m in metrics] == done.history[name].values.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_second_run_joins_the_same_experiment(tmp_path, monkeypatch):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason='comes with the extra "track"')
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    first, second = (MLflow(tmp_path, "photons", name) for name in ("one", "two"))
    first.write(ENTRY)
    first.close()
    second.close()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("photons")
    assert {r.info.run_name for r in client.search_runs([experiment.experiment_id])} == {"one", "two"}


# ---------------------------------------------------------------- choosing


def test_a_word_that_names_no_tracker_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(PlanError) as caught:
        tracker("wandb=here", tmp_path, {})
    for word in ('"wandb=here" is no tracker', "tensorboard=FOLDER", "mlflow=FOLDER", "prometheus=FILE.prom"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("word", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_told_with_its_extra(word, module, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    for name in ("alembic", "sqlalchemy", "mlflow.entities"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        Unsupported, match=r'is not installed. It comes with the extra: pip install "scivi\[track\]"'
    ):
        tracker(word, tmp_path, told())
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_leaves_the_others_and_the_fit(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    good = tmp_path / "good.prom"
    both = Several(Prometheus(blocked / "fit.prom", {}), Prometheus(good, {}))
    with pytest.warns(UserWarning, match="the recorder Prometheus failed") as caught:
        done = fit(shared, rows(8), SHORT, record=both, progress=False)
    assert len(caught) == 1
    assert len(done.history.log) == 3
    assert numbers(good.read_text())["scivi_steps_total"] == 30
