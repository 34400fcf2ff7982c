"""Run a network on a device: uint8 images in, arrays out, in batches that fit into its memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from batch_inference.errors import RowError
from batch_inference.images.transform import Transform
from batch_inference.models.batch_size import BatchSize, is_out_of_memory, search_batch_size
from batch_inference.telemetry.metrics import meter

log = logging.getLogger(__name__)
# Ray's arrays are read-only views of its shared memory. Nothing here writes to them, and copying all pixels to silence torch would
# cost more than normalizing them.
warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable", category=UserWarning)

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# ``compile: auto`` compiles only if at least this many seconds of work are left; compiling takes up to a minute.
_MIN_WORK_TO_COMPILE_S = 1800.0
# Images that are run before timing starts, and images that are timed.
_WARM_UP_IMAGES, _TIMED_IMAGES = 64, 512
# Compiled code is kept if an image takes at most this share of the time without compiling; its results differ slightly.
_MAX_COMPILED_TIME = 0.97


class Execution:
    """A network on a device, called with images.

    Args:
        network: Network in evaluation mode, from float32 (n, 3, h, w) to any output. It is moved to the device, and copied if
            its weights are converted.
        transform: Transform that normalizes the pixels.
        device: Device to run on.
        postprocess: Called with the network's output while it is on the device; returns tensors with one row per image.
        precision: ``float32``, ``bfloat16`` or ``float16``. Weights are converted, which is faster than autocast. Networks that
            cannot run with converted weights, and programs of ``torch.export``, run under autocast.
        compile: Whether to use ``torch.compile``. None compiles if ``images`` are enough work for it to pay, and keeps the
            compiled network if it is faster.
        batch_size: Images per batch; None: all images of a call.
        images: Approximate number of images in total; 0 if unknown.
    """

    def __init__(
        self,
        network: nn.Module,
        transform: Transform,
        device: torch.device,
        postprocess: Callable[[Any], tuple[torch.Tensor, ...]],
        *,
        precision: str = "float32",
        compile: bool | None = False,
        batch_size: int | None = None,
        images: int = 0,
    ) -> None:
        self.device = device
        self.precision = precision
        self.batch_size = None if batch_size is None else BatchSize(batch_size)
        self._transform = transform
        self._postprocess = postprocess
        self._dtype = _DTYPES[precision]
        self._autocast = False
        self._network = network.to(device)
        if self._dtype is not None:
            self._convert_weights()
        # Convolutions are fastest in this layout, and the pixels have it already.
        self._network = self._network.to(memory_format=torch.channels_last)
        self._forward = cast(Callable[[torch.Tensor], Any], self._network)
        self._compiled = compile is True
        if self._compiled:
            self._forward = cast(Callable[[torch.Tensor], Any], torch.compile(self._network))
        self._stopwatch = _Stopwatch(images) if compile is None else None
        self._eager_s = 0.0
        self._stager = _Stager(device) if device.type == "cuda" else None

    def __call__(self, pixels: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """Run the network on images.

        A batch that runs out of memory is halved, and so are the following batches, until 64 of them in a row have fit.

        Args:
            pixels: Images as uint8 (n, h, w, 3), with n at least 1.

        Returns:
            The tensors of ``postprocess`` as arrays with n rows each.

        Raises:
            RowError: ``infer OUT_OF_MEMORY`` if a single image does not fit.
        """
        parts: list[tuple[torch.Tensor, ...]] = []
        start = 0
        started = time.perf_counter()
        with torch.inference_mode():
            while start < len(pixels):
                size = len(pixels) if self.batch_size is None else self.batch_size.current
                chunk = pixels[start : start + size]
                outputs = self._run_unless_out_of_memory(chunk, size)
                if isinstance(outputs, str):
                    # Not inside `except`: the exception's frames keep the tensors that did not fit.
                    self.free()
                    if len(chunk) == 1:
                        raise RowError(
                            "infer", "OUT_OF_MEMORY", f"no memory for a single image: {outputs}", retryable=True
                        )
                    self.batch_size = self.batch_size or BatchSize(len(pixels))
                    self.batch_size.halve(len(chunk))
                    meter.add("out_of_memory_splits")
                    log.warning(
                        "no memory for %d images at once, going on with %d", len(chunk), self.batch_size.current
                    )
                    continue
                parts.append(outputs)
                start += len(chunk)
                if self.batch_size is not None:
                    self.batch_size.record_success()
            columns = [torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True)]
            arrays = [_to_numpy(column) for column in columns]
        if self._stopwatch is not None:
            self._decide_compiling(len(pixels), time.perf_counter() - started)
        return arrays

    def warm_up(self, side: int) -> None:
        """Run a batch of black images of ``side`` x ``side`` pixels, so that the first real batch does not wait for libraries to load."""
        size = 1
        if self.batch_size is not None and (self.device.type != "cpu" or self._compiled):
            size = self.batch_size.current
        with contextlib.suppress(RowError):
            self(np.zeros((size, side, side, 3), np.uint8))

    def find_batch_size(self, side: int) -> int:
        """Find the best batch size for images of ``side`` x ``side`` pixels on a CUDA device, use it and return it.

        Uses :func:`~batch_inference.models.batch_size.search_batch_size`.
        """
        free, _ = torch.cuda.mem_get_info(self.device)
        idle = torch.cuda.memory_allocated(self.device)
        size = search_batch_size(
            lambda size: self._measure_batch(size, side), idle, free + torch.cuda.memory_reserved(self.device)
        )
        self.free()
        self.batch_size = BatchSize(size)
        return size

    def free(self) -> None:
        """Return unused memory of the allocator to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure_batch(self, size: int, side: int) -> tuple[float, int]:
        """Return the seconds that a batch takes, the mean of three, and the peak memory in bytes."""
        pixels = np.zeros((size, side, side, 3), np.uint8)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.inference_mode():
            self._run(pixels, size)
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(3):
                self._run(pixels, size)
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / 3, torch.cuda.max_memory_allocated(self.device)

    def _run_unless_out_of_memory(self, chunk: NDArray[np.uint8], size: int) -> tuple[torch.Tensor, ...] | str:
        """Run a batch; return the message of the exception if it runs out of memory."""
        try:
            return self._run(chunk, size)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            return " ".join(str(exc).split())[:200] or type(exc).__name__

    def _run(self, chunk: NDArray[np.uint8], size: int) -> tuple[torch.Tensor, ...]:
        """Run a batch of at most ``size`` images."""
        count = len(chunk)
        # A new shape costs a compilation, or a search for the fastest kernels: the last batch is padded.
        fixed_shape = self._compiled or self._stager is not None
        if self._stager is not None:
            batch = self._stager(chunk, size if fixed_shape else count)
        else:
            batch = torch.from_numpy(np.ascontiguousarray(chunk))
            if fixed_shape and count < size:
                batch = torch.cat([batch, batch.new_zeros(size - count, *batch.shape[1:])])
        images = self._transform.normalize(batch)
        if self._dtype is None:
            output = self._forward(images)
        elif self._autocast:
            with torch.autocast(self.device.type, dtype=self._dtype):
                output = self._forward(images)
        else:
            output = self._forward(images.to(self._dtype))
        parts = self._postprocess(output)
        return tuple(part[:count] for part in parts) if fixed_shape and count < size else parts

    def _convert_weights(self) -> None:
        """Convert the weights, or fall back to autocast if the network does not run with converted weights."""
        from batch_inference.models.exported import ExportedNetwork

        if isinstance(self._network, ExportedNetwork):
            self._autocast = True
            return
        converted = copy.deepcopy(self._network).to(self._dtype)
        side = self._transform.crop
        try:
            with torch.inference_mode():
                converted(torch.zeros((1, 3, side, side), dtype=self._dtype, device=self.device))
            self._network = converted
        except Exception as exc:
            if is_out_of_memory(exc):
                raise
            # For example because of float32 constants between its layers.
            self._autocast = True

    def _decide_compiling(self, images: int, seconds: float) -> None:
        """Decide on ``compile: auto``: compile if much work is left, and keep the faster of both networks."""
        stopwatch = self._stopwatch
        assert stopwatch is not None  # noqa: S101
        image_s = stopwatch.add(images, seconds)
        if image_s is None:
            return
        if self._compiled:
            if image_s > _MAX_COMPILED_TIME * self._eager_s:
                self._forward, self._compiled = self._network, False
            log.info("%.2f ms an image compiled, %.2f without", 1e3 * image_s, 1e3 * self._eager_s)
            self._stopwatch = None
        elif image_s * stopwatch.remaining < _MIN_WORK_TO_COMPILE_S:
            self._stopwatch = None
        else:
            self._eager_s = image_s
            self._try_compiling()

    def _try_compiling(self) -> None:
        compiled = cast(Callable[[torch.Tensor], Any], torch.compile(self._network))
        self._forward, self._compiled = compiled, True
        if self.batch_size is None:
            self.batch_size = BatchSize(_WARM_UP_IMAGES)
        try:
            side = self._transform.crop
            with torch.inference_mode():
                size = self.batch_size.current
                self._run(np.zeros((size, side, side, 3), np.uint8), size)
        except Exception as exc:
            # There may be no C++ compiler, or the network cannot be traced: the job can do without.
            log.warning("going on without torch.compile: %s", " ".join(str(exc).split())[:300])
            self._forward, self._compiled, self._stopwatch = self._network, False, None


class _Stopwatch:
    """Measures the seconds per image.

    Args:
        images: Number of images of the job.
    """

    def __init__(self, images: int) -> None:
        self.remaining = images
        self._warm = 0
        self._timed = 0
        self._seconds = 0.0

    def add(self, images: int, seconds: float) -> float | None:
        """Add a batch; return the seconds per image once 512 images were timed, and start again."""
        self.remaining -= images
        self._warm += images
        if self._warm > _WARM_UP_IMAGES:
            self._timed += images
            self._seconds += seconds
        if self._timed < _TIMED_IMAGES:
            return None
        image_s = self._seconds / self._timed
        self._warm, self._timed, self._seconds = 0, 0, 0.0
        return image_s


class _Stager:
    """Copies pixels to a CUDA device while it computes, with two page-locked buffers and its own stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def __call__(self, chunk: NDArray[np.uint8], size: int) -> torch.Tensor:
        """Copy uint8 (n, h, w, 3) on the host to (size, h, w, 3) on the device; images after the n-th are black."""
        turn, self._turn = self._turn, 1 - self._turn
        # The buffer is free once its last copy has arrived.
        self._copied[turn].synchronize()
        shape = (size, *chunk.shape[1:])
        buffer = self._buffers[turn]
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[turn] = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        buffer[: len(chunk)].copy_(torch.from_numpy(np.ascontiguousarray(chunk)))
        buffer[len(chunk) :].zero_()
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            batch = buffer.to(self._device, non_blocking=True)
            self._copied[turn].record(self._stream)
        current.wait_event(self._copied[turn])
        # The memory belongs to the copying stream, which must not reuse it before the computing stream is done.
        batch.record_stream(current)
        return batch


def _to_numpy(column: torch.Tensor) -> NDArray[Any]:
    return column.cpu().numpy()
