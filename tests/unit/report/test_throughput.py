"""The throughput of a job, from its commits and the records of its attempts."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_inference.output import attempts as output_attempts
from batch_inference.output.attempts import AttemptRecord, read_attempts, work_starts
from batch_inference.report.throughput import measure_throughput, rows_over_time
from tests.support import outputs

BEGUN = datetime(2026, 11, 3, 12, tzinfo=timezone.utc)
ONE = AttemptRecord(
    "a", "succeeded", "2026-11-03T12:00:00.000+00:00", "2026-11-03T12:00:30.000+00:00", "2026-11-03T13:00:00.000+00:00",
    3600.0, 3500.0, 1000, 10, 0, {"fetch": 1.0, "decode": 2.0, "infer": 1800.0, "driver": 1.0}, {}, 2, 2.0, 2.0,
)  # fmt: skip


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 1000)), min_size=1, max_size=60),
    st.lists(st.integers(0, 100_000), max_size=3),
)
def test_every_row_is_in_one_bin_and_no_rate_is_negative(done: list[tuple[int, int]], starts: list[int]) -> None:
    throughput = measure_throughput(
        sorted((float(time), rows) for time, rows in done), [float(start) for start in starts]
    )
    if throughput is None:
        return
    assert sum(throughput.rates) * throughput.bin_s == pytest.approx(sum(rows for _, rows in done))
    assert min(throughput.rates) >= -1e-9
    assert len(throughput.rates) <= 48
    assert len(throughput.rates) * throughput.bin_s == pytest.approx(throughput.work_s)
    assert all(-1e-6 <= at <= throughput.work_s + 1e-6 for at in throughput.pauses)


def test_steady_job_has_equal_rates_in_all_bins() -> None:
    throughput = measure_throughput([(10.0 * i, 500) for i in range(1, 101)], [0.0])
    assert throughput is not None
    assert throughput.rates == pytest.approx([50.0] * 48)
    assert throughput.pauses == []


def test_pause_between_two_attempts_takes_no_time() -> None:
    first = [(60.0 + i, 100) for i in range(20)]
    second = [(40_060.0 + i, 100) for i in range(20)]
    throughput = measure_throughput(first + second, [59.0, 40_059.0])
    assert throughput is not None
    assert throughput.work_s == pytest.approx(40.0)
    assert throughput.pauses == [pytest.approx(20.0)]
    assert throughput.rates == pytest.approx([100.0] * len(throughput.rates))


def test_short_job_has_no_throughput() -> None:
    assert measure_throughput([]) is None
    assert measure_throughput([(5.0, 10)]) is None
    assert measure_throughput([(5.0, 10), (6.0, 10)], [4.5]) is None


def test_rows_that_a_retry_recovered_count_at_its_time(tmp_path: Path) -> None:
    uris = [f"s3://b/{'bad-' if i % 5 == 0 else ''}{i}.jpg" for i in range(40)]
    ledger, _ = outputs.finished(str(tmp_path), uris, 10)
    commits = ledger.commits()
    later = (BEGUN + timedelta(days=1)).isoformat(timespec="milliseconds")
    retry_commit = replace(commits[2], generation=1, predictions=9, errors=1, committed_at=later)
    # As a retry does: a file more of predictions, one of the row that failed again.
    assert retry_commit.rows == retry_commit.predictions + retry_commit.errors
    done = rows_over_time(ledger, [commits[0], commits[1], retry_commit, commits[3]])
    assert sorted(rows for _, rows in done) == [1, 10, 10, 10, 10]
    assert ((BEGUN + timedelta(days=1)).timestamp(), 1) in done


def test_records_of_attempts_are_read_back_in_order_and_broken_ones_left_out(tmp_path: Path) -> None:
    ledger, _ = outputs.planned(str(tmp_path), ["s3://b/a.jpg"], 10)
    store = ledger.store
    second = replace(ONE, attempt="b", started_at="2026-11-04T12:00:00.000+00:00")
    for record in (second, ONE):
        record.write(store)
    for name, data in (("x", b"{"), ("y", b"[]"), ("z", b'{"attempt": "z"}')):
        store.put(f"{output_attempts.ATTEMPTS_FOLDER}/{name}.json", data)
    replace(ONE, attempt="w", started_at="yesterday").write(store)
    assert read_attempts(store) == [ONE, second]
    assert work_starts([ONE]) == [(BEGUN + timedelta(seconds=30)).timestamp()]
    assert work_starts([replace(ONE, working_from="")]) == []


def test_gpu_hours_are_duration_times_gpus() -> None:
    assert (ONE.gpu_hours, ONE.busy_gpu_hours) == (2.0, 0.5)
    assert replace(ONE, gpus=0.0).gpu_hours == 0
    assert replace(ONE, actors=0).busy_gpu_hours == 0
