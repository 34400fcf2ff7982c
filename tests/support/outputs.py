"""Outputs made by the real ledger and writer, without Ray; this module computes the predictions."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import pyarrow as pa

from batch_inference.config import JobConfig, StorageConfig
from batch_inference.driver.collector import ERROR_COLUMNS
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.output import manifest
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, JobRecord, now
from batch_inference.storage.store import Store

CONFIG = StorageConfig()
ERRORS = pa.schema(
    list(zip(ERROR_COLUMNS, (pa.int32(), pa.string(), pa.string(), pa.string(), pa.bool_(), pa.string()), strict=True))
)


def value_of(uri: str) -> int:
    """Return the prediction of an image."""
    return zlib.crc32(uri.encode())


def fails(uri: str) -> bool:
    """Return whether an image cannot be decoded."""
    return "bad" in uri


def table_of(uris: Iterable[str], **passthrough: list[object]) -> pa.Table:
    return pa.table({"uri": pa.array(list(uris), pa.string()), **passthrough})


def job_of(table: pa.Table, shard_size: int, identity: dict[str, str] | None = None) -> JobRecord:
    config = JobConfig.model_validate({"shard_size": shard_size}).model_dump(mode="json")
    shards = -(-table.num_rows // shard_size)
    return JobRecord(config, "", identity or {"model.name": "none"}, shards, table.num_rows, "", {}, now())


def write(store: Store, shard: int, attempt: str) -> tuple[ShardWriter, pa.Table]:
    """Return a writer with a shard's predictions, and the shard's errors."""
    writer = ShardWriter(store, attempt, "zstd")
    inputs = manifest.read_shard(store, shard).select(["uri", "row"]).to_pylist()
    good = [row for row in inputs if not fails(row["uri"])]
    if good:
        rows = pa.array([r["row"] for r in good], pa.int32())
        values = pa.array([value_of(r["uri"]) for r in good])
        writer.add(shard, pa.table({"shard": pa.array([shard] * len(good), pa.int32()), "row": rows, "value": values}))
    bad = [(r["row"], "decode", "TRUNCATED", "cut off", False, None) for r in inputs if fails(r["uri"])]
    return writer, pa.Table.from_arrays(
        [pa.array([b[i] for b in bad], f.type) for i, f in enumerate(ERRORS)], schema=ERRORS
    )


def commit_shard(store: Store, shard: int, attempt: str = "first") -> Commit:
    writer, errors = write(store, shard, attempt)
    commit = writer.write(shard, errors)
    assert Ledger(store).commit(commit)
    return commit


def totals_of(job: JobRecord, commits: list[Commit]) -> dict[str, object]:
    predictions, errors = sum(c.predictions for c in commits), sum(c.errors for c in commits)
    return {"rows": job.rows, "predictions": predictions, "errors": errors, "shards": job.shards}


def planned(folder: str, uris: Iterable[str], shard_size: int) -> tuple[Ledger, JobRecord]:
    """Make an output with a plan and no commits."""
    ledger = Ledger(Store(folder, CONFIG))
    table = table_of(uris)
    job = ledger.create_job(table, job_of(table, shard_size), "first")
    ledger.complete_manifest(job)
    return ledger, job


def finished(folder: str, uris: Iterable[str], shard_size: int) -> tuple[Ledger, JobRecord]:
    """Make an output of a finished job."""
    ledger, job = planned(folder, uris, shard_size)
    commits = [commit_shard(ledger.store, shard) for shard in range(job.shards)]
    ledger.check_complete(job, commits)
    ledger.finish(job, commits, totals_of(job, commits))
    return ledger, job
