"""Is the verdict right? Good fits and bad ones, planted, and what the report says of each.

    python benchmarks/verdict.py --json verdict.json

The cases are those of ``planted``. What a case is the oracle decides: *good* if every mean is within .2
oracle sd and every sd within a factor of 1.2, *bad* beyond .5 or 1.5, or if it was refused; what is in
between counts for neither. *Trusted* is the verdict "trust" alone.

Figures:
    cases, good, bad, between: how many.
    bad_caught: share of bad cases that are not trusted; at least .95 is wanted.
    good_trusted: share of good cases that are; at least .9 is wanted.
    bad_trusted_over_1sd: bad cases with an error of a mean above 1 sd that are trusted; 0 is wanted.
    good_VERDICT, between_VERDICT, bad_VERDICT: the confusion matrix.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from record import use_threads, write_json

if __name__ == "__main__":
    use_threads(1)

from planted import CASES, Seen

VERDICTS = ("trust", "trust with care", "do not trust", "refused")
KINDS = ("good", "between", "bad")


def figures_of(found: dict[str, Seen]) -> dict[str, float]:
    """The confusion matrix and its shares."""
    matrix = Counter((seen.kind, seen.verdict) for seen in found.values())
    total = {kind: sum(matrix[kind, verdict] for verdict in VERDICTS) for kind in KINDS}
    trusted = [seen for seen in found.values() if seen.verdict == "trust"]
    figures = {"cases": float(len(found)), **{kind: float(n) for kind, n in total.items()}}
    figures["bad_caught"] = 1 - matrix["bad", "trust"] / max(1, total["bad"])
    figures["good_trusted"] = matrix["good", "trust"] / max(1, total["good"])
    figures["bad_trusted_over_1sd"] = float(sum(seen.error > 1 for seen in trusted))
    for kind in KINDS:
        for verdict in VERDICTS:
            figures[f"{kind}_{verdict.replace(' ', '_')}"] = float(matrix[kind, verdict])
    return figures


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", metavar="TEXT", nargs="+", default=[""], help="cases whose names contain it"
    )
    parser.add_argument(
        "--kept", type=Path, metavar="FILE", help="what was found; what is there is not run again"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Seen] = {}
    lines = given.kept.read_text().splitlines() if given.kept and given.kept.exists() else []
    kept = {told.pop("name"): Seen(**told) for told in map(json.loads, lines)}
    for case in CASES:
        if not any(text in case.name for text in given.only):
            continue
        begun = time.perf_counter()
        seen = found[case.name] = kept[case.name] if case.name in kept else case.run()
        if given.kept and case.name not in kept:
            with given.kept.open("a") as file:
                file.write(json.dumps({"name": case.name, **asdict(seen)}) + "\n")
        told = f"{case.name:36s} {case.planted or 'nothing':24s} {seen.kind:8s} {seen.verdict:16s} "
        told += f"error {seen.error:8.2g} sd, factor {seen.factor:8.3g} {time.perf_counter() - begun:6.1f} s"
        print(told, seen.why[:300], flush=True)
    figures = figures_of(found)
    print(f"\n{'':9s}" + "".join(f"{verdict:>17s}" for verdict in VERDICTS))
    for kind in KINDS:
        counts = [figures[f"{kind}_{verdict.replace(' ', '_')}"] for verdict in VERDICTS]
        print(f"{kind:9s}" + "".join(f"{n:17.0f}" for n in counts))
    for name in ("bad_caught", "good_trusted", "bad_trusted_over_1sd"):
        print(f"{name:24s} {figures[name]:.3f}")
    write_json(given.json, "Is the verdict right?", figures, {"draws": 2000})


if __name__ == "__main__":
    main()
