"""Objects as seekable files: what a library reads from them becomes range requests."""

from __future__ import annotations

import abc
import io

from batch_inference.errors import RowError
from batch_inference.storage.fetcher import Buffer, Fetcher

_FIRST_BYTES = 4 * 1024
_MAX_CHUNK_BYTES = 4 * 1024 * 1024
# A request takes a store 10 to 30 ms, in which a connection carries a megabyte: a nearby position is reached by reading through.
_NEAR_BYTES = 256 * 1024


class SeekableFile(io.RawIOBase, abc.ABC):
    """A read-only file whose bytes come from requests. Caching and read-ahead are the subclass's.

    Attributes:
        size: Where the file ends, in bytes; -1 while that is not known.
    """

    def __init__(self, size: int = -1) -> None:
        super().__init__()
        self.size = size
        self._position = 0

    @abc.abstractmethod
    def _fetch(self, start: int, end: int) -> Buffer:
        """Return bytes of the file from ``start`` on, at least one and at most up to ``end``; nothing at the end of the file."""

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return the next ``size`` bytes, all that are left if it is negative; fewer only at the end of the file."""
        if size is None or size < 0:
            size = max(0, self.size - self._position)
        parts = []
        while size > 0 and not 0 <= self.size <= self._position:
            part = bytes(self._fetch(self._position, self._position + size))
            if not part:
                break
            parts.append(part)
            self._position += len(part)
            size -= len(part)
        return b"".join(parts)


class RangeFile(SeekableFile):
    """An object read by ranges: small ones where reads are far apart, larger and larger ones where they follow one another.

    Args:
        fetcher: Reads the ranges.
        uri: Canonical URI.
        tail: Bytes of the object's end to begin with, for formats whose table of contents is there.
        max_read: Most bytes that one read may ask for, for formats whose damaged headers may ask for any number; None: no limit.

    Attributes:
        size: Bytes of the object, known after the first read.
        etag: Its entity tag, likewise.

    Raises:
        RowError: From any read, as :meth:`Fetcher.fetch_range` does, or CHANGED where the object was replaced meanwhile.
        ValueError: From a read of more than ``max_read`` bytes.
    """

    def __init__(self, fetcher: Fetcher, uri: str, tail: int = 0, max_read: int | None = None) -> None:
        super().__init__()
        self._max_read = max_read
        self._fetcher = fetcher
        self._uri = uri
        self._buffer_start = 0
        self._buffer: Buffer = b""
        self._chunk_bytes = _FIRST_BYTES
        self.etag = ""
        if tail:
            self._request(-tail, 0)
            self._buffer_start = max(0, self.size - len(self._buffer))

    def read(self, size: int | None = -1) -> bytes:
        """Return the next ``size`` bytes; fewer only at the end of the object."""
        if size is None or size < 0:
            size = max(0, self.size - self._position)
        if self._max_read is not None and size > self._max_read:
            raise ValueError(f"a header asks for {size:,} bytes")
        return super().read(size)

    def _fetch(self, start: int, end: int) -> Buffer:
        offset = start - self._buffer_start
        if not 0 <= offset < len(self._buffer):
            self._fill(start, end)
            offset = 0
        return self._buffer[offset : offset + end - start]

    def _fill(self, start: int, end: int) -> None:
        """Replace the buffer by one that begins at ``start`` and reaches to ``end`` or further."""
        buffer_end = self._buffer_start + len(self._buffer)
        near = bool(self._buffer) and buffer_end <= start <= buffer_end + _NEAR_BYTES
        self._chunk_bytes = min(2 * self._chunk_bytes, _MAX_CHUNK_BYTES) if near else _FIRST_BYTES
        self._buffer_start = start
        self._request(start, max(end, start + self._chunk_bytes))

    def _request(self, start: int, end: int) -> None:
        piece = self._fetcher.fetch_range(self._uri, start, end)
        if piece.size >= 0:
            if self.size >= 0 and (piece.size, piece.etag) != (self.size, self.etag):
                raise RowError("fetch", "CHANGED", "the file was replaced while it was read")
            self.size, self.etag = piece.size, piece.etag
        self._buffer = piece.data
