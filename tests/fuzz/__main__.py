"""Feeds damaged inputs to everything that reads a stranger's bytes: python -m tests.fuzz --seconds 300.

Each batch runs in a process of its own, with limits on memory and on the time of one input, so that a crash and a hang are found like any
other. What was found is written to `build/fuzz`, and `--replay FILE` feeds it again.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutation import mutate
from tests.fuzz.targets import Target, targets

FOLDER = Path(__file__).parents[2] / "build/fuzz"
BATCH = 500
INPUT_S, MEMORY_BYTES = 10, 3 * 2**30


@dataclass
class Result:
    """What became of a target."""

    inputs: int = 0
    seconds: float = 0.0
    findings: dict[str, bytes] = field(default_factory=dict)


def inputs_of(target: Target, seed: int) -> bytes:
    """The input of a number; the same each time."""
    rng = random.Random(f"{target.name} {seed}")
    return mutate(rng.choice(target.seeds), target.seeds, rng)


def _batch(target: Target, first: int, count: int, shared: Any, found: str) -> None:
    """In a process of its own: reads inputs, tells how far it is, and what was raised."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in range(first, first + count):
        data = inputs_of(target, number)
        shared.value = number
        signal.setitimer(signal.ITIMER_REAL, INPUT_S)
        try:
            target.read(data)
        except BaseException as exc:
            where = traceback.extract_tb(exc.__traceback__)[-1]
            what = f"{type(exc).__name__} at {Path(where.filename).name}:{where.lineno}"
            with Path(found).open("a") as file:
                print(json.dumps([number, what]), file=file)
        signal.setitimer(signal.ITIMER_REAL, 0)
    shared.value = first + count
    os._exit(0)


def fuzz(target: Target, first: int, count: int, result: Result) -> None:
    """Feeds so many inputs, from a number on; adds to the result."""
    context = multiprocessing.get_context("fork")
    begun = time.monotonic()
    end = first + count
    while first < end:
        shared = context.Value("q", first)
        with tempfile.NamedTemporaryFile("r") as found:
            process = context.Process(target=_batch, args=(target, first, end - first, shared, found.name))
            process.start()
            process.join()
            for line in found:
                number, what = json.loads(line)
                result.findings.setdefault(what, inputs_of(target, number))
        first = int(shared.value)
        if process.exitcode:
            how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
            result.findings.setdefault("hang" if how == "SIGALRM" else how, inputs_of(target, first))
            first += 1
    result.inputs += count
    result.seconds += time.monotonic() - begun


def table(results: dict[str, Result]) -> str:
    """The results as Markdown."""
    lines = ["| target | inputs | seconds | findings |", "| --- | --- | --- | --- |"]
    for name, one in results.items():
        lines.append(f"| {name} | {one.inputs:,} | {one.seconds:.0f} | {'; '.join(one.findings) or 'none'} |")
    inputs, seconds = sum(r.inputs for r in results.values()), sum(r.seconds for r in results.values())
    lines.append(f"| all | {inputs:,} | {seconds:.0f} | {sum(len(r.findings) for r in results.values())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzzes and prints; 1 if anything was found."""
    parser = argparse.ArgumentParser(
        prog="make fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="in all")
    parser.add_argument("--inputs", type=int, metavar="N", help="so many for each target instead")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other inputs")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the table and what is found")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="feed this file to the target that its folder is named after"
    )
    asked = parser.parse_args(arguments)
    chosen = [t for t in targets() if not asked.only or t.name in asked.only]
    if asked.replay:
        (target,) = [t for t in chosen if t.name == asked.replay.parent.name]
        target.read(asked.replay.read_bytes())
        print("nothing")
        return 0
    results = {target.name: Result() for target in chosen}
    first, until = asked.seed * 10**9, time.monotonic() + asked.seconds
    for target in chosen if asked.inputs else ():
        fuzz(target, first, asked.inputs, results[target.name])
    while not asked.inputs and time.monotonic() < until:
        for target in chosen:
            fuzz(target, first, BATCH, results[target.name])
            if time.monotonic() > until:
                break
        first += BATCH
    for name, result in results.items():
        for place, data in enumerate(result.findings.values()):
            file = asked.folder / name / f"{place}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    text = table(results)
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / "fuzz.md").write_text(text + "\n")
    print(text)
    return int(any(result.findings for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
