"""The end of a job whose columns did not all have a type at its beginning: files are written again where the guess was wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from batch_inference.data_files import opened
from batch_inference.errors import CountsDoNotClose
from batch_inference.ledger import Commit, DataFile, Ledger, Retry, now
from batch_inference.output_schema import OutputSchema, open_columns, plain_schema
from batch_inference.writer import ShardWriter, unreadable

# A rewritten shard is in memory, as one that is written for the first time.
_AT_ONCE = 4


def unify(ledger: Ledger, attempt: str, compression: str, mine: Retry | None) -> Retry | None:
    """Make every committed file of predictions have the job's one schema; call it when all shards are committed.

    Almost always there is nothing to do, and one small object is read. Else the files concerned are written again by a generation of
    commits: a commit names its files with their digests, and so neither is ever changed. Several drivers may do this at once, and one
    that is killed is followed by the next attempt.

    Args:
        ledger: Of the job.
        attempt: Who does it.
        compression: Parquet compression.
        mine: The retry that this driver has done, None if there was none.

    Returns:
        The generation that the ledger is at: ``mine``, or that of the files.

    Raises:
        CountsDoNotClose: If a file is not what its commit says.
    """
    schema = OutputSchema(ledger.store)
    first = schema.first()
    if first is None or not open_columns(first):
        return mine
    done = mine.generation if mine else 0
    last = ledger.retry()
    if last is not None and last.generation > done and not last.types:
        return mine  # the driver of that retry comes here, too
    whole = schema.close()
    work = {commit.shard: commit for commit in ledger.commits() if _wrong(ledger, commit, whole)}
    if work and (last is None or not last.types):
        last = Retry(done + 1, (), (), False, 0, attempt, now(), types=True)
        if not ledger.begin_retry(last):
            return unify(ledger, attempt, compression, mine)
    if work and last is not None:
        writer = ShardWriter(ledger.store, attempt, compression)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda commit: _rewrite(ledger, writer, commit, whole, last.generation), work.values()))
    schema.finish()
    return last if last is not None and last.types else mine


def _wrong(ledger: Ledger, commit: Commit, whole: pa.Schema) -> list[DataFile]:
    """The files of predictions of a commit that do not have the job's types; of most nothing needs to be read."""
    return [file for file in commit.files if file.open and not _right(ledger, file, whole)]


def _right(ledger: Ledger, file: DataFile, whole: pa.Schema) -> bool:
    try:
        there = plain_schema(opened(ledger.store, file).schema_arrow)
    except FileNotFoundError:
        return False  # another driver has written it again, or it is lost: the commits say which
    except pa.ArrowException as exc:
        raise unreadable(file, exc) from None
    return all(there.field(name).type == whole.field(name).type for name in file.open)


def _rewrite(ledger: Ledger, writer: ShardWriter, commit: Commit, whole: pa.Schema, generation: int) -> None:
    try:
        new = writer.rewrite(commit, _wrong(ledger, commit, whole), whole, generation)
    except FileNotFoundError as exc:
        ledger.look([commit.shard])
        if ledger.generations()[commit.shard] < generation:
            raise CountsDoNotClose(
                f"{exc} is committed but missing", "Run batch-inference verify; it names what to delete."
            ) from None
        return
    if not ledger.commit(new):
        ledger.store.delete([file.path for file in new.files if file not in commit.files])
