"""Columns that a predictor class may return, against a model of the row of each image."""

from __future__ import annotations

import datetime as dt
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_inference.config import PredictorConfig
from batch_inference.errors import RowError, UserError
from batch_inference.models.columns import Batch, WrongCountError, predictions_table
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.factories import CustomFactory
from batch_inference.pipeline.schemas import raise_if_fatal
from tests.support.batches import errors, image, prepared

# --- one column -----------------------------------------------------------------------------------------------------------


def column(values: Any, rows: int = 3) -> pa.Table:
    return predictions_table({"v": values}, Batch(), rows)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16), pa.float32(), [0.5, 1.0, 2.0]),
        (torch.tensor([0.5, 1.0, 2.0]).to(torch.float8_e4m3fn), pa.float32(), [0.5, 1.0, 2.0]),
        (torch.tensor([0.5, 1.0, 2.0], dtype=torch.float16), pa.float16(), [0.5, 1.0, 2.0]),
        (torch.tensor([True, False, True]), pa.bool_(), [True, False, True]),
        (torch.tensor([1, 2, 3], dtype=torch.uint16), pa.uint16(), [1, 2, 3]),
        (torch.tensor([1.0, 0.0, 2.0]).to_sparse(), pa.float32(), [1.0, 0.0, 2.0]),
        (torch.eye(3).to_sparse_csr(), pa.list_(pa.float32()), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (torch.quantize_per_tensor(torch.tensor([1.0, 2, 3]), 0.5, 0, torch.quint8), pa.float32(), [1.0, 2.0, 3.0]),
        (torch.arange(3.0, requires_grad=True), pa.float32(), [0.0, 1.0, 2.0]),
        (torch.tensor([1 + 2j, 3 - 1j, 0j]).conj().imag, pa.float32(), [-2.0, 1.0, 0.0]),
        (torch.arange(6).reshape(2, 3).t(), pa.list_(pa.int64()), [[0, 3], [1, 4], [2, 5]]),
        ([torch.zeros(0, 4), torch.ones(1, 4), torch.zeros(0, 4)], pa.list_(pa.list_(pa.float32())), [[], [[1.0] * 4], []]),
        ([np.zeros((0, 4), np.float32)] * 3, pa.list_(pa.list_(pa.float32())), [[], [], []]),
        ([np.ones(2, np.int8), None, np.zeros(0, np.int8)], pa.list_(pa.int8()), [[1, 1], None, []]),
        ([np.float32(1), np.float32(2), None], pa.float32(), [1.0, 2.0, None]),
        ([torch.ones(1, 2, 2, dtype=torch.bfloat16)] * 3, pa.list_(pa.list_(pa.list_(pa.float32()))), [[[[1, 1], [1, 1]]]] * 3),
        ([{"boxes": torch.ones(1, 2), "n": np.int64(1)}] * 3, None, [{"boxes": [[1.0, 1.0]], "n": 1}] * 3),
        ([(1, 2), [3], ()], pa.list_(pa.int64()), [[1, 2], [3], []]),
        (pd.Series([1.0, 2.0, np.nan], index=[9, 7, 9]), pa.float64(), [1.0, 2.0, pytest.approx(np.nan, nan_ok=True)]),
        (pd.Series(["a", None, "c"]), None, ["a", None, "c"]),
        (pd.Series([1, None, 3], dtype="Int64"), pa.int64(), [1, None, 3]),
        (pd.Categorical(["a", "b", "a"]), None, ["a", "b", "a"]),
        (pd.Index([1, 2, 3]), pa.int64(), [1, 2, 3]),
        (pa.array([1, 2, 3], pa.int8()), pa.int8(), [1, 2, 3]),
        (pa.chunked_array([[1], [2, 3]]), pa.int64(), [1, 2, 3]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), pa.string(), ["a", "b", "a"]),
        (np.arange(3, dtype=">f4"), pa.float32(), [0.0, 1.0, 2.0]),
        (np.matrix([[1, 2], [3, 4], [5, 6]]), pa.list_(pa.int64()), [[1, 2], [3, 4], [5, 6]]),
        (np.ma.array([1, 2, 3], mask=[0, 1, 0]), pa.int64(), [1, None, 3]),
        ([np.ma.array([1, 2], mask=[0, 1]), np.array([3, 4]), None], pa.list_(pa.int64()), [[1, None], [3, 4], None]),
        ([np.ma.array([1.0, 2.0], mask=[1, 0])] * 2, pa.list_(pa.float64()), [[None, 2.0]] * 2),
        (pd.arrays.SparseArray([0, 0, 1]), pa.int64(), [0, 0, 1]),
        (pd.Series(pd.arrays.SparseArray([0.5, 0.0])), pa.float64(), [0.5, 0.0]),
        ([1, pd.NA, 3], pa.int64(), [1, None, 3]),
        ([pd.Timestamp("2020-01-01 05:00"), pd.NaT], None, [dt.datetime(2020, 1, 1, 5), None]),
        ([memoryview(b"ab"), memoryview(b"c")], pa.binary(), [b"ab", b"c"]),
        (np.array([[1], [2, 3], None], dtype=object), pa.list_(pa.int64()), [[1], [2, 3], None]),
        (np.array(["2024-01-01", "NaT", "2024-01-03"], "M8[s]"), pa.timestamp("s"), None),
        ([], None, []),
    ],
)  # fmt: skip
def test_column_keeps_its_values_and_the_type_they_have(values: Any, kind: Any, expected: Any) -> None:
    table = column(values, len(values))
    if expected is not None:
        assert table["v"].to_pylist() == expected
    if kind is not None:
        assert table.schema.field("v").type == kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([dt.date(2020, 1, 1), dt.datetime(2020, 1, 1, 5)], "dates and times without a time zone"),
        ([dt.datetime(2020, 1, 1, 5), dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)], "times with a time zone and times without"),
        ([{"at": [dt.date(2020, 1, 1)]}, {"at": [dt.datetime(2020, 1, 1, 5)]}], "dates and times without a time zone"),
    ],
)  # fmt: skip
def test_dates_and_times_that_arrow_would_change_are_refused(values: Any, message: str) -> None:
    with pytest.raises(RowError, match=f"'v' cannot be stored: it has {message}"):
        column(values, len(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("abc", "one text"),
        (b"abc", "one bytes object"),
        (bytearray(b"abc"), "one bytes object"),
        ({"a": 1, "b": 2, "c": 3}, "one dict"),
        (types.MappingProxyType({1: 1, 2: 2, 3: 3}), "one dict"),
        ({1, 2, 3}, "a set, which has no order"),
        (frozenset("abc"), "a set, which has no order"),
        ((x for x in "abc"), "a generator"),
        (map(str, "abc"), "one map"),
        ({"a": 1, "b": 2, "c": 3}.values(), "one dict_values"),
        (range(3), "one range"),
        (torch.ones(3, 2).max(1), "one max (a named tuple)"),
        (3, "one value (int)"),
        (True, "one value (bool)"),
        (None, "None"),
        (np.float64(1.5), "one value without an axis"),
        (np.array("abc"), "one value without an axis"),
        (torch.tensor(3), "one value without an axis"),
    ],
)
def test_column_without_one_value_per_image_is_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        column(values)
    assert caught.value.error.error_type == "OUTPUT_MISMATCH"
    assert caught.value.error.message.startswith(f"the predictor's column 'v' is {message}")
    assert "not one value an image" in caught.value.error.message


@pytest.mark.parametrize(
    "values",
    [[object()] * 3, [1, "a", 2], ["a", b"b", "c"], [2**70] * 3, np.ones(3, complex), torch.ones(3, dtype=torch.complex64),
     torch.ones(3, dtype=torch.complex32), np.zeros(3, [("a", "i4")]), [{1: 2}] * 3, [(x for x in "ab")] * 3, [True, 1, 2]],
)  # fmt: skip
def test_values_without_a_type_of_their_own_are_refused_by_name(values: Any) -> None:
    with pytest.raises(RowError, match=r"the predictor's column 'v' cannot be stored: ."):
        column(values)


@pytest.mark.parametrize(
    "answer",
    [
        {"a": [1, 2], "b": ["x", "y"]},
        types.MappingProxyType({"a": [1, 2], "b": ["x", "y"]}),
        pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}, index=[5, 5]),
        pa.table({"a": [1, 2], "b": ["x", "y"]}),
        pa.record_batch({"a": [1, 2], "b": ["x", "y"]}),
    ],
)
def test_answer_is_a_dict_of_columns_or_a_table(answer: Any) -> None:
    assert predictions_table(answer, Batch(), 2).to_pydict() == {"a": [1, 2], "b": ["x", "y"]}


async def _generator() -> AsyncIterator[int]:
    yield 1


async def _coroutine() -> None:
    return None


@pytest.mark.parametrize(
    ("answer", "named", "remedy"),
    [
        (lambda: [{"a": 1}], "list", "write `return {name: [row[name] for row in rows] for name in rows[0]}`"),
        (lambda: torch.ones(1), "Tensor", 'Give it a name: `return {"score": scores}`'),
        (lambda: (1, 2), "tuple", "Give it a name"),
        (lambda: (x for x in "ab"), "generator", "instead of `yield`"),
        (_generator, "async_generator", "instead of `yield`"),
        (_coroutine, "coroutine", "Write `def __call__`, without `async`"),
        (lambda: None, "NoneType", "End __call__ with `return"),
        (lambda: "ab", "str", "Return a dict"),
        (lambda: {"a"}, "set", "Return a dict"),
    ],
)
def test_answer_without_columns_is_refused_with_what_to_write(
    answer: Callable[[], Any], named: str, remedy: str
) -> None:
    with pytest.raises(RowError) as caught:
        predictions_table(answer(), Batch(), 1)
    message = caught.value.error.message
    assert message.startswith(f"the predictor returned {named}, not a dict of columns. ")
    assert remedy in message


def test_names_that_the_output_has_already_end_the_job() -> None:
    for name in ("uri", "shard", "row"):
        with pytest.raises(UserError, match=f"column '{name}' has the name of one of the output's own"):
            predictions_table({name: [1]}, Batch(), 1)
    with pytest.raises(UserError, match="column 'mean' and the manifest's have the same name") as caught:
        predictions_table({"mean": [1]}, Batch(), 1, ("id", "mean"))
    assert "'predicted_mean'" in caught.value.remedy
    with pytest.raises(RowError, match="two columns named '1'"):
        predictions_table({1: [1], "1": [2]}, Batch(), 1)


def test_missing_key_of_a_batch_names_its_keys() -> None:
    batch = Batch(image=np.zeros(1), uri=np.zeros(1))
    with pytest.raises(KeyError, match=r"a batch has the keys 'image' and 'uri', not 'path'"):
        batch["path"]
    assert batch.get("path") is None
    assert "path" not in batch


# --- any column, through the actor -----------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-(2**31), 2**31), st.floats(allow_nan=False, width=32), st.booleans(), st.text(max_size=4), st.binary(max_size=4)
)  # fmt: skip
FAMILIES = st.sampled_from(
    [
        st.integers(-(2**31), 2**31),
        st.floats(allow_nan=False, width=32),
        st.booleans(),
        st.text(st.characters(codec="utf-8"), max_size=4),
        st.binary(max_size=4),
        st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=3)),
        st.lists(st.integers(0, 9), max_size=3),
        st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), max_size=2),
        st.fixed_dictionaries({"label": st.text(st.characters(codec="utf-8"), max_size=2), "score": st.floats(0, 1)}),
        st.none(),
    ]
)


def _ndarray(values: list[Any]) -> Any:
    try:
        array = np.array(values)
    except ValueError:
        array = None
    if array is None or array.dtype.kind in "SU" or array.ndim != 1:  # numpy drops trailing zeros of texts
        array = np.empty(len(values), object)
        array[:] = values
    return array


def _tensor(values: list[Any]) -> Any:
    kinds = {type(v) for v in values}
    return torch.tensor(values) if len(kinds) == 1 and kinds <= {int, float, bool} else values


RIGHT: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": _ndarray,
    "tensor": _tensor,
    "series": lambda v: pd.Series(v, dtype=object, index=range(len(v), 0, -1)),
    "arrow": pa.array,
    "chunked": lambda v: pa.chunked_array([pa.array(v).slice(0, 1), pa.array(v).slice(1)]),
    "scalars": lambda v: [torch.tensor(x) if type(x) in (int, float, bool) else x for x in v],
}  # fmt: skip
WRONG: dict[str, Callable[[list[Any]], Any]] = {
    "text": lambda v: "x" * len(v),
    "bytes": lambda v: b"x" * len(v),
    "dict": lambda v: dict(enumerate(v)),
    "by uri": lambda v: {f"s3://b/{i}.jpg": x for i, x in enumerate(v)},
    "keys": lambda v: dict(enumerate(v)).keys(),
    "set": lambda v: set(range(len(v))),
    "generator": lambda v: (x for x in v),
    "map": lambda v: map(str, v),
    "scalar": lambda v: v[0],
    "nothing": lambda v: None,
}
LENGTHS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "one less": lambda v: v[:-1],
    "one more": lambda v: [*v, v[0]],
    "twice": lambda v: v + v,
    "none": lambda v: [],
    "three": lambda v: (v * 3)[:3],
    "one": lambda v: v[:1],
}


def rows_of(call: Callable[[list[int]], Any], batches: list[list[int]]) -> list[Any] | None:
    """Return each image's value of column v, or its error in a tuple; None if the job ends."""

    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> Any:
            return {"v": call([int(i[0, 0, 0]) for i in batch["image"]])}

    actor = InferenceActor(CustomFactory(Predictor, PredictorConfig(path="m:Predictor")), [])
    out: list[Any] = []
    for batch in batches:
        table = actor(prepared([image(number) for number in batch]))
        try:
            raise_if_fatal(table)
        except UserError:
            return None
        # Types that differ within a batch stand beside each other.
        columns = [c for name, c in zip(table.column_names, table.columns, strict=True) if name == "v"]
        values = [
            next((v for v in row if v is not None), None) for row in zip(*(c.to_pylist() for c in columns), strict=True)
        ]
        values = values or [None] * table.num_rows
        out += [(error,) if error else value for error, value in zip(errors(table), values, strict=True)]
    return out


def same(value: Any, model: Any) -> bool:
    return bool(value == model) and (isinstance(value, str) == isinstance(model, str))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_row_has_the_value_of_its_own_image_or_an_error(data: st.DataObject) -> None:
    """Correct values, types and containers, and one wrong container or length."""
    family = data.draw(FAMILIES)
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    numbers = data.draw(st.permutations(range(sum(sizes))))
    batches = [list(numbers[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    model = {number: data.draw(family) for number in sorted(numbers)}
    container = data.draw(st.sampled_from([*RIGHT, *WRONG]))
    length = data.draw(st.sampled_from(["right", "right", *LENGTHS]))

    def call(images: list[int]) -> Any:
        values = [model[number] for number in images]
        if length != "right" and values:
            values = LENGTHS[length](values)
        return (RIGHT | WRONG)[container](values)

    rows = rows_of(call, batches)
    if rows is None:
        # Types that differ from batch to batch, or counts that cannot be told apart.
        assert length != "right" or container in WRONG or len({str(pa.array([v]).type) for v in model.values()}) > 1
        return
    for number, row in zip([n for batch in batches for n in batch], rows, strict=True):
        if isinstance(row, tuple):
            continue
        assert container in RIGHT
        assert same(row, model[number]), (row, model[number])
    if container in RIGHT and length == "right":
        assert not any(isinstance(row, tuple) for row in rows)
    if container in WRONG:
        assert all(isinstance(row, tuple) for row in rows)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.booleans())
def test_flattened_values_never_stand_beside_another_image(counts: list[int], nested: bool) -> None:
    """The boxes of a batch in one list may have the right number by chance."""

    def call(images: list[int]) -> Any:
        return [[n, k] if nested else 10 * n + k for n in images for k in range(counts[n])]

    rows = rows_of(call, [list(range(len(counts)))])
    if rows is None:
        assert any(count != 1 for count in counts)
        return
    for number, row in enumerate(rows):
        if not isinstance(row, tuple):
            assert counts[number] == 1
            assert row == ([number, 0] if nested else 10 * number)
    assert all(isinstance(row, tuple) == (count != 1) for row, count in zip(rows, counts, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 11), st.sampled_from(["number", "text", "list"]))
def test_rows_in_another_order_end_the_job(count: int, shift: int, kind: str) -> None:
    make: Callable[[int], Any] = {
        "number": lambda n: 1000.0 * n + 0.123,
        "text": lambda n: f"label {n}",
        "list": lambda n: [[float(n)] * 4] * (n % 3),
    }[kind]

    def call(images: list[int]) -> Any:
        values = [make(n) for n in images]
        by = shift % len(values)
        return values[by:] + values[:by]

    rows = rows_of(call, [list(range(count))])
    assert rows is None or rows == [make(n) for n in range(count)]


def test_wrong_count_error_has_name_and_counts() -> None:
    with pytest.raises(WrongCountError, match="has 3 values for 2 images") as caught:
        column([1, 2, 3], 2)
    assert (caught.value.values, caught.value.images) == (3, 2)
