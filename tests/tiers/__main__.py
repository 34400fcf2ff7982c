"""`make test`: announce, run and sum up the tiers. `python -m tests.tiers`, in the repository's root, with any Python 3.10."""

from __future__ import annotations

import argparse
import os
import sys

from tests.tiers import announce, changes, runner
from tests.tiers.figures import REPOSITORY, TIERS


def main(changed: bool) -> int:
    """Run the tiers and return make's exit status."""
    choices = {tier.name: changes.Choice((), "") for tier in TIERS}
    if changed:
        files, base = changes.changed_files()
        choices = changes.choose(files)
        announce.say_choice(files, base, choices)
    tiers = [tier for tier in TIERS if choices[tier.name].tests is not None]
    if not tiers:
        return 0
    announce.say_plan(tiers)
    if not announce.say_lacks(tiers):
        return 1
    run = runner.Run(REPOSITORY, [runner.Step(tier, choices[tier.name].tests or ()) for tier in tiers])
    try:
        return run.all(keep_going=runner.keeps_going(os.environ.get("MAKEFLAGS", "")))
    finally:
        run.say_table()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.tiers", description=__doc__)
    parser.add_argument("--changed", action="store_true", help="run only what the changes since main can affect")
    try:
        sys.exit(main(parser.parse_args().changed))
    except KeyboardInterrupt:
        sys.exit(130)
