"""From a file's bytes to an RGB image, or to the reason why there is none.

No torch: decoding runs in many small CPU processes, none of which needs a network. Importing torch costs each of them
2.2 s of CPU time and 500 MB, and its JPEG decoder is not faster than that of ``simplejpeg`` (the same libjpeg-turbo).
"""

from __future__ import annotations

import io
import logging
import re
import struct
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from batch_inference import jpeg_files, png_files
from batch_inference.config import PreprocessConfig
from batch_inference.errors import RowFailure

# Named, so that Pillow tries no other plugin: some of them start programs (EPS), all of them widen what hostile files
# can reach. JPEG includes MPO, what cameras make that store several pictures in a file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_SOI = b"\xff\xd8"
_SIGNATURES = (
    (_SOI, "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)
# Beginnings that are not found by chance, which are looked for behind a few stray bytes: line ends, a byte order mark, a length.
_STRONG_SIGNATURES = (b"\xff\xd8\xff", png_files.SIGNATURE, b"GIF87a", b"GIF89a")
_MOST_STRAY_BYTES = 16
# Where the message looks for a JPEG in a file of an unknown kind.
_JPEG_WITHIN = 64 * 1024
_NARROW = 16
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TURNED_ARRAYS: dict[int, Any] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}

# What Pillow says of variants that it does not decode.
_UNSUPPORTED = ("unknown pixel mode", "unsupported", "not supported", "unknown data organization", "cannot handle")
_FOR_IPHONES = (
    "PNG: it is written for iPhones (chunk CgBI), which no other decoder shows; convert it: "
    "xcrun -sdk iphoneos pngcrush -revert-iphone-optimizations IN OUT"
)

# Pillow's own limit is a warning first and an exception at twice the size; ours is one number, checked below.
Image.MAX_IMAGE_PIXELS = None
# What is wrong with an image goes into its row; a line on the console for each of a million would hide what matters.
# Filters of the module and not `catch_warnings`, which is not safe where several threads decode.
warnings.filterwarnings("ignore", module=r"PIL\..*")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Decoded:
    """An image that may have been made smaller while it was decoded.

    Attributes:
        pixels: RGB, 8 bit: a Pillow image, or an array of shape (height, width, 3) with any strides.
        size: Width and height of the whole image, in pixels.
        factor: How many of the image's pixels make one of these, in each direction: 1, 2, 4 or 8.
        damaged: What is wrong with the file, where only ``preprocess.damaged: accept`` lets it pass; None for whole images.
    """

    pixels: Image.Image | NDArray[np.uint8]
    size: tuple[int, int]
    factor: int
    damaged: str | None = None


def open_image(data: bytes, config: PreprocessConfig) -> Image.Image:
    """Decodes an encoded image.

    Of several frames the first one is taken. Transparency is composited on white, 16 bit gray is scaled to 8 bit, other
    color spaces are converted; embedded color profiles are not applied.

    Args:
        data: The file's content.
        config: ``max_pixels``, ``exif_orientation`` and ``damaged`` are used. (The orientation of TIFF is part of its pixel
            layout and is always applied.)

    Returns:
        An image of mode ``RGB``, 8 bit a channel, in memory.

    Raises:
        RowFailure: Stage ``decode`` and one of EMPTY_FILE, UNKNOWN_FORMAT, TRUNCATED, CORRUPT, TOO_MANY_PIXELS,
            UNSUPPORTED_MODE, DECODE_MEMORY. Nothing else is raised, whatever the bytes.
    """
    pixels = open_scaled(data, config, None).pixels
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))


def open_scaled(data: bytes, config: PreprocessConfig, least: int | None) -> Decoded:
    """Decode an encoded image, smaller where the format can, and tell what is wrong with it.

    Pixels are those of :func:`open_image`, but for JPEG with sides of at least ``2 * least``: those are decoded at a half,
    a quarter or an eighth of their size (scaled inverse DCT), which skips most of the work.

    Args:
        data: The file's content.
        config: As for :func:`open_image`.
        least: No side becomes shorter than this, in pixels, unless it is; None: decode at the image's own size.

    Raises:
        RowFailure: What :func:`open_image` raises, for the same bytes.
    """
    if not data:
        raise RowFailure("decode", "EMPTY_FILE", "the file has zero bytes")
    if not data.startswith(_SOI) and _signature(data) is None:
        data = _without_stray_bytes(data)
    try:
        return _decode(data, config, least)
    except RowFailure:
        raise
    except MemoryError:
        raise RowFailure("decode", "DECODE_MEMORY", "not enough memory to decode the image") from None
    except Exception as exc:
        raise _explain(data, exc) from exc


def is_plain_jpeg(data: bytes, config: PreprocessConfig) -> bool:
    """Whether a file is a whole JPEG that any decoder shows alike: gray or RGB, upright, of a size within ``max_pixels``.

    Whole is what libjpeg-turbo has nothing to complain of, which takes half of the time of decoding it here: nvJPEG decodes
    damaged files without a word.
    """
    if not data.startswith(_SOI):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            upright = not config.exif_orientation or _orientation(image) == 1
            # A narrow strip would be resized to an enormous one, of which the center is cut out.
            narrow = max(image.size) > _NARROW * min(image.size)
            few = image.width * image.height <= config.max_pixels
            plain = image.mode in ("RGB", "L") and upright and few and not narrow
        return plain and jpeg_files.is_whole(data)
    except Exception:
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to ``RGB``, on white where it is transparent.

    Raises:
        RowFailure: UNSUPPORTED_MODE for pixels without a defined range: 32 bit integers and floats.
    """
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bit(image)
    if image.mode in ("I", "F"):
        kind = "32 bit integers" if image.mode == "I" else "32 bit floats"
        raise RowFailure("decode", "UNSUPPORTED_MODE", f"pixels are {kind}, which have no defined black and white")
    if image.has_transparency_data:
        return _on_white(image)
    # Conversion copies whatever is there already; a plain RGB image needs none.
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode(data: bytes, config: PreprocessConfig, least: int | None) -> Decoded:
    if data.startswith(_SOI):
        return _jpeg(data, config, least)
    if data.startswith(png_files.SIGNATURE):
        return _png(data, config)
    return _by_pillow(data, config)


def _by_pillow(data: bytes, config: PreprocessConfig) -> Decoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.size, config)
        image.load()
        # After load: PNG may have its EXIF behind the pixels, and TIFF has turned itself and dropped the tag by now.
        turn = _TURNS.get(_orientation(image)) if config.exif_orientation else None
        rgb = to_rgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
        # A plain Image and not the file's subclass, which would hold on to the encoded bytes.
        return Decoded(rgb if type(rgb) is Image.Image else rgb.copy(), rgb.size, 1)


def _check_size(size: tuple[int, int], config: PreprocessConfig) -> None:
    width, height = size
    if width * height > config.max_pixels:
        raise RowFailure(
            "decode",
            "TOO_MANY_PIXELS",
            f"{width} x {height} is {width * height:,} pixels, more than max_pixels = {config.max_pixels:,}",
        )


def _jpeg(data: bytes, config: PreprocessConfig, least: int | None) -> Decoded:
    tidied: jpeg_files.Tidied | None = None
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except Exception:
        # Pillow does not open what has bytes between the first markers.
        tidied = jpeg_files.tidied(data)
        if tidied is None:
            raise
        image = Image.open(io.BytesIO(tidied.data), formats=("JPEG",))
    with image:
        _check_size(image.size, config)
        try:
            return _jpeg_pixels(data, image, config, least)
        except ValueError as exc:
            complaint = str(exc)
        tidied = tidied or jpeg_files.tidied(data)
        if tidied is None:
            return _by_pillow(data, config)
        if tidied.complete:
            for candidate in dict.fromkeys((tidied.data, tidied.trimmed)):
                try:
                    return _jpeg_pixels(candidate, image, config, least)
                except ValueError as exc:
                    complaint = str(exc)
            if not jpeg_files.is_about_data(complaint):
                # A kind that only Pillow decodes, such as one of unusual subsampling. It does not tell of damage.
                return _by_pillow(tidied.data if tidied.ended else data, config)
        if not tidied.ended:
            failure = RowFailure(
                "decode", "TRUNCATED", f"the JPEG file ends early, at {len(data):,} bytes ({_lower(complaint)})"
            )
        else:
            failure = RowFailure("decode", "CORRUPT", f"the JPEG file is damaged: {_lower(complaint)}")
        if config.damaged == "error":
            raise failure
        try:
            # At its own size, whatever the way: how much can be decoded differs with the scale.
            return replace(_jpeg_pixels(tidied.data, image, config, None, strict=False), damaged=failure.error.message)
        except ValueError:
            raise failure from None


def _lower(complaint: str) -> str:
    """Make a complaint of libjpeg a part of a sentence."""
    text = complaint.removeprefix("Corrupt JPEG data: ").removeprefix("Warning: ")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _jpeg_pixels(
    data: bytes, image: Image.Image, config: PreprocessConfig, least: int | None, *, strict: bool = True
) -> Decoded:
    """Decode a JPEG of the size, mode and orientation of ``image``; raise ValueError with what the decoder complains of."""
    width, height = image.size
    factor = 1
    if least is not None and image.mode != "CMYK":
        factor = max((f for f in (2, 4, 8) if min(-(-height // f), -(-width // f)) >= least), default=1)
    size = (-(-width // factor), -(-height // factor))
    pixels = jpeg_files.pixels(data, image.mode, None if factor == 1 else size, strict=strict)
    if pixels.shape[:2] != size[::-1]:
        raise ValueError("its headers say different sizes")
    if image.mode == "CMYK":
        ink = Image.frombuffer("CMYK", image.size, pixels, "raw", "CMYK", 0, 1)
        pixels = np.asarray(ink.convert("RGB"))
    orientation = _orientation(image) if config.exif_orientation else 1
    if orientation in _TURNED_ARRAYS:
        pixels = _TURNED_ARRAYS[orientation](pixels)
        if orientation >= 5:
            width, height = height, width
    return Decoded(pixels, (width, height), factor)


def _png(data: bytes, config: PreprocessConfig) -> Decoded:
    found = png_files.chunks(data, orientation=config.exif_orientation)
    if found.for_iphones:
        raise RowFailure("decode", "UNSUPPORTED_MODE", _FOR_IPHONES)
    if found.header is not None:
        _check_size(found.header[:2], config)
    complaint = found.complaint
    if complaint is None:
        try:
            decoded = _by_pillow(found.file(), config)
        except (RowFailure, MemoryError):
            raise
        except Exception as exc:
            failure = _explain(data, exc)
        else:
            # Unpacking a second time costs about a third of decoding, so only where rows may be missing.
            if not _has_plain_edge(decoded.pixels) or not found.rows_missing():
                return decoded
            failure = RowFailure(
                "decode", "CORRUPT", "the PNG file is damaged: its pixel data ends before the last row"
            )
    elif found.cut:
        failure = RowFailure("decode", "TRUNCATED", f"the PNG file ends early, at {len(data):,} bytes ({complaint})")
    else:
        failure = RowFailure("decode", "CORRUPT", f"the PNG file is damaged: {complaint}")
    patched = found.patched() if config.damaged == "accept" else None
    if patched is None or failure.error.error_type not in ("TRUNCATED", "CORRUPT"):
        raise failure
    try:
        return replace(_by_pillow(patched.file(), config), damaged=failure.error.message)
    except (RowFailure, MemoryError):
        raise
    except Exception:
        raise failure from None


def _has_plain_edge(pixels: Image.Image | NDArray[np.uint8]) -> bool:
    """Whether an edge has one color, as rows that Pillow left as they were: of two lines each, since PNG may interlace them."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    width, height = image.size
    rows = [(0, y, width, y + 1) for y in {0, min(1, height - 1), max(0, height - 2), height - 1}]
    columns = [(x, 0, x + 1, height) for x in {0, min(1, width - 1), max(0, width - 2), width - 1}]
    lines = (np.asarray(image.crop(line)) for line in rows + columns)
    return any(bool((line == line[0, 0]).all()) for line in lines)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where EXIF is missing or broken, which is no reason to lose the image."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
        return int(value) if isinstance(value, int) else 1
    except MemoryError:
        raise
    except Exception:
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        # The transparent color of a PNG with 16 bit a channel, of which Pillow keeps the upper 8 bits.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return white


def _from_sixteen_bit(image: Image.Image) -> Image.Image:
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    full = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    gray = ((values * 255 + full // 2) // full).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow honors for 8 bit only
        gray = 255 - gray
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _explain(data: bytes, exc: Exception) -> RowFailure:
    """Sort Pillow's exceptions, whose types say little, by what the bytes look like."""
    kind = _signature(data)
    if kind is None or (kind == "TIFF" and _known_as(data) is not None):
        return RowFailure("decode", "UNKNOWN_FORMAT", f"not an image of a known format: {describe(data)}")
    if isinstance(exc, UnidentifiedImageError):
        exc = _reason(data, kind) or exc
    text = " ".join(str(exc).split()) or type(exc).__name__
    low = text.lower()
    if isinstance(exc, MemoryError):
        return RowFailure("decode", "DECODE_MEMORY", "not enough memory to decode the image")
    if any(word in low for word in _UNSUPPORTED):
        return RowFailure("decode", "UNSUPPORTED_MODE", f"{kind}: {text}")
    if isinstance(exc, (EOFError, struct.error)) or "truncated" in low or _ends_early(data, kind):
        return RowFailure("decode", "TRUNCATED", f"the {kind} file ends early, at {len(data):,} bytes ({text})")
    return RowFailure("decode", "CORRUPT", f"the {kind} file is damaged: {text}")


def _signature(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for magic, kind in _SIGNATURES if data.startswith(magic)), None)


def _without_stray_bytes(data: bytes) -> bytes:
    """Leave out a few stray bytes before an image's first ones."""
    head = data[: _MOST_STRAY_BYTES + 16]
    places = [head.find(magic) for magic in _STRONG_SIGNATURES]
    webp = head.find(b"RIFF")
    if webp >= 0 and data[webp + 8 : webp + 12] == b"WEBP":
        places.append(webp)
    first = min((place for place in places if 0 <= place <= _MOST_STRAY_BYTES), default=0)
    return data[first:]


def _reason(data: bytes, kind: str) -> Exception | None:
    """Why the format's own plugin does not open the file; ``Image.open`` keeps that to itself."""
    try:
        Image.OPEN[kind][0](io.BytesIO(data), "").close()
    except Exception as exc:
        return exc
    return None


def _ends_early(data: bytes, kind: str) -> bool:
    """Whether the file lacks its end, as far as the format shows it."""
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-1024:]
    if kind == "PNG":
        return b"IEND" not in data[-1024:]
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "GIF":
        return b";" not in data[-16:]
    if kind == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    return False


# Other formats, by bytes at an offset: what they are called, and a command that makes an image of one.
_MAGICK = "magick IN OUT.png"
_RAW = "dcraw_emu -T IN, or exiftool -b -PreviewImage IN for the picture that the camera put in"
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
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
# Brands of ISO's container, in which both pictures and videos come.
_BRANDS = {
    b"avif": ("an AVIF image", "avifdec IN OUT.png"),
    b"avis": ("a sequence of AVIF images", "avifdec IN OUT.png"),
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
        ("a HEIC image", "heif-convert IN OUT.png"),
    ),
}


def _known_as(data: bytes) -> tuple[str, str] | None:
    """Return what a file of a format that is not read here is called, and a command that converts it."""
    for at, magic, name, command in _OTHERS:
        if data.startswith(magic, at):
            return name, command
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], ("a video (MP4, MOV)", "ffmpeg -i IN OUT-%05d.jpg"))
    if re.match(rb"P[1-7Ff]\s", data[:3]):
        return "a Netpbm image (PBM, PGM, PPM, PFM)", _MAGICK
    return None


def describe(data: bytes) -> str:
    """Return what the first bytes of a file look like, in printable characters, and what to do about it."""
    known = _known_as(data)
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
    if (place := _jpeg_inside(data)) is not None:
        return (
            f"it starts with {start}, and a JPEG image follows at byte {place:,}; leave out what is before it: "
            f"tail -c +{place + 1} IN > OUT.jpg"
        )
    if not data[:512].strip(b"\x00"):
        return f"it starts with {min(len(data), 512)} zero bytes"
    try:
        # A multi-byte character may be cut at the end of the sample.
        data[:512].decode("utf-8", errors="strict" if len(data) <= 512 else "ignore").encode("utf-8")
        if b"\x00" not in data[:512] and _mostly_printable(data[:512]):
            return f"it looks like text, starting with {start}"
    except UnicodeDecodeError:
        pass
    return f"it starts with {start}"


def _jpeg_inside(data: bytes) -> int | None:
    """Return where in a file a JPEG begins that can be opened."""
    place = data.find(b"\xff\xd8\xff", 0, _JPEG_WITHIN)
    if place < 0:
        return None
    try:
        Image.open(io.BytesIO(data[place:]), formats=("JPEG",)).close()
    except Exception:
        return None
    return place


def _mostly_printable(sample: bytes) -> bool:
    return sum(byte >= 32 or byte in (9, 10, 13) for byte in sample) >= 0.95 * len(sample)
