"""Read inputs by URI, whole or in ranges; requests that may succeed the next time are sent again."""

from __future__ import annotations

import errno
import functools
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import obstore

from batch_inference.config import StorageConfig
from batch_inference.errors import RowError, UserError
from batch_inference.storage.etags import hash_etag, is_replaced, replaced_error
from batch_inference.storage.failures import StoreError, classify, mark_reachable
from batch_inference.storage.names import unescape_name
from batch_inference.storage.store import key_problem, open_bucket
from batch_inference.storage.throttle import Throttle, backoff_s
from batch_inference.storage.uris import canonical_uri, is_local, split_bucket

# A process with a single request under way hardly burdens a store; it must not sleep long after the store has
# recovered.
_MAX_SLOW_DOWN_S = 5.0
_MAX_BACKOFF_S = 10.0
# Read at a time from a file whose size is not known.
_READ_BYTES = 1024 * 1024
_OUT_OF_RANGE = "416 range not satisfiable"
_ESCAPES = r"in a local name \xHH stands for the byte with that number, and \x5c for a backslash"

Buffer: TypeAlias = bytes | memoryview
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A range of an object.

    Attributes:
        data: Bytes of the range; fewer than asked for if the object ends before.
        size: Size of the whole object in bytes; -1 if the range begins after its end, because the store then does not
            say.
        etag: ETag of the object; for local files, modification time and size.
    """

    data: Buffer
    size: int
    etag: str


class Fetcher:
    """Reads inputs by URI, from any number of buckets; safe to use from several threads.

    Failed requests are sent again with full jitter. Connection errors and 5xx are retried up to ``storage.max_retries``
    times. Requests that the store asked to slow down are no failures; they are retried as long as
    ``storage.retry_timeout_s`` allows. The client library's own retries are off, because they would hide a store that
    asks to slow down.

    Args:
        storage: Settings of the stores.
    """

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage
        self._buckets: dict[str, tuple[Any, Throttle]] = {}
        self._lock = threading.Lock()
        self._retries = 0

    @staticmethod
    @functools.lru_cache(maxsize=8)
    def of_process(storage: StorageConfig) -> Fetcher:
        """Return the fetcher that all tasks of a process share, so that connections and limits outlast a shard."""
        return Fetcher(storage)

    def fetch(self, uri: str, max_bytes: int, etag: int | None = None) -> bytes:
        """Return the content of an object.

        Args:
            uri: URI of the object.
            max_bytes: Limit of its size; a larger object is not read.
            etag: Hash of the ETag that it was planned with; None to accept any.

        Raises:
            RowError: Stage ``fetch``: NOT_FOUND, ACCESS_DENIED, UNAUTHENTICATED, INVALID_URI, TOO_LARGE, TIMEOUT,
                THROTTLED, STORE_UNREACHABLE, CHANGED.
        """
        with _RowErrors():
            canonical = canonical_uri(uri)
            if is_local(canonical):
                return _read_file(canonical, max_bytes)

            def get(bucket: Any, key: str) -> bytes:
                result = obstore.get(bucket, key)
                meta = result.meta  # a new dict at each access
                if etag is not None and is_replaced(etag, hash_etag(meta["e_tag"])):
                    raise replaced_error(uri)
                size = int(meta["size"])
                check_size(size, max_bytes)
                data = bytes(result.bytes())
                _check_length(data, size)
                return data

            return self._request(canonical, get)

    def fetch_range(self, uri: str, start: int, end: int) -> Piece:
        """Return the bytes from ``start`` to before ``end``; a negative ``start`` counts from the object's end.

        Raises:
            RowError: As :meth:`fetch`, except TOO_LARGE.
        """
        with _RowErrors():
            if is_local(uri):
                return _read_range(uri, start, end)
            requested: Any = {"suffix": -start} if start < 0 else (start, end)

            def get(bucket: Any, key: str) -> Piece:
                try:
                    result = obstore.get(bucket, key, options={"range": requested})
                    data = memoryview(result.bytes())
                except Exception as exc:
                    if _OUT_OF_RANGE in str(exc).lower():
                        return Piece(b"", -1, "")
                    raise
                first, behind = result.range
                _check_length(data, behind - first)
                return Piece(data, int(result.meta["size"]), str(result.meta["e_tag"] or ""))

            return self._request(uri, get)

    def collect_retries(self) -> int:
        """Return the number of requests that were sent again since the last call."""
        with self._lock:
            count, self._retries = self._retries, 0
        return count

    def _request(self, uri: str, get: Callable[[Any, str], T]) -> T:
        root, key = split_bucket(uri)
        if problem := key_problem(key):
            raise RowError("fetch", "INVALID_URI", problem)
        try:
            bucket, throttle = self._bucket(root)
        except UserError as exc:
            raise RowError("fetch", "UNAUTHENTICATED", exc.message) from exc
        with throttle:
            started = time.monotonic()
            tries = 0
            while True:
                sent = time.monotonic()
                try:
                    result = get(bucket, key)
                except RowError:
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
                    waited_s = max(time.monotonic() - started, throttle.seconds_since_success())
                    exhausted = waited_s > self._storage.retry_timeout_s or (
                        not slow_down and tries > self._storage.max_retries
                    )
                    if not failure.retryable or exhausted or (slow_down and not self._storage.max_retries):
                        raise _row_error(failure) from exc
                else:
                    throttle.succeeded()
                    mark_reachable(root)
                    return result
                with self._lock:
                    self._retries += 1
                time.sleep(backoff_s(tries, max_s=_MAX_SLOW_DOWN_S if slow_down else _MAX_BACKOFF_S))

    def _bucket(self, root: str) -> tuple[Any, Throttle]:
        with self._lock:
            if root not in self._buckets:
                store = open_bucket(root, self._storage.model_copy(update={"max_retries": 0}))
                self._buckets[root] = store, Throttle(self._storage.fetch_concurrency)
            return self._buckets[root]


class _RowErrors:
    """Turns any exception of reading into a RowError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if exc is None or isinstance(exc, RowError) or not isinstance(exc, Exception):
            return
        if isinstance(exc, UserError):
            raise RowError("fetch", "INVALID_URI", exc.message) from exc
        raise _row_error(classify(exc)) from exc


def _row_error(failure: StoreError) -> RowError:
    return RowError("fetch", failure.error_type, failure.message, failure.retryable)


def _check_length(data: Buffer, announced: int) -> None:
    """Raise OSError, of which a request is sent again, if an answer has more or fewer bytes than its headers announce."""
    if len(data) != announced:
        raise OSError(f"the answer has {len(data):,} bytes, its headers announce {announced:,}")


def check_size(size: int, max_bytes: int) -> None:
    """Raise RowError, TOO_LARGE, if an object has more bytes than are allowed."""
    if size > max_bytes:
        raise RowError(
            "fetch", "TOO_LARGE", f"the file has {size:,} bytes, more than preprocess.max_bytes = {max_bytes:,}"
        )


def _open_file(uri: str) -> tuple[int, os.stat_result]:
    """Open a local file; raise RowError for a FIFO, a socket or a device, before a read from it can block.

    Returns:
        A file descriptor, and the file's status.
    """
    try:
        # As bytes, whatever encoding the process assumes for names. O_NONBLOCK opens a FIFO at once; it is refused
        # below.
        file = os.open(unescape_name(uri[len("file://") :]), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if "\\x" in uri:
            raise RowError("fetch", "NOT_FOUND", f"there is no such file; {_ESCAPES}") from None
        raise
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            raise _not_regular("a socket") from None
        raise
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise _not_regular(special_file_type(status.st_mode))
    return file, status


def special_file_type(mode: int) -> str:
    """Return in words the type of a file that is not a regular one, from its ``st_mode``."""
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "something else"


def _not_regular(file_type: str) -> RowError:
    return RowError("fetch", "INVALID_URI", f"this is {file_type}, not a regular file")


def _read_file(uri: str, max_bytes: int) -> bytes:
    file, status = _open_file(uri)
    try:
        check_size(status.st_size, max_bytes)
        if status.st_size:
            return _read_exactly(file, status.st_size)
        # Files in /proc and /sys have size 0 until they are read.
        data = bytearray()
        while len(data) <= max_bytes and (more := os.read(file, _READ_BYTES)):
            data += more
    finally:
        os.close(file)
    if len(data) > max_bytes:
        raise RowError("fetch", "TOO_LARGE", f"the file has more bytes than preprocess.max_bytes = {max_bytes:,}")
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
    # A read returns at most 2 GiB, and sometimes less from network disks.
    while len(data) < size and (more := os.read(file, size - len(data))):
        data += more
    return data
