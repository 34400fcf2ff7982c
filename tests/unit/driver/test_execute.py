"""The main phase of an attempt and what it finds to do, with rows that come from the test instead of Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from batch_inference.config import JobConfig
from batch_inference.driver import committer, execute
from batch_inference.driver.collector import OpenShard
from batch_inference.driver.committer import Committer
from batch_inference.driver.events import AttemptInfo, Events
from batch_inference.driver.execute import Execution
from batch_inference.driver.job import Planned
from batch_inference.driver.recorder import Recorder
from batch_inference.driver.resume import Todo, resume
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, JobRecord, Retry, now
from batch_inference.output.retries import start_retry
from batch_inference.output.verify import verify
from batch_inference.pipeline.bottleneck import planned_timings
from batch_inference.pipeline.engine import Engine
from batch_inference.pipeline.schemas import RESULT_SCHEMA
from batch_inference.storage.store import Store
from tests.support.outputs import CONFIG, commit_shard, fails, finished, planned, totals_of, value_of

# Each of three shards has a good image and a bad one.
URIS = [f"s3://b/{'bad-' if i % 2 else ''}{i}.jpg" for i in range(6)]
SHARDS, SHARD_SIZE = 3, 2


def rows_of(uris: list[str], shard: int, rows: list[int]) -> pa.Table:
    """Return result rows of a shard; an image fails if its name says so."""
    failed = [fails(uris[shard * SHARD_SIZE + row]) for row in rows]
    fixed: dict[str, list[Any]] = {
        "shard": [shard] * len(rows),
        "row": rows,
        "stage": ["decode" if bad else None for bad in failed],
        "error_type": ["TRUNCATED" if bad else None for bad in failed],
        "message": ["cut off" if bad else None for bad in failed],
        "retryable": [False] * len(rows),
    }
    table = pa.table(
        [pa.array(fixed.get(field.name, [None] * len(rows)), field.type) for field in RESULT_SCHEMA],
        schema=RESULT_SCHEMA,
    )
    values = [value_of(uris[shard * SHARD_SIZE + row]) for row in rows]
    return table.append_column("value", pa.array(values, pa.int64()))


class AtOnce(Committer):
    """Commits each shard before the next rows are taken, so that a test says what happens when."""

    def add(self, shard: int, part: OpenShard) -> None:
        super().add(shard, part)
        self.wait()


class Driver:
    """One driver of an output, as far as it goes without Ray.

    Args:
        folder: The output.
        uris: Inputs, whose names say whether they fail now.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, uris: list[str] = URIS) -> None:
        self._uris = uris
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(execute, "Committer", AtOnce)
        monkeypatch.setattr(committer, "_ASK_EVERY_S", 0.0)
        self.config = JobConfig.model_validate({"shard_size": SHARD_SIZE, "output": {"uri": str(folder)}})
        self.ledger = Ledger(Store(str(folder), CONFIG))
        self.job = self.ledger.require_job()
        self.attempt = AttemptInfo("")
        self.events = Events(self.attempt.started)
        self.stopping = threading.Event()
        engine = SimpleNamespace(custom=False)
        engine.with_passthrough = lambda names: engine
        self.retry = self.ledger.retry()
        self.planned = Planned(self.ledger, self.job, cast(Engine, engine), self.retry)
        self.done: list[int] = []

    def resume(self) -> Todo:
        self.todo = resume(self.planned, self.events)
        return self.todo

    def work(self, before: Callable[[int], None] = lambda shard: None) -> None:
        """Do what is left, shard by shard; ``before`` is called before the rows of each come."""

        def results(spec: Any) -> Iterator[pa.Table]:
            for shard in sorted(spec.rows):
                before(shard)
                self.done.append(shard)
                rows = spec.retry_rows.get(shard, np.arange(spec.rows[shard]))
                yield rows_of(self._uris, shard, rows.tolist())

        self._monkeypatch.setattr(execute, "results", results)
        recorder = Recorder(self.config, self.ledger.store, self.job, self.attempt)
        record = recorder.begin_work(self.events.progress, planned_timings(self.config, len(self.todo)))
        Execution(self.config, self.attempt, self.planned, self.todo, self.events, recorder, self.stopping).work(record)

    def finish(self) -> list[Commit]:
        commits = self.ledger.verified_commits(self.job)
        generation = self.retry.generation if self.retry else 0
        self.ledger.finish(self.job, commits, totals_of(self.job, commits), generation)
        return commits

    def write_again(self) -> list[Commit]:
        """Write the files of the rows that are to be done again, as a driver does that has not committed them yet."""
        written = []
        for shard, again in self.todo.retried.items():
            table = rows_of(self._uris, shard, again.rows.tolist())
            errors = table.select(["row", "stage", "error_type", "message", "retryable", "traceback"])
            good = table["error_type"].is_null()
            writer = ShardWriter(self.ledger.store, self.attempt.id, "zstd")
            writer.add(shard, table.filter(good).select(["shard", "row", "value"]))
            written.append(writer.write(shard, errors.filter(pa.compute.invert(good)), again))
        return written


def begin_retry(ledger: Ledger) -> Retry:
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="retry")
    assert retry is not None
    return retry


def partly_committed(folder: Path) -> tuple[Ledger, JobRecord]:
    """Make an output that stopped before its last shard, as too many failed rows do."""
    ledger, job = planned(str(folder), URIS, SHARD_SIZE)
    for shard in range(SHARDS - 1):
        commit_shard(ledger.store, shard)
    return ledger, job


def test_first_attempt_commits_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(str(tmp_path), URIS, SHARD_SIZE)
    driver = Driver(tmp_path, monkeypatch)
    todo = driver.resume()
    assert (todo.pending, todo.retried, todo.is_first, todo.generation) == ((0, 1, 2), {}, True, 0)
    driver.work()
    assert [commit.generation for commit in driver.finish()] == [0] * SHARDS
    assert verify(str(tmp_path)).problems == ()


# --- lost races ----------------------------------------------------------------------------------------------------------


def test_retry_that_lost_a_race_does_its_other_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard has a commit from before the retry, which says nothing of what the retry has done."""
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    begin_retry(ledger)
    mine, other = (Driver(tmp_path, monkeypatch, [uri.replace("bad", "good") for uri in URIS]) for _ in range(2))
    assert sorted(mine.resume().retried) == sorted(other.resume().retried) == [0, 1, 2]
    assert other.ledger.commit(other.write_again()[0])
    mine.work()
    assert mine.done == [0, 1, 2]
    commits = mine.finish()
    assert [(commit.generation, commit.errors) for commit in commits] == [(1, 0)] * SHARDS
    assert [commit.attempt == mine.attempt.id for commit in commits] == [False, True, True]
    assert verify(str(tmp_path)).problems == ()


def test_driver_ends_when_another_has_committed_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(str(tmp_path), URIS, SHARD_SIZE)
    driver = Driver(tmp_path, monkeypatch)
    driver.resume()

    def other_is_first(shard: int) -> None:
        for number in (1, 2) if shard == 1 else ():
            commit_shard(Store(str(tmp_path), CONFIG), number, "other")

    driver.work(other_is_first)
    assert driver.done == [0, 1]
    assert [commit.attempt for commit in driver.finish()] == [driver.attempt.id, "other", "other"]
    assert verify(str(tmp_path)).problems == ()


def test_stopped_driver_takes_no_more_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(str(tmp_path), URIS, SHARD_SIZE)
    driver = Driver(tmp_path, monkeypatch)
    driver.resume()
    with pytest.raises(KeyboardInterrupt):
        driver.work(lambda shard: driver.stopping.set() if shard == 1 else None)
    assert driver.ledger.committed() == {0}
    assert driver.events.progress.shards_done == 1


# --- a retry of a job that is not all committed ----------------------------------------------------------------------------


def test_shards_without_a_commit_get_their_first_from_the_retry_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, _ = partly_committed(tmp_path)
    begin_retry(ledger)
    driver = Driver(tmp_path, monkeypatch)
    todo = driver.resume()
    assert (todo.pending, sorted(todo.retried), todo.generation) == ((2,), [0, 1], 1)
    driver.work()
    assert [(commit.generation, commit.rows) for commit in driver.finish()] == [(1, 2)] * SHARDS
    assert verify(str(tmp_path)).problems == ()
    # Nothing of the retry is left, though rows failed in all shards.
    assert not Driver(tmp_path, monkeypatch).resume()


def test_finished_retry_deletes_no_file_that_another_driver_may_still_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other driver starts when the first has committed the last shard, of which rows have failed."""
    ledger, job = partly_committed(tmp_path)
    begin_retry(ledger)
    first = Driver(tmp_path, monkeypatch)
    first.resume()
    first.work()
    second = Driver(tmp_path, monkeypatch)
    second.resume()
    waiting = second.write_again()
    first.finish()
    assert all(second.ledger.commit(commit) for commit in waiting)
    assert len(second.ledger.verified_commits(job)) == SHARDS
    assert verify(str(tmp_path)).problems == ()


def test_commit_of_a_driver_from_before_the_retry_does_not_end_the_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shard has a commit then, of a generation from which the retry still selects rows."""
    ledger, _ = partly_committed(tmp_path)
    begin_retry(ledger)
    mine, other = (Driver(tmp_path, monkeypatch) for _ in range(2))
    mine.resume()
    other.resume()
    for commit in other.write_again():
        assert other.ledger.commit(commit)

    def slow_one_commits(shard: int) -> None:
        if shard == 0:
            commit_shard(ledger.store, 2, "slow")

    mine.work(slow_one_commits)
    assert mine.done == [0, 1, 2]
    assert [commit.generation for commit in mine.finish()] == [1] * SHARDS
    assert verify(str(tmp_path)).problems == ()


def test_generation_that_only_unified_types_leaves_pending_shards_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rewrites files of commits that are older than it, which those of these shards then are."""
    ledger, _ = partly_committed(tmp_path)
    assert ledger.begin_retry(Retry(1, (), (), False, 0, "types", now(), types=True))
    todo = Driver(tmp_path, monkeypatch).resume()
    assert (todo.pending, todo.retried, todo.generation) == ((2,), {}, 0)


def test_output_under_retry_has_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    ledger.store.put("_FAILED", b"{}")
    begin_retry(ledger)
    driver = Driver(tmp_path, monkeypatch)
    driver.resume()
    assert not (tmp_path / "_SUCCESS").exists()
    assert not (tmp_path / "_FAILED").exists()
    progress = driver.events.progress
    assert (progress.shards_done, progress.tally.rows, progress.tally.errors) == (0, 3, 0)
