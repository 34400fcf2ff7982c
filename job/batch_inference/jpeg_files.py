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
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xCA)
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])
_APP0, _APP1, _APP14, _SOS, _END = 0xE0, 0xE1, 0xEE, 0xDA, 0xD9
# What a picture is made of: tables (Huffman, quantization, arithmetic), restart interval. APP1 has the orientation.
_KEPT = frozenset([0xC4, 0xDB, 0xCC, 0xDD, _APP1]) | _FRAMES


@dataclass(frozen=True)
class Tidied:
    """A JPEG file without what has no say in its pixels.

    Attributes:
        data: The file.
        ended: Whether it had its end marker.
        complete: Whether its scans bring every coefficient of every component, as far as their headers tell.
    """

    data: bytes
    ended: bool
    complete: bool


def pixels(data: bytes, mode: str, least: int | None = None, *, strict: bool = True) -> NDArray[np.uint8]:
    """Decode a file with libjpeg-turbo.

    Args:
        data: The file, beginning with its first marker.
        mode: Pillow's name of its mode: ``RGB`` or ``L`` give RGB, ``CMYK`` gives CMYK with 0 for no ink.
        least: Decode at a half, a quarter or an eighth of its size, where no side gets shorter than this; None: at its own.
            CMYK is always decoded at its own size.
        strict: Whether a warning is an error.

    Returns:
        uint8 of shape (height, width, 3), or (height, width, 4) for CMYK.

    Raises:
        ValueError: With the decoder's first complaint.
        MemoryError: If there is none left.
    """
    out: NDArray[np.uint8]
    try:
        if mode == "CMYK":
            # Adobe's programs store CMYK inverted, and everybody follows them, as Pillow does.
            out = simplejpeg.decode_jpeg(data, "CMYK", strict=strict)
            return np.subtract(255, out, out=out)
        if least is None:
            out = simplejpeg.decode_jpeg(data, "RGB", strict=strict)
        else:
            out = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least, min_factor=2, strict=strict)
    except ValueError as exc:
        if "memory" in str(exc).lower():
            raise MemoryError from None
        raise
    return out


def is_whole(data: bytes) -> bool:
    """Return whether the decoder has nothing to complain of; at an eighth of the size, which is the cheapest."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=2, strict=True)
    except (ValueError, MemoryError):
        return False
    return True


def is_about_data(complaint: str) -> bool:
    """Return whether a complaint of the decoder is about the file, and not that its interface lacks such a kind of JPEG."""
    return not complaint.startswith(("tj", "Unsupported"))


def tidied(data: bytes) -> Tidied | None:
    """Write a file again without the flaws that no pixel depends on.

    Left out are bytes between segments, comments and application data but for the orientation; an unknown version of JFIF
    or an unknown transform of Adobe's becomes the one that decoders take it for; zero bytes that pad the last scan are left
    out; a missing end marker is added. Scans are otherwise left as they are.

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
    scans = padded + b"\0" if padded.endswith(b"\xff") and len(padded) < len(scans) else padded.rstrip(b"\xff")
    return Tidied(b"".join([*parts, scans, _EOI]), ended, complete)


def _segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + (len(body) + 2).to_bytes(2, "big") + body


def _scans(data: bytes, at: int, components: int, progressive: bool) -> tuple[bool, int, bool]:
    """Follow the scans; return whether there is an end marker, where they end, and whether they bring everything."""
    # For each component the coefficients that are still to come, and to how many bits they are known.
    known: dict[int, list[int]] = {}
    # From the first marker, which is that of a scan.
    while found := _MARKER_IN_SCAN.search(data, at):
        code, start = found[1][0], found.end()
        if code == _END:
            return True, found.start(), _complete(known, components)
        if code in _ALONE:
            at = start
            continue
        length = int.from_bytes(data[start : start + 2], "big")
        at = start + length
        if length < 2 or at > len(data):
            return False, len(data), False
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
