"""Rows from the actors to the driver: made from prepared rows, failures and predictions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.errors import RowFailure
from batch_inference.models.batch_size import PADDING_ROW
from batch_inference.output.schema import join_tables
from batch_inference.pipeline.schemas import RESULT_SCHEMA, with_failures


def result_table(table: pa.Table, failures: dict[int, RowFailure], infer_s: np.ndarray) -> pa.Table:
    """Return prepared rows as rows of :data:`RESULT_SCHEMA`.

    Args:
        table: Rows of ``PREPARED_SCHEMA``.
        failures: Rows that failed in the actor, by index in the table.
        infer_s: Seconds of inference of each row, float32 (n,).
    """
    arrays = [
        table["shard"], table["row"],
        *with_failures(table, failures).values(),
        table["bytes"], table["fetch_s"], table["decode_s"], pa.array(infer_s), table["retries"],
        table["image_damage"],
        _tracebacks(table.num_rows, failures),
    ]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=RESULT_SCHEMA)


def _tracebacks(rows: int, failures: dict[int, RowFailure]) -> pa.Array:
    if not any(failure.traceback for failure in failures.values()):
        return pa.nulls(rows, pa.string())
    return pa.array([failures[row].traceback if row in failures else None for row in range(rows)], pa.string())


def join_predictions(parts: Iterable[pa.Table | None]) -> pa.Table | None:
    """Join the predictions of parts of a batch in their order; return None where there are none.

    Columns of one name whose types differ stand beside each other: which type is the job's is known when the shard is closed.
    """
    tables = [part for part in parts if part is not None]
    return join_tables(tables) if tables else None


def with_note(result: pa.Table, note: str) -> pa.Table:
    """Put a note for the driver into the message of the first row of :data:`RESULT_SCHEMA` without an error."""
    messages = result["message"].to_pylist()
    good = pc.and_(result["error_type"].is_null(), pc.not_equal(result["row"], PADDING_ROW))
    messages[pc.index(good, True).as_py()] = note
    column = RESULT_SCHEMA.get_field_index("message")
    return result.set_column(column, RESULT_SCHEMA.field(column), pa.array(messages, pa.string()))


def notes(table: pa.Table) -> list[str]:
    """Return the notes for the driver that :func:`with_note` put into rows of :data:`RESULT_SCHEMA`."""
    if table["message"].null_count == table["error_type"].null_count:
        return []
    texts: list[str] = table["message"].filter(table["error_type"].is_null()).drop_null().to_pylist()
    return texts
