"""Fetch, decode and preprocess: what a CPU task does with a shard.

Nothing here raises for the sake of an image: what fails becomes a value that travels with its row.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from batch_inference.config import PreprocessConfig, StorageConfig
from batch_inference.decoding import GPU_FILTERS, Pixels, pixels_of
from batch_inference.errors import NOT_TRIED, SYSTEMIC_ERROR_TYPES, BatchInferenceError, RowError, RowFailure
from batch_inference.fetcher import Answer, Fetcher
from batch_inference.images import is_plain_jpeg
from batch_inference.isolation import Helper, Watch
from batch_inference.members import runs
from batch_inference.parquet_files import Pages, Unpack, Value, unpacked
from batch_inference.prefixes import Prefixes
from batch_inference.runs import Failed, Fetched, Run, fetched
from batch_inference.transform import Transform

Decode: TypeAlias = Callable[[bytes], Pixels]

# What travels from the CPU tasks to the actors. Pixels are plain bytes rather than a tensor column: rows that failed
# have none, images of different sizes need no common type, and the actor reads them without a copy.
PREPARED_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("uri", pa.string()),
        ("pixels", pa.large_binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("retryable", pa.bool_()),
        ("bytes", pa.int64()),
        ("fetch_s", pa.float32()),
        ("decode_s", pa.float32()),
        ("retries", pa.int32()),
        ("image_damage", pa.string()),
    ]
)
# Blocks of about this size let the actors start while the rest of the shard is still being decoded.
BLOCK_BYTES = 4 * 1024 * 1024
_BLOCK_ROWS = 256
# After so many systemic failures and nothing else, a task reports, and stops asking the store for the rest of its shard.
_FAILED_ROWS = 64


@dataclass(frozen=True)
class Preparation:
    """Everything a task needs to know; small, since it travels with each.

    Attributes:
        storage: How to reach the inputs.
        preprocess: Limits and orientation.
        transform: Resize and crop to the model's size, or None to pass images on as they are (custom predictors).
        block_bytes: A table is passed on when its pixels have so many bytes.
        prefixes: Where inputs may lie; None: anywhere.
        hang_s: Seconds by the clock after which a decoder that hangs is ended; None: as :class:`~batch_inference.isolation.Helper` says.
        batch_rows: Rows that Ray joins for a call of the predictor, where images come at their own size; None: it need not be known.
    """

    storage: StorageConfig
    preprocess: PreprocessConfig
    transform: Transform | None
    block_bytes: int = BLOCK_BYTES
    prefixes: Prefixes | None = None
    hang_s: float | None = None
    batch_rows: int | None = None

    def rows(
        self, shard: int, uris: list[str], places: pa.Table | None = None, *, careful: bool = False
    ) -> Iterator[pa.Table]:
        """Prepares one shard.

        Args:
            shard: Its number.
            uris: Its inputs, in order of their rows.
            places: Which versions are meant and where members of files lie, as for :func:`~batch_inference.members.runs`.
            careful: Whether an earlier task died of this shard, so that each image is decoded where it can do no harm.

        Yields:
            Tables of :data:`PREPARED_SCHEMA`; ``pixels`` is RGB uint8, height x width x 3, row by row, or a JPEG file where
            ``height`` is 0 (``preprocess.gpu_jpeg``). ``image_damage`` says what is wrong with one that
            ``preprocess.damaged: accept`` lets pass. Rows come in their order, members of a file in that of the file.
        """
        fetcher = Fetcher.of_process(self.storage)
        fetcher.take_retries()  # another task's
        streak = _Streak()
        block = _Block(shard, self.block_bytes)
        with contextlib.ExitStack() as stack:
            threads = 1 if careful else max(1, int(self.preprocess.cpus_per_task))
            pixels, unpack = self._alone(stack) if careful else self._here(stack)
            asked = self._runs(uris, places, fetcher, streak, unpack)
            inputs = stack.enter_context(contextlib.closing(fetched(asked, self.storage.fetch_concurrency)))
            decoded = (
                self._one_by_one(inputs, streak, pixels)
                if threads == 1
                else self._on_threads(threads, inputs, streak, pixels)
            )
            for item in stack.enter_context(contextlib.closing(decoded)):
                block.add(item, uris[item.row])
                if block.full:
                    yield block.table(fetcher.take_retries())
                    block = _Block(shard, self.block_bytes)
        if block.items:
            yield block.table(fetcher.take_retries())

    def _runs(
        self, uris: list[str], places: pa.Table | None, fetcher: Fetcher, streak: _Streak, unpack: Unpack
    ) -> Iterator[Run]:
        """What to fetch, up to where asking the store for more only costs time."""
        for run in runs(uris, places, fetcher, self.preprocess.max_bytes, self.prefixes, unpack):
            if streak.hopeless and streak.last is not None:
                # Not a fate of its own: a shard with such a row is never committed.
                yield Failed(run.rows, replace(streak.last, error_type=NOT_TRIED))
            else:
                yield run

    def _alone(self, stack: contextlib.ExitStack) -> tuple[Decode, Unpack]:
        """Decoding and unpacking in processes that may die of it; two, since one of them waits for the other."""
        images = stack.enter_context(Helper(self.preprocess, self.transform, self.hang_s))
        return images.pixels, stack.enter_context(Helper(self.preprocess, None, self.hang_s)).unpack

    def _here(self, stack: contextlib.ExitStack) -> tuple[Decode, Unpack]:
        """Decoding and unpacking in this process, which ends where either does not."""
        watch = Watch(self.preprocess.decode_timeout_s, self.hang_s)
        stack.callback(watch.end)

        def pixels(data: bytes) -> Pixels:
            with watch:
                return self._pixels(data)

        def unpack(pages: Pages, take: Callable[[], Answer]) -> Iterator[Value]:
            def untimed() -> Answer:
                with watch.paused():
                    return take()

            values = unpacked(pages, untimed)
            while True:
                with watch:
                    value = next(values, None)
                if value is None:
                    return
                yield value

        return pixels, unpack

    def _one_by_one(
        self, inputs: Iterator[Fetched], streak: _Streak, pixels: Decode
    ) -> Generator[_Prepared, None, None]:
        for one in inputs:
            item = self._decode(one, pixels)
            streak.add(item.error)
            yield item

    def _on_threads(
        self, threads: int, inputs: Iterator[Fetched], streak: _Streak, pixels: Decode
    ) -> Generator[_Prepared, None, None]:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        waiting: deque[Future[_Prepared]] = deque()
        try:
            while True:
                # Decoded images can be large: no more wait for their turn than keep the threads busy.
                for one in itertools.islice(inputs, 2 * threads - len(waiting)):
                    waiting.append(pool.submit(self._decode, one, pixels))
                if not waiting:
                    return
                item = waiting.popleft().result()
                streak.add(item.error)
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, one: Fetched, pixels: Decode) -> _Prepared:
        out = _Prepared(one.row, None, one.error, len(one.data), one.seconds, 0.0)
        if one.error is None:
            start = time.perf_counter()
            try:
                out.pixels, out.damaged = pixels(one.data)
            except RowFailure as exc:
                out.error = exc.error
            except BatchInferenceError:
                raise
            except Exception as exc:  # a bug here must cost one row, not a job
                out.error = RowFailure("preprocess", "UNEXPECTED", f"{type(exc).__name__}: {exc}").error
            out.decode_s = time.perf_counter() - start
        return out

    def _pixels(self, data: bytes) -> Pixels:
        on_gpu = self.preprocess.gpu_jpeg and self.transform is not None and self.transform.interpolation in GPU_FILTERS
        if on_gpu and is_plain_jpeg(data, self.preprocess):
            return Pixels(np.frombuffer(data, np.uint8))
        return pixels_of(data, self.preprocess, self.transform)


class _Streak:
    """Remembers whether everything so far failed for a reason of the system's."""

    def __init__(self) -> None:
        self._count = 0
        self._well = False
        self.last: RowError | None = None

    def add(self, error: RowError | None) -> None:
        """Takes what became of a row that was tried."""
        if error is not None and error.error_type in SYSTEMIC_ERROR_TYPES:
            self._count, self.last = self._count + 1, error
        else:
            self._well = True

    @property
    def hopeless(self) -> bool:
        """Whether asking the store for more of this shard only costs time."""
        return not self._well and self._count >= _FAILED_ROWS


@dataclass(slots=True)
class _Prepared:
    row: int
    pixels: np.ndarray | None
    error: RowError | None
    bytes: int
    fetch_s: float
    decode_s: float
    damaged: str | None = None


class _Block:
    """Rows on their way into one table."""

    def __init__(self, shard: int, limit: int) -> None:
        self.shard = shard
        self.limit = limit
        self.items: list[_Prepared] = []
        self._uris: list[str] = []
        self._size = 0

    def add(self, item: _Prepared, uri: str) -> None:
        self.items.append(item)
        self._uris.append(uri)
        if item.pixels is not None:
            self._size += item.pixels.nbytes

    @property
    def full(self) -> bool:
        # Where nothing works the driver must hear of it soon, and not after a shard of time-outs.
        rows = _BLOCK_ROWS if self._size else _FAILED_ROWS
        return self._size >= self.limit or len(self.items) >= rows

    def table(self, retries: int) -> pa.Table:
        """The rows so far; the first one carries the retries, which belong to no row in particular."""
        items = self.items
        errors = [i.error for i in items]
        columns = [
            [self.shard] * len(items),
            [i.row for i in items],
            self._uris,
            pixel_column([i.pixels for i in items]),
            [0 if i.pixels is None or i.pixels.ndim == 1 else i.pixels.shape[0] for i in items],
            [0 if i.pixels is None or i.pixels.ndim == 1 else i.pixels.shape[1] for i in items],
            [e and e.stage for e in errors],
            [e and e.error_type for e in errors],
            [e and e.message for e in errors],
            [bool(e and e.retryable) for e in errors],
            [i.bytes for i in items],
            [i.fetch_s for i in items],
            [i.decode_s for i in items],
            [retries] + [0] * (len(items) - 1),
            [i.damaged for i in items],
        ]
        arrays = [
            c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, PREPARED_SCHEMA, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=PREPARED_SCHEMA)


def pixel_column(images: list[np.ndarray | None]) -> pa.Array:
    """The bytes of arrays of any shape as an Arrow column, null where there is none; each is copied once.

    Args:
        images: uint8, C-contiguous.
    """
    values = np.empty(sum(image.nbytes for image in images if image is not None), np.uint8)
    ends = [0]
    for image in images:
        start = ends[-1]
        if image is not None:
            values[start : start + image.nbytes] = image.reshape(-1)
            start += image.nbytes
        ends.append(start)
    failed = [image is None for image in images]
    valid = pa.py_buffer(np.packbits(~np.array(failed), bitorder="little").tobytes()) if any(failed) else None
    buffers = [valid, pa.py_buffer(np.array(ends, np.int64)), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_binary(), len(failed), buffers)
