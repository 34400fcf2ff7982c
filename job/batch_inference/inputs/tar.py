"""Tar files (WebDataset's archives) as inputs: list their members, and read these by range."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from batch_inference.errors import RowError
from batch_inference.inputs.reads import RANGE_BYTES, CoalescedRead, FetchedInput, Member, SkippedRead, read_range
from batch_inference.inputs.signatures import describe_mismatch
from batch_inference.storage.etags import hash_etag
from batch_inference.storage.fetcher import Fetcher, check_size
from batch_inference.storage.names import escape_name
from batch_inference.storage.range_file import RangeFile
from batch_inference.storage.read_ahead import Answer, Request
from batch_inference.storage.uris import display_uri
from batch_inference.text import format_count

# Bytes between two members (headers, texts) are read along if they are fewer than this.
_GAP_BYTES = 128 * 1024
_BLOCK_BYTES = 512
# An archive without members is written as at most one record of zeros. A crash leaves files with more of them.
_RECORD_BYTES = 20 * _BLOCK_BYTES
# Zeros behind an end mark that are searched for another archive.
_MAX_ZEROS = 1024**3
# Names and attributes that a header may announce. Damaged headers ask for any number of bytes.
_MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_EXTENDED_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
# The type of the rest of a member that GNU tar has cut at the end of a volume.
_CONTINUED = b"M"
_REMEDY = "Make the archive again and start a new job"
NOT_BY_RANGE = "members of compressed archives can't be read by range"
_REPACK = "Unpack it to an uncompressed .tar; images hardly get smaller by compression."


@dataclass
class TarIndex:
    """The members of a tar file.

    Attributes:
        locations: Wanted members in the order of the archive: name to offset and size of the data, in bytes.
        failed: Wanted members that cannot be read, and why.
        rest_error: Why there are, or may well be, members that are not known; None if all are known.
        skipped: Members left out, by file name ending ("" for none).
        replaced: Members that a later one of the same name replaces, as they do when the archive is unpacked.
        etag_hash: The file's; None if the store has no ETags.
        notes: Sentences for the user.
    """

    locations: dict[str, tuple[int, int]] = field(default_factory=dict)
    failed: dict[str, RowError] = field(default_factory=dict)
    rest_error: RowError | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    etag_hash: int | None = None
    notes: list[str] = field(default_factory=list)


def read_index(uri: str, fetcher: Fetcher, wanted: Callable[[str], bool]) -> TarIndex:
    """Read the headers of a tar file: ustar, GNU and pax formats, names of any length; joined archives one after another.

    Of large members only the headers are read, by a range request each. Small members are read through, which costs less than a
    request would.

    Args:
        uri: Canonical URI.
        fetcher: Sends the requests.
        wanted: Whether a member of that name is an input.

    Raises:
        RowError: If no member can be known: stage ``list``, EMPTY_FILE, UNKNOWN_FORMAT, CORRUPT or TRUNCATED; or the file
            cannot be read, as :meth:`Fetcher.fetch_range` has it, or CHANGED.
    """
    file = RangeFile(fetcher, uri, max_read=_MAX_HEADER_BYTES)
    _refuse_other_format(file)
    index = TarIndex()
    builder = _IndexBuilder(index, wanted)
    joints: list[tuple[int, int]] = []
    start: int | None = 0
    while start is not None:
        part = _Part(file, start)
        for member in part.members():
            builder.add(member)
        start = _next_part(uri, file, part, index)
        if start is not None:
            joints.append((part.end, start))
    if joints:
        end, start = joints[0]
        index.notes.append(
            f"{display_uri(uri)} has {len(joints) + 1:,} archives one after another, which are all read: the first ends at byte {end:,}, "
            f"the second begins at byte {start:,}"
        )
    builder.resolve_links()
    index.etag_hash = hash_etag(file.etag)
    return index


class _Part:
    """One of the archives that a file holds one after another.

    Attributes:
        end: First byte behind its headers: an end mark, the file's end, or something that is no header.
        last: Its last member.
    """

    def __init__(self, file: RangeFile, start: int) -> None:
        self._file = file
        self.end = start
        self.last: tarfile.TarInfo | None = None

    def members(self) -> Iterator[tarfile.TarInfo]:
        try:
            self._file.seek(self.end)
            archive = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115 - it has nothing to close
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or a million of them would be kept
                if archive.offset <= self.end or member.size < 0:
                    return
                self.end, self.last = archive.offset, member
                yield member
        except RowError:
            raise
        except Exception:
            # tarfile raises more than its own errors at damaged headers: ValueError, IndexError, RecursionError.
            return

    @property
    def is_cut(self) -> bool:
        """Whether the file ends within the last member's data."""
        last = self.last
        return last is not None and min(last.offset_data + last.size, self.end) > self._file.size


class _IndexBuilder:
    """Adds members to an index as unpacking would make files of them: a later one replaces an earlier one of the same name."""

    def __init__(self, index: TarIndex, wanted: Callable[[str], bool]) -> None:
        self._index = index
        self._wanted = wanted
        self._links: dict[str, str] = {}

    def add(self, member: tarfile.TarInfo) -> None:
        name = _member_name(member.name)
        if member.isdir() or _is_hidden(name):
            return
        if not self._wanted(name):
            self._skip(posixpath.splitext(name)[1].lower())
        elif member.issym() or member.islnk():
            self._add_link(name, member)
        elif member.issparse():
            self._replace(name)
            self._index.failed[name] = RowError(
                "list",
                "SPARSE_MEMBER",
                f"the member at byte {member.offset:,} is stored as a sparse file, in several pieces",
                remedy="Make the archive again without --sparse and start a new job",
            )
        elif member.isreg():
            self._replace(name)
            self._index.locations[name] = (member.offset_data, member.size)
        elif member.type == _CONTINUED:
            self._replace(name)
            self._index.failed[name] = RowError(
                "list",
                "TRUNCATED",
                f"the member at byte {member.offset:,} is the rest of one that begins in another volume (tar --multi-volume)",
                remedy="Make one archive of all volumes and start a new job",
            )
        else:
            self._skip("special file")

    def resolve_links(self) -> None:
        """Give symbolic links the locations of their targets."""
        index, links = self._index, self._links
        for name, target in links.items():
            for _ in range(len(links)):
                target = links.get(target, target)
            if target in index.locations:
                index.locations[name] = index.locations[target]
            elif target in index.failed:
                index.failed[name] = index.failed[target]
            else:
                self._skip("link")

    def _add_link(self, name: str, member: tarfile.TarInfo) -> None:
        """Add a link: a hard one stands for the target's data of this moment, a symbolic one for those at the end of the archive."""
        index, links = self._index, self._links
        folder = posixpath.dirname(name) if member.issym() else ""
        target = posixpath.normpath(posixpath.join(folder, _member_name(member.linkname)))
        if target == name:
            self._skip("link")
            return
        location, failure, next_target = index.locations.get(target), index.failed.get(target), links.get(target)
        self._replace(name)
        if member.issym():
            links[name] = target
        elif location is not None:
            index.locations[name] = location
        elif failure is not None:
            index.failed[name] = failure
        elif next_target is not None and next_target != name:
            links[name] = next_target
        else:
            self._skip("link")

    def _replace(self, name: str) -> None:
        """Remove an earlier member of that name, and count it."""
        index = self._index
        earlier = (index.locations.pop(name, None), index.failed.pop(name, None), self._links.pop(name, None))
        index.replaced += any(entry is not None for entry in earlier)

    def _skip(self, kind: str) -> None:
        self._index.skipped[kind] = self._index.skipped.get(kind, 0) + 1


# --- the end of an archive -------------------------------------------------------------------------------------------------


def _next_part(uri: str, file: RangeFile, part: _Part, index: TarIndex) -> int | None:
    """Return the first byte of another archive behind a part, or None; add to the index what is missing there."""
    end, images = part.end, format_count(len(index.locations), "image")
    block = _read_block(file, end)
    if not block:
        if part.is_cut and part.last is not None and _member_name(part.last.name) not in index.locations:
            index.rest_error = RowError(
                "list",
                "TRUNCATED",
                f"the file ends at byte {file.size:,} within the member at byte {part.last.offset:,}, after {images}",
                remedy=_REMEDY,
            )
        else:
            detail = "within a member" if part.is_cut else "without an end mark; it may have been cut"
            index.notes.append(f"{display_uri(uri)} ends at byte {file.size:,} {detail}")
        return None
    if not block.strip(b"\0"):
        return _next_part_behind_mark(uri, file, end, index)
    if len(block) < _BLOCK_BYTES or _reaches_behind(file, end):
        index.rest_error = RowError(
            "list",
            "TRUNCATED",
            f"the file ends at byte {file.size:,} within the header at byte {end:,}, after {images}",
            remedy=_REMEDY,
        )
    else:
        index.rest_error = RowError(
            "list",
            "CORRUPT",
            f"the archive is damaged at byte {end:,}, after {images}: no tar header is there, and "
            f"{_not_read(file, end)}",
            remedy=_REMEDY,
        )
    return None


def _next_part_behind_mark(uri: str, file: RangeFile, mark: int, index: TarIndex) -> int | None:
    start = _skip_zeros(file, mark)
    if start >= file.size:
        if mark == 0 and file.size > _RECORD_BYTES:
            index.rest_error = RowError(
                "list", "CORRUPT", f"the file has {file.size:,} bytes, and all of them are zero", remedy=_REMEDY
            )
        elif mark == 0:
            index.notes.append(f"{display_uri(uri)} is an archive without members")
        elif file.size - mark < 2 * _BLOCK_BYTES:
            index.notes.append(
                f"{display_uri(uri)} ends at byte {file.size:,} within its end mark; it may have been cut"
            )
        return None
    block = _read_block(file, start)
    if _is_header(block):
        if start - mark < 2 * _BLOCK_BYTES:
            index.notes.append(
                f"{display_uri(uri)} has a lone block of zeros at byte {mark:,}, where the header of a member may have been"
            )
        return start
    begins_like = next((f", which begins like {name}" for magic, name in _MAGIC.items() if block.startswith(magic)), "")
    index.rest_error = RowError(
        "list",
        "CORRUPT",
        f"after the end mark at byte {mark:,} and {format_count(len(index.locations), 'image')} comes something other than a tar "
        f"archive{begins_like}: {_not_read(file, start)}",
        remedy=_REMEDY,
    )
    return None


def _not_read(file: RangeFile, start: int) -> str:
    left = file.size - start
    return f"the {format_count(left, 'byte')} from byte {start:,} on {'is' if left == 1 else 'are'} not read"


def _read_block(file: RangeFile, start: int) -> bytes:
    file.seek(start)
    return file.read(_BLOCK_BYTES)


def _skip_zeros(file: RangeFile, start: int) -> int:
    """Return where the first block begins that is not all zeros, from a block of zeros on; if that is far, where it gave up."""
    position = start
    while position < file.size and position - start < _MAX_ZEROS:
        file.seek(position)
        data = file.read(min(4 * 1024 * 1024, file.size - position))
        rest = len(data.lstrip(b"\0"))
        if rest:
            return position + (len(data) - rest) // _BLOCK_BYTES * _BLOCK_BYTES
        position += len(data)
    return position


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:
        return False
    return True


def _reaches_behind(file: RangeFile, offset: int) -> bool:
    """Return whether headers that extend the next one (long name, long link, pax) need more bytes than there are."""
    while offset + _BLOCK_BYTES <= file.size:
        block = _read_block(file, offset)
        if not _is_header(block):
            return False
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.type not in _EXTENDED_HEADERS or member.size < 0:
            return False
        offset += _BLOCK_BYTES + -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES
    return True


def _refuse_other_format(file: RangeFile) -> None:
    """Raise RowError for a file that does not begin as an archive does: with a header, or with the end mark of an empty one."""
    head = _read_block(file, 0)
    if not head:
        raise RowError("list", "EMPTY_FILE", "the file is empty, not a tar file", remedy=_REMEDY)
    if not head.strip(b"\0") or _is_header(head):
        return
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            raise RowError(
                "list", "UNKNOWN_FORMAT", f"the file is {name}, not a tar file: {NOT_BY_RANGE}", remedy=_REPACK
            )
    if head[257:262] == b"ustar":
        raise RowError(
            "list",
            "CORRUPT",
            f"the archive is damaged at byte 0: its first header is not intact, and {_not_read(file, 0)}",
            remedy=_REMEDY,
        )
    description, remedy = describe_mismatch(head, _REMEDY)
    raise RowError("list", "UNKNOWN_FORMAT", f"the file is not a tar file: {description}", remedy=remedy)


def _member_name(name: str) -> str:
    """Return a member's name as a column can hold it, one text for each name; its data are found by location, not by name."""
    return name if name.isascii() and "\\x" not in name else escape_name(name.encode("utf-8", "surrogateescape"))


def _is_hidden(name: str) -> bool:
    return "." in name and any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


# --- reading ---


def span_reads(uri: str, members: list[Member], fetcher: Fetcher, max_bytes: int) -> Iterator[CoalescedRead]:
    """Yield one read for each range of members, in the order of the archive.

    Args:
        uri: The tar file.
        members: The wanted members, by their offset.
        fetcher: Sends the requests.
        max_bytes: Larger ones are not read.
    """
    span: list[Member] = []
    for member in members:
        size = member.size or 0
        try:
            check_size(size, max_bytes)
        except RowError as exc:
            yield SkippedRead([member.row], exc.error)
            continue
        if span:
            end = span[-1].offset + (span[-1].size or 0)
            if member.offset - end > _GAP_BYTES or member.offset + size - span[0].offset > RANGE_BYTES:
                yield _SpanRead(uri, span, fetcher)
                span = []
        span.append(member)
    if span:
        yield _SpanRead(uri, span, fetcher)


@dataclass(frozen=True)
class _SpanRead:
    """Members of a tar file that one range covers."""

    uri: str
    members: list[Member]
    fetcher: Fetcher

    @property
    def rows(self) -> list[int]:
        return [member.row for member in self.members]

    def requests(self) -> Iterator[Request]:
        start = self.members[0].offset
        end = max(member.offset + (member.size or 0) for member in self.members)
        if end > start:
            yield Request(
                lambda: read_range(self.fetcher, self.uri, start, end, self.members[0].etag_hash), end - start
            )

    def inputs(self, next_answer: Callable[[], Answer]) -> Iterator[FetchedInput]:
        first = self.members[0].offset
        has_data = any(member.size for member in self.members)
        answer = next_answer() if has_data else Answer(b"", None, 0.0)
        seconds = answer.seconds / len(self.members)
        for row, offset, size, _, _ in self.members:
            start, end = offset - first, offset - first + (size or 0)
            error = answer.error
            if error is None and size and end > len(answer.data):
                available = max(0, len(answer.data) - start)
                error = RowError(
                    "fetch",
                    "TRUNCATED",
                    f"{self.uri} ends after {available:,} of the member's {format_count(size, 'byte')}",
                ).error
            yield FetchedInput(row, b"" if error else bytes(answer.data[start:end]), error, seconds)
