"""Resize, crop and normalize, in two halves: pixels on the CPU with Pillow, arithmetic on the device with torch.

The uint8 between the two halves crosses processes; it has a quarter of the size of floats. Together the halves give bit for bit
the result of torchvision's ``ImageClassification`` preset for a PIL image.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import torch

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Reach of the widest filter (lanczos) in source pixels at scale 1.
REACH = 3
# A strip of 1 x 100,000 pixels becomes 256 x 25,600,000 before its central square is cut out. If the resized image would be larger
# than this, only the part inside the crop is made; it differs in the last bit of a few pixels.
_MAX_RESIZED_PIXELS = 1 << 27


@dataclass(frozen=True)
class Transform:
    """The preprocessing that a network's weights expect.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels.
        crop: Side of the central square, in pixels; smaller images are padded with black.
        mean: Mean of each RGB channel on a scale of 0 to 1.
        std: Standard deviation of each RGB channel on a scale of 0 to 1.
        interpolation: Pillow's name of the resampling filter in lower case, such as ``bilinear``; antialiased.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation is {self.interpolation!r}, not one of {', '.join(FILTERS)}")

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize the shorter side and crop the center.

        Args:
            image: An image of any size; converted to RGB if it is not.

        Returns:
            uint8 of shape (crop, crop, 3).
        """
        if image.mode != "RGB":
            image = image.convert("RGB")
        width, height = resized_size(image.size, self.resize)
        if width * height > _MAX_RESIZED_PIXELS:
            image = self._resized_center(image, width, height)
        elif (width, height) != image.size:
            image = image.resize((width, height), FILTERS[self.interpolation])
        return np.asarray(_crop_center(image, self.crop))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scale to 0..1, subtract the mean, divide by the deviation.

        Args:
            pixels: uint8 of shape (n, h, w, 3), on any device.

        Returns:
            float32 of shape (n, 3, h, w) in the layout ``channels_last``, on the same device.
        """
        import torch

        count, height, width, channels = pixels.shape
        mean, std = _constants(self.mean, self.std, width, pixels.device)
        # Whole rows at a time: with three values in the innermost dimension it would take four times as long.
        rows = pixels.reshape(count, height, width * channels).to(torch.float32)
        # Division, and in this order, as torchvision does: multiplying by an inverse would change the last bit.
        rows.div_(255).sub_(mean).div_(std)
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the job's fingerprint and for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Transform:
        """Return the transform of which :meth:`to_dict` gave these values."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)

    def _resized_center(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Resize ``image`` to (width, height), but make only a center large enough for the crop."""
        sizes, starts, cuts = [], [], []
        for source, target in ((image.width, width), (image.height, height)):
            scale = source / target
            length = min(target, self.crop + 2)
            # The same parity as the target, so that the centers of both coincide.
            length -= (target - length) % 2
            first = (target - length) // 2 * scale
            margin = math.ceil(REACH * max(scale, 1)) + 1
            low = max(0, math.floor(first) - margin)
            high = min(source, math.ceil(first + length * scale) + margin)
            sizes.append(length)
            starts.append((first - low, first - low + length * scale))
            cuts.append((low, high))
        region = image.crop((cuts[0][0], cuts[1][0], cuts[0][1], cuts[1][1]))
        # The region is small, so the box, which has single precision in Pillow, is exact enough.
        box = (
            max(0.0, starts[0][0]),
            max(0.0, starts[1][0]),
            min(float(region.width), starts[0][1]),
            min(float(region.height), starts[1][1]),
        )
        return region.resize((sizes[0], sizes[1]), FILTERS[self.interpolation], box=box)


@lru_cache(maxsize=16)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation for each value of a row of pixels; cached, since each copy to a GPU would wait for it."""
    import torch

    with torch.inference_mode(False):
        rows = [torch.tensor(values, dtype=torch.float32, device=device).repeat(width) for values in (mean, std)]
    return rows[0], rows[1]


def resized_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Return (width, height) after resizing the shorter side to ``short``, with torchvision's rounding."""
    width, height = size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _crop_center(image: Image.Image, crop: int) -> Image.Image:
    """Cut out the central square, on black where the image is smaller, with torchvision's rounding."""
    width, height = image.size
    if width < crop or height < crop:
        left, top = max(0, crop - width) // 2, max(0, crop - height) // 2
        padded = Image.new("RGB", (max(width, crop), max(height, crop)))
        padded.paste(image, (left, top))
        image = padded
        width, height = image.size
    left, top = round((width - crop) / 2.0), round((height - crop) / 2.0)
    return image.crop((left, top, left + crop, top + crop))
