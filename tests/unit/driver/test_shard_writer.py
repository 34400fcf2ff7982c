"""The last check before a commit: every row of a shard, each once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import AccountingError
from batch_inference.output.records import Commit
from batch_inference.output.retries import RetryShard
from tests.support.outputs import ERRORS, commit_shard, planned

ROWS = 5


def predictions(rows: list[int]) -> pa.Table:
    return pa.table(
        {
            "shard": pa.array([0] * len(rows), pa.int32()),
            "row": pa.array(rows, pa.int32()),
            "value": pa.array(rows, pa.int64()),
        }
    )


def failures(rows: list[int]) -> pa.Table:
    failed = [(row, "decode", "TRUNCATED", "cut off", False, None) for row in rows]
    return pa.Table.from_arrays(
        [pa.array([row[i] for row in failed], field.type) for i, field in enumerate(ERRORS)], schema=ERRORS
    )


def write_rows(
    folder: Path, predicted: list[int], failed: list[int], uris: list[str], to_do: list[int] | None = None
) -> Commit:
    """Write a shard of which these rows came back; ``to_do`` are the rows of a retry."""
    ledger, _ = planned(str(folder), uris, ROWS)
    retry_shard = None
    if to_do is not None:
        before = commit_shard(ledger.store, 0)
        retry_shard = RetryShard(np.array(to_do, np.int32), before, 1, {"decode": {"TRUNCATED": len(to_do)}})
    writer = ShardWriter(ledger.store, "writer", "zstd")
    if predicted:
        writer.add(0, predictions(predicted))
    try:
        return writer.write(0, failures(failed), retry_shard)
    except AccountingError:
        assert not [info.path for info in ledger.store.objects() if "-writer.parquet" in info.path]
        raise


@pytest.mark.parametrize(
    ("predicted", "failed"),
    [
        ([0, 1, 2, 5], [4]),  # 5 is not in the shard, and 3 is missing
        ([0, 1, 2, 5], [3]),
        ([0, 1, 2], [4, 4]),  # one error twice
        ([], [0, 1, 2, 3, 3]),
        ([0, 1], [2, 3, 5]),
        ([0, 1, 2, 3, 5], []),
    ],
)
def test_writer_refuses_other_rows_in_the_right_number(tmp_path: Path, predicted: list[int], failed: list[int]) -> None:
    with pytest.raises(AccountingError, match="shard-00000 has 5 inputs to do, but 5 rows came back"):
        write_rows(tmp_path, predicted, failed, [f"s3://b/{i}.jpg" for i in range(ROWS)])


@pytest.mark.parametrize(("predicted", "failed"), [([0], [3]), ([1], [2]), ([2], [3]), ([], [1, 1]), ([0, 2], [])])
def test_writer_refuses_rows_that_a_retry_was_not_to_do(
    tmp_path: Path, predicted: list[int], failed: list[int]
) -> None:
    """Row 1 and row 3 are to be done again; in place of one of them there is another, or one is there twice."""
    with pytest.raises(AccountingError, match="shard-00000 has 2 inputs to do, but 2 rows came back"):
        write_rows(
            tmp_path, predicted, failed, [f"s3://b/{'bad-' if i % 2 else ''}{i}.jpg" for i in range(ROWS)], [1, 3]
        )


def test_writer_takes_each_row_once_and_the_rows_of_a_retry(tmp_path: Path) -> None:
    commit = write_rows(tmp_path / "first", [4, 0, 2], [3, 1], [f"s3://b/{i}.jpg" for i in range(ROWS)])
    assert (commit.rows, commit.predictions, commit.errors) == (5, 3, 2)
    uris = [f"s3://b/{'bad-' if i % 2 else ''}{i}.jpg" for i in range(ROWS)]
    commit = write_rows(tmp_path / "retry", [3], [1], uris, [1, 3])
    assert (commit.rows, commit.predictions, commit.errors, commit.generation) == (5, 4, 1, 1)
