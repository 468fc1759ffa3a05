"""A fit that is killed again and again, as a program: ``killed_fit.py FOLDER KILLS SECONDS SEED``.

Children made by fork run the fit with ``resume=True``; this process kills them with SIGKILL after random
times until it has killed that many, then lets one end. SECONDS is how long the fit takes if nothing stops it:
the times are 3 to 13 % of it. The last line printed has the number of kills and the seconds taken.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from scivi.inference.loop import fit
from scivi.inference.plan import Plan
from scivi.inference.recorder import CLOCKED
from tests.inference.conjugate import hierarchy, rows

schools = replace(hierarchy(), guide=None, nets=None)
PLAN = Plan(
    steps=2000, stop=None, rows_per_batch=5, estimator="trace", log_every=10, save_every_s=0.05, seed=3
)


def run(folder: Path) -> None:
    done = fit(schools, rows(8), PLAN, checkpoint=folder / "fit.ckpt", resume=True, progress=False)
    history = {str(k): v.values.tolist() for k, v in done.history.drop_vars(CLOCKED).items()}
    tensors = {name: value.tolist() for name, value in done.nets.state_dict().items()}
    (folder / "result.json").write_text(json.dumps({"history": history, "tensors": tensors}))


def main(folder: Path, kills: int, seconds: float, seed: int) -> None:
    torch.set_num_threads(1)
    rng, killed, begun = np.random.default_rng(seed), 0, time.monotonic()
    while not (folder / "result.json").exists():
        child = os.fork()
        if child == 0:
            run(folder)
            os._exit(0)
        if killed < kills:
            time.sleep(seconds * rng.uniform(0.03, 0.13))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif status:
            sys.exit(f"a child ended with status {status}")
    print(killed, time.monotonic() - begun)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
