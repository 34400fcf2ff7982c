"""PNG: which chunks have a say in the pixels, and whether these are as they were written.

Pillow reads every chunk, gives up at megabytes of text or color profile that no pixel depends on, takes a wrong checksum of
such a chunk as a reason to refuse the image, and does not look at the checksums of the pixels. So it is given the chunks
that matter only, after these have been checked.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAY_IN_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
# Registered chunks that no pixel depends on here; what another type with a wrong checksum was once is not known.
_HARMLESS = frozenset(
    b"tEXt zTXt iTXt iCCP gAMA cHRM sRGB cICP mDCV cLLI sBIT pHYs bKGD hIST sPLT tIME eXIf oFFs pCAL sCAL sTER gIFg gIFt "
    b"gIFx acTL fcTL fdAT caBX".split()
)
# EXIF as text is at most twice 64 KiB and some line breaks; XMP may be megabytes, its orientation is near the start.
_MOST_EXIF_TEXT = 160 * 1024
_MOST_XMP = 1024 * 1024
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)[0-9]')
# Bits of a pixel by color type, in samples.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Offset and step of Adam7's passes: x, y, dx, dy.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 64 * 1024


@dataclass
class Chunks:
    """The chunks of a file that have a say in its pixels.

    Attributes:
        before: Those before the pixels, whole: IHDR, PLTE, tRNS, and what may name an orientation.
        pixels: The contents of the IDAT chunks.
        complaint: What is damaged, None where nothing is.
        cut: Whether the file ends before its end chunk.
        for_iphones: Whether it is Apple's variant, whose pixels other decoders do not understand.
    """

    before: list[bytes | memoryview] = field(default_factory=list)
    pixels: list[memoryview] = field(default_factory=list)
    complaint: str | None = None
    cut: bool = False
    for_iphones: bool = False

    @property
    def header(self) -> tuple[int, int, int, int, int] | None:
        """Width, height, bits a sample, color type and interlacing; None where the header is not the first chunk, or damaged."""
        if not self.before or bytes(self.before[0][4:8]) != b"IHDR" or len(self.before[0]) != 25:
            return None
        if not _checked(self.before[0]):
            return None
        width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", self.before[0][8:21])
        return width, height, bits, color, interlaced

    def file(self) -> bytes:
        """Return a file of these chunks alone."""
        data = [chunk for part in self.pixels for chunk in _chunk_parts(b"IDAT", part)]
        return b"".join([SIGNATURE, *self.before, *data, *_chunk_parts(b"IEND", b"")])

    def rows_complete(self) -> bool:
        """Return whether the pixel data is all there, and as its own checksum says."""
        expected = _size(self.header)
        size, ended = self._unpacked(expected)
        return bool(expected) and ended and size == expected

    def rows_missing(self) -> bool:
        """Return whether the pixel data ends before the last row, of which Pillow says nothing."""
        expected = _size(self.header)
        return self._unpacked(expected)[0] < expected

    def _unpacked(self, most: int) -> tuple[int, bool]:
        """Return the bytes of the pixel data, counted up to a little more than ``most``, and whether it has its own end."""
        unpack, size = zlib.decompressobj(), 0
        try:
            for part in self._pieces():
                piece: bytes | memoryview = part
                while piece and not unpack.eof and size <= most:
                    size += len(unpack.decompress(piece, _PIECE))
                    piece = unpack.unconsumed_tail
        except zlib.error:
            return size, False
        return size, unpack.eof

    def patched(self) -> Chunks | None:
        """Return the chunks with as much of the pixel data as can be unpacked and zeros for the rest; None where there is nothing.

        Takes as much memory as the pixels, so that their number has to be checked first.
        """
        header = self.header
        if not (expected := _size(header)):
            return None
        assert header is not None  # noqa: S101
        unpack, found = zlib.decompressobj(), bytearray()
        try:
            for part in self._pieces():
                piece: bytes | memoryview = part
                while piece and len(found) < expected:
                    # In small parts, since what was unpacked before an error in the same call is lost.
                    found += unpack.decompress(piece, min(1024, expected - len(found)))
                    piece = unpack.unconsumed_tail
        except zlib.error:
            pass
        if not found:
            return None
        rows = np.zeros(expected, np.uint8)
        rows[: len(found)] = np.frombuffer(found, np.uint8)
        at = 0
        for height, stride in _layout(header):
            # A row begins with its filter, of which there are five.
            filters = rows[at : at + height * stride : stride]
            filters[filters > 4] = 0
            at += height * stride
        return Chunks(self.before, [memoryview(zlib.compress(rows.tobytes(), 1))])

    def _pieces(self) -> Iterator[memoryview]:
        for part in self.pixels:
            for at in range(0, len(part), _PIECE):
                yield part[at : at + _PIECE]


def chunks(data: bytes, *, orientation: bool = True) -> Chunks:
    """Find the chunks that have a say in the pixels, and check them.

    Nothing is unpacked but one text that may name an orientation, and of that a megabyte at most. Wrong checksums of other
    chunks, a wrong order and bytes behind the end are forgiven; so is a missing end, where the pixel data is complete by its
    own checksum.

    Args:
        data: The file.
        orientation: Whether EXIF orientation is to be applied; else EXIF has no say in the pixels.
    """
    found, view, at = Chunks(), memoryview(data), len(SIGNATURE)
    ended, lost, wrong = False, None, None
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if not kind.isalpha():
            lost = f"there is no chunk at byte {at:,}, where one must begin"
            break
        if kind == b"IEND":
            ended = True
            break
        chunk, body = view[at : at + 12 + length], view[at + 8 : at + 8 + length]
        whole = len(chunk) == 12 + length
        matters = kind in _SAY_IN_PIXELS or (kind == b"eXIf" and orientation)
        good = not whole or (kind in _HARMLESS and not matters) or _checked(chunk)
        if not good:
            wrong = wrong or f"the checksum of its {kind.decode()} chunk at byte {at:,} is wrong"
        if kind == b"IDAT":
            found.pixels.append(body)
        elif whole and matters:
            found.before.append(chunk if good or kind == b"IHDR" else _chunk(kind, bytes(body)))
        elif whole and orientation and kind in (b"tEXt", b"zTXt", b"iTXt"):
            found.before += _orientation_text(kind, body)
        elif kind == b"CgBI":
            found.for_iphones = True
        at += 12 + length
    found.cut = not ended and lost is None
    if not found.before or bytes(found.before[0][4:8]) != b"IHDR":
        found.complaint = wrong or lost or "it does not begin with a header chunk"
    elif wrong is not None:
        found.complaint = wrong
    elif found.header and found.header[3] == 3 and not any(bytes(chunk[4:8]) == b"PLTE" for chunk in found.before):
        found.complaint = lost or "it lacks its palette"
    elif not ended and not found.rows_complete():
        found.complaint = lost or "it lacks its last chunks, and pixels"
    return found


def _checked(chunk: bytes | memoryview) -> bool:
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _chunk_parts(kind: bytes, body: bytes | memoryview) -> tuple[bytes, bytes, bytes | memoryview, bytes]:
    return len(body).to_bytes(4, "big"), kind, body, zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join(_chunk_parts(kind, body))


def _orientation_text(kind: bytes, body: memoryview) -> list[bytes]:
    """Return a text chunk in which an orientation may stand, as small as possible; no chunk where there is none.

    ImageMagick writes EXIF as text, Adobe's programs XMP. Both have been honored so far; all other text is left out.
    """
    keyword = bytes(body[:80]).partition(b"\0")[0]
    if keyword not in (_XMP, _RAW_EXIF):
        return []
    packed, rest = kind == b"zTXt", body[len(keyword) + 1 :]
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        packed = bytes(rest[:1]) == b"\1"
        # Behind language and translated keyword, each ended by a zero.
        head = bytes(rest[2:512]).split(b"\0", 2)
        if len(head) < 3:
            return []
        rest = rest[2 + len(head[0]) + len(head[1]) + 2 :]
    most = _MOST_XMP if keyword == _XMP else _MOST_EXIF_TEXT
    try:
        text = zlib.decompressobj().decompress(rest, most) if packed else bytes(rest[:most])
    except zlib.error:
        return []
    if keyword == _XMP:
        found = _XMP_ORIENTATION.search(text)
        return [_chunk(b"iTXt", _XMP + bytes(5) + found[0])] if kind == b"iTXt" and found else []
    return [_chunk(b"tEXt", _RAW_EXIF + b"\0" + text)] if len(text) < most else []


def _layout(header: tuple[int, int, int, int, int]) -> Iterator[tuple[int, int]]:
    """Yield the number of rows and the bytes of a row, its filter included, of each pass."""
    width, height, bits, color, interlaced = header
    for x, y, dx, dy in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            yield rows, 1 + (columns * bits * _SAMPLES[color] + 7) // 8


def _size(header: tuple[int, int, int, int, int] | None) -> int:
    """Bytes of the unpacked pixel data; 0 where the header makes no sense."""
    if header is None or header[3] not in _SAMPLES:
        return 0
    return sum(rows * stride for rows, stride in _layout(header))
