"""Tell the format of a file from its first bytes."""

from __future__ import annotations

import io
import re

from PIL import Image

from batch_inference.text import format_count

# First bytes of a file of unknown format that are searched for a JPEG.
_JPEG_SEARCH_BYTES = 64 * 1024

# Formats that are not read here: bytes at an offset, name, and a command that converts one.
_MAGICK = "magick IN OUT.png"
_RAW = "dcraw_emu -T IN, or exiftool -b -PreviewImage IN for the picture that the camera put in"
_OTHER_FORMATS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image", _MAGICK),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", _MAGICK),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image", "djxl IN OUT.png"),
    (0, b"\xff\x0a", "a JPEG XL image", "djxl IN OUT.png"),
    (0, b"8BPS", "a Photoshop document (PSD)", "magick 'IN[0]' OUT.png"),
    (128, b"DICM", "a DICOM image", "dcmj2pnm --write-png IN OUT.png"),
    (4, b"ftypcrx", "a raw image of a Canon camera (CR3)", _RAW),
    (8, b"CR\x02", "a raw image of a Canon camera (CR2)", _RAW),
    (0, b"FUJIFILMCCD-RAW", "a raw image of a Fujifilm camera (RAF)", _RAW),
    (0, b"IIU\x00", "a raw image of a Panasonic camera (RW2)", _RAW),
    (0, b"IIRO", "a raw image of an Olympus camera (ORF)", _RAW),
    (0, b"\x00\x00\x01\x00", "an icon (ICO)", _MAGICK),
    (0, b"v/1\x01", "an OpenEXR image", _MAGICK),
    (0, b"#?RADIANCE", "a Radiance HDR image", _MAGICK),
    (0, b"qoif", "a QOI image", _MAGICK),
    (0, b"DDS ", "a DirectDraw surface (DDS)", _MAGICK),
    (0, b"SIMPLE  =", "a FITS image", _MAGICK),
    (0, b"%!PS", "a PostScript document", "magick -density 150 IN OUT.png"),
    (0, b"\x93NUMPY", "an array of NumPy (.npy)", "PIL.Image.fromarray(numpy.load(IN)).save(OUT)"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska, WebM)", "ffmpeg -i IN OUT-%05d.jpg"),
    (0, b"version https://git-lfs", "a pointer of Git LFS instead of the file", "git lfs pull"),
)
# Brands of ISO's container format, which holds both pictures and videos.
_BRANDS = {
    b"avif": ("an AVIF image", "avifdec IN OUT.png"),
    b"avis": ("a sequence of AVIF images", "avifdec IN OUT.png"),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
        ("a HEIC image", "heif-convert IN OUT.png"),
    ),
}


def identify(data: bytes) -> tuple[str, str] | None:
    """Return name and converting command of a format that is not read here; None if the format is not known."""
    for offset, magic, name, command in _OTHER_FORMATS:
        if data.startswith(magic, offset):
            return name, command
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], ("a video (MP4, MOV)", "ffmpeg -i IN OUT-%05d.jpg"))
    if re.match(rb"P[1-7Ff]\s", data[:3]):
        return "a Netpbm image (PBM, PGM, PPM, PFM)", _MAGICK
    return None


def describe_content(data: bytes) -> str:
    """Return a description of a file's first bytes, in printable characters, and what to do about it."""
    known = identify(data)
    if known is not None:
        verb = "fetch" if "Git LFS" in known[0] else "convert"
        return f"it looks like {known[0]}, which is not read here; {verb} it: {known[1]}"
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    start = ascii(data[:24].decode("latin-1"))
    if head.startswith((b"<!doctype html", b"<html")):
        return f"it looks like an HTML page (an error page saved as an image?), starting with {start}"
    if head.startswith((b"<?xml", b"<svg", b"<error")):
        return f"it looks like XML or SVG, starting with {start}"
    if data.startswith(b"%PDF"):
        return f"it looks like a PDF document, starting with {start}"
    if data.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        return f"it looks like a compressed archive, starting with {start}"
    if (offset := _find_jpeg(data)) is not None:
        return (
            f"it starts with {start}, and a JPEG image follows at byte {offset:,}; leave out what is before it: "
            f"tail -c +{offset + 1} IN > OUT.jpg"
        )
    if not data[:512].strip(b"\x00"):
        return f"it starts with {format_count(min(len(data), 512), 'zero byte')}"
    try:
        # A multi-byte character may be cut at the end of the sample.
        data[:512].decode("utf-8", errors="strict" if len(data) <= 512 else "ignore").encode("utf-8")
        if b"\x00" not in data[:512] and _mostly_printable(data[:512]):
            return f"it looks like text, starting with {start}"
    except UnicodeDecodeError:
        pass
    return f"it starts with {start}"


def _find_jpeg(data: bytes) -> int | None:
    """Return the first byte of a JPEG that can be opened, None if there is none."""
    offset = data.find(b"\xff\xd8\xff", 0, _JPEG_SEARCH_BYTES)
    if offset < 0:
        return None
    try:
        Image.open(io.BytesIO(data[offset:]), formats=("JPEG",)).close()
    except Exception:
        return None
    return offset


def _mostly_printable(sample: bytes) -> bool:
    return sum(byte >= 32 or byte in (9, 10, 13) for byte in sample) >= 0.95 * len(sample)


def describe_mismatch(head: bytes, remedy: str) -> tuple[str, str]:
    """Return a description of a file that is not what its name says, and what to do about it."""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself", "Run: git lfs pull   and start a new job"
    return describe_content(head), remedy
