"""Turn a predictor class's return value into a table with one value per image, or refuse it if it is ambiguous."""

from __future__ import annotations

import datetime as dt
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from batch_inference.errors import RowError, UserError
from batch_inference.output.column_types import plain_inputs

#: Columns of the output that a predictor may not write.
RESERVED_COLUMNS = ("uri", "shard", "row")
_ONE_VALUE_EACH = 'Return one value for each image, such as {{"{name}": [… for image in batch["image"]]}}'


class Batch(dict[str, np.ndarray]):
    """The batch that a predictor class gets, with the keys ``image`` and ``uri``. The KeyError for any other key names these."""

    def __missing__(self, key: object) -> NoReturn:
        raise KeyError(f"a batch has the keys {' and '.join(map(repr, self))}, not {key!r}")


class WrongCountError(RowError):
    """Raised if the number of a column's values is not the number of images.

    Attributes:
        name: Name of the column.
        values: Number of values in the column.
        images: Number of images.
    """

    def __init__(self, name: object, values: int, images: int) -> None:
        super().__init__(
            "postprocess",
            "OUTPUT_MISMATCH",
            f"the predictor's column {name!r} has {values:,} values for {images:,} images. {_ONE_VALUE_EACH.format(name=name)}",
        )
        self.name, self.values, self.images = name, values, images


def predictions_table(answer: Any, batch: Mapping[str, Any], rows: int, passthrough: Sequence[str] = ()) -> pa.Table:
    """Return a predictor's return value as a table.

    Args:
        answer: A mapping of columns, a pandas DataFrame or an Arrow table. A column is a list, tuple, numpy array, torch
            tensor, pandas Series or Arrow array whose first axis is the image. No other iterable is accepted, since a text
            or a dict has a length, too.
        batch: The arrays that the predictor was given. If it returns them, they are left out.
        rows: Number of images.
        passthrough: Columns of the input that the output has beside the predictor's.

    Returns:
        A table with ``rows`` rows.

    Raises:
        RowError: ``postprocess OUTPUT_MISMATCH`` if the answer is something else; :class:`WrongCountError` if a column has
            another length.
        UserError: If a column has the name of a column that the output has already.
    """
    columns: dict[str, Any] = {}
    for name, values in _named_columns(answer):
        # A predictor that adds to its batch and returns it does not mean to store the images.
        if name in batch and batch[name] is values:
            continue
        if name in RESERVED_COLUMNS:
            raise UserError(
                f"the predictor's column {name!r} has the name of one of the output's own",
                f"Return it under another name, such as {'my_' + str(name)!r}.",
            )
        if name in passthrough:
            raise UserError(
                f"the predictor's column {name!r} and the manifest's have the same name",
                f"Rename one of them: return {'predicted_' + str(name)!r}, or rename the column of the input.",
            )
        if str(name) in columns:
            raise _mismatch_error(f"the predictor returned two columns named {str(name)!r}")
        try:
            column = _to_arrow(name, values)
        except RowError:
            raise
        except Exception as exc:
            raise _mismatch_error(f"the predictor's column {name!r} cannot be stored: {exc}") from exc
        if len(column) != rows:
            raise WrongCountError(name, len(column), rows)
        columns[str(name)] = column
    if not columns:
        raise _mismatch_error('the predictor returned no columns. Return a dict such as {"score": scores}')
    # String views, which polars returns, can be neither taken nor filtered by row.
    return plain_inputs(pa.table(columns), complete=False)


def _mismatch_error(message: str) -> RowError:
    return RowError("postprocess", "OUTPUT_MISMATCH", message)


def _named_columns(answer: Any) -> Iterable[tuple[Any, Any]]:
    """Return the names and values of the columns of an answer."""
    if isinstance(answer, Mapping):
        return answer.items()
    if isinstance(answer, (pa.Table, pa.RecordBatch)):
        return zip(answer.schema.names, answer.columns, strict=True)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(answer, pandas.DataFrame):
        return [(name, answer.iloc[:, index]) for index, name in enumerate(answer.columns)]
    raise _mismatch_error(
        f"the predictor returned {type(answer).__name__}, not a dict of columns. {_return_hint(answer)}"
    )


def _return_hint(answer: Any) -> str:
    """Return what to write in the class instead of an answer that is not a dict of columns."""
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


def _to_arrow(name: object, values: Any) -> pa.Array | pa.ChunkedArray:
    """Return a column as an Arrow array; raise RowError for anything but a sequence with one value per image."""
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        # Each batch would have its own dictionary.
        return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(values, (pandas.Series, pandas.Index, pandas.api.extensions.ExtensionArray)):
        # Values count by position, whatever the index. A missing number stays NaN, as in numpy's arrays.
        if isinstance(values.dtype, (np.dtype, pandas.SparseDtype)):
            return _to_arrow(name, np.asarray(values))
        return _to_arrow(name, pa.array(values))
    if _is_tensor(values):
        values = _from_torch(values)
    elif (
        not isinstance(values, (np.ndarray, list, tuple)) and hasattr(values, "__array__") and hasattr(values, "shape")
    ):
        values = np.asarray(values)  # JAX's and TensorFlow's arrays
    if isinstance(values, np.ndarray):
        if values.ndim == 0:
            raise _mismatch_error(
                f"the predictor's column {name!r} is one value without an axis, not one value an image. squeeze() drops the axis of a "
                "batch of one image; use squeeze(1), or reshape(len(batch['image']))"
            )
        return _array_from_list(list(values)) if values.dtype == object else _array_from_numpy(values)
    if not isinstance(values, (list, tuple)):
        raise _mismatch_error(
            f"the predictor's column {name!r} is {_describe_value(values)}, not one value an image. {_ONE_VALUE_EACH.format(name=name)}"
        )
    if isinstance(values, tuple) and type(values) is not tuple:  # such as what torch.max returns: two columns
        raise _mismatch_error(
            f"the predictor's column {name!r} is one {type(values).__name__} (a named tuple), not one value an image. "
            f"{_ONE_VALUE_EACH.format(name=name)}"
        )
    return _array_from_list(list(values))


def is_sequence(values: Any) -> bool:
    """Return whether a value can be a column: a list, tuple, array, tensor, Series or Arrow array, but not a text or a dict."""
    if isinstance(values, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray)):
        return True
    return hasattr(values, "__array__") and bool(getattr(values, "shape", ()))


def _describe_value(values: Any) -> str:
    """Describe a value that cannot be a column."""
    descriptions: tuple[tuple[Any, str], ...] = (
        (str, "one text"),
        ((bytes, bytearray, memoryview), "one bytes object"),
        (Mapping, "one dict"),
        ((set, frozenset), "a set, which has no order"),
        ((bool, int, float, complex, np.generic), f"one value ({type(values).__name__})"),
        (type(None), "None"),
    )
    for types, description in descriptions:
        if isinstance(values, types):
            return description
    if inspect.isgenerator(values):
        return "a generator (write list(…) around it)"
    return f"one {type(values).__name__}"


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_torch(tensor: Any) -> Any:
    """Return a tensor of any device, layout and type as an array.

    Types that numpy lacks (bfloat16, float8) become float32. A nested tensor becomes a list of arrays.
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


def _array_from_numpy(array: np.ndarray) -> pa.Array:
    """Return a numpy array of any rank as an Arrow array, with lists for the axes after the first."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not isinstance(array, np.ma.MaskedArray):
        array = np.asarray(array)  # an np.matrix is always two-dimensional
    if array.dtype.kind in "cV" or array.dtype == np.longdouble:
        raise TypeError(f"Parquet has no type for arrays of {array.dtype}")
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.array(array.reshape(-1))
    for axis in range(array.ndim - 1, 0, -1):
        lists = int(np.prod(array.shape[:axis], dtype=np.int64))
        flat = pa.ListArray.from_arrays(pa.array(np.arange(lists + 1) * array.shape[axis], pa.int32()), flat)
    return flat


def _array_from_list(values: list[Any]) -> pa.Array:
    """Return an Arrow array of a list with one value per image: numbers, texts, lists, dicts, arrays, tensors or None."""
    values = [_from_torch(value) if _is_tensor(value) else value for value in values]
    # Concatenating arrays would lose their masks.
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
        return _ragged_array(values, first)
    cells = [_to_python(value) for value in values]
    column = pa.array(cells)
    if pa.types.is_binary(column.type) and any(isinstance(value, str) for value in values):
        raise TypeError("it has both texts and bytes")
    if _has_dates(column.type):
        date_types = sorted({date_type for cell in cells for date_type in _date_types(cell)})
        if len(date_types) > 1:  # Arrow would use the first type for all, and cut off or shift times
            raise TypeError(f"it has {' and '.join(date_types)}")
    return column


def _has_dates(arrow_type: pa.DataType) -> bool:
    """Return whether a type has dates or times, at any depth."""
    if pa.types.is_date(arrow_type) or pa.types.is_timestamp(arrow_type):
        return True
    return any(_has_dates(arrow_type.field(index).type) for index in range(arrow_type.num_fields))


def _date_types(cell: Any) -> Iterator[str]:
    """Yield a description of each date and time in a cell, at any depth."""
    if isinstance(cell, dt.datetime):
        yield "times without a time zone" if cell.tzinfo is None else "times with a time zone"
    elif isinstance(cell, dt.date):
        yield "dates"
    elif isinstance(cell, Mapping):
        for part in cell.values():
            yield from _date_types(part)
    elif isinstance(cell, (list, tuple, set, frozenset)):
        for part in cell:
            yield from _date_types(part)


def _ragged_array(values: list[Any], like: Any) -> pa.Array:
    """Return an Arrow array of numpy arrays with one type and rank but any sizes. The type is kept even if all of them are empty."""
    missing = np.array([value is None for value in values])
    if like.ndim == 0:
        return pa.array(np.array([like.dtype.type(0) if v is None else v for v in values], like.dtype), mask=missing)
    arrays = [np.asarray(v) for v in values if v is not None]
    array: pa.Array = _array_from_numpy(np.concatenate([a.reshape(-1) for a in arrays]))
    for axis in range(like.ndim - 1, 0, -1):
        # The shape of an array says how many lists of this depth it has.
        sizes = np.concatenate([np.full(int(np.prod(a.shape[:axis], dtype=np.int64)), a.shape[axis]) for a in arrays])
        array = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(sizes)), pa.int32()), array)
    counts = np.array([0 if v is None else np.asarray(v).shape[0] for v in values])
    offsets = np.append(0, np.cumsum(counts))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32(), mask=np.append(missing, False)), array)


def _to_python(value: Any) -> Any:
    """Return a cell with its arrays and tensors, at any depth, converted to Python lists and numbers."""
    if _is_tensor(value):
        value = _from_torch(value)
    if isinstance(value, Mapping):
        return {key: _to_python(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_python(part) for part in value]
    if isinstance(value, memoryview):
        return value.tobytes()
    pandas = sys.modules.get("pandas")
    if pandas is not None and (value is pandas.NA or value is pandas.NaT):
        return None
    return value.tolist() if hasattr(value, "tolist") else value
