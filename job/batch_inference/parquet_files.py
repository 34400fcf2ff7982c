"""Parquet files that hold encoded images as inputs: what is in one, and its rows by row group."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.errors import UserError
from batch_inference.fetcher import Fetcher
from batch_inference.ranges import RangeFile
from batch_inference.storage import display

# Footers grow with the number of row groups and columns; this is most of them.
_TAIL_BYTES = 64 * 1024
# A task reads a row group from its start to the rows that it wants.
LARGE_ROW_GROUP_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Footer:
    """The table of contents of a Parquet file.

    Attributes:
        metadata: What pyarrow makes of it.
        etag: The version of the file.
        starts: Number of the first row of each row group, and of the row behind the last, int64.
    """

    metadata: pq.FileMetaData
    etag: str
    starts: np.ndarray

    def chunk(self, group: int, column: str) -> tuple[int, int]:
        """First byte of a column in a row group, and the one behind its last."""
        found: Any = self.metadata.row_group(group)
        for number in range(found.num_columns):
            chunk = found.column(number)
            if chunk.path_in_schema == column:
                start = chunk.data_page_offset
                if chunk.has_dictionary_page:
                    start = min(start, chunk.dictionary_page_offset)
                return start, start + chunk.total_compressed_size
        raise KeyError(column)

    @property
    def largest_rows(self) -> int:
        """Rows of the largest row group."""
        return int(np.diff(self.starts).max(initial=0))


@functools.lru_cache(maxsize=32)
def footer(fetcher: Fetcher, uri: str, etag: str = "") -> Footer:
    """Reads the footer of a Parquet file, usually by one request; remembered.

    Args:
        fetcher: Reads it.
        uri: Canonical URI.
        etag: The version that is meant, so that none of another one is remembered.

    Raises:
        UserError: If it is not a Parquet file.
        RowFailure: If it can't be read.
    """
    file = RangeFile(fetcher, uri, tail=_TAIL_BYTES)
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as exc:
        raise UserError(
            f"{display(uri)} is not a readable Parquet file: {' '.join(str(exc).split())[:200]}",
            "Make it anew, or leave it out.",
        ) from None
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return Footer(metadata, file.etag, np.cumsum([0, *rows]))


def bytes_column(found: Footer, uri: str, wanted: str | None) -> str:
    """Path of the column that holds the images: binary, or ``bytes`` of a struct as Hugging Face's datasets write it.

    Args:
        found: The file's footer.
        uri: Its URI, for messages.
        wanted: Name of the column, None for the only one there is.

    Raises:
        UserError: If there is none, or more than one and none is named.
    """
    schema = found.metadata.schema.to_arrow_schema()
    paths = {field.name: path for field in schema if (path := _bytes_path(field))}
    if wanted is None and len(paths) == 1:
        return next(iter(paths.values()))
    if wanted in paths:
        return paths[wanted]
    kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is None and not paths:
        raise UserError(
            f"{display(uri)} has no column of encoded images; it has: {kinds}"[:500],
            "If it lists images, name it as input.manifest instead of input.uris.",
        )
    what = "several columns of bytes" if wanted is None else f"no column of bytes {wanted!r}"
    raise UserError(
        f"{display(uri)} has {what}; it has: {kinds}"[:500],
        "Set input.bytes_column to the one that holds the encoded images.",
    )


def read_columns(uri: str, fetcher: Fetcher, names: tuple[str, ...]) -> pa.Table:
    """Columns of a Parquet file, read by themselves.

    Raises:
        UserError: If there is none of that name.
        RowFailure: If the file can't be read.
    """
    file = pq.ParquetFile(RangeFile(fetcher, uri, tail=_TAIL_BYTES))
    missing = [name for name in names if name not in file.schema_arrow.names]
    if missing:
        raise UserError(
            f"{display(uri)} has no column {', '.join(missing)}; it has: {', '.join(file.schema_arrow.names)}",
            "Correct input.passthrough_columns.",
        )
    return file.read(columns=list(names), use_threads=False)


def _bytes_path(field: pa.Field) -> str:
    if _is_bytes(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        inner = field.type.get_field_index("bytes")
        if inner >= 0 and _is_bytes(field.type.field(inner).type):
            return f"{field.name}.bytes"
    return ""


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
