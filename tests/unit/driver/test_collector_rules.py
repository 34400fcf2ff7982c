"""What the collector makes of tables without rows, and of the last rows."""

from __future__ import annotations

import pyarrow as pa

from batch_inference.driver.collector import Collector
from batch_inference.output.tally import Tally
from batch_inference.pipeline.schemas import RESULT_SCHEMA


def rows_of(shard: int, count: int, stage: str | None = None, error_type: str | None = None) -> pa.Table:
    """Return all rows of a shard, with the same failure or none."""
    known = {"shard": shard, "stage": stage, "error_type": error_type, "message": error_type, "retryable": False}
    rows = [
        {**known, "row": row, "bytes": 1, "retries": 0, "fetch_s": 0, "decode_s": 0, "infer_s": 0}
        for row in range(count)
    ]
    return pa.Table.from_pylist(rows, RESULT_SCHEMA)


def test_table_without_rows_counts_nothing() -> None:
    tally = Tally()
    assert Collector({0: 1}, tally).add(RESULT_SCHEMA.empty_table()) == []
    assert tally == Tally()


def test_table_without_rows_does_not_show_that_the_store_answers() -> None:
    collector = Collector({0: 2, 1: 1}, Tally())
    assert collector.add(rows_of(0, 2, "fetch", "STORE_UNREACHABLE")) == []
    assert collector.add(RESULT_SCHEMA.empty_table()) == []
    assert sorted(shard for shard, _ in collector.add(rows_of(1, 1))) == [0, 1]


def test_shard_of_undecodable_images_is_complete_though_the_predictor_does_not_work() -> None:
    collector = Collector({0: 1, 1: 2}, Tally())
    assert collector.add(rows_of(0, 1, "infer", "PREDICTOR_ERROR")) == []
    assert [shard for shard, _ in collector.add(rows_of(1, 2, "decode", "TRUNCATED"))] == [1]
