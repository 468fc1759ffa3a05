"""A study's parts: a template of its own, data, and a way to run commands without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

ROOT = Path(__file__).resolve().parents[2]

TEMPLATE = """
import os
import time
from dataclasses import dataclass
import pyro
import pyro.distributions as dist
from torch.distributions import constraints
from scivi.inputs.fields import Field
from scivi.models.template import Template

@dataclass(frozen=True)
class Prior:
    effect_sd: float = 5.0

def model(batch, prior, nets):
    time.sleep(float(os.environ.get("PACE", "0")))  # so that a fit can be met on its way
    mu = pyro.sample("mu", dist.Normal(0.0, prior.effect_sd))
    with batch.plate("school"):
        batch.observe("effect", dist.Normal(mu, batch.sd))

schools = Template(
    name="schools", rows="school", model=model, prior=Prior(),
    fields={
        "effect": Field(("school",), role="observed", unit="points"),
        "sd": Field(("school",), support=constraints.positive, unit="points"),
    },
    dims={"mu": ()},
)
"""

# a fit that takes all of its steps, and is met on its way where each takes a while (PACE)
LONG = """
[plans.long]
steps = 1000
stop = "none"
compile = "off"
log_every = 20
newton = false
estimator = "trace"
"""

WITHOUT_TORCH = """
import sys
class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pyro"):
            raise ImportError(name)
sys.meta_path.insert(0, Refused)
"""


def schools(path: Path, seed: int, sd: float | None = None) -> None:
    """Forty schools; a mean effect of 1."""
    rng = np.random.default_rng(seed)
    error = rng.uniform(1, 3, 40) if sd is None else np.full(40, sd)
    effect = 1 + np.abs(error) * rng.normal(size=40)
    found = {"effect": ("school", effect), "sd": ("school", error)}
    xr.Dataset(found).to_netcdf(path, engine="h5netcdf")


def environment(folder: Path, torch: bool = True, **more: str) -> dict[str, str]:
    """For a process that finds the project and, if asked, no torch."""
    paths = [str(ROOT)]
    if not torch:
        blocked = folder / "without_torch"
        blocked.mkdir(exist_ok=True)
        (blocked / "sitecustomize.py").write_text(WITHOUT_TORCH)
        paths.insert(0, str(blocked))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def scivi(*arguments: Any, env: dict[str, str], code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    call = [sys.executable, "-m", "scivi.cli", *map(str, arguments)]
    run = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    return run


def states(folder: Path, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What ``scivi study status`` says of each fit, by label."""
    found = json.loads(scivi("study", "status", folder, "--json", env=env).stdout)
    return {fit["label"]: fit for fit in found}
