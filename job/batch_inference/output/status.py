"""State and progress of a job, read from its output alone; no cluster is asked."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from batch_inference.config import ErrorsConfig, StorageConfig
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, JobRecord
from batch_inference.output.tally import JobCounts, Tally
from batch_inference.storage.store import Store
from batch_inference.storage.uris import display_uri

# The rate covers the last minutes only, so that pauses between attempts do not count.
_RATE_WINDOW_S = 600.0
# Over a shorter time a rate says nothing.
_MIN_RATE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Status(JobCounts):
    """State and progress of a job; see :class:`~batch_inference.output.tally.JobCounts` for the counts.

    Attributes:
        state: ``planned``, ``unfinished``, ``succeeded`` or ``failed``; a run in progress and a killed one look alike,
            hence ``last_commit_age_s``.
        fingerprint: Fingerprint of the job.
        shards_done: Committed shards.
        attempts: Number of committed shards by attempt.
        images_per_s: Rate over the ten minutes before the last commit; None with fewer than two commits.
        eta_s: Remaining seconds at that rate, or None.
        last_commit_age_s: Seconds since the last commit, or None.
        verdict: Verdict of the last attempt if it failed; for a job that is done, that more rows failed than
            ``errors.max_percent``; else "".
        balance: Bottleneck of the attempt that finished the job, with the setting to change; "" before.
    """

    state: str
    fingerprint: str
    shards_done: int
    attempts: dict[str, int]
    images_per_s: float | None
    eta_s: float | None
    last_commit_age_s: float | None
    verdict: str = ""
    balance: str = ""

    @property
    def ended(self) -> bool:
        """Whether the last attempt has ended."""
        return self.state in ("succeeded", "failed")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``status --json``."""
        return dict(vars(self))


@dataclass(frozen=True)
class Outcome:
    """State of a job, as its output records it.

    Attributes:
        state: As in :class:`Status`.
        verdict: As in :class:`Status`.
        failed: Content of ``_FAILED``; empty if the job has not failed.
    """

    state: str
    verdict: str
    failed: dict[str, Any]


def read_outcome(ledger: Ledger, job: JobRecord, tally: Tally, limits: ErrorsConfig) -> Outcome:
    """Return a job's state from the first of ``_SUCCESS``, ``_FAILED`` and commits that exists.

    A job in which every row failed has not succeeded, even if an earlier version wrote ``_SUCCESS``.

    Args:
        ledger: The output's ledger.
        job: The job.
        tally: Counts of all commits.
        limits: Limits of errors, for a ``_SUCCESS`` of an earlier version, which has no verdict.

    Raises:
        AccountingError: If ``_SUCCESS`` is unreadable.
    """
    success = ledger.success_record()
    failed: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        failed = dict(json.loads(ledger.store.get_or_none("_FAILED") or b"{}"))
    nothing_predicted = tally.all_failed and tally.rows == job.rows
    if success is not None and not nothing_predicted:
        return Outcome("succeeded", str(success.get("verdict", tally.excess(limits))), {})
    if success is not None or (nothing_predicted and not failed):
        exc = tally.no_prediction(shlex.quote(display_uri(ledger.store.uri)))
        failed = {"exit_code": exc.exit_code, "verdict": exc.message, "remedy": exc.remedy}
    if failed:
        return Outcome("failed", str(failed.get("verdict", "")), failed)
    return Outcome("unfinished" if tally.rows else "planned", "", {})


def status(output: str, storage: StorageConfig | None = None) -> Status:
    """Read the state and progress of a job from its output.

    Raises:
        UserError: If there is no job.
        AccountingError: If a commit is unreadable.
    """
    ledger = Ledger(Store(output, storage or StorageConfig(), must_exist=True))
    job = ledger.require_job()
    commits = ledger.commits()
    tally = Tally()
    tally.add_commits(commits)
    limits = ErrorsConfig.model_validate(job.config.get("errors", {}))
    outcome = read_outcome(ledger, job, tally, limits)
    done = outcome.state == "succeeded"
    rate, age = _rate(commits)
    return Status(
        **vars(tally.counts(job)),
        state=outcome.state,
        fingerprint=job.fingerprint,
        shards_done=len(commits),
        attempts=dict(Counter(commit.attempt for commit in commits)),
        images_per_s=rate,
        eta_s=None if done or not rate else (job.rows - tally.rows) / rate,
        last_commit_age_s=age,
        verdict=outcome.verdict,
        balance=_balance(ledger.store) if done else "",
    )


def _balance(store: Store) -> str:
    """Return the bottleneck in words from the summary; "" if the summary is missing or garbled."""
    try:
        balance = json.loads(store.get_or_none("_report/summary.json") or b"{}").get("balance")
        return str(balance["sentence"]) if balance else ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""


def _rate(commits: list[Commit]) -> tuple[float | None, float | None]:
    """Return the rows a second up to the last commit, and that commit's age in seconds."""
    if not commits:
        return None, None
    times = sorted((datetime.fromisoformat(commit.committed_at), commit.rows, commit.attempt) for commit in commits)
    last, _, attempt = times[-1]
    age = (datetime.now(timezone.utc) - last).total_seconds()
    recent = [
        (time, rows) for time, rows, by in times if by == attempt and (last - time).total_seconds() <= _RATE_WINDOW_S
    ]
    seconds = (last - recent[0][0]).total_seconds()
    # The first commit in the window only starts the clock, because nobody knows when its shard began.
    rate = sum(rows for _, rows in recent[1:]) / seconds if seconds >= _MIN_RATE_S else None
    return rate, age
