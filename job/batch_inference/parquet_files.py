"""Parquet files that hold encoded images as inputs: what is in one, and its rows by row group."""

from __future__ import annotations

import functools
import io
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.column_types import plain_inputs
from batch_inference.errors import RowError, RowFailure, SystemFault, UserError
from batch_inference.fetcher import Answer, Buffer, Fetcher, Request, check_size
from batch_inference.footers import Trial
from batch_inference.ranges import RangeFile
from batch_inference.runs import RANGE_BYTES, Failed, Fetched, Member, Run, read_range
from batch_inference.storage import display
from batch_inference.versions import changed, replaced, version_of

# Footers grow with the number of row groups and columns; this is most of them.
_TAIL_BYTES = 64 * 1024
_PAGE_BYTES = 1024 * 1024
# A task reads a row group from its start to the rows that it wants.
LARGE_ROW_GROUP_BYTES = 256 * 1024 * 1024

_trial = Trial()


@dataclass(frozen=True)
class Footer:
    """The table of contents of a Parquet file.

    Attributes:
        metadata: What pyarrow makes of it.
        version: That of the file; None if the store has none.
        starts: Number of the first row of each row group, and of the row behind the last, int64.
    """

    metadata: pq.FileMetaData
    version: int | None
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
def footer(fetcher: Fetcher, uri: str, version: int | None = None) -> Footer:
    """Reads the footer of a Parquet file, usually by one request; remembered.

    Args:
        fetcher: Reads it.
        uri: Canonical URI.
        version: That which is meant, so that none of another one is remembered.

    Raises:
        UserError: If it is not a Parquet file.
        RowFailure: If it can't be read, or is another version.
    """
    file = RangeFile(fetcher, uri, tail=_TAIL_BYTES)
    found = version_of(file.etag)
    if replaced(version, found):
        raise changed(uri)
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise UserError(
            f"{display(uri)} is not a readable Parquet file: {' '.join(str(exc).split())[:200]}",
            "Make it anew, or leave it out.",
        ) from None
    # A version that is meant has been looked at when the inputs were listed.
    if version is None and not _trial.survives(_raw(file)):
        raise UserError(
            f"{display(uri)} is a damaged Parquet file: what it says of its columns cannot be read",
            "Make it anew, or leave it out.",
        )
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    if any([group.column(n).path_in_schema for n in range(group.num_columns)] != paths for group in groups):
        raise UserError(
            f"{display(uri)} is a damaged Parquet file: its row groups have other columns than its schema",
            "Make it anew, or leave it out.",
        )
    rows = [group.num_rows for group in groups]
    return Footer(metadata, found, np.cumsum([0, *rows]))


def _raw(file: RangeFile) -> bytes:
    """The end of a Parquet file from its metadata on, which pyarrow has found to be there."""
    file.seek(-8, io.SEEK_END)
    length = int.from_bytes(file.read(4), "little") + 8
    file.seek(-length, io.SEEK_END)
    return file.read(length)


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
    return plain_inputs(file.read(columns=list(names), use_threads=False), whole=False)


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


# --- reading ---


@dataclass(frozen=True)
class Pages:
    """What is wanted of a row group; small, so that another process can be told of it.

    Attributes:
        footer: The file's.
        group: Number of the row group.
        column: Path of the column that holds the images.
        numbers: Rows of the file that are wanted, in order, each once.
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

    def values(self, stream: Stream) -> Iterator[Value]:
        """Unpacks the column from its start to the last row that is wanted; raises whatever pyarrow does at a damaged one."""
        first, end = self.chunk
        row = int(self.footer.starts[self.group])
        count = int(self.footer.starts[self.group + 1]) - row
        # About a megabyte at a time, however large the images are.
        batch = max(1, min(256, _PAGE_BYTES * count // max(1, end - first)))
        file = pq.ParquetFile(stream, metadata=self.footer.metadata, buffer_size=_PAGE_BYTES, pre_buffer=False)
        left = deque(self.numbers)
        for part in file.iter_batches(batch, row_groups=[self.group], columns=[self.column], use_threads=False):
            values = part.column(0)
            if pa.types.is_struct(values.type):
                (values,) = values.flatten()
            while left and left[0] < row + len(values):
                number = left.popleft()
                yield self._value(number, values[number - row])
            if not left:
                return
            row += len(values)

    def _value(self, number: int, value: pa.Scalar) -> Value:
        if not value.is_valid:
            return Value(
                number, b"", RowFailure("fetch", "NOT_FOUND", "this row has no image: its bytes are null").error
            )
        try:
            check_size(value.as_buffer().size, self.max_bytes)
        except RowFailure as exc:
            return Value(number, b"", exc.error)
        return Value(number, value.as_py(), None)


class Value(NamedTuple):
    """One row of a column of images.

    Attributes:
        number: Of the row, in the file.
        data: The encoded image.
        error: Why there is none, or None.
    """

    number: int
    data: bytes
    error: RowError | None


#: Gives the rows that are wanted of a row group; asks for the bytes of its column, piece by piece, by the function that it is given.
Unpack: TypeAlias = Callable[[Pages, Callable[[], Answer]], Iterator[Value]]


def unpacked(pages: Pages, take: Callable[[], Answer]) -> Iterator[Value]:
    """Unpacks in this process, which a damaged row group may end, or one that unpacks to more memory than there is."""
    return pages.values(Stream(take, pages.chunk))


def row_groups(
    uri: str, members: list[Member], fetcher: Fetcher, max_bytes: int, unpack: Unpack = unpacked
) -> Iterator[Run]:
    """Rows in the order of the file, by row group.

    Args:
        uri: The Parquet file.
        members: Those that are wanted, by their number.
        fetcher: Reads them.
        max_bytes: Larger images are not used.
        unpack: Where row groups are unpacked.
    """
    rows = [member.row for member in members]
    try:
        found = footer(fetcher, uri, members[0].version)
    except RowFailure as exc:
        yield Failed(rows, exc.error)
        return
    except Exception as exc:
        yield Failed(rows, RowFailure("fetch", "CORRUPT", str(exc)).error)
        return
    groups = np.searchsorted(found.starts, [member.offset for member in members], side="right") - 1
    for group in np.unique(groups).tolist():
        wanted = [member for member, mine in zip(members, groups, strict=True) if mine == group]
        numbers = list(dict.fromkeys(member.offset for member in wanted))
        pages = Pages(found, group, wanted[0].column, numbers, max_bytes)
        yield _RowGroup(uri, wanted, pages, fetcher, unpack)


@dataclass(frozen=True)
class _RowGroup:
    """Rows of one row group; its column of images is read from the start to the last of them."""

    uri: str
    members: list[Member]
    pages: Pages
    fetcher: Fetcher
    unpack: Unpack

    @property
    def rows(self) -> list[int]:
        return [member.row for member in self.members]

    def requests(self) -> Iterator[Request]:
        first, end = self.pages.chunk
        for start in range(first, end, RANGE_BYTES):
            stop = min(end, start + RANGE_BYTES)
            yield Request(self._reader(start, stop), stop - start)

    def _reader(self, start: int, stop: int) -> Callable[[], Buffer]:
        def read() -> Buffer:
            data = read_range(self.fetcher, self.uri, start, stop, self.pages.footer.version)
            if len(data) < stop - start:
                raise RowFailure("fetch", "TRUNCATED", f"{self.uri} ends within row group {self.pages.group}")
            return data

        return read

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        left = deque(self.members)
        where = f"row group {self.pages.group} of {self.uri}"
        seconds = [0.0]
        failed: list[RowError] = []

        def taken() -> Answer:
            answer = take()
            seconds[0] += answer.seconds
            if answer.error is not None:
                failed.append(answer.error)
            return answer

        try:
            for value in self.unpack(self.pages, taken):
                while left and left[0].offset == value.number:
                    yield Fetched(left.popleft().row, value.data, value.error, seconds[0] / len(self.members))
            error = RowFailure("fetch", "TRUNCATED", f"{where} ends before this row").error
        except (SystemFault, UserError):
            raise
        except Exception as exc:
            error = failure_of(exc)
            error = replace(error, message=f"{where}: {error.message}")
        for member in left:
            yield Fetched(member.row, b"", failed[0] if failed else error, 0.0)


def failure_of(exc: Exception) -> RowError:
    """What ended the unpacking of a row group."""
    if isinstance(exc, RowFailure):
        return exc.error
    text = " ".join(str(exc).split())[:300]
    if isinstance(exc, MemoryError):
        return RowFailure("decode", "DECODE_MEMORY", f"its pages unpack to more memory than there is: {text}").error
    return RowFailure("fetch", "CORRUPT", text).error


class Stream(io.RawIOBase):
    """The answers to a row group's requests as the part of a file that they are."""

    def __init__(self, take: Callable[[], Answer], chunk: tuple[int, int]) -> None:
        super().__init__()
        self._take = take
        self._end = chunk[1]
        self._place = self._start = chunk[0]
        self._data: Buffer = b""

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # noqa: D102
        self._place = (
            offset if whence == io.SEEK_SET else (self._place if whence == io.SEEK_CUR else self._end) + offset
        )
        return self._place

    def read(self, size: int = -1) -> bytes:
        """So many bytes from here on; raises OSError where they could not be had."""
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
        if answer.error is not None:
            raise OSError(answer.error.message)
        self._start += len(self._data)
        self._data = answer.data
