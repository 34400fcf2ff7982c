"""Outputs with predictions of a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.output.records import Commit
from batch_inference.storage.store import Store
from tests.support import outputs


def table_of(shard: int, rows: list[tuple[Any, Any]]) -> pa.Table:
    return pa.table(
        {
            "shard": pa.array([shard] * len(rows), pa.int32()),
            "row": pa.array(range(len(rows)), pa.int32()),
            "label": pa.array([label for label, _ in rows], pa.string()),
            "confidence": pa.array([c for _, c in rows], pa.float32(), from_pandas=False),
        }
    )


def classified(folder: Path, shards: int, rows: int, *, wide: int = 0) -> tuple[Store, list[Commit], list[pa.Table]]:
    """Write a finished output with labels and confidences; return its store, commits and tables."""
    uris = [f"s3://b/{i:05d}.jpg" for i in range(shards * rows)]
    ledger, _ = outputs.planned(str(folder), uris, rows)
    rng = np.random.default_rng(7)
    commits, tables = [], []
    for shard in range(shards):
        table = table_of(
            shard, [(f"class {c}", float(p)) for c, p in zip(rng.zipf(1.6, rows) % 50, rng.random(rows), strict=True)]
        )
        if wide:
            values = pa.array(rng.random(rows * wide), pa.float32())
            table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, wide))
        writer = ShardWriter(ledger.store, "first", "zstd")
        writer.add(shard, table)
        errors = outputs.write(ledger.store, shard, "none")[1].slice(0, 0)
        commit = writer.write(shard, errors)
        assert ledger.commit(commit)
        commits.append(commit)
        tables.append(table)
    return ledger.store, commits, tables
