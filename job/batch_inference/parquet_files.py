"""Parquet files that hold encoded images as inputs: what is in one, and its rows by row group."""

from __future__ import annotations

import base64
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
from batch_inference.ranges import RangeFile, looks_like
from batch_inference.runs import RANGE_BYTES, Failed, Fetched, Member, Run, read_range
from batch_inference.storage import display
from batch_inference.versions import changed, replaced, version_of

# Footers grow with the number of row groups and columns; this is most of them.
_TAIL_BYTES = 64 * 1024
_PAGE_BYTES = 1024 * 1024
# A task reads a row group from its start to the rows that it wants.
LARGE_ROW_GROUP_BYTES = 256 * 1024 * 1024

_MAGIC = b"PAR1"
_REMEDY = "Make the file again and start a new job"
# Fixed sizes up to this are those of identifiers and digests, not of images.
_DIGEST_BYTES = 64
# Paths of a row group that are worth a request only to be named.
_MOST_PATH_BYTES = 16 * 1024 * 1024
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
PATHS_AS_MANIFEST = "write the paths into a text file, one a line, and name it as input.manifest"

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
    def leaves(self) -> list[str]:
        """Paths of the file's columns."""
        return [self.metadata.schema.column(number).path for number in range(self.metadata.num_columns)]

    def nulls(self, column: str) -> int:
        """How many values of a column are null, as far as the footer says it."""
        number = self.leaves.index(column)
        groups = (self.metadata.row_group(group).column(number) for group in range(self.metadata.num_row_groups))
        return sum(g.statistics.null_count for g in groups if g.is_stats_set and g.statistics.has_null_count)

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
        RowFailure: If it is not a whole Parquet file: stage ``list``, EMPTY_FILE, UNKNOWN_FORMAT, TRUNCATED or CORRUPT; or it
            can't be read, or is another version.
    """
    file = RangeFile(fetcher, uri, tail=_TAIL_BYTES)
    found = version_of(file.etag)
    if replaced(version, found):
        raise changed(uri)
    _refuse_other(file)
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise RowFailure(
            "list",
            "CORRUPT",
            f"the file is not a readable Parquet file: {' '.join(str(exc).split())[:200]}",
            remedy=_REMEDY,
        ) from None
    # A version that is meant has been looked at when the inputs were listed.
    if version is None and not _trial.survives(_raw(file)):
        raise RowFailure(
            "list",
            "CORRUPT",
            "the file is a damaged Parquet file: what it says of its columns cannot be read",
            remedy=_REMEDY,
        )
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    whole = Footer(metadata, found, np.cumsum([0, *rows]))
    paths = whole.leaves
    if any([group.column(n).path_in_schema for n in range(group.num_columns)] != paths for group in groups):
        raise RowFailure(
            "list",
            "CORRUPT",
            "the file is a damaged Parquet file: its row groups have other columns than its schema",
            remedy=_REMEDY,
        )
    return whole


def _refuse_other(file: RangeFile) -> None:
    """Raise RowFailure for a file that does not end as a Parquet file does, saying what it is instead."""
    if file.size <= 0:
        raise RowFailure("list", "EMPTY_FILE", "the file is empty, not a Parquet file", remedy=_REMEDY)
    file.seek(max(0, file.size - len(_MAGIC)))
    end = file.read(len(_MAGIC))
    if end == _MAGIC:
        return
    if end == b"PARE":
        raise RowFailure(
            "list",
            "UNKNOWN_FORMAT",
            "the file is an encrypted Parquet file",
            remedy="Write it without encryption and start a new job",
        )
    file.seek(0)
    head = file.read(512)
    if head.startswith(_MAGIC):
        raise RowFailure(
            "list",
            "TRUNCATED",
            f"the file is a Parquet file that ends at byte {file.size:,} without its footer, so that none of its rows can be found",
            remedy=_REMEDY,
        )
    what, remedy = looks_like(head, _REMEDY)
    raise RowFailure("list", "UNKNOWN_FORMAT", f"the file is not a Parquet file: {what}", remedy=remedy)


def _raw(file: RangeFile) -> bytes:
    """The end of a Parquet file from its metadata on, which pyarrow has found to be there."""
    file.seek(-8, io.SEEK_END)
    length = int.from_bytes(file.read(4), "little") + 8
    file.seek(-length, io.SEEK_END)
    return file.read(length)


def bytes_column(found: Footer, fetcher: Fetcher, uri: str, wanted: str | None) -> str:
    """Return the path of the column that holds the images.

    It is of bytes (binary, large_binary, binary_view), or a struct with such ``bytes`` as Hugging Face's datasets write it; where
    there is none, of fixed_size_binary, of a dictionary of bytes, or of lists of uint8 or int8.

    Args:
        found: The file's footer.
        fetcher: Reads the first text of a column, to tell what it is.
        uri: Its URI.
        wanted: Name of the column, None for the only one there is.

    Raises:
        RowFailure: ``list`` NO_IMAGE_COLUMN: if there is none, or more than one and none is named.
    """
    schema = found.metadata.schema.to_arrow_schema()
    leaves = found.leaves
    paths = {field.name: path for field in schema if (path := _path(field, leaves, _is_bytes))}
    more = {field.name: path for field in schema if (path := _path(field, leaves, _may_be_bytes))}
    if wanted is not None and wanted in {**more, **paths}:
        return {**more, **paths}[wanted]
    if wanted is None and not paths:
        widths = {field.name: _width(field.type) for field in schema}
        paths = {name: path for name, path in more.items() if not 0 < widths[name] <= _DIGEST_BYTES}
    if wanted is None and len(paths) == 1:
        return next(iter(paths.values()))
    kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is None and not paths:
        fact, remedy = _no_images(schema, fetcher, uri)
        raise RowFailure("list", "NO_IMAGE_COLUMN", f"{fact}; it has: {kinds}", remedy=remedy)
    if wanted is not None and wanted in schema.names:
        fact, remedy = _no_images(pa.schema([schema.field(wanted)]), fetcher, uri)
        raise RowFailure("list", "NO_IMAGE_COLUMN", f"{fact}; it has: {kinds}", remedy=remedy)
    what = "several columns of bytes" if wanted is None else f"no column of bytes {wanted!r}"
    raise RowFailure(
        "list",
        "NO_IMAGE_COLUMN",
        f"the file has {what}; it has: {kinds}",
        remedy="Set input.bytes_column to the one that holds the encoded images",
    )


def path_column(found: Footer, column: str) -> str:
    """Return the path of the column beside a struct's ``bytes`` that names each image's file, "" if there is none."""
    head, _, rest = column.rpartition(".bytes")
    path = f"{head}.path"
    return path if head and rest[:1] in ("", ".") and path in found.leaves else ""


def read_columns(uri: str, fetcher: Fetcher, names: tuple[str, ...]) -> tuple[pa.Table, list[str]]:
    """Read those columns of a Parquet file that it has of some; return them, and the names of all that it has.

    Raises:
        RowFailure: If the file can't be read, or the columns are damaged.
    """
    try:
        file = pq.ParquetFile(RangeFile(fetcher, uri, tail=_TAIL_BYTES))
        there = list(file.schema_arrow.names)
        table = file.read(columns=[name for name in names if name in there], use_threads=False)
        return plain_inputs(table, whole=False), there
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise RowFailure(
            "list",
            "CORRUPT",
            f"the columns {', '.join(names)} (input.passthrough_columns) cannot be read: {exc}",
            remedy=_REMEDY,
        ) from None


def _path(field: pa.Field, leaves: list[str], fits: Callable[[pa.DataType], bool]) -> str:
    """Return the path of a column of encoded images, of a kind that fits: of the field, or of ``bytes`` in it; else ""."""
    name, kind = str(field.name), field.type
    if pa.types.is_struct(kind) and (inner := kind.get_field_index("bytes")) >= 0:
        name, kind = f"{name}.bytes", kind.field(inner).type
    # A list's values have a path of their own, which writers spell in several ways.
    below = [leaf for leaf in leaves if leaf == name or leaf.startswith(f"{name}.")]
    return below[0] if fits(kind) and len(below) == 1 else ""


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _may_be_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    if _is_list(kind):
        return bool(kind.value_type in (pa.uint8(), pa.int8()))
    return bool(pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind))


def _width(kind: pa.DataType) -> int:
    """Return the bytes of each value of a fixed size, 0 of any other kind."""
    return int(kind.byte_width) if pa.types.is_fixed_size_binary(kind) else 0


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _no_images(schema: pa.Schema, fetcher: Fetcher, uri: str) -> tuple[str, str]:
    """Return why columns are no images, and what makes images of the one that comes nearest."""
    place = display(uri)
    out = place.rpartition("/")[2].rpartition(".")[0] + "-images.parquet"
    for field in schema:
        value = field.type.value_type if _is_list(field.type) else None
        if value is not None and (
            _is_bytes(value) or (pa.types.is_struct(value) and value.get_field_index("bytes") >= 0)
        ):
            return f"the column {field.name} has lists of images, not one a row", (
                'Write one a row: python -c "import pyarrow as pa, pyarrow.parquet as pq; '
                f"pq.write_table(pa.table({{'image': pq.read_table({place!r})[{field.name!r}].combine_chunks().flatten()}}), {out!r}, "
                'row_group_size=1000)", then name that file'
            )
    texts = [field.name for field in schema if _is_text(field.type)]
    for name, text in _first_texts(fetcher, uri, texts[:8]).items():
        if _is_base64(text):
            return f"the column {name} holds images as base64 text, not as bytes", (
                'Decode it: python -c "import base64, pyarrow as pa, pyarrow.parquet as pq; '
                f"t = pq.read_table({place!r}).to_pandas(); t[{name!r}] = [v and base64.b64decode(v.split(',')[-1]) for v in t[{name!r}]]; "
                f'pq.write_table(pa.Table.from_pandas(t), {out!r}, row_group_size=1000)", then name that file'
            )
    fact = "the file has no column of encoded images"
    if not texts:
        return fact, "Leave it out, or write the encoded images into a column of binary"
    return (
        fact,
        f"If its column {texts[0]} lists images, name it as input.manifest instead of input.uris, with input.uri_column={texts[0]}",
    )


def _first_texts(fetcher: Fetcher, uri: str, names: list[str]) -> dict[str, str]:
    """Return a text of each column; none where the file does not give one: it is only looked at to say more."""
    try:
        file = pq.ParquetFile(RangeFile(fetcher, uri, tail=_TAIL_BYTES))
        first = next(file.iter_batches(64, columns=names, use_threads=False)) if names else None
        columns = {} if first is None else {name: first.column(name).to_pylist() for name in names}
    except Exception:
        return {}
    return {name: next((value for value in values if value), "") for name, values in columns.items()}


def _is_base64(text: str) -> bool:
    """Whether a text is an encoded image in base64, perhaps as a data URI."""
    try:
        head = base64.b64decode(text.partition(";base64,")[2][:64] or text[: len(text) // 4 * 4][:64], validate=True)
    except ValueError:
        return False
    return head.startswith(_IMAGE_STARTS)


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
        if isinstance(value, pa.DictionaryScalar):
            value = value.value
        if not value.is_valid:
            return Value(
                number, b"", RowFailure("fetch", "NOT_FOUND", "this row has no image: its bytes are null").error
            )
        try:
            if _is_list(value.type):
                return Value(number, _joined(value.values, self.max_bytes), None)
            buffer = value.as_buffer()
            check_size(buffer.size, self.max_bytes)
        except RowFailure as exc:
            return Value(number, b"", exc.error)
        return Value(number, buffer.to_pybytes(), None)


def _joined(values: pa.Array, max_bytes: int) -> bytes:
    """Return a list of uint8 or int8 as the bytes that it stands for."""
    check_size(len(values), max_bytes)
    if values.null_count:
        raise RowFailure("fetch", "CORRUPT", f"{values.null_count:,} of the image's {len(values):,} bytes are null")
    return bytes(values.to_numpy(zero_copy_only=False).tobytes())


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
        # What listing calls a file's, is a member's own failure here.
        listed = exc.error.stage == "list"
        yield Failed(rows, RowFailure("fetch", "CORRUPT", exc.fact).error if listed else exc.error)
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
        without: list[Member] = []

        def taken() -> Answer:
            answer = take()
            seconds[0] += answer.seconds
            if answer.error is not None:
                failed.append(answer.error)
            return answer

        try:
            for value in self.unpack(self.pages, taken):
                while left and left[0].offset == value.number:
                    if value.error is not None and value.error.error_type == "NOT_FOUND":
                        without.append(left.popleft())
                        continue
                    yield Fetched(left.popleft().row, value.data, value.error, seconds[0] / len(self.members))
            error = RowFailure("fetch", "TRUNCATED", f"{where} ends before this row").error
        except (SystemFault, UserError):
            raise
        except Exception as exc:
            error = failure_of(exc)
            error = replace(error, message=f"{where}: {error.message}")
        for member in left:
            yield Fetched(member.row, b"", failed[0] if failed else error, 0.0)
        paths = self._paths(sorted({member.offset for member in without}))
        for member in without:
            fact = "this row has no image: its bytes are null"
            if path := paths.get(member.offset):
                fact += (
                    f", there is only a path, {path[:200]!r}. To read the files that paths name, {PATHS_AS_MANIFEST}"
                )
            yield Fetched(member.row, b"", RowFailure("fetch", "NOT_FOUND", fact).error, 0.0)

    def _paths(self, numbers: list[int]) -> dict[int, str]:
        """Return the paths beside images that have no bytes, as far as they are to be had: they only say more."""
        column = path_column(self.pages.footer, self.pages.column)
        if not numbers or not column:
            return {}
        pages = replace(self.pages, column=column, numbers=numbers, max_bytes=_PAGE_BYTES)
        start, end = pages.chunk
        if end - start > _MOST_PATH_BYTES:
            return {}

        def take() -> Answer:
            try:
                return Answer(self._reader(start, end)(), None, 0.0)
            except RowFailure as exc:
                return Answer(b"", exc.error, 0.0)

        try:
            return {value.number: value.data.decode("utf-8", "replace") for value in self.unpack(pages, take)}
        except (SystemFault, UserError):
            raise
        except Exception:
            return {}


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
