from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from batch_inference.config import PredictorConfig, StorageConfig
from batch_inference.errors import BatchInferenceError, InfrastructureError, RowError, UserError
from batch_inference.models import batch_size
from batch_inference.output.journal import CrashJournal
from batch_inference.output.schema import split_duplicate_columns
from batch_inference.pipeline import actor as pipeline_actor
from batch_inference.pipeline import datasource, isolation
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.crash_guard import CrashGuard, JournalConfig
from batch_inference.pipeline.factories import (
    CLASSIFIER_SCHEMA,
    CustomFactory,
    EmbedderFactory,
    Predict,
    _classifier_table,
    _label_array,
)
from batch_inference.pipeline.schemas import RESULT_SCHEMA, raise_if_fatal
from batch_inference.storage.store import Store
from tests.support.batches import errors, image, prepared

Call = Callable[[dict[str, Any]], Any]
# The first pixel says which image it is.
POISON = 200


@pytest.fixture(autouse=True)
def deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exceptions through that stand for the death of a process; those of a class would become failed rows."""
    monkeypatch.setattr(isolation, "PREDICTOR_EXCEPTIONS", (Exception,))


def actor(call: Call, **options: Any) -> InferenceActor:
    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> Any:
            return call(batch)

    return InferenceActor(CustomFactory(Predictor, PredictorConfig(path="m:Predictor", **options)), [])


def driver_gets(mine: InferenceActor, table: pa.Table) -> pa.Table:
    """Return the rows that a call gives the driver, or raise what ends the job."""
    result = mine(table)
    raise_if_fatal(result)
    return result


def predict(call: Call, items: list[Any], depends_on_batch: bool = False, **options: Any) -> pa.Table:
    table = driver_gets(actor(call, depends_on_batch=depends_on_batch), prepared(items, **options))
    assert table.num_rows == len(items)
    assert table.schema.names[: len(RESULT_SCHEMA)] == RESULT_SCHEMA.names
    assert table["row"].to_pylist() == list(range(len(items)))
    return table


def first_pixels(batch: dict[str, Any]) -> np.ndarray:
    return np.array([i[0, 0, 0] for i in batch["image"]])


# --- what a predictor is given -------------------------------------------------------------------------------------------


def test_batch_is_what_ray_data_gives() -> None:
    seen: list[dict[str, Any]] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(batch)
        return {"first": first_pixels(batch)}

    assert predict(call, [image(1), image(2)])["first"].to_pylist() == [1, 2]
    same = seen[0]
    assert sorted(same) == ["image", "uri"]
    assert (same["image"].shape, same["image"].dtype) == ((2, 2, 3, 3), np.uint8)
    assert same["uri"].tolist() == ["s3://b/0.jpg", "s3://b/1.jpg"]
    seen.clear()
    assert predict(call, [image(1, (4, 5)), image(2, (6, 7)), image(3, (4, 5))])["first"].to_pylist() == [1, 2, 3]
    different = seen[0]["image"]
    assert different.dtype == object
    assert [i.shape for i in different] == [(4, 5, 3), (6, 7, 3), (4, 5, 3)]
    assert all(i.dtype == np.uint8 for i in different)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_rows_that_failed_before_pass_through_untouched(chunks: int) -> None:
    failed = [("list", "INVALID_URI"), ("fetch", "TIMEOUT"), ("decode", "TRUNCATED"), ("preprocess", "UNEXPECTED")]
    items = [failed[0], image(10), failed[1], failed[2], image(20), failed[3]]
    table = predict(lambda b: {"first": first_pixels(b)}, items, chunks=chunks)
    assert errors(table) == [failed[0], None, failed[1], failed[2], None, failed[3]]
    assert table["message"].to_pylist()[2] == "it was TIMEOUT"
    assert table["retryable"].to_pylist() == [False, False, True, False, False, False]
    assert table["first"].to_pylist() == [None, 10, None, None, 20, None]
    assert table["bytes"].to_pylist() == [100 + i for i in range(6)]
    assert table["shard"].to_pylist() == [7] * 6
    assert [t > 0 for t in table["infer_s"].to_pylist()] == [False, True, False, False, True, False]
    assert set(table["fetch_s"].to_pylist()) == {1.0}
    assert set(table["decode_s"].to_pylist()) == {2.0}
    assert table["retries"].to_pylist() == list(range(table.num_rows))


def test_predictor_is_not_called_without_an_image() -> None:
    def call(batch: dict[str, Any]) -> Any:
        raise AssertionError

    table = predict(call, [("fetch", "NOT_FOUND")] * 3)
    assert errors(table) == [("fetch", "NOT_FOUND")] * 3
    assert table.schema.names[len(RESULT_SCHEMA) :] == CLASSIFIER_SCHEMA.names


# --- one image costs no other its row ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[0], [31], [5, 6], [0, 31], list(range(0, 32, 2)), list(range(32))])
def test_images_that_the_predictor_fails_on_cost_no_other_its_row(bad: list[int]) -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        firsts = first_pixels(batch)
        if (firsts >= POISON).any():
            raise ValueError("poisoned\nbatch")
        return {"first": firsts.astype(np.int64), "uri_seen": batch["uri"].tolist()}

    items = [image(POISON + 1) if i in bad else image(i) for i in range(32)]
    items[7 if 7 not in bad else 9] = ("decode", "CORRUPT")  # type: ignore[call-overload]
    table = predict(call, items)
    for row, error in enumerate(errors(table)):
        if isinstance(items[row], tuple):
            assert error == items[row]
        elif row in bad:
            assert error == ("infer", "PREDICTOR_ERROR")
            assert table["message"][row].as_py() == "ValueError: poisoned batch"
        else:
            assert error is None
    if len(bad) < 32:
        first, uris = table["first"].to_pylist(), table["uri_seen"].to_pylist()
        good = [r for r in range(32) if r not in bad and not isinstance(items[r], tuple)]
        assert [first[r] for r in good] == good
        assert [uris[r] for r in good] == [f"s3://b/{r}.jpg" for r in good]
        assert all(first[r] is None for r in range(32) if r not in good)


def test_good_batch_is_predicted_at_once() -> None:
    sizes: list[int] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        sizes.append(len(batch["image"]))
        return {"v": first_pixels(batch)}

    mine = actor(call)
    for start in (0, 32, 64):
        driver_gets(mine, prepared([image(start + i) for i in range(32)]))
    # In between, a few images of the first batch are predicted alone and in other batches, once.
    assert (sizes[0], sizes[-2:]) == (32, [32, 32])
    assert sorted(sizes[1:-2]) == [1] * 8 + [4] * 4
    sizes.clear()
    driver_gets(actor(call, depends_on_batch=True), prepared([image(i) for i in range(32)]))
    assert sizes == [32]


def test_failure_that_names_its_stage_keeps_it() -> None:
    def call(batch: dict[str, Any]) -> Any:
        raise RowError("preprocess", "TOO_SMALL", "no face", retryable=True)

    table = predict(call, [image(1)])
    assert errors(table) == [("preprocess", "TOO_SMALL")]
    assert table["retryable"].to_pylist() == [True]


@pytest.mark.parametrize("exc", [UserError("wrong weights", "Fix."), InfrastructureError("disk full", "Again.")])
def test_exception_that_ends_the_job_is_not_a_failed_row(exc: BatchInferenceError) -> None:
    def call(batch: dict[str, Any]) -> Any:
        raise exc

    with pytest.raises(type(exc)) as caught:
        predict(call, [image(1), image(2)])
    assert type(caught.value) is type(exc)
    assert (caught.value.message, caught.value.remedy) == (exc.message, exc.remedy)


def test_broken_gpu_ends_the_attempt_and_out_of_memory_halves_the_batch() -> None:
    def broken(batch: dict[str, Any]) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(InfrastructureError, match=r"a GPU does not work any more: .*illegal memory access"):
        predict(broken, [image(1), image(2)])

    def small(batch: dict[str, Any]) -> Any:
        if len(batch["image"]) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return {"v": first_pixels(batch)}

    assert predict(small, [image(i) for i in range(8)])["v"].to_pylist() == list(range(8))


def test_columns_of_several_types_in_parts_of_a_batch_come_back_beside_each_other() -> None:
    """Which of the types is the job's is known where the shard is closed."""

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        firsts = first_pixels(batch)
        if len(firsts) > 1:
            raise ValueError
        return {"v": [1] if firsts[0] else ["text"]}

    table = actor(call)(prepared([image(0), image(1)]))
    assert table["error_type"].null_count == 2
    assert [row["v"] for part in split_duplicate_columns(table) for row in part.to_pylist()] == ["text", 1]


# --- what a predictor returns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda n: [1, 2, 3][:n], [1, 2, 3]),
        (lambda n: tuple("abc"[:n]), ["a", "b", "c"]),
        (lambda n: np.arange(n, dtype=np.int16), [0, 1, 2]),
        (lambda n: np.array(["a", "bb", "c"])[:n], ["a", "bb", "c"]),
        (lambda n: np.array([True, False, True])[:n], [True, False, True]),
        (lambda n: np.arange(n * 2).reshape(n, 2), [[0, 1], [2, 3], [4, 5]]),
        (lambda n: np.arange(n * 4.0).reshape(n, 2, 2), [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]),
        (
            lambda n: np.arange(n * 6).reshape(n, 2, 3)[:, :, ::2],
            [[[0, 2], [3, 5]], [[6, 8], [9, 11]], [[12, 14], [15, 17]]],
        ),
        (
            lambda n: np.arange(n * 6).reshape(n, 1, 2, 3),
            [[[[i, i + 1, i + 2], [i + 3, i + 4, i + 5]]] for i in (0, 6, 12)],
        ),
        (lambda n: np.arange(n * 2).reshape(2, n).T, [[0, 3], [1, 4], [2, 5]]),
        (lambda n: np.zeros((n, 0)), [[], [], []]),
        (lambda n: torch.arange(n), [0, 1, 2]),
        (lambda n: torch.arange(n * 2.0, requires_grad=True).reshape(n, 2), [[0, 1], [2, 3], [4, 5]]),
        (lambda n: [np.float32(0.5), np.int64(2), 3.0][:n], [0.5, 2.0, 3.0]),
        (lambda n: [np.array([1, 2]), np.array([]), np.array([3])][:n], [[1, 2], [], [3]]),
        (lambda n: [torch.tensor(1.5), torch.tensor(2.5), torch.tensor(0.0)][:n], [1.5, 2.5, 0.0]),
        (lambda n: [None, "x", None][:n], [None, "x", None]),
        (lambda n: [{"a": 1}, {"a": 2}, {"a": 3}][:n], [{"a": 1}, {"a": 2}, {"a": 3}]),
        (lambda n: np.array([[1], [2, 3], None], dtype=object)[:n], [[1], [2, 3], None]),
    ],
)
def test_columns_of_many_kinds_are_stored(answer: Callable[[int], Any], expected: list[Any]) -> None:
    table = predict(lambda b: {"v": answer(len(b["image"]))}, [image(1), image(2), image(3)])
    assert errors(table) == [None] * 3
    assert table["v"].to_pylist() == expected


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        ([1, 2, 3], "the predictor returned list, not a dict of columns"),
        (None, "the predictor returned NoneType, not a dict of columns"),
        ({}, "the predictor returned no columns"),
        ({"v": "a"}, "the predictor's column 'v' is one text, not one value an image"),
        ({"v": b"a"}, "the predictor's column 'v' is one bytes object, not one value an image"),
        ({"v": {"a": 1}}, "the predictor's column 'v' is one dict, not one value an image"),
        ({"v": {1}}, "the predictor's column 'v' is a set, which has no order, not one value an image"),
        (
            {"v": (x for x in [1])},
            "the predictor's column 'v' is a generator (write list(…) around it), not one value an image",
        ),
        ({"v": range(1)}, "the predictor's column 'v' is one range, not one value an image"),
        ({"v": None}, "the predictor's column 'v' is None, not one value an image"),
        (
            {"v": torch.ones(2, 1).max(0)},
            "the predictor's column 'v' is one max (a named tuple), not one value an image",
        ),
        (
            {"v": torch.tensor(1.5)},
            "the predictor's column 'v' is one value without an axis, not one value an image. squeeze()",
        ),
        ({"v": np.float32(1.5)}, "the predictor's column 'v' is one value without an axis"),
        ({"v": np.ones(1, complex)}, "the predictor's column 'v' cannot be stored"),
        ({"v": np.zeros(5)}, "the predictor's column 'v' has 5 values for 1 images"),
        ({"v": []}, "the predictor's column 'v' has 0 values for 1 images"),
        ({"v": torch.zeros(3, 2)}, "the predictor's column 'v' has 3 values for 1 images"),
        ({"v": 1.5}, "the predictor's column 'v' is one value (float), not one value an image"),
        ({"v": [object()]}, "the predictor's column 'v' cannot be stored"),
    ],
)
def test_answers_that_cannot_be_rows_are_errors_of_each_image(answer: Any, fact: str) -> None:
    table = predict(lambda b: answer, [image(1), ("fetch", "NOT_FOUND"), image(2)])
    mismatch = ("postprocess", "OUTPUT_MISMATCH")
    assert errors(table) == [mismatch, ("fetch", "NOT_FOUND"), mismatch]
    assert table["message"][0].as_py().startswith(fact)


def test_predictor_may_return_its_batch_with_additions() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        batch["first"] = first_pixels(batch)
        return batch

    table = predict(call, [image(4), image(5)])
    assert table.schema.names[len(RESULT_SCHEMA) :] == ["first"]
    assert table["first"].to_pylist() == [4, 5]


def test_predictor_that_only_returns_its_batch_is_told_so() -> None:
    table = predict(lambda b: b, [image(4)])
    assert table["message"][0].as_py().startswith("the predictor returned no columns")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_confidence_that_is_not_finite_is_an_error_of_its_row(dtype: Any, value: float) -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        firsts = first_pixels(batch)
        return {"confidence": np.where(firsts == POISON, value, 0.5).astype(dtype), "first": firsts}

    table = predict(call, [image(1), image(POISON), ("decode", "CORRUPT"), image(3)])
    assert errors(table) == [None, ("infer", "NOT_FINITE"), ("decode", "CORRUPT"), None]
    assert table["first"].to_pylist() == [1, None, None, 3]
    assert table["confidence"].to_pylist() == [0.5, None, None, 0.5]


def test_other_columns_may_hold_any_value() -> None:
    table = predict(lambda b: {"score": np.array([np.nan]), "confidence": ["high"]}, [image(1)])
    assert errors(table) == [None]


@pytest.mark.parametrize(
    ("vectors", "arrow_type", "expected"),
    [
        ([[1.0, 2.0], None, [np.nan, 3.0], [4.0, 5.0]], pa.float32(), [None, None, ("infer", "NOT_FINITE"), None]),
        ([["a", "b"], None, ["c", "d"], ["e", "f"]], pa.string(), [None] * 4),
        ([[1, 2], None, [3, 4], [5, 6]], pa.int64(), [None] * 4),
    ],
)
def test_embedding_of_a_class_may_be_null_and_of_any_type(vectors: Any, arrow_type: Any, expected: Any) -> None:
    column = pa.array(vectors, pa.list_(arrow_type, 2))
    table = predict(lambda b: {"embedding": column}, [image(i) for i in range(4)], depends_on_batch=True)
    assert errors(table) == expected
    assert table["embedding"].to_pylist() == [
        v if why is None else None for v, why in zip(vectors, expected, strict=True)
    ]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", "c", "d"], pa.string_view()),
        pa.array([b"a", b"b", None, b"d"], pa.binary_view()),
        pa.array([[1], [], [3], None], pa.list_view(pa.int64())),
        pa.array([{"name": "a"}, {"name": "b"}, None, {"name": "d"}], pa.struct([("name", pa.string_view())])),
        pa.RunEndEncodedArray.from_arrays(pa.array([3, 4], pa.int32()), pa.array([1, 2])),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_without_kernels_are_checked_and_taken_like_others(column: pa.Array) -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        numbers = first_pixels(batch).tolist()
        return {"x": pa.concat_arrays([column.slice(number, 1) for number in numbers])}

    mine = actor(call)
    table = driver_gets(mine, prepared([image(0), image(1), ("decode", "CORRUPT"), image(2), image(3)]))
    assert mine.rows_check is not None and mine.rows_check.state == "OK"
    values = column.to_pylist()
    assert table["x"].to_pylist() == [*values[:2], None, *values[2:]]


def test_batch_without_a_prediction_has_no_columns_that_others_do_not_have() -> None:
    """Ray joins what several batches gave: the classifier's columns would be an embedding's, too, and be written with it."""

    @dataclass(frozen=True)
    class Vectors(EmbedderFactory):
        def __call__(self) -> Predict:
            return lambda images, uris: pa.table(
                {"embedding": pa.array([[1.0, 2.0]] * len(uris), pa.list_(pa.float32(), 2))}
            )

    nothing = [("fetch", "NOT_FOUND"), ("decode", "CORRUPT")]
    mine = InferenceActor(Vectors(None, None), [])  # type: ignore[arg-type]
    assert mine(prepared(nothing)).column_names == RESULT_SCHEMA.names
    assert mine(prepared([image(1), *nothing])).column_names == [*RESULT_SCHEMA.names, "embedding"]
    assert mine(prepared(nothing)).schema.field("embedding").type == pa.list_(pa.float32(), 2)
    marking = InferenceActor(Vectors(None, None), [], marks_damage=True)  # type: ignore[arg-type]
    assert marking(prepared(nothing)).column_names == [*RESULT_SCHEMA.names, "damaged"]


def test_bad_image_and_infinite_confidence_in_one_batch_cost_two_rows() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        firsts = first_pixels(batch)
        if (firsts == 0).any():
            raise ValueError
        return {"confidence": np.where(firsts == POISON, np.nan, firsts / 100.0)}

    table = predict(call, [image(1), image(0), image(POISON), image(4), image(5)])
    assert [e and e[1] for e in errors(table)] == [None, "PREDICTOR_ERROR", "NOT_FINITE", None, None]
    assert table["confidence"].to_pylist() == [0.01, None, None, 0.04, 0.05]


# --- construction --------------------------------------------------------------------------------------------------------


def make(cls: Any, **options: Any) -> InferenceActor:
    return InferenceActor(CustomFactory(cls, PredictorConfig(path="m:Mine", **options)), [])


def test_arguments_reach_the_constructor_and_it_runs_once() -> None:
    made: list[Any] = []

    class Mine:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append((args, kwargs))

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"v": first_pixels(batch)}

    mine = make(Mine, args=[1, {"a": [2]}], kwargs={"device": "cpu"})
    for _ in range(3):
        assert mine(prepared([image(1)]))["v"].to_pylist() == [1]
    assert made == [((1, {"a": [2]}), {"device": "cpu"})]


def test_failed_constructor_is_reported_at_every_call() -> None:
    class Mine:
        def __init__(self, path: str) -> None:
            raise FileNotFoundError(path)

    mine = make(Mine, args=["weights.pt"])
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"m:Mine could not be constructed: FileNotFoundError: weights\.pt"
        ) as caught:
            driver_gets(mine, prepared([image(1)]))
        assert "predictor.args" in caught.value.remedy


def test_user_error_of_a_constructor_is_kept() -> None:
    error = UserError("the weights have another digest", "Check model.sha256.")

    def factory() -> Any:
        raise error

    with pytest.raises(UserError) as caught:
        driver_gets(InferenceActor(factory, []), prepared([image(1)]))
    assert (caught.value.message, caught.value.remedy) == (error.message, error.remedy)


def test_exception_of_a_constructor_is_named() -> None:
    def factory() -> Any:
        raise KeyError("layer4.weight")

    with pytest.raises(UserError, match=r"the model could not be loaded: KeyError: 'layer4\.weight'"):
        driver_gets(InferenceActor(factory, []), prepared([image(1)]))


def test_end_of_a_job_is_found_among_other_rows() -> None:
    """Ray Data puts what several batches of one task gave into one block."""

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["image"][0, 0, 0, 0] == POISON:
            raise UserError("no licence", "Get one.")
        return {"v": [1]}

    mine = actor(call)
    good, end = mine(prepared([image(1)])), mine(prepared([image(POISON)]))
    raise_if_fatal(good)
    for tables in ([end], [end, end], [good, end], [end, good], [good, end, end, good]):
        block = pa.concat_tables(tables, promote_options="permissive")
        with pytest.raises(UserError, match="no licence") as caught:
            raise_if_fatal(block)
        assert caught.value.remedy == "Get one."
    raise_if_fatal(good.slice(0, 0))


def test_class_without_call_is_refused() -> None:
    class Mine:
        pass

    with pytest.raises(UserError, match="m:Mine has no __call__") as caught:
        driver_gets(make(Mine), prepared([image(1)]))
    assert "__call__(self, batch)" in caught.value.remedy


# --- the classifier's columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("a", "b", "c"), None])
def test_classifiers_columns_are_those_of_the_contract(labels: tuple[str, ...] | None) -> None:
    found = {
        "predicted_class_idx": np.array([2, 0]),
        "confidence": np.array([0.75, 0.5], np.float32),
        "top_k_idx": np.array([[2, 1], [0, 2]]),
        "top_k_confidence": np.array([[0.75, 0.25], [0.5, 0.375]], np.float32),
    }
    table = _classifier_table(found, _label_array(labels))
    assert table.schema == CLASSIFIER_SCHEMA
    assert table["label"].to_pylist() == (["c", "a"] if labels else [None, None])
    assert table["top_k"].to_pylist()[1] == [
        {"class_idx": 0, "label": "a" if labels else None, "confidence": 0.5},
        {"class_idx": 2, "label": "c" if labels else None, "confidence": 0.375},
    ]


# --- what kills the process ----------------------------------------------------------------------------------------------


class Death(BaseException):
    """Stands for the death of a process: nothing after it runs."""


class Pool:
    """Restarts an actor whenever it dies and gives it all batches of its task again, as Ray does."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, deadly: set[int], *, gives_up: bool = True
    ) -> None:
        self.deaths = 0
        self.seen: list[list[int]] = []
        store = Store(str(folder), StorageConfig())
        self._journal_config = JournalConfig(store, "attempt1", gives_up=gives_up)
        monkeypatch.setattr(
            JournalConfig,
            "journal",
            lambda config: CrashJournal(store, "actor1", "attempt1", 2) if self.deaths else None,
        )
        pool = self

        class Predictor:
            def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
                first = first_pixels(batch)
                pool.seen.append(first.tolist())
                if deadly & set(first.tolist()):
                    raise Death
                return {"first": first}

        self._factory = CustomFactory(Predictor, PredictorConfig(path="m:Predictor"))
        self._actor = self.start()

    def start(self) -> InferenceActor:
        return InferenceActor(self._factory, [], journal_config=self._journal_config)

    def __call__(self, *batches: pa.Table) -> list[pa.Table]:
        while True:
            try:
                return [driver_gets(self._actor, batch) for batch in batches]
            except Death:
                self.deaths += 1
                assert self.deaths < 100
                self._actor = self.start()


CRASH = ("infer", "PREDICTOR_CRASH")


def test_image_that_kills_the_process_is_a_failed_row_and_its_neighbours_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(tmp_path, monkeypatch, {3, 5})
    torn = ("decode", "TRUNCATED")
    (table,) = pool(prepared([image(1), image(2), image(3), torn, image(4), image(5), image(6)]))
    assert errors(table) == [None, None, CRASH, torn, None, CRASH, None]
    assert table["first"].to_pylist() == [1, 2, None, None, 4, None, 6]
    assert "died of this image 2 times, when it was alone" in table["message"][2].as_py()
    # Twice of the batch, twice of each of the two alone.
    assert pool.deaths == 6
    # The process lives, and works in whole batches again.
    (table,) = pool(prepared([image(7)] * 9))
    assert pool.seen[-1] == [7] * 9


def test_batches_of_one_task_cost_only_their_own_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is begun again from its start whenever the process dies, with batches that were done before."""
    pool = Pool(tmp_path, monkeypatch, {5, 15, 25, 35})
    task = prepared([image(number) for number in range(40)])
    tables = pool(*[task.slice(start, 4) for start in range(0, 40, 4)])
    outcomes = [error for table in tables for error in errors(table)]
    assert [number for number, error in enumerate(outcomes) if error] == [5, 15, 25, 35]
    assert set(outcomes) == {None, CRASH}
    assert pool.deaths == 4 * 3 + 1  # once more of the first batch, which nobody watched


def test_deadly_image_far_behind_in_a_task_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(tmp_path, monkeypatch, {150})
    task = prepared([image(number) for number in range(200)])
    tables = pool(*[task.slice(start, 1) for start in range(200)])
    assert [errors(table)[0] for table in tables].index(CRASH) == 150
    assert pool.deaths == 4


def test_crash_that_no_image_causes_costs_no_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = {2}
    pool = Pool(tmp_path, monkeypatch, deadly)
    start = pool.start

    def then_well() -> InferenceActor:
        if pool.deaths == 3:  # a node was lost when the image was alone, say
            deadly.clear()
        return start()

    monkeypatch.setattr(pool, "start", then_well)
    (table,) = pool(prepared([image(1), image(2), image(3)]))
    assert errors(table) == [None] * 3
    assert pool.deaths == 3


@pytest.mark.parametrize("size", [1, 2, 50])
def test_process_that_every_image_kills_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    pool = Pool(tmp_path, monkeypatch, set(range(1, 50)))
    task = prepared([image(number) for number in range(1, 50)])
    with pytest.raises(
        InfrastructureError, match="died of 4 images one after the other, each alone, on node"
    ) as caught:
        pool(*[task.slice(start, size) for start in range(0, task.num_rows, size)])
    assert "GPU that does not work" in caught.value.remedy
    assert pool.deaths <= 4 * 3 + 1


@pytest.mark.parametrize("size", [1, 3])
def test_deadly_images_with_good_batches_between_them_do_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Each is the last of its batch, so that only whole batches show that the process works."""
    deadly = {number for number in range(12 * size) if number % (2 * size) == size - 1}
    pool = Pool(tmp_path, monkeypatch, deadly)
    task = prepared([image(number) for number in range(12 * size)])
    tables = pool(*[task.slice(start, size) for start in range(0, task.num_rows, size)])
    outcomes = [error for table in tables for error in errors(table)]
    assert outcomes == [CRASH if number in deadly else None for number in range(12 * size)]
    assert outcomes.count(CRASH) == 6


def test_deadly_images_with_good_ones_between_them_do_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are in one batch, so that only images alone show that the process works."""
    pool = Pool(tmp_path, monkeypatch, set(range(0, 12, 2)))
    (table,) = pool(prepared([image(number) for number in range(12)]))
    assert errors(table) == [CRASH, None] * 6


def test_images_that_are_known_to_fail_may_all_kill_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(tmp_path, monkeypatch, set(range(1, 10)), gives_up=False)
    (table,) = pool(prepared([image(number) for number in range(1, 10)]))
    assert errors(table) == [CRASH] * 9


def test_first_process_keeps_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(tmp_path, monkeypatch, set())
    pool(prepared([image(1)]))
    assert not (tmp_path / "_begun").exists()


# --- batches are bounded by bytes ----------------------------------------------------------------------------------------


@pytest.fixture
def small_bound(monkeypatch: pytest.MonkeyPatch) -> int:
    """Room for ten images of 2 x 3 pixels."""
    for module in (batch_size, pipeline_actor):
        monkeypatch.setattr(module, "MAX_BATCH_BYTES", 180)
    return 180


@pytest.mark.parametrize("chunks", [1, 3, 30])
def test_call_of_a_class_is_bounded_by_bytes(chunks: int, small_bound: int) -> None:
    seen: list[int] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(sum(i.nbytes for i in batch["image"]))
        return {"first": first_pixels(batch)}

    items: list[Any] = [image(number) if number % 7 else ("fetch", "TIMEOUT") for number in range(30)]
    items[11] = image(11, (20, 30))  # a large one comes alone
    table = predict(
        call, items, chunks=chunks, depends_on_batch=True
    )  # which is not compared, so that each call is a batch
    assert table["first"].to_pylist() == [number if number % 7 else None for number in range(30)]
    assert max(size for size in seen if size != 1800) <= small_bound
    assert seen.count(1800) == 1
    assert len(seen) == 4


def test_padding_rows_are_not_in_the_result(small_bound: int) -> None:
    seen: list[list[str]] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(batch["uri"].tolist())
        return {"first": first_pixels(batch)}

    good = prepared([image(1), ("decode", "CORRUPT"), image(3, (5, 6))])
    for table in (
        pa.concat_tables([good, datasource.with_padding_rows(good, 10).slice(3)]),
        pa.concat_tables([datasource.with_padding_rows(good, 10).slice(3), good]),
    ):
        assert table.num_rows == 3 + 4
        result = driver_gets(actor(call, depends_on_batch=True), table)
        assert result["row"].to_pylist() == [0, 1, 2]
        assert result["first"].to_pylist() == [1, None, 3]
        assert errors(result) == [None, ("decode", "CORRUPT"), None]
        assert seen[-1] == ["s3://b/0.jpg", "s3://b/2.jpg"]
    # A batch may have nothing else.
    assert driver_gets(actor(call), datasource.with_padding_rows(good, 10).slice(3)).num_rows == 0


def test_batch_is_as_full_as_its_rows_or_its_bytes(small_bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(pipeline_actor.meter, "observe", lambda name, value, **labels: seen.append(value))
    mine = actor(lambda batch: {"first": first_pixels(batch)})
    mine._batch_rows = 20
    mine(prepared([image(1)] * 5))
    mine(prepared([image(1)] * 10))
    mine(prepared([image(1, (1, 1))] * 20))
    mine(prepared([image(1, (20, 30))]))
    assert seen == [0.5, 1.0, 1.0, 1.0]


class Dead(BaseException):
    """Stands for the death of a process."""


@pytest.mark.parametrize("deadly", [None, 14])
def test_restarted_process_recognizes_the_parts_of_a_table(
    deadly: int | None, small_bound: int, tmp_path: Path
) -> None:
    """Each part is a batch of its own in the journal, and the same one when the table comes again."""
    store = Store(str(tmp_path), StorageConfig())
    table = datasource.with_padding_rows(prepared([image(number) for number in range(24)]), 10)
    calls: list[list[int]] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        numbers = first_pixels(batch).tolist()
        calls.append(numbers)
        if deadly in numbers:
            raise Dead
        return {"first": first_pixels(batch)}

    result = None
    for _ in range(4):
        mine = actor(call)
        mine._guard = CrashGuard(CrashJournal(store, "actor", "first", 2), mine._predict)
        try:
            result = driver_gets(mine, table)
            break
        except Dead:
            continue
    assert result is not None
    assert result["row"].to_pylist() == list(range(24))
    expected = [None if number != deadly else ("infer", "PREDICTOR_CRASH") for number in range(24)]
    assert errors(result) == expected
    assert max(map(len, calls)) == 10
