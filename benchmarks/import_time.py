"""How soon does the library answer: `import scivi` and `scivi --help`, beside a Python that does nothing?

    python benchmarks/import_time.py --json import_time.json

Three commands, each a process of its own, run in turn --repeats times: `python -c pass`, `python -c "import
scivi"` and `python -m scivi.cli --help`. A round before them, not counted, leaves the files in memory and the
byte code on disk. Times are those of a clock on the wall, so that a machine busy with something else makes
all three longer; the ratios bear that better, and so does the time of the processor.

Figures:
    import_s, help_s: seconds, median. Less than .3 and .5 are wanted on an idle machine.
    import_s_least, import_s_most, help_s_least, help_s_most: over the repeats.
    import_ratio, help_ratio: over `python -c pass` of the same round, median; and ..._least, ..._most.
    import_cpu_s, help_cpu_s, pass_cpu_s: seconds of the processor, median.
    pass_s: seconds of `python -c pass`, median.
    loads_torch: 1 if either has loaded torch, else 0.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from record import write_json

COMMANDS = {"pass": ("-c", "pass"), "import": ("-c", "import scivi"), "help": ("-m", "scivi.cli", "--help")}
LOADED = """
import sys
import scivi
from scivi.cli import app
app(["--help"], standalone_mode=False)
sys.exit("torch" in sys.modules)
"""


def timed(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of a process, on the wall and of the processor."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    took, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    rounds = [{name: timed(call) for name, call in COMMANDS.items()} for _ in range(args.repeats + 1)][1:]
    figures: dict[str, float] = {"pass_s": median(one["pass"][0] for one in rounds)}
    for name in ("import", "help"):
        walls = [one[name][0] for one in rounds]
        ratios = [one[name][0] / one["pass"][0] for one in rounds]
        for label, values in ((f"{name}_s", walls), (f"{name}_ratio", ratios)):
            figures |= {label: median(values), f"{label}_least": min(values), f"{label}_most": max(values)}
    figures |= {f"{name}_cpu_s": median(one[name][1] for one in rounds) for name in COMMANDS}
    run = subprocess.run([sys.executable, "-c", LOADED], check=False, stdout=subprocess.DEVNULL)
    figures["loads_torch"] = float(run.returncode)
    for name, value in figures.items():
        print(f"{name:20s} {value:8.3f}")
    write_json(args.json, str(__doc__).splitlines()[0], figures, {"repeats": args.repeats})


if __name__ == "__main__":
    main()
