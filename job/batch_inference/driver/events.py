"""Events of an attempt, and those who listen to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

from batch_inference.driver.progress import Phase, Progress
from batch_inference.output.records import Commit, now


@dataclass(frozen=True)
class AttemptInfo:
    """The identity of an attempt.

    Attributes:
        run_name: Name of the run that it belongs to, "" where none was given.
        id: Its identifier, part of the names of files and records that it writes.
        started: Its start by ``time.monotonic``.
        started_at: Its start in UTC, ISO 8601.
    """

    run_name: str
    id: str = field(default_factory=lambda: uuid4().hex[:8])
    started: float = field(default_factory=time.monotonic)
    started_at: str = field(default_factory=now)


class Listener:
    """Base of what follows an attempt; does nothing at any event. ``progress`` is up to date at each."""

    def phase_changed(self, progress: Progress) -> None:
        """Handle the start of the phase ``progress.phase``."""

    def rows(self, progress: Progress) -> None:
        """Handle a block of rows that came back; called for every block, so it must return quickly."""

    def committed(self, progress: Progress, *, own: bool, seconds: float) -> None:
        """Handle the commit of a shard.

        Args:
            progress: With the shard counted.
            own: Whether the commit is this driver's; False where another driver was first.
            seconds: Time that writing the shard's files and its commit took.
        """

    def failed(self, progress: Progress, exc: BaseException) -> None:
        """Handle the exception that ends the attempt."""

    def done(self, progress: Progress, commits: list[Commit]) -> None:
        """Handle the success of the job, right after ``_SUCCESS`` was written; ``commits`` are all of its commits."""


class ProgressCallback(Listener):
    """Calls a function with the progress whenever rows come back, the phase changes or the attempt fails."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress = on_progress

    def phase_changed(self, progress: Progress) -> None:
        """Pass the progress on."""
        self._on_progress(progress)

    def rows(self, progress: Progress) -> None:
        """Pass the progress on."""
        self._on_progress(progress)

    def failed(self, progress: Progress, exc: BaseException) -> None:
        """Pass the progress on, with what was committed last."""
        self._on_progress(progress)


class Events:
    """Keeps the progress of an attempt up to date and tells its listeners, in the order in which they subscribed.

    Args:
        started: Start of the attempt by ``time.monotonic``.
        listeners: Those who listen from the beginning.
    """

    def __init__(self, started: float, *listeners: Listener) -> None:
        self.progress = Progress()
        self._started = started
        self._listeners = list(listeners)

    def subscribe(self, listener: Listener) -> None:
        """Add a listener; it is told of everything from now on."""
        self._listeners.append(listener)

    def phase_changed(self, phase: Phase) -> None:
        """Enter a phase."""
        self.progress.phase = phase
        self._read_clock()
        for listener in self._listeners:
            listener.phase_changed(self.progress)

    def rows(self) -> None:
        """Tell that rows came back, which the collector has counted."""
        if self.progress.phase != Phase.RUN:
            self.phase_changed(Phase.RUN)
        self._read_clock()
        for listener in self._listeners:
            listener.rows(self.progress)

    def committed(self, *, own: bool, seconds: float) -> None:
        """Count a committed shard."""
        self.progress.shards_done += 1
        if not own:
            self.progress.shards_resumed += 1
        for listener in self._listeners:
            listener.committed(self.progress, own=own, seconds=seconds)

    def failed(self, exc: BaseException) -> None:
        """Tell what ends the attempt."""
        self._read_clock()
        for listener in self._listeners:
            listener.failed(self.progress, exc)

    def done(self, commits: list[Commit]) -> None:
        """Tell that the job has succeeded."""
        for listener in self._listeners:
            listener.done(self.progress, commits)

    def _read_clock(self) -> None:
        self.progress.elapsed_s = time.monotonic() - self._started
