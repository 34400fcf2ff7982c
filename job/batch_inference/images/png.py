"""PNG: the chunks that affect the pixels, and whether they are intact.

Pillow reads every chunk. It gives up at megabytes of text or color profile, and at a wrong checksum of such a chunk, although no
pixel depends on them; and it does not check the checksums of the pixels. It therefore gets only the chunks that affect the pixels,
after these have been checked.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_AFFECT_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
# Registered chunks that do not affect the pixels. A chunk of another type with a wrong checksum may have been one that does.
_HARMLESS = frozenset(
    b"tEXt zTXt iTXt iCCP gAMA cHRM sRGB cICP mDCV cLLI sBIT pHYs bKGD hIST sPLT tIME eXIf oFFs pCAL sCAL sTER gIFg gIFt "
    b"gIFx acTL fcTL fdAT caBX".split()
)
# EXIF as text is at most twice 64 KiB and some line breaks. XMP may be megabytes; its orientation is near the start.
_MAX_EXIF_TEXT = 160 * 1024
_MAX_XMP = 1024 * 1024
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)[0-9]')
# Samples of a pixel by color type.
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Offset and step of Adam7's passes: x, y, dx, dy.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 64 * 1024


@dataclass
class Chunks:
    """The chunks of a file that affect its pixels.

    Attributes:
        before: Complete chunks before the pixels: IHDR, PLTE, tRNS, and those that may have an orientation.
        pixels: The contents of the IDAT chunks.
        complaint: The damage, or None.
        truncated: Whether the file ends before its end chunk.
        for_iphones: Whether it is Apple's variant, whose pixels other decoders do not understand.
    """

    before: list[bytes | memoryview] = field(default_factory=list)
    pixels: list[memoryview] = field(default_factory=list)
    complaint: str | None = None
    truncated: bool = False
    for_iphones: bool = False

    @property
    def header(self) -> tuple[int, int, int, int, int] | None:
        """Width, height, bits a sample, color type and interlacing; None if the header is not the first chunk, or is damaged."""
        if not self.before or bytes(self.before[0][4:8]) != b"IHDR" or len(self.before[0]) != 25:
            return None
        if not _has_valid_checksum(self.before[0]):
            return None
        width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", self.before[0][8:21])
        return width, height, bits, color, interlaced

    def file(self) -> bytes:
        """Return a file of only these chunks."""
        data = [chunk for part in self.pixels for chunk in _chunk_parts(b"IDAT", part)]
        return b"".join([SIGNATURE, *self.before, *data, *_chunk_parts(b"IEND", b"")])

    def has_all_rows(self) -> bool:
        """Return whether the pixel data is complete and matches its own checksum."""
        expected = _unpacked_size(self.header)
        size, ended = self._unpacked(expected)
        return bool(expected) and ended and size == expected

    def lacks_rows(self) -> bool:
        """Return whether the pixel data ends before the last row; Pillow does not report that."""
        expected = _unpacked_size(self.header)
        return self._unpacked(expected)[0] < expected

    def _unpacked(self, maximum: int) -> tuple[int, bool]:
        """Return the size of the unpacked pixel data, counted up to a little more than ``maximum``, and whether it has an end."""
        unpack, size = zlib.decompressobj(), 0
        try:
            for part in self._pieces():
                piece: bytes | memoryview = part
                while piece and not unpack.eof and size <= maximum:
                    size += len(unpack.decompress(piece, _PIECE))
                    piece = unpack.unconsumed_tail
        except zlib.error:
            return size, False
        return size, unpack.eof

    def patched(self) -> Chunks | None:
        """Return the chunks with as much of the pixel data as can be unpacked, and zeros for the rest; None if there is nothing.

        This takes as much memory as the pixels, so check their number first.
        """
        header = self.header
        if not (expected := _unpacked_size(header)):
            return None
        assert header is not None  # noqa: S101
        unpack, unpacked = zlib.decompressobj(), bytearray()
        try:
            for part in self._pieces():
                piece: bytes | memoryview = part
                while piece and len(unpacked) < expected:
                    # In small parts: data unpacked before an error in the same call is lost.
                    unpacked += unpack.decompress(piece, min(1024, expected - len(unpacked)))
                    piece = unpack.unconsumed_tail
        except zlib.error:
            pass
        if not unpacked:
            return None
        rows = np.zeros(expected, np.uint8)
        rows[: len(unpacked)] = np.frombuffer(unpacked, np.uint8)
        start = 0
        for height, stride in _layout(header):
            # A row begins with its filter, of which there are five.
            filters = rows[start : start + height * stride : stride]
            filters[filters > 4] = 0
            start += height * stride
        return Chunks(self.before, [memoryview(zlib.compress(rows.tobytes(), 1))])

    def _pieces(self) -> Iterator[memoryview]:
        for part in self.pixels:
            for start in range(0, len(part), _PIECE):
                yield part[start : start + _PIECE]


def read_chunks(data: bytes, *, orientation: bool = True) -> Chunks:
    """Find the chunks that affect the pixels, and check them.

    At most a megabyte is unpacked, of a text that may have an orientation. Wrong checksums of other chunks, a wrong order and bytes
    behind the end are ignored; so is a missing end, if the pixel data is complete by its own checksum.

    Args:
        data: The file.
        orientation: Whether EXIF orientation is to be applied; otherwise EXIF does not affect the pixels.
    """
    chunks, view, start = Chunks(), memoryview(data), len(SIGNATURE)
    ended, lost, wrong = False, None, None
    while start + 8 <= len(data):
        length, chunk_type = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if not chunk_type.isalpha():
            lost = f"there is no chunk at byte {start:,}, where one must begin"
            break
        if chunk_type == b"IEND":
            ended = True
            break
        chunk, body = view[start : start + 12 + length], view[start + 8 : start + 8 + length]
        complete = len(chunk) == 12 + length
        affects_pixels = chunk_type in _AFFECT_PIXELS or (chunk_type == b"eXIf" and orientation)
        good = not complete or (chunk_type in _HARMLESS and not affects_pixels) or _has_valid_checksum(chunk)
        if not good:
            wrong = wrong or f"the checksum of its {chunk_type.decode()} chunk at byte {start:,} is wrong"
        if chunk_type == b"IDAT":
            chunks.pixels.append(body)
        elif complete and affects_pixels:
            chunks.before.append(chunk if good or chunk_type == b"IHDR" else _chunk(chunk_type, bytes(body)))
        elif complete and orientation and chunk_type in (b"tEXt", b"zTXt", b"iTXt"):
            chunks.before += _orientation_text(chunk_type, body)
        elif chunk_type == b"CgBI":
            chunks.for_iphones = True
        start += 12 + length
    chunks.truncated = not ended and lost is None
    if not chunks.before or bytes(chunks.before[0][4:8]) != b"IHDR":
        chunks.complaint = wrong or lost or "it does not begin with a header chunk"
    elif wrong is not None:
        chunks.complaint = wrong
    elif chunks.header and chunks.header[3] == 3 and not any(bytes(chunk[4:8]) == b"PLTE" for chunk in chunks.before):
        chunks.complaint = lost or "it lacks its palette"
    elif not ended and not chunks.has_all_rows():
        chunks.complaint = lost or "it lacks its last chunks, and pixels"
    return chunks


def _has_valid_checksum(chunk: bytes | memoryview) -> bool:
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _chunk_parts(chunk_type: bytes, body: bytes | memoryview) -> tuple[bytes, bytes, bytes | memoryview, bytes]:
    return len(body).to_bytes(4, "big"), chunk_type, body, zlib.crc32(body, zlib.crc32(chunk_type)).to_bytes(4, "big")


def _chunk(chunk_type: bytes, body: bytes) -> bytes:
    return b"".join(_chunk_parts(chunk_type, body))


def _orientation_text(chunk_type: bytes, body: memoryview) -> list[bytes]:
    """Return a text chunk that may have an orientation, as small as possible; no chunk for any other text.

    ImageMagick writes EXIF as text, Adobe's programs write XMP.
    """
    keyword = bytes(body[:80]).partition(b"\0")[0]
    if keyword not in (_XMP, _RAW_EXIF):
        return []
    packed, rest = chunk_type == b"zTXt", body[len(keyword) + 1 :]
    if chunk_type == b"zTXt":
        rest = rest[1:]
    elif chunk_type == b"iTXt":
        packed = bytes(rest[:1]) == b"\1"
        # The text follows language and translated keyword, each ended by a zero.
        head = bytes(rest[2:512]).split(b"\0", 2)
        if len(head) < 3:
            return []
        rest = rest[2 + len(head[0]) + len(head[1]) + 2 :]
    maximum = _MAX_XMP if keyword == _XMP else _MAX_EXIF_TEXT
    try:
        text = zlib.decompressobj().decompress(rest, maximum) if packed else bytes(rest[:maximum])
    except zlib.error:
        return []
    if keyword == _XMP:
        match = _XMP_ORIENTATION.search(text)
        return [_chunk(b"iTXt", _XMP + bytes(5) + match[0])] if chunk_type == b"iTXt" and match else []
    return [_chunk(b"tEXt", _RAW_EXIF + b"\0" + text)] if len(text) < maximum else []


def _layout(header: tuple[int, int, int, int, int]) -> Iterator[tuple[int, int]]:
    """Yield the number of rows and the bytes of a row, its filter included, of each pass."""
    width, height, bits, color, interlaced = header
    for x, y, dx, dy in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            yield rows, 1 + (columns * bits * _SAMPLES[color] + 7) // 8


def _unpacked_size(header: tuple[int, int, int, int, int] | None) -> int:
    """Return the size of the unpacked pixel data, in bytes; 0 if the header makes no sense."""
    if header is None or header[3] not in _SAMPLES:
        return 0
    return sum(rows * stride for rows, stride in _layout(header))
