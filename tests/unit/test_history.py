"""A job over time, from its commits and the records of its attempts."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_inference import history
from batch_inference.history import Spent, attempts, done_at, pace, starts_of
from tests.unit import outputs

BEGUN = datetime(2026, 11, 3, 12, tzinfo=timezone.utc)
ONE = Spent(
    "a", "succeeded", "2026-11-03T12:00:00.000+00:00", "2026-11-03T12:00:30.000+00:00", "2026-11-03T13:00:00.000+00:00",
    3600.0, 3500.0, 1000, 10, 0, {"fetch": 1.0, "decode": 2.0, "infer": 1800.0, "driver": 1.0}, {}, 2, 2.0, 2.0,
)  # fmt: skip


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 1000)), min_size=1, max_size=60),
    st.lists(st.integers(0, 100_000), max_size=3),
)
def test_every_row_is_in_one_bin_and_no_rate_is_negative(done: list[tuple[int, int]], starts: list[int]) -> None:
    found = pace(sorted((float(time), rows) for time, rows in done), [float(start) for start in starts])
    if found is None:
        return
    assert sum(found.rates) * found.bin_s == pytest.approx(sum(rows for _, rows in done))
    assert min(found.rates) >= -1e-9
    assert len(found.rates) <= 48
    assert len(found.rates) * found.bin_s == pytest.approx(found.total_s)
    assert all(-1e-6 <= at <= found.total_s + 1e-6 for at in found.pauses)


def test_a_steady_job_is_flat_however_its_commits_fall_into_bins() -> None:
    found = pace([(10.0 * i, 500) for i in range(1, 101)], [0.0])
    assert found is not None
    assert found.rates == pytest.approx([50.0] * 48)
    assert found.pauses == []


def test_the_night_between_two_attempts_takes_no_time() -> None:
    first = [(60.0 + i, 100) for i in range(20)]
    second = [(40_060.0 + i, 100) for i in range(20)]
    found = pace(first + second, [59.0, 40_059.0])
    assert found is not None
    assert found.total_s == pytest.approx(40.0)
    assert found.pauses == [pytest.approx(20.0)]
    assert found.rates == pytest.approx([100.0] * len(found.rates))


def test_what_was_too_short_has_no_pace() -> None:
    assert pace([]) is None
    assert pace([(5.0, 10)]) is None
    assert pace([(5.0, 10), (6.0, 10)], [4.5]) is None


def test_rows_that_a_retry_recovered_count_when_it_did(tmp_path: Path) -> None:
    uris = [f"s3://b/{'bad-' if i % 5 == 0 else ''}{i}.jpg" for i in range(40)]
    ledger, _ = outputs.finished(str(tmp_path), uris, 10)
    commits = ledger.commits()
    later = (BEGUN + timedelta(days=1)).isoformat(timespec="milliseconds")
    again = replace(commits[2], generation=1, predictions=9, errors=1, committed_at=later)
    # As a retry does: a file more of predictions, one of the row that failed again.
    assert again.rows == again.predictions + again.errors
    done = done_at(ledger, [commits[0], commits[1], again, commits[3]])
    assert sorted(rows for _, rows in done) == [1, 10, 10, 10, 10]
    assert ((BEGUN + timedelta(days=1)).timestamp(), 1) in done


def test_records_of_attempts_are_read_back_in_order_and_broken_ones_left_out(tmp_path: Path) -> None:
    ledger, _ = outputs.planned(str(tmp_path), ["s3://b/a.jpg"], 10)
    store = ledger.store
    second = replace(ONE, attempt="b", started_at="2026-11-04T12:00:00.000+00:00")
    for one in (second, ONE):
        one.write(store)
    for name, data in (("x", b"{"), ("y", b"[]"), ("z", b'{"attempt": "z"}')):
        store.put(f"{history.FOLDER}/{name}.json", data)
    replace(ONE, attempt="w", started_at="yesterday").write(store)
    assert attempts(store) == [ONE, second]
    assert starts_of([ONE]) == [(BEGUN + timedelta(seconds=30)).timestamp()]
    assert starts_of([replace(ONE, working_from="")]) == []


def test_gpu_hours() -> None:
    assert (ONE.gpu_hours, ONE.busy_gpu_hours) == (2.0, 0.5)
    assert replace(ONE, gpus=0.0).gpu_hours == 0
    assert replace(ONE, actors=0).busy_gpu_hours == 0
