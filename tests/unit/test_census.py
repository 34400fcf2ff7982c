"""What a report counts over the committed files, against the same counted one by one."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_inference import census as module
from batch_inference.census import BINS, Census, take
from batch_inference.ledger import Commit
from batch_inference.storage import Store
from batch_inference.writer import ShardWriter
from tests.unit import outputs

LABELS = ["cat", "dog", "", "<script>", None]
rows_of_a_shard = st.lists(
    st.tuples(
        st.sampled_from(LABELS), st.one_of(st.none(), st.just(math.nan), st.floats(-0.5, 1.5, width=32), st.just(1.0))
    ),
    min_size=1,
    max_size=12,
)


def table_of(shard: int, rows: list[tuple[Any, Any]]) -> pa.Table:
    return pa.table(
        {
            "shard": pa.array([shard] * len(rows), pa.int32()),
            "row": pa.array(range(len(rows)), pa.int32()),
            "label": pa.array([label for label, _ in rows], pa.string()),
            "confidence": pa.array([c for _, c in rows], pa.float32(), from_pandas=False),
        }
    )


@settings(max_examples=150)
@given(st.lists(rows_of_a_shard, min_size=1, max_size=8), st.integers(0, 6), st.randoms(use_true_random=False))
def test_counts_are_those_of_counting_one_by_one_in_whatever_order_files_come(
    shards: list[list[tuple[Any, Any]]], most: int, shuffler: random.Random
) -> None:
    census = Census(most)
    order = list(range(len(shards)))
    shuffler.shuffle(order)
    for shard in order:
        census.add(table_of(shard, shards[shard]))
    everything = [
        (shard, row, label, confidence)
        for shard, rows in enumerate(shards)
        for row, (label, confidence) in enumerate(rows)
    ]
    assert census.rows == len(everything)
    assert census.classes == Counter("" if label is None else label for _, _, label, _ in everything)
    known = [(s, r, float(np.float32(c))) for s, r, _, c in everything if c is not None and not math.isnan(c)]
    bins = [0] * BINS
    for _, _, value in known:
        if 0 <= value <= 1:
            bins[min(BINS - 1, math.floor(value * BINS))] += 1
    assert census.confidences is not None
    assert census.confidences.tolist() == bins
    assert census.outside == sum(not 0 <= value <= 1 for _, _, value in known)
    numbers = census.numbers["confidence"]
    assert (numbers.count, numbers.missing) == (len(known), len(everything) - len(known))
    if known:
        values = [value for _, _, value in known]
        assert (numbers.least, numbers.most) == (min(values), max(values))
        assert numbers.mean == pytest.approx(sum(values) / len(values))
    best = sorted(known, key=lambda one: (-one[2], one[0], one[1]))[:most]
    worst = sorted(known, key=lambda one: (one[2], one[0], one[1]))[:most]
    assert [(s.shard, s.row, s.confidence) for s in census.highest] == best
    assert [(s.shard, s.row, s.confidence) for s in census.lowest] == worst


def classified(folder: Path, shards: int, rows: int, *, wide: int = 0) -> tuple[Store, list[Commit], list[pa.Table]]:
    """A finished output with labels and confidences, and what is in it."""
    uris = [f"s3://b/{i:05d}.jpg" for i in range(shards * rows)]
    ledger, _ = outputs.planned(str(folder), uris, rows)
    rng = np.random.default_rng(7)
    commits, tables = [], []
    for shard in range(shards):
        table = table_of(
            shard, [(f"class {c}", float(p)) for c, p in zip(rng.zipf(1.6, rows) % 50, rng.random(rows), strict=True)]
        )
        if wide:
            values = pa.array(rng.random(rows * wide), pa.float32())
            table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, wide))
        writer = ShardWriter(ledger.store, "first", "zstd")
        writer.add(shard, table)
        errors = outputs.write(ledger.store, shard, "none")[1].slice(0, 0)
        commit = writer.close(shard, errors)
        assert ledger.commit(commit)
        commits.append(commit)
        tables.append(table)
    return ledger.store, commits, tables


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    store, commits, tables = classified(tmp_path, 30, 40)
    found = take(store, commits, most=5)
    whole = pa.concat_tables(tables)
    assert (found.rows, found.files, found.files_read, found.whole) == (1200, 30, 30, True)
    assert found.classes == Counter(whole["label"].to_pylist())
    assert found.highest[0].confidence == max(whole["confidence"].to_pylist())
    assert found.lowest[0].text.startswith("class ")
    assert [(c.name, c.type, c.shape) for c in found.columns] == [("label", "string", ""), ("confidence", "float", "")]
    assert found.class_column == "label"


def test_of_wide_columns_nothing_is_fetched_but_the_shape_of_one_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, commits, _ = classified(tmp_path, 3, 500, wide=2048)
    size = sum(file.bytes for commit in commits for file in commit.files)
    assert size > 9_000_000
    fetched: list[int] = []
    get_range = Store.get_range

    def counted(self: Store, path: str, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return get_range(self, path, start, end)

    monkeypatch.setattr(Store, "get_range", counted)
    monkeypatch.setattr(Store, "get", None)
    monkeypatch.setattr(module, "_columns", lambda *args: [])
    found = take(store, commits, most=3)
    assert found.rows == 1500
    assert set(found.numbers) == {"confidence"}
    assert sum(fetched) < size / 20
    monkeypatch.undo()
    assert take(store, commits, most=3).columns[-1] == module.Column(
        "embedding", "fixed_size_list<float>[2048]", "2048"
    )


def test_past_the_deadline_the_sample_says_of_how_many_it_is(tmp_path: Path) -> None:
    store, commits, _ = classified(tmp_path, 40, 10)
    ticks = iter(range(1000))
    found = take(store, commits, most=5, deadline=10, clock=lambda: float(next(ticks)))
    assert 1 <= found.files_read < 40
    assert (found.files, found.whole, found.rows) == (40, False, 10 * found.files_read)
    assert take(store, commits, most=5, deadline=-1.0).files_read == 1


def test_memory_and_samples_do_not_grow_with_the_texts_of_a_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CLASSES", 50)
    census = Census(4)
    for shard in range(10):
        census.add(table_of(shard, [(f"{shard}-{row} " + "x" * 5000, 0.5) for row in range(20)]))
    assert census.too_many_classes
    assert not census.classes
    assert census.rows == 200
    assert [(s.shard, s.row) for s in census.highest] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert max(len(s.text) for s in census.highest) <= 200


def test_columns_of_predictors_without_confidence(tmp_path: Path) -> None:
    ledger, _ = outputs.finished(str(tmp_path), [f"s3://b/{i}.jpg" for i in range(25)], 10)
    found = take(ledger.store, ledger.commits(), most=4)
    assert found.confidences is None
    assert not found.class_column
    assert found.numbers["value"].count == 25
    values = [outputs.value_of(f"s3://b/{i}.jpg") for i in range(25)]
    assert (found.numbers["value"].least, found.numbers["value"].most) == (min(values), max(values))
    assert len(found.some) == 4
    assert found.some[0].text.startswith("value ")


def test_class_numbers_count_where_there_are_no_labels() -> None:
    census = Census(2)
    place = {"shard": pa.array([0, 0, 0], pa.int32()), "row": pa.array([0, 1, 2], pa.int32())}
    census.add(pa.table({**place, "predicted_class_idx": pa.array([7, 7, 1], pa.int64())}))
    assert census.class_column == "predicted_class_idx"
    assert census.classes == {"7": 2, "1": 1}
    assert [one.text for one in census.some] == ["class 7", "class 7"]


def test_columns_from_the_manifest_are_not_the_predictors(tmp_path: Path) -> None:
    store, commits, _ = classified(tmp_path, 1, 5)
    assert [c.name for c in take(store, commits, most=1, passthrough=("label",)).columns] == ["confidence"]


def test_an_output_without_predictions_has_an_empty_census(tmp_path: Path) -> None:
    ledger, _ = outputs.finished(str(tmp_path), [f"s3://b/bad-{i}.jpg" for i in range(5)], 10)
    found = take(ledger.store, ledger.commits(), most=4)
    assert (found.rows, found.files, found.columns) == (0, 0, [])


def test_a_committed_file_that_is_gone_is_named(tmp_path: Path) -> None:
    store, commits, _ = classified(tmp_path, 2, 5)
    store.delete([commits[1].files[0].path])
    with pytest.raises(FileNotFoundError, match="shard-00001"):
        take(store, commits, most=1)
