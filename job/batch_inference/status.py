"""How far a job is, from its ledger alone: no cluster is asked."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from batch_inference.collection import Tally
from batch_inference.config import StorageConfig
from batch_inference.ledger import Commit, Ledger
from batch_inference.storage import Store

# The rate is that of the last minutes, so that pauses between attempts do not count.
_WINDOW_S = 600.0
# Below this nothing worth printing can be said about a rate.
_LEAST_S = 1.0


@dataclass(frozen=True)
class Status:
    """Where a job stands.

    Attributes:
        state: ``planned``, ``unfinished``, ``succeeded`` or ``failed``; a run in progress and one that was killed look the
            same to the ledger, hence ``last_commit_age_s``.
        fingerprint: What the rows belong to.
        rows: Inputs.
        predictions: Committed predictions.
        errors: Committed errors.
        errors_by: ``{stage: {error_type: count}}``.
        shards: Number of shards.
        shards_done: Committed shards.
        attempts: ``{attempt: shards}``.
        images_per_s: Rate over the last ten minutes before the last commit, or None with fewer than two commits.
        eta_s: Seconds left at that rate, or None.
        last_commit_age_s: Seconds since the last commit, or None.
        verdict: Of the last attempt that failed, "" if none did.
        balance: What limited the attempt that finished the job, with the knob to turn; "" before.
    """

    state: str
    fingerprint: str
    rows: int
    predictions: int
    errors: int
    errors_by: dict[str, dict[str, int]]
    shards: int
    shards_done: int
    attempts: dict[str, int]
    images_per_s: float | None
    eta_s: float | None
    last_commit_age_s: float | None
    verdict: str = ""
    balance: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of the last attempt."""
        return self.state in ("succeeded", "failed")

    def to_dict(self) -> dict[str, Any]:
        """For ``status --json``."""
        return dict(vars(self))


def state_of(*, done: bool, failed: bool, begun: bool) -> str:
    """A job's state by whether its ledger has ``_SUCCESS``, ``_FAILED`` and commits; the first that it has counts."""
    return "succeeded" if done else "failed" if failed else "unfinished" if begun else "planned"


def status(output: str, storage: StorageConfig | None = None) -> Status:
    """Reads the ledger of an output.

    Raises:
        UserError: If there is no job.
        CountsDoNotClose: If a commit can't be read.
    """
    ledger = Ledger(Store(output, storage or StorageConfig(), must_exist=True))
    job = ledger.require_job()
    commits = ledger.commits()
    failed = ledger.store.get_or_none("_FAILED")
    done = ledger.success() is not None
    tally = Tally()
    tally.add_commits(commits)
    rate, age = _rate(commits)
    return Status(
        state=state_of(done=done, failed=bool(failed), begun=bool(commits)),
        fingerprint=job.fingerprint,
        rows=job.rows,
        predictions=tally.predictions,
        errors=tally.errors,
        errors_by=tally.errors_by,
        shards=job.shards,
        shards_done=len(commits),
        attempts=dict(Counter(commit.attempt for commit in commits)),
        images_per_s=rate,
        eta_s=None if done or not rate else (job.rows - tally.rows) / rate,
        last_commit_age_s=age,
        verdict=json.loads(failed).get("verdict", "") if failed and not done else "",
        balance=_balance(ledger.store) if done else "",
    )


def _balance(store: Store) -> str:
    """What the summary says about it; a report that is gone or garbled is no reason to say nothing else."""
    try:
        found = json.loads(store.get_or_none("_report/summary.json") or b"{}").get("balance")
        return str(found["sentence"]) if found else ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""


def _rate(commits: list[Commit]) -> tuple[float | None, float | None]:
    """Rows a second up to the last commit, and that commit's age in seconds."""
    if not commits:
        return None, None
    times = sorted((datetime.fromisoformat(c.committed_at), c.rows, c.attempt) for c in commits)
    last, _, attempt = times[-1]
    age = (datetime.now(timezone.utc) - last).total_seconds()
    recent = [(t, n) for t, n, a in times if a == attempt and (last - t).total_seconds() <= _WINDOW_S]
    seconds = (last - recent[0][0]).total_seconds()
    # The first commit of the window only starts the clock: when its shard began is not known.
    rate = sum(n for _, n in recent[1:]) / seconds if seconds >= _LEAST_S else None
    return rate, age
