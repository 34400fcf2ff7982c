"""When a contender reads its images, seen from outside with Linux's inotify: no contender has to help, and none is slowed down."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
import time
from pathlib import Path
from typing import Any

_IN_OPEN = 0x20
_EVENT = struct.Struct("iIII")


class Reads:
    """Notes the last time that each file of a folder was opened; a context manager.

    The last and not the first, so that a look at a few files beforehand does not count as the beginning of the work.

    Args:
        folder: Watched without its sub-folders.
    """

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._handle < 0 or libc.inotify_add_watch(self._handle, os.fsencode(folder), _IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), f"inotify cannot watch {folder}")
        self._opened: dict[bytes, float] = {}
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._follow, name="reads", daemon=True)

    def __enter__(self) -> Reads:
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._handle)
        os.close(self._stop)

    @property
    def first(self) -> float | None:
        """When the first file was opened, by the monotonic clock; None if none was. To be asked afterwards."""
        return min(self._opened.values(), default=None)

    def _follow(self) -> None:
        while True:
            ready, _, _ = select.select([self._handle, self._stop], [], [])
            if self._handle in ready:
                self._take(os.read(self._handle, 1 << 16), time.monotonic())
            elif self._stop in ready:
                return

    def _take(self, data: bytes, moment: float) -> None:
        place = 0
        while place < len(data):
            _, _, _, length = _EVENT.unpack_from(data, place)
            name = data[place + _EVENT.size : place + _EVENT.size + length].rstrip(b"\0")
            place += _EVENT.size + length
            if name:
                self._opened[name] = moment
