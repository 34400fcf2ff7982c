"""The fast path against the exact path, on real photos; tests/job/test_labels.py has the labels that follow."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from batch_inference.config import PreprocessConfig
from batch_inference.errors import RowError
from batch_inference.images import pixels as images_pixels
from batch_inference.images.decode import Decoded, open_image, open_scaled
from batch_inference.images.pixels import decode, resize
from batch_inference.images.transform import Transform
from batch_inference.models.info import weights_transform
from tests.support.photos import crops, encode, photos

FAST, EXACT = PreprocessConfig(), PreprocessConfig(decoder="exact")
needs_simd = pytest.mark.skipif(images_pixels.simd is None, reason="no SIMD resizer for this platform")


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.int16) - b)


# --- exact


@pytest.mark.parametrize("weights", [models.ResNet18_Weights.DEFAULT, models.EfficientNet_B0_Weights.DEFAULT], ids=str)
def test_exact_path_equals_the_transform_of_the_weights_bit_for_bit(weights: models.WeightsEnum) -> None:
    transform, preset = weights_transform(weights), weights.transforms()
    for data in [encode(photo) for photo in photos().values()] + crops(40) + crops(3, (1100, 1600)):
        pixels = torch.from_numpy(decode(data, EXACT, transform)[None].copy())
        # As the article does it.
        expected = preset(Image.open(io.BytesIO(data)).convert("RGB"))
        assert torch.equal(transform.normalize(pixels)[0], expected)


# --- fast


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("with_simd", [pytest.param(True, marks=needs_simd), False])
def test_fast_resizing_differs_only_by_rounding(
    interpolation: str, with_simd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_simd:
        monkeypatch.setattr(images_pixels, "simd", None)
    sizes = [(1, 1), (1, 40), (40, 1), (3, 7), (224, 224), (257, 255), (100, 900), (640, 427), (500, 375), (1, 3000)]
    for resized, crop in ((256, 224), (232, 224), (224, 224), (342, 299), (100, 224)):
        transform = Transform(resize=resized, crop=crop, interpolation=interpolation)
        for number, size in enumerate(sizes):
            image = list(photos().values())[number].resize(size)
            expected = transform.pixels(image)
            for pixels in (image, np.asarray(image)):
                got = resize(Decoded(pixels, size, 1), transform)
                assert (got.shape, got.dtype) == (expected.shape, np.uint8)
                assert difference(got, expected).max() <= 2
                assert difference(got, expected).mean() <= 0.05


def test_filter_without_simd_is_pillows_own() -> None:
    transform = Transform(interpolation="lanczos")
    image = photos()["china"]
    for pixels in (image, np.asarray(image)):
        assert np.array_equal(resize(Decoded(pixels, image.size, 1), transform), transform.pixels(image))


@pytest.mark.parametrize("size", [(500, 375), (1023, 2000), (1024, 1024), (2047, 2100), (2049, 3001), (4100, 4200)])
def test_large_jpegs_are_decoded_smaller_but_never_below_twice_the_target(size: tuple[int, int]) -> None:
    data = encode(photos()["china"].resize(size))
    decoded = open_scaled(data, FAST, 512)
    assert isinstance(decoded.pixels, np.ndarray)
    height, width = decoded.pixels.shape[:2]
    assert decoded.size == size
    assert min(width, height) >= min(512, *size)
    assert min(width, height) < 1026 or decoded.factor == 8
    assert (width, height) == tuple(-(-side // decoded.factor) for side in size)
    transform = Transform()
    # A blur, but no shift: a shift by a pixel would be five times as much.
    assert difference(decode(data, FAST, transform), decode(data, EXACT, transform)).mean() < 1.0


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(500, 375), (2100, 1200)])
def test_orientation_is_the_same_on_both_paths(mode: str, orientation: int, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photos()["coffee"].resize(size).convert(mode).save(buffer, "JPEG", quality=90, exif=exif)
    data = buffer.getvalue()
    for config in (FAST, FAST.model_copy(update={"exif_orientation": False})):
        exact = decode(data, config.model_copy(update={"decoder": "exact"}), Transform())
        assert difference(decode(data, config, Transform()), exact).mean() < 1.0
        small = open_scaled(data, config, 10_000)
        assert np.array_equal(np.asarray(small.pixels), np.asarray(open_image(data, config)))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"optimize": True}])
def test_pixels_of_unscaled_jpegs_are_pillows(options: dict[str, bool]) -> None:
    buffer = io.BytesIO()
    photos()["rocket"].save(buffer, "JPEG", quality=80, **options)
    decoded = open_scaled(buffer.getvalue(), FAST, 10_000)
    assert isinstance(decoded.pixels, np.ndarray)
    assert np.array_equal(decoded.pixels, np.asarray(open_image(buffer.getvalue(), FAST)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
def test_damage_gives_the_same_result_on_both_paths(options: dict[str, bool]) -> None:
    buffer = io.BytesIO()
    photos()["china"].resize((120, 90)).save(buffer, "JPEG", quality=80, **options)
    data = buffer.getvalue()
    rng = np.random.default_rng(0)
    samples = [data[:length] for length in range(0, len(data), 7)]
    for _ in range(400):
        damaged = bytearray(data)
        for place in rng.integers(2, len(data), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        samples.append(bytes(damaged))
    limited = FAST.model_copy(update={"max_pixels": 1_000_000})
    outcomes = set()
    for sample in samples:
        found = []
        for opened in (lambda d: open_scaled(d, limited, 10_000).pixels, lambda d: open_image(d, limited)):
            try:
                found.append(np.asarray(opened(sample)))
            except RowError as failure:
                found.append(failure.error)
        outcomes.add(type(found[0]))
        assert np.array_equal(found[0], found[1]) if isinstance(found[0], np.ndarray) else found[0] == found[1]
    assert len(outcomes) == 2


def test_other_formats_are_decoded_by_pillow() -> None:
    transform = Transform()
    photo = photos()["coffee"]
    for data in (
        encode(photo, "PNG"),
        encode(photo, "WEBP"),
        encode(photo.quantize(64), "GIF"),
    ):
        assert isinstance(open_scaled(data, FAST, 512).pixels, Image.Image)
        assert difference(decode(data, FAST, transform), decode(data, EXACT, transform)).max() <= 1


def test_pixel_limit_is_checked_before_decoding() -> None:
    with pytest.raises(RowError) as caught:
        decode(encode(photos()["china"]), PreprocessConfig(max_pixels=1000), Transform())
    assert caught.value.error.error_type == "TOO_MANY_PIXELS"
