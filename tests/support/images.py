"""Small images, whole and broken."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (48, 32)) -> bytes:
    """A real JPEG whose content depends on its seed: a smooth gradient with some noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    base = np.stack([x, y, (x + y) / 2], axis=2) * 255 * rng.random(3) + rng.random((height, width, 3)) * 20
    out = io.BytesIO()
    Image.fromarray(base.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def broken(seed: int) -> bytes:
    """Bytes that are no image, of one of several kinds."""
    return [b"", b"not an image at all\n" * 5, jpeg(seed)[:150], b"\x89PNG\r\n\x1a\nrubbish", b"<html>no</html>"][
        seed % 5
    ]


# --- outputs among inputs ---

JOB = b'{"fingerprint": "f", "identity": {}, "shards": 1, "rows": 1}'


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 96, height: int = 64) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))
