"""A store whose operations fail or crash when a test says so."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from batch_inference.config import StorageConfig
from batch_inference.storage.store import ObjectInfo, Store

# --- crashes and races ---------------------------------------------------------------------------------------------------


class Crash(Exception):  # noqa: N818
    """The driver's process has crashed."""


class Faulty(Store):
    """A store whose k-th operation from now triggers an event for the one driver that uses it.

    ``crash``: nothing of this driver's reaches the store any more. ``lost answer``: a create works, but the request is
    sent again and the second one is what the driver hears of, as with S3 behind a proxy that times out. A callable: is
    called, and may do anything to the same folder in the meantime.

    ``stale``: which third of all objects (with ``lags`` in their names) its listings do not show, None to show everything.
    """

    def __init__(self, uri: str, storage: StorageConfig, lags: str = "") -> None:
        super().__init__(uri, storage)
        self._lags = lags
        self._lock = threading.RLock()
        self._left = 0
        self._event: Any = None
        self.dead = False
        self.fired = False
        self.stale: int | None = None

    def arm(self, operations: int, event: Any) -> None:
        self._left, self._event, self.fired = operations, event, False

    def _tick(self) -> bool:
        """Count the operation; return whether its answer gets lost."""
        with self._lock:
            if self.dead:
                raise Crash
            self._left -= 1
            if self._left != 0 or self._event is None:
                return False
            self.fired = True
            if self._event == "crash":
                self.dead = True
                raise Crash
            if self._event == "lost answer":
                return True
            self._event()
            return False

    def get(self, path: str) -> bytes:
        self._tick()
        return super().get(path)

    def put(self, path: str, data: bytes) -> None:
        self._tick()
        super().put(path, data)

    def create(self, path: str, data: bytes) -> bool:
        if self._tick():
            super().create(path, data)
        return super().create(path, data)

    def objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._tick()
        for info in super().objects(prefix):
            if self._lags not in info.path or zlib.crc32(info.path.encode()) % 3 != self.stale:
                yield info

    def size(self, path: str) -> int | None:
        self._tick()
        return super().size(path)

    def delete(self, paths: list[str]) -> None:
        for path in paths:
            self._tick()
            super().delete([path])


stale = st.one_of(st.none(), st.integers(0, 2))
