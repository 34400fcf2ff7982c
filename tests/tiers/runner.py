"""The tiers one after the other, each by its target of make, and the table of what came of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from xml.etree import ElementTree

from tests.tiers.figures import CACHES, Tier

FOLDER = Path("build/tiers")
SLOWEST = 10


@dataclass(frozen=True)
class Step:
    """A tier and the part of its tests that runs; all if none are named."""

    tier: Tier
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counts:
    """What pytest reports of a tier; `slowest` has seconds and names."""

    passed: int
    failed: int
    skipped: int
    slowest: tuple[tuple[float, str], ...]


@dataclass
class Result:
    """How a tier ended.

    Attributes:
        status: The exit status of make, or None for a tier that was not run or was interrupted.
        seconds: How long it took.
        counts: Of its tests; None if pytest did not report.
        caches: Products that it used, and whether each was there already.
    """

    status: int | None
    seconds: float
    counts: Counts | None
    caches: dict[str, bool]


def keeps_going(flags: str) -> bool:
    """Say whether make was called with -k, by its variable MAKEFLAGS, in which single letters come first."""
    first = flags.split(" ")[0]
    return "k" in first and not first.startswith("-") and "=" not in first


def read_counts(file: Path) -> Counts | None:
    """Read a JUnit file; None if there is none, since the tier has no tests or ended before them."""
    try:
        suites = list(ElementTree.parse(file).getroot().iter("testsuite"))  # noqa: S314
    except (OSError, ElementTree.ParseError):
        return None
    total = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"]
    slowest = sorted(
        (
            (float(case.get("time", 0)), f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
            for suite in suites
            for case in suite.iter("testcase")
        ),
        reverse=True,
    )
    return Counts(total["tests"] - failed - total["skipped"], failed, total["skipped"], tuple(slowest[:SLOWEST]))


class Run:
    """A run of tiers.

    Args:
        root: The folder with the Makefile.
        steps: What to run, in this order.
    """

    def __init__(self, root: Path, steps: Sequence[Step]) -> None:
        self._root = root
        self._steps = steps
        self._folder = root / FOLDER
        self._make = os.environ.get("MAKE", "make")
        self.results: dict[str, Result] = {}

    def all(self, *, keep_going: bool = False) -> int:
        """Run the tiers up to the first that fails, or all; return make's status of the first that failed, or 0."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in self._folder.iterdir():
            file.unlink()
        first = 0
        for step in self._steps:
            status = self._one(step)
            first = first or status
            if status and not keep_going:
                break
        return first

    def _one(self, step: Step) -> int:
        name, start = step.tier.name, time.monotonic()
        record = self._folder / f"{name}.caches"
        command = [self._make, "--no-print-directory", step.tier.target]
        if step.tests:
            command.append(f"TESTS={' '.join(step.tests)}")
        print(f"\n=== {name}: {' '.join(command[:3])}", flush=True)
        if name == "setup":
            ready = subprocess.run([*command, "--question"], cwd=self._root, capture_output=True, check=False)
            record.write_text(f"venv {'miss' if ready.returncode else 'hit'}\n")
        status = None
        try:
            environment = {**os.environ, "CACHE_RECORD": str(record)}
            status = _wait_for(command, self._root, environment)
        finally:
            counts = read_counts(self._folder / f"{name}.xml")
            self.results[name] = Result(status, time.monotonic() - start, counts, _read_caches(record))
        return status

    def say_table(self) -> None:
        """Print the table and write it to build/tiers/table.txt."""
        text = table(self._steps, self.results)
        print(f"\n{text}", flush=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "table.txt").write_text(f"{text}\n")


def _wait_for(command: Sequence[str], folder: Path, environment: dict[str, str]) -> int:
    """Run a command and end it with this process: a SIGTERM, as CI sends it, would leave make's children running.

    The signal is caught before the command starts, and only passed on, so that there is no moment at which it is lost.
    """
    caught: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if process:
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        process = subprocess.Popen(command, cwd=folder, env=environment)
        if caught:
            process.terminate()
        status = process.wait()
    except KeyboardInterrupt:
        if process:
            process.wait()  # The terminal has interrupted it as well.
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if caught:
        sys.exit(128 + caught[0])
    return status


def _read_caches(file: Path) -> dict[str, bool]:
    """Read the products of a tier; one that was made is no hit, although others find it afterwards."""
    found: dict[str, bool] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        name, word = line.split()
        found[name] = found.get(name, True) and word == "hit"
    return found


def _caches(products: dict[str, bool]) -> str:
    words = []
    for cache, members in CACHES.items():
        used = [name for name in members if name in products]
        made = [name for name in used if not products[name]]
        if made:
            words.append(f"{cache}: {len(made)} of {len(used)} made" if len(used) > 1 else f"{cache}: made")
        elif used:
            words.append(f"{cache}: hit")
    return ", ".join(words)


def table(steps: Sequence[Step], results: dict[str, Result]) -> str:
    """Return the table of tiers, the total, and the slowest tests of all tiers."""
    rows: list[tuple[str, ...]] = [("tier", "result", "passed", "failed", "skipped", "minutes", "caches")]
    for step in steps:
        result = results.get(step.tier.name)
        if result is None:
            rows.append((step.tier.name, "not run", "", "", "", "", ""))
            continue
        word = {None: "interrupted", 0: "passed"}.get(result.status, "failed")
        counts = result.counts
        numbers = (f"{counts.passed}", f"{counts.failed}", f"{counts.skipped}") if counts else ("", "", "")
        rows.append((step.tier.name, word, *numbers, f"{result.seconds / 60:.1f}", _caches(result.caches)))
    known = [result.counts for result in results.values() if result.counts]
    totals = [str(sum(getattr(counts, key) for counts in known)) for key in ("passed", "failed", "skipped")]
    minutes = sum(result.seconds for result in results.values()) / 60
    rows.append(("total", "", *totals, f"{minutes:.1f}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    slowest = sorted((entry for counts in known for entry in counts.slowest), reverse=True)[:SLOWEST]
    if slowest:
        lines += ["", f"the {len(slowest)} slowest tests", *(f"{seconds:8.1f} s  {name}" for seconds, name in slowest)]
    return "\n".join(lines)
