"""Read the images in Parquet files, row group by row group."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.errors import InfrastructureError, RowError, RowFailure, UserError
from batch_inference.inputs.parquet_columns import PATHS_AS_MANIFEST, is_list, path_column
from batch_inference.inputs.parquet_contents import Footer, read_footer
from batch_inference.inputs.reads import RANGE_BYTES, CoalescedRead, FetchedInput, Member, SkippedRead, read_range
from batch_inference.storage.fetcher import Buffer, Fetcher, check_size
from batch_inference.storage.range_file import SeekableFile
from batch_inference.storage.read_ahead import Answer, Request
from batch_inference.text import format_count

_PAGE_BYTES = 1024 * 1024
_MAX_BATCH_ROWS = 256
# Paths of a row group are requested up to this size: they only make a message more specific.
_MAX_PATH_BYTES = 16 * 1024 * 1024


class RowValue(NamedTuple):
    """One row of a column of images.

    Attributes:
        number: Index of the row in the file.
        data: The encoded image.
        error: Why there is none, or None.
    """

    number: int
    data: bytes
    error: RowFailure | None


@dataclass(frozen=True)
class RowSelection:
    """The wanted rows of a row group; small, so that it can be sent to another process.

    Attributes:
        footer: The file's.
        group: Index of the row group.
        column: Path of the column that holds the images.
        numbers: Indices of the wanted rows in the file, in order, each once.
        max_bytes: Larger images are not used.
    """

    footer: Footer
    group: int
    column: str
    numbers: list[int]
    max_bytes: int

    @property
    def chunk(self) -> tuple[int, int]:
        """First byte of the column in this row group, and the one behind its last."""
        return self.footer.chunk(self.group, self.column)

    def values(self, file: ColumnChunkFile) -> Iterator[RowValue]:
        """Unpack the column from its start to the last wanted row; raise what pyarrow raises at a damaged one."""
        start, end = self.chunk
        row = int(self.footer.row_starts[self.group])
        row_count = int(self.footer.row_starts[self.group + 1]) - row
        # About a megabyte at a time, however large the images are.
        batch_rows = max(1, min(_MAX_BATCH_ROWS, _PAGE_BYTES * row_count // max(1, end - start)))
        reader = pq.ParquetFile(file, metadata=self.footer.metadata, buffer_size=_PAGE_BYTES, pre_buffer=False)
        left = deque(self.numbers)
        for batch in reader.iter_batches(batch_rows, row_groups=[self.group], columns=[self.column], use_threads=False):
            values = batch.column(0)
            if pa.types.is_struct(values.type):
                (values,) = values.flatten()
            while left and left[0] < row + len(values):
                number = left.popleft()
                yield self._value(number, values[number - row])
            if not left:
                return
            row += len(values)

    def _value(self, number: int, value: pa.Scalar) -> RowValue:
        if isinstance(value, pa.DictionaryScalar):
            value = value.value
        if not value.is_valid:
            error = RowError("fetch", "NOT_FOUND", "this row has no image: its bytes are null").error
            return RowValue(number, b"", error)
        try:
            if is_list(value.type):
                return RowValue(number, _join_list(value.values, self.max_bytes), None)
            buffer = value.as_buffer()
            check_size(buffer.size, self.max_bytes)
        except RowError as exc:
            return RowValue(number, b"", exc.error)
        return RowValue(number, buffer.to_pybytes(), None)


def _join_list(values: pa.Array, max_bytes: int) -> bytes:
    """Return a list of uint8 or int8 as bytes."""
    check_size(len(values), max_bytes)
    if nulls := values.null_count:
        verb = "is" if nulls == 1 else "are"
        raise RowError("fetch", "CORRUPT", f"{nulls:,} of the image's {format_count(len(values), 'byte')} {verb} null")
    return bytes(values.to_numpy(zero_copy_only=False).tobytes())


#: Yields the wanted rows of a row group; takes the bytes of its column, piece by piece, from the function that it is given.
Unpack: TypeAlias = Callable[[RowSelection, Callable[[], Answer]], Iterator[RowValue]]


def unpack_in_process(selection: RowSelection, next_answer: Callable[[], Answer]) -> Iterator[RowValue]:
    """Unpack in this process. A damaged row group, or one that unpacks to more memory than there is, may end the process."""
    return selection.values(ColumnChunkFile(next_answer, selection.chunk))


def row_group_reads(
    uri: str, members: list[Member], fetcher: Fetcher, max_bytes: int, unpack: Unpack = unpack_in_process
) -> Iterator[CoalescedRead]:
    """Yield one read for each row group that has wanted rows, in the order of the file.

    Args:
        uri: The Parquet file.
        members: The wanted rows, by their index.
        fetcher: Sends the requests.
        max_bytes: Larger images are not used.
        unpack: Unpacks the row groups.
    """
    rows = [member.row for member in members]
    try:
        footer = read_footer(fetcher, uri, members[0].etag_hash)
    except RowError as exc:
        # Listing reports it as the file's failure; here it is each member's own.
        failure = RowError("fetch", "CORRUPT", exc.fact).error if exc.error.stage == "list" else exc.error
        yield SkippedRead(rows, failure)
        return
    except Exception as exc:
        yield SkippedRead(rows, RowError("fetch", "CORRUPT", str(exc)).error)
        return
    groups = np.searchsorted(footer.row_starts, [member.offset for member in members], side="right") - 1
    for group in np.unique(groups).tolist():
        wanted = [member for member, group_of in zip(members, groups, strict=True) if group_of == group]
        numbers = list(dict.fromkeys(member.offset for member in wanted))
        selection = RowSelection(footer, group, wanted[0].column, numbers, max_bytes)
        yield _RowGroupRead(uri, wanted, selection, fetcher, unpack)


@dataclass(frozen=True)
class _RowGroupRead:
    """Rows of one row group; its column of images is read from the start to the last of them."""

    uri: str
    members: list[Member]
    selection: RowSelection
    fetcher: Fetcher
    unpack: Unpack

    @property
    def rows(self) -> list[int]:
        return [member.row for member in self.members]

    def requests(self) -> Iterator[Request]:
        first, end = self.selection.chunk
        for start in range(first, end, RANGE_BYTES):
            stop = min(end, start + RANGE_BYTES)
            yield Request(self._reader(start, stop), stop - start)

    def _reader(self, start: int, stop: int) -> Callable[[], Buffer]:
        def read() -> Buffer:
            data = read_range(self.fetcher, self.uri, start, stop, self.selection.footer.etag_hash)
            if len(data) < stop - start:
                raise RowError("fetch", "TRUNCATED", f"{self.uri} ends within row group {self.selection.group}")
            return data

        return read

    def inputs(self, next_answer: Callable[[], Answer]) -> Iterator[FetchedInput]:
        left = deque(self.members)
        location = f"row group {self.selection.group} of {self.uri}"
        seconds = 0.0
        request_error: RowFailure | None = None
        without_image: list[Member] = []

        def timed_answer() -> Answer:
            nonlocal seconds, request_error
            answer = next_answer()
            seconds += answer.seconds
            request_error = request_error or answer.error
            return answer

        try:
            for value in self.unpack(self.selection, timed_answer):
                while left and left[0].offset == value.number:
                    if value.error is not None and value.error.error_type == "NOT_FOUND":
                        without_image.append(left.popleft())
                        continue
                    yield FetchedInput(left.popleft().row, value.data, value.error, seconds / len(self.members))
            error = RowError("fetch", "TRUNCATED", f"{location} ends before this row").error
        except (InfrastructureError, UserError):
            raise
        except Exception as exc:
            error = unpack_failure(exc)
            error = replace(error, message=f"{location}: {error.message}")
        for member in left:
            yield FetchedInput(member.row, b"", request_error or error, 0.0)
        yield from self._without_image(without_image)

    def _without_image(self, members: list[Member]) -> Iterator[FetchedInput]:
        paths = self._paths(sorted({member.offset for member in members}))
        for member in members:
            fact = "this row has no image: its bytes are null"
            if path := paths.get(member.offset):
                fact += (
                    f", there is only a path, {path[:200]!r}. To read the files that paths name, {PATHS_AS_MANIFEST}"
                )
            yield FetchedInput(member.row, b"", RowError("fetch", "NOT_FOUND", fact).error, 0.0)

    def _paths(self, numbers: list[int]) -> dict[int, str]:
        """Return the paths beside images without bytes; nothing if they cannot be read: they only make a message more specific."""
        column = path_column(self.selection.footer, self.selection.column)
        if not numbers or not column:
            return {}
        selection = replace(self.selection, column=column, numbers=numbers, max_bytes=_PAGE_BYTES)
        start, end = selection.chunk
        if end - start > _MAX_PATH_BYTES:
            return {}

        def next_answer() -> Answer:
            try:
                return Answer(self._reader(start, end)(), None, 0.0)
            except RowError as exc:
                return Answer(b"", exc.error, 0.0)

        try:
            values = self.unpack(selection, next_answer)
            return {value.number: value.data.decode("utf-8", "replace") for value in values}
        except (InfrastructureError, UserError):
            raise
        except Exception:
            return {}


def unpack_failure(exc: Exception) -> RowFailure:
    """Return the failure of rows whose row group could not be unpacked."""
    if isinstance(exc, RowError):
        return exc.error
    text = " ".join(str(exc).split())[:300]
    if isinstance(exc, MemoryError):
        return RowError("decode", "DECODE_MEMORY", f"its pages unpack to more memory than there is: {text}").error
    return RowError("fetch", "CORRUPT", text).error


class ColumnChunkFile(SeekableFile):
    """The column chunk of a row group as the part of a file that it is; its bytes are the answers to the row group's requests.

    Args:
        next_answer: Returns the answer to the next request.
        chunk: First byte of the column chunk in the file, and the one behind its last.
    """

    def __init__(self, next_answer: Callable[[], Answer], chunk: tuple[int, int]) -> None:
        super().__init__(chunk[1])
        self._next_answer = next_answer
        self._position = self._buffer_start = chunk[0]
        self._buffer: Buffer = b""

    def _fetch(self, start: int, end: int) -> Buffer:
        while start >= self._buffer_start + len(self._buffer):
            answer = self._next_answer()
            if answer.error is not None:
                raise OSError(answer.error.message)
            self._buffer_start += len(self._buffer)
            self._buffer = answer.data
        offset = start - self._buffer_start
        if offset < 0:
            raise ValueError("a row group is read from its start to its end")
        return self._buffer[offset : min(end, self.size) - self._buffer_start]
