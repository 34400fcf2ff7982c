"""Two drivers of one output: what is created only once, which rows are left, and which files may be swept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import UserError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import CRASH_JOURNAL, Commit, JobRecord, Retry, now
from batch_inference.output.retries import RetryShard, select_rows, start_retry
from batch_inference.output.verify import verify
from batch_inference.storage.store import Store
from tests.support.faulty_store import Faulty
from tests.support.outputs import CONFIG, ERRORS, commit_shard, finished, planned, totals_of, write

# Each of three shards has a good image and two bad ones.
URIS = [f"s3://b/{'bad-' if i % 3 else ''}{i}.jpg" for i in range(9)]
SHARD_SIZE = 3


def another(ledger: Ledger) -> Ledger:
    """Return the ledger of another driver of the same output."""
    return Ledger(Store(ledger.store.uri, CONFIG))


def begin(ledger: Ledger, attempt: str = "retry") -> Retry:
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt=attempt)
    assert retry is not None
    return retry


def write_retried(ledger: Ledger, retry_shard: RetryShard, attempt: str) -> Commit:
    """Write the files of a retried shard, of which the first row succeeds and the others fail again; return its commit."""
    shard, rows = retry_shard.commit.shard, retry_shard.rows.tolist()
    writer = ShardWriter(ledger.store, attempt, "zstd")
    columns = {"shard": pa.array([shard], pa.int32()), "row": pa.array(rows[:1], pa.int32())}
    writer.add(shard, pa.table({**columns, "value": pa.array([1])}))
    failed = [(row, "decode", "TRUNCATED", "cut off", False, None) for row in rows[1:]]
    arrays = [pa.array([row[i] for row in failed], field.type) for i, field in enumerate(ERRORS)]
    return writer.write(shard, pa.Table.from_arrays(arrays, schema=ERRORS), retry_shard)


def commit_retry(ledger: Ledger, retry: Retry, attempt: str) -> list[Commit]:
    """Do all rows of a retry; return the commits that count now."""
    for retry_shard in select_rows(ledger, retry, ledger.commits()).values():
        assert ledger.commit(write_retried(ledger, retry_shard, attempt))
    return ledger.commits()


def finish(ledger: Ledger, job: JobRecord, commits: list[Commit], generation: int) -> int:
    return ledger.finish(job, commits, totals_of(job, commits), generation)


# --- created only once ---------------------------------------------------------------------------------------------------


def test_commit_of_another_driver_is_never_overwritten(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, SHARD_SIZE)
    won = commit_shard(ledger.store, 0, "winner")
    content = (tmp_path / "_commits/shard-00000.json").read_bytes()
    writer, errors = write(ledger.store, 0, "loser")
    lost = writer.write(0, errors)
    assert not another(ledger).commit(lost)
    assert (tmp_path / "_commits/shard-00000.json").read_bytes() == content
    assert another(ledger).commits() == [won]


def test_commit_of_a_retry_is_never_overwritten(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    theirs = another(ledger)
    retry_shard = select_rows(ledger, begin(ledger), ledger.commits())[1]
    won, lost = (write_retried(ledger, retry_shard, attempt) for attempt in ("winner", "loser"))
    assert theirs.commit(won)
    assert not ledger.commit(lost)
    assert another(ledger).commits()[1] == won


def test_retry_of_another_driver_is_never_overwritten(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    first = Retry(1, ("decode",), (), False, 6, "first", now())
    second = Retry(1, (), ("TIMEOUT",), True, 6, "second", now())
    assert ledger.begin_retry(first)
    assert not another(ledger).begin_retry(second)
    assert another(ledger).retry() == ledger.retry() == first


def test_retry_whose_answer_was_lost_is_own(tmp_path: Path) -> None:
    finished(str(tmp_path), URIS, SHARD_SIZE)
    store = Faulty(str(tmp_path), CONFIG)
    store.arm(1, "lost answer")
    retry = Retry(1, (), (), False, 6, "first", now())
    assert Ledger(store).begin_retry(retry)
    assert store.fired
    assert Ledger(store).retry() == retry


class Overtaken(Store):
    """A store in which another driver acts just before this one creates an object."""

    def __init__(self, uri: str, rival: Callable[[], object]) -> None:
        super().__init__(uri, CONFIG)
        self._rival = rival

    def create(self, path: str, data: bytes) -> bool:
        self._rival()
        return super().create(path, data)


def test_one_of_two_retries_that_begin_at_the_same_moment_is_refused(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    begun: list[Retry] = []
    overtaken = Ledger(Overtaken(str(tmp_path), lambda: begun.append(begin(ledger, "winner"))))
    with pytest.raises(UserError, match=r"another retry of .* has begun at the same moment"):
        begin(overtaken, "loser")
    assert [retry.attempt for retry in begun] == ["winner"]
    assert [another(ledger).retry()] == begun


def success(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "_SUCCESS").read_bytes()))


def test_success_that_another_driver_has_written_stays(tmp_path: Path) -> None:
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    content = (tmp_path / "_SUCCESS").read_bytes()
    theirs = another(ledger)
    theirs.finish(job, theirs.commits(), {"attempt": "a later one"})
    assert (tmp_path / "_SUCCESS").read_bytes() == content


def test_success_of_a_retry_takes_the_place_of_an_earlier_one_and_not_the_reverse(tmp_path: Path) -> None:
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    slow, before = another(ledger), ledger.commits()
    assert success(tmp_path)["generation"] == 0
    finish(ledger, job, commit_retry(ledger, begin(ledger), "retry"), 1)
    after = success(tmp_path)
    assert (after["generation"], after["predictions"]) == (1, 6)
    slow.store.delete(["_FAILED"])
    slow.finish(job, slow.commits(), totals_of(job, before), 0)
    assert success(tmp_path) == after


# --- rows of a retry that are left -----------------------------------------------------------------------------------------


def test_rows_that_a_retry_has_done_are_not_left_though_they_failed_again(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    retry = begin(ledger)
    todo = select_rows(ledger, retry, ledger.commits())
    assert sorted(todo) == [0, 1, 2]
    commit = write_retried(ledger, todo[1], "retry")
    assert commit.errors == 1
    assert ledger.commit(commit)
    left = select_rows(another(ledger), retry, another(ledger).commits())
    assert sorted(left) == [0, 2]
    assert begin(another(ledger), "resumes") == retry


def test_retry_of_which_rows_failed_again_does_not_block_the_next(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    ledger.store.delete(["_SUCCESS"])
    commits = commit_retry(ledger, begin(ledger), "first")
    assert sum(commit.errors for commit in commits) == 3
    second = begin(another(ledger), "second")
    assert (second.generation, second.rows) == (2, 3)


# --- files that may be swept ---------------------------------------------------------------------------------------------


def data_files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for kind in ("predictions", "errors") for file in (folder / kind).iterdir()}


def named_files(commits: list[Commit]) -> set[str]:
    return {file.path for commit in commits for file in commit.files}


def test_sweep_of_a_retry_removes_what_it_and_earlier_runs_left(tmp_path: Path) -> None:
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    errors_before = {path for path in data_files(tmp_path) if path.startswith("errors/")}
    commits = commit_retry(ledger, begin(ledger), "retry")
    for path in ("predictions/shard-00000-dead.parquet", "errors/shard-00001-g1-dead.parquet"):
        ledger.store.put(path, b"left by a driver that was killed")
    assert finish(ledger, job, commits, 1) == len(errors_before) + 2
    assert data_files(tmp_path) == named_files(commits)
    assert verify(str(tmp_path)).problems == ()


def test_sweep_of_a_retry_removes_files_of_shards_in_which_it_had_nothing_to_do(tmp_path: Path) -> None:
    """A driver wrote them that did not see what an earlier retry had committed, and was killed."""
    ledger, job = finished(str(tmp_path), ["s3://b/0.jpg", "s3://b/1.jpg", "s3://b/bad-2.jpg", "s3://b/3.jpg"], 2)
    commits = commit_retry(ledger, begin(ledger), "retry")
    assert [commit.generation for commit in commits] == [0, 1]
    dead = [
        "predictions/shard-00000-g1-dead.parquet",
        "errors/shard-00000-g1-dead.parquet",
        "predictions/shard-00099-dead.parquet",
        "_manifest/plan-dead.tar",
        f"{CRASH_JOURNAL}/shard-00001-dead",
    ]
    for path in dead:
        ledger.store.put(path, b"left by a driver that was killed")
    assert finish(another(ledger), job, commits, 1) == len(dead) + 1  # and the errors that the retry has replaced
    assert data_files(tmp_path) == named_files(commits)
    left = [info.path for folder in ("_manifest", CRASH_JOURNAL) for info in ledger.store.objects(folder)]
    assert sorted(left) == ["_manifest/shard-00000.parquet", "_manifest/shard-00001.parquet"]


@pytest.mark.parametrize("generation", [0, 1])
def test_sweep_keeps_files_of_later_retries_than_it_knows(tmp_path: Path, generation: int) -> None:
    """Another driver may have begun a retry since, and written files that it has not committed yet."""
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    slow = another(ledger)
    if generation:
        finish(ledger, job, commit_retry(ledger, begin(ledger), "first"), 1)
    commits = slow.commits()
    retry = begin(ledger, "later")
    assert retry.generation == generation + 1
    waiting = [write_retried(ledger, again, "later") for again in select_rows(ledger, retry, ledger.commits()).values()]
    slow.store.put("predictions/shard-00002-dead.parquet", b"left by a driver that was killed")
    assert finish(slow, job, commits, generation) == 1
    assert data_files(tmp_path) == named_files([*commits, *waiting])
    assert all(ledger.commit(commit) for commit in waiting)
    assert ledger.verified_commits(job) == waiting
