"""Fixtures that several tiers share."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

# Whatever the tests start must not ask anything of the network by itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


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


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """For a while nobody in particular: root may read everything, and a test of denied access needs a denial."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A temporary folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of small JPEGs, a given share of them broken; returns it."""

    def make(count: int, *, bad_percent: float = 0.0, seed: int = 0, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        bad = set(random.Random(seed).sample(range(count), round(count * bad_percent / 100)))
        # A handful of contents is enough; what is tested is what becomes of each file.
        good = [jpeg(s) for s in range(16)]
        for index in range(count):
            data = broken(index) if index in bad else good[index % 16]
            folder.joinpath(f"image-{index:06d}.jpg").write_bytes(data)
        return folder

    return make
