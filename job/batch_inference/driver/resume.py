"""The second phase of an attempt: find out what earlier attempts have left to do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import structlog

from batch_inference.driver.events import Events
from batch_inference.driver.job import Planned
from batch_inference.output.records import JobRecord, Retry
from batch_inference.output.retries import RetryShard, describe_retry, select_rows

log = structlog.get_logger()


@dataclass(frozen=True)
class Todo:
    """The work that is left of a job.

    Attributes:
        pending: Shards without a commit.
        retried: Shards of which failed rows are done again.
        is_first: Whether nothing is committed yet.
        generation: Generation of the commits that the pending shards get.
    """

    pending: tuple[int, ...]
    retried: dict[int, RetryShard]
    is_first: bool
    generation: int = 0

    def __len__(self) -> int:
        return len(self.pending) + len(self.retried)

    def chosen(self) -> dict[int, np.ndarray]:
        """Return the row numbers to do, of shards of which these are not all."""
        return {shard: retry_shard.rows for shard, retry_shard in self.retried.items()}

    def rows(self, job: JobRecord) -> dict[int, int]:
        """Return the number of rows to do of each shard."""
        counts = {shard: job.rows_of(shard) for shard in self.pending}
        return counts | {shard: len(retry_shard.rows) for shard, retry_shard in self.retried.items()}


def resume(planned: Planned, events: Events) -> Todo:
    """Count what is committed and return what is left; from now on the output has neither a success nor a verdict."""
    ledger, job, retry = planned.ledger, planned.job, planned.retry
    commits = ledger.commits()
    if retry and len(commits) < job.shards:
        # Usually all were committed before the retry began, and the listing does not show some of them yet.
        ledger.refresh(set(range(job.shards)) - {commit.shard for commit in commits})
        commits = ledger.commits()
    retried = select_rows(ledger, retry, commits) if retry else {}
    if retried:
        # A reader of the folder waits for it to come back.
        ledger.store.delete(["_SUCCESS"])
    progress = events.progress
    progress.resume(job, commits, retried)
    if retried and retry is not None:
        rows = sum(len(retry_shard.rows) for retry_shard in retried.values())
        log.info(f"retry {retry.generation}: {rows:,} failed rows again, {describe_retry(retry)}")
    if commits:
        log.info("resuming", shards_done=progress.shards_done, shards=job.shards, rows_done=progress.tally.rows)
    pending = sorted(set(range(job.shards)) - {commit.shard for commit in commits})
    ledger.store.delete(["_FAILED"])  # an earlier attempt's; this one ends with a verdict of its own
    return Todo(tuple(pending), retried, is_first=not commits, generation=_generation_of_pending(retry))


def _generation_of_pending(retry: Retry | None) -> int:
    """Return the generation of the commits that pending shards get: that of a retry of rows that is under way, else 0.

    Of a commit of an earlier generation the retry would select the rows that fail now. Another driver would do them again,
    while this one takes the retry for finished and deletes files that wait for that driver's commit.
    """
    return retry.generation if retry is not None and not retry.types else 0
