"""Preparation of a shard in a CPU task: fetch, decode and preprocess its images.

A bad image raises nothing here: its failure becomes a value that travels with its row.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from batch_inference.config import PreprocessConfig, StorageConfig
from batch_inference.errors import NOT_TRIED, SYSTEMIC_ERROR_TYPES, BatchInferenceError, RowError, RowFailure
from batch_inference.images.decode import is_plain_jpeg
from batch_inference.images.pixels import GPU_FILTERS, Pixels, pixels_of
from batch_inference.images.sandbox import SandboxedFunction, SandboxedGenerator, decode_limits
from batch_inference.images.transform import Transform
from batch_inference.images.watchdog import Watchdog
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.parquet import RowSelection, RowValue, Unpack, unpack_in_process
from batch_inference.inputs.reads import CoalescedRead, FetchedInput, SkippedRead, fetch_inputs
from batch_inference.pipeline.schemas import PREPARED_SCHEMA, pixel_column
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.read_ahead import Answer

#: Turns the bytes of a file into pixels; raises RowError if it cannot.
Decode: TypeAlias = Callable[[bytes], Pixels]
#: Bytes of pixels in one table, by default: small enough that actors start while the rest of the shard is still being decoded.
BLOCK_BYTES = 4 * 1024 * 1024
_BLOCK_ROWS = 256
# After this many systemic failures and nothing else, a task reports, and stops asking the store for the rest of its shard.
_FAILED_ROWS = 64


@dataclass(frozen=True)
class Preparation:
    """Settings of the tasks that prepare shards; small, since each task gets a copy.

    Attributes:
        storage: How to reach the inputs.
        preprocess: Limits and orientation.
        transform: Resize and crop to the model's size; None: images keep their own size (predictor classes).
        block_bytes: Bytes of pixels at which a table is passed on.
        allowlist: Locations that inputs are restricted to; None: no restriction.
        hang_s: Seconds of wall time after which a decoder that hangs is stopped; None: the default of
            :func:`~batch_inference.images.sandbox.decode_limits`.
        batch_rows: Rows that Ray joins for one call of the predictor, where images keep their own size; None: all have one size.
    """

    storage: StorageConfig
    preprocess: PreprocessConfig
    transform: Transform | None
    block_bytes: int = BLOCK_BYTES
    allowlist: Allowlist | None = None
    hang_s: float | None = None
    batch_rows: int | None = None

    def rows(
        self, shard: int, uris: list[str], locations: pa.Table | None = None, *, careful: bool = False
    ) -> Iterator[pa.Table]:
        """Prepare one shard.

        Args:
            shard: Its number.
            uris: Its inputs, in order of their rows.
            locations: ETags of the objects and byte ranges of members, as for :func:`~batch_inference.inputs.coalesce.plan_reads`.
            careful: Whether an earlier task died of this shard, so that images are decoded in processes of their own.

        Yields:
            Tables of :data:`PREPARED_SCHEMA`; ``pixels`` is RGB uint8, height x width x 3, row by row, or a JPEG file where
            ``height`` is 0 (``preprocess.decoder: gpu``). ``image_damage`` says what is wrong with one that
            ``preprocess.damaged: accept`` lets pass. Rows come in their order, members of a file in the order of the file.
        """
        fetcher = Fetcher.of_process(self.storage)
        fetcher.collect_retries()  # drop those of another task
        streak = FailureStreak()
        block = BlockBuilder(shard, self.block_bytes)
        with contextlib.ExitStack() as stack:
            threads = 1 if careful else max(1, int(self.preprocess.cpus_per_task))
            decode, unpack = self._sandboxed(stack) if careful else self._in_process(stack)
            reads = self._reads(uris, locations, fetcher, streak, unpack)
            files = stack.enter_context(contextlib.closing(fetch_inputs(reads, self.storage.fetch_concurrency)))
            images = (
                self._decode_inline(files, streak, decode)
                if threads == 1
                else self._decode_on_threads(threads, files, streak, decode)
            )
            for image in stack.enter_context(contextlib.closing(images)):
                block.add(image, uris[image.row])
                if block.full:
                    yield block.table(fetcher.collect_retries())
                    block = BlockBuilder(shard, self.block_bytes)
        if block.images:
            yield block.table(fetcher.collect_retries())

    def _reads(
        self, uris: list[str], locations: pa.Table | None, fetcher: Fetcher, streak: FailureStreak, unpack: Unpack
    ) -> Iterator[CoalescedRead]:
        """Yield the reads of a shard; after a streak of systemic failures, yield the rest as failed without trying."""
        for read in plan_reads(uris, locations, fetcher, self.preprocess.max_bytes, self.allowlist, unpack):
            if streak.hopeless and streak.last is not None:
                # Such a row never reaches an errors table: its shard is not committed.
                yield SkippedRead(read.rows, replace(streak.last, error_type=NOT_TRIED))
            else:
                yield read

    def _sandboxed(self, stack: contextlib.ExitStack) -> tuple[Decode, Unpack]:
        """Return functions that decode and unpack in helper processes, which may die; two, since unpacking waits for decoding."""
        limits = decode_limits(self.preprocess, self.hang_s)
        decode = partial(pixels_of, config=self.preprocess, transform=self.transform)
        return (
            stack.enter_context(SandboxedFunction(decode, limits)),
            stack.enter_context(SandboxedGenerator(unpack_in_process, limits)),
        )

    def _in_process(self, stack: contextlib.ExitStack) -> tuple[Decode, Unpack]:
        """Return functions that decode and unpack in this process; a watchdog ends the process if either hangs."""
        watchdog = Watchdog(decode_limits(self.preprocess, self.hang_s))
        stack.callback(watchdog.stop)

        def decode(data: bytes) -> Pixels:
            with watchdog:
                return self._pixels(data)

        def unpack(pages: RowSelection, take: Callable[[], Answer]) -> Iterator[RowValue]:
            def untimed() -> Answer:
                with watchdog.paused():
                    return take()

            values = unpack_in_process(pages, untimed)
            while True:
                with watchdog:
                    value = next(values, None)
                if value is None:
                    return
                yield value

        return decode, unpack

    def _decode_inline(
        self, files: Iterator[FetchedInput], streak: FailureStreak, decode: Decode
    ) -> Generator[_PreparedImage, None, None]:
        """Decode files one after the other on this thread."""
        for file in files:
            image = self._prepare(file, decode)
            streak.add(image.failure)
            yield image

    def _decode_on_threads(
        self, threads: int, files: Iterator[FetchedInput], streak: FailureStreak, decode: Decode
    ) -> Generator[_PreparedImage, None, None]:
        """Decode files on threads; yield the images in the order of the files."""
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        waiting: deque[Future[_PreparedImage]] = deque()
        try:
            while True:
                # Decoded images can be large: no more of them wait for their turn than keep the threads busy.
                for file in itertools.islice(files, 2 * threads - len(waiting)):
                    waiting.append(pool.submit(self._prepare, file, decode))
                if not waiting:
                    return
                image = waiting.popleft().result()
                streak.add(image.failure)
                yield image
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, file: FetchedInput, decode: Decode) -> _PreparedImage:
        """Decode one file, unless fetching it has failed."""
        image = _PreparedImage(file.row, None, file.error, len(file.data), file.seconds, 0.0)
        if file.error is None:
            start = time.perf_counter()
            try:
                image.pixels, image.damage = decode(file.data)
            except RowError as exc:
                image.failure = exc.error
            except BatchInferenceError:
                raise
            except Exception as exc:  # a bug here must cost one row, not a job
                image.failure = RowError("preprocess", "UNEXPECTED", f"{type(exc).__name__}: {exc}").error
            image.decode_s = time.perf_counter() - start
        return image

    def _pixels(self, data: bytes) -> Pixels:
        """Return the pixels of a file, or a JPEG file as it is if the actor's device decodes it."""
        resizable = self.transform is not None and self.transform.interpolation in GPU_FILTERS
        if self.preprocess.decoder == "gpu" and resizable and is_plain_jpeg(data, self.preprocess):
            return Pixels(np.frombuffer(data, np.uint8))
        return pixels_of(data, self.preprocess, self.transform)


class FailureStreak:
    """Rows of a shard that have all failed for a systemic reason.

    Attributes:
        last: The last such failure.
    """

    def __init__(self) -> None:
        self._count = 0
        self._broken = False
        self.last: RowFailure | None = None

    def add(self, failure: RowFailure | None) -> None:
        """Record the outcome of a row that was tried; None for success."""
        if failure is not None and failure.error_type in SYSTEMIC_ERROR_TYPES:
            self._count, self.last = self._count + 1, failure
        else:
            self._broken = True

    @property
    def hopeless(self) -> bool:
        """Whether asking the store for more of this shard only costs time."""
        return not self._broken and self._count >= _FAILED_ROWS


@dataclass(slots=True)
class _PreparedImage:
    """One row of a shard: its pixels, or its failure.

    Attributes:
        row: Row number in the shard.
        pixels: RGB uint8 (height, width, 3); or a file, uint8 (size,); None if it failed.
        failure: Why there are no pixels.
        bytes: Size of the file.
        fetch_s: Seconds of fetching.
        decode_s: Seconds of decoding.
        damage: What is wrong with an image that was accepted all the same.
    """

    row: int
    pixels: np.ndarray | None
    failure: RowFailure | None
    bytes: int
    fetch_s: float
    decode_s: float
    damage: str | None = None


class BlockBuilder:
    """Gathers rows until they make a table of a good size.

    Args:
        shard: Number of their shard.
        max_bytes: Bytes of pixels at which the table is full.
    """

    def __init__(self, shard: int, max_bytes: int) -> None:
        self.shard = shard
        self.max_bytes = max_bytes
        self.images: list[_PreparedImage] = []
        self._uris: list[str] = []
        self._bytes = 0

    def add(self, image: _PreparedImage, uri: str) -> None:
        """Append one row."""
        self.images.append(image)
        self._uris.append(uri)
        if image.pixels is not None:
            self._bytes += image.pixels.nbytes

    @property
    def full(self) -> bool:
        """Whether the table is to be passed on now."""
        # If nothing works the driver must know soon, and not after a shard of timeouts.
        max_rows = _BLOCK_ROWS if self._bytes else _FAILED_ROWS
        return self._bytes >= self.max_bytes or len(self.images) >= max_rows

    def table(self, retries: int) -> pa.Table:
        """Return the rows so far, of :data:`PREPARED_SCHEMA`.

        Args:
            retries: Retries of the fetcher, which belong to no row in particular; the first row carries them.
        """
        images = self.images
        failures = [i.failure for i in images]
        columns = [
            [self.shard] * len(images),
            [i.row for i in images],
            [f and f.stage for f in failures],
            [f and f.error_type for f in failures],
            [f and f.message for f in failures],
            [bool(f and f.retryable) for f in failures],
            self._uris,
            pixel_column([i.pixels for i in images]),
            [0 if i.pixels is None or i.pixels.ndim == 1 else i.pixels.shape[0] for i in images],
            [0 if i.pixels is None or i.pixels.ndim == 1 else i.pixels.shape[1] for i in images],
            [i.bytes for i in images],
            [i.fetch_s for i in images],
            [i.decode_s for i in images],
            [retries] + [0] * (len(images) - 1),
            [i.damage for i in images],
        ]
        arrays = [
            c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, PREPARED_SCHEMA, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=PREPARED_SCHEMA)
