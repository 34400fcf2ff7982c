from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from batch_inference.driver.progress import Progress
from batch_inference.errors import AccountingError, UserError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit
from batch_inference.output.status import status
from batch_inference.output.tally import Tally
from tests.support.outputs import commit_shard, finished, planned, write

URIS = [f"s3://b/{'bad-' if i % 4 == 3 else ''}{i}.jpg" for i in range(20)]


# One moment for all commits: however slow a test is, they lie as far apart as it says.
NOW = datetime.now(timezone.utc)


def commit_at(ledger: Ledger, shard: int, seconds_ago: float, attempt: str = "first") -> None:
    writer, errors = write(ledger.store, shard, attempt)
    moment = NOW - timedelta(seconds=seconds_ago)
    commit: Commit = replace(writer.write(shard, errors), committed_at=moment.isoformat(timespec="milliseconds"))
    assert ledger.commit(commit)


def test_planned_job(tmp_path: Path) -> None:
    _, job = planned(str(tmp_path), URIS, 4)
    found = status(str(tmp_path))
    assert found.to_dict() == {
        "state": "planned",
        "fingerprint": job.fingerprint,
        "rows": 20,
        "predictions": 0,
        "errors": 0,
        "errors_by": {},
        "shards": 5,
        "shards_done": 0,
        "attempts": {},
        "images_per_s": None,
        "eta_s": None,
        "last_commit_age_s": None,
        "verdict": "",
        "balance": "",
    }


def test_unfinished_job_has_rate_and_eta(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 4)
    commit_at(ledger, 0, 30)
    first = status(str(tmp_path))
    assert (first.state, first.shards_done, first.images_per_s, first.eta_s) == ("unfinished", 1, None, None)
    commit_at(ledger, 2, 20)
    commit_at(ledger, 1, 10)
    found = status(str(tmp_path))
    assert (found.predictions, found.errors, found.shards_done) == (9, 3, 3)
    assert found.errors_by == {"decode": {"TRUNCATED": 3}}
    # The first commit only starts the clock: two shards of four in twenty seconds.
    assert found.images_per_s == pytest.approx(0.4, rel=0.01)
    assert found.eta_s == pytest.approx(20, rel=0.01)
    assert found.last_commit_age_s is not None and found.last_commit_age_s >= 10
    assert found.attempts == {"first": 3}


def test_pauses_between_attempts_and_long_ago_do_not_count(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 4)
    commit_at(ledger, 0, 500, "first")
    commit_at(ledger, 1, 5000, "second")
    commit_at(ledger, 2, 20, "second")
    assert status(str(tmp_path)).images_per_s is None
    commit_at(ledger, 3, 10, "second")
    found = status(str(tmp_path))
    assert found.attempts == {"first": 1, "second": 3}
    assert found.images_per_s == pytest.approx(0.4, rel=0.01)


def test_moment_is_too_short_for_a_rate(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 4)
    commit_at(ledger, 0, 10.5)
    commit_at(ledger, 1, 10)
    assert status(str(tmp_path)).images_per_s is None


def test_finished_job(tmp_path: Path) -> None:
    finished(str(tmp_path), URIS, 4)
    found = status(str(tmp_path))
    assert (found.state, found.predictions, found.errors, found.eta_s) == ("succeeded", 15, 5, None)
    assert json.loads(json.dumps(found.to_dict()))["shards_done"] == 5


def test_failed_job_has_its_verdict(tmp_path: Path) -> None:
    ledger, job = planned(str(tmp_path), URIS, 4)
    commit_shard(ledger.store, 0)
    ledger.store.put("_FAILED", json.dumps({"fingerprint": job.fingerprint, "verdict": "too many errors"}).encode())
    found = status(str(tmp_path))
    assert (found.state, found.verdict) == ("failed", "too many errors")


def test_success_wins_over_an_older_failure(tmp_path: Path) -> None:
    ledger, _ = finished(str(tmp_path), URIS, 4)
    ledger.store.put("_FAILED", b'{"verdict": "of another driver"}')
    found = status(str(tmp_path))
    assert found.state == "succeeded"
    assert "of another driver" not in found.verdict


def test_missing_or_damaged_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        status(str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no job in"):
        status(str(tmp_path))
    planned(str(tmp_path), URIS, 4)
    (tmp_path / "_commits").mkdir()
    (tmp_path / "_commits/shard-00000.json").write_text("{}")
    with pytest.raises(AccountingError):
        status(str(tmp_path))


# --- the progress of a run -----------------------------------------------------------------------------------------------


def test_progress_has_no_rate_before_any_row() -> None:
    early = Progress(rows_total=100, tally=Tally(rows=10, seen=10), first_rows=10, working_s=5)
    assert (early.images_per_s, early.eta_s) == (None, None)
    assert Progress(rows_total=100, tally=Tally(rows=20, seen=20), first_rows=10, working_s=0.9).images_per_s is None


def test_progress_counts_rates_of_this_attempt_and_rows_of_all() -> None:
    tally = Tally(rows=150, seen=60)
    tally.add_errors({"fetch": {"NOT_FOUND": 5}})
    progress = Progress("run", 200, 20, 14, 9, tally, elapsed_s=12.345, first_rows=10, working_s=10)
    assert progress.images_per_s == 5
    assert progress.eta_s == 10
    found = progress.to_dict()
    assert found.pop("updated_at")
    assert found == {
        "phase": "run",
        "rows": {"total": 200, "done": 150, "predictions": 145, "errors": 5},
        "errors_by": {"fetch": {"NOT_FOUND": 5}},
        "shards": {"total": 20, "done": 14, "resumed": 9},
        "images_per_s": 5,
        "eta_s": 10,
        "elapsed_s": 12.3,
    }


@pytest.mark.parametrize(
    ("summary", "sentence"),
    [
        (b'{"balance": {"limit": "decode", "sentence": "Decode-bound."}}', "Decode-bound."),
        (b'{"balance": null}', ""),
        (b"{}", ""),
        (b"[1]", ""),
        (b"torn", ""),
        (None, ""),
    ],
)
def test_finished_job_names_its_bottleneck(summary: bytes | None, sentence: str, tmp_path: Path) -> None:
    ledger, job = planned(str(tmp_path), URIS, 4)
    for shard in range(job.shards):
        commit_at(ledger, shard, 10)
    ledger.finish(job, [], {})
    if summary is not None:
        ledger.store.put("_report/summary.json", summary)
    found = status(str(tmp_path))
    assert (found.state, found.balance) == ("succeeded", sentence)
