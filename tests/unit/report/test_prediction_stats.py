"""The statistics over the committed files, against a count of row by row."""

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

from batch_inference.report import prediction_stats as module
from batch_inference.report.prediction_stats import BINS, PredictionStats, collect_stats
from batch_inference.storage.store import Store
from tests.support import outputs
from tests.support.prediction_tables import classified, table_of

LABELS = ["cat", "dog", "", "<script>", None]
rows_of_a_shard = st.lists(
    st.tuples(
        st.sampled_from(LABELS), st.one_of(st.none(), st.just(math.nan), st.floats(-0.5, 1.5, width=32), st.just(1.0))
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150)
@given(st.lists(rows_of_a_shard, min_size=1, max_size=8), st.integers(0, 6), st.randoms(use_true_random=False))
def test_counts_do_not_depend_on_the_order_of_files(
    shards: list[list[tuple[Any, Any]]], max_samples: int, shuffler: random.Random
) -> None:
    stats = PredictionStats(max_samples)
    order = list(range(len(shards)))
    shuffler.shuffle(order)
    for shard in order:
        stats.add(table_of(shard, shards[shard]))
    everything = [
        (shard, row, label, confidence)
        for shard, rows in enumerate(shards)
        for row, (label, confidence) in enumerate(rows)
    ]
    assert stats.rows == len(everything)
    assert stats.classes == Counter("" if label is None else label for _, _, label, _ in everything)
    confidences = [(s, r, float(np.float32(c))) for s, r, _, c in everything if c is not None and not math.isnan(c)]
    bins = [0] * BINS
    for _, _, value in confidences:
        if 0 <= value <= 1:
            bins[min(BINS - 1, math.floor(value * BINS))] += 1
    assert stats.confidence_counts is not None
    assert stats.confidence_counts.tolist() == bins
    assert stats.confidences_out_of_range == sum(not 0 <= value <= 1 for _, _, value in confidences)
    numbers = stats.numbers["confidence"]
    assert (numbers.count, numbers.missing) == (len(confidences), len(everything) - len(confidences))
    if confidences:
        values = [value for _, _, value in confidences]
        assert (numbers.minimum, numbers.maximum) == (min(values), max(values))
        assert numbers.mean == pytest.approx(sum(values) / len(values))
    best = sorted(confidences, key=lambda sample: (-sample[2], sample[0], sample[1]))[:max_samples]
    worst = sorted(confidences, key=lambda sample: (sample[2], sample[0], sample[1]))[:max_samples]
    assert [(s.shard, s.row, s.confidence) for s in stats.highest] == best
    assert [(s.shard, s.row, s.confidence) for s in stats.lowest] == worst


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    store, commits, tables = classified(tmp_path, 30, 40)
    stats = collect_stats(store, commits, max_samples=5)
    expected = pa.concat_tables(tables)
    assert (stats.rows, stats.files, stats.files_read, stats.complete) == (1200, 30, 30, True)
    assert stats.classes == Counter(expected["label"].to_pylist())
    assert stats.highest[0].confidence == max(expected["confidence"].to_pylist())
    assert stats.lowest[0].text.startswith("class ")
    assert [(c.name, c.type, c.shape) for c in stats.columns] == [("label", "string", ""), ("confidence", "float", "")]
    assert stats.class_column == "label"


def test_wide_columns_are_not_fetched_except_for_the_shape_of_one_value(
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
    monkeypatch.setattr(module, "_describe_columns", lambda *args: [])
    stats = collect_stats(store, commits, max_samples=3)
    assert stats.rows == 1500
    assert set(stats.numbers) == {"confidence"}
    assert sum(fetched) < size / 20
    monkeypatch.undo()
    assert collect_stats(store, commits, max_samples=3).columns[-1] == module.PredictionColumn(
        "embedding", "fixed_size_list<float>[2048]", "2048"
    )


def test_statistics_after_the_deadline_say_how_many_files_they_are_from(tmp_path: Path) -> None:
    store, commits, _ = classified(tmp_path, 40, 10)
    ticks = iter(range(1000))
    stats = collect_stats(store, commits, max_samples=5, deadline=10, clock=lambda: float(next(ticks)))
    assert 1 <= stats.files_read < 40
    assert (stats.files, stats.complete, stats.rows) == (40, False, 10 * stats.files_read)
    assert collect_stats(store, commits, max_samples=5, deadline=-1.0).files_read == 1


def test_memory_and_samples_do_not_grow_with_the_texts_of_a_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLASSES", 50)
    stats = PredictionStats(4)
    for shard in range(10):
        stats.add(table_of(shard, [(f"{shard}-{row} " + "x" * 5000, 0.5) for row in range(20)]))
    assert stats.too_many_classes
    assert not stats.classes
    assert stats.rows == 200
    assert [(s.shard, s.row) for s in stats.highest] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert max(len(s.text) for s in stats.highest) <= 200


def test_predictor_without_confidence_has_columns_and_samples(tmp_path: Path) -> None:
    ledger, _ = outputs.finished(str(tmp_path), [f"s3://b/{i}.jpg" for i in range(25)], 10)
    stats = collect_stats(ledger.store, ledger.commits(), max_samples=4)
    assert stats.confidence_counts is None
    assert not stats.class_column
    assert stats.numbers["value"].count == 25
    values = [outputs.value_of(f"s3://b/{i}.jpg") for i in range(25)]
    assert (stats.numbers["value"].minimum, stats.numbers["value"].maximum) == (min(values), max(values))
    assert len(stats.samples) == 4
    assert stats.samples[0].text.startswith("value ")


def test_class_numbers_are_counted_without_labels() -> None:
    stats = PredictionStats(2)
    row_columns = {"shard": pa.array([0, 0, 0], pa.int32()), "row": pa.array([0, 1, 2], pa.int32())}
    stats.add(pa.table({**row_columns, "predicted_class_idx": pa.array([7, 7, 1], pa.int64())}))
    assert stats.class_column == "predicted_class_idx"
    assert stats.classes == {"7": 2, "1": 1}
    assert [sample.text for sample in stats.samples] == ["class 7", "class 7"]


def test_columns_of_the_manifest_are_left_out(tmp_path: Path) -> None:
    store, commits, _ = classified(tmp_path, 1, 5)
    assert [c.name for c in collect_stats(store, commits, max_samples=1, passthrough=("label",)).columns] == [
        "confidence"
    ]


def test_output_without_predictions_has_empty_statistics(tmp_path: Path) -> None:
    ledger, _ = outputs.finished(str(tmp_path), [f"s3://b/bad-{i}.jpg" for i in range(5)], 10)
    stats = collect_stats(ledger.store, ledger.commits(), max_samples=4)
    assert (stats.rows, stats.files, stats.columns) == (0, 0, [])


def test_missing_committed_file_is_named(tmp_path: Path) -> None:
    store, commits, _ = classified(tmp_path, 2, 5)
    store.delete([commits[1].files[0].path])
    with pytest.raises(FileNotFoundError, match="shard-00001"):
        collect_stats(store, commits, max_samples=1)
