"""Find what the unit tests do not notice: change one thing at a time in the modules that carry the promise, and run their tests.

    python -m tests.mutants                                    all modules
    python -m tests.mutants output/ledger.py --sample 20       some mutants of a module
    python -m tests.mutants --minutes 30                       what is done in that time, a fair sample
    python -m tests.mutants --line driver/collector.py:78      the mutants of a line

Each test runs once without a change, to learn the lines that it runs and how long it takes. Each mutant then gets the tests that run
its line, the quickest first, until one fails. Mutants are written to copies of the checkout only. Results are kept in build/mutants:
what a change of code or tests cannot have changed is not run again, unless by --fresh.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants import results
from tests.mutants.campaign import Campaign, Tree
from tests.mutants.equivalent import FILE, read_reviewed
from tests.mutants.operators import Mutant

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/mutants"
MODULES = (
    "output/ledger.py",
    "output/commit_log.py",
    "output/retries.py",
    "output/verify.py",
    "output/manifest.py",
    "driver/collector.py",
    "driver/committer.py",
    "driver/shard_writer.py",
    "pipeline/actor.py",
    "pipeline/isolation.py",
    "pipeline/crash_guard.py",
    "kubernetes/capacity.py",
    "images/sandbox.py",
    "inputs/containers.py",
    "inputs/allowlist.py",
)


def chosen(mutants: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the command asks for."""
    if options.line:
        module, _, line = options.line.rpartition(":")
        return [m for m in mutants if m.module.endswith(module) and int(line) in (m.line, *m.lines)]
    if options.sample:
        by_module: dict[str, list[Mutant]] = {}
        for mutant in mutants:
            by_module.setdefault(mutant.module, []).append(mutant)
        rng = random.Random(options.seed)
        return [m for some in by_module.values() for m in rng.sample(some, min(options.sample, len(some)))]
    return mutants


def main(arguments: Sequence[str] | None = None) -> int:
    """Run mutants and print a table; return 1 if one survived that is not in the list of reviewed ones."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="below job/batch_inference; default: those that carry the promise"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="at most N mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="another seed samples others")
    parser.add_argument("--line", metavar="FILE:LINE", help="only the mutants of a line")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N", help="begin no mutant after this time")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests")
    parser.add_argument("--fresh", action="store_true", help="run also what was run before")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the results")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tree = Tree(ROOT, MODULES)
    modules = [m for m in MODULES if not options.modules or any(m.endswith(given) for given in options.modules)]
    if options.line:
        modules = [m for m in modules if m.endswith(options.line.rpartition(":")[0])]
    if not modules:
        parser.error(f"the modules are {', '.join(MODULES)}")
    mutants = chosen([mutant for module in modules for mutant in tree.mutants(module)], options)
    if not mutants:
        parser.error("there are no mutants")
    options.folder.mkdir(parents=True, exist_ok=True)
    with Campaign(tree, modules, options.folder, options.jobs, fresh=options.fresh) as campaign:
        campaign.learn()
        outcomes = campaign.run(mutants, until)
    if len(outcomes) < len(mutants):
        print(f"{len(outcomes)} of {len(mutants)} mutants were run in {options.minutes:g} minutes")
    reviewed = read_reviewed(FILE.read_text(encoding="utf-8"))
    whole = not (options.sample or options.line)
    known = {mutant.key for module in modules for mutant in tree.mutants(module)}
    stale = [key for key in reviewed if whole and key[0] in modules and key not in known]
    return results.report(outcomes, reviewed, stale, tree, options.folder)


if __name__ == "__main__":
    sys.exit(main())
