"""Damaged files and files with harmless flaws: the table in job/README.md, row by row, and any mixture of them.

What can't be known is left out: bytes of a JPEG's scan or tables that are replaced by others which decode as well.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from batch_inference.config import JobConfig, PredictorConfig, PreprocessConfig, StorageConfig
from batch_inference.errors import RowError, UserError
from batch_inference.images import jpeg
from batch_inference.images.decode import is_plain_jpeg, open_image, open_scaled
from batch_inference.images.pixels import pixels_of
from batch_inference.images.transform import Transform
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.engine import Engine
from batch_inference.pipeline.factories import CLASSIFIER_SCHEMA, CustomFactory
from batch_inference.pipeline.fingerprint import check_columns, fingerprint_parts
from batch_inference.pipeline.prepare import Preparation
from batch_inference.pipeline.schemas import RESULT_SCHEMA, raise_if_fatal

ERROR = PreprocessConfig()
ACCEPT = PreprocessConfig(damaged="accept")
SMALL = Transform(resize=32, crop=28)


def picture(width: int = 96, height: int = 72) -> Image.Image:
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((width, height))
    fine = rng.integers(-4, 5, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def as_ycck(data: bytes) -> bytes:
    """Mark the numbers as YCCK: Adobe's marker tells CMYK from YCCK."""
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\2" + data[at + 1 :]


@cache
def jpegs() -> dict[str, bytes]:
    image = picture()
    return {
        "baseline": encode(image, quality=85),
        "exif": encode(image, quality=85, exif=turned()),
        "444": encode(image, quality=95, subsampling=0),
        "progressive": encode(image, quality=85, progressive=True),
        "restarts": encode(image, quality=85, restart_marker_blocks=3),
        "gray": encode(image.convert("L"), quality=85),
        "rgb": encode(image, quality=85, keep_rgb=True),
        "cmyk": encode(image.convert("CMYK"), quality=85),
        "ycck": as_ycck(encode(image.convert("CMYK"), quality=85)),
        "cmyk progressive": encode(image.convert("CMYK"), quality=85, progressive=True),
    }


def every(*names: str) -> Any:
    return pytest.mark.parametrize("name", names or list(jpegs()))


Verdict = tuple[str, str] | np.ndarray


def verdict(data: bytes, config: PreprocessConfig = ERROR) -> tuple[Verdict, str | None]:
    """Return the result of a file, which must not depend on the scale: error type and message or pixels, and its mark."""
    results: list[tuple[Verdict, str | None]] = []
    for open_it in (
        lambda: open_scaled(data, config, None),
        lambda: open_scaled(data, config, 10_000),
        lambda: open_scaled(data, config, 8),
    ):
        try:
            decoded = open_it()
            results.append((np.asarray(decoded.pixels), decoded.damaged))
        except RowError as exc:
            assert exc.error.stage == "decode"
            results.append(((exc.error.error_type, exc.error.message), None))
    whole, fast, scaled = results
    if isinstance(whole[0], tuple):
        assert whole == fast == scaled
    else:
        assert np.array_equal(whole[0], fast[0])
        assert not isinstance(scaled[0], tuple)
        assert whole[1] == fast[1] == scaled[1]
    return whole


def pixels(data: bytes, config: PreprocessConfig = ERROR) -> np.ndarray:
    result, mark = verdict(data, config)
    assert not isinstance(result, tuple), result
    assert mark is None
    return result


def error(data: bytes) -> str:
    result, _ = verdict(data)
    assert isinstance(result, tuple)
    return result[0]


def check_whole(data: bytes, original: bytes) -> None:
    for config in (ERROR, ACCEPT):
        assert np.array_equal(pixels(data, config), pixels(original))


def check_damaged(data: bytes, kind: str) -> np.ndarray:
    """Check that a file is an error of that type; with ``accept`` return its pixels, which are marked."""
    result, _ = verdict(data)
    assert isinstance(result, tuple) and result[0] == kind, "predicted" if isinstance(result, np.ndarray) else result
    accepted, mark = verdict(data, ACCEPT)
    assert not isinstance(accepted, tuple), accepted
    assert mark == result[1]
    for config in (ACCEPT, ACCEPT.model_copy(update={"decoder": "exact"})):
        for transform in (SMALL, None):
            assert pixels_of(data, config, transform).damaged == mark
    return accepted


def scan_of(data: bytes) -> tuple[int, int]:
    """Return the offsets where the data of the first scan begins and the last scan ends."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"), len(data) - 2


# --- JPEG: flaws that no pixel depends on


@every()
def test_pixels_of_whole_jpegs_are_pillows(name: str) -> None:
    with Image.open(io.BytesIO(jpegs()[name])) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(jpegs()[name]), np.rot90(expected, -1) if name == "exif" else expected)


@every()
def test_missing_end_marker_is_ignored(name: str) -> None:
    data = jpegs()[name]
    check_whole(data[:-2], data)
    check_whole(data[:-1], data)
    check_whole(data[:-2] + bytes(700), data)


@every("baseline", "exif", "cmyk", "progressive")
@pytest.mark.parametrize("stray", [b"\n", b"\r\n", b"\xef\xbb\xbf", bytes(3), b"\x00\x00\x12\x34", b"--\r\n", b"\xff"])
def test_stray_bytes_before_the_first_marker_are_ignored(name: str, stray: bytes) -> None:
    data = jpegs()[name]
    check_whole(stray + data, data)
    check_whole(stray + data[:-2], data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_stray_bytes_before_other_formats_are_ignored(kind: str) -> None:
    data = encode(picture(), kind)
    check_whole(b"\r\n" + data, data)


@every()
def test_bytes_behind_the_end_are_ignored(name: str) -> None:
    data = jpegs()[name]
    for rest in (b"\0", b"\xff\xd9", b"SEFT" * 3000, jpegs()["gray"]):
        check_whole(data + rest, data)


@every()
def test_bytes_between_the_segments_are_ignored(name: str) -> None:
    data = jpegs()[name]
    first = 4 + int.from_bytes(data[4:6], "big")
    for at in (2, first, data.index(b"\xff\xda")):
        check_whole(data[:at] + b"junk" + data[at:], data)
        check_whole(data[:at] + b"\xff" * 5 + data[at:], data)


@every("baseline", "progressive", "gray")
@pytest.mark.parametrize("version", [b"\0\0", b"\3\1", b"\xff\xff"])
def test_unknown_version_of_jfif_is_ignored(name: str, version: bytes) -> None:
    data = jpegs()[name]
    assert b"JFIF\0\1\1" in data
    check_whole(data.replace(b"JFIF\0\1\1", b"JFIF\0" + version), data)


@every("baseline", "progressive", "cmyk")
def test_padding_behind_the_last_scan(name: str) -> None:
    data = jpegs()[name]
    for padding in (bytes(1), bytes(500), b"\xff" * 500):
        check_whole(data[:-2] + padding + data[-2:], data)


def test_unknown_transform_of_adobe_is_the_one_that_decoders_assume() -> None:
    for name, like in (("cmyk", "ycck"), ("rgb", None)):
        data = bytearray(jpegs()[name])
        data[data.index(b"Adobe") + 11] = 9
        with Image.open(io.BytesIO(bytes(data))) as image:
            assert np.array_equal(pixels(bytes(data)), np.asarray(image.convert("RGB")))
        if like:
            assert np.array_equal(pixels(bytes(data)), pixels(jpegs()[like]))


def test_metadata_of_any_size_is_ignored() -> None:
    profile = np.random.default_rng(0).bytes(3 << 20)
    for kind in ("JPEG", "WEBP", "TIFF", "PNG"):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        plain = encode(picture(), kind, **options)
        check_whole(encode(picture(), kind, icc_profile=profile, **options), plain)
    comments = b"".join(b"\xff\xfe\xff\xff" + bytes(65533) for _ in range(50))
    data = jpegs()["baseline"]
    check_whole(data[:2] + comments + data[2:], data)
    check_whole(encode(picture(), "TIFF", tiffinfo={700: b"x" * (3 << 20)}), encode(picture(), "TIFF"))


# --- JPEG: damage


DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "noise": lambda data, at: data[:at] + np.random.default_rng(1).bytes(200) + data[at + 200 :],
    "zeros": lambda data, at: data[:at] + bytes(200) + data[at + 200 :],
    "ones": lambda data, at: data[:at] + b"\xff" * 200 + data[at + 200 :],
    "cut out": lambda data, at: data[:at] + data[at + 200 :],
    "another file's": lambda data, at: data[:at] + jpegs()["gray"][700:900] + data[at + 200 :],
}


@every()
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_the_middle(name: str, damage: str) -> None:
    data = jpegs()[name]
    begin, end = scan_of(data)
    for part in (0.4, 0.6):
        broken = DAMAGES[damage](data, begin + int((end - begin) * part))
        check_damaged(broken, "CORRUPT")
        assert not is_plain_jpeg(broken, ERROR)
        # A harmless flaw is what the decoder complains of first, and does not hide the damage.
        first = 4 + int.from_bytes(broken[4:6], "big")
        check_damaged(b"\n" + broken[:first] + b"junk" + broken[first:], "CORRUPT")


@every("baseline", "exif", "444", "restarts", "gray", "rgb", "cmyk", "ycck")
def test_lost_sector_is_found_anywhere(name: str) -> None:
    data = jpegs()[name]
    begin, end = scan_of(data)
    for at in range(begin, end - 200, 97):
        check_damaged(data[:at] + bytes(200) + data[at + 200 :], "CORRUPT")


@pytest.mark.parametrize("options", [{"optimize": True}, {"progressive": True}, {}, {"quality": 1, "optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_zeros_of_flat_images_are_not_damage(options: dict[str, Any], mode: str) -> None:
    flat = Image.new("RGB", (1200, 900), "white").convert(mode)
    half = flat.copy()
    half.paste(picture(300, 300).convert(mode), (400, 100))
    gray = Image.new("RGB", (1200, 900), (128, 128, 128)).convert(mode)
    for image in (flat, half, gray):
        data = encode(image, **options)
        with Image.open(io.BytesIO(data)) as opened:
            assert np.array_equal(pixels(data), np.asarray(opened.convert("RGB")))


@every()
def test_zeros_up_to_the_end_are_damage(name: str) -> None:
    data = jpegs()[name]
    begin, end = scan_of(data)
    half = begin + (end - begin) // 2
    check_damaged(data[:half] + bytes(end - half) + data[end:], "CORRUPT")
    check_damaged(data[:half] + bytes(len(data) - half), "TRUNCATED")


@every()
def test_file_that_ends_early_is_truncated(name: str) -> None:
    data = jpegs()[name]
    begin, end = scan_of(data)
    for part in (0.1, 0.5, 0.9):
        check_damaged(data[: begin + int((end - begin) * part)], "TRUNCATED")
    # A few bytes less than all.
    check_damaged(data[: end - 12], "TRUNCATED")


def test_rows_before_an_early_end_are_those_of_the_whole_file() -> None:
    for name in ("baseline", "gray", "cmyk", "restarts"):
        data = jpegs()[name]
        begin, end = scan_of(data)
        part = check_damaged(data[: begin + (end - begin) // 2], "TRUNCATED")
        assert np.array_equal(part[:16], pixels(data)[:16])
        assert not np.array_equal(part, pixels(data))


@every("progressive", "cmyk progressive")
def test_progressive_file_that_ends_between_two_scans_is_truncated(name: str) -> None:
    data = jpegs()[name]
    places = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    assert len(places) > 3
    for at in places[1:]:
        # The end of a scan, before the tables of the next one.
        ended = max(data.rfind(b"\xff\xc4", 0, at), data.rfind(b"\xff\xda", 0, at) + 14)
        check_damaged(data[:ended], "TRUNCATED")


def test_image_without_a_scan_is_never_accepted() -> None:
    data = jpegs()["baseline"]
    for cut in (20, data.index(b"\xff\xda"), data.index(b"\xff\xda") + 5):
        for config in (ERROR, ACCEPT):
            found, _ = verdict(data[:cut], config)
            assert isinstance(found, tuple) and found[0] == "TRUNCATED"


def test_stray_bytes_do_not_hide_damage() -> None:
    data = jpegs()["baseline"]
    assert error(b"\n" + data[:100]) == "TRUNCATED"
    assert error(b"\n" + data[:-300]) == "TRUNCATED"
    gif = encode(picture().quantize(64), "GIF")
    assert error(b"\r\n" + gif[: len(gif) // 2]) == "TRUNCATED"


def test_messages_quote_the_decoder() -> None:
    data = jpegs()["baseline"]
    begin, end = scan_of(data)
    middle = (begin + end) // 2
    assert verdict(data[:middle])[0] == (
        "TRUNCATED",
        f"the JPEG file ends early, at {middle:,} bytes (premature end of data segment)",
    )
    assert verdict(data[:middle] + data[middle + 200 :])[0] == (
        "CORRUPT",
        "the JPEG file is damaged: premature end of data segment",
    )


def test_variants_of_jpeg_without_a_decoder_are_unsupported() -> None:
    data = bytearray(jpegs()["baseline"])
    data[data.index(b"\xff\xc0") + 4] = 12
    assert error(bytes(data)) == "UNSUPPORTED_MODE"


# --- PNG


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def split(data: bytes) -> list[tuple[bytes, bytes]]:
    out, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        out.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return out


def join(parts: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def small_idats(data: bytes, size: int = 900) -> bytes:
    out = []
    for kind, body in split(data):
        if kind == b"IDAT":
            out += [(kind, body[at : at + size]) for at in range(0, len(body), size)]
        else:
            out.append((kind, body))
    return join(out)


@cache
def pngs() -> dict[str, bytes]:
    image = picture(48, 36)
    texts = [(b"tEXt", b"a\0b"), (b"pHYs", bytes(9)), (b"gAMA", bytes(4)), (b"tIME", bytes(7))]
    made = {
        "rgb": encode(image, "PNG"),
        "exif": encode(image, "PNG", exif=turned()),
        "palette": encode(image.quantize(32), "PNG", transparency=3),
        "gray": encode(image.convert("L"), "PNG", transparency=100),
        "alpha": encode(Image.merge("RGBA", (*image.split(), image.convert("L"))), "PNG"),
        "deep": encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    }
    return {
        name: small_idats(join([p for p in split(data)[:1]] + texts + split(data)[1:])) for name, data in made.items()
    }


def broken(data: bytes, kind: bytes, *, crc: bool = True, number: int = 0) -> bytes:
    """Change the checksum of a chunk, or a byte in its middle."""
    at = 8
    while True:
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == kind:
            if not number:
                break
            number -= 1
        at += 12 + length
    place = at + 8 + length + 1 if crc else at + 8 + length // 2
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


TEXTS = {
    "tEXt": chunk(b"tEXt", b"k\0" + b"a" * (3 << 20)),
    "zTXt": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20))),
    "iTXt": chunk(b"iTXt", b"k\0\0\0\0\0" + b"a" * (3 << 20)),
    "iTXt, packed": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
    "70 tEXt": chunk(b"tEXt", b"k\0" + b"a" * ((1 << 20) - 9)) * 70,
    "70 zTXt": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes((1 << 20) - 9))) * 70,
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"<x/>" * (1 << 20)),
    "XMP, packed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>" * (1 << 20))),
    "EXIF as text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(3 << 20))),
    "profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(np.random.default_rng(0).bytes(3 << 20), 0)),
    "profile that is none": chunk(b"iCCP", b"p\0\0" + b"x" * 100),
    "own": chunk(b"prVt", bytes(3 << 20)),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("where", [0, 2, -1])
def test_large_chunks_of_a_png_that_do_not_affect_pixels_are_ignored(
    text: str, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> bytes:
        raise AssertionError("unpacked")

    # A megabyte of zTXt may be a gigabyte of text.
    monkeypatch.setattr("PIL.PngImagePlugin._safe_zlib_decompress", never)
    data = pngs()["palette"]
    at = 33 if where == 0 else data.index(b"IDAT") - 4 if where > 0 else data.index(b"IEND") - 4
    check_whole(data[:at] + TEXTS[text] + data[at:], data)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_of_a_png_is_applied_however_it_is_written(orientation: int) -> None:
    source = picture(48, 36)
    upright = {1: source, 3: source.rotate(180), 6: source.rotate(-90, expand=True)}[orientation]
    plain = encode(source, "PNG")
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode() + b" " * (2 << 20)
    exif = turned(orientation).tobytes()
    raw = f"\nexif\n{len(exif):8d}\n{exif.hex()}\n".encode()
    for extra in (
        chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        chunk(b"tEXt", b"Raw profile type exif\0" + raw),
    ):
        for at in (33, len(plain) - 12):
            data = plain[:at] + TEXTS["tEXt"] + extra + plain[at:]
            assert np.array_equal(pixels(data), np.asarray(upright))
            assert np.array_equal(pixels(data, PreprocessConfig(exif_orientation=False)), np.asarray(source))


@pytest.mark.parametrize("name", ["rgb", "palette"])
@pytest.mark.parametrize("kind", [b"tEXt", b"pHYs", b"gAMA", b"tIME", b"IEND"])
def test_wrong_checksums_that_do_not_affect_pixels_are_ignored(name: str, kind: bytes) -> None:
    data = pngs()[name]
    check_whole(broken(data, kind), data)
    if kind != b"IEND":
        check_whole(broken(data, kind, crc=False), data)


@pytest.mark.parametrize("crc", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rgb", b"IDAT"),
        ("palette", b"PLTE"),
        ("palette", b"tRNS"),
        ("gray", b"tRNS"),
        ("exif", b"eXIf"),
        ("deep", b"IDAT"),
    ],
)
def test_wrong_checksums_of_pixels_are_damage(name: str, kind: bytes, crc: bool) -> None:
    data = broken(pngs()[name], kind, crc=crc, number=1 if kind == b"IDAT" else 0)
    check_damaged(data, "CORRUPT")
    assert f"the checksum of its {kind.decode()} chunk" in str(verdict(data)[0])


def test_damaged_orientation_is_ignored_if_none_is_applied() -> None:
    data = broken(pngs()["exif"], b"eXIf")
    config = PreprocessConfig(exif_orientation=False)
    assert np.array_equal(pixels(data, config), pixels(pngs()["rgb"]))


@pytest.mark.parametrize("config", [ERROR, ACCEPT])
def test_damaged_header_is_never_accepted(config: PreprocessConfig) -> None:
    for crc in (True, False):
        found, _ = verdict(broken(pngs()["rgb"], b"IHDR", crc=crc), config)
        assert isinstance(found, tuple) and found[0] == "CORRUPT"


@pytest.mark.parametrize("name", list(pngs()))
def test_png_that_lacks_only_its_end_is_whole(name: str) -> None:
    data = pngs()[name]
    end = len(data) - 12
    for cut in range(end - 4, len(data)):
        check_whole(data[:cut], data)
    check_whole(data[:end] + bytes(400), data)


@pytest.mark.parametrize("name", list(pngs()))
def test_png_that_ends_early_is_truncated(name: str) -> None:
    data = pngs()[name]
    first, end = data.index(b"IDAT") + 4, len(data) - 12
    for part in (0.2, 0.5, 0.95):
        found = check_damaged(data[: first + int((end - first) * part)], "TRUNCATED")
        if name in ("rgb", "alpha", "deep") and part > 0.4:
            assert np.array_equal(found[:6], pixels(data)[:6])
    # Between two chunks, which looks whole but for the end.
    last = data.rindex(b"IDAT") - 4
    if last > first:
        check_damaged(data[:last], "TRUNCATED")


def test_png_whose_pixels_do_not_unpack_is_corrupt() -> None:
    parts = split(pngs()["rgb"])
    at = next(n for n, (kind, _) in enumerate(parts) if kind == b"IDAT") + 2
    parts[at] = (b"IDAT", parts[at][1][:100] + bytes(300) + parts[at][1][400:])
    check_damaged(join(parts), "CORRUPT")
    del parts[at]
    found, _ = verdict(join(parts))
    assert isinstance(found, tuple)


@pytest.mark.parametrize("name", list(pngs()))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_png_with_fewer_pixels_than_its_header_says_is_corrupt(name: str, share: float) -> None:
    """All checksums are right, and Pillow silently leaves the other rows black or transparent."""
    parts = split(pngs()[name])
    rows = zlib.decompress(b"".join(body for kind, body in parts if kind == b"IDAT"))
    few = zlib.compress(rows[: int(share * len(rows))])
    first = next(n for n, (kind, _) in enumerate(parts) if kind == b"IDAT")
    data = join([*parts[:first], (b"IDAT", few), *(part for part in parts[first:] if part[0] != b"IDAT")])
    found, _ = verdict(data)
    # Pillow itself says so where it looks for more chunks of pixels.
    assert isinstance(found, tuple) and found[0] in ("CORRUPT", "TRUNCATED")
    check_damaged(data, found[0])


def test_png_of_one_color_is_whole() -> None:
    for size in ((1, 1), (1, 9), (9, 2), (40, 30)):
        assert (pixels(encode(Image.new("RGB", size), "PNG")) == 0).all()
        assert (pixels(encode(Image.new("RGBA", size), "PNG")) == 255).all()


def test_damaged_interlaced_png_is_patched() -> None:
    # Pillow does not write them: eight rows and columns in seven passes, by hand.
    passes = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8)]
    rows = b"".join((b"\0" + bytes([90 + 20 * n] * columns)) * height for n, (height, columns) in enumerate(passes))
    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    whole = join([(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])
    assert pixels(whole)[0, 0].tolist() == [90] * 3
    stored = zlib.compressobj(0)
    data = stored.compress(rows) + stored.flush()
    cut = join([(b"IHDR", head), (b"IDAT", data[:30])])
    found = check_damaged(cut, "TRUNCATED")
    assert found[0, 0].tolist() == [90] * 3 and found[7, 7].tolist() == [0] * 3


def test_png_for_iphones_is_named() -> None:
    parts = split(pngs()["rgb"])
    found, _ = verdict(join([(b"CgBI", b"\x50\0\x20\2"), *parts]))
    assert isinstance(found, tuple)
    assert found[0] == "UNSUPPORTED_MODE" and "pngcrush -revert-iphone-optimizations" in found[1]


def test_pixel_limit_holds_for_damaged_files() -> None:
    few = PreprocessConfig(max_pixels=100, damaged="accept")
    for data in (pngs()["rgb"][:-200], broken(pngs()["rgb"], b"IDAT"), jpegs()["baseline"][:-200]):
        found, _ = verdict(data, few)
        assert isinstance(found, tuple) and found[0] == "TOO_MANY_PIXELS"


# --- other formats: no partial picture


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("config", [ERROR, ACCEPT])
def test_other_formats_are_never_accepted_in_part(kind: str, config: PreprocessConfig) -> None:
    image = picture(48, 36)
    data = encode(image.quantize(64) if kind == "GIF" else image, kind)
    for part in (0.3, 0.6, 0.9):
        found, _ = verdict(data[: int(len(data) * part)], config)
        assert isinstance(found, tuple) and found[0] in ("TRUNCATED", "CORRUPT")


def test_gif_without_its_last_byte_is_whole() -> None:
    data = encode(picture(48, 36).quantize(64), "GIF")
    assert data.endswith(b";")
    check_whole(data[:-1], data)


# --- what other files look like


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "a JPEG 2000 image, which is not read here; convert it: magick IN OUT.png"),
        (b"\xff\x4f\xff\x51" + bytes(50), "JPEG 2000"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (b"P6\n2 2\n255\n" + bytes(12), "Netpbm"),
        (b"P5 2 2 255 " + bytes(12), "Netpbm"),
        (b"8BPS\0\1" + bytes(50), "PSD"),
        (bytes(128) + b"DICM" + bytes(50), "DICOM"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "a HEIC image"),
        (b"\0\0\0\x18ftypmif1" + bytes(50), "a HEIC image"),
        (b"\0\0\0\x18ftypavif" + bytes(50), "an AVIF image"),
        (b"\0\0\0\x18ftypcrx " + bytes(50), "CR3"),
        (b"\0\0\0\x18ftypisom" + bytes(50), "a video"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(50), "CR2"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(50), "RAF"),
        (b"IIU\0" + bytes(50), "RW2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git lfs pull"),
        (b"GARBAGE " * 9 + jpegs()["baseline"], "a JPEG image follows at byte 72; leave out what is before it: tail -c +73 IN"),
    ],
)  # fmt: skip
def test_unknown_formats_are_named(data: bytes, says: str) -> None:
    found, _ = verdict(data)
    assert isinstance(found, tuple)
    assert found[0] == "UNKNOWN_FORMAT" and says in found[1]
    assert found[1].isascii() and len(found[1]) <= 500


# --- any mixture


def flawed(data: bytes, flaws: list[str], stray: bytes) -> bytes:
    """Add flaws to a JPEG that no pixel depends on."""
    first = 4 + int.from_bytes(data[4:6], "big")
    if "fill" in flaws:
        data = data[:first] + b"\xff\xff" + data[first:]
    if "comment" in flaws:
        data = data[:first] + b"\xff\xfe\0\6" + stray[:4].ljust(4, b"x") + data[first:]
    if "between" in flaws:
        data = data[:first] + stray + data[first:]
    if "version" in flaws:
        data = data.replace(b"JFIF\0\1\1", b"JFIF\0\7\7")
    if "end" in flaws and data.endswith(b"\xff\xd9"):
        data = data[:-2]
    elif "behind" in flaws:
        data += stray * 30
    return stray + data if "before" in flaws else data


FLAWS = ["comment", "between", "version", "fill", "end", "behind", "before"]
MARKS = st.sampled_from([b"\n", b"\r\n\r\n", b"\xef\xbb\xbf", b"junk", b"\0\0\0\7", b"<x>"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(list(jpegs())), st.lists(st.sampled_from(FLAWS), max_size=4), MARKS)
def test_any_flaws_of_a_jpeg_are_ignored(name: str, flaws: list[str], stray: bytes) -> None:
    data = jpegs()[name]
    assert np.array_equal(pixels(flawed(data, flaws, stray)), pixels(data))


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], deadline=None)
@given(
    st.sampled_from(list(jpegs())),
    st.sampled_from(["noise", "zeros", "ones", "cut out", "cut"]),
    st.floats(0, 1),
    st.integers(1, 400),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(FLAWS), max_size=3),
    MARKS,
)
def test_damage_to_a_jpeg_is_never_passed_on_unmarked(
    name: str, damage: str, place: float, length: int, seed: int, flaws: list[str], stray: bytes
) -> None:
    original = jpegs()[name]
    begin, end = scan_of(original)
    at = begin + int((end - begin) * place)
    length = min(length, end - at)
    filler = {"noise": np.random.default_rng(seed).bytes(length), "zeros": bytes(length), "ones": b"\xff" * length}
    data = original[:at] + filler.get(damage, b"") + (b"" if damage == "cut" else original[at + length :])
    if damage != "cut":
        # What decodes without a complaint can't be told from a file that was made so.
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if "k" in name else "RGB", strict=True)
        except ValueError:
            pass
        else:
            found, _ = verdict(data)
            assume(isinstance(found, tuple) or np.array_equal(found, pixels(original)))
    data = flawed(data, flaws, stray)
    found, mark = verdict(data)
    assert mark is None
    accepted, mark = verdict(data, ACCEPT)
    if isinstance(found, np.ndarray):
        assert np.array_equal(found, pixels(original))
        assert mark is None and np.array_equal(accepted, found)
    else:
        assert found[0] in ("CORRUPT", "TRUNCATED")
        assert isinstance(accepted, tuple) or mark == found[1]
    assert not is_plain_jpeg(data, ERROR) or isinstance(found, np.ndarray)


@pytest.mark.parametrize("least", [8, 64, 128, 500, 512])
def test_whole_jpeg_of_any_size_is_decoded_at_a_half_a_quarter_or_an_eighth(least: int) -> None:
    """The decoder also has scales between these, such as 3/8, which it uses if they give at least the size."""
    rng = np.random.default_rng(least)
    for width, height in rng.integers(2 * least, 8 * least, (12, 2)).tolist():
        data = encode(Image.fromarray(np.full((height, width, 3), 90, np.uint8)))
        decoded = open_scaled(data, ERROR, least)
        factor = max(f for f in (1, 2, 4, 8) if f == 1 or min(-(-width // f), -(-height // f)) >= least)
        assert (decoded.factor, decoded.size) == (factor, (width, height))
        assert np.asarray(decoded.pixels).shape == (-(-height // factor), -(-width // factor), 3)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 7}], ids=str
)
def test_tidied_file_has_the_pixels_of_the_whole_one(options: dict[str, Any]) -> None:
    """Some scans end with zero bytes of their own, and those of one color may have no others."""
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (24, 24, 3), np.uint8) for _ in range(200)] + [np.full((64, 64, 3), 128, np.uint8)]
    for image in images:
        data = encode(Image.fromarray(image), **options)
        tidied = jpeg.tidy(data)
        assert tidied is not None and tidied.complete and tidied.ended
        assert np.array_equal(jpeg.decode(tidied.data, "RGB"), jpeg.decode(data, "RGB"))


CHUNK_OPS = ["crc", "payload", "drop", "swap", "text", "profile", "bomb", "unknown", "cut", "behind"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from(list(pngs())),
    st.lists(st.tuples(st.sampled_from(CHUNK_OPS), st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_damage_to_a_png_is_never_passed_on_unmarked(name: str, ops: list[tuple[str, float, int]]) -> None:
    original = pngs()[name]
    chunks = [chunk(*part) for part in split(original)]
    tail, cut = b"", 1.0
    for op, place, value in ops:
        n = int(place * len(chunks))
        one = chunks[n]
        if op == "crc":
            chunks[n] = one[:-1] + bytes([one[-1] ^ value])
        elif op == "payload":
            at = 8 + int(place * 997) % max(1, len(one) - 12)
            chunks[n] = one[:at] + bytes([one[at] ^ value]) + one[at + 1 :]
        elif op == "drop" and one[4:8] not in (b"tRNS", b"eXIf"):  # a file without these is as good as any
            del chunks[n]
        elif op == "swap" and n and not {one[4:8], chunks[n - 1][4:8]} & {b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS"}:
            chunks[n - 1 : n + 1] = [one, chunks[n - 1]]
        elif op in ("text", "profile", "bomb", "unknown") and n:
            extra = {"text": "iTXt", "profile": "profile", "bomb": "zTXt", "unknown": "own"}[op]
            chunks.insert(n, TEXTS[extra])
        elif op == "cut":
            cut = min(cut, place)
        elif op == "behind":
            tail = bytes([value]) * 40
        if not chunks:
            break
    body = b"".join(chunks)
    # Not in a large text: there is nothing to see there.
    data = b"\x89PNG\r\n\x1a\n" + body[: max(1, int(len(body) * cut))] + (tail if cut == 1 else b"")
    found, mark = verdict(data)
    assert mark is None
    accepted, mark = verdict(data, ACCEPT)
    if isinstance(found, np.ndarray):
        assert np.array_equal(found, pixels(original))
        assert mark is None and np.array_equal(accepted, found)
    else:
        assert found[0] in ("CORRUPT", "TRUNCATED")
        assert isinstance(accepted, tuple) or mark == found[1]


def test_open_image_accepts_damaged_images_too() -> None:
    image = open_image(jpegs()["baseline"][:-300], ACCEPT)
    assert image.mode == "RGB" and image.size == (96, 72)


# --- the mark travels


def files(folder: Path) -> list[str]:
    data = jpegs()["baseline"]
    contents = [data, data[:-300], DAMAGES["cut out"](data, len(data) // 2), b"", data[:-2], pngs()["rgb"][:-300]]
    for n, content in enumerate(contents):
        (folder / f"{n}.jpg").write_bytes(content)
    return [f"file://{folder}/{n}.jpg" for n in range(len(contents))]


@pytest.mark.parametrize(
    ("options", "careful"),
    # The careful way once: its helper process takes seconds to start.
    [
        ({}, False),
        ({}, True),
        ({"decoder": "exact"}, False),
        ({"decoder": "gpu"}, False),
        ({"cpus_per_task": 2}, False),
    ],
)
@pytest.mark.parametrize("transform", [SMALL, None])
def test_tasks_send_the_mark_with_the_pixels(
    options: dict[str, Any], careful: bool, transform: Transform | None, tmp_path: Path
) -> None:
    config = PreprocessConfig(damaged="accept", **options)
    table = pa.concat_tables(
        Preparation(StorageConfig(), config, transform).rows(0, files(tmp_path), careful=careful)
    ).combine_chunks()
    marks = table["image_damage"].to_pylist()
    assert [mark is not None for mark in marks] == [False, True, True, False, False, True]
    assert table["error_type"].to_pylist() == [None, None, None, "EMPTY_FILE", None, None]
    assert "premature end of data segment" in marks[2] and marks[5].startswith("the PNG file ends early")
    strict = pa.concat_tables(
        Preparation(StorageConfig(), PreprocessConfig(**options), transform).rows(0, files(tmp_path))
    )
    assert strict["image_damage"].null_count == 6
    assert strict["error_type"].to_pylist() == [None, "TRUNCATED", "CORRUPT", "EMPTY_FILE", None, "TRUNCATED"]
    # The error says what the mark says.
    assert [m for m, k in zip(strict["message"].to_pylist(), marks, strict=True) if k] == [k for k in marks if k]


def actor(call: Callable[[dict[str, Any]], Any], marks: bool = True) -> InferenceActor:
    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> Any:
            return call(batch)

    return InferenceActor(CustomFactory(Predictor, PredictorConfig(path="m:P")), [], marks_damage=marks)


def prepared(folder: Path) -> pa.Table:
    return pa.concat_tables(Preparation(StorageConfig(), ACCEPT, SMALL).rows(0, files(folder)))


def test_predictions_have_a_column_of_marks_only_where_damage_is_accepted(tmp_path: Path) -> None:
    table = prepared(tmp_path)
    result = actor(lambda batch: {"n": np.arange(len(batch["image"]))})(table)
    assert result.schema.field("damaged").type == pa.string()
    assert result.column_names[len(RESULT_SCHEMA) :] == ["n", "damaged"]
    assert result["damaged"].to_pylist() == table["image_damage"].to_pylist()
    assert "damaged" not in actor(lambda batch: {"n": np.arange(len(batch["image"]))}, marks=False)(table).column_names


def test_marks_stay_with_their_images_if_some_fail_in_the_predictor(tmp_path: Path) -> None:
    table = prepared(tmp_path)

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        if any(uri.endswith(("/0.jpg", "/1.jpg")) for uri in batch["uri"]):
            raise ValueError("no")
        return {"uri_of": list(batch["uri"])}

    result = actor(call)(table)
    for row, mark in zip(result.to_pylist(), table["image_damage"].to_pylist(), strict=True):
        if row["error_type"] is None:
            assert row["uri_of"].endswith(f"/{row['row']}.jpg") and row["damaged"] == mark
        else:
            assert row["damaged"] is None
    assert result["error_type"].null_count == 3


def test_schema_is_the_same_if_everything_fails(tmp_path: Path) -> None:
    failed = prepared(tmp_path).slice(3, 1)
    result = actor(lambda batch: {"n": [1]})(failed)
    assert result.column_names[len(RESULT_SCHEMA) :] == [*CLASSIFIER_SCHEMA.names, "damaged"]


def test_predictor_with_a_column_of_that_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'damaged'") as caught:
        raise_if_fatal(actor(lambda batch: {"damaged": np.zeros(len(batch["image"]))})(prepared(tmp_path)))
    assert "preprocess.damaged=error" in caught.value.remedy
    column = actor(lambda batch: {"damaged": np.zeros(len(batch["image"]))}, marks=False)(prepared(tmp_path))
    assert column["damaged"].null_count == 1


def test_manifest_with_a_column_of_that_name_is_refused() -> None:
    base = {"input": {"uris": ["x"]}, "output": {"uri": "y"}}
    for predictor in ({}, {"predictor": "m:P"}):
        config = JobConfig.model_validate({**base, **predictor, "preprocess": {"damaged": "accept"}})
        with pytest.raises(UserError, match="'damaged'"):
            check_columns(config, ["uri", "damaged"])
        check_columns(config, ["uri", "id"])
        check_columns(JobConfig.model_validate({**base, **predictor}), ["uri", "damaged"])


def test_treatment_of_damage_is_part_of_the_fingerprint() -> None:
    base = {"input": {"uris": ["x"]}, "output": {"uri": "y"}}
    accept = JobConfig.model_validate({**base, "preprocess": {"damaged": "accept"}})
    engine = Engine(lambda: None, None, {}, False, None)  # type: ignore[arg-type,return-value]
    mine, other = (fingerprint_parts(c, engine, "") for c in (accept, JobConfig.model_validate(base)))
    assert {key for key in mine if mine[key] != other[key]} == {"preprocess.damaged"}
