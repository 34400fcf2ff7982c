"""Failed rows that are done again.

A retry is a generation of commits: each shard in which rows are done again gets another commit, which names the files of predictions
that are there, one more for the rows that succeed now, and a new file of errors. Until it exists, the one before counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import manifest
from batch_inference.collection import Tally, count_errors, describe_errors
from batch_inference.errors import STAGES, CountsDoNotClose, UserError
from batch_inference.ledger import Commit, Ledger, Retry, now
from batch_inference.storage import Store, display

_PARALLEL_REQUESTS = 16


@dataclass(frozen=True)
class Again:
    """Rows of one shard that are done again.

    Attributes:
        rows: Their numbers, int32, in order.
        commit: The commit that counts until now.
        generation: Of the one that is to take its place.
        errors_by: What became of these rows before, ``{stage: {error_type: count}}``.
    """

    rows: np.ndarray
    commit: Commit
    generation: int
    errors_by: dict[str, dict[str, int]]

    def errors(self, store: Store) -> pa.Table:
        """All failed rows of the commit, in the columns of the errors table."""
        return _errors(store, self.commit)


def begin(
    ledger: Ledger, *, stages: Iterable[str], error_types: Iterable[str], retryable: bool, attempt: str
) -> Retry | None:
    """Begins a retry, or takes up the one that was not finished.

    Args:
        ledger: Of the job.
        stages: Stages whose failures are done again; empty: all.
        error_types: Types likewise.
        retryable: Only rows that are marked ``retryable``.
        attempt: Who begins it.

    Returns:
        The retry; None where no failed row is meant.

    Raises:
        UserError: For a stage that there is none of, and where another retry is not finished.
    """
    wanted = tuple(sorted(set(stages)))
    unknown = [stage for stage in wanted if stage not in STAGES]
    if unknown:
        raise UserError(f"there is no stage {' and no stage '.join(unknown)}", f"The stages are {', '.join(STAGES)}.")
    types = tuple(sorted(set(error_types)))
    last, commits = ledger.retry(), ledger.commits()
    unfinished = last is not None and ledger.success() is None
    if last is not None and last.types and unfinished:
        raise UserError(
            f"{display(ledger.store.uri)} is not finished: files are still to be written again with the types of _schema.json",
            "Run batch-inference run with the job's configuration; then start the retry.",
        )
    if last is not None and unfinished:
        left = select(ledger, last, commits)
        if left and (last.stages, last.error_types, last.retryable) != (wanted, types, retryable):
            count = sum(len(again.rows) for again in left.values())
            raise UserError(
                f"the retry {last.generation} of {display(ledger.store.uri)} is not finished: {count:,} of {last.rows:,} rows are left "
                f"({describe(last)})",
                "Finish it by the command that began it, or by batch-inference run; then start this one.",
            )
        if left:
            return last
    number = (last.generation if last else 0) + 1
    retry = Retry(number, wanted, types, retryable, 0, attempt, now())
    rows = sum(len(again.rows) for again in select(ledger, retry, commits).values())
    if not rows:
        return last if unfinished else None
    retry = replace(retry, rows=rows)
    if not ledger.begin_retry(retry):
        raise UserError(
            f"another retry of {display(ledger.store.uri)} has begun at the same moment", "Wait until it has ended."
        )
    return retry


def describe(retry: Retry) -> str:
    """What a retry is about, in words."""
    parts = []
    if retry.stages:
        parts.append("stage " + ", ".join(retry.stages))
    if retry.error_types:
        parts.append("type " + ", ".join(retry.error_types))
    if retry.retryable:
        parts.append("marked retryable")
    return "; ".join(parts) or "all failed rows"


def select(ledger: Ledger, retry: Retry, commits: list[Commit]) -> dict[int, Again]:
    """What a retry still has to do, by shard: failed rows of commits that are older than it.

    Raises:
        CountsDoNotClose: If an errors file is not what its commit says.
    """
    if retry.types:
        return {}

    def rows_of(commit: Commit) -> Again | None:
        try:
            bad = _errors(ledger.store, commit)
        except CountsDoNotClose:
            ledger.look([commit.shard])
            newest = ledger.commits({commit.shard: ledger.generations()[commit.shard]})[0]
            if newest.generation == commit.generation:
                raise
            # Since the commits were read, another driver has done this shard again, and swept what the new commit does not name.
            return rows_of(newest) if _left(retry, newest) else None
        meant = pa.array(np.ones(bad.num_rows, bool))
        if retry.stages:
            meant = pc.and_(meant, pc.is_in(bad["stage"], pa.array(retry.stages)))
        if retry.error_types:
            meant = pc.and_(meant, pc.is_in(bad["error_type"], pa.array(retry.error_types)))
        if retry.retryable:
            meant = pc.and_(meant, bad["retryable"])
        chosen = bad.filter(meant)
        if not chosen.num_rows:
            return None
        return Again(np.sort(chosen["row"].to_numpy()), commit, retry.generation, count_errors(chosen))

    older = [commit for commit in commits if _left(retry, commit)]
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        return {commit.shard: again for commit, again in zip(older, pool.map(rows_of, older), strict=True) if again}


def _left(retry: Retry, commit: Commit) -> bool:
    """Whether a commit is older than a retry and counts failures that it means; most need not be looked into."""
    return commit.generation < retry.generation and any(
        count and (not retry.stages or stage in retry.stages) and (not retry.error_types or kind in retry.error_types)
        for stage, kinds in commit.errors_by.items()
        for kind, count in kinds.items()
    )


def _errors(store: Store, commit: Commit) -> pa.Table:
    tables = []
    for file in commit.files:
        if file.path.startswith("errors/"):
            try:
                tables.append(manifest.read_parquet(store.get(file.path)))
            except (OSError, pa.ArrowException) as exc:
                raise CountsDoNotClose(
                    f"{file.path} is committed but can't be read: {type(exc).__name__}",
                    "Run batch-inference verify; it names what to delete so that it is done anew.",
                ) from None
    return pa.concat_tables(tables)


def nothing_meant(ledger: Ledger) -> str:
    """What failed in a job, for whoever asked for something else."""
    tally = Tally()
    for commit in ledger.commits():
        tally.add_errors(commit.errors_by)
    return ", ".join(describe_errors(tally.errors_by)) or "none"
