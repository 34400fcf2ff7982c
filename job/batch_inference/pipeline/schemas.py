"""Schemas of the rows that travel between the stages, and the row that ends a job."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import errors as error_classes
from batch_inference.errors import BatchInferenceError, RowFailure

#: Columns that say why a row failed; null where it did not.
FAILURE_FIELDS = (
    pa.field("stage", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("message", pa.string()),
    pa.field("retryable", pa.bool_()),
)
#: Columns that every stage has: which row it is, and why it failed.
ROW_FIELDS = (pa.field("shard", pa.int32()), pa.field("row", pa.int32()), *FAILURE_FIELDS)
_MEASURED_FIELDS = (
    pa.field("bytes", pa.int64()),
    pa.field("fetch_s", pa.float32()),
    pa.field("decode_s", pa.float32()),
)
_NOTED_FIELDS = (pa.field("retries", pa.int32()), pa.field("image_damage", pa.string()))
#: Rows from the CPU tasks to the actors. Pixels are plain bytes rather than a tensor column: rows that failed have none,
#: images of different sizes need no common type, and the actor reads them without a copy.
PREPARED_SCHEMA = pa.schema(
    [
        *ROW_FIELDS,
        pa.field("uri", pa.string()),
        pa.field("pixels", pa.large_binary()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        *_MEASURED_FIELDS,
        *_NOTED_FIELDS,
    ]
)
#: Rows from the actors to the driver; the built-in classifier's columns follow these.
RESULT_SCHEMA = pa.schema(
    [
        *ROW_FIELDS,
        *_MEASURED_FIELDS,
        pa.field("infer_s", pa.float32()),
        *_NOTED_FIELDS,
        pa.field("traceback", pa.string()),
    ]
)
#: Error type of the row that ends the job.
END_OF_JOB = "END_OF_JOB"


def pixel_column(images: list[np.ndarray | None]) -> pa.Array:
    """Return the bytes of arrays as a ``large_binary`` column, null where there is no array; each is copied once.

    Args:
        images: uint8 arrays of any shape, C-contiguous.
    """
    values = np.empty(sum(image.nbytes for image in images if image is not None), np.uint8)
    ends = [0]
    for image in images:
        start = ends[-1]
        if image is not None:
            values[start : start + image.nbytes] = image.reshape(-1)
            start += image.nbytes
        ends.append(start)
    failed = [image is None for image in images]
    valid = pa.py_buffer(np.packbits(~np.array(failed), bitorder="little").tobytes()) if any(failed) else None
    buffers = [valid, pa.py_buffer(np.array(ends, np.int64)), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_binary(), len(failed), buffers)


def image_arrays(table: pa.Table) -> tuple[np.ndarray, np.ndarray | list[np.ndarray]]:
    """Return the images of prepared rows, without a copy where that is possible.

    Args:
        table: Rows of :data:`PREPARED_SCHEMA`.

    Returns:
        Indices of the rows that have pixels, int64 (n,); and their images, uint8 (n, height, width, 3), or a list of n such
        arrays where shapes differ.
    """
    pixels = table["pixels"]
    indices = np.flatnonzero(pixels.is_valid().to_numpy())
    heights, widths = table["height"].to_numpy()[indices], table["width"].to_numpy()[indices]
    if len(indices) > 0 and (heights == heights[0]).all() and (widths == widths[0]).all():
        shape = (-1, int(heights[0]), int(widths[0]), 3)
        # Rows without pixels take no bytes, so the images of the others are contiguous.
        parts = [_bytes_of(chunk).reshape(shape) for chunk in pixels.chunks if len(chunk) > chunk.null_count]
        return indices, parts[0] if len(parts) == 1 else np.concatenate(parts)
    flat = [np.frombuffer(value.as_buffer(), np.uint8) for chunk in pixels.chunks for value in chunk if value.is_valid]
    return indices, [f.reshape(h, w, 3) for f, h, w in zip(flat, heights.tolist(), widths.tolist(), strict=True)]


def _bytes_of(chunk: pa.Array) -> np.ndarray:
    """Return all bytes of a ``large_binary`` array without its offsets."""
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64)
    return np.frombuffer(data, np.uint8)[ends[chunk.offset] : ends[chunk.offset + len(chunk)]]


def with_failures(table: pa.Table, failures: dict[int, RowFailure]) -> dict[str, pa.Array]:
    """Return a table's :data:`FAILURE_FIELDS` by name, with more failures in them.

    Args:
        table: Rows with these columns.
        failures: The failures to add, by index in the table.
    """
    columns = {field.name: table[field.name] for field in FAILURE_FIELDS}
    if failures:
        for field in FAILURE_FIELDS:
            values = columns[field.name].to_pylist()
            for index, failure in failures.items():
                values[index] = getattr(failure, field.name)
            columns[field.name] = pa.array(values, field.type)
    return columns


def end_of_job(exc: BatchInferenceError) -> pa.Table:
    """Return a failure of the whole job as a row: an exception that a task raises would reach the driver without its reason."""
    name = exc.__class__.__name__
    row = dict.fromkeys(RESULT_SCHEMA.names) | {
        "error_type": END_OF_JOB,
        "message": json.dumps([name, exc.message, exc.remedy]),
    }
    return pa.Table.from_pylist([row], RESULT_SCHEMA)


def raise_if_fatal(table: pa.Table) -> None:
    """Raise, in the driver, the failure that an actor has put into a row."""
    # Ray Data may join several tables to one block, good rows first.
    index = pc.index(table["error_type"], END_OF_JOB).as_py()
    if index >= 0:
        name, message, remedy = json.loads(table["message"][index].as_py())
        raise getattr(error_classes, name)(message, remedy)
