"""Retries: failed rows that are processed again.

Retry N makes another commit of each shard in which rows are processed again. That commit names the existing files of
predictions, one more for the rows that succeed now, and a new file of errors. Until it exists, the earlier commit
counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.errors import STAGES, AccountingError, UserError
from batch_inference.output import manifest
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, Retry, now
from batch_inference.output.tally import Tally, count_errors, describe_errors
from batch_inference.storage.store import PARALLEL_REQUESTS, Store
from batch_inference.storage.uris import display_uri


@dataclass(frozen=True)
class RetryShard:
    """Rows of one shard to retry.

    Attributes:
        rows: Indexes of the rows, int32, sorted.
        commit: The commit that counts until now.
        generation: Number of the retry, whose commit will replace it.
        errors_by: Earlier errors of these rows, ``{stage: {error_type: count}}``.
    """

    rows: np.ndarray
    commit: Commit
    generation: int
    errors_by: dict[str, dict[str, int]]

    def read_errors(self, store: Store) -> pa.Table:
        """Read all failed rows of the commit, in the columns of the errors table."""
        return _read_errors(store, self.commit)


def start_retry(
    ledger: Ledger, *, stages: Iterable[str], error_types: Iterable[str], retryable: bool, attempt: str
) -> Retry | None:
    """Start a retry, or continue the one that is not finished.

    Args:
        ledger: The job's ledger.
        stages: Stages whose failed rows are retried; empty for all.
        error_types: Error types whose failed rows are retried; empty for all.
        retryable: Whether only rows that are marked ``retryable`` are retried.
        attempt: Identifier of the attempt that starts it.

    Returns:
        The retry; None if no failed row matches.

    Raises:
        UserError: If a stage is unknown, or another retry is not finished.
    """
    wanted_stages = tuple(sorted(set(stages)))
    wanted_types = tuple(sorted(set(error_types)))
    unknown = [stage for stage in wanted_stages if stage not in STAGES]
    if unknown:
        raise UserError(f"there is no stage {' and no stage '.join(unknown)}", f"The stages are {', '.join(STAGES)}.")
    latest, commits = ledger.retry(), ledger.commits()
    unfinished = latest is not None and ledger.success_record() is None
    if latest is not None and unfinished:
        _check_columns_settled(ledger, latest)
        if remaining := select_rows(ledger, latest, commits):
            if (latest.stages, latest.error_types, latest.retryable) != (wanted_stages, wanted_types, retryable):
                raise _unfinished_error(ledger, latest, remaining)
            return latest
    number = (latest.generation if latest else 0) + 1
    retry = Retry(number, wanted_stages, wanted_types, retryable, 0, attempt, now())
    rows = _count_rows(select_rows(ledger, retry, commits))
    if not rows:
        return latest if unfinished else None
    retry = replace(retry, rows=rows)
    if not ledger.begin_retry(retry):
        raise UserError(
            f"another retry of {display_uri(ledger.store.uri)} has begun at the same moment", "Wait until it has ended."
        )
    return retry


def _check_columns_settled(ledger: Ledger, latest: Retry) -> None:
    if latest.types:
        raise UserError(
            f"{display_uri(ledger.store.uri)} is not finished: files are still to be written again with the types of _schema.json",
            "Run batch-inference run with the job's configuration; then start the retry.",
        )


def _unfinished_error(ledger: Ledger, retry: Retry, remaining: dict[int, RetryShard]) -> UserError:
    count = _count_rows(remaining)
    return UserError(
        f"the retry {retry.generation} of {display_uri(ledger.store.uri)} is not finished: {count:,} of {retry.rows:,} rows are left "
        f"({describe_retry(retry)})",
        "Finish it by the command that began it, or by batch-inference run; then start this one.",
    )


def _count_rows(shards: dict[int, RetryShard]) -> int:
    return sum(len(shard.rows) for shard in shards.values())


def describe_retry(retry: Retry) -> str:
    """Describe in words which rows a retry selects."""
    parts = []
    if retry.stages:
        parts.append("stage " + ", ".join(retry.stages))
    if retry.error_types:
        parts.append("type " + ", ".join(retry.error_types))
    if retry.retryable:
        parts.append("marked retryable")
    return "; ".join(parts) or "all failed rows"


def describe_failed_rows(ledger: Ledger) -> str:
    """Describe the failed rows of a job, for a user whose retry matches none of them."""
    tally = Tally()
    for commit in ledger.commits():
        tally.add_errors(commit.errors_by)
    return ", ".join(describe_errors(tally.errors_by)) or "none"


def select_rows(ledger: Ledger, retry: Retry, commits: list[Commit]) -> dict[int, RetryShard]:
    """Select the rows that a retry still has to process, by shard: failed rows of commits that are older than it.

    Raises:
        AccountingError: If an errors file is not what its commit says.
    """
    if retry.types:
        return {}

    def rows_of(commit: Commit) -> RetryShard | None:
        try:
            errors = _read_errors(ledger.store, commit)
        except AccountingError:
            ledger.refresh([commit.shard])
            newest = ledger.commits({commit.shard: ledger.generations()[commit.shard]})[0]
            if newest.generation == commit.generation:
                raise
            # Another driver has retried this shard since the commits were read, and deleted the files that the new one
            # does not name.
            return rows_of(newest) if _may_have_rows(retry, newest) else None
        selected = errors.filter(_matching(retry, errors))
        if not selected.num_rows:
            return None
        return RetryShard(np.sort(selected["row"].to_numpy()), commit, retry.generation, count_errors(selected))

    older = [commit for commit in commits if _may_have_rows(retry, commit)]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        shards = zip(older, pool.map(rows_of, older), strict=True)
        return {commit.shard: retry_shard for commit, retry_shard in shards if retry_shard}


def _may_have_rows(retry: Retry, commit: Commit) -> bool:
    """Return whether a commit is older than a retry and counts errors that the retry selects."""
    return commit.generation < retry.generation and any(
        count
        and (not retry.stages or stage in retry.stages)
        and (not retry.error_types or error_type in retry.error_types)
        for stage, counts in commit.errors_by.items()
        for error_type, count in counts.items()
    )


def _matching(retry: Retry, errors: pa.Table) -> pa.Array:
    """Return which failed rows a retry selects, as booleans."""
    matching = pa.array(np.ones(errors.num_rows, bool))
    if retry.stages:
        matching = pc.and_(matching, pc.is_in(errors["stage"], pa.array(retry.stages)))
    if retry.error_types:
        matching = pc.and_(matching, pc.is_in(errors["error_type"], pa.array(retry.error_types)))
    if retry.retryable:
        matching = pc.and_(matching, errors["retryable"])
    return matching


def _read_errors(store: Store, commit: Commit) -> pa.Table:
    tables = []
    for file in commit.files:
        if file.path.startswith("errors/"):
            try:
                tables.append(manifest.read_parquet(store.get(file.path)))
            except (OSError, pa.ArrowException) as exc:
                raise AccountingError(
                    f"{file.path} is committed but can't be read: {type(exc).__name__}",
                    "Run batch-inference verify; it names what to delete so that it is processed again.",
                ) from None
    return pa.concat_tables(tables)
