"""Rows that come back in any order, and the shards that they complete."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.config import ErrorsConfig
from batch_inference.driver.collector import ERROR_COLUMNS, Collector, OpenShard
from batch_inference.errors import BatchInferenceError, ErrorThresholdExceeded, InfrastructureError, UserError
from batch_inference.output.tally import Tally, describe_errors
from batch_inference.pipeline.schemas import RESULT_SCHEMA

Row = tuple[int, int, tuple[str, str] | None]
DENIED, DOWN, TORN = ("fetch", "ACCESS_DENIED"), ("fetch", "STORE_UNREACHABLE"), ("decode", "TRUNCATED")


def results(rows: list[Row]) -> pa.Table:
    """Return result rows of (shard, row, stage and error type of a failure or None)."""
    columns: list[list[Any]] = [
        [shard for shard, _, _ in rows],
        [row for _, row, _ in rows],
        [error and error[0] for _, _, error in rows],
        [error and error[1] for _, _, error in rows],
        [error and f"message of {shard}/{row}" for shard, row, error in rows],
        [False] * len(rows),
        [10] * len(rows),
        [0.5] * len(rows),
        [0.25] * len(rows),
        [0.125] * len(rows),
        [3] * len(rows),
        [None] * len(rows),
        [None] * len(rows),
    ]
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, RESULT_SCHEMA, strict=True)], schema=RESULT_SCHEMA
    ).append_column("value", pa.array(range(len(rows))))


def all_rows(shard: int, rows: int, error: tuple[str, str] | None = None) -> list[Row]:
    return [(shard, row, error) for row in range(rows)]


def collect(collector: Collector, *tables: list[Row]) -> list[tuple[int, OpenShard]]:
    return [done for table in tables for done in collector.add(results(table))]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[dict[int, int], list[list[Row]], set[tuple[int, int]]]:
    """Draw shards of some sizes, and their rows in any order, cut into tables anywhere; some rows failed."""
    sizes = draw(st.dictionaries(st.integers(0, 9), st.integers(1, 6), min_size=1, max_size=5))
    every = [(shard, row) for shard, count in sizes.items() for row in range(count)]
    bad = set(draw(st.lists(st.sampled_from(every), unique=True)))
    order = draw(st.permutations(every))
    cuts = sorted({0, len(every), *draw(st.lists(st.integers(0, len(every))))})
    parts = [order[a:b] for a, b in itertools.pairwise(cuts)]
    return sizes, [[(s, r, TORN if (s, r) in bad else None) for s, r in part] for part in parts], bad


@given(arrivals())
def test_shard_is_complete_with_its_last_row_in_any_order(
    case: tuple[dict[int, int], Any, set[tuple[int, int]]],
) -> None:
    sizes, tables, bad = case
    collector = Collector(dict(sizes), Tally())
    left = dict(sizes)
    complete: dict[int, OpenShard] = {}
    for table in tables:
        for shard, _, _ in table:
            left[shard] -= 1
        done = dict(collector.add(results(table)))
        assert not done.keys() & complete.keys()
        complete |= done
        assert complete.keys() == {shard for shard, count in left.items() if not count}
    collector.finish()
    for shard, part in complete.items():
        errors = part.error_table()
        assert errors.column_names == list(ERROR_COLUMNS)
        assert sorted(errors["row"].to_pylist()) == sorted(r for s, r in bad if s == shard)
        assert errors["message"].to_pylist() == [f"message of {shard}/{r}" for r in errors["row"].to_pylist()]
    tally = collector.tally
    assert (tally.rows, tally.seen, tally.errors) == (sum(sizes.values()), sum(sizes.values()), len(bad))
    assert tally.predictions == tally.rows - len(bad)
    assert tally.errors_by == ({"decode": {"TRUNCATED": len(bad)}} if bad else {})
    assert (tally.bytes, tally.fetch_s, tally.decode_s) == (10 * tally.rows, 0.5 * tally.rows, 0.25 * tally.rows)
    assert tally.infer_s == pytest.approx(0.125 * tally.rows)
    assert tally.retries == 3 * tally.rows


@given(arrivals(), st.randoms(use_true_random=False))
def test_row_that_comes_twice_is_refused(case: tuple[dict[int, int], Any, Any], rng: random.Random) -> None:
    sizes, tables, _ = case
    every = [row for table in tables for row in table]
    index = rng.randrange(len(every))
    every.insert(rng.randint(index, len(every)), every[index])
    collector = Collector(dict(sizes), Tally())
    with pytest.raises(InfrastructureError, match="came back"):
        for row in every:
            collector.add(results([row]))


@pytest.mark.parametrize("row", [3, 100])
def test_row_that_is_not_in_its_shard_is_refused(row: int) -> None:
    collector = Collector({0: 3}, Tally())
    with pytest.raises(InfrastructureError, match="shard-00000 came back twice or is not one of its rows"):
        collect(collector, [(0, row, None)])


def test_row_twice_in_one_table_is_refused() -> None:
    with pytest.raises(InfrastructureError, match="came back twice"):
        collect(Collector({0: 3}, Tally()), [(0, 1, None), (0, 1, None)])


def test_shard_that_was_not_to_be_done_is_refused() -> None:
    with pytest.raises(InfrastructureError, match="shard-00007 came back, which is complete or was not to be done"):
        collect(Collector({0: 3}, Tally()), [(7, 0, None)])


def test_rows_that_never_come_back_are_named() -> None:
    collector = Collector({0: 3, 1: 2}, Tally())
    assert len(collect(collector, [(0, 0, None), (0, 2, None), *all_rows(1, 2)])) == 1
    with pytest.raises(
        InfrastructureError, match="1 shards did not come back complete, shard-00000 has 2 of 3 rows"
    ) as caught:
        collector.finish()
    assert "running the same command again" in caught.value.remedy


# --- thresholds ----------------------------------------------------------------------------------------------------------


def tally(rows: int, errors: int) -> Tally:
    counts = Tally(rows=rows)
    counts.add_errors({"decode": {"TRUNCATED": errors}})
    return counts


@pytest.mark.parametrize(
    ("limits", "rows", "errors", "stops"),
    [
        ({"max_count": 3, "max_percent": None}, 10, 3, False),
        ({"max_count": 3, "max_percent": None}, 10, 4, True),
        ({"max_count": 0, "max_percent": None}, 10, 0, False),
        ({"max_count": 0, "max_percent": None}, 10, 1, True),
        ({"max_percent": 5.0, "min_rows": 1000}, 999, 999, False),
        ({"max_percent": 5.0, "min_rows": 1000}, 1000, 50, False),
        ({"max_percent": 5.0, "min_rows": 1000}, 1000, 51, True),
        ({"max_percent": 0, "min_rows": 1}, 1, 0, False),
        ({"max_percent": 0, "min_rows": 1}, 1, 1, True),
        ({"max_percent": 100, "min_rows": 1}, 5, 5, False),
        ({"max_percent": None, "max_count": None}, 10, 10, False),
        ({}, 0, 0, False),
    ],
)
def test_thresholds_stop_a_job(limits: dict[str, Any], rows: int, errors: int, stops: bool) -> None:
    if not stops:
        tally(rows, errors).check(ErrorsConfig(**limits))
        return
    with pytest.raises(ErrorThresholdExceeded) as caught:
        tally(rows, errors).check(ErrorsConfig(**limits))
    assert f"{errors:,} of {rows:,} rows failed" in caught.value.message
    assert f"decode TRUNCATED {errors}" in caught.value.message
    key = "max_count" if limits.get("max_count") is not None else "max_percent"
    assert f"errors.{key}" in caught.value.message
    assert f"raise errors.{key}" in caught.value.remedy


def test_rows_of_earlier_attempts_count_too() -> None:
    limits = ErrorsConfig(max_count=3, max_percent=10, min_rows=20)
    collector = Collector({5: 2}, tally(20, 2))
    collect(collector, [(5, 0, TORN)])
    assert (collector.tally.rows, collector.tally.seen, collector.tally.errors) == (21, 1, 3)
    with pytest.raises(
        ErrorThresholdExceeded, match=r"3 of 21 rows failed = 14\.3 %, more than errors\.max_percent = 10"
    ):
        collector.tally.check(limits)
    collect(collector, [(5, 1, TORN)])
    with pytest.raises(ErrorThresholdExceeded, match=r"4 of 22 rows failed, more than errors\.max_count = 3"):
        collector.tally.check(limits)


def test_errors_are_described_most_frequent_first() -> None:
    by = {"decode": {"TRUNCATED": 2, "CORRUPT": 12000}, "fetch": {"NOT_FOUND": 2}}
    assert describe_errors(by) == ["decode CORRUPT 12,000", "decode TRUNCATED 2", "fetch NOT_FOUND 2"]


# --- systemic failures -------------------------------------------------------------------------------------------------


def test_shard_of_denials_is_held_until_another_row_shows_that_the_store_answers() -> None:
    collector = Collector({0: 5, 1: 5, 2: 5}, Tally())
    assert collect(collector, all_rows(0, 5, DENIED), all_rows(1, 5, DENIED)) == []
    done = collect(collector, [(2, 0, None)])
    assert sorted(shard for shard, _ in done) == [0, 1]
    assert all(part.error_table().num_rows == 5 for _, part in done)
    assert [shard for shard, _ in collect(collector, [(2, r, None) for r in range(1, 5)])] == [2]
    collector.finish()


@pytest.mark.parametrize("witness", [None, TORN, ("fetch", "NOT_FOUND"), ("fetch", "TOO_LARGE")])
def test_any_row_without_a_systemic_failure_is_a_witness(witness: tuple[str, str] | None) -> None:
    collector = Collector({0: 2, 1: 1}, Tally())
    assert collect(collector, all_rows(0, 2, DOWN)) == []
    assert {s for s, _ in collect(collector, [(1, 0, witness)])} == {0, 1}


def test_shard_with_another_failure_is_not_held() -> None:
    collector = Collector({0: 3}, Tally())
    assert [s for s, _ in collect(collector, [(0, 0, DENIED), (0, 1, TORN), (0, 2, DENIED)])] == [0]


def test_job_without_a_witness_stops_at_its_end_and_commits_nothing() -> None:
    collector = Collector({0: 5}, Tally())
    assert collect(collector, all_rows(0, 5, DENIED)) == []
    with pytest.raises(UserError, match="everything failed at fetch with ACCESS_DENIED: message of 0/4"):
        collector.finish()


PREDICTOR = ("infer", "PREDICTOR_ERROR")


def test_undecodable_images_do_not_show_that_the_predictor_works() -> None:
    rows: list[Row] = [(0, r, TORN if r % 4 else PREDICTOR) for r in range(40)]
    collector = Collector({0: 40, 1: 5}, Tally())
    assert collect(collector, rows) == []
    with pytest.raises(
        UserError, match="every image that could be read failed at infer with PREDICTOR_ERROR"
    ) as caught:
        collector.finish()
    assert "Fix the predictor" in caught.value.remedy
    collector = Collector({0: 40, 1: 5}, Tally())
    assert {s for s, _ in collect(collector, rows, all_rows(1, 5))} == {0, 1}


def test_failing_predictor_among_undecodable_images_stops_the_job() -> None:
    collector = Collector({0: 4000}, Tally())
    with pytest.raises(UserError, match=f"the last {Collector.WINDOW} images that came to the predictor failed"):
        for row in range(4000):
            collect(collector, [(0, row, TORN if row % 4 else PREDICTOR)])
    assert collector.tally.rows == 4 * Collector.WINDOW - 3


def test_cause_of_the_end_is_named_though_the_other_had_failed_too() -> None:
    collector = Collector({0: 1000}, Tally())
    with pytest.raises(
        InfrastructureError, match=f"the last {Collector.WINDOW} rows failed at fetch with STORE_UNREACHABLE"
    ):
        for row in range(1000):
            collect(collector, [(0, row, PREDICTOR if row == 0 else DOWN)])
    collector = Collector({0: 100}, Tally())
    collect(
        collector,
        [
            (0, r, PREDICTOR if r == 0 else ("fetch", "NOT_TRIED" if r > 64 else "STORE_UNREACHABLE"))
            for r in range(100)
        ],
    )
    with pytest.raises(InfrastructureError, match="every row of shard-00000 failed at fetch"):
        collector.finish()


def test_predictor_that_worked_in_an_earlier_attempt_has_shown_that_it_works() -> None:
    rows: list[Row] = [(0, r, TORN if r else PREDICTOR) for r in range(40)]
    collector = Collector({0: 40}, Tally(), worked=True)
    assert [s for s, _ in collect(collector, rows)] == [0]
    collector.finish()


def test_any_number_of_failed_rows_may_fail_again() -> None:
    chosen = {0: np.arange(500)}
    collector = Collector({0: 500}, Tally(), chosen)
    done = [s for row in range(500) for s, _ in collect(collector, [(0, row, PREDICTOR)])]
    assert done == [0]


def test_failed_row_that_fails_again_is_an_error_row_again() -> None:
    collector = Collector({0: 1, 1: 1}, Tally(), {0: np.array([7]), 1: np.array([3])})
    assert [s for s, _ in collect(collector, [(0, 7, PREDICTOR)], [(1, 3, DENIED)])] == [0, 1]
    collector.finish()


@pytest.mark.parametrize("error", [DENIED, DOWN, ("fetch", "TIMEOUT"), PREDICTOR])
def test_retry_of_which_every_row_fails_of_the_store_again_writes_errors_again(error: tuple[str, str]) -> None:
    """No row shows that the store answers; held back, the job would end without a commit."""
    collector = Collector({0: 3, 1: 2}, Tally(), {0: np.array([1, 4, 5]), 1: np.array([0, 2])})
    done = collect(collector, [(0, 4, error), (0, 1, error)], [(1, 2, error), (0, 5, error)], [(1, 0, error)])
    assert [(shard, sorted(part.error_table()["row"].to_pylist())) for shard, part in done] == [
        (0, [1, 4, 5]),
        (1, [0, 2]),
    ]
    collector.finish()


@pytest.mark.parametrize(
    ("error", "error_type", "remedy"),
    [
        (("fetch", "ACCESS_DENIED"), UserError, "credentials"),
        (("fetch", "UNAUTHENTICATED"), UserError, "credentials"),
        (("fetch", "STORE_UNREACHABLE"), InfrastructureError, "it resumes"),
        (("fetch", "TIMEOUT"), InfrastructureError, "it resumes"),
        (("infer", "PREDICTOR_ERROR"), UserError, "Fix the predictor"),
        (("postprocess", "OUTPUT_MISMATCH"), UserError, "Fix the predictor"),
    ],
)
def test_job_in_which_nothing_works_stops_early_with_the_one_reason(
    error: tuple[str, str], error_type: type[BatchInferenceError], remedy: str
) -> None:
    collector = Collector({0: 1000}, Tally())
    window = Collector.WINDOW
    for row in range(window - 1):
        assert collect(collector, [(0, row, error)]) == []
    with pytest.raises(
        error_type,
        match=f"every one of the last {window} (rows|images that came to the predictor) failed at {error[0]} with {error[1]}",
    ) as caught:
        collect(collector, [(0, window - 1, error)])
    assert type(caught.value) is error_type
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("error", [TORN, ("fetch", "NOT_FOUND"), ("infer", "NOT_FINITE"), None])
def test_failures_of_single_images_never_stop_a_job(error: tuple[str, str] | None) -> None:
    collector = Collector({0: 500}, Tally())
    assert [s for s, _ in collect(collector, all_rows(0, 500, error))] == [0]


def test_one_good_row_in_every_window_keeps_a_job_alive() -> None:
    collector = Collector({0: 1000}, Tally())
    rng = np.random.default_rng(0)
    rows: list[Row] = [(0, r, None if r % (Collector.WINDOW - 1) == 0 else DENIED) for r in range(1000)]
    size = 0
    while rows:
        size = int(rng.integers(1, 40))
        part, rows = rows[:size], rows[size:]
        done = collect(collector, part)
    assert [s for s, _ in done] == [0]


def test_store_that_fails_in_the_middle_stops_the_job() -> None:
    collector = Collector({0: 300, 1: 300}, Tally())
    assert [s for s, _ in collect(collector, all_rows(0, 300))] == [0]
    with pytest.raises(InfrastructureError):
        for row in range(300):
            collect(collector, [(1, row, DOWN)])


def test_shard_with_rows_that_were_not_tried_is_never_committed() -> None:
    collector = Collector({0: 100, 1: 5}, Tally())
    rows = [(0, r, ("fetch", "ACCESS_DENIED" if r < 64 else "NOT_TRIED")) for r in range(100)]
    done = collect(collector, rows, all_rows(1, 5, None))
    assert [shard for shard, _ in done] == [1]
    with pytest.raises(UserError, match="every row of shard-00000 failed at fetch with ACCESS_DENIED"):
        collector.finish()
