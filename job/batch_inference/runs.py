"""What a shard asks for, as a sequence of runs: inputs that are fetched together.

A run says what to fetch, and makes inputs of the answers, which come in the order of its requests and were asked for ahead
of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from batch_inference.errors import RowError
from batch_inference.fetcher import Answer, Buffer, Fetcher, ReadAhead, Request
from batch_inference.versions import changed, replaced, version_of

# One request's worth: its fixed cost vanishes, and a few of them together make full use of a task's connections.
RANGE_BYTES = 8 * 1024 * 1024


class Fetched(NamedTuple):
    """One input's bytes, or why there are none.

    Attributes:
        row: Its place in the shard.
        data: The encoded image.
        error: What failed, or None.
        seconds: Its share of the time that fetching took.
    """

    row: int
    data: bytes
    error: RowError | None
    seconds: float


class Run(Protocol):
    """Inputs that are fetched together."""

    @property
    def rows(self) -> list[int]:
        """Their places in the shard."""

    def requests(self) -> Iterator[Request]:
        """What to fetch, in order; drawn from as the read-ahead gets there."""

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        """Makes inputs of the answers."""


def fetched(runs: Iterator[Run], concurrency: int) -> Generator[Fetched, None, None]:
    """Every input of some runs, run by run.

    Args:
        runs: What to fetch; drawn from as the read-ahead gets there.
        concurrency: Requests under way at the same time.
    """
    started: deque[tuple[Run, list[int], list[bool]]] = deque()

    def requests() -> Iterator[Request]:
        for run in runs:
            asked, done = [0], [False]
            started.append((run, asked, done))
            for request in run.requests():
                asked[0] += 1
                yield request
                if done[0]:
                    break

    ahead = ReadAhead(requests(), concurrency)

    def take() -> Answer:
        taken[0] += 1
        return ahead.take()

    try:
        while True:
            ahead.ask()
            if not started:
                return
            run, asked, done = started.popleft()
            taken = [0]
            yield from run.inputs(take)
            # Of a row group only the first rows may have been wanted.
            done[0] = True
            while taken[0] < asked[0]:
                take()
    finally:
        ahead.close()


class Member(NamedTuple):
    """Where one input of a file lies.

    Attributes:
        row: Its place in the shard.
        offset: Place of its data in a tar file, in bytes; number of its row in a Parquet file.
        size: Bytes of its data in a tar file; None in a Parquet file.
        version: Version of the file that this holds for, None if that is not known.
        column: Path of the column in a Parquet file, "" in a tar file.
    """

    row: int
    offset: int
    size: int | None
    version: int | None
    column: str


@dataclass(frozen=True)
class Failed:
    """Inputs that are not fetched."""

    rows: list[int]
    error: RowError

    def requests(self) -> Iterator[Request]:
        """None."""
        yield from ()

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        """Every input with the error."""
        return (Fetched(row, b"", self.error, 0.0) for row in self.rows)


def read_range(fetcher: Fetcher, uri: str, start: int, end: int, version: int | None) -> Buffer:
    """A range of a file; raises RowFailure as the fetcher does, and CHANGED where it is not the version that is meant."""
    piece = fetcher.fetch_range(uri, start, end)
    if replaced(version, version_of(piece.etag)):
        raise changed(uri)
    return piece.data
