"""The part of pytest that runs in a forked process: chosen tests, quickest first; each result is sent as a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Generator, Sequence
from types import FrameType
from typing import Any

import hypothesis
import pytest

# Share of the examples that Hypothesis tries for each mutant; most mutants fail with one of the first.
EXAMPLES_PERCENT = 25


class Settings:
    """Settings of Hypothesis for mutants: fewer examples, always the same, and the first that fails ends the test."""

    def __init__(self) -> None:
        self._reduced: set[int] = set()

    def pytest_configure(self) -> None:
        """Set what tests do not set themselves, before they are imported."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants", deadline=None, database=None, derandomize=True, phases=phases, report_multiple_bugs=False
        )
        hypothesis.settings.load_profile("mutants")

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Reduce the number of examples."""
        test, case = getattr(item, "obj", None), getattr(getattr(item, "parent", None), "obj", None)
        for owner, name in ((test, "_hypothesis_internal_use_settings"), (case, "settings")):
            found = getattr(owner, name, None)
            if isinstance(found, hypothesis.settings) and id(found) not in self._reduced:
                examples = max(5, found.max_examples * EXAMPLES_PERCENT // 100)
                reduced = hypothesis.settings(found, max_examples=examples)
                self._reduced.add(id(reduced))
                setattr(owner, name, reduced)


class Lines:
    """Notes which lines of some files run, in all threads.

    Args:
        files: Paths, each with the name to note.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files
        self.seen: set[tuple[str, int]] = set()

    def start(self) -> None:
        """Note lines from here on."""
        threading.settrace(self._call)
        sys.settrace(self._call)

    def stop(self) -> None:
        """Note no more lines."""
        threading.settrace(None)
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = self._files.get(frame.f_code.co_filename)
        if name is None:
            return None

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            self.seen.add((name, frame.f_lineno))
            return line

        return line(frame, event, arg)


class Reporter(Settings):
    """Selects tests, and tells of each when it begins and how it ended.

    Args:
        pipe: File descriptor that the lines go to.
        order: Tests by their id, in the order of running; None for all tests of the files.
        lines: Notes the lines that each test runs; None: the process ends at the first failure instead.
    """

    def __init__(self, pipe: int, order: Sequence[str] | None, lines: Lines | None = None) -> None:
        super().__init__()
        self._pipe = pipe
        self._order = None if order is None else {name: index for index, name in enumerate(order)}
        self._lines = lines

    def _send(self, **event: Any) -> None:
        with os.fdopen(os.dup(self._pipe), "w") as file:
            file.write(json.dumps(event) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report a module of tests that cannot be imported."""
        if report.failed:
            self._fail(f"{report.nodeid} (import)", str(report.longrepr))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Choose the tests; take all of a file in which one has another name now."""
        if self._order is None:
            return
        there = {item.nodeid for item in items}
        # A mutant that changes names of tests is tried with all of their file.
        renamed = {name.partition("::")[0] for name in self._order if name not in there}
        last = len(self._order)
        chosen = [i for i in items if i.nodeid in self._order or i.nodeid.partition("::")[0] in renamed]
        items[:] = sorted(chosen, key=lambda item: (self._order or {}).get(item.nodeid, last))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell of a test, and of the lines that it runs."""
        self._send(begun=item.nodeid)
        if self._lines is None:
            return (yield)
        self._lines.seen = set()
        self._lines.start()
        try:
            return (yield)
        finally:
            self._lines.stop()
            self._send(test=item.nodeid, lines=sorted(self._lines.seen))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Report a phase of a test."""
        if report.failed:
            self._fail(report.nodeid, str(report.longrepr))
        self._send(test=report.nodeid, phase=report.when, outcome=report.outcome, seconds=report.duration)

    def _fail(self, name: str, text: str) -> None:
        self._send(failed=name, message="\n".join(text.splitlines()[-8:])[-1000:])
        if self._lines is None:
            os._exit(1)
