from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from batch_inference.images.transform import Transform
from batch_inference.models.info import weights_transform

SIZES = [
    (1, 1),
    (1, 40),
    (40, 1),
    (3, 7),
    (224, 224),
    (256, 256),
    (257, 255),
    (100, 900),
    (900, 100),
    (640, 427),
    (231, 1000),
]
WEIGHTS = [
    models.ResNet18_Weights.DEFAULT,  # bilinear, 256 to 224
    models.ResNet152_Weights.IMAGENET1K_V2,  # bilinear, 232
    models.EfficientNet_B0_Weights.DEFAULT,  # bicubic
    models.EfficientNet_B1_Weights.IMAGENET1K_V1,  # bicubic, 256 to 240
    models.EfficientNet_B2_Weights.DEFAULT,  # bicubic, no crop
    models.EfficientNet_V2_L_Weights.DEFAULT,  # bicubic, another mean
    models.Inception_V3_Weights.DEFAULT,  # 342 to 299
    models.ViT_L_16_Weights.IMAGENET1K_V1,  # 242
]


def noise(size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_result_equals_torchvision_bit_for_bit(weights: models.WeightsEnum) -> None:
    transform, expected = weights_transform(weights), weights.transforms()
    for size in SIZES:
        image = noise(size)
        pixels = transform.pixels(image)
        assert (pixels.shape, pixels.dtype) == ((transform.crop, transform.crop, 3), np.uint8)
        got = transform.normalize(torch.from_numpy(pixels[None].copy()))
        assert got.dtype == torch.float32 and got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got[0], expected(image)), size


@pytest.mark.parametrize(("resize", "crop"), [(100, 224), (223, 224), (224, 225), (7, 32), (33, 32)])
def test_crop_larger_than_resize_pads_as_torchvision_does(resize: int, crop: int) -> None:
    from torchvision.transforms._presets import ImageClassification

    expected = ImageClassification(crop_size=crop, resize_size=resize)
    transform = Transform(resize=resize, crop=crop)
    for size in SIZES:
        got = transform.normalize(torch.from_numpy(transform.pixels(noise(size))[None].copy()))
        assert torch.equal(got[0], expected(noise(size))), size


def test_batch_keeps_order_and_values() -> None:
    pixels = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3)
    got = Transform(mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 0.5)).normalize(pixels)
    assert got.shape == (2, 3, 4, 5)
    assert got[1, 1, 2, 3] == pytest.approx((int(pixels[1, 2, 3, 1]) / 255 - 0.5) / 2)


def test_image_of_another_mode_is_converted() -> None:
    gray = Image.new("L", (300, 300), 7)
    assert (Transform().pixels(gray) == 7).all()


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 30_000), (30_001, 2)])
def test_extreme_strips_take_no_memory(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    from batch_inference.images import transform as module

    image = noise(size)
    transform = Transform(resize=32, crop=28)
    whole = transform.pixels(image)
    monkeypatch.setattr(module, "_MAX_RESIZED_PIXELS", 1000)
    part = transform.pixels(image)
    assert np.abs(whole.astype(int) - part).max() <= 1


def test_longest_strip_is_resized() -> None:
    # Resized as a whole it would have 256 x 256,000,000 pixels.
    pixels = Transform().pixels(Image.new("RGB", (1, 1_000_000), (9, 8, 7)))
    assert (pixels == np.array([9, 8, 7])).all()


def test_transform_survives_a_round_trip_through_a_dictionary() -> None:
    transform = Transform(resize=300, crop=288, mean=(0.1, 0.2, 0.3), interpolation="bicubic")
    assert Transform.from_dict(transform.to_dict()) == transform
    assert transform.to_dict()["mean"] == [0.1, 0.2, 0.3]


def test_unknown_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="bilinear"):
        Transform(interpolation="cubic")


def test_decoding_does_not_import_torch() -> None:
    code = (
        "import sys, batch_inference.images.decode; from batch_inference.images.transform import Transform; from PIL import Image;"
        "Transform().pixels(Image.new('RGB', (9, 9))); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
