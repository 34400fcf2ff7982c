"""The end of a job whose commits are not what a listing shows, and records that are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import AccountingError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit
from batch_inference.output.retries import RetryShard, select_rows, start_retry
from batch_inference.storage.store import Store
from tests.support.outputs import CONFIG, ERRORS, commit_shard, finished, planned, totals_of

URIS = ["s3://b/0.jpg", "s3://b/bad-1.jpg", "s3://b/2.jpg", "s3://b/bad-3.jpg"]


class Late(Store):
    """A store whose listings do not show commits of a retry."""

    def objects(self, *args: Any, **options: Any) -> Iterator[Any]:
        return (
            info
            for info in super().objects(*args, **options)
            if not info.path.startswith("_commits/") or "-g" not in info.path
        )


def retried(ledger: Ledger) -> list[Commit]:
    """Run a retry in which every row succeeds, to its end."""
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="again")
    assert retry is not None
    for shard, rows in select_rows(ledger, retry, ledger.commits()).items():
        assert ledger.commit(again(ledger.store, shard, rows))
    job, commits = ledger.require_job(), ledger.commits()
    ledger.finish(job, commits, totals_of(job, commits), retry.generation)
    return commits


def again(store: Store, shard: int, rows: RetryShard) -> Commit:
    writer = ShardWriter(store, "again", "zstd")
    numbers = {"shard": pa.array([shard] * len(rows.rows), pa.int32()), "row": pa.array(rows.rows, pa.int32())}
    writer.add(shard, pa.table({**numbers, "value": [7] * len(rows.rows)}))
    return writer.write(shard, ERRORS.empty_table(), rows)


def test_commits_that_no_listing_shows_are_found_when_files_of_earlier_ones_are_gone(tmp_path: Path) -> None:
    ledger, job = finished(str(tmp_path), URIS, 2)
    late = Ledger(Late(str(tmp_path), CONFIG))
    assert [commit.generation for commit in late.verified_commits(job)] == [0, 0]
    expected = retried(ledger)
    assert [commit.generation for commit in expected] == [1, 1]
    assert Ledger(Late(str(tmp_path), CONFIG)).commits() != expected
    assert late.verified_commits(job) == expected


def test_file_that_is_gone_for_no_reason_ends_the_job(tmp_path: Path) -> None:
    ledger, job = finished(str(tmp_path), URIS, 2)
    gone = next((tmp_path / "errors").iterdir())
    gone.unlink()
    with pytest.raises(AccountingError, match=f"{gone.name} is committed but missing"):
        ledger.verified_commits(job)


def test_errors_that_are_gone_for_no_reason_end_a_retry(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, 2)
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="again")
    assert retry is not None
    damaged = sorted((tmp_path / "errors").iterdir())[1]
    damaged.write_bytes(b"PAR1")
    with pytest.raises(AccountingError, match=rf"{damaged.name} is committed but can't be read: Arrow"):
        select_rows(ledger, retry, ledger.commits())


def test_data_files_are_counted_whether_a_commit_names_them_or_not(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 2)
    assert ledger.data_file_count() == 0
    commit_shard(ledger.store, 0)
    assert ledger.data_file_count() == 2
    ledger.store.put("predictions/other.parquet", b"")
    assert ledger.data_file_count() == 3


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"stages": [], "error_types": [], "other": 1}'])
def test_retry_that_is_not_readable_is_named(content: bytes, tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, 2)
    ledger.store.put("_retries/1.json", content)
    with pytest.raises(AccountingError, match=r"_retries/1\.json is not readable") as caught:
        ledger.retry()
    assert "Delete _retries/1.json" in caught.value.remedy


def test_only_files_with_the_number_of_a_retry_are_retries(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, 2)
    for name in ("0", "01", "1.bak", "x1", "1234567890"):
        ledger.store.put(f"_retries/{name}.json", b"")
    ledger.store.put("_retries/5.json.tmp", b"")
    assert ledger.retry() is None


def test_retry_whose_rows_are_done_and_whose_end_is_missing_goes_on(tmp_path: Path) -> None:
    """Otherwise no attempt would write its _SUCCESS."""
    ledger, _ = finished(str(tmp_path), URIS, 2)
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="again")
    assert retry is not None
    for shard, rows in select_rows(ledger, retry, ledger.commits()).items():
        assert ledger.commit(again(ledger.store, shard, rows))
    assert start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="third") == retry
    assert start_retry(ledger, stages=["fetch"], error_types=[], retryable=True, attempt="third") == retry
    job, commits = ledger.require_job(), ledger.commits()
    ledger.finish(job, commits, totals_of(job, commits), retry.generation)
    assert start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="third") is None


@pytest.mark.parametrize(
    ("stages", "error_types", "retryable", "shards"),
    [
        (["decode"], [], False, [0, 1]),
        (["fetch"], [], False, None),
        ([], ["TRUNCATED"], False, [0, 1]),
        ([], ["CORRUPT", "TRUNCATED"], False, [0, 1]),
        ([], ["CORRUPT"], False, None),
        (["decode"], ["TRUNCATED"], False, [0, 1]),
        (["fetch"], ["TRUNCATED"], False, None),
        ([], [], True, None),
    ],
)
def test_retry_selects_by_stage_type_and_mark(
    stages: list[str], error_types: list[str], retryable: bool, shards: list[int] | None, tmp_path: Path
) -> None:
    ledger, _ = finished(str(tmp_path), URIS, 2)
    retry = start_retry(ledger, stages=stages, error_types=error_types, retryable=retryable, attempt="again")
    if shards is None:
        assert retry is None
        assert ledger.retry() is None
    else:
        assert retry is not None
        assert (retry.generation, retry.rows) == (1, len(shards))
        assert {shard: list(rows.rows) for shard, rows in select_rows(ledger, retry, ledger.commits()).items()} == {
            shard: [1] for shard in shards
        }
