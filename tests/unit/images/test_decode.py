from __future__ import annotations

import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from batch_inference.config import PreprocessConfig
from batch_inference.errors import RowError
from batch_inference.images import decode
from batch_inference.images.decode import open_image
from tests.support.images import encode, photo

# pytest replaces the filters that the module sets; test_decoding_damaged_files_prints_nothing sees to them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

CONFIG = PreprocessConfig()


def fails(data: bytes, config: PreprocessConfig = CONFIG) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        open_image(data, config)
    error = caught.value.error
    assert error.stage == "decode"
    assert not error.retryable
    assert "\n" not in error.message and len(error.message) <= 500
    return error.error_type, error.message


def close(image: Image.Image, expected: Image.Image, mean: float = 4.0) -> None:
    assert type(image) is Image.Image
    assert (image.mode, image.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected.convert("RGB"), np.int16))
    assert difference.mean() <= mean, difference.mean()


# --- every format ends as RGB


@pytest.mark.parametrize(
    ("kind", "options", "mean"),
    [
        ("JPEG", {"quality": 95}, 4),
        ("JPEG", {"quality": 95, "progressive": True}, 4),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 6),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "jpeg", "quality": 95}, 8),
    ],
)
def test_formats_are_decoded(kind: str, options: dict[str, Any], mean: float) -> None:
    close(open_image(encode(photo(), kind, **options), CONFIG), photo(), mean)


def test_grayscale_jpeg_becomes_rgb() -> None:
    gray = photo().convert("L")
    close(open_image(encode(gray, "JPEG", quality=95), CONFIG), gray)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    close(
        open_image(encode(photo().convert("CMYK"), kind, **({"quality": 95} if kind == "JPEG" else {})), CONFIG),
        photo(),
        6,
    )


def test_adobe_cmyk_is_not_inverted() -> None:
    # Photoshop stores CMYK JPEG inverted and says so in an APP14 marker, which Pillow writes as well.
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    red, green, blue = open_image(data, CONFIG).getpixel((8, 8))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15


# Pillow 12, the newest for Python 3.10, can't read back the YCbCr TIFF that it writes itself.
@pytest.mark.parametrize("mode", ["YCbCr", "LAB"] if int(PIL.__version__.split(".")[0]) >= 13 else ["LAB"])
def test_other_color_spaces_in_tiff_become_rgb(mode: str) -> None:
    source = (
        Image.new("LAB", (8, 8), (255, 128, 128)) if mode == "LAB" else Image.new("RGB", (8, 8), "white").convert(mode)
    )
    close(open_image(encode(source, "TIFF"), CONFIG), Image.new("RGB", (8, 8), "white"), 3)


def test_mpo_gives_its_first_picture() -> None:
    data = encode(photo(), "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))], quality=95)
    close(open_image(data, CONFIG), photo())


def test_palette_png_has_its_colors() -> None:
    source = photo().quantize(64)
    close(open_image(encode(source, "PNG"), CONFIG), source.convert("RGB"), 0)


def test_gif_gives_its_first_frame() -> None:
    first, second = photo().quantize(64), Image.new("RGB", (96, 64)).quantize(2)
    data = encode(first, "GIF", save_all=True, append_images=[second])
    close(open_image(data, CONFIG), first.convert("RGB"), 0)


def test_bilevel_image_is_decoded() -> None:
    source = photo().convert("1")
    close(open_image(encode(source, "PNG"), CONFIG), source.convert("RGB"), 0)
    close(open_image(encode(source, "TIFF", compression="group4"), CONFIG), source.convert("RGB"), 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 257, 4096, 32768, 65280, 65535]], np.uint16)
    got = np.asarray(open_image(encode(Image.fromarray(values), kind), CONFIG))[0, :, 0]
    assert got.tolist() == np.round(values[0] / 257).astype(int).tolist() == [0, 0, 1, 16, 128, 254, 255]


def test_inverted_sixteen_bit_gray_is_decoded() -> None:
    values = np.array([[0, 65535]], np.uint16)
    data = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.asarray(open_image(data, CONFIG))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    # Black, opaque on the left, half in the middle, clear on the right.
    alpha = np.array([[255, 128, 0]], np.uint8)
    if mode == "PA":
        image = Image.new("P", (3, 1))
        image.putalpha(Image.fromarray(alpha))
        assert image.mode == "PA"
        got = decode.to_rgb(image)
    else:
        image = Image.new(mode, (3, 1))
        image.putalpha(Image.fromarray(alpha))
        got = open_image(encode(image, "PNG"), CONFIG)
    assert np.asarray(got).tolist() == [[[0] * 3, [127] * 3, [255] * 3]]


def test_alpha_of_webp_and_tiff_is_composited_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    for data in (encode(image, "WEBP", lossless=True), encode(image, "TIFF")):
        assert np.asarray(open_image(data, CONFIG)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(2, 1, 8, 0, b"\0\x00\x09", chunk(b"tRNS", b"\0\x09")), [[0, 0, 0], [255] * 3]),
        (png(2, 1, 8, 2, b"\0\x01\x02\x03\x09\x08\x07", chunk(b"tRNS", b"\0\x09\0\x08\0\x07")), [[1, 2, 3], [255] * 3]),
        (png(2, 1, 16, 0, b"\0\x01\x00\x80\x80", chunk(b"tRNS", b"\x80\x80")), [[1] * 3, [255] * 3]),
        (
            png(
                2,
                1,
                16,
                2,
                b"\0" + bytes([1, 0, 2, 0, 3, 0, 9, 9, 8, 8, 7, 7]),
                chunk(b"tRNS", bytes([9, 9, 8, 8, 7, 7])),
            ),
            [[1, 2, 3], [255] * 3],
        ),
        (png(8, 1, 1, 0, b"\0\x0f", chunk(b"tRNS", b"\0\x00")), [[255] * 3] * 8),
        (
            png(2, 1, 8, 3, b"\0\x00\x01", chunk(b"PLTE", b"\x05\x06\x07\x01\x01\x01"), chunk(b"tRNS", b"\xff\x00")),
            [[5, 6, 7], [255] * 3],
        ),
    ],
    ids=["gray", "rgb", "gray16", "rgb16", "bilevel", "palette"],
)
def test_transparent_color_becomes_white(data: bytes, expected: list[list[int]]) -> None:
    assert np.asarray(open_image(data, CONFIG))[0].tolist() == expected


def test_transparent_gif_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 1, 1, 1])
    image.putpixel((1, 0), 1)
    assert np.asarray(open_image(encode(image, "GIF", transparency=1), CONFIG)).tolist() == [[[10, 20, 30], [255] * 3]]


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {value: key for key, value in {1: None, **decode._TURNS}.items() if value is not None}
    assert set(turns.values()) == set(range(2, 9))
    # The stored picture is the one that the turn makes upright again.
    upright = photo()
    turn = decode._TURNS.get(orientation)
    inverse = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    stored = upright if turn is None else upright.transpose(inverse.get(turn, turn))
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(stored, kind, exif=exif, **options)
    close(open_image(data, CONFIG), upright)
    close(open_image(data, PreprocessConfig(exif_orientation=False)), stored)


def test_broken_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(), "JPEG", quality=95, exif=exif)
    broken = data.replace(b"Exif\x00\x00MM\x00*", b"Exif\x00\x00MM\xff\xff").replace(
        b"Exif\x00\x00II*\x00", b"Exif\x00\x00II\xff\xff"
    )
    assert broken != data
    close(open_image(broken, CONFIG), photo())
    exif[0x0112] = 99
    close(open_image(encode(photo(), "JPEG", quality=95, exif=exif), CONFIG), photo())


# --- broken files, each of the right type


def test_empty_file_is_an_error_of_its_own() -> None:
    assert fails(b"")[0] == "EMPTY_FILE"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"hello, this is a text file\n", "text"),
        (b"<!DOCTYPE html><html><body>403</body></html>", "HTML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x00" * 4096, "zero bytes"),
        (b"\x01\x02\x1b[31m\xff\xfe", r"\x1b"),
        ("Grüße aus Köln".encode() * 100, "text"),
    ],
)
def test_file_that_is_no_image_is_described(data: bytes, says: str) -> None:
    kind, message = fails(data)
    assert kind == "UNKNOWN_FORMAT"
    assert says in message
    assert message.isprintable() and message.isascii()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_file_is_truncated(kind: str, part: float) -> None:
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8))
    data = encode(source.quantize(64) if kind == "GIF" else source, kind)
    assert fails(data[: int(len(data) * part)])[0] == "TRUNCATED"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_file_cut_in_its_header_is_truncated(kind: str) -> None:
    assert fails(encode(photo(), kind)[:16])[0] == "TRUNCATED"


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_truncated_tiff(compression: str | None) -> None:
    data = encode(photo(), "TIFF", **({"compression": compression} if compression else {}))
    assert fails(data[: len(data) // 2])[0] in ("TRUNCATED", "CORRUPT")


def test_corrupt_png_is_corrupt() -> None:
    data = bytearray(encode(photo(), "PNG"))
    at = data.index(b"IDAT") + 10
    data[at : at + 20] = bytes(20)
    assert fails(bytes(data))[0] == "CORRUPT"


def test_corrupt_webp_is_corrupt() -> None:
    data = bytearray(encode(photo(), "WEBP"))
    data[20:60] = b"\xff" * 40
    assert fails(bytes(data))[0] == "CORRUPT"


def test_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    kind, message = fails(png(60_000, 60_000, 8, 2, b"\0"))
    assert kind == "TOO_MANY_PIXELS"
    assert "60000 x 60000" in message and "3,600,000,000" in message and "178,956,970" in message


def test_pixel_limit_is_inclusive() -> None:
    data = encode(photo(10, 10), "PNG")
    assert open_image(data, PreprocessConfig(max_pixels=100)).size == (10, 10)
    assert fails(data, PreprocessConfig(max_pixels=99))[0] == "TOO_MANY_PIXELS"


def test_pillows_own_limit_does_not_interfere() -> None:
    data = png(20_000, 10_000, 1, 0, b"")
    assert fails(data)[0] == "TOO_MANY_PIXELS"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fails(data, PreprocessConfig(max_pixels=10**9))[0] in ("TRUNCATED", "CORRUPT")


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.zeros((2, 2), np.int32)])
def test_pixels_without_a_range_are_unsupported(values: np.ndarray) -> None:
    assert fails(encode(Image.fromarray(values), "TIFF"))[0] == "UNSUPPORTED_MODE"


def test_tiff_layout_unknown_to_pillow_is_unsupported() -> None:
    data = bytearray(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    at = data.index(struct.pack("<HHI", 258, 3, 1))
    data[at + 8 : at + 10] = struct.pack("<H", 64)
    assert fails(bytes(data))[0] == "UNSUPPORTED_MODE"


def test_missing_memory_is_a_row_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    data = encode(photo(), "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    assert fails(data)[0] == "DECODE_MEMORY"


@pytest.mark.parametrize(
    "exc", [SyntaxError("x"), struct.error("x"), RecursionError("x"), KeyError("x"), ZeroDivisionError()]
)
def test_any_exception_of_pillow_becomes_a_row_error(monkeypatch: pytest.MonkeyPatch, exc: Exception) -> None:
    data = encode(photo(), "PNG")

    def broken(*_: Any, **__: Any) -> None:
        raise exc

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", broken)
    assert fails(data)[0] in ("CORRUPT", "TRUNCATED")


def test_formats_that_are_not_allowed_are_refused() -> None:
    # ICO and PPM are Pillow's, not ours.
    for kind in ("ICO", "PPM", "TGA"):
        assert fails(encode(photo(), kind))[0] == "UNKNOWN_FORMAT"


def test_decoding_damaged_files_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "whole.tif").write_bytes(encode(photo(), "TIFF", compression="tiff_lzw"))
    code = """if True:
        import sys
        from batch_inference.config import PreprocessConfig
        from batch_inference.errors import RowError
        from batch_inference.images.decode import open_image
        data = open(sys.argv[1], "rb").read()
        for cut in range(8, len(data), 97):
            try:
                open_image(data[:cut], PreprocessConfig())
            except RowError:
                pass
    """
    command = [sys.executable, "-c", code, str(tmp_path / "whole.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- any bytes


SAMPLES = [
    encode(photo(24, 16), "JPEG"),
    encode(photo(24, 16), "JPEG", progressive=True),
    encode(photo(24, 16).convert("CMYK"), "JPEG"),
    encode(photo(24, 16), "PNG"),
    encode(photo(24, 16).quantize(8), "PNG", transparency=1),
    encode(photo(24, 16).quantize(8), "GIF"),
    encode(photo(24, 16), "WEBP"),
    encode(photo(24, 16), "BMP"),
    encode(photo(24, 16), "TIFF"),
    encode(photo(24, 16), "TIFF", compression="tiff_lzw"),
    encode(photo(24, 16), "TIFF", compression="tiff_adobe_deflate"),
]
TYPES = (
    *("EMPTY_FILE", "UNKNOWN_FORMAT", "TRUNCATED", "CORRUPT"),
    *("TOO_MANY_PIXELS", "UNSUPPORTED_MODE", "DECODE_MEMORY"),
)
SMALL = PreprocessConfig(max_pixels=1_000_000)


def ends_well(data: bytes) -> None:
    try:
        image = open_image(data, SMALL)
    except RowError as exc:
        assert exc.error.stage == "decode"
        assert exc.error.error_type in TYPES
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= SMALL.max_pixels
        assert np.asarray(image).shape == (image.height, image.width, 3)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_any_bytes_end_well(data: bytes) -> None:
    ends_well(data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([magic for magic, _ in decode._SIGNATURES] + [b"RIFF\x00\x01\x00\x00WEBPVP8 "]),
    st.binary(max_size=300),
)
def test_any_bytes_behind_a_signature_end_well(magic: bytes, data: bytes) -> None:
    ends_well(magic + data)


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_any_damage_ends_well(data: bytes, damage: list[tuple[float, bytes]], keep: float) -> None:
    broken = bytearray(data)
    for place, value in damage:
        # Headers are at the start: half of the damage goes there.
        at = int(place * 2 * min(80, len(data))) if place < 0.5 else int((place - 0.5) * 2 * (len(data) - 1))
        broken[at : at + len(value)] = value
    ends_well(bytes(broken))
    ends_well(bytes(broken[: int(len(broken) * keep)]))
