"""Decode the bytes of a file to an RGB image, or tell why there is none.

This module does not import torch: decoding runs in many small CPU processes, none of which needs a network. The import would cost
each of them 2.2 s of CPU time and 500 MB, and its JPEG decoder is not faster than that of ``simplejpeg`` (the same libjpeg-turbo).
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from batch_inference.config import PreprocessConfig
from batch_inference.errors import RowError
from batch_inference.images import jpeg, png
from batch_inference.inputs.signatures import describe_content, identify

# The only plugins that Pillow may try: some others start programs (EPS), and each widens what hostile files can reach. JPEG includes
# MPO, the format of cameras that store several pictures in a file.
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
# Signatures long enough not to occur by chance. They are also searched for behind a few stray bytes: line ends, a byte order mark,
# a length.
_STRONG_SIGNATURES = (b"\xff\xd8\xff", png.SIGNATURE, b"GIF87a", b"GIF89a")
_MAX_STRAY_BYTES = 16
_MAX_ASPECT_RATIO = 16
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
_ARRAY_TURNS: dict[int, Any] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
# Words in Pillow's messages about variants that it does not decode.
_UNSUPPORTED = ("unknown pixel mode", "unsupported", "not supported", "unknown data organization", "cannot handle")
_IPHONE_PNG = (
    "PNG: it is written for iPhones (chunk CgBI), which no other decoder shows; convert it: "
    "xcrun -sdk iphoneos pngcrush -revert-iphone-optimizations IN OUT"
)

# Pillow's own limit is a warning first and an exception at twice the size; `max_pixels` is one number, checked below.
Image.MAX_IMAGE_PIXELS = None
# Problems of an image go into its row; a line on the console for each of a million images would hide what matters.
# Module filters rather than `catch_warnings`, which is not safe if several threads decode.
warnings.filterwarnings("ignore", module=r"PIL\..*")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Decoded:
    """An image, possibly decoded at a reduced scale.

    Attributes:
        pixels: RGB, 8 bit: a Pillow image, or an array of shape (height, width, 3) with any strides.
        size: Width and height of the image at full scale, in pixels.
        factor: Reduction in each direction: 1, 2, 4 or 8.
        damaged: The damage that only ``preprocess.damaged: accept`` lets pass; None for undamaged images.
    """

    pixels: Image.Image | NDArray[np.uint8]
    size: tuple[int, int]
    factor: int
    damaged: str | None = None


def open_image(data: bytes, config: PreprocessConfig) -> Image.Image:
    """Decode an encoded image at full scale.

    The first of several frames is used. Transparency is composited on white, 16 bit gray is scaled to 8 bit, other
    color spaces are converted; embedded color profiles are not applied.

    Args:
        data: The file's content.
        config: ``max_pixels``, ``exif_orientation`` and ``damaged`` are used. (The orientation of a TIFF is part of its pixel
            layout and is always applied.)

    Returns:
        An image of mode ``RGB``, 8 bit a channel, in memory.

    Raises:
        RowError: Stage ``decode`` and one of EMPTY_FILE, UNKNOWN_FORMAT, TRUNCATED, CORRUPT, TOO_MANY_PIXELS,
            UNSUPPORTED_MODE, DECODE_MEMORY. Nothing else is raised, whatever the bytes.
    """
    pixels = open_scaled(data, config, None).pixels
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))


def open_scaled(data: bytes, config: PreprocessConfig, min_side: int | None) -> Decoded:
    """Decode an encoded image, at a reduced scale if the format can, and report damage.

    Pixels are those of :func:`open_image`, except for JPEGs with sides of at least ``2 * min_side``: those are decoded at a half,
    a quarter or an eighth of their size (scaled inverse DCT), which skips most of the work.

    Args:
        data: The file's content.
        config: As for :func:`open_image`.
        min_side: Scaling makes no side shorter than this, in pixels; None: decode at full scale.

    Raises:
        RowError: As :func:`open_image` for the same bytes.
    """
    if not data:
        raise RowError("decode", "EMPTY_FILE", "the file has zero bytes")
    if not data.startswith(_SOI) and _signature(data) is None:
        data = _without_stray_bytes(data)
    try:
        return _decode(data, config, min_side)
    except RowError:
        raise
    except MemoryError:
        raise RowError("decode", "DECODE_MEMORY", "not enough memory to decode the image") from None
    except Exception as exc:
        raise _explain(data, exc) from exc


def is_plain_jpeg(data: bytes, config: PreprocessConfig) -> bool:
    """Return whether a file is an undamaged JPEG that any decoder shows alike: gray or RGB, upright, within ``max_pixels``.

    nvJPEG decodes damaged files without a word, so libjpeg-turbo checks them first. This takes half the time of decoding on the CPU.
    """
    if not data.startswith(_SOI):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            upright = not config.exif_orientation or _orientation(image) == 1
            # A narrow strip would be resized to an enormous one before its center is cut out.
            narrow = max(image.size) > _MAX_ASPECT_RATIO * min(image.size)
            within_limit = image.width * image.height <= config.max_pixels
            plain = image.mode in ("RGB", "L") and upright and within_limit and not narrow
        return plain and jpeg.is_undamaged(data)
    except Exception:
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to ``RGB``, on white where it is transparent.

    Raises:
        RowError: UNSUPPORTED_MODE for pixels without a defined range: 32 bit integers and floats.
    """
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bit(image)
    if image.mode in ("I", "F"):
        number_type = "32 bit integers" if image.mode == "I" else "32 bit floats"
        raise RowError("decode", "UNSUPPORTED_MODE", f"pixels are {number_type}, which have no defined black and white")
    if image.has_transparency_data:
        return _on_white(image)
    # Conversion always copies; a plain RGB image needs none.
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode(data: bytes, config: PreprocessConfig, min_side: int | None) -> Decoded:
    if data.startswith(_SOI):
        return _decode_jpeg(data, config, min_side)
    if data.startswith(png.SIGNATURE):
        return _decode_png(data, config)
    return _decode_with_pillow(data, config)


def _decode_with_pillow(data: bytes, config: PreprocessConfig) -> Decoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.size, config)
        image.load()
        # After load: a PNG may have its EXIF behind the pixels, and a TIFF has been turned and its tag dropped by now.
        turn = _TURNS.get(_orientation(image)) if config.exif_orientation else None
        rgb = to_rgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
        # A plain Image and not the file's subclass, which would hold on to the encoded bytes.
        return Decoded(rgb if type(rgb) is Image.Image else rgb.copy(), rgb.size, 1)


def _check_size(size: tuple[int, int], config: PreprocessConfig) -> None:
    width, height = size
    if width * height > config.max_pixels:
        raise RowError(
            "decode",
            "TOO_MANY_PIXELS",
            f"{width} x {height} is {width * height:,} pixels, more than max_pixels = {config.max_pixels:,}",
        )


def _decode_jpeg(data: bytes, config: PreprocessConfig, min_side: int | None) -> Decoded:
    tidied: jpeg.TidiedJpeg | None = None
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except Exception:
        # Pillow does not open files with bytes between the first markers.
        tidied = jpeg.tidy(data)
        if tidied is None:
            raise
        image = Image.open(io.BytesIO(tidied.data), formats=("JPEG",))
    with image:
        _check_size(image.size, config)
        try:
            return _decode_with_turbo(data, image, config, min_side)
        except ValueError as exc:
            complaint = str(exc)
        tidied = tidied or jpeg.tidy(data)
        if tidied is None:
            return _decode_with_pillow(data, config)
        if tidied.complete:
            for candidate in dict.fromkeys((tidied.data, tidied.trimmed)):
                try:
                    return _decode_with_turbo(candidate, image, config, min_side)
                except ValueError as exc:
                    complaint = str(exc)
            if not jpeg.is_about_damage(complaint):
                # A JPEG that only Pillow decodes, such as one of unusual subsampling. Pillow does not report damage.
                return _decode_with_pillow(tidied.data if tidied.ended else data, config)
        if not tidied.ended:
            failure = RowError(
                "decode", "TRUNCATED", f"the JPEG file ends early, at {len(data):,} bytes ({_as_clause(complaint)})"
            )
        else:
            failure = RowError("decode", "CORRUPT", f"the JPEG file is damaged: {_as_clause(complaint)}")
        if config.damaged == "error":
            raise failure
        try:
            # Always at full scale: how much can be decoded differs with the scale.
            return replace(
                _decode_with_turbo(tidied.data, image, config, None, strict=False), damaged=failure.error.message
            )
        except ValueError:
            raise failure from None


def _as_clause(complaint: str) -> str:
    """Turn a complaint of libjpeg into a part of a sentence."""
    text = complaint.removeprefix("Corrupt JPEG data: ").removeprefix("Warning: ")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _decode_with_turbo(
    data: bytes, image: Image.Image, config: PreprocessConfig, min_side: int | None, *, strict: bool = True
) -> Decoded:
    """Decode a JPEG of the size, mode and orientation of ``image``; raise ValueError with the decoder's complaint."""
    width, height = image.size
    factor = 1
    if min_side is not None and image.mode != "CMYK":
        factor = max((f for f in (2, 4, 8) if min(-(-height // f), -(-width // f)) >= min_side), default=1)
    size = (-(-width // factor), -(-height // factor))
    pixels = jpeg.decode(data, image.mode, None if factor == 1 else size, strict=strict)
    if pixels.shape[:2] != size[::-1]:
        raise ValueError("its headers say different sizes")
    if image.mode == "CMYK":
        ink = Image.frombuffer("CMYK", image.size, pixels, "raw", "CMYK", 0, 1)
        pixels = np.asarray(ink.convert("RGB"))
    orientation = _orientation(image) if config.exif_orientation else 1
    if orientation in _ARRAY_TURNS:
        pixels = _ARRAY_TURNS[orientation](pixels)
        if orientation >= 5:
            width, height = height, width
    return Decoded(pixels, (width, height), factor)


def _decode_png(data: bytes, config: PreprocessConfig) -> Decoded:
    chunks = png.read_chunks(data, orientation=config.exif_orientation)
    if chunks.for_iphones:
        raise RowError("decode", "UNSUPPORTED_MODE", _IPHONE_PNG)
    if chunks.header is not None:
        _check_size(chunks.header[:2], config)
    complaint = chunks.complaint
    if complaint is None:
        try:
            decoded = _decode_with_pillow(chunks.file(), config)
        except (RowError, MemoryError):
            raise
        except Exception as exc:
            failure = _explain(data, exc)
        else:
            # Unpacking a second time costs about a third of decoding, so this is done only if rows may be missing.
            if not _has_plain_edge(decoded.pixels) or not chunks.lacks_rows():
                return decoded
            failure = RowError("decode", "CORRUPT", "the PNG file is damaged: its pixel data ends before the last row")
    elif chunks.truncated:
        failure = RowError("decode", "TRUNCATED", f"the PNG file ends early, at {len(data):,} bytes ({complaint})")
    else:
        failure = RowError("decode", "CORRUPT", f"the PNG file is damaged: {complaint}")
    patched = chunks.patched() if config.damaged == "accept" else None
    if patched is None or failure.error.error_type not in ("TRUNCATED", "CORRUPT"):
        raise failure
    try:
        return replace(_decode_with_pillow(patched.file(), config), damaged=failure.error.message)
    except (RowError, MemoryError):
        raise
    except Exception:
        raise failure from None


def _has_plain_edge(pixels: Image.Image | NDArray[np.uint8]) -> bool:
    """Return whether an edge has one color, as rows that Pillow did not fill: two lines of each edge, since PNG may interlace them."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    width, height = image.size
    rows = [(0, y, width, y + 1) for y in {0, min(1, height - 1), max(0, height - 2), height - 1}]
    columns = [(x, 0, x + 1, height) for x in {0, min(1, width - 1), max(0, width - 2), width - 1}]
    lines = (np.asarray(image.crop(line)) for line in rows + columns)
    return any(bool((line == line[0, 0]).all()) for line in lines)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if EXIF is missing or broken, which is no reason to lose the image."""
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
    maximum = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    gray = ((values * 255 + maximum // 2) // maximum).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow honors for 8 bit only
        gray = 255 - gray
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _explain(data: bytes, exc: Exception) -> RowError:
    """Classify Pillow's exceptions, whose types say little, by the bytes of the file."""
    file_format = _signature(data)
    if file_format is None or (file_format == "TIFF" and identify(data) is not None):
        return RowError("decode", "UNKNOWN_FORMAT", f"not an image of a known format: {describe_content(data)}")
    if isinstance(exc, UnidentifiedImageError):
        exc = _plugin_error(data, file_format) or exc
    text = " ".join(str(exc).split()) or type(exc).__name__
    low = text.lower()
    if isinstance(exc, MemoryError):
        return RowError("decode", "DECODE_MEMORY", "not enough memory to decode the image")
    if any(word in low for word in _UNSUPPORTED):
        return RowError("decode", "UNSUPPORTED_MODE", f"{file_format}: {text}")
    if isinstance(exc, (EOFError, struct.error)) or "truncated" in low or _ends_early(data, file_format):
        return RowError("decode", "TRUNCATED", f"the {file_format} file ends early, at {len(data):,} bytes ({text})")
    return RowError("decode", "CORRUPT", f"the {file_format} file is damaged: {text}")


def _signature(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _SIGNATURES if data.startswith(magic)), None)


def _without_stray_bytes(data: bytes) -> bytes:
    """Remove a few stray bytes before an image's signature."""
    head = data[: _MAX_STRAY_BYTES + 16]
    offsets = [head.find(magic) for magic in _STRONG_SIGNATURES]
    webp = head.find(b"RIFF")
    if webp >= 0 and data[webp + 8 : webp + 12] == b"WEBP":
        offsets.append(webp)
    first = min((offset for offset in offsets if 0 <= offset <= _MAX_STRAY_BYTES), default=0)
    return data[first:]


def _plugin_error(data: bytes, file_format: str) -> Exception | None:
    """Return the exception of the format's own plugin at opening the file; ``Image.open`` hides it."""
    try:
        Image.OPEN[file_format][0](io.BytesIO(data), "").close()
    except Exception as exc:
        return exc
    return None


def _ends_early(data: bytes, file_format: str) -> bool:
    """Return whether the file lacks its end, as far as the format shows it."""
    if file_format == "JPEG":
        return b"\xff\xd9" not in data[-1024:]
    if file_format == "PNG":
        return b"IEND" not in data[-1024:]
    if file_format == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if file_format == "GIF":
        return b";" not in data[-16:]
    if file_format == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    return False
