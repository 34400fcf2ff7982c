"""Counts of rows and errors while a job is under way."""

from __future__ import annotations

import numpy as np
import pytest

from batch_inference.config import ErrorsConfig
from batch_inference.driver.progress import Progress
from batch_inference.errors import ErrorThresholdExceeded
from batch_inference.output.records import Commit
from batch_inference.output.retries import RetryShard
from batch_inference.output.tally import Tally
from tests.support.outputs import job_of, table_of


def tally_of(rows: int, errors_by: dict[str, dict[str, int]]) -> Tally:
    tally = Tally(rows=rows)
    tally.add_errors(errors_by)
    return tally


def test_failed_rows_that_are_retried_no_longer_count_as_rows_or_errors() -> None:
    tally = tally_of(100, {"decode": {"TRUNCATED": 5, "CORRUPT": 1}, "fetch": {"TIMEOUT": 4}})
    tally.remove_errors({"decode": {"TRUNCATED": 2, "CORRUPT": 1}})
    assert (tally.rows, tally.errors, tally.predictions) == (97, 7, 90)
    assert tally.errors_by == {"decode": {"TRUNCATED": 3}, "fetch": {"TIMEOUT": 4}}
    tally.remove_errors({"decode": {"TRUNCATED": 3}, "fetch": {"TIMEOUT": 4}})
    assert (tally.rows, tally.errors, tally.predictions) == (90, 0, 90)
    assert tally.errors_by == {}


def test_rows_of_a_retry_that_come_back_count_once() -> None:
    """Counted twice, half the share of errors would be measured, and the progress would pass 100 %."""
    progress = Progress()
    job = job_of(table_of([f"s3://b/{i}.jpg" for i in range(10)]), 10)
    commit = Commit(0, 10, 6, 4, (), "first", {"fetch": {"TIMEOUT": 4}}, "")
    progress.resume(job, [commit], {0: RetryShard(np.arange(4, dtype=np.int32), commit, 1, commit.errors_by)})
    assert (progress.tally.rows, progress.tally.errors) == (6, 0)
    progress.tally.rows += 4
    progress.tally.add_errors({"fetch": {"TIMEOUT": 4}})
    assert (progress.tally.rows, progress.rows_total, progress.tally.percent) == (10, 10, 40.0)
    with pytest.raises(ErrorThresholdExceeded, match=r"4 of 10 rows failed = 40\.0 %"):
        progress.tally.check(ErrorsConfig(max_percent=30, min_rows=1))
