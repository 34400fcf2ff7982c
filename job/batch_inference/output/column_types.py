"""Types of columns: one plain form for each type, a type that holds the values of two, and casts without loss."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

#: Type of a column, or of a part of one, without any value so far.
OPEN_TYPE = pa.null()
_ANY_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
_NO_KERNELS = (
    pa.types.is_string_view,
    pa.types.is_binary_view,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
    pa.types.is_run_end_encoded,
)
# Families of types that Arrow itself casts into one another. It raises if a value would lose something.
_CASTABLE: tuple[tuple[Callable[[pa.DataType], bool], ...], ...] = (
    (pa.types.is_decimal,),
    (pa.types.is_date,),
    (pa.types.is_time,),
    (pa.types.is_timestamp,),
    (pa.types.is_duration,),
    (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary),
    (pa.types.is_map,),
)


@functools.lru_cache(maxsize=1024)
def plain_type(arrow_type: pa.DataType) -> pa.DataType:
    """Return the type in which the output stores values of a type.

    Views, dictionaries, run ends, 64-bit offsets and extension types only describe how values lie in memory. Arrow has
    no kernels for some of them, and other programs cannot read all of them.

    >>> plain_type(pa.list_(pa.dictionary(pa.int8(), pa.large_string())))
    ListType(list<item: string>)

    Raises:
        ArrowNotImplementedError: If Parquet has no such type, such as a union.
    """
    arrow_type = _without_layout(arrow_type)
    if is_open(arrow_type):
        _stored_type(text_where_open(arrow_type))
        return arrow_type
    # Parquet has no timestamps in seconds, for example; they come back as milliseconds.
    return _without_layout(_stored_type(arrow_type))


def _stored_type(arrow_type: pa.DataType) -> pa.DataType:
    sink = io.BytesIO()
    pq.write_table(pa.schema([("column", arrow_type)]).empty_table(), sink)
    return pq.read_schema(io.BytesIO(sink.getvalue())).field(0).type


def _without_layout(arrow_type: pa.DataType) -> pa.DataType:
    if isinstance(arrow_type, pa.BaseExtensionType):
        return _without_layout(arrow_type.storage_type)
    if pa.types.is_dictionary(arrow_type) or pa.types.is_run_end_encoded(arrow_type):
        return _without_layout(arrow_type.value_type)
    if pa.types.is_string_view(arrow_type) or pa.types.is_large_string(arrow_type):
        return pa.string()
    if pa.types.is_binary_view(arrow_type) or pa.types.is_large_binary(arrow_type):
        return pa.binary()
    if pa.types.is_fixed_size_list(arrow_type):
        return pa.list_(_without_layout(arrow_type.value_type), arrow_type.list_size)
    if _is_list(arrow_type):
        return pa.list_(_without_layout(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        # A dict without keys has no value either, and Parquet cannot store a struct without fields.
        return (
            pa.struct([(f.name, _without_layout(f.type)) for f in arrow_type]) if arrow_type.num_fields else OPEN_TYPE
        )
    if pa.types.is_map(arrow_type):
        return pa.map_(_without_layout(arrow_type.key_type), _without_layout(arrow_type.item_type))
    return arrow_type


def has_kernels(arrow_type: pa.DataType) -> bool:
    """Return whether Arrow can take, filter and join values of a type."""
    if isinstance(arrow_type, pa.BaseExtensionType):
        return has_kernels(arrow_type.storage_type)
    if pa.types.is_dictionary(arrow_type):
        return has_kernels(arrow_type.value_type)
    if any(test(arrow_type) for test in _NO_KERNELS):
        return False
    return all(has_kernels(arrow_type.field(index).type) for index in range(arrow_type.num_fields))


def plain_inputs(table: pa.Table, *, complete: bool = True) -> pa.Table:
    """Return a table of inputs whose columns have kernels in Arrow and are readable by every program.

    Columns that are so already stay as they are: a dictionary takes less memory than its values.

    Args:
        table: Columns of any types.
        complete: Whether these are all rows. A column without any value then becomes text, because some readers have no
            type for null.
    """
    for index, field in enumerate(table.schema):
        if not has_kernels(field.type) or (complete and is_open(field.type)):
            target = _without_layout(field.type)
            if complete:
                target = text_where_open(target)
            chunks = [cast_values(chunk, target)[0] for chunk in table.column(index).chunks]
            table = table.set_column(index, field.name, pa.chunked_array(chunks, target))
    return table


def is_open(arrow_type: pa.DataType) -> bool:
    """Return whether the type of a column, or of a part of it, is unknown: all values were null, or all lists empty."""
    if pa.types.is_null(arrow_type):
        return True
    return any(is_open(arrow_type.field(index).type) for index in range(arrow_type.num_fields))


def text_where_open(arrow_type: pa.DataType) -> pa.DataType:
    """Return a type with text in place of open parts, which hold only nulls, whichever type they turn out to have."""
    if pa.types.is_null(arrow_type):
        return pa.string()
    return _with_parts(
        arrow_type, [text_where_open(arrow_type.field(index).type) for index in range(arrow_type.num_fields)]
    )


def fill_open_parts(arrow_type: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type whose open parts are filled from another type; known parts stay."""
    if pa.types.is_null(arrow_type):
        return other
    if _is_list(arrow_type) and _is_list(other):
        return _with_parts(arrow_type, [fill_open_parts(arrow_type.value_type, other.value_type)])
    if pa.types.is_struct(arrow_type) and pa.types.is_struct(other):
        types = {field.name: field.type for field in other}
        return _with_parts(arrow_type, [fill_open_parts(f.type, types.get(f.name, f.type)) for f in arrow_type])
    return arrow_type


def merge_types(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Return a plain type that holds the values of two types; the first if there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        return _wider_integer(a, b)
    if _is_number(a) and _is_number(b):
        both_floats = pa.types.is_floating(a) and pa.types.is_floating(b)
        return max(a, b, key=lambda number: number.bit_width) if both_floats else pa.float64()
    if _is_list(a) and _is_list(b):
        inner = merge_types(a.value_type, b.value_type)
        same_size = pa.types.is_fixed_size_list(a) and pa.types.is_fixed_size_list(b) and a.list_size == b.list_size
        return pa.list_(inner, a.list_size) if same_size else pa.list_(inner)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = {field.name: field.type for field in a}
        for field in b:
            fields[field.name] = merge_types(fields[field.name], field.type) if field.name in fields else field.type
        return pa.struct(list(fields.items()))
    return a


def _wider_integer(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if pa.types.is_signed_integer(a) == pa.types.is_signed_integer(b):
        return max(a, b, key=lambda number: number.bit_width)
    signed, other = (a, b) if pa.types.is_signed_integer(a) else (b, a)
    if signed.bit_width > other.bit_width:
        return signed
    return {8: pa.int16(), 16: pa.int32(), 32: pa.int64(), 64: pa.int64()}[other.bit_width]


def _with_parts(arrow_type: pa.DataType, inner: list[pa.DataType]) -> pa.DataType:
    """Return a type of the same form with other parts."""
    if pa.types.is_fixed_size_list(arrow_type):
        return pa.list_(inner[0], arrow_type.list_size)
    if _is_list(arrow_type):
        return pa.list_(inner[0])
    if pa.types.is_struct(arrow_type):
        return pa.struct([(field.name, part) for field, part in zip(arrow_type, inner, strict=True)])
    if pa.types.is_map(arrow_type):
        entry = inner[0]
        return pa.map_(entry.field(0).type, entry.field(1).type)
    return arrow_type


def _is_list(arrow_type: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(arrow_type) or any(test(arrow_type) for test in _ANY_LIST)


def _is_number(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type))


# --- values ---


def cast_values(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    """Cast values to a plain type.

    Args:
        array: Values of any type.
        target: A type as :func:`plain_type` returns it, without open parts.

    Returns:
        As many values of that type, null for those that would have lost something; and bool (n,), False for those, or
        None if all values fit.
    """
    arrow_type = array.type
    if arrow_type == target:
        return array, None
    if isinstance(arrow_type, pa.BaseExtensionType):
        return cast_values(array.storage, target)
    if pa.types.is_dictionary(arrow_type):
        return cast_values(array.dictionary_decode(), target)
    if pa.types.is_run_end_encoded(arrow_type):
        return cast_values(pc.run_end_decode(array), target)
    if pa.types.is_null(arrow_type):
        return pa.nulls(len(array), target), None
    if _is_list(arrow_type) and _is_list(target):
        return _fit_lists(array, target)
    if pa.types.is_struct(arrow_type) and pa.types.is_struct(target):
        return _fit_structs(array, target)
    if not len(array):
        return pa.array([], target), None
    if _is_number(arrow_type) and _is_number(target):
        return _fit_numbers(array, target)
    if _arrow_casts(arrow_type, target):
        return _fit_by_arrow(array, target)
    return pa.nulls(len(array), target), empty_mask(array)


def empty_mask(array: pa.Array) -> np.ndarray:
    """Return which values are empty, bool (n,): nulls, and dicts without any value."""
    null: np.ndarray = array.is_null().to_numpy(zero_copy_only=False)
    if not pa.types.is_struct(array.type):
        return null
    return np.asarray(np.logical_and.reduce([np.ones(len(array), bool), *map(empty_mask, array.flatten())]))


def _arrow_casts(arrow_type: pa.DataType, target: pa.DataType) -> bool:
    """Return whether two types are of one family that Arrow casts."""
    same_family = any(
        any(test(arrow_type) for test in family) and any(test(target) for test in family) for family in _CASTABLE
    )
    return same_family and _same_zone_awareness(arrow_type, target)


def _same_zone_awareness(arrow_type: pa.DataType, target: pa.DataType) -> bool:
    """Return whether two timestamp types both have a time zone or both have none; without one a time is ambiguous."""
    return not pa.types.is_timestamp(arrow_type) or (arrow_type.tz is None) == (target.tz is None)


def _fit_lists(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    null = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.where(null, 0, array.type.list_size)
    else:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    values, ok_values = cast_values(array.flatten(), target.value_type)  # without those of null lists
    ok: np.ndarray | None = None
    if ok_values is not None:
        bad = np.concatenate([[0], np.cumsum(~ok_values)])
        ok = bad[ends[1:]] == bad[ends[:-1]]
    if not pa.types.is_fixed_size_list(target):
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=pa.array(null)), ok
    size = target.list_size
    right_size = lengths == size
    if not (right_size | null).all():
        ok = (right_size | null) & (True if ok is None else ok)
    # A fixed-size list that is null takes room for its values, too.
    valid = right_size & ~null
    indexes = np.where(valid[:, None], ends[:-1, None] + np.arange(size), 0).reshape(-1)
    values = values.take(pa.array(indexes, pa.int64(), mask=np.repeat(~valid, size)))
    return pa.FixedSizeListArray.from_arrays(values, size, mask=pa.array(~valid)), ok


def _fit_structs(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    null = array.is_null().to_numpy(zero_copy_only=False)
    given = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
    ok: np.ndarray | None = None
    parts = []
    for field in target:
        values = given.pop(field.name, None)
        part, fits = (pa.nulls(len(array), field.type), None) if values is None else cast_values(values, field.type)
        parts.append(part)
        ok = _both(ok, fits)
    for values in given.values():
        ok = _both(ok, empty_mask(values))
    return pa.StructArray.from_arrays(parts, fields=list(target), mask=pa.array(null)), ok


def _both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    return b if a is None else a if b is None else a & b


def _fit_numbers(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    null = array.is_null().to_numpy(zero_copy_only=False)
    to = np.dtype(target.to_pandas_dtype())
    if pa.types.is_integer(array.type):
        values = array.fill_null(0).to_numpy(zero_copy_only=False)
        if pa.types.is_integer(target):
            low, high = int(np.iinfo(to).min), int(np.iinfo(to).max)
            fits = np.array((values >= max(low, int(np.iinfo(values.dtype).min))) & (values <= high))
        else:
            fits = _exact(values, to)
    elif pa.types.is_integer(target):
        # 2.0 is not cast to 2 either: chance must not decide which rows of a float column are errors.
        fits = null.copy()
        values = np.zeros(len(array), to)
    else:
        values = array.to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            fits = (values.astype(to).astype(values.dtype) == values) | np.isnan(values)
    fits |= null
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(to)
    return pa.array(cast, target, mask=null | ~fits), None if fits.all() else fits


def _exact(values: np.ndarray, to: np.dtype) -> np.ndarray:
    """Return which integers a float type represents exactly; compared as Python integers, which have no limits."""
    digits = np.finfo(to).nmant + 1
    exact = (values <= 2**digits) & (values >= (-(2**digits) if values.dtype.kind == "i" else 0))
    if exact.all():
        return np.asarray(exact)
    with np.errstate(over="ignore"):
        floats = values.astype(to)
    return np.array(
        [ok or (np.isfinite(f) and int(f) == int(v)) for ok, f, v in zip(exact, floats, values, strict=True)], bool
    )


def _fit_by_arrow(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    try:
        return array.cast(target), None
    except pa.ArrowException:
        pass
    parts, fits = [], []
    for index in range(len(array)):
        try:
            parts.append(array.slice(index, 1).cast(target))
            fits.append(True)
        except pa.ArrowException:
            parts.append(pa.nulls(1, target))
            fits.append(False)
    return pa.concat_arrays(parts), np.array(fits)
