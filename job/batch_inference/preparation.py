"""Fetch, decode and preprocess: what a CPU task does with a shard.

Nothing here raises for the sake of an image: what fails becomes a value that travels with its row.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batch_inference.config import PreprocessConfig, StorageConfig
from batch_inference.errors import SYSTEMIC_ERROR_TYPES, RowError, RowFailure
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
# After so many systemic failures in a row and no success, a task stops asking the store for the rest of its shard.
GIVE_UP_AFTER = 64


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
        # Threads wait for the store; no more than the task's CPUs decode at the same time.
        slots = threading.Semaphore(max(1, int(self.preprocess.cpus_per_task)))
        threads = self.storage.fetch_concurrency
        streak = _Streak()
        with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
            waiting: deque[Future[_Prepared]] = deque()
            block = _Block(shard)
            for row, uri in enumerate(uris):
                waiting.append(pool.submit(self._one, row, uri, fetcher, slots, streak))
                if len(waiting) >= 2 * threads:
                    block.add(waiting.popleft().result())
                    if block.full:
                        yield block.table()
                        block = _Block(shard)
            while waiting:
                block.add(waiting.popleft().result())
                if block.full:
                    yield block.table()
                    block = _Block(shard)
            if block.items:
                yield block.table()

    def _one(self, row: int, uri: str, fetcher: Fetcher, slots: threading.Semaphore, streak: _Streak) -> _Prepared:
        out = _Prepared(row, uri)
        start = time.perf_counter()
        try:
            if streak.hopeless is not None:
                out.error = streak.hopeless
                return out
            try:
                canonical_uri(uri)
                if not uri:
                    raise RowFailure("list", "INVALID_URI", "the manifest has no URI in this line")
            except RowFailure:
                raise
            except Exception as exc:
                raise RowFailure("list", "INVALID_URI", str(exc)) from exc
            data = fetcher.fetch(uri, self.preprocess.max_bytes)
            streak.success()
            out.bytes = len(data)
            fetched = time.perf_counter()
            out.fetch_s = fetched - start
            with slots:
                start = time.perf_counter()
                out.pixels = self._pixels(data)
                out.decode_s = time.perf_counter() - start
        except RowFailure as exc:
            out.error = exc.error
            streak.failure(exc.error)
        except Exception as exc:  # a bug here must cost one row, not a job
            out.error = RowFailure("preprocess", "UNEXPECTED", f"{type(exc).__name__}: {exc}").error
        return out

    def _pixels(self, data: bytes) -> np.ndarray:
        image = open_image(data, self.preprocess)
        if self.transform is None:
            return np.asarray(image)
        try:
            return self.transform.pixels(image)
        except Exception as exc:
            raise RowFailure("preprocess", type(exc).__name__.upper(), str(exc)) from exc


class _Streak:
    """Remembers whether everything so far failed for the same reason of the system's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._alive = False
        self.hopeless: RowError | None = None

    def success(self) -> None:
        self._alive = True

    def failure(self, error: RowError) -> None:
        if self._alive or error.error_type not in SYSTEMIC_ERROR_TYPES:
            self._alive = True
            return
        with self._lock:
            self._count += 1
            if self._count >= GIVE_UP_AFTER:
                self.hopeless = error


@dataclass
class _Prepared:
    row: int
    uri: str
    pixels: np.ndarray | None = None
    error: RowError | None = None
    bytes: int = 0
    fetch_s: float = 0.0
    decode_s: float = 0.0


class _Block:
    """Rows on their way into one table."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.items: list[_Prepared] = []
        self._size = 0

    def add(self, item: _Prepared) -> None:
        self.items.append(item)
        self._size += item.pixels.nbytes if item.pixels is not None else 0

    @property
    def full(self) -> bool:
        return self._size >= BLOCK_BYTES or len(self.items) >= _BLOCK_ROWS

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
