"""Commits beside the main loop: two writers, two drivers, interrupts and failures."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.config import JobConfig
from batch_inference.driver import committer
from batch_inference.driver.collector import OpenShard
from batch_inference.driver.committer import Committer, PredictionWriters
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import AccountingError, InfrastructureError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, Retry, now
from batch_inference.output.retries import RetryShard, select_rows, start_retry
from batch_inference.output.tally import Tally
from batch_inference.output.verify import verify
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.schemas import RESULT_SCHEMA
from batch_inference.storage.store import Store
from tests.support.batches import image, prepared
from tests.support.outputs import CONFIG, ERRORS, finished, planned, totals_of, value_of, write

# Each shard has a good image and a bad one.
URIS = [f"s3://b/{'bad-' if i % 2 else ''}{i}.jpg" for i in range(6)]
SHARDS, SHARD_SIZE = 3, 2
# Long enough for any machine; only a hang waits for it.
HANG_S = 120.0


def ignore(commit: Commit, own: bool, seconds: float) -> None:
    """Take no notice of a commit."""


def open_shard(errors: pa.Table | None = None) -> OpenShard:
    return OpenShard(np.ones(0, bool), [ERRORS.empty_table() if errors is None else errors])


def another(ledger: Ledger) -> Ledger:
    """Return the ledger of another driver of the same output."""
    return Ledger(Store(ledger.store.uri, CONFIG))


def retry_of(ledger: Ledger) -> dict[int, RetryShard]:
    """Begin or join a retry of all failed rows; return the rows to do."""
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="retry")
    assert retry is not None
    return select_rows(ledger, retry, ledger.commits())


class Healed(PredictionWriters):
    """Predictions of the rows of a retry, all of which succeed now."""

    def __init__(self, store: Store, attempt: str) -> None:
        self.writer = ShardWriter(store, attempt, "zstd")
        super().__init__(self.writer, [])

    def write(self, shard: int, errors: pa.Table, retry_shard: RetryShard | None) -> Commit:
        assert retry_shard is not None
        values = [value_of(URIS[shard * SHARD_SIZE + row]) for row in retry_shard.rows]
        rows = {"shard": pa.array([shard] * len(values), pa.int32()), "row": pa.array(retry_shard.rows, pa.int32())}
        self.writer.add(shard, pa.table({**rows, "value": values}))
        return super().write(shard, errors, retry_shard)


class First(PredictionWriters):
    """Predictions of whole shards; ``before`` is called before the files of a shard are written."""

    def __init__(self, store: Store, attempt: str, before: Callable[[int], None] = lambda shard: None) -> None:
        super().__init__(None, [])
        self._store = store
        self._attempt = attempt
        self._before = before

    def write(self, shard: int, errors: pa.Table, retry_shard: RetryShard | None) -> Commit:
        self._before(shard)
        writer, failed = write(self._store, shard, self._attempt)
        return writer.write(shard, failed)


def data_files(ledger: Ledger) -> set[str]:
    return {info.path for folder in ("predictions", "errors") for info in ledger.store.objects(folder)}


def named_files(*commits: Commit) -> set[str]:
    return {file.path for commit in commits for file in commit.files}


# --- what the driver and other drivers have committed --------------------------------------------------------------------


@pytest.fixture
def always_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store be asked at every call."""
    monkeypatch.setattr(committer, "_ASK_EVERY_S", 0.0)


@pytest.mark.usefixtures("always_asks")
def test_job_is_committed_when_every_shard_is(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, SHARD_SIZE)
    with Committer(ledger, First(ledger.store, "one"), ignore) as mine:
        with Committer(another(ledger), First(ledger.store, "two"), ignore) as theirs:
            for shard in range(SHARDS):
                assert not mine.everything_committed(SHARDS)
                theirs.add(shard, open_shard())
                theirs.wait()
        assert mine.everything_committed(SHARDS)


@pytest.mark.usefixtures("always_asks")
def test_retry_is_not_committed_while_a_shard_has_only_its_earlier_commit(tmp_path: Path) -> None:
    """Every shard of a retry has a commit from the beginning; taken for the retry's, its rows would never be done."""
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    retried = retry_of(ledger)
    assert sorted(retried) == [0, 1, 2]
    with Committer(ledger, Healed(ledger.store, "mine"), ignore, retried) as mine:
        for shard in retried:
            assert not mine.everything_committed(SHARDS)
            theirs = another(ledger)
            assert theirs.commit(Healed(theirs.store, "other").write(shard, ERRORS.empty_table(), retried[shard]))
        assert mine.everything_committed(SHARDS)


def test_store_is_asked_for_other_drivers_commits_only_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    clock = [1000.0]
    monkeypatch.setattr(committer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Committer(ledger, First(ledger.store, "one"), ignore) as mine:
        assert mine.everything_committed(SHARDS)
        clock[0] += 4.9
        assert not mine.everything_committed(SHARDS)
        clock[0] += 0.2
        assert mine.everything_committed(SHARDS)


# --- lost races ----------------------------------------------------------------------------------------------------------


def test_loser_of_a_race_deletes_its_files_and_takes_the_winners_commit(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, SHARD_SIZE)
    told: list[tuple[Commit, bool]] = []
    won: list[Commit] = []

    def other_is_first(shard: int) -> None:
        won.append(First(ledger.store, "winner").write(shard, ERRORS.empty_table(), None))
        assert another(ledger).commit(won[0])

    with Committer(
        ledger, First(ledger.store, "loser", other_is_first), lambda commit, own, _: told.append((commit, own))
    ) as mine:
        assert not mine.lost_race
        mine.add(0, open_shard())
        mine.wait()
        assert mine.lost_race
    assert [own for _, own in told] == [False]
    assert another(ledger).commits() == won
    assert data_files(ledger) == named_files(*won)


def test_loser_of_a_retry_keeps_the_files_that_the_earlier_commit_names(tmp_path: Path) -> None:
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    before = named_files(*ledger.commits())
    retried = retry_of(ledger)
    theirs = another(ledger)
    won = [Healed(theirs.store, "winner").write(shard, ERRORS.empty_table(), retried[shard]) for shard in retried]
    assert all(theirs.commit(commit) for commit in won)
    with Committer(ledger, Healed(ledger.store, "loser"), ignore, retried) as mine:
        for shard in retried:
            mine.add(shard, open_shard())
        mine.wait()
        assert mine.lost_race
    assert data_files(ledger) == before | named_files(*won)
    commits = another(ledger).verified_commits(job)
    assert commits == won
    another(ledger).finish(job, commits, totals_of(job, commits), 1)
    assert verify(str(tmp_path)).problems == ()


def test_retry_that_another_driver_has_finished_is_lost_and_no_failure(tmp_path: Path) -> None:
    """The winner's sweep has deleted the errors that the loser's commit would have replaced."""
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    retried = retry_of(ledger)
    theirs = another(ledger)
    won = [Healed(theirs.store, "winner").write(shard, ERRORS.empty_table(), retried[shard]) for shard in retried]
    assert all(theirs.commit(commit) for commit in won)
    theirs.store.delete(["_SUCCESS"])
    theirs.finish(job, won, totals_of(job, won), 1)
    told: list[tuple[Commit, bool]] = []
    with Committer(
        ledger, Healed(ledger.store, "loser"), lambda commit, own, _: told.append((commit, own)), retried
    ) as mine:
        mine.add(0, open_shard())
        mine.wait()
        assert mine.lost_race
    assert told == [(won[0], False)]
    assert data_files(ledger) == named_files(*won)


def test_lost_errors_that_no_other_driver_has_replaced_end_the_job(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    retried = retry_of(ledger)
    ledger.store.delete([file.path for file in retried[0].commit.files if file.path.startswith("errors/")])
    with (
        pytest.raises(AccountingError, match="is committed but can't be read"),
        Committer(ledger, Healed(ledger.store, "mine"), ignore, retried) as mine,
    ):
        mine.add(0, open_shard())
        mine.wait()
    assert not mine.lost_race


def test_commit_that_the_listing_did_not_show_ends_the_attempt(tmp_path: Path) -> None:
    """Its errors were swept by the retry that made the newer commit; this attempt began from the older one."""
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    retried = retry_of(ledger)
    theirs = another(ledger)
    won = [Healed(theirs.store, "winner").write(shard, ERRORS.empty_table(), retried[shard]) for shard in retried]
    assert all(theirs.commit(commit) for commit in won)
    theirs.store.delete(["_SUCCESS"])
    theirs.finish(job, won, totals_of(job, won), 1)
    assert theirs.begin_retry(Retry(2, (), (), False, 1, "second", now()))
    stale = {0: replace(retried[0], generation=2)}
    with (
        pytest.raises(InfrastructureError, match="shard-00000-g1 was committed before this attempt began"),
        Committer(ledger, Healed(ledger.store, "late"), ignore, stale) as mine,
    ):
        mine.add(0, open_shard())
        mine.wait()
    assert data_files(ledger) == named_files(*won)


# --- interrupts and failures ---------------------------------------------------------------------------------------------


class Blocked:
    """Lets the commits under way wait until the pool is being shut down, with the waiting ones cancelled or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        shutting_down = self._shutting_down = threading.Event()

        class Pool(ThreadPoolExecutor):
            def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
                super().shutdown(wait=False, cancel_futures=cancel_futures)
                shutting_down.set()
                super().shutdown(wait=wait)

        monkeypatch.setattr(committer, "ThreadPoolExecutor", Pool)

    def __call__(self, shard: int) -> None:
        self.begun.release()
        assert self._shutting_down.wait(HANG_S)

    def wait_until_busy(self, threads: int) -> None:
        for _ in range(threads):
            assert self.begun.acquire(timeout=HANG_S)


THREADS = committer._MAX_UNCOMMITTED // 2


def end_while_committing(
    folder: Path, exc: BaseException, blocked: Blocked, fails: Callable[[int], bool] = lambda shard: False
) -> tuple[list[int], list[int]]:
    """End a job whose threads are all busy while two more shards wait; return the shards committed, and those told of."""
    uris = [f"s3://b/{i}.jpg" for i in range(THREADS + 2)]
    ledger, _ = planned(str(folder), uris, 1)
    told: list[int] = []

    def before(shard: int) -> None:
        blocked(shard)
        if fails(shard):
            raise InfrastructureError("disk full", "Again.")

    with (
        pytest.raises(type(exc)) as caught,
        Committer(ledger, First(ledger.store, "one", before), lambda commit, own, _: told.append(commit.shard)) as mine,
    ):
        for shard in range(THREADS + 2):
            mine.add(shard, open_shard())
        blocked.wait_until_busy(THREADS)
        raise exc
    assert caught.value is exc
    return sorted(another(ledger).committed()), sorted(told)


def test_interrupted_job_commits_all_complete_shards_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed, told = end_while_committing(tmp_path, KeyboardInterrupt(), Blocked(monkeypatch))
    assert committed == told == list(range(THREADS + 2))


def test_failed_job_commits_what_is_under_way_and_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed, told = end_while_committing(tmp_path, RuntimeError("the pipeline failed"), Blocked(monkeypatch))
    assert committed == told == list(range(THREADS))


def test_failed_commit_does_not_hide_the_interrupt_or_the_other_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = Blocked(monkeypatch)
    committed, told = end_while_committing(tmp_path, KeyboardInterrupt(), blocked, lambda shard: shard == 1)
    assert committed == told == [shard for shard in range(THREADS + 2) if shard != 1]


def test_complete_shards_that_wait_for_the_store_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers when somebody waits for it, so that a driver that does not wait has been told of nothing."""
    waited_for = threading.Event()

    class Pool(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            future = super().submit(*args, **kwargs)
            outcome = future.result

            def result(timeout: float | None = None) -> Any:
                waited_for.set()
                return outcome(timeout)

            vars(future)["result"] = result
            return future

    def before(shard: int) -> None:
        assert waited_for.wait(HANG_S)

    monkeypatch.setattr(committer, "ThreadPoolExecutor", Pool)
    most = committer._MAX_UNCOMMITTED
    ledger, _ = planned(str(tmp_path), [f"s3://b/{i}.jpg" for i in range(most + 1)], 1)
    told: list[int] = []
    with Committer(ledger, First(ledger.store, "one", before), lambda commit, *_: told.append(commit.shard)) as mine:
        for shard in range(most):
            mine.add(shard, open_shard())
        assert told == []
        mine.add(most, open_shard())
        assert 0 in told
        mine.wait()
        assert told == list(range(most + 1))


def test_failed_commit_ends_the_job(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, SHARD_SIZE)

    def before(shard: int) -> None:
        raise InfrastructureError("disk full", "Again.")

    with (
        pytest.raises(InfrastructureError, match="disk full"),
        Committer(ledger, First(ledger.store, "one", before), ignore) as mine,
    ):
        mine.add(0, open_shard())
        mine.wait()


def test_rows_that_only_the_writer_refused_are_counted_before_the_shard_is_told(tmp_path: Path) -> None:
    """A value of a type that the job's column cannot hold is an error of which the collector does not know."""
    ledger, _ = planned(str(tmp_path), [f"s3://b/{i}.jpg" for i in range(2)], 1)
    writers = PredictionWriters(ShardWriter(ledger.store, "one", "zstd"), [])
    tally = Tally(rows=2)
    told: list[int] = []
    with Committer(ledger, writers, lambda *_: told.append(tally.errors), tally=tally) as mine:
        for shard, value in enumerate([7, "text"]):
            rows = {"shard": pa.array([shard], pa.int32()), "row": pa.array([0], pa.int32())}
            assert writers._local is not None
            writers._local.add(shard, pa.table({**rows, "value": [value]}))
            mine.add(shard, open_shard())
            mine.wait()
    assert told == [0, 1]
    assert tally.errors_by == {"postprocess": {"OUTPUT_MISMATCH": 1}}


def test_errors_that_were_known_before_a_retry_are_not_counted_again(tmp_path: Path) -> None:
    """Of two failed rows one is done again and fails again, which the collector has counted."""
    ledger, _ = finished(str(tmp_path), ["s3://b/bad-0.jpg", "s3://b/bad-1.jpg"], 2)
    (before,) = ledger.commits()
    retried = {0: RetryShard(np.array([1], np.int32), before, 1, {"decode": {"TRUNCATED": 1}})}
    tally = Tally(rows=2)
    tally.add_errors(before.errors_by)
    writers = PredictionWriters(ShardWriter(ledger.store, "two", "zstd"), [])
    with Committer(ledger, writers, ignore, retried, tally) as mine:
        mine.add(0, open_shard(write(ledger.store, 0, "none")[1].slice(1)))
        mine.wait()
    assert (tally.errors, tally.errors_by) == (2, {"decode": {"TRUNCATED": 2}})
    assert another(ledger).commits()[0].errors_by == {"decode": {"TRUNCATED": 2}}


# --- gathering predictions -----------------------------------------------------------------------------------------------


def results(rows: list[tuple[int, int, bool]], **columns: Any) -> pa.Table:
    """Return result rows of (shard, row, whether it failed), with columns of predictions."""
    fixed: dict[str, list[Any]] = {
        "shard": [shard for shard, _, _ in rows],
        "row": [row for _, row, _ in rows],
        "stage": ["decode" if failed else None for _, _, failed in rows],
        "error_type": ["TRUNCATED" if failed else None for _, _, failed in rows],
    }
    table = pa.table(
        [pa.array(fixed.get(field.name, [None] * len(rows)), field.type) for field in RESULT_SCHEMA],
        schema=RESULT_SCHEMA,
    )
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def test_predictions_of_the_drivers_own_are_gathered_and_written(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, SHARD_SIZE)
    writers = PredictionWriters(ShardWriter(ledger.store, "one", "zstd"), [])
    assert writers.handles == []
    writers.add(results([(1, 0, False), (0, 1, True), (0, 0, False)], value=[10, None, 0]))
    writers.add(results([(1, 1, False)], value=[11]))
    failed = write(ledger.store, 0, "none")[1]
    commits = [writers.write(0, failed, None), writers.write(1, failed.slice(0, 0), None)]
    assert [(commit.predictions, commit.errors) for commit in commits] == [(1, 1), (2, 0)]
    tables = [pq.read_table(tmp_path / commit.files[0].path) for commit in commits]
    assert [table.column_names for table in tables] == [["uri", "shard", "row", "value"]] * 2
    assert [table["value"].to_pylist() for table in tables] == [[0], [10, 11]]


def test_only_predictions_are_gathered() -> None:
    class Recording(ShardWriter):
        def __init__(self) -> None:
            self.added: list[tuple[int, list[dict[str, Any]]]] = []

        def add(self, shard: int, predictions: pa.Table) -> None:
            self.added.append((shard, predictions.to_pylist()))

    local = Recording()
    writers = PredictionWriters(local, [])
    writers.add(results([(5, 0, True), (5, 1, False), (4, 0, False), (4, 1, True)], value=[None, 1, 2, None]))
    writers.add(results([(4, 2, False)], value=[3]))
    assert local.added == [
        (4, [{"shard": 4, "row": 0, "value": 2}]),
        (5, [{"shard": 5, "row": 1, "value": 1}]),
        (4, [{"shard": 4, "row": 2, "value": 3}]),
    ]


class Handle:
    """A writer as a Ray actor's handle: its methods are called by ``remote`` and answer at once."""

    def __init__(self, writer: ShardWriter) -> None:
        self.shards: list[int] = []

        def add(shard: int, predictions: pa.Table) -> None:
            self.shards.append(shard)
            writer.add(shard, predictions)

        self.add = SimpleNamespace(remote=add)
        self.write = SimpleNamespace(remote=writer.write)


def test_actors_send_predictions_to_the_writer_that_writes_their_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda answers: answers))
    ledger, _ = planned(str(tmp_path), [f"s3://b/{i}.jpg" for i in range(10)], SHARD_SIZE)
    handles = [Handle(ShardWriter(ledger.store, "one", "zstd")) for _ in range(2)]
    writers = PredictionWriters(None, handles)
    actor = InferenceActor(
        lambda: lambda images, uris: pa.table({"value": [int(i[0, 0, 0]) for i in images]}), writers.handles
    )
    rows = pa.array([0, 1] * 5, pa.int32())
    table = prepared([image(i) for i in range(10)])
    table = table.set_column(0, "shard", pa.array(np.repeat(range(5), 2), pa.int32())).set_column(1, "row", rows)
    result = actor(table)
    assert "value" not in result.column_names
    writers.add(result)  # rows without predictions, of which the driver's process has nothing to gather
    assert [handle.shards for handle in handles] == [[0, 2, 4], [1, 3]]
    for shard in range(5):
        commit = writers.write(shard, ERRORS.empty_table(), None)
        assert commit.predictions == 2
        values = pq.read_table(tmp_path / commit.files[0].path)["value"].to_pylist()
        assert values == [2 * shard, 2 * shard + 1]


@pytest.mark.parametrize(("actors", "count"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_writers_of_a_custom_predictor_run_beside_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actors: int, count: int
) -> None:
    """One that is lost must end the attempt, since what it had gathered is gone."""
    made: list[tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]] = []

    def remote(**resources: Any) -> Any:
        def actor(cls: type) -> Any:
            assert cls is ShardWriter
            return SimpleNamespace(
                options=lambda **options: SimpleNamespace(remote=lambda *args: made.append((resources, options, args)))
            )

        return actor

    context = SimpleNamespace(get_node_id=lambda: "the driver's")
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=remote, get_runtime_context=lambda: context))
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(scheduling_strategies=strategies))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    config = JobConfig.model_validate({"inference": {"actors": actors}, "output": {"compression": "snappy"}})
    store = Store(str(tmp_path), CONFIG)
    writers = PredictionWriters.start(store, config, "one", "tries", 3, custom=True)
    assert len(writers.handles) == count
    beside = {"scheduling_strategy": ("the driver's", False)}
    expected = ({"num_cpus": 0, "max_restarts": 0}, beside, (store, "one", "snappy", "tries", 3))
    assert made == [expected] * count


def test_writer_of_a_classifier_is_the_drivers_own(tmp_path: Path) -> None:
    config = JobConfig.model_validate({"inference": {"actors": 9}})
    writers = PredictionWriters.start(Store(str(tmp_path), CONFIG), config, "one", "tries", 0, custom=False)
    assert writers.handles == []
    assert isinstance(writers._local, ShardWriter)


def test_closing_ends_every_writer_though_one_has_ended_before(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []

    def kill(handle: str) -> None:
        killed.append(handle)
        if handle == "first":
            raise RuntimeError("it has ended before")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(kill=kill))
    PredictionWriters(None, ["first", "second"]).close()
    assert killed == ["first", "second"]
