"""One schema per job, for any types of a predictor's columns, any order of shards and any number of writers."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import decimal
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_inference.config import JobConfig
from batch_inference.driver.collector import OpenShard
from batch_inference.driver.committer import Committer, PredictionWriters
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.driver.unify import unify
from batch_inference.errors import AccountingError, UserError
from batch_inference.inputs import find
from batch_inference.output import manifest
from batch_inference.output.column_types import cast_values, is_open, plain_type, text_where_open
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit
from batch_inference.output.retries import select_rows, start_retry
from batch_inference.output.schema import (
    SCHEMA_PATH,
    OutputSchema,
    decode_schema,
    encode_schema,
    join_tables,
    split_duplicate_columns,
)
from batch_inference.output.tally import Tally
from batch_inference.output.verify import verify
from batch_inference.storage.store import Store
from tests.support.faulty_store import Crash, Faulty
from tests.support.outputs import CONFIG, ERRORS, job_of, planned, totals_of

SIZE = 3
NOT_NULL = pa.struct([pa.field("a", pa.int64(), nullable=False)])
NO_ERRORS = ERRORS.empty_table()


# --- jobs without a predictor: what it would have returned is given ------------------------------------------------------


def uris_of(shards: int) -> list[str]:
    return [f"s3://b/{place:03d}.jpg" for place in range(shards * SIZE)]


def batch(shard: int, start: int, columns: dict[str, pa.Array]) -> pa.Table:
    """Return rows of a shard as an actor sends them."""
    count = len(next(iter(columns.values())))
    place = {"shard": pa.array([shard] * count, pa.int32()), "row": pa.array(range(start, start + count), pa.int32())}
    return pa.table(place | columns)


def add_column(writer: ShardWriter, shard: int, name: str, *parts: pa.Array) -> None:
    start = 0
    for part in parts:
        writer.add(shard, batch(shard, start, {name: part}))
        start += len(part)


def commit(ledger: Ledger, writer: ShardWriter, shard: int) -> Commit:
    made = writer.write(shard, NO_ERRORS)
    assert ledger.commit(made)
    return made


def end(ledger: Ledger, attempt: str = "end") -> None:
    """Finish a job as the driver does when every shard is committed."""
    job = ledger.require_job()
    ledger.verified_commits(job)
    retry = unify(ledger, attempt, "zstd", ledger.retry())
    commits = ledger.verified_commits(job)
    ledger.finish(job, commits, totals_of(job, commits), retry.generation if retry else 0)


def run(folder: Path, *shards: Any, name: str = "v") -> Ledger:
    """Run a job with one column; each array is a shard."""
    ledger, _ = planned(str(folder), uris_of(len(shards)), SIZE)
    writer = ShardWriter(ledger.store, "one", "zstd")
    for shard, values in enumerate(shards):
        array = values if isinstance(values, pa.Array) else pa.array(values)
        add_column(writer, shard, name, array)
        commit(ledger, writer, shard)
    end(ledger)
    assert verify(str(folder)).problems == ()
    return ledger


def read(folder: Path) -> pa.Table:
    """Read the folder with pandas, pyarrow, DuckDB and polars, which must return the same rows."""
    table = ds.dataset(folder / "predictions").to_table().sort_by([("shard", "ascending"), ("row", "ascending")])
    frame = pd.read_parquet(folder / "predictions")
    assert sorted(frame["uri"]) == sorted(table["uri"].to_pylist())
    assert list(frame.columns) == table.column_names
    rows = duckdb.read_parquet(f"{folder}/predictions/*.parquet").fetchall()
    assert sorted(row[0] for row in rows) == sorted(table["uri"].to_pylist())
    rows_of_polars = polars.read_parquet(f"{folder}/predictions/*.parquet")
    assert sorted(rows_of_polars["uri"]) == sorted(table["uri"].to_pylist())
    assert rows_of_polars.columns == table.column_names
    return table


def values(folder: Path, name: str = "v") -> list[Any]:
    return list(read(folder)[name].to_pylist())


def failed(folder: Path) -> list[tuple[int, str, str]]:
    """Return shard, type and message of all error rows."""
    if not (folder / "errors").is_dir():
        return []
    table = ds.dataset(folder / "errors").to_table().sort_by([("shard", "ascending"), ("row", "ascending")])
    assert set(table["stage"].to_pylist()) <= {"postprocess", "decode"}
    return list(
        zip(table["shard"].to_pylist(), table["error_type"].to_pylist(), table["message"].to_pylist(), strict=True)
    )


# --- single rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([None] * 3, ["a", "b", None], pa.string()),
        ([None] * 3, [1.5, 2, None], pa.float64()),
        ([[], [], []], [[1.5], [], [2.5, 3]], pa.list_(pa.float64())),
        ([[], None, []], [[[1.0, 2.0]], [], None], pa.list_(pa.list_(pa.float64()))),
        ([[[]], [], []], [[[1, 2]], [], None], pa.list_(pa.list_(pa.int64()))),
        ([{}, None, {}], [{"a": 1}, None, {"a": 2}], pa.struct([("a", pa.int64())])),
        ([{"a": None, "b": 1}] * 3, [{"a": "x", "b": 2}] * 3, pa.struct([("a", pa.string()), ("b", pa.int64())])),
        ([{"a": []}] * 3, [{"a": [{"s": 0.5}]}] * 3, pa.struct([("a", pa.list_(pa.struct([("s", pa.float64())])))])),
        ([1, 2, 3], [None] * 3, pa.int64()),
        ([[1.5], [], []], [[], [], []], pa.list_(pa.float64())),
    ],
)
def test_column_without_value_gets_its_type_later(
    first: list[Any], second: list[Any], expected: pa.DataType, tmp_path: Path
) -> None:
    run(tmp_path, first, second)
    table = read(tmp_path)
    assert table.schema.field("v").type == expected
    assert [plain(v) for v in table["v"].to_pylist()] == [plain(v) for v in first + second]
    assert failed(tmp_path) == []
    assert len(list((tmp_path / "predictions").iterdir())) == 2


def test_column_that_never_has_a_value_is_text(tmp_path: Path) -> None:
    ledger = run(tmp_path, [None] * 3, [None] * 3)
    assert read(tmp_path).schema.field("v").type == pa.string()
    assert values(tmp_path) == [None] * 6
    assert ledger.retry() is None


def test_only_files_with_open_columns_are_written_again(tmp_path: Path) -> None:
    ledger = run(tmp_path, [None] * 3, [2, 3, 4], [None] * 3, ["x"] * 3)
    generations = {c.shard: c.generation for c in ledger.commits()}
    assert generations == {0: 1, 1: 0, 2: 0, 3: 0}
    assert [c.files[0].open for c in ledger.commits() if c.predictions] == [()] * 3
    assert values(tmp_path) == [None] * 3 + [2, 3, 4] + [None] * 3
    assert {(shard, kind) for shard, kind, _ in failed(tmp_path)} == {(3, "OUTPUT_MISMATCH")}


def test_right_guess_costs_nothing(tmp_path: Path) -> None:
    ledger = run(tmp_path, [None] * 3, ["a", "b", "c"])
    assert ledger.retry() is None
    assert {c.generation for c in ledger.commits()} == {0}


@pytest.mark.parametrize(
    ("first", "later", "kept", "said"),
    [
        (pa.array([1, 2, 3], pa.int32()), [1, 2**40, None], [1, None], "is int64 here and int32 in this job"),
        ([1, 2, 3], [0.5, 1.0, None], [None], "is double here and int64 in this job"),
        ([0.5] * 3, [1, 2**53 + 1, 2**53], [1.0, 2.0**53], "is int64 here and double in this job"),
        (
            pa.array([0.5] * 3, pa.float32()),
            [0.5, 0.1, math.inf],
            [0.5, math.inf],
            "is double here and float in this job",
        ),
        (
            pa.array([0.5] * 3, pa.float16()),
            pa.array([0.5, 0.1, None], pa.float32()),
            [0.5, None],
            "is float here and halffloat in",
        ),
        ([1, 2, 3], [2.0, math.nan, 4.0], [], "is double here and int64 in this job"),
        (["a"] * 3, [1, None, 2], [None], "is int64 here and string in this job"),
        ([1, 2, 3], ["1", "2", "3"], [], "is string here and int64 in this job"),
        ([True] * 3, [1, 0, 1], [], "is int64 here and bool in this job"),
        ([[1], [2], [3]], [[1], ["x"][:0], [2**60]], [[1], [], [2**60]], ""),
        ([[1]] * 3, [1, 2, None], [None], "is int64 here and list<item: int64> in this job"),
        (
            [{"a": 1}] * 3,
            [{"a": 1, "b": None}, {"a": 2, "b": 3}, {"a": None, "b": None}],
            [{"a": 1}, {"a": None}],
            "is struct<a: int64, b: int64> here and struct<a: int64> in this job",
        ),
        ([b"x"] * 3, ["x", None, "y"], [None], "is string here and binary in this job"),
        ([dt.date(2024, 1, 1)] * 3, [dt.datetime(2024, 1, 1)] * 3, [], "in this job"),
    ],
)
def test_value_that_would_lose_something_is_an_error_row(
    first: Any, later: Any, kept: list[Any], said: str, tmp_path: Path
) -> None:
    run(tmp_path, first, later)
    assert values(tmp_path)[3:] == kept
    found = failed(tmp_path)
    assert len(found) == 3 - len(kept)
    for shard, kind, message in found:
        assert (shard, kind) == (1, "OUTPUT_MISMATCH")
        assert message.startswith("the predictor's column 'v' ") and said in message and SCHEMA_PATH in message


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (pa.array([1, 2, 3]), pa.array([1, 2, 3], pa.int8())),
        (pa.array([1.5, 2, 3]), pa.array([1.5, 2, None], pa.float32())),
        (pa.array(["a", "b", "c"]), pa.array(["a", None, "c"], pa.large_string())),
        (pa.array(["a", "b", "c"]), pa.array(["a", None, "c"], pa.string_view())),
        (pa.array(["a", "b", "c"], pa.string_view()), pa.array(["a", None, "a"]).dictionary_encode()),
        (pa.array([b"a"] * 3, pa.binary_view()), pa.array([b"a"] * 3, pa.large_binary())),
        (pa.array([[1]] * 3, pa.list_view(pa.int8())), pa.array([[2], None, []], pa.large_list(pa.int8()))),
        (pa.array([[1.0, 2]] * 3), pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))),
        (pa.array([[1, 2]] * 3, pa.list_(pa.float32(), 2)), pa.array([[1.0, 2], None, [3, 4]])),
        (pa.array([{"a": 1.5}] * 3), pa.array([{"a": 1}, None, {"a": None}])),
        (pa.array([{"a": 1}] * 3, NOT_NULL), pa.array([{"a": None}, {"a": 2}, None])),
        (pa.array([[None, [0]]] * 3), pa.array([[None, [1]], [[], None], None], pa.list_(pa.list_(pa.int8())))),
        (pa.array([1] * 3, pa.timestamp("ms")), pa.array([1] * 3, pa.timestamp("s"))),
        (pa.array([decimal.Decimal("1.25")] * 3), pa.array([decimal.Decimal("1.5")] * 3)),
        (pa.array([1] * 3, pa.timestamp("us", "UTC")), pa.array([1] * 3, pa.timestamp("us", "Europe/Berlin"))),
    ],
)
def test_value_that_loses_nothing_is_cast(first: pa.Array, later: pa.Array, tmp_path: Path) -> None:
    run(tmp_path, first, later)
    table = read(tmp_path)
    assert table.schema.field("v").type == plain_type(first.type)
    assert table["v"].to_pylist() == first.to_pylist() + later.to_pylist()


def test_new_column_is_never_dropped_and_a_missing_one_is_null(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), uris_of(3), SIZE)
    writer = ShardWriter(ledger.store, "one", "zstd")
    for shard, columns in enumerate(
        ({"a": [1, 2, 3], "c": ["x"] * 3}, {"a": [4, 5, 6], "b": [1, None, 2]}, {"b": [None] * 3})
    ):
        writer.add(shard, batch(shard, 0, {name: pa.array(column) for name, column in columns.items()}))
        commit(ledger, writer, shard)
    end(ledger)
    assert verify(str(tmp_path)).problems == ()
    table = read(tmp_path)
    assert table.select(["a", "c"]).to_pylist() == [
        *({"a": a, "c": "x"} for a in (1, 2, 3)), {"a": 5, "c": None}, *[{"a": None, "c": None}] * 3,
    ]  # fmt: skip
    assert [(shard, "'b' (int64) is not among this job's columns" in said) for shard, _, said in failed(tmp_path)] == [
        (1, True), (1, True),
    ]  # fmt: skip


def test_parts_of_a_shard_and_of_a_batch_follow_the_same_rule(tmp_path: Path) -> None:
    """Before the first commit the type holds both values; if the types exclude each other, the first row's counts."""
    ledger, _ = planned(str(tmp_path), uris_of(3), SIZE)
    writer = ShardWriter(ledger.store, "one", "zstd")
    # Sent in any order.
    writer.add(0, batch(0, 2, {"n": pa.array([0.5]), "m": pa.array(["x"])}))
    writer.add(0, batch(0, 0, {"n": pa.array([1, 2], pa.int32()), "m": pa.array([7, 8])}))
    commit(ledger, writer, 0)
    # An actor has done the images of a batch alone.
    alone = join_tables(
        [pa.table({"n": [1], "m": pa.nulls(1)}), pa.table({"m": ["y"], "n": [2.5]}), pa.table({"n": [3], "m": [9]})]
    )
    for part in split_duplicate_columns(_with_place(alone, 1)):
        writer.add(1, part)
    commit(ledger, writer, 1)
    writer.add(2, batch(2, 0, {"n": pa.array([None] * 3), "m": pa.array([1, 2, 3])}))
    commit(ledger, writer, 2)
    end(ledger)
    assert verify(str(tmp_path)).problems == ()
    table = read(tmp_path)
    assert table["n"].to_pylist() == [1.0, 2.0, 1.0, 3.0, None, None, None]
    assert table["m"].to_pylist() == [7, 8, None, 9, 1, 2, 3]
    assert [(shard, kind) for shard, kind, _ in failed(tmp_path)] == [(0, "OUTPUT_MISMATCH"), (1, "OUTPUT_MISMATCH")]


def _with_place(table: pa.Table, shard: int) -> pa.Table:
    place = batch(shard, 0, {"x": pa.nulls(table.num_rows)})
    for at, name in enumerate(("shard", "row")):
        table = table.add_column(at, name, place[name])
    return table


def test_tables_with_other_columns_are_joined_and_taken_apart_again() -> None:
    tables = [pa.table({"a": [1], "b": ["x"]}), pa.table({"a": ["t"], "b": ["y"]}), pa.table({"a": [2], "b": ["z"]})]
    joined = join_tables(tables)
    assert joined.num_rows == 3
    rows = [row for part in split_duplicate_columns(joined) for row in part.to_pylist()]
    assert sorted(rows, key=str) == sorted((row for table in tables for row in table.to_pylist()), key=str)
    assert join_tables(tables[:1] * 2).to_pylist() == tables[0].to_pylist() * 2


def test_table_without_rows_decides_no_types(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), uris_of(1), SIZE)
    writer = ShardWriter(ledger.store, "one", "zstd")
    writer.add(0, batch(0, 0, {"v": pa.array([], pa.string()), "w": pa.array([], pa.int8())}))
    add_column(writer, 0, "v", pa.array([1, 2, 3]))
    commit(ledger, writer, 0)
    assert read(tmp_path).column_names == ["uri", "shard", "row", "v"]
    assert values(tmp_path) == [1, 2, 3]


def test_type_that_parquet_does_not_have_is_named(tmp_path: Path) -> None:
    union = pa.UnionArray.from_sparse(pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(["a", "b", "c"])])
    ledger, _ = planned(str(tmp_path), uris_of(1), SIZE)
    writer = ShardWriter(ledger.store, "one", "zstd")
    writer.add(0, batch(0, 0, {"n": pa.array([1, 2, 3]), "u": union}))
    assert commit(ledger, writer, 0).errors == 3
    assert "which Parquet cannot store" in failed(tmp_path)[0][2]


def test_rows_that_do_not_fit_are_counted_at_once(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), uris_of(2), SIZE)
    writer, tally = ShardWriter(ledger.store, "one", "zstd"), Tally(rows=6)
    add_column(writer, 0, "v", pa.array([1, 2, 3]))
    add_column(writer, 1, "v", pa.array(["x", None]))
    bad = pa.Table.from_pylist(
        [{"row": 2, "stage": "decode", "error_type": "TRUNCATED", "message": "", "retryable": False}], ERRORS
    )
    tally.add_errors({"decode": {"TRUNCATED": 1}})
    with Committer(ledger, PredictionWriters(writer, []), lambda commit, mine, seconds: None, None, tally) as closing:
        closing.add(0, OpenShard(np.ones(3, bool), [NO_ERRORS]))
        closing.wait()
        closing.add(1, OpenShard(np.ones(3, bool), [bad]))
        closing.wait()
    assert tally.errors_by == {"decode": {"TRUNCATED": 1}, "postprocess": {"OUTPUT_MISMATCH": 1}}
    assert tally.errors_by == {stage: kinds for c in ledger.commits() for stage, kinds in c.errors_by.items()}


def test_retry_has_the_jobs_types_and_counts_what_does_not_fit(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), uris_of(1), SIZE)
    writer = ShardWriter(ledger.store, "one", "zstd")
    add_column(writer, 0, "v", pa.array([1]))
    bad = [{"row": row, "stage": "fetch", "error_type": "TIMEOUT", "message": "", "retryable": True} for row in (1, 2)]
    assert ledger.commit(writer.write(0, pa.Table.from_pylist(bad, ERRORS)))
    end(ledger)
    retry = start_retry(ledger, stages=["fetch"], error_types=[], retryable=False, attempt="two")
    assert retry is not None
    pending, tally = select_rows(ledger, retry, ledger.commits()), Tally(rows=3)
    second = ShardWriter(ledger.store, "two", "zstd")
    second.add(0, batch(0, 1, {"v": pa.array([2, None], pa.int8())}))
    second.add(0, batch(0, 2, {"v": pa.array([0.25])}))
    with Committer(
        ledger, PredictionWriters(second, []), lambda commit, mine, seconds: None, pending, tally
    ) as closing:
        closing.add(0, OpenShard(np.ones(3, bool), [NO_ERRORS]))
        closing.wait()
    assert tally.errors_by == {"postprocess": {"OUTPUT_MISMATCH": 1}}
    end(ledger)
    assert verify(str(tmp_path)).problems == ()
    assert values(tmp_path) == [1, 2]


# --- the file ------------------------------------------------------------------------------------------------------------


def test_schema_is_readable_by_people_and_exact(tmp_path: Path) -> None:
    ledger = run(tmp_path, [[None], [], None])
    raw = json.loads(ledger.store.get(SCHEMA_PATH))
    assert [(c["name"], c["type"]) for c in raw["columns"]] == [
        ("uri", "string"), ("shard", "int32"), ("row", "int32"), ("v", "list<item: string>"),
    ]  # fmt: skip
    odd = pa.schema(
        [
            ("a", pa.struct([("x y", pa.list_(pa.decimal128(5, 2), 3))])),
            ("b", pa.timestamp("ns", "UTC")),
            ("c", pa.null()),
        ]
    )
    assert decode_schema(encode_schema(odd)) == odd
    assert [c.get("open") for c in json.loads(encode_schema(odd))["columns"]] == [None, None, True]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 2}', b'{"format": 1, "arrow": "x"}', b"\xff"])
def test_schema_that_is_not_readable_is_named(content: bytes, tmp_path: Path) -> None:
    ledger = run(tmp_path, [1, 2, 3])
    ledger.store.put(SCHEMA_PATH, content)
    with pytest.raises(AccountingError, match=r"_schema\.json is not readable") as caught:
        OutputSchema(ledger.store).known()
    assert "Delete _schema.json and run the same command again" in caught.value.remedy
    assert any("_schema.json is not readable" in problem for problem in verify(str(tmp_path)).problems)


def test_output_without_a_schema_gets_that_of_its_first_file(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), uris_of(2), SIZE)
    writer = ShardWriter(ledger.store, "old", "zstd")
    add_column(writer, 0, "v", pa.array([1.5, 2, 3]))
    commit(ledger, writer, 0)
    ledger.store.delete([SCHEMA_PATH])
    assert verify(str(tmp_path)).problems == ()
    late = ShardWriter(ledger.store, "new", "zstd")
    add_column(late, 1, "v", pa.array([1, 2, 3]))
    commit(ledger, late, 1)
    end(ledger)
    assert verify(str(tmp_path)).problems == ()
    assert values(tmp_path) == [1.5, 2.0, 3.0, 1.0, 2.0, 3.0]


def test_one_of_two_writers_fixes_the_types_for_both(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), uris_of(2), SIZE)
    store = Faulty(str(tmp_path), CONFIG)
    first, second = ShardWriter(store, "one", "zstd"), ShardWriter(ledger.store, "two", "zstd")
    add_column(first, 0, "v", pa.array([1, 2, 3]))
    add_column(second, 1, "v", pa.array(["a", "b", None]))
    # The second is between the first one's look and its try.
    store.arm(4, lambda: commit(ledger, second, 1))
    made = commit(ledger, first, 0)
    assert store.fired
    assert (made.predictions, made.errors) == (0, 3)
    end(ledger)
    assert verify(str(tmp_path)).problems == ()
    assert values(tmp_path) == ["a", "b", None]


# --- the end, with crashes and races -------------------------------------------------------------------------------------


def undecided(folder: str) -> Ledger:
    """Make an output whose first two shards have no type; every shard is committed, and the driver has not finished."""
    ledger, _ = planned(folder, uris_of(4), SIZE)
    writer = ShardWriter(ledger.store, "one", "zstd")
    for shard, column in enumerate(([None] * 3, [[], None, []], [[1], [2], None], [[], [], []])):
        add_column(writer, shard, "v", pa.array(column))
        commit(ledger, writer, shard)
    return ledger


fault = st.tuples(st.sampled_from(["crash", "lost answer", "race", "none"]), st.integers(1, 40))


@given(st.lists(fault, min_size=1, max_size=3), st.integers(1, 25))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_unify_survives_crashes_and_races(faults: list[tuple[str, int]], steps: int) -> None:
    with tempfile.TemporaryDirectory(prefix="types-") as folder:
        undecided(folder)
        for number, (kind, place) in enumerate(faults):
            store = Faulty(folder, CONFIG)

            def another(number: int = number) -> None:
                rival = Faulty(folder, CONFIG)
                rival.arm(steps, "crash")
                with contextlib.suppress(Crash):
                    end(Ledger(rival), f"rival{number}")

            if kind != "none":
                store.arm(place, another if kind == "race" else kind)
            with contextlib.suppress(Crash):
                end(Ledger(store), f"driver{number}")
            check_everything_is_there(folder)
        end(Ledger(Store(folder, CONFIG)), "last")
        found = verify(folder)
        assert (found.problems, found.uncommitted, found.finished) == ((), (), True)
        assert values(Path(folder)) == [None] * 3 + [[], None, []] + [[1], [2], None] + [[]] * 3
        assert read(Path(folder)).schema.field("v").type == pa.list_(pa.int64())


def check_everything_is_there(folder: str) -> None:
    """Check that the ledger names existing files, with each row once."""
    for made in Ledger(Store(folder, CONFIG)).commits():
        rows = [r for file in made.files for r in pq.read_table(Path(folder, file.path))["row"].to_pylist()]
        assert sorted(rows) == list(range(SIZE))


def test_retry_is_refused_while_files_are_written_again(tmp_path: Path) -> None:
    ledger = undecided(str(tmp_path))
    store = Faulty(str(tmp_path), CONFIG)
    for place in range(1, 60):
        store = Faulty(str(tmp_path), CONFIG)
        store.arm(place, "crash")
        with contextlib.suppress(Crash):
            end(Ledger(store), f"a{place}")
        last = ledger.retry()
        if last is not None and last.types:
            break
    assert last is not None and last.types and ledger.success_record() is None
    # A driver that takes it up does no row again, whatever has failed.
    commits = [dataclasses.replace(c, errors_by={"decode": {"TRUNCATED": 1}}) for c in ledger.commits()]
    assert select_rows(ledger, last, commits) == {}
    with pytest.raises(UserError, match="is not finished: files are still to be written again") as caught:
        start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="x")
    assert "batch-inference run" in caught.value.remedy
    end(ledger)
    assert verify(str(tmp_path)).problems == ()


# --- any types -----------------------------------------------------------------------------------------------------------

small = st.integers(-3, 3)
big = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([2**53 + 1, 2**31, 2**24 + 1, 255, -129])
fraction = st.sampled_from([0.0, 0.5, -1.0, 0.1, 1e300, float("nan"), float("inf"), 2.0**24 + 1])
single = fraction.map(lambda v: float(np.float32(v)) if abs(v) < 1e38 or v != v else 0.5)
text = st.sampled_from(["", "a", "é\n", "1"])
KINDS: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    (pa.int8(), small),
    (pa.int32(), small | st.integers(-(2**31), 2**31 - 1)),
    (pa.int64(), small | big),
    (pa.uint8(), st.integers(0, 255)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float32(), single),
    (pa.float64(), fraction),
    (pa.string(), text),
    (pa.large_string(), text),
    (pa.string_view(), text),
    (pa.dictionary(pa.int8(), pa.string()), text),
    (pa.binary(), st.binary(max_size=3)),
    (pa.list_(pa.null()), st.lists(st.none(), max_size=2)),
    (pa.list_(pa.int64()), st.lists(small | big | st.none(), max_size=3)),
    (pa.list_view(pa.int32()), st.lists(small, max_size=3)),
    (pa.list_(pa.float64()), st.lists(fraction, max_size=3)),
    (pa.list_(pa.float32(), 2), st.lists(single, min_size=2, max_size=2)),
    (pa.list_(pa.list_(pa.float32())), st.lists(st.lists(single, max_size=2), max_size=2)),
    (pa.list_(pa.list_(pa.null())), st.lists(st.just([]), max_size=2)),
    (pa.list_(pa.string()), st.lists(text | st.none(), max_size=2)),
    (pa.struct([]), st.just({})),
    (pa.struct([("s", pa.float32())]), st.fixed_dictionaries({"s": single})),
    (pa.struct([("s", pa.null()), ("t", pa.string())]), st.fixed_dictionaries({"s": st.none(), "t": text})),
    (pa.list_(pa.struct([("s", pa.float64()), ("t", pa.string())])),
     st.lists(st.fixed_dictionaries({"s": fraction, "t": text}), max_size=2)),
    (pa.date32(), st.dates()),
    (pa.timestamp("s"), st.datetimes(dt.datetime(1990, 1, 1), dt.datetime(2040, 1, 1)).map(lambda t: t.replace(microsecond=0))),
]  # fmt: skip


@dataclass
class Part:
    """A batch of a shard: its first row, and its columns; None if the predictor did not return the column."""

    start: int
    rows: int
    columns: dict[str, pa.Array]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[list[Part]], list[int], list[bool], set[tuple[int, int]]]:
    """Draw shards of batches, their order, where a new attempt starts, and rows that failed before."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))

    def column(rows: int) -> pa.Array:
        kind, value = draw(st.sampled_from(kinds))
        return pa.array(draw(st.lists(value | st.none(), min_size=rows, max_size=rows)), kind)

    shards = []
    for _ in range(draw(st.integers(1, 4))):
        cuts = sorted({0, SIZE, draw(st.integers(0, SIZE))})
        parts = []
        for start, stop in itertools.pairwise(cuts):
            names = draw(st.sampled_from([["a"], ["a", "b"], ["a"], ["b", "a"]]))
            parts.append(Part(start, stop - start, {name: column(stop - start) for name in names}))
        shards.append(parts)
    order = draw(st.permutations(range(len(shards))))
    bad = draw(st.sets(st.tuples(st.integers(0, len(shards) - 1), st.integers(0, SIZE - 1)), max_size=2))
    return shards, list(order), draw(st.lists(st.booleans(), min_size=len(shards), max_size=len(shards))), bad


def plain(value: Any) -> Any:
    """Return a value without keys that are null; a dict without values is None."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if plain(v) is not None} or None
    if isinstance(value, (list, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return value


@given(jobs())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_are_their_value_or_an_error_with_any_types(
    job: tuple[list[list[Part]], list[int], list[bool], set[tuple[int, int]]],
) -> None:
    shards, order, restarts, bad = job
    folder = Path(tempfile.mkdtemp(prefix="types-"))
    try:
        ledger, _ = planned(str(folder), uris_of(len(shards)), SIZE)
        writer = ShardWriter(ledger.store, "first", "zstd")
        for shard in order:
            if restarts[shard]:
                writer = ShardWriter(Store(str(folder), CONFIG), f"again{shard}", "zstd")
            for part in reversed(shards[shard]):
                writer.add(shard, batch(shard, part.start, part.columns))
            failures = [
                {"row": row, "stage": "decode", "error_type": "TRUNCATED", "message": "", "retryable": False}
                for s, row in sorted(bad)
                if s == shard
            ]
            assert ledger.commit(writer.write(shard, pa.Table.from_pylist(failures, ERRORS)))
        end(ledger)
        found = verify(str(folder))
        assert (found.problems, found.uncommitted) == ((), ())
        expected = dict(model(shards))
        lost = {(shard, row) for shard, row, kind, _ in errors_of(folder) if kind == "OUTPUT_MISMATCH"}
        assert {(shard, row) for shard, row, _, _ in errors_of(folder)} == lost | bad
        predicted = read(folder).to_pylist() if found.predictions else []
        assert {(r["shard"], r["row"]) for r in predicted} == expected.keys() - lost - bad
        for row in predicted:
            there = {name: plain(row.get(name)) for name in ("a", "b") if plain(row.get(name)) is not None}
            assert there == expected[row["shard"], row["row"]], row
        for shard, row, kind, message in errors_of(folder):
            assert kind != "OUTPUT_MISMATCH" or any(f"column {name!r}" in message for name in expected[shard, row])
        check_that_nothing_failed_without_need(shards, lost)
    finally:
        shutil.rmtree(folder)


def model(shards: list[list[Part]]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Return the expected rows: the predictor's values, None where it returned none."""
    for shard, parts in enumerate(shards):
        for part in parts:
            for place in range(part.rows):
                returned = {name: plain(array[place].as_py()) for name, array in part.columns.items()}
                yield (shard, part.start + place), {name: v for name, v in returned.items() if v is not None}


def errors_of(folder: Path) -> list[tuple[int, int, str, str]]:
    if not (folder / "errors").is_dir():
        return []
    table = ds.dataset(folder / "errors").to_table()
    return list(zip(*(table[name].to_pylist() for name in ("shard", "row", "error_type", "message")), strict=True))


def check_that_nothing_failed_without_need(shards: list[list[Part]], lost: set[tuple[int, int]]) -> None:
    """If all batches have the same columns of the same types, or no columns, every row fits."""
    every = [part.columns for parts in shards for part in parts]
    names = {tuple(sorted(columns)) for columns in every}
    types = {name: {c[name].type for c in every if name in c} - {pa.null()} for name in ("a", "b")}
    if len(names) == 1 and all(len(kinds) <= 1 for kinds in types.values()):
        assert lost == set()


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("signed", [True, False])
def test_integers_fit_up_to_their_ends(bits: int, signed: bool) -> None:
    target = getattr(pa, f"{'' if signed else 'u'}int{bits}")()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    for kind, ends in ((pa.int64(), (-(2**63), 2**63 - 1)), (pa.uint64(), (0, 2**64 - 1))):
        given = sorted({v for v in (low - 1, low, low + 1, high - 1, high, high + 1, *ends) if ends[0] <= v <= ends[1]})
        cast, ok = cast_values(pa.array(given, kind), target)
        assert cast.to_pylist() == [v if low <= v <= high else None for v in given]
        assert ok is None or ok.tolist() == [low <= v <= high for v in given]


@pytest.mark.parametrize(("target", "digits"), [(pa.float16(), 11), (pa.float32(), 24), (pa.float64(), 53)])
def test_integers_fit_into_fractions_that_have_them(target: pa.DataType, digits: int) -> None:
    given = [2**digits, 2**digits + 1, -(2**digits) - 1, 2**digits + 2, 2**63 - 1, -(2**63), None]
    cast, ok = cast_values(pa.array(given, pa.int64()), target)
    expected = [True, False, False, True, False, digits > 16, True]
    assert ok is not None and ok.tolist() == expected
    assert cast.to_pylist() == [v if fits else None for v, fits in zip(given, expected, strict=True)]


@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.data())
@settings(max_examples=200, deadline=None)
def test_cast_returns_the_value_or_reports_it(
    one: tuple[pa.DataType, Any], two: tuple[pa.DataType, Any], data: st.DataObject
) -> None:
    target = text_where_open(plain_type(two[0]))
    array = pa.array(data.draw(st.lists(one[1] | st.none(), max_size=5)), one[0])
    start = data.draw(st.integers(0, len(array)))
    cast, ok = cast_values(array.slice(start), target)
    assert cast.type == target and not is_open(target)
    cast.validate(full=True)
    fits = [True] * len(cast) if ok is None else ok.tolist()
    for before, after, fit_ in zip(array.slice(start).to_pylist(), cast.to_pylist(), fits, strict=True):
        if fit_:
            assert plain(after) == plain(before)
        else:
            assert plain(before) is not None


# --- columns of manifests ------------------------------------------------------------------------------------------------

PASSED_ON = [
    (pa.array(["a", None, "c"], pa.string_view()), pa.string()),
    (pa.array([b"a", None, b"c"], pa.binary_view()), pa.binary()),
    (pa.array([[1], None, []], pa.list_view(pa.int32())), pa.list_(pa.int32())),
    (pa.array([["a"], None, []], pa.large_list_view(pa.string_view())), pa.list_(pa.string())),
    (pa.array([["a"], None, []], pa.list_(pa.string_view())), pa.list_(pa.string())),
    (pa.array([{"a": "x"}, None, {"a": None}], pa.struct([("a", pa.string_view())])), pa.struct([("a", pa.string())])),
    (pa.nulls(3), pa.string()),
    (pa.array([[], None, []]), pa.list_(pa.string())),
    # As they are: Arrow can take them, and the others can read them.
    (pa.array(["a", None, "c"], pa.large_string()), pa.large_string()),
    (pa.array(["a", None, "c"]).dictionary_encode(), pa.dictionary(pa.int32(), pa.string())),
]


@pytest.mark.parametrize(("column", "expected"), PASSED_ON, ids=[str(column.type) for column, _ in PASSED_ON])
@pytest.mark.parametrize("older", [False, True])
def test_manifests_column_of_any_type_is_written_and_read(
    column: pa.Array, expected: pa.DataType, older: bool, tmp_path: Path
) -> None:
    """Views have no kernels, so the first file could not be written, after all the work was done."""
    table = pa.table({"uri": [f"s3://b/{place}.jpg" for place in range(3)], "v": column})
    pq.write_table(table, tmp_path / "m.parquet")
    config = JobConfig.model_validate(
        {"input": {"manifest": str(tmp_path / "m.parquet"), "sample": 3}, "shard_size": 3}
    )
    found = find.find_inputs(config).table
    assert found.schema.field("v").type == expected
    assert found["v"].to_pylist() == column.to_pylist()
    ledger = Ledger(Store(str(tmp_path / "out"), CONFIG))
    ledger.complete_manifest(ledger.create_job(found, job_of(found, 3), "one"))
    if older:
        stored = manifest.read_stored(ledger.store, 0)
        stored = stored.set_column(stored.column_names.index("v"), "v", column)
        pq.write_table(stored, tmp_path / "out/_manifest/shard-00000.parquet")
    assert manifest.read_shard(ledger.store, 0)["v"].to_pylist() == column.to_pylist()
    writer = ShardWriter(ledger.store, "one", "zstd")
    add_column(writer, 0, "x", pa.array([1, 2]))
    bad = [{"row": 2, "stage": "decode", "error_type": "TRUNCATED", "message": "", "retryable": False}]
    assert ledger.commit(writer.write(0, pa.Table.from_pylist(bad, ERRORS)))
    end(ledger)
    assert values(tmp_path / "out") == column.to_pylist()[:2]
    assert ds.dataset(tmp_path / "out/errors").to_table()["v"].to_pylist() == column.to_pylist()[2:]
    assert older or verify(str(tmp_path / "out")).problems == ()


def test_parts_of_a_manifest_may_have_other_views_and_a_part_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for number, column in enumerate((pa.array(["a"], pa.string_view()), pa.nulls(1), pa.array(["b"]))):
        pq.write_table(pa.table({"uri": [f"s3://b/{number}.jpg"], "v": column}), folder / f"{number}.parquet")
    config = JobConfig.model_validate({"input": {"manifest": str(folder)}})
    assert find.find_inputs(config).table["v"].to_pylist() == ["a", None, "b"]


def test_columns_of_files_of_images_pass_through_whatever_their_type(tmp_path: Path) -> None:
    for number, column in enumerate((pa.array(["a", "b"], pa.string_view()), pa.nulls(2))):
        pq.write_table(pa.table({"image": [b"1", b"2"], "v": column}), tmp_path / f"{number}.parquet")
    config = {"input": {"uris": [str(tmp_path / "*.parquet")], "passthrough_columns": ["v"], "sample": 4}}
    found = find.find_inputs(JobConfig.model_validate(config)).table
    assert found["v"].to_pylist() == ["a", "b", None, None]
    assert found.schema.field("v").type == pa.string()


# --- what verify says ----------------------------------------------------------------------------------------------------


def test_files_with_other_columns_are_named_with_both_types(tmp_path: Path) -> None:
    ledger = run(tmp_path, [1, 2, 3], [4, 5, 6])
    second = ledger.commits()[1].files[0]
    table = pq.read_table(tmp_path / second.path)
    for change, said in (
        (
            lambda t: t.set_column(3, "v", t["v"].cast(pa.float64())),
            "the column 'v' is double, in _schema.json it is int64",
        ),
        (lambda t: t.drop_columns(["v"]), "has no column 'v', which is int64 in _schema.json"),
        (lambda t: t.append_column("w", t["uri"]), "has a column 'w' (string), which is not in _schema.json"),
    ):
        pq.write_table(change(table), tmp_path / second.path)
        found = [problem for problem in verify(str(tmp_path)).problems if "SHA-256" not in problem]
        assert len(found) == 1 and found[0].startswith(second.path) and found[0].endswith(said)
    ledger.store.delete([SCHEMA_PATH])
    assert any("which is not in the first file of predictions" in problem for problem in verify(str(tmp_path)).problems)


def test_unfinished_output_may_have_columns_without_a_type(tmp_path: Path) -> None:
    undecided(str(tmp_path))
    found = verify(str(tmp_path))
    assert (found.problems, found.finished) == ((), False)
