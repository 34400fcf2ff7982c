"""How far a job is, from its ledger alone: no cluster is asked."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from batch_inference.collection import Tally
from batch_inference.config import ErrorsConfig, StorageConfig
from batch_inference.ledger import Commit, Job, Ledger
from batch_inference.storage import Store, display

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
        verdict: Of the last attempt that failed; of a job that is done, that more rows failed than ``errors.max_percent``; else "".
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


@dataclass(frozen=True)
class Outcome:
    """What the output says of how a job stands.

    Attributes:
        state: See :class:`Status`.
        verdict: See :class:`Status`.
        failed: What ``_FAILED`` says, empty where the job has not failed.
    """

    state: str
    verdict: str
    failed: dict[str, Any]


def outcome(ledger: Ledger, job: Job, tally: Tally, limits: ErrorsConfig) -> Outcome:
    """Return a job's state by ``_SUCCESS``, ``_FAILED`` and commits; the first that there is counts.

    A job in which every row failed is none that succeeded, also where an earlier version has called it so.

    Args:
        ledger: Of the output.
        job: The job.
        tally: Counts of all commits.
        limits: What is too many where ``_SUCCESS`` is of an earlier version and does not say it.

    Raises:
        CountsDoNotClose: If ``_SUCCESS`` can't be read.
    """
    done = ledger.success()
    failed: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        failed = dict(json.loads(ledger.store.get_or_none("_FAILED") or b"{}"))
    whole = tally.all_failed and tally.rows == job.rows
    if done is not None and not whole:
        return Outcome("succeeded", str(done.get("verdict", tally.excess(limits))), {})
    if done is not None or (whole and not failed):
        exc = tally.no_prediction(shlex.quote(display(ledger.store.uri)))
        failed = {"exit_code": exc.exit_code, "verdict": exc.message, "remedy": exc.remedy}
    if failed:
        return Outcome("failed", str(failed.get("verdict", "")), failed)
    return Outcome("unfinished" if tally.rows else "planned", "", {})


def status(output: str, storage: StorageConfig | None = None) -> Status:
    """Reads the ledger of an output.

    Raises:
        UserError: If there is no job.
        CountsDoNotClose: If a commit can't be read.
    """
    ledger = Ledger(Store(output, storage or StorageConfig(), must_exist=True))
    job = ledger.require_job()
    commits = ledger.commits()
    tally = Tally()
    tally.add_commits(commits)
    limits = ErrorsConfig.model_validate(job.config.get("errors", {}))
    found = outcome(ledger, job, tally, limits)
    done = found.state == "succeeded"
    rate, age = _rate(commits)
    return Status(
        state=found.state,
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
        verdict=found.verdict,
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
