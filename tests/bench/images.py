"""The images of the benchmark: JPEGs made of real photos, the same bytes wherever the locked Pillow is installed.

The photos are those that scikit-image and scikit-learn ship. Each image is a random crop of one of them, resized; seeds and
JPEG quality are fixed. No camera made the large ones: they are crops enlarged to 12 megapixels with a camera's noise on top, which brings
their files to the size of a phone's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, features

PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/motorcycle_right.png",
    "skimage/data/retina.jpg",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)


@dataclass(frozen=True)
class ImageSet:
    """A folder of JPEGs.

    Attributes:
        name: Names the folder.
        width: Pixels.
        height: Pixels.
        quality: Of the JPEG; chroma is halved both ways (4:2:0), as cameras and phones do.
        noise: Standard deviation of the added noise, in levels of 0 to 255.
        seed: Of everything that is random; image number i does not depend on how many there are.
    """

    name: str
    width: int
    height: int
    quality: int
    noise: float
    seed: int

    def encode(self, index: int) -> bytes:
        """The JPEG of image ``index``."""
        random = np.random.Generator(np.random.PCG64([self.seed, index]))
        photo = _photo(PHOTOS[index % len(PHOTOS)])
        aspect = self.width / self.height
        scale = random.uniform(0.6, 1.0)
        height = min(photo.height, photo.width / aspect) * scale
        width = height * aspect
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        image = photo.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.noise:
            # Whole numbers, so that no platform rounds differently.
            grain = (random.standard_normal((self.height, self.width, 1), np.float32) * self.noise).round()
            image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
        return buffer.getvalue()

    def make(self, count: int, folder: Path, processes: int) -> str:
        """Writes ``folder``/000000.jpg and so on, unless they are there.

        Returns:
            SHA-256 of all of them, in order.
        """
        stamp = folder.with_suffix(".sha256")
        recipe = f"{self} {count} {versions()}"
        if stamp.is_file() and stamp.read_text().splitlines()[1:] == [recipe]:
            return stamp.read_text().splitlines()[0]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        digest = hashlib.sha256()
        with ProcessPoolExecutor(processes) as pool:
            encoded = map(self.encode, range(count)) if processes == 1 else pool.map(
                partial(ImageSet.encode, self), range(count), chunksize=16
            )  # fmt: skip
            for index, data in enumerate(encoded):
                digest.update(data)
                (folder / f"{index:06}.jpg").write_bytes(data)
        stamp.write_text(f"{digest.hexdigest()}\n{recipe}\n")
        return digest.hexdigest()


SMALL = ImageSet("500x375", 500, 375, quality=95, noise=0, seed=20)
LARGE = ImageSet("12mp", 4000, 3000, quality=92, noise=5, seed=12)


def versions() -> str:
    """Return what the bytes depend on."""
    return f"Pillow {Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"


@cache
def _photo(path: str) -> Image.Image:
    package, _, inside = path.partition("/")
    # Found, not imported: the photos are files, and scikit-learn takes seconds to import.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"the benchmark needs the photos of {package}, which is not installed; `make setup` installs it"
        )
    with Image.open(Path(spec.origin).parent / inside) as image:
        return image.convert("RGB")
