"""Open committed files so that only the columns that are read are fetched."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.output.records import DataFile
from batch_inference.storage.range_file import SeekableFile
from batch_inference.storage.store import Store

# Files up to this size are read with one request.
_SMALL_BYTES = 1 << 20
# Bytes at the end of a larger file, which hold its footer.
_TAIL_BYTES = 1 << 16


def open_data_file(store: Store, file: DataFile) -> pq.ParquetFile:
    """Open a committed file; a small one is fetched with one request.

    Raises:
        FileNotFoundError: If it is missing.
        ArrowException: If it is not a Parquet file.
    """
    if file.bytes <= _SMALL_BYTES:
        return pq.ParquetFile(pa.BufferReader(store.get(file.path)))
    return pq.ParquetFile(pa.PythonFile(_CommittedFile(store, file), mode="r"))


class _CommittedFile(SeekableFile):
    """A committed file for pyarrow; its end, which has the footer, is fetched once and kept."""

    def __init__(self, store: Store, file: DataFile) -> None:
        super().__init__(file.bytes)
        self._store = store
        self._path = file.path
        self._tail_start = max(0, file.bytes - _TAIL_BYTES)
        self._tail: bytes | None = None

    def _fetch(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        if start >= self._tail_start:
            if self._tail is None:
                self._tail = self._store.get_range(self._path, self._tail_start, self.size)
            data = self._tail[start - self._tail_start : end - self._tail_start]
        else:
            data = self._store.get_range(self._path, start, end)
        if len(data) < end - start:
            # Shorter than it was when it was committed.
            self.size = start + len(data)
        return data
