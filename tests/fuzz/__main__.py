"""Feed damaged inputs to everything that reads untrusted bytes: python -m tests.fuzz --seconds 300.

Each batch runs in a process of its own, with limits on memory and on the time of one input, so that a crash and a hang are found like an
exception. Findings are written to `build/fuzz`, and `--replay FILE` feeds one again.
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
# Seconds of CPU time that an input may take; by the clock it has ten times as many, since others may use the machine.
INPUT_S, MEMORY_BYTES = 10, 3 * 2**30
CLOCK_FACTOR = 10


@dataclass
class Result:
    """Counts and findings of a target."""

    inputs: int = 0
    seconds: float = 0.0
    findings: dict[str, bytes] = field(default_factory=dict)


def input_of(target: Target, seed: int) -> bytes:
    """Return the input of a number, the same one each time."""
    rng = random.Random(f"{target.name} {seed}")
    return mutate(rng.choice(target.seeds), target.seeds, rng)


def _batch(target: Target, first: int, count: int, current: Any, findings: str) -> None:
    """Read inputs, in a process of its own; write the current number and the exceptions."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    faulthandler.disable()
    for signal_number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(signal_number, signal.SIG_DFL)
    for number in range(first, first + count):
        data = input_of(target, number)
        current.value = number
        _limit_time(INPUT_S)
        try:
            target.read(data)
        except BaseException as exc:
            frame = traceback.extract_tb(exc.__traceback__)[-1]
            finding = f"{type(exc).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            with Path(findings).open("a") as file:
                print(json.dumps([number, finding]), file=file)
        _limit_time(0)
    current.value = first + count
    os._exit(0)


def _limit_time(cpu_s: float) -> None:
    """Let the kernel end this process after these seconds of CPU time, and after more of them by the clock; 0 for no limit."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, cpu_s * CLOCK_FACTOR)


def fuzz(target: Target, first: int, count: int, result: Result) -> None:
    """Feed ``count`` inputs, from number ``first`` on; add to the result."""
    context = multiprocessing.get_context("fork")
    start = time.monotonic()
    end = first + count
    while first < end:
        current = context.Value("q", first)
        with tempfile.NamedTemporaryFile("r") as findings:
            process = context.Process(target=_batch, args=(target, first, end - first, current, findings.name))
            process.start()
            process.join()
            for line in findings:
                number, finding = json.loads(line)
                result.findings.setdefault(finding, input_of(target, number))
        first = int(current.value)
        if process.exitcode:
            ending = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
            result.findings.setdefault("hang" if ending in ("SIGALRM", "SIGPROF") else ending, input_of(target, first))
            first += 1
    result.inputs += count
    result.seconds += time.monotonic() - start


def table(results: dict[str, Result]) -> str:
    """Return the results as Markdown."""
    lines = ["| target | inputs | seconds | findings |", "| --- | --- | --- | --- |"]
    for name, result in results.items():
        lines.append(f"| {name} | {result.inputs:,} | {result.seconds:.0f} | {'; '.join(result.findings) or 'none'} |")
    inputs, seconds = sum(r.inputs for r in results.values()), sum(r.seconds for r in results.values())
    lines.append(f"| all | {inputs:,} | {seconds:.0f} | {sum(len(r.findings) for r in results.values())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz and print; return 1 if anything was found."""
    parser = argparse.ArgumentParser(
        prog="make fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="time in all")
    parser.add_argument("--inputs", type=int, metavar="N", help="number of inputs for each target, instead of a time")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other inputs")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the table and the findings")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument(
        "--replay",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="feed each file to the target that its folder is named after",
    )
    options = parser.parse_args(arguments)
    chosen = [t for t in targets() if not options.only or t.name in options.only]
    for file in options.replay or ():
        print(f"{file}: ", end="", flush=True)
        (target,) = [t for t in chosen if t.name == file.parent.name]
        target.read(file.read_bytes())
        print("nothing", flush=True)
    if options.replay:
        return 0
    results = {target.name: Result() for target in chosen}
    first, until = options.seed * 10**9, time.monotonic() + options.seconds
    for target in chosen if options.inputs else ():
        fuzz(target, first, options.inputs, results[target.name])
    while not options.inputs and time.monotonic() < until:
        for target in chosen:
            fuzz(target, first, BATCH, results[target.name])
            if time.monotonic() > until:
                break
        first += BATCH
    for name, result in results.items():
        for index, data in enumerate(result.findings.values()):
            file = options.folder / name / f"{index}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    text = table(results)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "fuzz.md").write_text(text + "\n")
    print(text)
    return int(any(result.findings for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
