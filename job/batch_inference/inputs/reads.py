"""A shard's fetches as a sequence of coalesced reads: inputs that are fetched together.

A read says which requests to send, and makes inputs of the answers. The answers come in the order of the requests, which are sent
ahead of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from batch_inference.errors import RowFailure
from batch_inference.storage.etags import hash_etag, is_replaced, replaced_error
from batch_inference.storage.fetcher import Buffer, Fetcher
from batch_inference.storage.read_ahead import Answer, ReadAhead, Request

# The size of one request: its fixed cost vanishes, and a few of them together make full use of a task's connections.
RANGE_BYTES = 8 * 1024 * 1024


class FetchedInput(NamedTuple):
    """One input's bytes, or why there are none.

    Attributes:
        row: Its index in the shard.
        data: The encoded image.
        error: What failed, or None.
        seconds: Its share of the time that fetching took.
    """

    row: int
    data: bytes
    error: RowFailure | None
    seconds: float


class CoalescedRead(Protocol):
    """Inputs that are fetched together."""

    @property
    def rows(self) -> list[int]:
        """Their indices in the shard."""

    def requests(self) -> Iterator[Request]:
        """Yield the requests in order; the iterator is advanced as the read-ahead gets there."""

    def inputs(self, next_answer: Callable[[], Answer]) -> Iterator[FetchedInput]:
        """Yield the inputs that the answers hold."""


@dataclass(frozen=True)
class SkippedRead:
    """Inputs that are not fetched."""

    rows: list[int]
    error: RowFailure

    def requests(self) -> Iterator[Request]:
        """Yield no request."""
        yield from ()

    def inputs(self, next_answer: Callable[[], Answer]) -> Iterator[FetchedInput]:
        """Yield every input with the error."""
        return (FetchedInput(row, b"", self.error, 0.0) for row in self.rows)


class Member(NamedTuple):
    """One input that lies in a tar or Parquet file.

    Attributes:
        row: Its index in the shard.
        offset: First byte of its data in a tar file; index of its row in a Parquet file.
        size: Bytes of its data in a tar file; None in a Parquet file.
        etag_hash: The file's when the member was located; None if it is not known.
        column: Path of the column in a Parquet file, "" in a tar file.
    """

    row: int
    offset: int
    size: int | None
    etag_hash: int | None
    column: str


class _StartedRead:
    """A read whose requests are being sent."""

    def __init__(self, read: CoalescedRead) -> None:
        self.read = read
        self.requested = 0
        self.answered = 0
        self.done = False


def fetch_inputs(reads: Iterator[CoalescedRead], concurrency: int) -> Generator[FetchedInput, None, None]:
    """Yield the inputs of all reads, one read after another.

    Args:
        reads: The iterator is advanced as the read-ahead gets there.
        concurrency: Requests in flight at the same time.
    """
    started: deque[_StartedRead] = deque()

    def requests() -> Iterator[Request]:
        for read in reads:
            entry = _StartedRead(read)
            started.append(entry)
            for request in read.requests():
                entry.requested += 1
                yield request
                if entry.done:
                    break

    ahead = ReadAhead(requests(), concurrency)

    def next_answer() -> Answer:
        current.answered += 1
        return ahead.next_answer()

    try:
        while True:
            ahead.send()
            if not started:
                return
            current = started.popleft()
            yield from current.read.inputs(next_answer)
            # Of a row group only the first rows may have been wanted: its other answers are dropped.
            current.done = True
            while current.answered < current.requested:
                next_answer()
    finally:
        ahead.close()


def read_range(fetcher: Fetcher, uri: str, start: int, end: int, etag_hash: int | None) -> Buffer:
    """Return a range of a file.

    Raises:
        RowError: As :meth:`Fetcher.fetch_range` does, and CHANGED if the file has been replaced.
    """
    piece = fetcher.fetch_range(uri, start, end)
    if is_replaced(etag_hash, hash_etag(piece.etag)):
        raise replaced_error(uri)
    return piece.data
