"""Fetch, decode and preprocess: what a CPU task does with a shard.

Nothing here raises for the sake of an image: what fails becomes a value that travels with its row.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from batch_inference.config import PreprocessConfig, StorageConfig
from batch_inference.decoding import decode
from batch_inference.errors import NOT_TRIED, SYSTEMIC_ERROR_TYPES, RowError, RowFailure
from batch_inference.images import open_image
from batch_inference.storage import Fetcher, canonical_uri
from batch_inference.transform import Transform

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
    ]
)
# Blocks of about this size let the actors start while the rest of the shard is still being decoded.
BLOCK_BYTES = 4 * 1024 * 1024
_BLOCK_ROWS = 256
# After so many systemic failures and nothing else, a task reports, and stops asking the store for the rest of its shard.
_FAILED_ROWS = 64
# Decoded images of one task that wait for their turn: a few large ones, or as many small ones as are fetched ahead.
_BACKLOG_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class Preparation:
    """Everything a task needs to know; small, since it travels with each.

    Attributes:
        storage: How to reach the inputs.
        preprocess: Limits and orientation.
        transform: Resize and crop to the model's size, or None to pass images on as they are (custom predictors).
    """

    storage: StorageConfig
    preprocess: PreprocessConfig
    transform: Transform | None

    def rows(self, shard: int, uris: list[str]) -> Iterator[pa.Table]:
        """Prepares one shard.

        Args:
            shard: Its number.
            uris: Its inputs, in order of their rows.

        Yields:
            Tables of :data:`PREPARED_SCHEMA`, rows in order; ``pixels`` is RGB uint8, height x width x 3, row by row.
        """
        fetcher = Fetcher(self.storage)
        threads = self.storage.fetch_concurrency
        # Threads wait for the store; no more than the task's CPUs decode at the same time.
        backlog = _Backlog(max(1, int(self.preprocess.cpus_per_task)), _BACKLOG_BYTES)
        streak = _Streak()
        block = _Block(shard)
        with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
            waiting: deque[Future[_Prepared]] = deque()
            inputs = enumerate(uris)
            try:
                while True:
                    for row, uri in itertools.islice(inputs, 2 * threads - len(waiting)):
                        waiting.append(pool.submit(self._one, row, uri, fetcher, backlog, streak))
                    if not waiting:
                        break
                    item = waiting.popleft().result()
                    backlog.release(item.size)
                    block.add(item)
                    if block.full:
                        yield block.table()
                        block = _Block(shard)
            finally:
                # A task that is stopped in the middle must not wait for threads that wait for their turn.
                backlog.open()
                pool.shutdown(wait=False, cancel_futures=True)
        if block.items:
            yield block.table()

    def _one(self, row: int, uri: str, fetcher: Fetcher, backlog: _Backlog, streak: _Streak) -> _Prepared:
        out = _Prepared(row, uri)
        if streak.hopeless and streak.last is not None:
            # Not a fate of its own: a shard with such a row is never committed.
            out.error = replace(streak.last, error_type=NOT_TRIED)
            return out
        start = time.perf_counter()
        try:
            try:
                canonical_uri(uri)
                if not uri:
                    raise RowFailure("list", "INVALID_URI", "the manifest has no URI in this line")
            except RowFailure:
                raise
            except Exception as exc:
                raise RowFailure("list", "INVALID_URI", str(exc)) from exc
            data = fetcher.fetch(uri, self.preprocess.max_bytes)
            out.bytes = len(data)
            out.fetch_s = time.perf_counter() - start
            backlog.enter(row)
            try:
                start = time.perf_counter()
                out.pixels = self._pixels(data)
                out.decode_s = time.perf_counter() - start
            finally:
                backlog.leave(out.size)
        except RowFailure as exc:
            out.error = exc.error
        except Exception as exc:  # a bug here must cost one row, not a job
            out.error = RowFailure("preprocess", "UNEXPECTED", f"{type(exc).__name__}: {exc}").error
        streak.add(out.error)
        return out

    def _pixels(self, data: bytes) -> np.ndarray:
        if self.transform is None:
            return np.asarray(open_image(data, self.preprocess))
        return decode(data, self.preprocess, self.transform)


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


class _Backlog:
    """Lets so many threads decode at a time, and keeps what waits for its turn within a number of bytes.

    The row whose turn it is never waits, so there is always one that moves on.
    """

    def __init__(self, slots: int, limit: int) -> None:
        self._slots = slots
        self._limit = limit
        self._decoding = 0
        self._bytes = 0
        self._turn = 0
        self._changed = threading.Condition()

    def enter(self, row: int) -> None:
        """Returns when ``row`` may be decoded."""
        with self._changed:
            self._changed.wait_for(
                lambda: (self._bytes < self._limit and self._decoding < self._slots) or row == self._turn
            )
            self._decoding += 1

    def leave(self, size: int) -> None:
        """Counts a decoded image of so many bytes."""
        with self._changed:
            self._decoding -= 1
            self._bytes += size
            self._changed.notify_all()

    def open(self) -> None:
        """Lets everybody pass; nobody takes what is decoded any more."""
        with self._changed:
            self._limit = 1 << 62
            self._changed.notify_all()

    def release(self, size: int) -> None:
        """The next row's turn; the one before is on its way to the actors."""
        with self._changed:
            self._bytes -= size
            self._turn += 1
            self._changed.notify_all()


@dataclass
class _Prepared:
    row: int
    uri: str
    pixels: np.ndarray | None = None
    error: RowError | None = None
    bytes: int = 0
    fetch_s: float = 0.0
    decode_s: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of its pixels."""
        return 0 if self.pixels is None else self.pixels.nbytes


class _Block:
    """Rows on their way into one table."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.items: list[_Prepared] = []
        self._size = 0

    def add(self, item: _Prepared) -> None:
        self.items.append(item)
        self._size += item.size

    @property
    def full(self) -> bool:
        # Where nothing works the driver must hear of it soon, and not after a shard of time-outs.
        rows = _BLOCK_ROWS if self._size else _FAILED_ROWS
        return self._size >= BLOCK_BYTES or len(self.items) >= rows

    def table(self) -> pa.Table:
        items = self.items
        errors = [i.error for i in items]
        columns = [
            [self.shard] * len(items),
            [i.row for i in items],
            [i.uri for i in items],
            [None if i.pixels is None else i.pixels.tobytes() for i in items],
            [0 if i.pixels is None else i.pixels.shape[0] for i in items],
            [0 if i.pixels is None else i.pixels.shape[1] for i in items],
            [e and e.stage for e in errors],
            [e and e.error_type for e in errors],
            [e and e.message for e in errors],
            [bool(e and e.retryable) for e in errors],
            [i.bytes for i in items],
            [i.fetch_s for i in items],
            [i.decode_s for i in items],
        ]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, PREPARED_SCHEMA, strict=True)]
        return pa.Table.from_arrays(arrays, schema=PREPARED_SCHEMA)
