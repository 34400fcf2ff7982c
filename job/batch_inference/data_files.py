"""Committed files, of which only the columns are fetched that are asked for: of embeddings not a byte where nobody wants them."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.ledger import DataFile
from batch_inference.storage import Store

# Files up to this size are read with one request; of larger ones this much from the end holds the footer.
_SMALL_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16


def opened(store: Store, file: DataFile) -> pq.ParquetFile:
    """Opens a committed file; small ones are fetched at once.

    Raises:
        FileNotFoundError: If it is gone.
        ArrowException: If it is no Parquet file.
    """
    if file.bytes <= _SMALL_BYTES:
        return pq.ParquetFile(pa.BufferReader(store.get(file.path)))
    return pq.ParquetFile(pa.PythonFile(_File(store, file), mode="r"))


class _File(io.RawIOBase):
    """A committed file for pyarrow: the end first, which has the footer, then what is asked for."""

    def __init__(self, store: Store, file: DataFile) -> None:
        super().__init__()
        self._store = store
        self._path = file.path
        self._size = file.bytes
        self._at = 0
        self._tail_from = max(0, self._size - _TAIL_BYTES)
        self._tail: bytes | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Reads so many bytes, or up to the end."""
        end = self._size if size is None or size < 0 else min(self._size, self._at + size)
        start, self._at = self._at, max(self._at, end)
        if start >= end:
            return b""
        if start >= self._tail_from:
            if self._tail is None:
                self._tail = self._store.get_range(self._path, self._tail_from, self._size)
            return self._tail[start - self._tail_from : end - self._tail_from]
        return self._store.get_range(self._path, start, end)
