"""What every benchmark shares: the cores it may use, and its figures with what they depend on, as JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import scivi

THREADS = 2


def use_threads(count: int = THREADS) -> None:
    """Keep this process, whatever library it uses, to some cores. Call before JAX is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={count}"
    torch.set_num_threads(count)


def arguments(doc: str | None, data: Path, *, seeds: int) -> argparse.Namespace:
    """What a benchmark over seeds is told, --seeds, --data and --json; ends the process without data."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="how many")
    parser.add_argument("--data", type=Path, default=data, help="what it reads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    if not given.data.exists():
        raise SystemExit(f'there is no "{given.data}": name it by --data.')
    return given


def environment() -> dict[str, str | int | float]:
    """What the figures depend on besides the code."""
    found: dict[str, str | int | float] = {}
    for package in ("torch", "pyro-ppl", "numpyro", "nutpie", "jax", "scvi-tools", "arch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return {
        "scivi": scivi.__version__,
        "python": platform.python_version(),
        **found,
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": THREADS,
    }


def _processor() -> str:
    """Model name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def write_json(
    path: Path | None, question: str, figures: Mapping[str, float], settings: Mapping[str, float]
) -> None:
    """Write the figures of a benchmark, if a path is given; JSON has no word for what is no number."""
    if path is not None:
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        told = {"question": question, "figures": figures, "environment": {**environment(), **settings}}
        path.write_text(json.dumps(told, indent=2) + "\n")
