"""The real photos that scikit-image and scikit-learn ship, and JPEGs of parts of them."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# Pictures that a camera took; not the drawings, test patterns, masks and single characters beside them.
_PHOTOS = {
    "skimage/data": [
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "microaneurysms.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ],
    "sklearn/datasets/images": ["china.jpg", "flower.jpg"],
}


@cache
def photos() -> dict[str, Image.Image]:
    """All of them as RGB, by name."""
    found = {}
    for folder, names in _PHOTOS.items():
        package, _, rest = folder.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for name in names:
            with Image.open(Path(spec.submodule_search_locations[0], rest, name)) as image:
                found[Path(name).stem] = image.convert("RGB")
    return found


def encode(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def crops(count: int, short: tuple[int, int] = (180, 700), seed: int = 0) -> list[bytes]:
    """JPEGs of random parts of the photos in turn, with shorter sides in a range, always the same for the same arguments."""
    rng = np.random.default_rng(seed)
    found = list(photos().values())
    out = []
    for number in range(count):
        photo = found[number % len(found)]
        share = rng.uniform(0.4, 1.0, 2)
        width, height = (max(32, int(side * part)) for side, part in zip(photo.size, share, strict=True))
        left, top = (
            int(rng.integers(0, side - part + 1)) for side, part in zip(photo.size, (width, height), strict=True)
        )
        scale = rng.uniform(*short) / min(width, height)
        part = photo.crop((left, top, left + width, top + height))
        part = part.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
        out.append(encode(part, quality=int(rng.integers(75, 96))))
    return out
