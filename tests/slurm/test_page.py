"""The page "Run it on your cluster", followed to the letter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest
import xarray as xr

from tests.studies.material import ROOT, environment, states

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

BLOCK = re.compile(r"<!-- (?P<what>[^\n]*) -->\n```\w*\n(?P<text>.*?)```", re.S)
FEW_MINUTES = 600.0


def test_the_page_does_what_it_says(slurm, tmp_path):
    binaries = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = environment(tmp_path, SLURM_CONF=slurm, PATH=binaries)
    before, read = (ROOT / "docs" / "cluster.md").read_text().split("## Read")
    said = []

    def follow(part: str) -> None:
        for block in BLOCK.finditer(part):
            what, text = block["what"], block["text"]
            if what.startswith("a file: "):
                (tmp_path / what.removeprefix("a file: ")).write_text(text)
                continue
            call = {
                "commands": ["bash", "-euo", "pipefail", "-c", text],
                "python": [sys.executable, "-c", text],
            }[what]
            run = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert run.returncode == 0, f"{text}\n{run.stdout}{run.stderr}"
            said.append(run.stdout)

    follow(before)
    end = time.monotonic() + FEW_MINUTES
    while {fit["state"] for fit in states(tmp_path / "results", env).values()} != {"done"}:
        assert time.monotonic() < end
        time.sleep(1)
    follow(read)
    assert len(BLOCK.findall(before + read)) == 7
    assert "8 fits, 8 to run." in "".join(said)
    assert "trust" in said[-1]
    tree = xr.open_datatree(tmp_path / "results" / "gathered.zarr", engine="zarr", chunks=None)
    assert dict(tree["photons/b.nc"].sizes)["prior"] == 2
    assert "photons / b.nc" in (tmp_path / "results" / "study.html").read_text()
