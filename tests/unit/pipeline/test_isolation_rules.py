"""The predictor that isolates failures, by itself: notes, memory, and values that are not finite."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_inference.errors import InfrastructureError, RowError
from batch_inference.models.columns import WrongCountError
from batch_inference.pipeline import isolation
from batch_inference.pipeline.isolation import IsolatingPredictor
from tests.support.batches import image

URIS = [f"s3://b/{index}.jpg" for index in range(8)]


def predict(call: Any, count: int = 4) -> tuple[IsolatingPredictor, dict[int, str], list[Any] | None]:
    """Predict images 0, 1, … by a function of their numbers; return the errors by index, and the values of the others."""

    def function(images: Any, uris: list[str]) -> pa.Table:
        answer = call([int(i[0, 0, 0]) for i in images])
        return answer if isinstance(answer, pa.Table) else pa.table({"x": answer})

    mine = IsolatingPredictor(function)
    failures, table = mine.predict([image(index) for index in range(count)], URIS[:count])
    values = None if table is None else table[table.column_names[0]].to_pylist()
    return mine, {index: failure.error_type for index, failure in failures.items()}, values


def test_class_that_never_gives_the_right_number_leaves_no_note() -> None:
    """Nothing is slow of which nothing comes."""

    def call(numbers: list[int]) -> Any:
        raise WrongCountError("x", 0, len(numbers))

    mine, failures, values = predict(call)
    assert (set(failures.values()), values) == ({"OUTPUT_MISMATCH"}, None)
    assert mine.one_at_a_time
    assert mine.take_note() == ""


def test_note_is_taken_once() -> None:
    def call(numbers: list[int]) -> Any:
        if len(numbers) > 1:
            raise WrongCountError("x", 1, len(numbers))
        return numbers

    mine, failures, values = predict(call)
    assert (failures, values) == ({}, [0, 1, 2, 3])
    assert mine.take_note().startswith("from now on an actor predicts each image alone")
    assert mine.take_note() == ""


@pytest.mark.parametrize("bad", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_halves_find_each_image_that_fails(bad: list[int]) -> None:
    calls: list[list[int]] = []

    def call(numbers: list[int]) -> Any:
        calls.append(numbers)
        if set(numbers) & set(bad):
            raise RowError("infer", "PREDICTOR_ERROR", "no")
        return numbers

    _, failures, values = predict(call)
    assert failures == dict.fromkeys(bad, "PREDICTOR_ERROR")
    assert values == ([index for index in range(4) if index not in bad] or None)
    assert calls[0] == [0, 1, 2, 3]
    assert calls[1] == [0, 1]


def test_no_images_are_no_call() -> None:
    assert predict(lambda numbers: pytest.fail("called"), 0)[1:] == ({}, None)


@pytest.mark.parametrize(
    ("message", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: out of memory", False),
        ("out of memory", False),
        ("device-side assert", False),
    ],
)
def test_cuda_error_ends_the_job_unless_memory_ran_out(message: str, fatal: bool) -> None:
    def call(numbers: list[int]) -> Any:
        raise RuntimeError(message)

    if fatal:
        with pytest.raises(InfrastructureError, match="a GPU does not work any more"):
            predict(call)
    else:
        assert set(predict(call)[1]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("initialized", "message", "emptied"),
    [
        (True, "CUDA out of memory", 2),
        (False, "CUDA out of memory", 0),
        (True, "no", 0),
        (None, "CUDA out of memory", 0),
    ],
)
def test_memory_of_the_gpu_is_released_after_it_ran_out(
    initialized: bool | None, message: str, emptied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    calls: list[str] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: initialized,
        empty_cache=lambda: calls.append("emptied"),
        OutOfMemoryError=OutOfMemoryError,
    )
    fake = SimpleNamespace(cuda=cuda, OutOfMemoryError=OutOfMemoryError)
    # None: the process has no torch.
    monkeypatch.setitem(sys.modules, "torch", fake if initialized is not None else None)

    def call(numbers: list[int]) -> Any:
        if len(numbers) > 1 or numbers == [1]:
            raise OutOfMemoryError(message) if "memory" in message else RuntimeError(message)
        return numbers

    mine = IsolatingPredictor(lambda images, uris: pa.table({"x": call([int(i[0, 0, 0]) for i in images])}))
    failures, table = mine.predict([image(0), image(1)], URIS[:2])
    assert table is not None and table["x"].to_pylist() == [0]
    assert {index: (failure.error_type, failure.retryable) for index, failure in failures.items()} == {
        1: ("OUT_OF_MEMORY", True) if "memory" in message else ("PREDICTOR_ERROR", False)
    }
    assert len(calls) == emptied


def test_only_floating_confidences_are_checked() -> None:
    nan = float("nan")
    assert predict(lambda n: pa.table({"confidence": [0.5, nan, np.inf, 1.0]}))[1] == dict.fromkeys(
        (1, 2), "NOT_FINITE"
    )
    assert predict(lambda n: pa.table({"confidence": ["a", "b", "c", "d"]}))[1] == {}
    assert predict(lambda n: pa.table({"other": [nan] * 4}))[1] == {}


def test_vectors_are_finite_or_null_or_errors() -> None:
    nan = float("nan")

    def vectors(values: list[Any], arrow_type: Any = None) -> Any:
        return lambda n: pa.table({"embedding": pa.array(values, arrow_type or pa.list_(pa.float32(), 2))})

    assert predict(vectors([[1, 2], [1, nan], None, [3, 4]]))[1] == {1: "NOT_FINITE"}
    assert predict(vectors([None, [nan, 1], [1, 2], [nan, nan]]))[1] == dict.fromkeys((1, 3), "NOT_FINITE")
    assert predict(vectors([[1, 2]] * 4, pa.list_(pa.int32(), 2)))[1] == {}
    assert predict(vectors([[1, nan]] * 4, pa.list_(pa.float32())))[1] == {}


def test_image_with_several_values_is_its_own_failure_as_long_as_no_other_has_one() -> None:
    def call(numbers: list[int]) -> Any:
        if numbers == [0]:
            return pa.table({"confidence": [float("nan")]})
        raise WrongCountError("confidence", 2 * len(numbers), len(numbers))

    mine, failures, values = predict(call, 2)
    assert failures == {0: "NOT_FINITE", 1: "OUTPUT_MISMATCH"}
    assert not values
    assert mine.take_note() != ""


@pytest.mark.parametrize(("message", "splits"), [("CUDA out of memory", ["out_of_memory_splits"] * 3), ("no", [])])
def test_only_batches_that_ran_out_of_memory_are_counted(
    message: str, splits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []
    monkeypatch.setattr(isolation, "meter", SimpleNamespace(add=added.append))

    def call(numbers: list[int]) -> Any:
        raise RuntimeError(message)

    assert len(predict(call)[1]) == 4
    assert added == splits
