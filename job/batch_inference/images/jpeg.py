"""JPEG, decoded by libjpeg-turbo, which reports damage that other decoders pass over in silence.

libjpeg *warns* of any problem after which it can go on: a Huffman code that does not exist, data that ends before the picture
does, data left over behind it. Most of these are damage. Some are not: a missing end marker, bytes between the segments of the
header, an unknown version of JFIF. libjpeg reports only its first warning. A file with a harmless flaw is therefore written again
without it; if the decoder still complains, that is damage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

# Fill bytes, then the code of a marker: any but an escaped 0xFF or a restart marker, which are parts of a scan.
_MARKER_IN_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_ZEROS = bytes(64)
# The color that libjpeg also gives for missing coefficients.
_MID_GRAY = 128
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xCA)
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_APP0, _APP1, _APP14, _SOS, _END = 0xE0, 0xE1, 0xEE, 0xDA, 0xD9
# Segments that pixels depend on: tables (Huffman, quantization, arithmetic), restart interval. APP1 has the orientation.
_BETWEEN_SCANS = frozenset([_SOS, 0xC4, 0xDB, 0xCC, 0xDD, 0xFE, *range(0xE0, 0xF0)])
_KEPT = frozenset([0xC4, 0xDB, 0xCC, 0xDD, _APP1]) | _FRAMES


@dataclass(frozen=True)
class TidiedJpeg:
    """A JPEG file reduced to the segments that its pixels depend on.

    Attributes:
        data: The file.
        trimmed: The file without zero bytes behind its last scan. Some of them may belong to the scan, so try ``data`` first.
        ended: Whether the file had its end marker.
        complete: Whether the scans could be followed to the end marker, or without one have every coefficient of every
            component, according to their headers.
    """

    data: bytes
    trimmed: bytes
    ended: bool
    complete: bool


def decode(data: bytes, mode: str, size: tuple[int, int] | None = None, *, strict: bool = True) -> NDArray[np.uint8]:
    """Decode a file with libjpeg-turbo.

    Args:
        data: The file, beginning with its first marker.
        mode: Pillow's name of its mode: ``RGB`` or ``L`` give RGB, ``CMYK`` gives CMYK with 0 for no ink.
        size: Width and height to decode at: a half, a quarter or an eighth of the image's, rounded up; None: full scale.
            CMYK is always decoded at full scale.
        strict: Whether a warning is an error.

    Returns:
        uint8 of shape (height, width, 3), or (height, width, 4) for CMYK.

    Raises:
        ValueError: With the decoder's first complaint, or that zeros were found by :func:`find_zeroed_data`.
        MemoryError: If there is not enough memory.
    """
    colorspace = "CMYK" if mode == "CMYK" else "RGB"
    # Of the decoder's scales (eighths), the smallest that gives at least this size gives exactly this size.
    scale = {} if size is None or mode == "CMYK" else {"min_height": size[1], "min_width": size[0], "min_factor": 2}
    try:
        if strict:
            out: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace, strict=True, **scale)
            if (offset := find_zeroed_data(data)) is not None:
                raise ValueError(f"zeros from byte {offset:,} on, where no encoder writes any")
        else:
            # The decoder leaves rows untouched where it gives up; they must not show what was in this memory before.
            height, width = simplejpeg.decode_jpeg_header(data, strict=False, **scale)[:2]
            buffer = np.full(height * width * len(colorspace), _MID_GRAY, np.uint8)
            out = simplejpeg.decode_jpeg(data, colorspace, strict=False, buffer=buffer, **scale)
            if (out == _MID_GRAY).all():
                raise ValueError("nothing of it can be decoded")
    except ValueError as exc:
        if "memory" in str(exc).lower():
            raise MemoryError from None
        raise
    # Adobe's programs store CMYK inverted; all others follow them, as Pillow does.
    return np.subtract(255, out, out=out) if mode == "CMYK" else out


def is_undamaged(data: bytes) -> bool:
    """Return whether a file has no damage. It is decoded at an eighth of its size, which is the cheapest."""
    if find_zeroed_data(data) is not None:
        return False
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=2, strict=True)
    except (ValueError, MemoryError):
        return False
    return True


def find_zeroed_data(data: bytes) -> int | None:
    """Return the offset of zeros in a scan that no encoder wrote, such as a lost sector of a disk; None if there are none.

    Zeros decode without a complaint. Their meaning depends on the Huffman tables: an end of block, of which flat images have
    many; or, with the tables of most files, the same small coefficient 63 times in a row, again and again, which no picture
    has. Only the latter is reported.
    """
    # The cheap check first: a run of 64 zero bytes contains eight aligned ones.
    if np.frombuffer(data, np.uint64, len(data) // 8).all() or data.find(_ZEROS) < 0:
        return None
    # The symbol of the code that is all zeros, by class (0 DC, 1 AC) and number of the table.
    symbols: dict[int, int] = {}
    pattern, position, suspicious = _MARKER, 2, False
    while marker := pattern.search(data, position):
        code, start = marker[1][0], marker.end()
        if suspicious and (offset := data.find(_ZEROS, position, marker.start())) >= 0:
            return offset
        if code in _STANDALONE:
            position = start
            continue
        length = int.from_bytes(data[start : start + 2], "big")
        end = start + length
        if code == _END or length < 2 or end > len(data):
            return None
        if code == 0xC4:
            table = start + 2
            while table + 17 < end:
                symbols[data[table]] = data[table + 17]
                table += 17 + sum(data[table + 1 : table + 17])
        elif code == _SOS:
            pattern, count = _MARKER_IN_SCAN, data[start + 2]
            tables = [data[start + 4 + 2 * n] & 15 for n in range(count) if start + 4 + 2 * n < end]
            # Only the first scans of AC coefficients, not those that refine them by single bits.
            first = data[end - 2] > 0 and data[end - 1] >> 4 == 0
            suspicious = first and any(symbols.get(0x10 | number, 0) & 15 for number in tables)
        position = end
    return None


def is_about_damage(complaint: str) -> bool:
    """Return whether a complaint of the decoder is about damage, and not about a variant of JPEG that it does not support."""
    return not complaint.startswith(("tj", "Unsupported JPEG", "Unsupported color"))


def tidy(data: bytes) -> TidiedJpeg | None:
    """Write a file again without flaws that do not affect its pixels.

    Bytes between segments, comments, and application data other than the orientation are left out. An unknown version of JFIF or
    an unknown transform of Adobe's is replaced by the one that decoders assume. A missing end marker is added. Scans are not
    changed, except that ``trimmed`` lacks the zero bytes that pad the last one.

    Args:
        data: Beginning with 0xFF 0xD8.

    Returns:
        None if there is no scan, or the header cannot be followed.
    """
    parts, components, adobe = [_SOI], 0, -1
    frame, position = 0, 2
    while marker := _MARKER.search(data, position):
        code, start = marker[1][0], marker.end()
        if code in _STANDALONE:
            position = start
            continue
        length = int.from_bytes(data[start : start + 2], "big")
        if code in (0xD8, _END) or length < 2 or start + length > len(data):
            return None
        if code == _SOS:
            break
        body, position = data[start + 2 : start + length], start + length
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
    ended, end, complete = _follow_scans(data, marker.start(), components, frame in _PROGRESSIVE)
    scans = data[marker.start() : end]
    padded = scans.rstrip(b"\0")
    # An 0xFF in the data is written as 0xFF 0x00; alone it is half of a truncated marker.
    trimmed = padded + b"\0" if padded.endswith(b"\xff") and len(padded) < len(scans) else padded.rstrip(b"\xff")
    head = b"".join(parts)
    return TidiedJpeg(head + scans + _EOI, head + trimmed + _EOI, ended, complete)


def _segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + (len(body) + 2).to_bytes(2, "big") + body


def _follow_scans(data: bytes, position: int, components: int, progressive: bool) -> tuple[bool, int, bool]:
    """Follow the scans; return whether there is an end marker, where they end, and whether they are complete."""
    # For each component and coefficient, the number of low bits that are still to come.
    missing: dict[int, list[int]] = {}
    # The first marker is that of a scan.
    while marker := _MARKER_IN_SCAN.search(data, position):
        code, start = marker[1][0], marker.end()
        if code == _END:
            return True, marker.start(), True
        if code in _STANDALONE:
            position = start
            continue
        length = int.from_bytes(data[start : start + 2], "big")
        position = start + length
        if length < 2 or position > len(data) or code not in _BETWEEN_SCANS:
            # Damage that looks like a marker, which ends decoding; or the file ends within a segment.
            return _EOI in data[-1024:], marker.start(), False
        count = data[start + 2]
        if code == _SOS and length == 6 + 2 * count:
            first, last, bits = data[position - 3], data[position - 2], data[position - 1] & 15
            if not progressive:
                first, last, bits = 0, 63, 0
            for index in range(count):
                coefficients = missing.setdefault(data[start + 3 + 2 * index], [15] * 64)
                coefficients[first : last + 1] = [bits] * (min(last, 63) + 1 - first)
    return False, len(data), _is_complete(missing, components)


def _is_complete(missing: dict[int, list[int]], components: int) -> bool:
    return len(missing) == components and not any(any(coefficients) for coefficients in missing.values())
