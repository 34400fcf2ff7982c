"""Retries of failed rows by drivers that crash and race."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from batch_inference.driver.collector import ERROR_COLUMNS, OpenShard
from batch_inference.driver.committer import Committer, PredictionWriters
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, Retry
from batch_inference.output.retries import RetryShard, describe_failed_rows, select_rows, start_retry
from batch_inference.output.verify import verify
from batch_inference.storage.store import Store
from tests.support.faulty_store import Crash, Faulty, stale
from tests.support.outputs import CONFIG, fails, finished, totals_of, value_of

URIS = [f"s3://b/{'bad-' if i % 3 == 1 else ''}{i}.jpg" for i in range(11)]
BAD = [uri for uri in URIS if fails(uri)]
SHARD_SIZE = 4
_ERRORS = pa.schema(
    list(zip(ERROR_COLUMNS, (pa.int32(), pa.string(), pa.string(), pa.string(), pa.bool_(), pa.string()), strict=True))
)


def heals(uri: str, generation: int) -> bool:
    """Return whether an image that was unreadable is readable now."""
    return zlib.crc32(uri.encode()) % 3 < generation


def write_again(store: Store, shard: int, again: RetryShard, attempt: str) -> tuple[ShardWriter, pa.Table]:
    """Return a writer with the predictions of the retried rows, and the rows that failed again."""
    writer = ShardWriter(store, attempt, "zstd")
    uris = {int(row): URIS[shard * SHARD_SIZE + row] for row in again.rows}
    good = [row for row, uri in uris.items() if heals(uri, again.generation)]
    if good:
        values = pa.array([value_of(uris[row]) for row in good])
        rows = pa.array(good, pa.int32())
        writer.add(shard, pa.table({"shard": pa.array([shard] * len(good), pa.int32()), "row": rows, "value": values}))
    bad = [(row, "fetch", "TIMEOUT", "too slow", True, None) for row in uris if row not in good]
    return writer, pa.Table.from_arrays(
        [pa.array([b[i] for b in bad], f.type) for i, f in enumerate(_ERRORS)], schema=_ERRORS
    )


def do_again(ledger: Ledger, retry: Retry, attempt: str) -> None:
    """Run a retry from start to finish."""
    for shard, again in select_rows(ledger, retry, ledger.commits()).items():
        writer, errors = write_again(ledger.store, shard, again, attempt)
        assert ledger.commit(writer.write(shard, errors, again))
    end(ledger, retry.generation)


def end(ledger: Ledger, generation: int) -> None:
    job, commits = ledger.require_job(), ledger.commits()
    ledger.check_complete(job, commits)
    ledger.store.delete(["_SUCCESS"])
    ledger.finish(job, commits, totals_of(job, commits), generation)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for file in sorted((folder / kind).glob("*")) for row in pq.read_table(file).to_pylist()]


def test_retry_turns_errors_into_predictions_and_the_rest_stays(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    before = {row["uri"]: row for row in rows(tmp_path, "predictions")}
    retry = start_retry(ledger, stages=["decode"], error_types=[], retryable=False, attempt="two")
    assert retry is not None
    assert (retry.generation, retry.rows) == (1, len(BAD))
    do_again(ledger, retry, "two")
    found = verify(str(tmp_path))
    assert (found.problems, found.uncommitted) == ((), ())
    healed = [uri for uri in BAD if heals(uri, 1)]
    assert healed
    assert (found.predictions, found.errors) == (len(before) + len(healed), len(BAD) - len(healed))
    after = {row["uri"]: row for row in rows(tmp_path, "predictions")}
    assert {uri: after[uri] for uri in before} == before
    assert {after[uri]["value"] for uri in healed} == {value_of(uri) for uri in healed}
    left = rows(tmp_path, "errors")
    assert {row["uri"] for row in left} == set(BAD) - set(healed)
    assert {(row["stage"], row["error_type"], row["tries"]) for row in left} == {("fetch", "TIMEOUT", 2)}
    # The next one has to do with what is left, by its new stage.
    assert start_retry(ledger, stages=["decode"], error_types=[], retryable=False, attempt="x") is None
    retry = start_retry(ledger, stages=["fetch"], error_types=[], retryable=False, attempt="three")
    assert retry is not None
    assert (retry.generation, retry.rows) == (2, len(left))
    do_again(ledger, retry, "three")
    assert verify(str(tmp_path)).problems == ()
    assert {row["tries"] for row in rows(tmp_path, "errors")} <= {3}


def test_only_selected_rows_are_retried(tmp_path: Path) -> None:
    """A row of the shard that failed for another reason keeps its error, its message and its number of tries."""
    ledger, _ = finished(str(tmp_path), [f"s3://b/bad-{i}.jpg" for i in range(4)], SHARD_SIZE)
    (commit,) = ledger.commits()
    (file,) = commit.files
    table = pq.read_table(io.BytesIO(ledger.store.get(file.path)))
    kinds = pa.array(["TRUNCATED", "TIMEOUT", "TRUNCATED", "TIMEOUT"])
    table = table.set_column(table.column_names.index("error_type"), "error_type", kinds)
    writer = ShardWriter(ledger.store, "mixed", "zstd")
    ledger.store.delete(["_commits/shard-00000.json", file.path])
    assert ledger.commit(writer.write(0, table.select(list(ERROR_COLUMNS))))
    retry = start_retry(ledger, stages=[], error_types=["TIMEOUT"], retryable=False, attempt="two")
    assert retry is not None
    again = select_rows(ledger, retry, ledger.commits())[0]
    assert again.rows.tolist() == [1, 3]
    assert again.errors_by == {"decode": {"TIMEOUT": 2}}
    writer.add(0, pa.table({"shard": pa.array([0], pa.int32()), "row": pa.array([3], pa.int32()), "value": [7]}))
    errors = pa.Table.from_pylist(
        [dict(zip(ERROR_COLUMNS, (1, "fetch", "GONE", "m", False, None), strict=True))], schema=_ERRORS
    )
    assert ledger.commit(writer.write(0, errors, again))
    end(ledger, 1)
    assert verify(str(tmp_path)).problems == ()
    assert [(r["row"], r["error_type"], r["tries"]) for r in rows(tmp_path, "errors")] == [
        (0, "TRUNCATED", 1), (1, "GONE", 2), (2, "TRUNCATED", 1),
    ]  # fmt: skip


def test_retry_of_retryable_rows_and_of_all(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    assert start_retry(ledger, stages=[], error_types=[], retryable=True, attempt="two") is None
    assert describe_failed_rows(ledger) == f"decode TRUNCATED {len(BAD)}"
    everything = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="two")
    assert everything is not None
    assert everything.rows == len(BAD)


def test_unknown_stage_is_refused(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    with pytest.raises(UserError, match="there is no stage fetching") as caught:
        start_retry(ledger, stages=["fetching"], error_types=[], retryable=False, attempt="two")
    assert "fetch, decode" in caught.value.remedy


def test_unfinished_retry_is_continued_and_no_other_starts(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    first = start_retry(ledger, stages=["decode"], error_types=[], retryable=False, attempt="two")
    assert start_retry(ledger, stages=["decode"], error_types=[], retryable=False, attempt="three") == first
    with pytest.raises(UserError, match=rf"the retry 1 of .* is not finished: {len(BAD)} of {len(BAD)} rows are left"):
        start_retry(ledger, stages=["fetch"], error_types=[], retryable=False, attempt="three")


def test_retry_that_no_listing_shows_is_found_by_name(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, SHARD_SIZE)
    store = Faulty(str(tmp_path), CONFIG, lags="_retries")
    store.stale = zlib.crc32(b"_retries/1.json") % 3
    assert Ledger(store).retry() is None and Ledger(store).success_record() is not None
    first = start_retry(ledger, stages=["decode"], error_types=[], retryable=False, attempt="two")
    assert not list(store.objects("_retries"))
    assert Ledger(store).retry() == first
    assert Ledger(store).success_record() is None


def test_sweep_spares_files_of_commits_that_no_listing_shows(tmp_path: Path) -> None:
    ledger, job = finished(str(tmp_path), URIS, SHARD_SIZE)
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="two")
    assert retry is not None
    pending = select_rows(ledger, retry, ledger.commits())
    for shard, again in pending.items():
        writer, errors = write_again(ledger.store, shard, again, "two")
        assert ledger.commit(writer.write(shard, errors, again))
    before = sorted(str(file) for file in tmp_path.rglob("*-g1-*"))
    assert before
    for third in range(3):
        store = Faulty(str(tmp_path), CONFIG, lags="_commits/")
        store.stale = third
        late = Ledger(store)
        commits = [commit for commit in Ledger(Store(str(tmp_path), CONFIG)).commits() if not commit.generation]
        old = {shard: 0 for shard in range(job.shards)}
        commits = late.commits(old)
        with pytest.raises(InfrastructureError, match="did not show the newest commits"):
            late.delete_unnamed(commits, 1)
        assert sorted(str(file) for file in tmp_path.rglob("*-g1-*")) == before


@dataclass
class Retrier:
    """One attempt on a finished job: continues the latest retry, or starts one."""

    attempt: str
    store: Faulty
    retry: Retry | None = None
    pending: dict[int, RetryShard] = field(default_factory=dict)
    planned: bool = False
    finished: bool = False
    misled: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store)

    def go_on(self, which: int) -> None:
        if not self.planned:
            self.plan()
        elif self.pending:
            self.work(sorted(self.pending)[which % len(self.pending)])
        elif not self.finished:
            self.finish()

    def plan(self) -> None:
        """Start the retry and resume, in the order of the command and the driver."""
        ledger = self.ledger
        with contextlib.suppress(UserError):  # at the same moment as another
            start_retry(ledger, stages=[], error_types=[], retryable=False, attempt=self.attempt)
        self.retry = ledger.retry()
        self.pending = select_rows(ledger, self.retry, ledger.commits()) if self.retry else {}
        if self.pending:
            ledger.store.delete(["_SUCCESS"])
        self.planned = True

    def work(self, shard: int) -> None:
        again = self.pending[shard]
        writer, errors = write_again(self.store, shard, again, self.attempt)
        with Committer(
            self.ledger, PredictionWriters(writer, []), lambda commit, mine, seconds: None, self.pending
        ) as closing:
            closing.add(shard, OpenShard(pa.array([]), [errors]))
            closing.wait()
        del self.pending[shard]

    def finish(self) -> None:
        ledger = self.ledger
        job = ledger.require_job()
        commits = ledger.verified_commits(job)
        ledger.finish(job, commits, totals_of(job, commits), self.retry.generation if self.retry else 0)
        self.finished = True


faults = st.one_of(
    st.none(),
    st.tuples(st.just("crash"), st.integers(1, 12)),
    st.tuples(st.just("lost answer"), st.integers(1, 8)),
    st.tuples(st.just("race"), st.integers(1, 12)),
)


class RetryMachine(RuleBasedStateMachine):
    """Any number of retries, one after the other and at the same time; the ledger always accounts for every row once."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="retries-"))
        finished(str(self.folder), URIS, SHARD_SIZE)
        self.started = 0
        self.drivers: list[Retrier] = []
        self.commits: dict[str, bytes] = {}

    def start(self) -> Retrier:
        self.started += 1
        self.drivers.append(Retrier(f"r{self.started}", Faulty(str(self.folder), CONFIG, lags="-g")))
        return self.drivers[-1]

    @rule(
        which=st.integers(0, 2),
        shard=st.integers(0, 2),
        fault=faults,
        rivals=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=8),
        stale=stale,
    )
    def a_driver_goes_on(
        self, which: int, shard: int, fault: Any, rivals: list[tuple[int, int]], stale: int | None
    ) -> None:
        while len(self.drivers) < 2:
            self.start()
        driver = self.drivers[which % len(self.drivers)]
        driver.store.stale = stale
        driver.misled |= stale is not None
        others = [d for d in self.drivers if d is not driver]

        def race() -> None:
            for other, number in rivals:
                others[other % len(others)].go_on(number)

        if fault is not None:
            driver.store.arm(fault[1], race if fault[0] == "race" else fault[0])
        try:
            driver.go_on(shard)
        except Crash:
            self.drivers.remove(driver)
        except InfrastructureError:
            # It ends with the words that it should be started again; a later one goes on.
            assert driver.misled
            self.drivers.remove(driver)
        driver.store.arm(0, None)
        self.drivers = [d for d in self.drivers if not d.finished]

    @invariant()
    def every_row_is_there_once(self) -> None:
        found = {f.name: f.read_bytes() for f in (self.folder / "_commits").iterdir()}
        for name, data in self.commits.items():
            assert found.get(name) == data, f"{name} changed"
        self.commits = found
        counting = Ledger(Store(str(self.folder), CONFIG)).commits()
        assert [c.shard for c in counting] == [0, 1, 2]
        for commit in counting:
            self.check(commit)

    def check(self, commit: Commit) -> None:
        seen: list[int] = []
        for file in commit.files:
            content = (self.folder / file.path).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file.sha256
            good = file.path.startswith("predictions/")
            for row in pq.read_table(io.BytesIO(content)).to_pylist():
                seen.append(row["row"])
                uri = URIS[commit.shard * SHARD_SIZE + row["row"]]
                assert (row["shard"], row["uri"]) == (commit.shard, uri)
                assert (not fails(uri) or heals(uri, commit.generation)) is good
                assert good or row["tries"] == commit.generation + 1
        assert sorted(seen) == list(range(commit.rows))

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            driver = self.start()
            while not driver.finished:
                driver.go_on(0)
            self.every_row_is_there_once()
            found = verify(str(self.folder))
            assert (found.problems, found.uncommitted, found.finished) == ((), (), True)
            everything = [
                uri
                for kind in ("predictions", "errors")
                if any((self.folder / kind).glob("*"))
                for uri in pd.read_parquet(self.folder / kind)["uri"]
            ]
            assert sorted(everything) == sorted(URIS)
        finally:
            shutil.rmtree(self.folder)


# In parts, so that no test takes long.
@pytest.mark.parametrize("part", range(3))
def test_retries_that_crash_and_race_leave_every_row_once(part: int) -> None:
    part_of_30 = settings(max_examples=10, stateful_step_count=20, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(RetryMachine, settings=part_of_30)
