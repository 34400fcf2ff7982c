"""Tables that an actor predicts in parts, and notes that wait for a row that can carry them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batch_inference.config import PredictorConfig
from batch_inference.models import batch_size
from batch_inference.pipeline import actor as pipeline_actor
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.factories import CustomFactory
from batch_inference.pipeline.result_rows import notes
from tests.support.batches import errors, image, prepared


def actor(call: Any) -> InferenceActor:
    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> Any:
            return call(batch)

    return InferenceActor(CustomFactory(Predictor, PredictorConfig(path="m:Predictor", depends_on_batch=True)), [])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_of_all_parts_come_back(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch_size, pipeline_actor):
        monkeypatch.setattr(module, "MAX_BATCH_BYTES", 36)
    calls: list[int] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(len(batch["image"]))
        return {"first": [int(i[0, 0, 0]) for i in batch["image"]]}

    table = actor(call)(prepared([image(number) for number in range(2 * parts)]))
    assert table["first"].to_pylist() == list(range(2 * parts))
    assert table["row"].to_pylist() == list(range(2 * parts))
    assert calls == [2] * parts


def test_note_waits_for_a_row_that_has_not_failed() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        first = np.array([float(i[0, 0, 0]) for i in batch["image"]])
        # One value for two images, and of some no finite one.
        return {"confidence": np.where(first < 5, np.nan, first)[:1]}

    mine = actor(call)
    table = mine(prepared([image(1), image(2)]))
    assert errors(table) == [("infer", "NOT_FINITE")] * 2
    assert notes(table) == []
    for _ in range(2):
        assert notes(mine(prepared([image(3)]))) == []
    (note,) = notes(mine(prepared([image(4), image(7)])))
    assert "predicts each image alone" in note
    assert notes(mine(prepared([image(8)]))) == []


class Recorder:
    """Metrics of an actor."""

    def __init__(self) -> None:
        self.added: list[tuple[str, float]] = []

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self.added.append((name, value))

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.added.append((name, value))


def test_metrics_of_an_actor_begin_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(pipeline_actor, "meter", recorder)
    mine = actor(lambda batch: {"x": [1] * len(batch["image"])})
    assert recorder.added == [("actor_busy_seconds", 0), ("out_of_memory_splits", 0)]
    recorder.added.clear()
    mine(prepared([("fetch", "TIMEOUT")]))
    assert recorder.added == []
    mine(prepared([image(1), ("fetch", "TIMEOUT")]))
    (busy, seconds), (fill, share) = recorder.added
    assert (busy, fill, share) == ("actor_busy_seconds", "batch_fill", 1.0)
    assert 0 <= seconds < 60


def test_class_that_is_asked_for_single_images_is_not_compared_in_batches() -> None:
    """The comparison would take its answers, which are mixed up, for rows that depend on each other."""
    calls: list[int] = []

    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            calls.append(len(batch["image"]))
            return {"x": [int(i[0, 0, 0]) for i in batch["image"] if i[0, 0, 0] != 3]}

    mine = InferenceActor(CustomFactory(Predictor, PredictorConfig(path="m:Predictor")), [])
    table = mine(prepared([image(number) for number in range(6)]))
    assert table["x"].to_pylist() == [0, 1, 2, None, 4, 5]
    assert calls == [6] + [1] * 6
    assert mine.rows_check is None


def test_table_without_rows_comes_back_without_rows() -> None:
    mine = actor(lambda batch: pytest.fail("called"))
    assert mine(prepared([])).num_rows == 0
