"""``scivi new``: what it writes runs unedited, and it neither overwrites nor hides anything."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scivi.errors import TemplateError
from scivi.starter import FILES, next_steps, write

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_three_files_are_written_and_none_is_overwritten(tmp_path):
    paths = write("bird_calls", tmp_path / "models")
    assert [path.name for path in paths] == ["bird_calls.py", "test_bird_calls.py", "bird_calls.ipynb"]
    assert not any("STARTER" in path.read_text("utf-8") for path in paths)
    paths[0].write_text("mine")
    paths[1].unlink()
    with pytest.raises(TemplateError, match=r"(?s)bird_calls.py.* exists already.*bird_calls.ipynb") as told:
        write("bird_calls", tmp_path / "models")
    assert str(paths[1]) not in str(told.value)
    assert paths[0].read_text() == "mine"
    assert not paths[1].exists()


@pytest.mark.parametrize("name", ["bird-calls", "2birds", "class", "", "a.b", "../birds"])
def test_a_name_that_is_no_identifier_is_refused(tmp_path, name):
    with pytest.raises(TemplateError, match="must be a Python identifier"):
        write(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["json", "torch", "scivi"])
def test_a_name_of_another_module_is_refused(tmp_path, name):
    with pytest.raises(TemplateError, match="there is a module of that name already"):
        write(name, tmp_path)


def test_the_next_steps_are_three_commands():
    commands = [line for line in next_steps("bird_calls", "models").splitlines() if line.startswith("  ")]
    assert [line.split()[:2] for line in commands] == [["scivi", v] for v in ("check", "simulate", "fit")]


def test_the_notebook_is_valid_short_and_begins_with_text(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(write("bird_calls", tmp_path)[2], as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert max(len(cell.source.splitlines()) for cell in notebook.cells) <= 10
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_text_is_declared_as_data_of_the_package():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["scivi.starter"] == ["*.txt"]
    assert {path.name for path in (ROOT / "scivi" / "starter").glob("*.txt")} == set(FILES)


def test_what_it_writes_is_tidy(tmp_path):
    pytest.importorskip("ruff")
    paths = write("bird_calls", tmp_path)
    for command in (["check", "--select", "E,F,I"], ["format", "--check"]):
        found = run(tmp_path, "ruff", *command, "--line-length", "110", *map(str, paths))
        assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_what_it_writes_obeys_the_laws_and_passes_its_own_test(tmp_path):
    write("bird_calls", tmp_path)
    found = run(tmp_path, "scivi.cli", "check", "bird_calls:template")
    assert found.returncode == 0, found.stdout + found.stderr
    found = run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "test_bird_calls.py")
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_the_notebook_runs_and_its_fit_can_be_trusted(tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    path = write("bird_calls", tmp_path)[2]
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    names: dict[str, object] = {}
    try:
        with plt.rc_context():
            plt.switch_backend("agg")
            for cell in json.loads(path.read_text("utf-8"))["cells"]:
                if cell["cell_type"] == "code":
                    exec("".join(cell["source"]), names)
            plt.close("all")
    finally:
        sys.modules.pop("bird_calls", None)
    assert "Verdict: trust\n" in capsys.readouterr().out
