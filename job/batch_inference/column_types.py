"""Types of columns: one plain form for each, a type that holds two, and casts in which no value loses anything."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

#: Type of a column, or of a part of one, of which no value is known yet.
OPEN = pa.null()
_ANY_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
_NO_KERNELS = (
    pa.types.is_string_view,
    pa.types.is_binary_view,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
    pa.types.is_run_end_encoded,
)
# Types between which Arrow's own cast is asked. It raises where a value would lose something.
_ALIKE: tuple[tuple[Callable[[pa.DataType], bool], ...], ...] = (
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
def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the form in which the output stores values of a type.

    Views, dictionaries, run ends, 64-bit offsets and extension types only say how values lie in memory. Some of them have no
    kernels in Arrow, and other programs cannot read all of them.

    >>> plain_type(pa.list_(pa.dictionary(pa.int8(), pa.large_string())))
    ListType(list<item: string>)

    Raises:
        ArrowNotImplementedError: If Parquet has no such type, such as a union.
    """
    kind = _without_layout(kind)
    if is_open(kind):
        _stored(closed(kind))
        return kind
    # Parquet has no seconds, for example: those come back as milliseconds.
    return _without_layout(_stored(kind))


def _stored(kind: pa.DataType) -> pa.DataType:
    sink = io.BytesIO()
    pq.write_table(pa.schema([("column", kind)]).empty_table(), sink)
    return pq.read_schema(io.BytesIO(sink.getvalue())).field(0).type


def _without_layout(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _without_layout(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _without_layout(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_without_layout(kind.value_type), kind.list_size)
    if _is_list(kind):
        return pa.list_(_without_layout(kind.value_type))
    if pa.types.is_struct(kind):
        # A dict without keys has no value either, and Parquet has no struct without fields.
        return pa.struct([(f.name, _without_layout(f.type)) for f in kind]) if kind.num_fields else OPEN
    if pa.types.is_map(kind):
        return pa.map_(_without_layout(kind.key_type), _without_layout(kind.item_type))
    return kind


def has_kernels(kind: pa.DataType) -> bool:
    """Whether Arrow can take, filter and join values of a type."""
    if isinstance(kind, pa.BaseExtensionType):
        return has_kernels(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return has_kernels(kind.value_type)
    if any(test(kind) for test in _NO_KERNELS):
        return False
    return all(has_kernels(kind.field(place).type) for place in range(kind.num_fields))


def plain_inputs(table: pa.Table, *, whole: bool = True) -> pa.Table:
    """Return a table of inputs whose columns can be taken from, and be read by every program.

    Columns of other types stay as they are: a dictionary takes less memory than its values.

    Args:
        table: Columns of any types.
        whole: Whether these are all lines. A column without any value then becomes text, since some readers have no type for
            nothing.
    """
    for place, field in enumerate(table.schema):
        if not has_kernels(field.type) or (whole and is_open(field.type)):
            target = _without_layout(field.type)
            if whole:
                target = closed(target)
            chunks = [fit(chunk, target)[0] for chunk in table.column(place).chunks]
            table = table.set_column(place, field.name, pa.chunked_array(chunks, target))
    return table


def is_open(kind: pa.DataType) -> bool:
    """Whether the type of a column, or of a part of it, is not known yet: all values were null, or all lists empty."""
    if pa.types.is_null(kind):
        return True
    return any(is_open(kind.field(place).type) for place in range(kind.num_fields))


def closed(kind: pa.DataType) -> pa.DataType:
    """Return a type in which what is not known is text; only a null fits into it, whichever type it turns out to be."""
    if pa.types.is_null(kind):
        return pa.string()
    return _rebuilt(kind, [closed(kind.field(place).type) for place in range(kind.num_fields)])


def refined(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return a type whose open parts are taken from another one; what is known stays."""
    if pa.types.is_null(kind):
        return other
    if _is_list(kind) and _is_list(other):
        return _rebuilt(kind, [refined(kind.value_type, other.value_type)])
    if pa.types.is_struct(kind) and pa.types.is_struct(other):
        there = {field.name: field.type for field in other}
        return _rebuilt(kind, [refined(f.type, there.get(f.name, f.type)) for f in kind])
    return kind


def merged(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Return a plain type that holds the values of two; the first where there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_integer(a) and pa.types.is_integer(b):
        return _wider_integer(a, b)
    if _is_number(a) and _is_number(b):
        both_floats = pa.types.is_floating(a) and pa.types.is_floating(b)
        return max(a, b, key=lambda kind: kind.bit_width) if both_floats else pa.float64()
    if _is_list(a) and _is_list(b):
        inner = merged(a.value_type, b.value_type)
        same = pa.types.is_fixed_size_list(a) and pa.types.is_fixed_size_list(b) and a.list_size == b.list_size
        return pa.list_(inner, a.list_size) if same else pa.list_(inner)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = {field.name: field.type for field in a}
        for field in b:
            fields[field.name] = merged(fields[field.name], field.type) if field.name in fields else field.type
        return pa.struct(list(fields.items()))
    return a


def _wider_integer(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    if pa.types.is_signed_integer(a) == pa.types.is_signed_integer(b):
        return max(a, b, key=lambda kind: kind.bit_width)
    signed, other = (a, b) if pa.types.is_signed_integer(a) else (b, a)
    if signed.bit_width > other.bit_width:
        return signed
    return {8: pa.int16(), 16: pa.int32(), 32: pa.int64(), 64: pa.int64()}[other.bit_width]


def _rebuilt(kind: pa.DataType, inner: list[pa.DataType]) -> pa.DataType:
    """Return a type of the same form around other parts."""
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner[0], kind.list_size)
    if _is_list(kind):
        return pa.list_(inner[0])
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, part) for field, part in zip(kind, inner, strict=True)])
    if pa.types.is_map(kind):
        entry = inner[0]
        return pa.map_(entry.field(0).type, entry.field(1).type)
    return kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or any(test(kind) for test in _ANY_LIST)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


# --- values --------------------------------------------------------------------------------------------------------------


def fit(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    """Cast values to a plain type.

    Args:
        array: Values of any type.
        target: A type as :func:`plain_type` gives it, with nothing open.

    Returns:
        As many values of that type, null where one would have lost something; and bool (n,), False for those. None in its place if
        all fit.
    """
    kind = array.type
    if kind == target:
        return array, None
    if isinstance(kind, pa.BaseExtensionType):
        return fit(array.storage, target)
    if pa.types.is_dictionary(kind):
        return fit(array.dictionary_decode(), target)
    if pa.types.is_run_end_encoded(kind):
        return fit(pc.run_end_decode(array), target)
    if pa.types.is_null(kind):
        return pa.nulls(len(array), target), None
    if _is_list(kind) and _is_list(target):
        return _fit_lists(array, target)
    if pa.types.is_struct(kind) and pa.types.is_struct(target):
        return _fit_structs(array, target)
    if not len(array):
        return pa.array([], target), None
    if _is_number(kind) and _is_number(target):
        return _fit_numbers(array, target)
    if any(any(t(kind) for t in family) and any(t(target) for t in family) for family in _ALIKE) and _same_clock(
        kind, target
    ):
        return _fit_by_arrow(array, target)
    return pa.nulls(len(array), target), nothing(array)


def nothing(array: pa.Array) -> np.ndarray:
    """Return which values hold nothing, bool (n,): null, and dicts that have no key with a value."""
    null: np.ndarray = array.is_null().to_numpy(zero_copy_only=False)
    if not pa.types.is_struct(array.type):
        return null
    return np.asarray(np.logical_and.reduce([np.ones(len(array), bool), *map(nothing, array.flatten())]))


def _same_clock(kind: pa.DataType, target: pa.DataType) -> bool:
    """Whether both or none of two types are moments, if they are times: without a zone one does not say which moment it is."""
    return not pa.types.is_timestamp(kind) or (kind.tz is None) == (target.tz is None)


def _fit_lists(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    null = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.where(null, 0, array.type.list_size)
    else:
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    values, ok_values = fit(array.flatten(), target.value_type)  # those of null lists left out
    ok: np.ndarray | None = None
    if ok_values is not None:
        bad = np.concatenate([[0], np.cumsum(~ok_values)])
        ok = bad[ends[1:]] == bad[ends[:-1]]
    if not pa.types.is_fixed_size_list(target):
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, mask=pa.array(null)), ok
    size = target.list_size
    right = lengths == size
    if not (right | null).all():
        ok = (right | null) & (True if ok is None else ok)
    # A fixed-size list has its values in place where it is null, too.
    there = right & ~null
    places = np.where(there[:, None], ends[:-1, None] + np.arange(size), 0).reshape(-1)
    values = values.take(pa.array(places, pa.int64(), mask=np.repeat(~there, size)))
    return pa.FixedSizeListArray.from_arrays(values, size, mask=pa.array(~there)), ok


def _fit_structs(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    null = array.is_null().to_numpy(zero_copy_only=False)
    given = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
    ok: np.ndarray | None = None
    parts = []
    for field in target:
        values = given.pop(field.name, None)
        part, fits = (pa.nulls(len(array), field.type), None) if values is None else fit(values, field.type)
        parts.append(part)
        ok = _both(ok, fits)
    for values in given.values():
        ok = _both(ok, nothing(values))
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
        # 2.0 is not cast to 2 either: which rows of a column of fractions are errors must not depend on chance.
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
    """Return which integers a float type has: those that it gives back. Compared as Python's, which have no limits."""
    digits = np.finfo(to).nmant + 1
    small = (values <= 2**digits) & (values >= (-(2**digits) if values.dtype.kind == "i" else 0))
    if small.all():
        return np.asarray(small)
    with np.errstate(over="ignore"):
        floats = values.astype(to)
    return np.array(
        [ok or (np.isfinite(f) and int(f) == int(v)) for ok, f, v in zip(small, floats, values, strict=True)], bool
    )


def _fit_by_arrow(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, np.ndarray | None]:
    try:
        return array.cast(target), None
    except pa.ArrowException:
        pass
    parts, fits = [], []
    for place in range(len(array)):
        try:
            parts.append(array.slice(place, 1).cast(target))
            fits.append(True)
        except pa.ArrowException:
            parts.append(pa.nulls(1, target))
            fits.append(False)
    return pa.concat_arrays(parts), np.array(fits)
