"""Unify the types of a job's files at its end, where not all columns had a type at its beginning."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from batch_inference.driver.shard_writer import ShardWriter, unreadable
from batch_inference.errors import AccountingError
from batch_inference.output.data_files import open_data_file
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, DataFile, Retry, now
from batch_inference.output.schema import OutputSchema, open_columns, plain_schema

# Shards rewritten at the same time; each is in memory.
_PARALLEL_SHARDS = 4


def unify(ledger: Ledger, attempt: str, compression: str, own_retry: Retry | None) -> Retry | None:
    """Give every committed file of predictions the job's one schema; call it when all shards are committed.

    Almost always there is nothing to do, and one small object is read. Else the files concerned are written again by a generation of
    commits: a commit names its files with their digests, so neither is ever changed. Several drivers may do this at once, and the
    next attempt goes on where one was killed.

    Args:
        ledger: Of the job.
        attempt: Identifier of the attempt that does it.
        compression: Parquet compression.
        own_retry: The retry that this driver has done, None if there was none.

    Returns:
        The latest retry of the ledger: ``own_retry``, or the one that rewrote files.

    Raises:
        AccountingError: If a file is not what its commit says.
    """
    output_schema = OutputSchema(ledger.store)
    first = output_schema.first()
    if first is None or not open_columns(first):
        return own_retry
    done = own_retry.generation if own_retry else 0
    last = ledger.retry()
    if last is not None and last.generation > done and not last.types:
        return own_retry  # the driver of that retry comes here, too
    schema = output_schema.close()
    work = {commit.shard: commit for commit in ledger.commits() if _files_to_rewrite(ledger, commit, schema)}
    if work and (last is None or not last.types):
        last = Retry(done + 1, (), (), False, 0, attempt, now(), types=True)
        if not ledger.begin_retry(last):
            return unify(ledger, attempt, compression, own_retry)
    if work and last is not None:
        writer = ShardWriter(ledger.store, attempt, compression)
        with ThreadPoolExecutor(_PARALLEL_SHARDS) as pool:
            list(pool.map(lambda commit: _rewrite(ledger, writer, commit, schema, last.generation), work.values()))
    output_schema.finish()
    return last if last is not None and last.types else own_retry


def _files_to_rewrite(ledger: Ledger, commit: Commit, schema: pa.Schema) -> list[DataFile]:
    """Return the files of predictions of a commit that do not have the job's types; most are not read for that."""
    return [file for file in commit.files if file.open and not _has_types(ledger, file, schema)]


def _has_types(ledger: Ledger, file: DataFile, schema: pa.Schema) -> bool:
    try:
        file_schema = plain_schema(open_data_file(ledger.store, file).schema_arrow)
    except FileNotFoundError:
        return False  # another driver has rewritten it, or it is lost: the commits say which
    except pa.ArrowException as exc:
        raise unreadable(file, exc) from None
    return all(file_schema.field(name).type == schema.field(name).type for name in file.open)


def _rewrite(ledger: Ledger, writer: ShardWriter, commit: Commit, schema: pa.Schema, generation: int) -> None:
    try:
        new = writer.rewrite(commit, _files_to_rewrite(ledger, commit, schema), schema, generation)
    except FileNotFoundError as exc:
        ledger.refresh([commit.shard])
        if ledger.generations()[commit.shard] < generation:
            raise AccountingError(
                f"{exc} is committed but missing", "Run batch-inference verify; it names what to delete."
            ) from None
        return
    if not ledger.commit(new):
        ledger.store.delete([file.path for file in new.files if file not in commit.files])
