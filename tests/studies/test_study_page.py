"""The page of a study: what its reader is told of each fit, whoever they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scivi.files import write_json
from scivi.studies.gather import page
from scivi.studies.manifest import expanded
from tests.studies.material import TEMPLATE, schools

STUDY = """
seeds = [0, 1, 2, 3]
[[fits]]
template = "my_model:schools"
data = "schools_*.nc"
"""
VERDICTS = ("trust", "trust with care", "do not trust", None)


@pytest.fixture
def study(tmp_path: Path, monkeypatch) -> Path:
    """A study's folder as if its fits had ended so."""
    (tmp_path / "my_model.py").write_text(TEMPLATE)
    schools(tmp_path / "schools_0.nc", seed=0)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "study.toml").write_text(STUDY)
    manifest, folder = expanded(tmp_path / "study.toml"), tmp_path / "out"
    manifest.write(folder)
    for row, verdict in zip(manifest.rows, VERDICTS, strict=True):
        ended = {"state": "done", "verdict": verdict} if verdict else {"state": "failed", "cause": "data"}
        (folder / "fits" / row.id).mkdir(parents=True, exist_ok=True)
        write_json(folder / "fits" / row.id / "result.json", ended)
    (folder / "fits" / manifest.rows[0].id / "report.html").touch()
    return folder


def test_a_verdict_is_told_by_a_sign_and_not_by_colour_alone(study):
    cells = re.findall(r'<td class="mark (\w+)">(.*?)</td>', page(study))
    marks = {tone: re.sub(r"<.*?>", "", cell) for tone, cell in cells}
    words = {"pass": "✓ trust", "warn": "! trust with care", "fail": "✗ do not trust", "mute": "failed"}
    assert marks == words
    assert all('<span aria-hidden="true">' in cell for tone, cell in cells if tone != "mute")


def test_a_table_that_scrolls_can_be_reached_and_has_a_name(study):
    boxes = re.findall(r'<div class="scroll"([^>]*)>', page(study))
    assert boxes == [' role="region" tabindex="0" aria-label="schools / schools_0.nc"']
