"""JPEG: pixels by libjpeg-turbo, which tells of damage that other decoders pass over in silence.

libjpeg *warns* of whatever it can go on from: a Huffman code that does not exist, data that ends before the picture does,
data that is left over behind it. Most of this is damage. Some is not: a missing end marker, bytes between the segments of
the header, an unknown version of JFIF. libjpeg tells its first warning only, so that a file with a harmless flaw is
written again without it; what the decoder then still complains of is damage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

# Fill bytes, then the code of a marker: anything but an escaped 0xFF or a restart marker, which are parts of a scan.
_MARKER_IN_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_ZEROS = bytes(64)
# Mid-gray, which is also what libjpeg makes of coefficients that are missing.
_UNKNOWN = 128
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xCA)
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_APP0, _APP1, _APP14, _SOS, _END = 0xE0, 0xE1, 0xEE, 0xDA, 0xD9
# What a picture is made of: tables (Huffman, quantization, arithmetic), restart interval. APP1 has the orientation.
_BETWEEN_SCANS = frozenset([_SOS, 0xC4, 0xDB, 0xCC, 0xDD, 0xFE, *range(0xE0, 0xF0)])
_KEPT = frozenset([0xC4, 0xDB, 0xCC, 0xDD, _APP1]) | _FRAMES


@dataclass(frozen=True)
class Tidied:
    """A JPEG file without what has no say in its pixels.

    Attributes:
        data: The file.
        trimmed: The file without zero bytes behind its last scan; some may be the scan's own, so it comes second.
        ended: Whether it had its end marker.
        complete: Whether its scans could be followed to their end marker, or without one bring every coefficient of every
            component, as far as their headers tell.
    """

    data: bytes
    trimmed: bytes
    ended: bool
    complete: bool


def pixels(data: bytes, mode: str, size: tuple[int, int] | None = None, *, strict: bool = True) -> NDArray[np.uint8]:
    """Decode a file with libjpeg-turbo.

    Args:
        data: The file, beginning with its first marker.
        mode: Pillow's name of its mode: ``RGB`` or ``L`` give RGB, ``CMYK`` gives CMYK with 0 for no ink.
        size: Width and height to decode at, a half, a quarter or an eighth of its own, rounded up; None: its own.
            CMYK is always decoded at its own size.
        strict: Whether a warning is an error.

    Returns:
        uint8 of shape (height, width, 3), or (height, width, 4) for CMYK.

    Raises:
        ValueError: With the decoder's first complaint, or that of :func:`zeroed`.
        MemoryError: If there is none left.
    """
    colorspace = "CMYK" if mode == "CMYK" else "RGB"
    # Of the decoder's scales (eighths) the least that leaves this size is the one that gives exactly it.
    scale = {} if size is None or mode == "CMYK" else {"min_height": size[1], "min_width": size[0], "min_factor": 2}
    try:
        if strict:
            out: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace, strict=True, **scale)
            if (place := zeroed(data)) is not None:
                raise ValueError(f"zeros from byte {place:,} on, where no encoder writes any")
        else:
            # Where the decoder gives up it leaves rows as they are, which must not be whatever was in this memory before.
            height, width = simplejpeg.decode_jpeg_header(data, strict=False, **scale)[:2]
            buffer = np.full(height * width * len(colorspace), _UNKNOWN, np.uint8)
            out = simplejpeg.decode_jpeg(data, colorspace, strict=False, buffer=buffer, **scale)
            if (out == _UNKNOWN).all():
                raise ValueError("nothing of it can be decoded")
    except ValueError as exc:
        if "memory" in str(exc).lower():
            raise MemoryError from None
        raise
    # Adobe's programs store CMYK inverted, and everybody follows them, as Pillow does.
    return np.subtract(255, out, out=out) if mode == "CMYK" else out


def is_whole(data: bytes) -> bool:
    """Return whether there is nothing to complain of; decodes at an eighth of the size, which is the cheapest."""
    if zeroed(data) is not None:
        return False
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=2, strict=True)
    except (ValueError, MemoryError):
        return False
    return True


def zeroed(data: bytes) -> int | None:
    """Return where a scan holds zeros that no encoder wrote, such as a sector of a disk that was lost; None where it does not.

    Zeros decode without a complaint. What they mean depends on the Huffman tables: an end of block, of which flat images
    have many; or, by the tables of most files, the same small coefficient 63 times in a row, again and again, which no
    picture has. Only that is told.
    """
    # The cheap question first: a run of 64 zero bytes holds eight that are aligned.
    if np.frombuffer(data, np.uint64, len(data) // 8).all() or data.find(_ZEROS) < 0:
        return None
    # The symbol of the code that is all zeros, by class (0 DC, 1 AC) and number of the table.
    symbols: dict[int, int] = {}
    pattern, at, scan = _MARKER, 2, False
    while found := pattern.search(data, at):
        code, start = found[1][0], found.end()
        if scan and (place := data.find(_ZEROS, at, found.start())) >= 0:
            return place
        if code in _ALONE:
            at = start
            continue
        length = int.from_bytes(data[start : start + 2], "big")
        end = start + length
        if code == _END or length < 2 or end > len(data):
            return None
        if code == 0xC4:
            place = start + 2
            while place + 17 < end:
                symbols[data[place]] = data[place + 17]
                place += 17 + sum(data[place + 1 : place + 17])
        elif code == _SOS:
            pattern, count = _MARKER_IN_SCAN, data[start + 2]
            tables = [data[start + 4 + 2 * n] & 15 for n in range(count) if start + 4 + 2 * n < end]
            # Of the first scans that bring AC coefficients, not of those that refine them by single bits.
            first = data[end - 2] > 0 and data[end - 1] >> 4 == 0
            scan = first and any(symbols.get(0x10 | table, 0) & 15 for table in tables)
        at = end
    return None


def is_about_data(complaint: str) -> bool:
    """Return whether a complaint of the decoder is about the file, and not that its interface lacks such a kind of JPEG."""
    return not complaint.startswith(("tj", "Unsupported JPEG", "Unsupported color"))


def tidied(data: bytes) -> Tidied | None:
    """Write a file again without the flaws that no pixel depends on.

    Left out are bytes between segments, comments and application data but for the orientation; an unknown version of JFIF
    or an unknown transform of Adobe's becomes the one that decoders take it for; a missing end marker is added. Scans are left as
    they are, but for zero bytes that pad the last one, in ``trimmed``.

    Args:
        data: Beginning with 0xFF 0xD8.

    Returns:
        None where there is no scan, or no header that could be followed.
    """
    parts, components, adobe = [_SOI], 0, -1
    frame, at = 0, 2
    while found := _MARKER.search(data, at):
        code, start = found[1][0], found.end()
        if code in _ALONE:
            at = start
            continue
        length = int.from_bytes(data[start : start + 2], "big")
        if code in (0xD8, _END) or length < 2 or start + length > len(data):
            return None
        if code == _SOS:
            break
        body, at = data[start + 2 : start + length], start + length
        if code in _FRAMES and len(body) > 5:
            frame, components = code, body[5]
        if code == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 12:
            body = body[:5] + b"\x01\x02" + body[7:]
        elif code == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = len(parts)
        elif code not in _KEPT:
            continue
        parts.append(_segment(code, body))
    else:
        return None
    if adobe >= 0 and parts[adobe][15] > 2:
        segment = bytearray(parts[adobe])
        segment[15] = 2 if components == 4 else 1
        parts[adobe] = bytes(segment)
    ended, end, complete = _scans(data, found.start(), components, frame in _PROGRESSIVE)
    scans = data[found.start() : end]
    padded = scans.rstrip(b"\0")
    # An 0xFF among the data is written as 0xFF 0x00; alone it is the half of a marker that was cut.
    trimmed = padded + b"\0" if padded.endswith(b"\xff") and len(padded) < len(scans) else padded.rstrip(b"\xff")
    head = b"".join(parts)
    return Tidied(head + scans + _EOI, head + trimmed + _EOI, ended, complete)


def _segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + (len(body) + 2).to_bytes(2, "big") + body


def _scans(data: bytes, at: int, components: int, progressive: bool) -> tuple[bool, int, bool]:
    """Follow the scans; return whether there is an end marker, where they end, and whether they are complete."""
    # For each component the coefficients that are still to come, and to how many bits they are known.
    known: dict[int, list[int]] = {}
    # From the first marker, which is that of a scan.
    while found := _MARKER_IN_SCAN.search(data, at):
        code, start = found[1][0], found.end()
        if code == _END:
            return True, found.start(), True
        if code in _ALONE:
            at = start
            continue
        length = int.from_bytes(data[start : start + 2], "big")
        at = start + length
        if length < 2 or at > len(data) or code not in _BETWEEN_SCANS:
            # Damage that looks like a marker, which ends decoding; or the file ends within a segment.
            return _EOI in data[-1024:], found.start(), False
        count = data[start + 2]
        if code == _SOS and length == 6 + 2 * count:
            first, last, bits = data[at - 3], data[at - 2], data[at - 1] & 15
            if not progressive:
                first, last, bits = 0, 63, 0
            for place in range(count):
                coefficients = known.setdefault(data[start + 3 + 2 * place], [15] * 64)
                coefficients[first : last + 1] = [bits] * (min(last, 63) + 1 - first)
    return False, len(data), _complete(known, components)


def _complete(known: dict[int, list[int]], components: int) -> bool:
    return len(known) == components and not any(any(coefficients) for coefficients in known.values())
