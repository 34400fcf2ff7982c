from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import tempfile
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

from batch_inference.driver.collector import OpenShard
from batch_inference.driver.committer import Committer, PredictionWriters
from batch_inference.errors import AccountingError, InfrastructureError, UserError
from batch_inference.output import manifest
from batch_inference.output.job_chain import TakenOverError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, DataFile, JobRecord, fingerprint
from batch_inference.output.verify import verify
from batch_inference.storage.store import Store
from tests.support.faulty_store import Crash, Faulty, stale
from tests.support.outputs import (
    CONFIG,
    commit_shard,
    fails,
    finished,
    job_of,
    planned,
    table_of,
    totals_of,
    value_of,
    write,
)

URIS = [f"s3://b/{i}.jpg" for i in range(4)] + ["s3://b/bad-4.jpg"]


# --- single rules --------------------------------------------------------------------------------------------------------


def test_planned_output_has_its_job_and_its_manifest_and_nothing_else(tmp_path: Path) -> None:
    ledger, job = planned(str(tmp_path), URIS, 2)
    assert {o.path for o in ledger.store.objects()} == {
        "_job.json",
        *(f"_manifest/shard-0000{i}.parquet" for i in range(3)),
    }
    assert ledger.job() == job == ledger.require_job()
    assert (job.shards, job.rows, job.shard_size) == (3, 5, 2)
    assert [job.rows_of(s) for s in range(3)] == [2, 2, 1]
    assert job.fingerprint == fingerprint(job.identity)
    assert set(job.identity) == {"model.name", "manifest.sha256"}


def test_fingerprint_depends_on_every_input_and_nothing_else(tmp_path: Path) -> None:
    def made(name: str, uris: list[str], **columns: Any) -> str:
        ledger = Ledger(Store(str(tmp_path / name), CONFIG))
        table = table_of(uris, **columns)
        return ledger.create_job(table, job_of(table, 2), name).fingerprint

    assert made("a", URIS) == made("b", URIS)
    assert len({made("a", URIS), made("c", URIS[::-1]), made("d", URIS[:-1]), made("e", URIS, id=[1] * 5)}) == 4


def test_first_of_two_plans_holds_and_the_other_leaves_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path), CONFIG)
    table, other = table_of(URIS), table_of(["s3://b/other.jpg"])
    first = Ledger(store).create_job(table, job_of(table, 2), "one")
    second = Ledger(store).create_job(other, job_of(other, 2), "two")
    assert second == first
    assert {o.path for o in store.objects()} == {"_job.json", "_manifest/plan-one.tar"}
    Ledger(store).complete_manifest(second)
    assert manifest.read_shard(store, 0)["uri"].to_pylist() == URIS[:2]


def test_manifest_that_was_cut_off_is_completed_from_the_plan(tmp_path: Path) -> None:
    store = Store(str(tmp_path), CONFIG)
    table = table_of(URIS)
    ledger = Ledger(store)
    job = ledger.create_job(table, job_of(table, 2), "one")
    plan = store.get(job.plan)
    ledger.complete_manifest(job)
    store.delete(["_manifest/shard-00001.parquet"])
    store.put(job.plan, plan)
    ledger.complete_manifest(job)
    assert [manifest.read_shard(store, s).num_rows for s in range(3)] == [2, 2, 1]
    assert store.get_or_none(job.plan) is None


def test_manifest_that_cannot_be_completed_is_named(tmp_path: Path) -> None:
    ledger, job = planned(str(tmp_path), URIS, 2)
    ledger.store.delete(["_manifest/shard-00001.parquet"])
    with pytest.raises(AccountingError, match="1 of 3 manifest shards is missing, the first is shard-00001") as caught:
        ledger.complete_manifest(job)
    assert "backup" in caught.value.remedy


def test_one_commit_wins(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 2)
    won = commit_shard(ledger.store, 0, "one")
    writer, errors = write(ledger.store, 0, "two")
    lost = writer.write(0, errors)
    assert not ledger.commit(lost)
    assert ledger.commits() == [won]
    assert ledger.committed() == {0}


def test_commit_whose_answer_was_lost_is_own(tmp_path: Path) -> None:
    """A retry of the request finds the object of the first one; taken for another driver's, its files would be lost."""
    ledger, _ = planned(str(tmp_path), URIS, 2)
    commit = commit_shard(ledger.store, 0)
    assert ledger.commit(commit)


def test_job_whose_answer_was_lost_keeps_its_plan(tmp_path: Path) -> None:
    store = Faulty(str(tmp_path), CONFIG)
    table = table_of(URIS)
    store.arm(2, "lost answer")
    job = Ledger(store).create_job(table, job_of(table, 2), "one")
    assert store.fired
    Ledger(store).complete_manifest(job)
    assert [manifest.read_shard(store, s).num_rows for s in range(3)] == [2, 2, 1]


# --- another configuration takes an output over ----------------------------------------------------------------------------

OTHER = ["s3://b/other-0.jpg", "s3://b/other-1.jpg", "s3://b/bad-other.jpg"]


def taken_over(ledger: Ledger, before: JobRecord, uris: list[str] = OTHER, attempt: str = "second") -> JobRecord:
    table = table_of(uris)
    job = ledger.create_job(table, job_of(table, 2, {"model.name": "other"}), attempt, replaces=before)
    ledger.complete_manifest(job)
    return job


def test_output_without_commit_is_taken_over_and_earlier_job_leaves_nothing(tmp_path: Path) -> None:
    ledger, before = planned(str(tmp_path), URIS, 2)
    for path in ("_decisions/precision.json", "_schema.json", "_FAILED", "_report/attempts/first.json", "_begun/x"):
        ledger.store.put(path, b"{}")
    ledger.store.put("_report/logs/first.txt", b"why it failed")
    ledger.store.put("predictions/shard-00000-first.parquet", b"no commit names it")
    assert ledger.untouched(before)
    other = Ledger(Store(str(tmp_path), CONFIG))
    job = taken_over(other, before)
    assert (job.replaces, job.rows) == (before.plan, 3)
    assert other.job() == job == Ledger(ledger.store).job()
    assert json.loads((tmp_path / "_job.json").read_bytes())["fingerprint"] == job.fingerprint
    assert {o.path for o in other.store.objects()} == {
        "_job.json", "_jobs/plan-first.json", "_manifest/shard-00000.parquet", "_manifest/shard-00001.parquet",
        "_report/logs/first.txt", "predictions/shard-00000-first.parquet",
    }  # fmt: skip
    assert manifest.read_shard(other.store, 0)["uri"].to_pylist() == OTHER[:2]
    commits = [commit_shard(other.store, shard) for shard in range(2)]
    assert other.verified_commits(job) == commits
    other.finish(job, commits, totals_of(job, commits))
    assert verify(str(tmp_path)).ok


def test_driver_whose_output_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    ledger, before = planned(str(tmp_path), URIS, 2)
    writer, errors = write(ledger.store, 0, "first")
    taken_over(Ledger(Store(str(tmp_path), CONFIG)), before)
    with (
        pytest.raises(TakenOverError, match="another configuration has taken over") as caught,
        Committer(ledger, PredictionWriters(writer, []), lambda *_: None) as closing,
    ):
        closing.add(0, OpenShard(pa.array([]), [errors]))
        closing.wait()
    assert "--output" in caught.value.remedy
    assert list(ledger.store.objects("_commits")) == []
    assert list(ledger.store.objects("predictions")) == []


def test_output_with_a_commit_is_not_taken_over(tmp_path: Path) -> None:
    ledger, before = planned(str(tmp_path), URIS, 2)
    commit_shard(ledger.store, 1)
    assert not ledger.untouched(before)
    # A driver that had looked before that commit comes too late as well.
    assert taken_over(Ledger(Store(str(tmp_path), CONFIG)), before) == before
    assert manifest.read_shard(ledger.store, 0)["uri"].to_pylist() == URIS[:2]
    assert not list(ledger.store.objects("_manifest/plan-second.tar"))


def test_one_of_two_takeovers_wins(tmp_path: Path) -> None:
    ledger, before = planned(str(tmp_path), URIS, 2)
    first = taken_over(Ledger(ledger.store), before)
    assert taken_over(Ledger(Store(str(tmp_path), CONFIG)), before, URIS[:1], "third") == first
    # A job that took over is taken over itself, and an old `_job.json` that a slow driver writes changes nothing.
    last = taken_over(Ledger(Store(str(tmp_path), CONFIG)), first, URIS[:1], "fourth")
    ledger.store.put("_job.json", json.dumps(first.to_json()).encode())
    assert ledger.job() == last


def test_job_that_took_over_checks_its_manifest_at_the_end(tmp_path: Path) -> None:
    ledger, before = planned(str(tmp_path), URIS, 2)
    late = ledger.store.get("_manifest/shard-00000.parquet")
    other = Ledger(Store(str(tmp_path), CONFIG))
    job = taken_over(other, before)
    for shard in range(2):
        commit_shard(other.store, shard)
    other.store.put("_manifest/shard-00000.parquet", late)
    with pytest.raises(AccountingError, match="not those that the job was planned with"):
        other.verified_commits(job)


def test_commit_survives_encoding_and_decoding() -> None:
    files = (DataFile("predictions/x.parquet", 3, 100, "0" * 64),)
    commit = Commit(7, 4, 3, 1, files, "a", {"decode": {"TRUNCATED": 1}}, "2024-01-01T00:00:00.000+00:00")
    assert Commit.from_json(commit.to_json()) == commit


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"{}",
        lambda raw: raw | {"predictions": raw["predictions"] + 1},
        lambda raw: raw | {"shard": 1},
        lambda raw: raw | {"rows": raw["rows"] - 1},
        lambda raw: raw | {"files": []},
        lambda raw: raw | {"files": "x"},
        lambda raw: raw | {"unknown": 1},
        lambda raw: {k: v for k, v in raw.items() if k != "attempt"},
    ],
)
def test_commit_that_contradicts_itself_is_refused(damage: Any, tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 2)
    commit_shard(ledger.store, 0)
    file = tmp_path / "_commits/shard-00000.json"
    file.write_bytes(
        damage if isinstance(damage, bytes) else json.dumps(damage(json.loads(file.read_bytes()))).encode()
    )
    with pytest.raises(AccountingError, match=r"_commits/shard-00000\.json is not a valid commit") as caught:
        ledger.commits()
    assert "Delete _commits/shard-00000.json and run the same command again" in caught.value.remedy


def test_other_files_among_the_commits_do_not_count(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 2)
    commit_shard(ledger.store, 1)
    for name in ("shard-00000 (copy).json", "note.json", "shard-00002.json.bak", "shard-00002.json#1", ".DS_Store"):
        (tmp_path / "_commits" / name).write_bytes(b"{}")
    assert ledger.committed() == {1}
    assert [c.shard for c in ledger.commits()] == [1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 2}', b'{"format": 1}', b"\xff"])
def test_job_of_another_program_is_refused(content: bytes, tmp_path: Path) -> None:
    store = Store(str(tmp_path), CONFIG)
    store.put("_job.json", content)
    with pytest.raises(UserError, match=r"_job\.json is not a job of this program") as caught:
        Ledger(store).job()
    assert caught.value.remedy


def test_output_without_a_job(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path), CONFIG))
    assert ledger.job() is None
    with pytest.raises(UserError, match="there is no job in"):
        ledger.require_job()


def test_job_with_missing_parts_is_incomplete(tmp_path: Path) -> None:
    ledger, job = planned(str(tmp_path), URIS, 2)
    commits = [commit_shard(ledger.store, s) for s in (0, 2)]
    with pytest.raises(AccountingError, match="1 of 3 shards has no commit, the first is shard-00001"):
        ledger.check_complete(job, commits)
    commits.append(commit_shard(ledger.store, 1))
    ledger.check_complete(job, commits)
    with pytest.raises(AccountingError, match="shard-00002 has 2 rows committed, 1 in the manifest"):
        ledger.check_complete(job, [*commits[:1], dataclasses.replace(commits[1], rows=2), commits[2]])
    path = commits[0].files[0].path
    data = ledger.store.get(path)
    ledger.store.put(path, data[:-1])
    with pytest.raises(AccountingError, match=f"{path} has {len(data) - 1} bytes, its commit says {len(data)}"):
        ledger.check_complete(job, commits)
    ledger.store.delete([path])
    with pytest.raises(AccountingError, match=f"{path} is committed but missing") as caught:
        ledger.check_complete(job, commits)
    assert "run the same command again" in caught.value.remedy


def test_finish_deletes_files_that_no_commit_names(tmp_path: Path) -> None:
    ledger, job = planned(str(tmp_path), URIS, 2)
    commits = [commit_shard(ledger.store, s) for s in range(3)]
    for path in ("predictions/shard-00000-dead.parquet", "errors/shard-00002-dead.parquet", "_manifest/plan-dead.tar"):
        ledger.store.put(path, b"x")
    ledger.store.put("_FAILED", b"{}")
    assert ledger.success_record() is None
    assert ledger.finish(job, commits, totals_of(job, commits)) == 3
    named = {f.path for c in commits for f in c.files}
    assert {o.path for k in ("predictions", "errors") for o in ledger.store.objects(k)} == named
    assert ledger.store.get_or_none("_FAILED") is None
    found = ledger.success_record()
    assert found is not None
    assert (found["rows"], found["predictions"], found["errors"], found["fingerprint"]) == (5, 4, 1, job.fingerprint)
    assert ledger.finish(job, commits, {}) == 0
    assert ledger.success_record() == found


def test_finish_deletes_temporary_files_of_killed_processes(tmp_path: Path) -> None:
    """The driver was killed between a temporary file and the link that makes it a commit; the next driver committed the shard."""
    ledger, job = planned(str(tmp_path), URIS, 2)
    commits = [commit_shard(ledger.store, s) for s in range(3)]
    names = (
        "_commits/shard-00001.json#1", "_schema.json#12", "_job.json#1",
        "_manifest/shard-00002.parquet#1", "_jobs/plan-first.json#1",
    )  # fmt: skip
    ledger.begin_committing()
    left = [tmp_path / name for name in names]
    kept = [tmp_path / name for name in ("_commits/shard-00007.json#1", "_commits/shard-00001.json#x")]
    for file in (*left, *kept):
        file.write_bytes(b"{}")
    ledger.finish(job, commits, totals_of(job, commits))
    assert [file.exists() for file in (*left, *kept)] == [False] * 5 + [True] * 2


def test_create_whose_temporary_file_was_deleted_has_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path), CONFIG)
    assert store.create("a", b"1")

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Unable to rename file: No such file or directory")

    monkeypatch.setattr("batch_inference.storage.store.obstore.put", gone)
    assert not store.create("a", b"2")
    with pytest.raises(InfrastructureError):
        store.create("b", b"2")


@pytest.mark.parametrize("content", [b"", b"{", b"7", b"\xff"])
def test_garbled_success_is_named(content: bytes, tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, 2)
    ledger.store.put("_SUCCESS", content)
    with pytest.raises(AccountingError, match="_SUCCESS is not readable"):
        ledger.success_record()


def test_files_have_the_columns_of_the_contract(tmp_path: Path) -> None:
    store = Store(str(tmp_path), CONFIG)
    table = table_of(URIS, id=[f"{i:03d}" for i in range(5)])
    ledger = Ledger(store)
    ledger.complete_manifest(ledger.create_job(table, job_of(table, 5), "one"))
    commit = commit_shard(store, 0)
    files = {f.path.partition("/")[0]: f for f in commit.files}
    good = pq.read_table(io.BytesIO(store.get(files["predictions"].path)))
    assert good.schema.names == ["uri", "shard", "row", "value", "id"]
    assert good["id"].to_pylist() == ["000", "001", "002", "003"]
    assert good["value"].to_pylist() == [value_of(u) for u in URIS[:4]]
    bad = pq.read_table(io.BytesIO(store.get(files["errors"].path)))
    assert bad.to_pylist() == [
        {"uri": URIS[4], "shard": 0, "row": 4, "stage": "decode", "error_type": "TRUNCATED", "message": "cut off"}
        | {"retryable": False, "tries": 1, "traceback": None, "id": "004"}
    ]
    assert commit.errors_by == {"decode": {"TRUNCATED": 1}}
    for file in commit.files:
        data = store.get(file.path)
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_writer_refuses_missing_and_duplicate_rows(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 5)
    for rows in ([0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 3, 5], []):
        writer, errors = write(ledger.store, 0, "one")
        writer._open.clear()
        count = len(rows)
        part = {"shard": pa.array([0] * count, pa.int32()), "row": pa.array(rows, pa.int32()), "value": [1] * count}
        if rows:
            writer.add(0, pa.table(part))
        with pytest.raises(AccountingError, match="shard-00000 has 5 inputs to do, but"):
            writer.write(0, errors)
    assert list(ledger.store.objects("predictions")) == []


def test_writer_takes_rows_in_any_order_and_once(tmp_path: Path) -> None:
    """Ray may rebuild a block, so that its rows are sent to a writer again."""
    ledger, _ = planned(str(tmp_path), URIS, 5)
    writer, errors = write(ledger.store, 0, "one")
    whole = writer._open.pop(0)[0]
    for rows in ([3, 1], [1, 3], [2], [0, 1]):
        writer.add(0, whole.take(pa.array(rows)))
    commit = writer.write(0, errors)
    table = pq.read_table(io.BytesIO(ledger.store.get(commit.files[0].path)))
    assert table["row"].to_pylist() == [0, 1, 2, 3]
    assert table["value"].to_pylist() == [value_of(u) for u in URIS[:4]]


def test_writer_names_a_column_that_the_manifest_has(tmp_path: Path) -> None:
    store = Store(str(tmp_path), CONFIG)
    table = table_of(URIS[:1], value=["x"])
    ledger = Ledger(store)
    ledger.complete_manifest(ledger.create_job(table, job_of(table, 5), "one"))
    writer, errors = write(store, 0, "one")
    with pytest.raises(UserError, match="column 'value' and the manifest's have the same name"):
        writer.write(0, errors)


def test_output_names_contain_nothing_from_inputs(tmp_path: Path) -> None:
    hostile = [
        "s3://b/../../../../etc/cron.d/x.jpg", "file:///etc/passwd", "../../out.jpg", "s3://b/a\nb\x1b[2J.jpg", "s3://b/" + "x" * 5000,
        "s3://b/_SUCCESS", "s3://b/predictions/shard-00000-first.parquet", "/absolute/bad.jpg", "C:\\x.jpg", "s3://b/%2e%2e%2fx", "",
    ]  # fmt: skip
    folder = tmp_path / "above/out"
    finished(str(folder), hostile, 2)
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if not file.is_dir()}
    name = re.compile(
        r"above/out/(_job\.json|_schema\.json|_SUCCESS|_jobs/plan-first\.json|_commits/shard-\d{5}\.json|_manifest/shard-\d{5}\.parquet|(predictions|errors)/shard-\d{5}-first\.parquet)"
    )
    assert [path for path in found if not name.fullmatch(path)] == []
    rows = [uri for file in folder.glob("[pe]r*/*") for uri in pq.read_table(file)["uri"].to_pylist()]
    assert sorted(rows) == sorted(hostile)


@dataclass
class Driver:
    """One attempt: its store may fail; the code that uses it is the program's own."""

    attempt: str
    uris: list[str]
    store: Faulty
    job: JobRecord | None = None
    pending: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store)

    def go_on(self, which: int) -> None:
        """Take the attempt's next step: plan, then shard by shard in any order, then finish."""
        if self.job is None:
            self.plan()
        elif self.pending:
            self.work(self.pending[which % len(self.pending)])
        elif not self.finished:
            self.finish()

    def plan(self) -> None:
        """Plan and resume, in the driver's order."""
        ledger = self.ledger
        job = ledger.job()
        if job is None:
            table = table_of(self.uris)
            job = ledger.create_job(table, job_of(table, SHARD_SIZE), self.attempt)
        ledger.complete_manifest(job)
        self.pending = sorted(set(range(job.shards)) - {c.shard for c in ledger.commits()})
        self.job = job

    def work(self, shard: int) -> None:
        """Process a shard that has no commit as far as this driver knows."""
        writer, errors = write(self.store, shard, self.attempt)

        def on_commit(commit: Commit, mine: bool, seconds: float) -> None:
            self.pending.remove(shard)
            if not mine:
                self.lost.append(shard)

        with Committer(self.ledger, PredictionWriters(writer, []), on_commit) as closing:
            closing.add(shard, OpenShard(pa.array([]), [errors]))
            closing.wait()

    def finish(self) -> None:
        assert self.job is not None
        commits = self.ledger.commits()
        self.ledger.check_complete(self.job, commits)
        self.ledger.finish(self.job, commits, totals_of(self.job, commits))
        self.finished = True


SHARD_SIZE = 2
# Folders as drivers may find them at different moments. Shards: good and bad, good, bad, ...
LISTINGS = {
    "early": ["s3://b/0.jpg", "s3://b/bad-1.jpg", "s3://b/2.jpg", "s3://b/3.jpg", "s3://b/bad-4.jpg"],
    "late": ["s3://b/0.jpg", "s3://b/2.jpg", "s3://b/3.jpg", "s3://b/new.jpg"],
}
faults = st.one_of(
    st.none(),
    st.tuples(st.just("crash"), st.integers(1, 9)),
    st.tuples(st.just("crash"), st.integers(1, 14)),
    st.tuples(st.just("lost answer"), st.integers(1, 6)),
    st.tuples(st.just("race"), st.integers(1, 6)),
    st.tuples(st.just("race"), st.integers(1, 12)),
)
# Who does how many steps in the middle of another's, and which shards.
rivals = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=10)


class LedgerMachine(RuleBasedStateMachine):
    """Any number of drivers on one output, which crash and race at any operation of the store, with stale listings.

    The model is what was seen first: the first job is the job, the first commit of a shard is its commit.
    """

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-"))
        self.plain = Store(str(self.folder), CONFIG)
        self.drivers: list[Driver] = []
        self.started = 0
        self.start("early")
        self.start("late")
        self.crashed: set[str] = set()
        self.job: bytes | None = None
        self.uris: list[str] = []
        self.commits: dict[int, bytes] = {}
        self.success: bytes | None = None

    # --- rules ---

    def start(self, listing: str) -> Driver:
        self.started += 1
        driver = Driver(f"{listing}{self.started}", LISTINGS[listing], Faulty(str(self.folder), CONFIG))
        self.drivers.append(driver)
        return driver

    @rule(listing=st.sampled_from(sorted(LISTINGS)))
    def another_driver_starts(self, listing: str) -> None:
        if len(self.drivers) < 4:
            self.start(listing)

    @rule(which=st.integers(0, 3), shard=st.integers(0, 3), fault=faults, rivals=rivals, stale=stale)
    def a_driver_goes_on(
        self, which: int, shard: int, fault: Any, rivals: list[tuple[int, int]], stale: int | None
    ) -> None:
        driver = self.drivers[which % len(self.drivers)] if self.drivers else self.start("early")
        driver.store.stale = stale
        others = [d for d in self.drivers if d is not driver]

        def race() -> None:
            for other, number in rivals:
                if (rival := others[other % len(others)]) in self.drivers:
                    self.goes_on(rival, number)

        if fault is not None:
            driver.store.arm(fault[1], (race if others else None) if fault[0] == "race" else fault[0])
        try:
            self.goes_on(driver, shard)
        except Crash:
            self.crashed.add(driver.attempt)
            self.drivers.remove(driver)
        driver.store.arm(0, None)
        self.drivers = [d for d in self.drivers if not d.finished]

    def goes_on(self, driver: Driver, shard: int) -> None:
        driver.go_on(shard)

    # --- what must hold at every moment ---

    def files(self, kind: str) -> dict[str, bytes]:
        folder = self.folder / kind
        return {f"{kind}/{f.name}": f.read_bytes() for f in folder.iterdir()} if folder.is_dir() else {}

    def rows_of(self, shard: int) -> list[str]:
        return self.uris[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]

    @invariant()
    def everything_is_right(self) -> None:
        self.one_job_holds()
        self.commits_stay_and_their_rows_are_right()
        self.who_lost_a_race_changed_nothing()
        self.success_is_true_and_final()

    def one_job_holds(self) -> None:
        file = self.folder / "_job.json"
        if self.job is None and file.exists():
            self.job = file.read_bytes()
            attempt = json.loads(self.job)["plan"].partition("plan-")[2].partition(".")[0]
            self.uris = LISTINGS[attempt.rstrip("0123456789")]
        assert (file.read_bytes() if file.exists() else None) == self.job
        for driver in self.drivers:
            assert driver.job is None or driver.job.plan == json.loads(self.job or b"")["plan"]

    def commits_stay_and_their_rows_are_right(self) -> None:
        found = {int(p.partition("shard-")[2][:5]): data for p, data in self.files("_commits").items()}
        for shard, data in self.commits.items():
            assert found.get(shard) == data, f"the commit of shard {shard} changed"
        self.commits = found
        for shard, data in found.items():
            commit = Commit.from_json(data)
            uris = self.rows_of(shard)
            rows: list[int] = []
            for file in commit.files:
                content = (self.folder / file.path).read_bytes()
                assert hashlib.sha256(content).hexdigest() == file.sha256
                for row in pq.read_table(io.BytesIO(content)).to_pylist():
                    rows.append(row["row"])
                    assert (row["shard"], row["uri"]) == (shard, uris[row["row"]])
                    good = file.path.startswith("predictions/")
                    assert fails(row["uri"]) is not good
                    assert not good or row["value"] == value_of(row["uri"])
            assert sorted(rows) == list(range(len(uris)))
            assert commit.rows == len(rows)

    def who_lost_a_race_changed_nothing(self) -> None:
        left = {*self.files("predictions"), *self.files("errors")}
        named = {f["path"] for data in self.commits.values() for f in json.loads(data)["files"]}
        for path in left - named:
            # Only the dead leave anything: the loser deletes its files.
            assert path.rpartition("-")[2].removesuffix(".parquet") in self.crashed

    def success_is_true_and_final(self) -> None:
        file = self.folder / "_SUCCESS"
        if not file.exists():
            assert self.success is None
            return
        self.success = self.success or file.read_bytes()
        assert file.read_bytes() == self.success
        assert len(self.commits) == -(-len(self.uris) // SHARD_SIZE)
        record = json.loads(self.success)
        bad = sum(map(fails, self.uris))
        assert (record["rows"], record["predictions"], record["errors"]) == (len(self.uris), len(self.uris) - bad, bad)
        found = verify(str(self.folder))
        stray = [p for p in found.problems if not p.endswith("is not committed, but stands among the finished output")]
        assert stray == []
        assert (found.predictions, found.errors) == (len(self.uris) - bad, bad)

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            self.the_next_attempt_brings_it_to_its_end()
        finally:
            shutil.rmtree(self.folder)

    def the_next_attempt_brings_it_to_its_end(self) -> None:
        """Run the same command again, undisturbed; every row must be there once."""
        before = dict(self.commits)
        driver = self.start("late")
        driver.plan()
        self.end_of(driver, before)

    def end_of(self, driver: Driver, before: dict[int, bytes]) -> None:
        assert set(driver.pending).isdisjoint(before)
        while not driver.finished:
            driver.go_on(0)
        assert driver.lost == []
        self.everything_is_right()
        assert self.success is not None
        found = verify(str(self.folder))
        assert (found.problems, found.uncommitted) == ((), ())
        everything: list[str] = []
        for kind in ("predictions", "errors"):
            if (self.folder / kind).is_dir() and self.files(kind):
                everything += pd.read_parquet(self.folder / kind)["uri"].tolist()
        assert sorted(everything) == sorted(self.uris)
        assert {p.rpartition(".")[2] for p in self.files("_manifest")} == {"parquet"}


# In parts, so that no test takes long.
PART = settings(max_examples=20, stateful_step_count=20, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("part", range(5))
def test_drivers_that_crash_and_race_leave_one_job(part: int) -> None:
    run_state_machine_as_test(LedgerMachine, settings=PART)


class Another(Driver):
    """A driver with its own configuration, which takes over the output if another configuration has committed nothing."""

    def plan(self) -> None:
        ledger, job, before = self.ledger, self.ledger.job(), None
        if job is not None and job.identity["model.name"] != self.identity["model.name"]:
            if not ledger.untouched(job):
                raise UserError("belongs to another job")
            before, job = job, None
        if job is None:
            table = table_of(self.uris)
            job = ledger.create_job(table, job_of(table, SHARD_SIZE, self.identity), self.attempt, before)
            if job.identity["model.name"] != self.identity["model.name"]:
                raise UserError("belongs to another job")
        ledger.complete_manifest(job)
        self.pending = sorted(set(range(job.shards)) - {c.shard for c in ledger.commits()})
        self.job = job

    @property
    def identity(self) -> dict[str, str]:
        return {"model.name": self.attempt.rstrip("0123456789")}


CONFIGURATIONS = {
    "one": ["s3://b/0.jpg", "s3://b/bad-1.jpg", "s3://b/2.jpg", "s3://b/3.jpg", "s3://b/bad-4.jpg"],
    "two": ["s3://b/two-0.jpg", "s3://b/two-1.jpg", "s3://b/bad-two.jpg"],
    "three": ["s3://b/three-0.jpg", "s3://b/0.jpg", "s3://b/bad-1.jpg", "s3://b/2.jpg", "s3://b/x.jpg", "s3://b/y.jpg"],
}


class TakeoverMachine(LedgerMachine):
    """Drivers of three configurations on one output, which crash and race as those of one configuration do.

    The model: which configuration's job it is may change until the first commit, and never afterwards.
    """

    def start(self, listing: str) -> Driver:
        listing = {"early": "one", "late": "two"}.get(listing, listing)
        self.started += 1
        driver = Another(f"{listing}{self.started}", CONFIGURATIONS[listing], Faulty(str(self.folder), CONFIG))
        self.drivers.append(driver)
        return driver

    @rule(listing=st.sampled_from(sorted(CONFIGURATIONS)))
    def another_driver_starts(self, listing: str) -> None:
        if len(self.drivers) < 4:
            self.start(listing)

    def goes_on(self, driver: Driver, shard: int) -> None:
        try:
            driver.go_on(shard)
        except Crash:
            raise
        except Exception as exc:
            # Refused, or taken over. As the program does, one that fails of anything else looks whether it is that.
            if not isinstance(exc, UserError):
                assert driver.job is not None, "a driver failed that had no job"
                with pytest.raises(TakenOverError):
                    Ledger(self.plain).check_not_taken_over(driver.job)
            if driver in self.drivers:
                self.drivers.remove(driver)

    def one_job_holds(self) -> None:
        job = Ledger(self.plain).job()
        if job is None:
            assert self.job is None
            return
        holds = json.dumps(job.to_json()).encode()
        if holds != self.job:
            assert self.commits == {}, "the job changed after a commit"
            self.job = holds
            self.uris = CONFIGURATIONS[job.plan.partition("plan-")[2].partition(".")[0].rstrip("0123456789")]

    def the_next_attempt_brings_it_to_its_end(self) -> None:
        """Run the command of the configuration that holds."""
        before = dict(self.commits)
        job = Ledger(self.plain).job()
        driver = self.start("one" if job is None else job.identity["model.name"])
        driver.plan()
        self.end_of(driver, before)


@pytest.mark.parametrize("part", range(3))
def test_drivers_of_two_configurations_leave_the_job_of_one(part: int) -> None:
    run_state_machine_as_test(TakeoverMachine, settings=PART)
