"""Read the table of contents of Parquet files, and columns beside the images."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.errors import RowError
from batch_inference.inputs.parquet_footer import FooterProbe
from batch_inference.inputs.signatures import describe_mismatch
from batch_inference.output.column_types import plain_inputs
from batch_inference.storage.etags import hash_etag, is_replaced, replaced_error
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.range_file import RangeFile

# Footers grow with the number of row groups and columns; this holds most of them.
_TAIL_BYTES = 64 * 1024
# A task reads a row group from its start to the rows that it wants.
LARGE_ROW_GROUP_BYTES = 256 * 1024 * 1024

_MAGIC = b"PAR1"
_REMEDY = "Make the file again and start a new job"

_footer_probe = FooterProbe()


@dataclass(frozen=True)
class Footer:
    """The table of contents of a Parquet file.

    Attributes:
        metadata: The footer as pyarrow parses it.
        etag_hash: The file's; None if the store has no ETags.
        row_starts: Index of the first row of each row group, and of the row behind the last, int64.
    """

    metadata: pq.FileMetaData
    etag_hash: int | None
    row_starts: np.ndarray

    @property
    def row_count(self) -> int:
        """Rows of the file."""
        return int(self.row_starts[-1])

    @property
    def group_count(self) -> int:
        """Row groups of the file."""
        return len(self.row_starts) - 1

    @property
    def max_group_rows(self) -> int:
        """Rows of the largest row group."""
        return int(np.diff(self.row_starts).max(initial=0))

    @property
    def column_paths(self) -> list[str]:
        """Paths of the file's columns."""
        return [self.metadata.schema.column(index).path for index in range(self.metadata.num_columns)]

    def chunk(self, group: int, column: str) -> tuple[int, int]:
        """Return the first byte of a column in a row group, and the one behind its last."""
        row_group: Any = self.metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            if chunk.path_in_schema == column:
                start = chunk.data_page_offset
                if chunk.has_dictionary_page:
                    start = min(start, chunk.dictionary_page_offset)
                return start, start + chunk.total_compressed_size
        raise KeyError(column)

    def null_count(self, column: str) -> int:
        """Return how many values of a column are null, as far as the footer has statistics."""
        index = self.column_paths.index(column)
        chunks = (self.metadata.row_group(group).column(index) for group in range(self.metadata.num_row_groups))
        return sum(
            chunk.statistics.null_count for chunk in chunks if chunk.is_stats_set and chunk.statistics.has_null_count
        )


@functools.lru_cache(maxsize=32)
def read_footer(fetcher: Fetcher, uri: str, etag_hash: int | None = None) -> Footer:
    """Read the footer of a Parquet file, usually by one request; footers are cached.

    Args:
        fetcher: Sends the requests.
        uri: Canonical URI.
        etag_hash: The file's when it was listed, so that the footer of a replaced file is neither read nor cached.

    Raises:
        RowError: If it is not a complete Parquet file: stage ``list``, EMPTY_FILE, UNKNOWN_FORMAT, TRUNCATED or CORRUPT; or it
            can't be read, or has been replaced.
    """
    file = RangeFile(fetcher, uri, tail=_TAIL_BYTES)
    current = hash_etag(file.etag)
    if is_replaced(etag_hash, current):
        raise replaced_error(uri)
    _refuse_other_format(file)
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise RowError(
            "list",
            "CORRUPT",
            f"the file is not a readable Parquet file: {' '.join(str(exc).split())[:200]}",
            remedy=_REMEDY,
        ) from None
    # With a known hash the footer was probed when the inputs were listed.
    if etag_hash is None and not _footer_probe.survives(_footer_bytes(file)):
        raise RowError(
            "list",
            "CORRUPT",
            "the file is a damaged Parquet file: its metadata of columns cannot be read",
            remedy=_REMEDY,
        )
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    footer = Footer(metadata, current, np.cumsum([0, *(group.num_rows for group in groups)]))
    paths = footer.column_paths
    if any([group.column(n).path_in_schema for n in range(group.num_columns)] != paths for group in groups):
        raise RowError(
            "list",
            "CORRUPT",
            "the file is a damaged Parquet file: its row groups have other columns than its schema",
            remedy=_REMEDY,
        )
    return footer


def _refuse_other_format(file: RangeFile) -> None:
    """Raise RowError for a file that does not end as a Parquet file does, with its real format."""
    if file.size <= 0:
        raise RowError("list", "EMPTY_FILE", "the file is empty, not a Parquet file", remedy=_REMEDY)
    file.seek(max(0, file.size - len(_MAGIC)))
    end = file.read(len(_MAGIC))
    if end == _MAGIC:
        return
    if end == b"PARE":
        raise RowError(
            "list",
            "UNKNOWN_FORMAT",
            "the file is an encrypted Parquet file",
            remedy="Write it without encryption and start a new job",
        )
    file.seek(0)
    head = file.read(512)
    if head.startswith(_MAGIC):
        raise RowError(
            "list",
            "TRUNCATED",
            f"the file is a Parquet file that ends at byte {file.size:,} without its footer, so that none of its rows can be found",
            remedy=_REMEDY,
        )
    description, remedy = describe_mismatch(head, _REMEDY)
    raise RowError("list", "UNKNOWN_FORMAT", f"the file is not a Parquet file: {description}", remedy=remedy)


def _footer_bytes(file: RangeFile) -> bytes:
    """Return the end of a Parquet file from its metadata on; pyarrow has parsed it before."""
    file.seek(-8, io.SEEK_END)
    length = int.from_bytes(file.read(4), "little") + 8
    file.seek(-length, io.SEEK_END)
    return file.read(length)


def read_columns(uri: str, fetcher: Fetcher, names: tuple[str, ...]) -> tuple[pa.Table, list[str]]:
    """Return those of the named columns that a Parquet file has, and the names of all its columns.

    Raises:
        RowError: If the file can't be read, or the columns are damaged.
    """
    try:
        file = pq.ParquetFile(RangeFile(fetcher, uri, tail=_TAIL_BYTES))
        present = list(file.schema_arrow.names)
        table = file.read(columns=[name for name in names if name in present], use_threads=False)
        return plain_inputs(table, complete=False), present
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise RowError(
            "list",
            "CORRUPT",
            f"the columns {', '.join(names)} (input.passthrough_columns) cannot be read: {exc}",
            remedy=_REMEDY,
        ) from None


def read_first_texts(fetcher: Fetcher, uri: str, names: list[str]) -> dict[str, str]:
    """Return one text of each column; nothing if the file cannot be read: the texts only make a message more specific."""
    try:
        file = pq.ParquetFile(RangeFile(fetcher, uri, tail=_TAIL_BYTES))
        batch = next(file.iter_batches(64, columns=names, use_threads=False)) if names else None
        columns = {} if batch is None else {name: batch.column(name).to_pylist() for name in names}
    except Exception:
        return {}
    return {name: next((value for value in values if value), "") for name, values in columns.items()}
