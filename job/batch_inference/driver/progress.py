"""The progress of a run: its phase, and the counts so far."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from batch_inference.output.records import Commit, JobRecord, now
from batch_inference.output.retries import RetryShard
from batch_inference.output.tally import Tally

# No rate is shown for less than this many seconds of work.
_MIN_RATE_S = 1.0


class Phase(str, Enum):
    """A phase of an attempt, in the order of the members; equal to its name in ``progress.json``."""

    PLAN = "plan"
    START = "start"
    PREFLIGHT = "preflight"
    RUN = "run"
    FINISH = "finish"
    DONE = "done"


@dataclass
class Progress:
    """The progress of a run; given to ``on_progress`` and written to ``_report/progress.json``.

    Attributes:
        phase: The phase of this attempt.
        rows_total: Inputs of the job.
        shards_total: Shards of the job.
        shards_done: Shards with a commit.
        shards_resumed: Those of them that earlier attempts or other drivers committed.
        tally: Counts so far.
        elapsed_s: Seconds since the start of this attempt.
        first_rows: Number of rows in the first block of this attempt, which starts the clock of ``working_s``.
        working_s: Seconds between the first and the last rows that came back.
        dashboard: URL of Ray's dashboard, if any.
        report: URI of the report, "" until it is made.
        working_from: UTC time at which the first rows of this attempt came back, "" before.
    """

    phase: Phase = Phase.PLAN
    rows_total: int = 0
    shards_total: int = 0
    shards_done: int = 0
    shards_resumed: int = 0
    tally: Tally = field(default_factory=Tally)
    elapsed_s: float = 0.0
    first_rows: int = 0
    working_s: float = 0.0
    dashboard: str | None = None
    report: str = ""
    working_from: str = ""
    _clock: float = field(default=0.0, repr=False)

    @property
    def images_per_s(self) -> float | None:
        """Rows per second of this attempt, without its first block; None until there are enough to tell."""
        rows = self.tally.seen - self.first_rows
        return rows / self.working_s if self.working_s >= _MIN_RATE_S and rows > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds until all rows are in at this rate, or None while there is no rate."""
        rate = self.images_per_s
        return (self.rows_total - self.tally.rows) / rate if rate else None

    def resume(self, job: JobRecord, commits: list[Commit], retried: dict[int, RetryShard]) -> None:
        """Count what earlier attempts committed, without the failed rows that a retry does again."""
        self.rows_total, self.shards_total = job.rows, job.shards
        self.shards_done = self.shards_resumed = len(commits) - len(retried)
        self.tally.add_commits(commits)
        for retry_shard in retried.values():
            self.tally.remove_errors(retry_shard.errors_by)

    def recount(self, commits: Iterable[Commit]) -> None:
        """Replace the counts by those of the ledger, which also has what other drivers did."""
        tally = self.tally
        tally.rows, tally.errors, tally.errors_by = 0, 0, {}
        self.shards_done = 0
        for commit in commits:
            tally.rows += commit.rows
            tally.add_errors(commit.errors_by)
            self.shards_done += 1

    def advance_clock(self, rows: int) -> None:
        """Update ``working_s`` when ``rows`` rows have come back; the first ones start its clock."""
        moment = time.monotonic()
        if not self.working_from:
            self._clock, self.first_rows, self.working_from = moment, rows, now()
        self.working_s = moment - self._clock

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``progress.json``."""
        tally = self.tally
        return {
            "phase": self.phase,
            "rows": {
                "total": self.rows_total,
                "done": tally.rows,
                "predictions": tally.predictions,
                "errors": tally.errors,
            },
            "errors_by": tally.errors_by,
            "shards": {"total": self.shards_total, "done": self.shards_done, "resumed": self.shards_resumed},
            "images_per_s": None if self.images_per_s is None else round(self.images_per_s, 2),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "elapsed_s": round(self.elapsed_s, 1),
            "updated_at": now(),
        }
