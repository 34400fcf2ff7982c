"""Turn what a predictor class returns into a table, one value an image; refuse what has no certain place."""

from __future__ import annotations

import datetime as dt
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from batch_inference.column_types import plain_inputs
from batch_inference.errors import RowFailure, UserError

#: Columns of the output that no predictor may write.
OWN_COLUMNS = ("uri", "shard", "row")
_ONE_EACH = 'Return one value for each image, such as {{"{name}": [… for image in batch["image"]]}}'


class Batch(dict[str, np.ndarray]):
    """A batch as a class gets it: ``image`` and ``uri``; any other key is answered with the names of these."""

    def __missing__(self, key: object) -> NoReturn:
        raise KeyError(f"a batch has the keys {' and '.join(map(repr, self))}, not {key!r}")


class WrongCount(RowFailure):
    """A column has not as many values as there are images.

    Attributes:
        name: The column's.
        values: How many it has.
        images: How many images there are.
    """

    def __init__(self, name: object, values: int, images: int) -> None:
        super().__init__(
            "postprocess",
            "OUTPUT_MISMATCH",
            f"the predictor's column {name!r} has {values:,} values for {images:,} images. {_ONE_EACH.format(name=name)}",
        )
        self.name, self.values, self.images = name, values, images


def columns_table(answer: Any, batch: Mapping[str, Any], rows: int, passthrough: Sequence[str] = ()) -> pa.Table:
    """Return a predictor's answer as a table.

    Args:
        answer: A mapping of columns, a pandas DataFrame or an Arrow table. A column is a list, tuple, numpy array, torch
            tensor, pandas Series or Arrow array, first axis first; no other iterable, since a text or a dict has a length, too.
        batch: The arrays that the predictor was given; those of them that it returns are left out.
        rows: Number of images.
        passthrough: Columns of the input that stand beside the predictor's in the output.

    Raises:
        RowFailure: OUTPUT_MISMATCH, if the answer is something else; :class:`WrongCount` if a column has another length.
        UserError: If a column has a name that the output has already.
    """
    out: dict[str, Any] = {}
    for name, values in _items(answer):
        # Predictors that add to their batch and return it do not mean to store the images.
        if name in batch and batch[name] is values:
            continue
        if name in OWN_COLUMNS:
            raise UserError(
                f"the predictor's column {name!r} has the name of one of the output's own",
                f"Return it under another name, such as {'my_' + str(name)!r}.",
            )
        if name in passthrough:
            raise UserError(
                f"the predictor's column {name!r} and the manifest's have the same name",
                f"Rename one of them: return {'predicted_' + str(name)!r}, or rename the column of the input.",
            )
        if str(name) in out:
            raise _wrong(f"the predictor returned two columns named {str(name)!r}")
        try:
            column = _column(name, values)
        except RowFailure:
            raise
        except Exception as exc:
            raise _wrong(f"the predictor's column {name!r} cannot be stored: {exc}") from exc
        if len(column) != rows:
            raise WrongCount(name, len(column), rows)
        out[str(name)] = column
    if not out:
        raise _wrong('the predictor returned no columns. Return a dict such as {"score": scores}')
    # Such as the views that polars gives: their rows could be neither taken nor filtered.
    return plain_inputs(pa.table(out), whole=False)


def _wrong(message: str) -> RowFailure:
    return RowFailure("postprocess", "OUTPUT_MISMATCH", message)


def _items(answer: Any) -> Iterable[tuple[Any, Any]]:
    """Names and values of the columns of an answer as a whole."""
    if isinstance(answer, Mapping):
        return answer.items()
    if isinstance(answer, (pa.Table, pa.RecordBatch)):
        return zip(answer.schema.names, answer.columns, strict=True)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(answer, pandas.DataFrame):
        return [(name, answer.iloc[:, place]) for place, name in enumerate(answer.columns)]
    raise _wrong(f"the predictor returned {type(answer).__name__}, not a dict of columns. {_instead(answer)}")


def _instead(answer: Any) -> str:
    """The lines to write in place of a whole that is not a dict of columns."""
    if inspect.isgenerator(answer) or inspect.isasyncgen(answer):
        return 'Collect what it yields and return it once: `return {"score": scores}` instead of `yield`'
    if inspect.iscoroutine(answer):
        answer.close()  # or Python warns that it was never awaited
        return "Write `def __call__`, without `async`"
    if answer is None:
        return 'End __call__ with `return {"score": scores}`'
    if isinstance(answer, (list, tuple)) and answer and isinstance(answer[0], Mapping):
        return "Where that is one dict an image, write `return {name: [row[name] for row in rows] for name in rows[0]}`"
    if isinstance(answer, (list, tuple, np.ndarray)) or hasattr(answer, "detach"):
        return 'Give it a name: `return {"score": scores}`'
    return 'Return a dict such as {"score": scores}, with one value for each image'


def _column(name: object, values: Any) -> pa.Array | pa.ChunkedArray:
    """One column; raises for what is not a sequence of one value an image."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        # Each batch has a dictionary of its own.
        return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(values, (pandas.Series, pandas.Index, pandas.api.extensions.ExtensionArray)):
        # By position: an index is no matter of the images. A missing number stays NaN, as in numpy's arrays.
        if isinstance(values.dtype, (np.dtype, pandas.SparseDtype)):
            return _column(name, np.asarray(values))
        return _column(name, pa.array(values))
    if _is_tensor(values):
        values = _from_torch(values)
    elif (
        not isinstance(values, (np.ndarray, list, tuple)) and hasattr(values, "__array__") and hasattr(values, "shape")
    ):
        values = np.asarray(values)  # JAX's and TensorFlow's arrays
    if isinstance(values, np.ndarray):
        if values.ndim == 0:
            raise _wrong(
                f"the predictor's column {name!r} is one value without an axis, not one value an image. squeeze() drops the axis of a "
                "batch of one image; use squeeze(1), or reshape(len(batch['image']))"
            )
        return _list_column(list(values)) if values.dtype == object else _dense(values)
    if not isinstance(values, (list, tuple)):
        raise _wrong(
            f"the predictor's column {name!r} is {_named(values)}, not one value an image. {_ONE_EACH.format(name=name)}"
        )
    if isinstance(values, tuple) and type(values) is not tuple:  # such as what torch.max returns: two columns
        raise _wrong(
            f"the predictor's column {name!r} is one {type(values).__name__} (a named tuple), not one value an image. "
            f"{_ONE_EACH.format(name=name)}"
        )
    return _list_column(list(values))


def is_sequence(values: Any) -> bool:
    """Whether a value is a column, one value an image: a list, tuple, array, tensor, Series or Arrow array, but no text or dict."""
    if isinstance(values, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray)):
        return True
    return hasattr(values, "__array__") and bool(getattr(values, "shape", ()))


def _named(values: Any) -> str:
    """Say what a value is that is no column."""
    kinds: tuple[tuple[Any, str], ...] = (
        (str, "one text"),
        ((bytes, bytearray, memoryview), "one bytes object"),
        (Mapping, "one dict"),
        ((set, frozenset), "a set, which has no order"),
        ((bool, int, float, complex, np.generic), f"one value ({type(values).__name__})"),
        (type(None), "None"),
    )
    for kind, said in kinds:
        if isinstance(values, kind):
            return said
    if inspect.isgenerator(values):
        return "a generator (write list(…) around it)"
    return f"one {type(values).__name__}"


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_torch(tensor: Any) -> Any:
    """A tensor of any device, layout and type as an array; types that numpy lacks (bfloat16, float8) become float32.

    Nested tensors become a list of arrays.
    """
    tensor = tensor.detach()
    if tensor.is_nested:
        return [_from_torch(part) for part in tensor.unbind()]
    if tensor.is_sparse or str(tensor.layout).startswith("torch.sparse"):
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:
        if not tensor.is_floating_point():
            raise
        return tensor.float().numpy()


def _dense(array: np.ndarray) -> pa.Array:
    """A numpy array of any rank as an Arrow array, lists below the first axis."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not isinstance(array, np.ma.MaskedArray):
        array = np.asarray(array)  # a np.matrix stays two-dimensional whatever is done to it
    if array.dtype.kind in "cV" or array.dtype == np.longdouble:
        raise TypeError(f"Parquet has no type for arrays of {array.dtype}")
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.array(array.reshape(-1))
    for axis in range(array.ndim - 1, 0, -1):
        lists = int(np.prod(array.shape[:axis], dtype=np.int64))
        flat = pa.ListArray.from_arrays(pa.array(np.arange(lists + 1) * array.shape[axis], pa.int32()), flat)
    return flat


def _list_column(values: list[Any]) -> pa.Array:
    """A list's values, one an image: numbers, texts, lists, dicts, arrays, tensors, None."""
    values = [_from_torch(value) if _is_tensor(value) else value for value in values]
    # Joining arrays forgets which of their values are masked.
    values = [value.tolist() if isinstance(value, np.ma.MaskedArray) else value for value in values]
    arrays = [value for value in values if value is not None]
    first = arrays[0] if arrays else None
    if (
        isinstance(first, (np.ndarray, np.generic))
        and first.dtype.kind in "biuf"
        and all(
            isinstance(a, (np.ndarray, np.generic)) and a.dtype == first.dtype and a.ndim == first.ndim for a in arrays
        )
    ):
        return _ragged(values, first)
    cells = [_plain(value) for value in values]
    column = pa.array(cells)
    if pa.types.is_binary(column.type) and any(isinstance(value, str) for value in values):
        raise TypeError("it has both texts and bytes")
    if _has_times(column.type):
        kinds = sorted({kind for cell in cells for kind in _times(cell)})
        if len(kinds) > 1:  # Arrow would take the first kind for all, and cut times off or move them
            raise TypeError(f"it has {' and '.join(kinds)}")
    return column


def _has_times(kind: pa.DataType) -> bool:
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return True
    return any(_has_times(kind.field(place).type) for place in range(kind.num_fields))


def _times(cell: Any) -> Iterator[str]:
    """The kinds of dates and times in a cell, at any depth."""
    if isinstance(cell, dt.datetime):
        yield "times without a time zone" if cell.tzinfo is None else "times with a time zone"
    elif isinstance(cell, dt.date):
        yield "dates"
    elif isinstance(cell, Mapping):
        for part in cell.values():
            yield from _times(part)
    elif isinstance(cell, (list, tuple, set, frozenset)):
        for part in cell:
            yield from _times(part)


def _ragged(values: list[Any], like: Any) -> pa.Array:
    """Arrays of one type and rank and of any sizes; the type is theirs, also where all of them are empty."""
    missing = np.array([value is None for value in values])
    if like.ndim == 0:
        return pa.array(np.array([like.dtype.type(0) if v is None else v for v in values], like.dtype), mask=missing)
    there = [np.asarray(v) for v in values if v is not None]
    array: pa.Array = _dense(np.concatenate([a.reshape(-1) for a in there]))
    for axis in range(like.ndim - 1, 0, -1):
        # Each array has as many lists of this depth as its shape says.
        sizes = np.concatenate([np.full(int(np.prod(a.shape[:axis], dtype=np.int64)), a.shape[axis]) for a in there])
        array = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(sizes)), pa.int32()), array)
    counts = np.array([0 if v is None else np.asarray(v).shape[0] for v in values])
    offsets = np.append(0, np.cumsum(counts))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32(), mask=np.append(missing, False)), array)


def _plain(value: Any) -> Any:
    """A cell with arrays and tensors at any depth as Python's own lists and numbers."""
    if _is_tensor(value):
        value = _from_torch(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, memoryview):
        return value.tobytes()
    pandas = sys.modules.get("pandas")
    if pandas is not None and (value is pandas.NA or value is pandas.NaT):
        return None
    return value.tolist() if hasattr(value, "tolist") else value
