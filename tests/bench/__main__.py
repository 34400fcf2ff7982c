"""``python -m tests.bench``: everything in one command; ``make bench`` sets up what it needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.bench import report
from tests.bench.figures import TARGETS, Run
from tests.bench.runner import ROOT, Bench
from tests.bench.scenes import CONTENDERS, SCENES


def main() -> int:
    """Measures, writes and prints; 1 if a contender failed to do its job, but not for a target that is missed."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 1")
    parser.add_argument(
        "--quick", action="store_true", help="few images: shows that everything works, measures nothing"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", choices=[c.name for c in CONTENDERS])
    parser.add_argument("--scenes", nargs="+", metavar="NAME", choices=[s.name for s in SCENES])
    parser.add_argument("--folder", type=Path, help="default: build/bench, with --quick build/bench-quick")
    asked = parser.parse_args()
    rounds = asked.rounds or (1 if asked.quick else 5)
    scenes = [scene for scene in SCENES if not asked.scenes or scene.name in asked.scenes]
    folder = asked.folder or ROOT / "build" / ("bench-quick" if asked.quick else "bench")
    bench = Bench(folder, scenes, asked.only, quick=asked.quick)
    facts = report.machine()
    print("making images, weights and reference labels", flush=True)
    bench.prepare()
    runs: list[Run] = []
    text = ""
    # Written after every run: a bench that is stopped half way has measured something.
    for run in bench.rounds(rounds):
        runs.append(run)
        rates = (("steady", run.steady), ("worked", run.worked))
        rate = "".join(f", {value:.1f} images/s {name}" for name, value in rates if value is not None)
        print(
            f"round {run.round}/{rounds}  {run.scene:26}  {run.contender:14}  {run.wall_s:6.1f} s, start-up {run.startup_s:5.1f} s"
            f"{rate}, top-1 {run.agreement:.1%}",
            flush=True,
        )
        text = report.write(bench, runs, TARGETS, rounds, facts)
    print(f"\n{text}\n{folder}: bench.md, bench.json, bench.png")
    return 1 if bench.failures or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
