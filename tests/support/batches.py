"""Prepared rows as the actors get them, and the errors of result rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from batch_inference.pipeline.schemas import PREPARED_SCHEMA


def image(number: int, size: tuple[int, int] = (2, 3)) -> np.ndarray:
    """Return an RGB image, uint8 (height, width, 3), whose values are all ``number``."""
    return np.full((*size, 3), number, np.uint8)


def prepared(items: list[np.ndarray | tuple[str, str]], chunks: int = 1) -> pa.Table:
    """Return rows of one shard, of ``PREPARED_SCHEMA``.

    Args:
        items: Images, or the stage and error type of rows that failed before.
        chunks: Number of chunks of the table.
    """
    rows = []
    for row, item in enumerate(items):
        good = isinstance(item, np.ndarray)
        stage, error_type = (None, None) if good else item
        rows.append(
            {
                "shard": 7,
                "row": row,
                "uri": f"s3://b/{row}.jpg",
                "pixels": item.tobytes() if good else None,
                "height": item.shape[0] if good else 0,
                "width": item.shape[1] if good else 0,
                "stage": stage,
                "error_type": error_type,
                "message": error_type and f"it was {error_type}",
                "retryable": error_type == "TIMEOUT",
                "bytes": 100 + row,
                "fetch_s": 1.0,
                "decode_s": 2.0,
                "retries": row,
            }
        )
    size = -(-len(rows) // chunks) or 1
    parts = [pa.Table.from_pylist(rows[i : i + size], PREPARED_SCHEMA) for i in range(0, len(rows), size)]
    return pa.concat_tables(parts or [PREPARED_SCHEMA.empty_table()])


def errors(table: pa.Table) -> list[tuple[str, str] | None]:
    """Return the stage and error type of each row; None where it has no error."""
    pairs = zip(table["stage"].to_pylist(), table["error_type"].to_pylist(), strict=True)
    return [(stage, error_type) if error_type else None for stage, error_type in pairs]
