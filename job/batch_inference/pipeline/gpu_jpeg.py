"""JPEG files decoded and resized on an actor's device, for nodes that have too few CPU cores for their GPUs.

The tasks then only fetch files and read headers. The actor decodes a batch at a time with nvJPEG, and resizes it on the device with
the weights' own antialiased filter. Only the small squares come back, so later steps are the same as without it.
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
from batch_inference.errors import RowError, RowFailure
from batch_inference.images.pixels import decode
from batch_inference.images.transform import Transform
from batch_inference.pipeline.schemas import pixel_column, with_failures

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GpuJpegFactory:
    """Makes the decoder in the actor's process."""

    inference: InferenceConfig
    preprocess: PreprocessConfig
    transform: Transform

    def __call__(self) -> GpuJpeg:
        """Return the decoder on the actor's device."""
        from batch_inference.models.predictor import set_up_actor_device

        return GpuJpeg(self.preprocess, self.transform, set_up_actor_device(self.inference))


class GpuJpeg:
    """Decodes the rows of a table that still hold files.

    Pixels differ from those of :func:`~batch_inference.images.pixels.decode`: another inverse DCT, another chroma upsampling. The
    mean difference is at most 2 of 255 (`tests/unit/pipeline/test_gpu_jpeg.py`, on a GPU).

    Args:
        preprocess: Limits and orientation for files that the device does not decode, which are decoded on the CPU.
        transform: Resize and crop that the model expects.
        device: Where to decode; on ``cpu`` libjpeg-turbo replaces nvJPEG, for tests without a GPU.
    """

    def __init__(self, preprocess: PreprocessConfig, transform: Transform, device: torch.device) -> None:
        self._preprocess = preprocess
        self._transform = transform
        self._device = device

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace files by pixels.

        Args:
            table: Rows of ``PREPARED_SCHEMA``; those of height 0 hold a file in ``pixels``.

        Returns:
            As many rows, each with RGB uint8 pixels (crop, crop, 3) or a failure.
        """
        heights = table["height"].to_numpy()
        indices = np.flatnonzero((heights == 0) & table["pixels"].is_valid().to_numpy())
        if not len(indices):
            return table
        start = time.perf_counter()
        rows: list[NDArray[np.uint8] | None] = [
            np.frombuffer(value.as_buffer(), np.uint8) if value.is_valid else None
            for chunk in table["pixels"].chunks
            for value in chunk
        ]
        failures: dict[int, RowFailure] = {}
        for index, decoded in zip(indices.tolist(), self.decode([rows[i] for i in indices]), strict=True):  # type: ignore[misc]
            rows[index] = decoded if isinstance(decoded, np.ndarray) else None
            if isinstance(decoded, RowFailure):
                failures[index] = decoded
        new_heights = heights.copy()
        new_heights[indices] = [0 if rows[i] is None else self._transform.crop for i in indices]
        widths = table["width"].to_numpy().copy()
        widths[indices] = new_heights[indices]
        decode_s = table["decode_s"].to_numpy().copy()
        decode_s[indices] += (time.perf_counter() - start) / len(indices)
        changed = {
            "pixels": pixel_column(rows),
            "height": pa.array(new_heights),
            "width": pa.array(widths),
            "decode_s": pa.array(decode_s),
        }
        changed |= with_failures(table, failures)
        arrays = [changed.get(name, table[name]) for name in table.column_names]
        return pa.Table.from_arrays(arrays, schema=table.schema)

    def decode(self, files: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8] | RowFailure]:
        """Decode files to squares of the model's size.

        Args:
            files: The bytes of each, uint8 of shape (size,).

        Returns:
            RGB uint8 (crop, crop, 3) of each, or its failure.
        """
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about read-only buffers
            encoded = [torch.from_numpy(file) for file in files]
        try:
            with torch.inference_mode():
                images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
                squares = torch.stack([self._square(image) for image in images])
                return list(squares.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        except RuntimeError:
            # One file that the device does not decode, or too many for its memory, fails the whole batch.
            if len(files) > 1:
                middle = len(files) // 2
                return self.decode(files[:middle]) + self.decode(files[middle:])
        try:
            return [decode(files[0].tobytes(), self._preprocess, self._transform)]
        except RowError as exc:
            return [exc.error]

    def _square(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        side = [self._transform.resize]
        mode = InterpolationMode(self._transform.interpolation)
        smaller = functional.resize(image, side, interpolation=mode, antialias=True)
        square: torch.Tensor = functional.center_crop(smaller, [self._transform.crop, self._transform.crop])
        return square
