"""Tar files (WebDataset's shards) as inputs: what is in one, and its members by range."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from batch_inference.errors import RowFailure
from batch_inference.fetcher import Answer, Fetcher, Request, check_size
from batch_inference.names import escaped
from batch_inference.ranges import RangeFile, looks_like
from batch_inference.runs import RANGE_BYTES, Failed, Fetched, Member, Run, read_range
from batch_inference.storage import display
from batch_inference.versions import version_of

# What lies between two members (headers, texts) is read along where it is less than this.
_GAP_BYTES = 128 * 1024
_BLOCK = 512
# An archive without members is written as at most one record of zeros; more of them are what a crash leaves of a file.
_RECORD_BYTES = 20 * _BLOCK
# Zeros behind an end mark that are looked through for another archive.
_MOST_ZEROS = 1024**3
# Names and attributes that a header may announce. Damaged ones ask for any number of bytes.
_MOST_HEADER_BYTES = 16 * 1024 * 1024
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_MORE_OF_THE_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
# The type of a member that GNU tar has cut at the end of a volume and goes on with in the next.
_CONTINUED = b"M"
_REMEDY = "Make the archive again and start a new job"


@dataclass
class TarIndex:
    """What a tar file holds.

    Attributes:
        places: Wanted members in the order of the archive: name to offset and size of the data, in bytes.
        failed: Wanted members that cannot be read, and why.
        rest: Why there are, or may well be, members that are not known; None where all are.
        skipped: Members left out, by file name ending ("" for none).
        replaced: Members that a later one of the same name replaces, as they do when the archive is unpacked.
        version: That of the file; None if the store has none.
        notes: What a user should know.
    """

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    failed: dict[str, RowFailure] = field(default_factory=dict)
    rest: RowFailure | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    version: int | None = None
    notes: list[str] = field(default_factory=list)


def index(uri: str, fetcher: Fetcher, wanted: Callable[[str], bool]) -> TarIndex:
    """Read the headers of a tar file: ustar, GNU and pax formats, names of any length; joined archives one after another.

    Where members are large only headers are read, a range request each; small ones are read through, which costs less than
    a request would.

    Args:
        uri: Canonical URI.
        fetcher: Reads it.
        wanted: Whether a member of that name is an input.

    Raises:
        RowFailure: If no member can be known: stage ``list``, EMPTY_FILE, UNKNOWN_FORMAT, CORRUPT or TRUNCATED; or the file
            cannot be read, as :meth:`Fetcher.fetch_range` has it, or CHANGED.
    """
    file = RangeFile(fetcher, uri, max_read=_MOST_HEADER_BYTES)
    _refuse_other(file)
    found = TarIndex()
    links: dict[str, str] = {}
    joints: list[tuple[int, int]] = []
    start: int | None = 0
    while start is not None:
        part = _Part(file, start)
        for member in part.members():
            _add(member, wanted, links, found)
        start = _behind(uri, file, part, found)
        if start is not None:
            joints.append((part.place, start))
    if joints:
        end, start = joints[0]
        found.notes.append(
            f"{display(uri)} has {len(joints) + 1:,} archives one behind another, which are all read: the first ends at byte {end:,}, "
            f"the second begins at byte {start:,}"
        )
    _follow(links, found)
    found.version = version_of(file.etag)
    return found


class _Part:
    """One archive of those that a file holds one behind another.

    Attributes:
        place: Where its headers end, in bytes: at an end mark, at the file's end, or at what is no header.
        last: Its last member.
    """

    def __init__(self, file: RangeFile, start: int) -> None:
        self._file = file
        self.place = start
        self.last: tarfile.TarInfo | None = None

    def members(self) -> Iterator[tarfile.TarInfo]:
        try:
            self._file.seek(self.place)
            archive = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115 - closing it is nothing to do
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or a million of them would be kept
                if archive.offset <= self.place or member.size < 0:
                    return
                self.place, self.last = archive.offset, member
                yield member
        except RowFailure:
            raise
        except Exception:
            # tarfile raises much more than its own errors at damaged headers: ValueError, IndexError, RecursionError.
            return

    @property
    def cut(self) -> bool:
        """Whether the file ends within the last member's data."""
        last = self.last
        return last is not None and min(last.offset_data + last.size, self.place) > self._file.size


def _add(member: tarfile.TarInfo, wanted: Callable[[str], bool], links: dict[str, str], found: TarIndex) -> None:
    name = _text(member.name)
    if member.isdir() or _hidden(name):
        return
    if not wanted(name):
        _count(found.skipped, posixpath.splitext(name)[1].lower())
    elif member.issym() or member.islnk():
        _link(name, member, links, found)
    elif member.issparse():
        _replace(name, links, found)
        found.failed[name] = RowFailure(
            "list",
            "SPARSE_MEMBER",
            f"the member at byte {member.offset:,} is stored as a sparse file, which is not in one piece",
            remedy="Make the archive again without --sparse and start a new job",
        )
    elif member.isreg():
        _replace(name, links, found)
        found.places[name] = (member.offset_data, member.size)
    elif member.type == _CONTINUED:
        _replace(name, links, found)
        found.failed[name] = RowFailure(
            "list",
            "TRUNCATED",
            f"the member at byte {member.offset:,} is the rest of one that begins in another volume (tar --multi-volume)",
            remedy="Make one archive of all volumes and start a new job",
        )
    else:
        _count(found.skipped, "special file")


def _link(name: str, member: tarfile.TarInfo, links: dict[str, str], found: TarIndex) -> None:
    """Notes a link as unpacking makes it: a hard one stands for the data of now, a symbolic one for those of the end."""
    folder = posixpath.dirname(name) if member.issym() else ""
    target = posixpath.normpath(posixpath.join(folder, _text(member.linkname)))
    if target == name:
        _count(found.skipped, "link")
        return
    place, failure, further = found.places.get(target), found.failed.get(target), links.get(target)
    _replace(name, links, found)
    if member.issym():
        links[name] = target
    elif place is not None:
        found.places[name] = place
    elif failure is not None:
        found.failed[name] = failure
    elif further is not None and further != name:
        links[name] = further
    else:
        _count(found.skipped, "link")


def _replace(name: str, links: dict[str, str], found: TarIndex) -> None:
    """Makes room for a member of that name: the last one counts, as where an archive is unpacked."""
    gone = (found.places.pop(name, None), found.failed.pop(name, None), links.pop(name, None))
    found.replaced += any(one is not None for one in gone)


def _follow(links: dict[str, str], found: TarIndex) -> None:
    """Gives links to members the place of what they mean."""
    for name, target in links.items():
        for _ in range(len(links)):
            target = links.get(target, target)
        if target in found.places:
            found.places[name] = found.places[target]
        elif target in found.failed:
            found.failed[name] = found.failed[target]
        else:
            _count(found.skipped, "link")


def _behind(uri: str, file: RangeFile, part: _Part, found: TarIndex) -> int | None:
    """Look at what follows a part's last member: return where another part begins, or None; note what is missing there."""
    place, images = part.place, len(found.places)
    block = _block(file, place)
    if not block:
        if part.cut and part.last is not None and _text(part.last.name) not in found.places:
            found.rest = RowFailure(
                "list",
                "TRUNCATED",
                f"the file ends at byte {file.size:,} within the member at byte {part.last.offset:,}, behind {images:,} images",
                remedy=_REMEDY,
            )
        else:
            what = "within a member" if part.cut else "without an end mark; it may have been cut"
            found.notes.append(f"{display(uri)} ends at byte {file.size:,} {what}")
        return None
    if not block.strip(b"\0"):
        return _behind_end_mark(uri, file, place, found)
    if len(block) < _BLOCK or _reaches_behind(file, place):
        found.rest = RowFailure(
            "list",
            "TRUNCATED",
            f"the file ends at byte {file.size:,} within the header at byte {place:,}, behind {images:,} images",
            remedy=_REMEDY,
        )
    else:
        found.rest = RowFailure(
            "list",
            "CORRUPT",
            f"the archive is damaged at byte {place:,}, behind {images:,} images: no tar header is there, and "
            f"{_not_looked_at(file, place)}",
            remedy=_REMEDY,
        )
    return None


def _behind_end_mark(uri: str, file: RangeFile, mark: int, found: TarIndex) -> int | None:
    place = _behind_zeros(file, mark)
    if place >= file.size:
        if mark == 0 and file.size > _RECORD_BYTES:
            found.rest = RowFailure(
                "list", "CORRUPT", f"the file has {file.size:,} bytes, and all of them are zero", remedy=_REMEDY
            )
        elif mark == 0:
            found.notes.append(f"{display(uri)} is an archive without members")
        elif file.size - mark < 2 * _BLOCK:
            found.notes.append(f"{display(uri)} ends at byte {file.size:,} within its end mark; it may have been cut")
        return None
    block = _block(file, place)
    if _is_header(block):
        if place - mark < 2 * _BLOCK:
            found.notes.append(
                f"{display(uri)} has a lone block of zeros at byte {mark:,}, where the header of a member may have been"
            )
        return place
    what = next((f", which begins like {name}" for magic, name in _MAGIC.items() if block.startswith(magic)), "")
    found.rest = RowFailure(
        "list",
        "CORRUPT",
        f"behind the end mark at byte {mark:,} and {len(found.places):,} images there is something else than a tar archive{what}: "
        f"{_not_looked_at(file, place)}",
        remedy=_REMEDY,
    )
    return None


def _not_looked_at(file: RangeFile, place: int) -> str:
    return f"the {file.size - place:,} bytes from byte {place:,} on are not looked at"


def _block(file: RangeFile, place: int) -> bytes:
    file.seek(place)
    return file.read(_BLOCK)


def _behind_zeros(file: RangeFile, place: int) -> int:
    """Return where the first block begins that is not all zeros, from a block of zeros on; where it gave up if that is far."""
    first = place
    while place < file.size and place - first < _MOST_ZEROS:
        file.seek(place)
        piece = file.read(min(4 * 1024 * 1024, file.size - place))
        rest = len(piece.lstrip(b"\0"))
        if rest:
            return place + (len(piece) - rest) // _BLOCK * _BLOCK
        place += len(piece)
    return place


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:
        return False
    return True


def _reaches_behind(file: RangeFile, offset: int) -> bool:
    """Whether headers that say more of the next one (long name, long link, pax) need more than there is."""
    while offset + _BLOCK <= file.size:
        block = _block(file, offset)
        if not _is_header(block):
            return False
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.type not in _MORE_OF_THE_NEXT or member.size < 0:
            return False
        offset += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
    return True


def _refuse_other(file: RangeFile) -> None:
    """Raise RowFailure for a file that does not begin as an archive does: with a header, or with the end mark of an empty one."""
    head = _block(file, 0)
    if not head:
        raise RowFailure("list", "EMPTY_FILE", "the file is empty, not a tar file", remedy=_REMEDY)
    if not head.strip(b"\0") or _is_header(head):
        return
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            raise RowFailure(
                "list", "UNKNOWN_FORMAT", f"the file is {name}, not a tar file: {NOT_BY_RANGE}", remedy=REPACK
            )
    if head[257:262] == b"ustar":
        raise RowFailure(
            "list",
            "CORRUPT",
            f"the archive is damaged at byte 0: its first header is not whole, and {_not_looked_at(file, 0)}",
            remedy=_REMEDY,
        )
    what, remedy = looks_like(head, _REMEDY)
    raise RowFailure("list", "UNKNOWN_FORMAT", f"the file is not a tar file: {what}", remedy=remedy)


NOT_BY_RANGE = "members of compressed archives can't be read by range"
REPACK = "Unpack it to an uncompressed .tar; images hardly get smaller by compression."


def _text(name: str) -> str:
    """A member's name as a column can hold it, one text for each name; its data are found by place, whatever it is called."""
    return name if name.isascii() and "\\x" not in name else escaped(name.encode("utf-8", "surrogateescape"))


def _hidden(name: str) -> bool:
    return "." in name and any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _count(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


# --- reading ---


def spans(uri: str, members: list[Member], fetcher: Fetcher, max_bytes: int) -> Iterator[Run]:
    """Members in the order of the archive, cut into ranges.

    Args:
        uri: The tar file.
        members: Those that are wanted, by their place.
        fetcher: Reads them.
        max_bytes: Larger ones are not read.
    """
    span: list[Member] = []
    for member in members:
        size = member.size or 0
        try:
            check_size(size, max_bytes)
        except RowFailure as exc:
            yield Failed([member.row], exc.error)
            continue
        if span:
            end = span[-1].offset + (span[-1].size or 0)
            if member.offset - end > _GAP_BYTES or member.offset + size - span[0].offset > RANGE_BYTES:
                yield _Span(uri, span, fetcher)
                span = []
        span.append(member)
    if span:
        yield _Span(uri, span, fetcher)


@dataclass(frozen=True)
class _Span:
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
            yield Request(lambda: read_range(self.fetcher, self.uri, start, end, self.members[0].version), end - start)

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        first = self.members[0].offset
        anything = any(member.size for member in self.members)
        answer = take() if anything else Answer(b"", None, 0.0)
        seconds = answer.seconds / len(self.members)
        for row, offset, size, _, _ in self.members:
            start, end = offset - first, offset - first + (size or 0)
            error = answer.error
            if error is None and size and end > len(answer.data):
                there = max(0, len(answer.data) - start)
                error = RowFailure(
                    "fetch", "TRUNCATED", f"{self.uri} ends behind {there:,} of the member's {size:,} bytes"
                ).error
            yield Fetched(row, b"" if error else bytes(answer.data[start:end]), error, seconds)
