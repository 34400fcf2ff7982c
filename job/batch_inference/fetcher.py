"""Inputs by URI: whole objects and ranges of large ones, tried again where that may help, read ahead of their use."""

from __future__ import annotations

import errno
import functools
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import obstore

from batch_inference.causes import Failure
from batch_inference.config import StorageConfig
from batch_inference.errors import RowError, RowFailure, UserError
from batch_inference.names import unescaped
from batch_inference.storage import (
    answered,
    canonical_uri,
    classify,
    is_local,
    odd_key,
    open_bucket,
    split_bucket,
)
from batch_inference.throttle import Throttle, backoff_s
from batch_inference.versions import changed, replaced, version_of

# Encoded bytes that one task holds ahead of the decoder, beside the one that it waits for.
_AHEAD_BYTES = 64 * 1024 * 1024
# A process that has a single request under way hardly burdens a store; it should not sleep long after that is well again.
_SLOW_DOWN_S = 5.0
# Of a file whose size is not known.
_PIECE_BYTES = 1024 * 1024
_OUT_OF_RANGE = "416 range not satisfiable"

Buffer: TypeAlias = bytes | memoryview
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A range of an object.

    Attributes:
        data: Its bytes; fewer than asked for where the object ends before.
        size: Bytes of the whole object; -1 where the store did not say, because the range begins behind the end.
        etag: The store's word for this version of the object; of local files, time of change and size.
    """

    data: Buffer
    size: int
    etag: str


class Fetcher:
    """Reads by URI, from any number of buckets; safe to use from several threads.

    Failed requests are sent again with full jitter: in transit or with 5xx up to ``storage.max_retries`` times, and those
    that the store asked to slow down as long as ``storage.retry_timeout_s`` allows, since they are no failures. The client
    library's own retries are off: they would hide a store that asks to slow down.
    """

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage
        self._buckets: dict[str, tuple[Any, Throttle]] = {}
        self._lock = threading.Lock()
        self._retries = 0

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of_process(storage: StorageConfig) -> Fetcher:
        """The one that all tasks of a process share: connections, credentials and what the store can take outlast a shard."""
        return Fetcher(storage)

    def fetch(self, uri: str, max_bytes: int, version: int | None = None) -> bytes:
        """The content of an object.

        Args:
            uri: Of the object.
            max_bytes: A larger one is not read.
            version: The one of an object that is meant, None for whatever is there.

        Raises:
            RowFailure: Stage ``fetch``: NOT_FOUND, ACCESS_DENIED, UNAUTHENTICATED, INVALID_URI, TOO_LARGE, TIMEOUT,
                THROTTLED, STORE_UNREACHABLE, CHANGED.
        """
        with _Failures():
            canonical = canonical_uri(uri)
            if is_local(canonical):
                return _read_file(canonical, max_bytes)

            def get(bucket: Any, key: str) -> bytes:
                result = obstore.get(bucket, key)
                meta = result.meta  # made anew each time
                if version is not None and replaced(version, version_of(meta["e_tag"])):
                    raise changed(uri)
                check_size(int(meta["size"]), max_bytes)
                return bytes(result.bytes())

            return self._request(canonical, get)

    def fetch_range(self, uri: str, start: int, end: int) -> Piece:
        """The bytes from ``start`` to before ``end``; a negative ``start`` counts from the object's end.

        Raises:
            RowFailure: As :meth:`fetch`, except TOO_LARGE.
        """
        with _Failures():
            if is_local(uri):
                return _read_range(uri, start, end)
            where: Any = {"suffix": -start} if start < 0 else (start, end)

            def get(bucket: Any, key: str) -> Piece:
                try:
                    result = obstore.get(bucket, key, options={"range": where})
                    data = memoryview(result.bytes())
                except Exception as exc:
                    if _OUT_OF_RANGE in str(exc).lower():
                        return Piece(b"", -1, "")
                    raise
                return Piece(data, int(result.meta["size"]), str(result.meta["e_tag"] or ""))

            return self._request(uri, get)

    def take_retries(self) -> int:
        """Requests that were sent again since this was last asked."""
        with self._lock:
            count, self._retries = self._retries, 0
        return count

    def _request(self, uri: str, get: Callable[[Any, str], T]) -> T:
        root, key = split_bucket(uri)
        if why := odd_key(key):
            raise RowFailure("fetch", "INVALID_URI", why)
        try:
            bucket, throttle = self._bucket(root)
        except UserError as exc:
            raise RowFailure("fetch", "UNAUTHENTICATED", exc.message) from exc
        with throttle:
            begun = time.monotonic()
            tries = 0
            while True:
                sent = time.monotonic()
                try:
                    result = get(bucket, key)
                except RowFailure:
                    throttle.succeeded()
                    raise
                except Exception as exc:
                    tries += 1
                    failure = classify(exc, root, self._storage)
                    slow_down = failure.error_type == "THROTTLED"
                    if slow_down:
                        throttle.refused(sent)
                    elif not failure.retryable:
                        throttle.succeeded()
                    waited = max(time.monotonic() - begun, throttle.silent_s())
                    spent = waited > self._storage.retry_timeout_s or (
                        not slow_down and tries > self._storage.max_retries
                    )
                    if not failure.retryable or spent or (slow_down and not self._storage.max_retries):
                        raise _row_failure(failure) from exc
                else:
                    throttle.succeeded()
                    answered(root)
                    return result
                with self._lock:
                    self._retries += 1
                time.sleep(backoff_s(tries, most_s=_SLOW_DOWN_S if slow_down else 10.0))

    def _bucket(self, root: str) -> tuple[Any, Throttle]:
        with self._lock:
            if root not in self._buckets:
                store = open_bucket(root, self._storage.model_copy(update={"max_retries": 0}))
                self._buckets[root] = store, Throttle(self._storage.fetch_concurrency)
            return self._buckets[root]


class _Failures:
    """Turns whatever reading raises into the failure of a row."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if exc is None or isinstance(exc, RowFailure) or not isinstance(exc, Exception):
            return
        if isinstance(exc, UserError):
            raise RowFailure("fetch", "INVALID_URI", exc.message) from exc
        raise _row_failure(classify(exc)) from exc


def _row_failure(failure: Failure) -> RowFailure:
    return RowFailure("fetch", failure.error_type, failure.message, failure.retryable)


def check_size(size: int, max_bytes: int) -> None:
    """Raises RowFailure, TOO_LARGE, for more bytes than are allowed."""
    if size > max_bytes:
        raise RowFailure(
            "fetch", "TOO_LARGE", f"the file has {size:,} bytes, more than preprocess.max_bytes = {max_bytes:,}"
        )


_ESCAPES = r"in a local name \xHH stands for the byte with that number, and \x5c for a backslash"


def _open_file(uri: str) -> tuple[int, os.stat_result]:
    """Open a local file; raise RowFailure for what is none, before it can wait for anything.

    Returns:
        A file descriptor, and what there is to know of the file.
    """
    try:
        # In bytes, whatever encoding the process thinks names have. A FIFO opens at once and is then refused.
        file = os.open(unescaped(uri[len("file://") :]), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if "\\x" in uri:
            raise RowFailure("fetch", "NOT_FOUND", f"there is no such file; {_ESCAPES}") from None
        raise
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            raise _no_file("a socket") from None
        raise
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise _no_file(special(status.st_mode))
    return file, status


def special(mode: int) -> str:
    """Return what a file that is not a regular one is, from its ``st_mode``."""
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "something else"


def _no_file(what: str) -> RowFailure:
    return RowFailure("fetch", "INVALID_URI", f"this is {what}, not a regular file")


def _read_file(uri: str, max_bytes: int) -> bytes:
    file, status = _open_file(uri)
    try:
        check_size(status.st_size, max_bytes)
        if status.st_size:
            return _read_exactly(file, status.st_size)
        # Files of /proc and /sys have no size before they are read.
        data = bytearray()
        while len(data) <= max_bytes and (more := os.read(file, _PIECE_BYTES)):
            data += more
    finally:
        os.close(file)
    if len(data) > max_bytes:
        raise RowFailure("fetch", "TOO_LARGE", f"the file has more bytes than preprocess.max_bytes = {max_bytes:,}")
    return bytes(data)


def _read_range(uri: str, start: int, end: int) -> Piece:
    file, status = _open_file(uri)
    try:
        if start < 0:
            start, end = max(0, status.st_size + start), status.st_size
        os.lseek(file, start, os.SEEK_SET)
        data = _read_exactly(file, max(0, min(end, status.st_size) - start))
    finally:
        os.close(file)
    return Piece(data, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


def _read_exactly(file: int, size: int) -> bytes:
    data = os.read(file, size)
    # A read gives at most 2 GiB, and from network disks at times less than there is.
    while len(data) < size and (more := os.read(file, size - len(data))):
        data += more
    return data


@dataclass(frozen=True)
class Request:
    """Something to fetch.

    Attributes:
        read: Fetches it, in a thread of its own; may raise RowFailure.
        size: Bytes it will have, None if that is not known.
    """

    read: Callable[[], Buffer]
    size: int | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        data: Its bytes; empty where it failed.
        error: Why it failed, or None.
        seconds: How long it took.
    """

    data: Buffer
    error: RowError | None
    seconds: float


class ReadAhead:
    """Sends requests in their order ahead of who takes the answers, several at a time, within a number of bytes.

    Args:
        requests: What to fetch; drawn from only as far as the read-ahead reaches.
        concurrency: Requests under way at the same time; twice as many are asked or answered ahead.
        max_bytes: Bytes asked for or answered ahead, beside the request whose answer is taken next.
    """

    def __init__(self, requests: Iterator[Request], concurrency: int, max_bytes: int = _AHEAD_BYTES) -> None:
        self._requests = requests
        self._concurrency = concurrency
        self._max_bytes = max_bytes
        self._tasks: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        self._early: dict[int, Answer] = {}
        self._expected: dict[int, int] = {}
        self._ahead = 0
        self._asked = self._taken = 0
        self._mean = 0.0
        self._threads = 0
        self._closed = False

    def take(self) -> Answer:
        """The answer to the next request; raises IndexError when there are no more."""
        self.ask()
        if self._taken == self._asked:
            raise IndexError("every answer was taken")
        while self._taken not in self._early:
            number, answer = self._answers.get()
            self._early[number] = answer
        answer = self._early.pop(self._taken)
        self._ahead -= self._expected.pop(self._taken)
        self._taken += 1
        self._mean += (len(answer.data) - self._mean) / min(self._taken, 32)
        return answer

    def close(self) -> None:
        """Sends no more; what is under way is not waited for."""
        self._closed = True
        for _ in range(self._threads):
            self._tasks.put(None)

    def ask(self) -> None:
        """Sends as many requests as the read-ahead allows."""
        while (ahead := self._asked - self._taken) < 2 * self._concurrency and (
            ahead == 0 or self._ahead < self._max_bytes
        ):
            request = next(self._requests, None)
            if request is None:
                return
            # Sizes that are not known are taken to be like those before.
            size = int(self._mean) if request.size is None else request.size
            self._expected[self._asked] = size
            self._ahead += size
            self._tasks.put((self._asked, request))
            self._asked += 1
            if self._threads < self._concurrency:
                self._threads += 1
                threading.Thread(target=self._work, name=f"fetch-{self._threads}", daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            number, request = task
            start = time.perf_counter()
            data: Buffer = b""
            error: RowError | None = None
            try:
                data = request.read()
            except RowFailure as exc:
                error = exc.error
            except Exception as exc:  # a bug here must cost one row, not a job
                error = RowFailure("fetch", "UNEXPECTED", f"{type(exc).__name__}: {exc}").error
            self._answers.put((number, Answer(data, error, time.perf_counter() - start)))
