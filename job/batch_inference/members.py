"""A shard's inputs as few large requests: members of one file that follow one another are read together.

What a shard asks for is a sequence of runs. A run says what to fetch, and makes inputs of the answers, which come in the
order of its requests and were asked for ahead of time.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference import parquet_files
from batch_inference.containers import NO_SUCH_MEMBER, split_member
from batch_inference.errors import RowError, RowFailure, UserError
from batch_inference.fetcher import Answer, Buffer, Fetcher, ReadAhead, Request, check_size
from batch_inference.storage import canonical_uri

# One request's worth: its fixed cost vanishes, and a few of them together make full use of a task's connections.
_RANGE_BYTES = 8 * 1024 * 1024
# What lies between two members (headers, texts) is read along where it is less than this.
_GAP_BYTES = 128 * 1024
_PAGE_BYTES = 1024 * 1024


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


def runs(uris: list[str], places: pa.Table | None, fetcher: Fetcher, max_bytes: int) -> Iterator[Run]:
    """Cuts a shard's inputs into runs.

    Objects by themselves keep their order; members of a file are taken together where its first one stands, in the order of
    the file.

    Args:
        uris: The shard's inputs.
        places: Where members lie: columns of ``PLACE_SCHEMA``; None if there are none.
        fetcher: Reads them.
        max_bytes: Larger inputs are not read.
    """
    if places is None:
        for row, uri in enumerate(uris):
            yield _Object(row, uri, fetcher, max_bytes)
        return
    files: dict[str, list[_Member]] = {}
    order: list[int | str] = []
    columns = [places[name].to_pylist() for name in ("_offset", "_size", "_etag", "_column")]
    for row, (uri, offset, size, etag, column) in enumerate(zip(uris, *columns, strict=True)):
        split = None if offset is None else split_member(uri)
        if split is None:
            order.append(row)
            continue
        if split[0] not in files:
            order.append(split[0])
        files.setdefault(split[0], []).append(_Member(row, offset, size, etag or "", column or ""))
    for item in order:
        if isinstance(item, int):
            yield _Object(item, uris[item], fetcher, max_bytes)
            continue
        members = sorted(files[item], key=lambda member: member.offset)
        missing = [member.row for member in members if member.offset == NO_SUCH_MEMBER]
        if missing:
            yield Failed(missing, RowFailure("fetch", "NOT_FOUND", f"there is no such member in {item}").error)
        present = members[len(missing) :]
        if present and item.lower().endswith(".tar"):
            yield from _spans(item, present, fetcher, max_bytes)
        elif present:
            yield from _row_groups(item, present, fetcher, max_bytes)


class _Member(NamedTuple):
    row: int
    offset: int
    size: int | None
    etag: str
    column: str


@dataclass(frozen=True)
class _Object:
    row: int
    uri: str
    fetcher: Fetcher
    max_bytes: int

    @property
    def rows(self) -> list[int]:
        return [self.row]

    def requests(self) -> Iterator[Request]:
        yield Request(self._read)

    def _read(self) -> bytes:
        try:
            canonical_uri(self.uri)
        except UserError as exc:
            raise RowFailure("list", "INVALID_URI", exc.message) from exc
        if not self.uri:
            raise RowFailure("list", "INVALID_URI", "the manifest has no URI in this line")
        return self.fetcher.fetch(self.uri, self.max_bytes)

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        answer = take()
        yield Fetched(self.row, answer.data, answer.error, answer.seconds)  # type: ignore[arg-type]


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


# --- tar ---------------------------------------------------------------------------------------------------------------


def _spans(uri: str, members: list[_Member], fetcher: Fetcher, max_bytes: int) -> Iterator[Run]:
    span: list[_Member] = []
    for member in members:
        size = member.size or 0
        try:
            check_size(size, max_bytes)
        except RowFailure as exc:
            yield Failed([member.row], exc.error)
            continue
        if span:
            end = span[-1].offset + (span[-1].size or 0)
            if member.offset - end > _GAP_BYTES or member.offset + size - span[0].offset > _RANGE_BYTES:
                yield _Span(uri, span, fetcher)
                span = []
        span.append(member)
    if span:
        yield _Span(uri, span, fetcher)


@dataclass(frozen=True)
class _Span:
    """Members of a tar file that one range covers."""

    uri: str
    members: list[_Member]
    fetcher: Fetcher

    @property
    def rows(self) -> list[int]:
        return [member.row for member in self.members]

    def requests(self) -> Iterator[Request]:
        start = self.members[0].offset
        end = max(member.offset + (member.size or 0) for member in self.members)
        if end > start:
            yield Request(lambda: _read(self.fetcher, self.uri, start, end, self.members[0].etag), end - start)

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        first = self.members[0].offset
        anything = any(member.size for member in self.members)
        answer = take() if anything else Answer(b"", None, 0.0)
        seconds = answer.seconds / len(self.members)
        for row, offset, size, _, _ in self.members:
            start, end = offset - first, offset - first + (size or 0)
            error = answer.error
            if error is None and end > len(answer.data):
                there = max(0, len(answer.data) - start)
                error = RowFailure(
                    "fetch", "TRUNCATED", f"{self.uri} ends behind {there:,} of the member's {size:,} bytes"
                ).error
            yield Fetched(row, b"" if error else bytes(answer.data[start:end]), error, seconds)


def _read(fetcher: Fetcher, uri: str, start: int, end: int, etag: str) -> Buffer:
    piece = fetcher.fetch_range(uri, start, end)
    if etag and piece.etag and piece.etag != etag:
        raise _changed(uri)
    return piece.data


def _changed(uri: str) -> RowFailure:
    return RowFailure(
        "fetch", "CHANGED", f"{uri} was replaced after the job was planned; what lies where in it is not known any more"
    )


# --- Parquet -----------------------------------------------------------------------------------------------------------


def _row_groups(uri: str, members: list[_Member], fetcher: Fetcher, max_bytes: int) -> Iterator[Run]:
    rows = [member.row for member in members]
    try:
        footer = parquet_files.footer(fetcher, uri, members[0].etag)
        if members[0].etag and footer.etag != members[0].etag:
            raise _changed(uri)
    except RowFailure as exc:
        yield Failed(rows, exc.error)
        return
    except Exception as exc:
        yield Failed(rows, RowFailure("fetch", "CORRUPT", str(exc)).error)
        return
    groups = np.searchsorted(footer.starts, [member.offset for member in members], side="right") - 1
    for group in np.unique(groups).tolist():
        wanted = [member for member, mine in zip(members, groups, strict=True) if mine == group]
        yield _RowGroup(uri, group, wanted, footer, fetcher, max_bytes)


@dataclass(frozen=True)
class _RowGroup:
    """Rows of one row group; its column of images is read from the start to the last of them."""

    uri: str
    group: int
    members: list[_Member]
    footer: parquet_files.Footer
    fetcher: Fetcher
    max_bytes: int

    @property
    def rows(self) -> list[int]:
        return [member.row for member in self.members]

    def requests(self) -> Iterator[Request]:
        first, end = self.footer.chunk(self.group, self.members[0].column)
        for start in range(first, end, _RANGE_BYTES):
            stop = min(end, start + _RANGE_BYTES)
            yield Request(self._reader(start, stop), stop - start)

    def _reader(self, start: int, stop: int) -> Callable[[], Buffer]:
        def read() -> Buffer:
            data = _read(self.fetcher, self.uri, start, stop, self.footer.etag)
            if len(data) < stop - start:
                raise RowFailure("fetch", "TRUNCATED", f"{self.uri} ends within row group {self.group}")
            return data

        return read

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        stream = _Stream(take, self.footer.chunk(self.group, self.members[0].column))
        left = deque(self.members)
        error: RowError | None = None
        try:
            for row, value in self._rows(stream):
                while left and left[0].offset == row:
                    member = left.popleft()
                    yield self._input(member.row, value, stream.seconds / len(self.members))
                if not left:
                    return
            error = RowFailure("fetch", "TRUNCATED", f"row group {self.group} of {self.uri} ends before this row").error
        except RowFailure as exc:
            error = exc.error
        except Exception as exc:
            error = stream.error or RowFailure("fetch", "CORRUPT", f"row group {self.group}: {exc}").error
        for member in left:
            yield Fetched(member.row, b"", error, 0.0)

    def _rows(self, stream: _Stream) -> Iterator[tuple[int, pa.Scalar]]:
        column = self.members[0].column
        first, end = self.footer.chunk(self.group, column)
        start = int(self.footer.starts[self.group])
        count = int(self.footer.starts[self.group + 1]) - start
        # About a megabyte at a time, however large the images are.
        batch = max(1, min(256, _PAGE_BYTES * count // max(1, end - first)))
        file = pq.ParquetFile(stream, metadata=self.footer.metadata, buffer_size=_PAGE_BYTES, pre_buffer=False)
        row = start
        for part in file.iter_batches(batch, row_groups=[self.group], columns=[column], use_threads=False):
            values = part.column(0)
            if pa.types.is_struct(values.type):
                (values,) = values.flatten()
            if row + len(values) <= self.members[0].offset:
                row += len(values)
                continue
            for value in values:
                yield row, value
                row += 1

    def _input(self, row: int, value: pa.Scalar, seconds: float) -> Fetched:
        try:
            if not value.is_valid:
                raise RowFailure("fetch", "NOT_FOUND", "this row has no image: its bytes are null")
            data = value.as_py()
            check_size(len(data), self.max_bytes)
        except RowFailure as exc:
            return Fetched(row, b"", exc.error, seconds)
        return Fetched(row, data, None, seconds)


class _Stream(io.RawIOBase):
    """The answers to a row group's requests as the part of a file that they are."""

    def __init__(self, take: Callable[[], Answer], chunk: tuple[int, int]) -> None:
        super().__init__()
        self._take = take
        self._end = chunk[1]
        self._place = self._start = chunk[0]
        self._data: Buffer = b""
        self.seconds = 0.0
        self.error: RowError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = (
            offset if whence == io.SEEK_SET else (self._place if whence == io.SEEK_CUR else self._end) + offset
        )
        return self._place

    def read(self, size: int = -1) -> bytes:
        parts = []
        left = self._end - self._place if size < 0 else min(size, self._end - self._place)
        while left > 0:
            while self._place >= self._start + len(self._data):
                self._next()
            inside = self._place - self._start
            if inside < 0:
                raise ValueError("a row group is read from its start to its end")
            part = bytes(self._data[inside : inside + left])
            parts.append(part)
            self._place += len(part)
            left -= len(part)
        return b"".join(parts)

    def _next(self) -> None:
        answer = self._take()
        self.seconds += answer.seconds
        self.error = answer.error
        if self.error is not None:
            raise OSError(self.error.message)
        self._start += len(self._data)
        self._data = answer.data
