"""An object in a bucket as a file that is read here and there."""

from __future__ import annotations

import io

from batch_inference.errors import RowFailure
from batch_inference.fetcher import Buffer, Fetcher
from batch_inference.images import describe

_FIRST_BYTES = 4 * 1024
_MOST_BYTES = 4 * 1024 * 1024
# A request takes a store 10 to 30 ms, in which a connection carries a megabyte: what is nearer is read through.
_NEAR_BYTES = 256 * 1024


def looks_like(head: bytes, remedy: str) -> tuple[str, str]:
    """Return what a file is by its first bytes, where it is not what its name says, and what to do about it."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself", "Run: git lfs pull   and start a new job"
    return describe(head), remedy


class RangeFile(io.RawIOBase):
    """Reads an object by ranges: little at a time where reads are far apart, more and more where they follow one another.

    Args:
        fetcher: Reads the ranges.
        uri: Canonical URI.
        tail: Bytes of the object's end to begin with, for formats whose table of contents is there.
        max_read: Most bytes that one read may ask for, for formats whose damaged headers may ask for any number; None: no limit.

    Attributes:
        size: Bytes of the object, known after the first read.
        etag: Its version, likewise.

    Raises:
        RowFailure: From any read, as :meth:`Fetcher.fetch_range` does, or CHANGED where the object was replaced meanwhile.
        ValueError: From a read of more than ``max_read`` bytes.
    """

    def __init__(self, fetcher: Fetcher, uri: str, tail: int = 0, max_read: int | None = None) -> None:
        super().__init__()
        self._max_read = max_read
        self._fetcher = fetcher
        self._uri = uri
        self._place = 0
        self._start = 0
        self._data: Buffer = b""
        self._chunk = _FIRST_BYTES
        self.size = -1
        self.etag = ""
        if tail:
            self._get(-tail, 0)
            self._start = max(0, self.size - len(self._data))

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        """So many bytes from here on, fewer only at the end of the object."""
        if size < 0:
            size = max(0, self.size - self._place)
        if self._max_read is not None and size > self._max_read:
            raise ValueError(f"a header asks for {size:,} bytes")
        parts = []
        while size > 0:
            inside = self._place - self._start
            if not 0 <= inside < len(self._data):
                if self.size >= 0 and self._place >= self.size:
                    break
                self._fill(size)
                if not self._data:
                    break
                continue
            part = bytes(self._data[inside : inside + size])
            parts.append(part)
            self._place += len(part)
            size -= len(part)
        return b"".join(parts)

    def _fill(self, size: int) -> None:
        end = self._start + len(self._data)
        near = bool(self._data) and end <= self._place <= end + _NEAR_BYTES
        self._chunk = min(2 * self._chunk, _MOST_BYTES) if near else _FIRST_BYTES
        self._start = self._place
        self._get(self._place, self._place + max(size, self._chunk))

    def _get(self, start: int, end: int) -> None:
        piece = self._fetcher.fetch_range(self._uri, start, end)
        if piece.size >= 0:
            if self.size >= 0 and (piece.size, piece.etag) != (self.size, self.etag):
                raise RowFailure("fetch", "CHANGED", "the file was replaced while it was read")
            self.size, self.etag = piece.size, piece.etag
        self._data = piece.data
