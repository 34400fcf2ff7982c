"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batch_inference.collection import Tally
from batch_inference.ledger import now

# Below this many seconds nothing worth printing can be said about a rate.
_LEAST_S = 1.0


def duration(seconds: float | None) -> str:
    """Seconds for people.

    >>> duration(3725)
    '1 h 02 min'
    """
    if seconds is None:
        return "unknown"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Snapshot:
    """Where a run stands; given to ``on_progress`` and written to ``_report/progress.json``.

    Attributes:
        phase: ``plan``, ``start``, ``preflight``, ``run``, ``finish`` or ``done``.
        rows_total: Inputs of the job.
        shards_total: Shards of the job.
        shards_done: Shards with a commit.
        shards_resumed: Those of them that earlier attempts or other drivers committed.
        tally: Counts so far.
        elapsed_s: Seconds since the start of this attempt.
        first_rows: Rows that came back first and started the clock of ``working_s``.
        working_s: Seconds between the first and the last rows that came back.
        dashboard: URL of Ray's dashboard, if any.
        report: Where the report is, once it is made.
    """

    phase: str = "plan"
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

    @property
    def images_per_s(self) -> float | None:
        """Rows a second after the first ones of this attempt, None while too few have come to say."""
        rows = self.tally.seen - self.first_rows
        return rows / self.working_s if self.working_s >= _LEAST_S and rows > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds until all rows are in at this rate, or None while nothing can be said."""
        rate = self.images_per_s
        return (self.rows_total - self.tally.rows) / rate if rate else None

    def to_dict(self) -> dict[str, Any]:
        """For ``progress.json``."""
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
