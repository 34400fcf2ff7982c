"""JPEG files decoded and resized on an actor's device, where nodes have too few CPU cores for their GPUs.

The tasks then only fetch and look at headers; what arrives is decoded by nvJPEG, a batch at once, and resized on the device with the
weights' own antialiased filter. Only the small squares come back, so that everything behind is as without it.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batch_inference.config import InferenceConfig, PreprocessConfig
from batch_inference.decoding import decode
from batch_inference.errors import RowError, RowFailure
from batch_inference.inference import with_failures
from batch_inference.preparation import pixel_column
from batch_inference.transform import Transform

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GpuJpegFactory:
    """Makes the decoder in the actor's process."""

    inference: InferenceConfig
    preprocess: PreprocessConfig
    transform: Transform

    def __call__(self) -> GpuJpeg:
        """The decoder on the actor's device."""
        from batch_inference.predictor import actor_device

        return GpuJpeg(self.preprocess, self.transform, actor_device(self.inference))


class GpuJpeg:
    """Decodes the rows of a table that still hold files.

    Pixels differ from those of :func:`~batch_inference.decoding.decode`: other inverse DCT, other chroma upsampling. The mean
    difference is at most 2 of 255 (`tests/unit/test_gpu_jpeg.py`, on a GPU).

    Args:
        preprocess: For files that the device does not decode: those are decoded as without it.
        transform: What the model expects.
        device: Where; on ``cpu`` libjpeg-turbo does nvJPEG's work, to try the way without a GPU.
    """

    def __init__(self, preprocess: PreprocessConfig, transform: Transform, device: torch.device) -> None:
        self._preprocess = preprocess
        self._transform = transform
        self._device = device

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replaces files by pixels.

        Args:
            table: Rows of ``PREPARED_SCHEMA``; those of height 0 hold a file in ``pixels``.

        Returns:
            The same rows, all with pixels, or with the reason why there are none.
        """
        heights = table["height"].to_numpy()
        places = np.flatnonzero((heights == 0) & table["pixels"].is_valid().to_numpy())
        if not len(places):
            return table
        begun = time.perf_counter()
        rows: list[NDArray[np.uint8] | None] = [
            np.frombuffer(value.as_buffer(), np.uint8) if value.is_valid else None
            for chunk in table["pixels"].chunks
            for value in chunk
        ]
        errors: dict[int, RowError] = {}
        for place, found in zip(places.tolist(), self.decode([rows[p] for p in places]), strict=True):  # type: ignore[misc]
            rows[place] = found if isinstance(found, np.ndarray) else None
            if isinstance(found, RowError):
                errors[place] = found
        sides = heights.copy()
        sides[places] = [0 if rows[p] is None else self._transform.crop for p in places]
        widths = table["width"].to_numpy().copy()
        widths[places] = sides[places]
        seconds = table["decode_s"].to_numpy().copy()
        seconds[places] += (time.perf_counter() - begun) / len(places)
        changed = {
            "pixels": pixel_column(rows),
            "height": pa.array(sides),
            "width": pa.array(widths),
            "decode_s": pa.array(seconds),
        }
        changed |= with_failures(table, errors)
        arrays = [changed.get(name, table[name]) for name in table.column_names]
        return pa.Table.from_arrays(arrays, schema=table.schema)

    def decode(self, files: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8] | RowError]:
        """Decodes files to squares at the model's size.

        Args:
            files: The bytes of each, uint8 of shape (size,).

        Returns:
            uint8 (crop, crop, 3) of each, or why there is none.
        """
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about buffers that may not be written to
            encoded = [torch.from_numpy(file) for file in files]
        try:
            with torch.inference_mode():
                images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
                squares = torch.stack([self._square(image) for image in images])
                return list(squares.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        except RuntimeError:
            # One file that the device does not take, or too many for its memory, and the whole batch is refused.
            if len(files) > 1:
                middle = len(files) // 2
                return self.decode(files[:middle]) + self.decode(files[middle:])
        try:
            return [decode(files[0].tobytes(), self._preprocess, self._transform)]
        except RowFailure as exc:
            return [exc.error]

    def _square(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        side = [self._transform.resize]
        mode = InterpolationMode(self._transform.interpolation)
        smaller = functional.resize(image, side, interpolation=mode, antialias=True)
        square: torch.Tensor = functional.center_crop(smaller, [self._transform.crop, self._transform.crop])
        return square
