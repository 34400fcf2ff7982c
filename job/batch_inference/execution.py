"""A network at work on a device: uint8 images in, arrays out, in batches that fit."""

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

from batch_inference.batching import BatchSize, is_out_of_memory, search
from batch_inference.errors import RowFailure
from batch_inference.metrics import meter
from batch_inference.transform import Transform

log = logging.getLogger(__name__)
# Ray's arrays are views of its shared memory; nothing is written to them here, and copying all pixels to silence torch
# would cost more than normalizing them.
warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable", category=UserWarning)

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: ``compile: auto`` tries it where so many seconds of work are left, of which compiling takes about one.
_COMPILE_FROM_S = 1800.0
# Images that tell how fast a network is, and after how many the speed counts.
_WARM_IMAGES, _TIMED_IMAGES = 64, 512
# Compiled code that is not so much faster is not worth its differences.
_FASTER = 0.97


class Execution:
    """Runs a network over images.

    Args:
        network: In evaluation mode; it is moved to the device, and copied where its weights are converted.
        transform: For normalizing.
        device: Where it runs.
        finish: What to make of the network's output before it leaves the device: a tuple of tensors with one row an image.
        precision: ``float32``, ``bfloat16`` or ``float16``. Weights are converted, which is faster than autocast; programs
            that bring their own arithmetic (``torch.export``) run under autocast instead.
        compile: True, False, or None: tried where ``images`` promise that it pays, kept where it is faster.
        batch_size: Images at once; None: all that are given.
        images: About how many there will be; 0 if that is not known.
    """

    def __init__(
        self,
        network: nn.Module,
        transform: Transform,
        device: torch.device,
        finish: Callable[[Any], tuple[torch.Tensor, ...]],
        *,
        precision: str = "float32",
        compile: bool | None = False,
        batch_size: int | None = None,
        images: int = 0,
    ) -> None:
        self.device = device
        self.precision = precision
        self.batch = None if batch_size is None else BatchSize(batch_size)
        self._transform = transform
        self._finish = finish
        self._dtype = _DTYPES[precision]
        self._autocast = False
        self._network = network.to(device)
        if self._dtype is not None:
            self._lower()
        # The layout that convolutions are fast in; the pixels come in it anyway.
        self._network = self._network.to(memory_format=torch.channels_last)
        self._forward = cast(Callable[[torch.Tensor], Any], self._network)
        self._compiled = compile is True
        if self._compiled:
            self._forward = cast(Callable[[torch.Tensor], Any], torch.compile(self._network))
        self._watch = _Stopwatch(images) if compile is None else None
        self._eager_s = 0.0
        self._stager = _Stager(device) if device.type == "cuda" else None

    def __call__(self, pixels: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """Runs the network.

        A batch that the device has no memory for is halved, and so are those that follow, until many have worked.

        Args:
            pixels: uint8 (n, h, w, 3), n at least 1.

        Returns:
            What ``finish`` gives, with n rows each.

        Raises:
            RowFailure: ``infer OUT_OF_MEMORY`` if a single image does not fit.
        """
        parts: list[tuple[torch.Tensor, ...]] = []
        start = 0
        began = time.perf_counter()
        with torch.inference_mode():
            while start < len(pixels):
                size = len(pixels) if self.batch is None else self.batch.current
                chunk = pixels[start : start + size]
                done = self._attempt(chunk, size)
                if isinstance(done, str):
                    # Here and not where it was caught: the exception's frames hold on to what did not fit.
                    self.free()
                    if len(chunk) == 1:
                        raise RowFailure(
                            "infer", "OUT_OF_MEMORY", f"no memory for a single image: {done}", retryable=True
                        )
                    self.batch = self.batch or BatchSize(len(pixels))
                    self.batch.halve(len(chunk))
                    meter.add("out_of_memory_splits")
                    log.warning("no memory for %d images at once, going on with %d", len(chunk), self.batch.current)
                    continue
                parts.append(done)
                start += len(chunk)
                if self.batch is not None:
                    self.batch.worked()
            columns = [torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True)]
            arrays = [_to_numpy(column) for column in columns]
        if self._watch is not None:
            self._consider(len(pixels), time.perf_counter() - began)
        return arrays

    def warm_up(self, side: int) -> None:
        """Runs a batch of black images, so that the first real one is not the one to wait for libraries to load."""
        size = 1 if self.batch is None or (self.device.type == "cpu" and not self._compiled) else self.batch.current
        with contextlib.suppress(RowFailure):
            self(np.zeros((size, side, side, 3), np.uint8))

    def find_batch_size(self, side: int) -> int:
        """Searches the batch size for images of ``side`` squared on a CUDA device, and uses it."""
        free, _ = torch.cuda.mem_get_info(self.device)
        idle = torch.cuda.memory_allocated(self.device)
        found = search(lambda size: self._measure(size, side), idle, free + torch.cuda.memory_reserved(self.device))
        self.free()
        self.batch = BatchSize(found)
        return found

    def free(self) -> None:
        """Gives back the device's memory that is not in use."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, size: int, side: int) -> tuple[float, int]:
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

    def _attempt(self, chunk: NDArray[np.uint8], size: int) -> tuple[torch.Tensor, ...] | str:
        try:
            return self._run(chunk, size)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            return " ".join(str(exc).split())[:200] or type(exc).__name__

    def _run(self, chunk: NDArray[np.uint8], size: int) -> tuple[torch.Tensor, ...]:
        count = len(chunk)
        # A new shape costs a compilation, or a search for the fastest kernels: the last batch is filled up.
        fixed = self._compiled or self._stager is not None
        if self._stager is not None:
            batch = self._stager(chunk, size if fixed else count)
        else:
            batch = torch.from_numpy(np.ascontiguousarray(chunk))
            if fixed and count < size:
                batch = torch.cat([batch, batch.new_zeros(size - count, *batch.shape[1:])])
        images = self._transform.normalize(batch)
        if self._dtype is None:
            output = self._forward(images)
        elif self._autocast:
            with torch.autocast(self.device.type, dtype=self._dtype):
                output = self._forward(images)
        else:
            output = self._forward(images.to(self._dtype))
        parts = self._finish(output)
        return tuple(part[:count] for part in parts) if fixed and count < size else parts

    def _lower(self) -> None:
        """Converts the weights, or falls back to autocast where the network does not run with converted ones."""
        from batch_inference.exported import ExportedNetwork

        if isinstance(self._network, ExportedNetwork):
            self._autocast = True
            return
        lower = copy.deepcopy(self._network).to(self._dtype)
        side = self._transform.crop
        try:
            with torch.inference_mode():
                lower(torch.zeros((1, 3, side, side), dtype=self._dtype, device=self.device))
            self._network = lower
        except Exception as exc:
            if is_out_of_memory(exc):
                raise
            # Such as constants in float32 between its layers.
            self._autocast = True

    def _consider(self, images: int, seconds: float) -> None:
        """``compile: auto``: tries it when much work is left, and keeps what is faster."""
        watch = self._watch
        assert watch is not None  # noqa: S101
        each = watch.add(images, seconds)
        if each is None:
            return
        if self._compiled:
            if each > _FASTER * self._eager_s:
                self._forward, self._compiled = self._network, False
            log.info("%.2f ms an image compiled, %.2f without", 1e3 * each, 1e3 * self._eager_s)
            self._watch = None
        elif each * watch.left < _COMPILE_FROM_S:
            self._watch = None
        else:
            self._eager_s = each
            self._try_compiling()

    def _try_compiling(self) -> None:
        compiled = cast(Callable[[torch.Tensor], Any], torch.compile(self._network))
        self._forward, self._compiled = compiled, True
        if self.batch is None:
            self.batch = BatchSize(_WARM_IMAGES)
        try:
            side = self._transform.crop
            with torch.inference_mode():
                self._run(np.zeros((self.batch.current, side, side, 3), np.uint8), self.batch.current)
        except Exception as exc:
            # No C++ compiler, or something in the network that cannot be traced: the job does not need it.
            log.warning("going on without torch.compile: %s", " ".join(str(exc).split())[:300])
            self._forward, self._compiled, self._watch = self._network, False, None


class _Stopwatch:
    """Seconds an image, when enough have been seen; starts anew after each answer."""

    def __init__(self, images: int) -> None:
        self.left = images
        self._seen = 0
        self._timed = 0
        self._seconds = 0.0

    def add(self, images: int, seconds: float) -> float | None:
        self.left -= images
        self._seen += images
        if self._seen > _WARM_IMAGES:
            self._timed += images
            self._seconds += seconds
        if self._timed < _TIMED_IMAGES:
            return None
        each = self._seconds / self._timed
        self._seen, self._timed, self._seconds = 0, 0, 0.0
        return each


class _Stager:
    """Brings pixels to a CUDA device while it computes: two page-locked buffers, copied on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def __call__(self, chunk: NDArray[np.uint8], size: int) -> torch.Tensor:
        """uint8 (n, h, w, 3) on the host to (size, h, w, 3) on the device, black behind the n-th."""
        turn, self._turn = self._turn, 1 - self._turn
        # The buffer is free when its last copy has arrived.
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
        # Its memory belongs to the other stream, which may not use it again before this one is done.
        batch.record_stream(current)
        return batch


def _to_numpy(column: torch.Tensor) -> NDArray[Any]:
    return column.cpu().numpy()
