"""Tar files (WebDataset's shards) as inputs: what is in one, and its members by range."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from batch_inference.errors import RowFailure, UserError
from batch_inference.fetcher import Answer, Fetcher, Request, check_size
from batch_inference.names import escaped
from batch_inference.ranges import RangeFile
from batch_inference.runs import RANGE_BYTES, Failed, Fetched, Member, Run, read_range
from batch_inference.storage import display
from batch_inference.versions import version_of

# What lies between two members (headers, texts) is read along where it is less than this.
_GAP_BYTES = 128 * 1024
# Written in units of 10 KiB, or of what `tar -b` was told; more behind the end mark is another archive or rubbish.
_PADDING_BYTES = 1024 * 1024
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_MORE_OF_THE_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_MEND = "Make the archive anew, or leave it out."


@dataclass
class TarIndex:
    """What a tar file holds.

    Attributes:
        places: Wanted members in the order of the archive: name to offset and size of the data, in bytes.
        skipped: Members left out, by file name ending ("" for none).
        replaced: Members that a later one of the same name replaces, as they do when the archive is unpacked.
        version: That of the file; None if the store has none.
        notes: What a user should know.
    """

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    version: int | None = None
    notes: list[str] = field(default_factory=list)


def index(uri: str, fetcher: Fetcher, wanted: Callable[[str], bool]) -> TarIndex:
    """Reads the headers of a tar file: ustar, GNU and pax formats, names of any length.

    Where members are large only headers are read, a range request each; small ones are read through, which costs less than
    a request would.

    Args:
        uri: Canonical URI.
        fetcher: Reads it.
        wanted: Whether a member of that name is an input.

    Raises:
        UserError: If it is no uncompressed tar file, is damaged, or holds an image as a sparse file.
        RowFailure: If it can't be read.
    """
    file = RangeFile(fetcher, uri)
    found = TarIndex()
    links: dict[str, str] = {}
    archive = None
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closing it is nothing to do
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or a million of them would be kept
            name = _text(member.name)
            if member.isdir() or _hidden(name):
                continue
            if not wanted(name):
                _count(found.skipped, posixpath.splitext(name)[1].lower())
            elif member.issym() or member.islnk():
                _link(name, member, links, found)
            elif member.issparse():
                raise UserError(
                    f"{display(uri)}#{name} is stored as a sparse file, which is not in one piece",
                    "Make the archive anew without --sparse.",
                )
            elif member.isreg():
                _replace(name, links, found)
                found.places[name] = (member.offset_data, member.size)
    except tarfile.ReadError as exc:
        # Behind a member whose data or header is cut there is nothing more to be found.
        if archive is None or archive.offset < 512:
            raise UserError(*_no_tar(uri, file, exc)) from None
    if archive is not None:
        _check_end(uri, file, archive.offset, found)
    _follow(links, found)
    found.version = version_of(file.etag)
    return found


def _link(name: str, member: tarfile.TarInfo, links: dict[str, str], found: TarIndex) -> None:
    """Notes a link as unpacking makes it: a hard one stands for the data of now, a symbolic one for those of the end."""
    folder = posixpath.dirname(name) if member.issym() else ""
    target = posixpath.normpath(posixpath.join(folder, _text(member.linkname)))
    if target == name:
        _count(found.skipped, "link")
        return
    place, further = found.places.get(target), links.get(target)
    _replace(name, links, found)
    if member.issym():
        links[name] = target
    elif place is not None:
        found.places[name] = place
    elif further is not None and further != name:
        links[name] = further
    else:
        _count(found.skipped, "link")


def _replace(name: str, links: dict[str, str], found: TarIndex) -> None:
    """Makes room for a member of that name: the last one counts, as where an archive is unpacked."""
    found.replaced += found.places.pop(name, None) is not None or links.pop(name, None) is not None


def _follow(links: dict[str, str], found: TarIndex) -> None:
    """Gives links to members the place of what they mean."""
    for name, target in links.items():
        for _ in range(len(links)):
            target = links.get(target, target)
        if target in found.places:
            found.places[name] = found.places[target]
        else:
            _count(found.skipped, "link")


def _check_end(uri: str, file: RangeFile, offset: int, found: TarIndex) -> None:
    """Tells the end of an archive from damage in it, which a reader of tar files passes over in silence."""
    file.seek(offset)
    block = file.read(512)
    if block.strip(b"\0"):
        if len(block) == 512 and not _reaches_behind(file, offset):
            raise UserError(
                f"{display(uri)} is damaged at byte {offset:,}, behind {len(found.places):,} images: no tar header is there",
                _MEND,
            )
        found.notes.append(f"{display(uri)} is cut in the header of a member, behind {len(found.places):,} images")
    elif not block:
        last = max((start + size for start, size in found.places.values()), default=0)
        what = "within a member" if last > file.size else "without an end mark; it may have been cut"
        found.notes.append(f"{display(uri)} ends at byte {file.size:,} {what}")
    elif file.size - offset > _PADDING_BYTES:
        found.notes.append(
            f"{display(uri)} goes on for {file.size - offset:,} bytes behind its end mark, which are not looked at; "
            "archives can't be joined by cat"
        )


def _reaches_behind(file: RangeFile, offset: int) -> bool:
    """Whether headers that say more of the next one (long name, long link, pax) need more than there is."""
    while offset + 512 <= file.size:
        file.seek(offset)
        try:
            member = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        if member.type not in _MORE_OF_THE_NEXT:
            return False
        offset += 512 + -(-member.size // 512) * 512
    return True


def _no_tar(uri: str, file: RangeFile, exc: Exception) -> tuple[str, str]:
    file.seek(0)
    head = file.read(8)
    if not head:
        return f"{display(uri)} is empty, not a tar file", _MEND
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return f"{display(uri)} is {name}, not a tar file: {NOT_BY_RANGE}", REPACK
    return f"{display(uri)} is not a tar file ({exc})", _MEND


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
