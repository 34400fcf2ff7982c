"""Decode the bytes of a file to pixels at the model's size, by the fast or the exact path.

Exact: Pillow and :meth:`Transform.pixels`, bit for bit the result of the weights' own transform. Fast, the default: JPEG is
decoded by libjpeg-turbo at the smallest scale that is at least twice the target, then only the part inside the
crop is made, with the same antialiased filter in SIMD.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from batch_inference.config import PreprocessConfig
from batch_inference.errors import RowError
from batch_inference.images import malloc
from batch_inference.images.decode import Decoded, open_scaled
from batch_inference.images.transform import FILTERS, REACH, Transform, resized_size

try:
    import cykooz_resizer as simd
except ImportError:  # no wheel for this platform; Pillow differs in the last bit only
    simd = None

_T = TypeVar("_T")
_threads = threading.local()

#: Part of the fingerprint: change it with anything that changes a pixel.
FAST_PATH = "fast-2"
EXACT_PATH = "exact-2"
GPU_PATH = "gpu-2"
#: Filters of :mod:`batch_inference.pipeline.gpu_jpeg`.
GPU_FILTERS = ("bilinear", "bicubic")
# Scaled decoding blurs a little. At twice the target size, the antialiasing filter that follows hides that.
_SCALE_MARGIN = 2
# The SIMD library's names of Pillow's filters; Pillow's bicubic has a = -0.5 as well.
_SIMD_FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom"}


class Pixels(NamedTuple):
    """A decoded image.

    Attributes:
        values: uint8 of shape (height, width, 3), RGB, C-contiguous.
        damaged: The damage that only ``preprocess.damaged: accept`` lets pass; None for undamaged images.
    """

    values: NDArray[np.uint8]
    damaged: str | None = None


def pixels_of(data: bytes, config: PreprocessConfig, transform: Transform | None) -> Pixels:
    """Decode an image; resize and crop it if there is a transform.

    Args:
        data: The file's content.
        config: ``decoder`` chooses the path; limits, orientation and ``damaged`` as for
            :func:`~batch_inference.images.decode.open_image`.
        transform: The model's; None: the image at its own size.

    Raises:
        RowError: Stage ``decode`` as :func:`~batch_inference.images.decode.open_image` raises it, by either path; stage
            ``preprocess`` if resizing fails.
    """
    if transform is None:
        decoded = open_scaled(data, config, None)
        return Pixels(np.ascontiguousarray(decoded.pixels), decoded.damaged)
    malloc.keep_image_memory()
    if config.decoder == "exact":
        decoded = open_scaled(data, config, None)
        return Pixels(_as_row_error(transform.pixels, _image(decoded.pixels)), decoded.damaged)
    decoded = open_scaled(data, config, _SCALE_MARGIN * transform.resize)
    return Pixels(_as_row_error(partial(resize, transform=transform), decoded), decoded.damaged)


def decode(data: bytes, config: PreprocessConfig, transform: Transform) -> NDArray[np.uint8]:
    """Return only the pixels of :func:`pixels_of`: uint8 of shape (crop, crop, 3), RGB."""
    return pixels_of(data, config, transform).values


def resize(decoded: Decoded, transform: Transform) -> NDArray[np.uint8]:
    """Return the central square of a resized image, made without the rest of it.

    Differs from :meth:`Transform.pixels` of the same pixels by rounding: with bilinear filtering at most by 1 of 255,
    with bicubic at most by 2.

    Args:
        decoded: An image, possibly at a reduced scale.
        transform: The model's.

    Returns:
        uint8 of shape (crop, crop, 3).
    """
    pixels, crop = decoded.pixels, transform.crop
    target = resized_size(decoded.size, transform.resize)
    if min(target) < crop or transform.interpolation not in _SIMD_FILTERS:
        # A border has to be added, or the filter is one that no known weights ask for.
        return transform.pixels(_image(pixels))
    available = pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])
    region, box = [], []
    for source, length, target_length in zip(available, decoded.size, target, strict=True):
        scale = length / decoded.factor / target_length
        start = round((target_length - crop) / 2.0) * scale
        end = min(start + crop * scale, float(source))
        margin = math.ceil(REACH * max(scale, 1)) + 1
        low = max(0, math.floor(start) - margin)
        region.append((low, min(source, math.ceil(end) + margin)))
        box.append((start - low, end - low))
    (left, right), (top, bottom) = region
    part: Image.Image | NDArray[np.uint8]
    part = (
        pixels.crop((left, top, right, bottom)) if isinstance(pixels, Image.Image) else pixels[top:bottom, left:right]
    )
    corners = (box[0][0], box[1][0], box[0][1], box[1][1])
    if simd is None:
        return np.asarray(_image(part).resize((crop, crop), FILTERS[transform.interpolation], box=corners))
    return _resize_simd(part.tobytes(), (right - left, bottom - top), corners, transform)


def _image(pixels: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))


def _resize_simd(
    data: bytes, size: tuple[int, int], box: tuple[float, float, float, float], transform: Transform
) -> NDArray[np.uint8]:
    crop = transform.crop
    left, top, right, bottom = box
    filtering = simd.ResizeAlg.convolution(simd.FilterType[_SIMD_FILTERS[transform.interpolation]])
    if not hasattr(_threads, "resizer"):
        # The resizer keeps buffers between calls.
        _threads.resizer = simd.Resizer()
    # First along the rows, then along the columns, as Pillow does. Both at once rounds in another order: measured, this changed
    # 13 % of the values by 1, and ten times as many labels.
    image = simd.ImageData(*size, simd.PixelType.U8x3, data)
    for width, height, cut in (
        (crop, size[1], simd.CropBox(left, 0, right - left, size[1])),
        (crop, crop, simd.CropBox(0, top, crop, bottom - top)),
    ):
        smaller = simd.ImageData(width, height, simd.PixelType.U8x3)
        options = simd.ResizeOptions(resize_alg=filtering, crop_box=cut, use_alpha=False)
        _threads.resizer.resize(image, smaller, options)
        image = smaller
    return np.frombuffer(image.get_buffer(), np.uint8).reshape(crop, crop, 3)


def _as_row_error(function: Callable[[_T], NDArray[np.uint8]], image: _T) -> NDArray[np.uint8]:
    try:
        return function(image)
    except Exception as exc:
        raise RowError("preprocess", type(exc).__name__.upper(), str(exc)) from exc
