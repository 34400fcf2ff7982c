"""Wait for other threads and processes without a limit in seconds of each test's own.

A wait that never ends is a hang, and the timeout of pytest (`tests/support/limits.py`) ends it: how fast the machine is decides no result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tests.support.limits import HANG_S


def wait_until(condition: Callable[[], bool], every_s: float = 0.01) -> None:
    """Return as soon as the condition holds."""
    while not condition():
        time.sleep(every_s)


class Crowd:
    """Count the threads that are inside at once; a context manager.

    The first threads stay until as many are inside as the test expects, so that it sees them all even where threads start slowly.
    A moment later they leave: one thread too many would have come in by then.

    Args:
        expected: Number of threads that have to be inside at once.
    """

    def __init__(self, expected: int) -> None:
        self.most = 0
        """The largest number of threads that were inside at once."""
        self._expected = expected
        self._inside = 0
        self._lock = threading.Lock()
        self._complete = threading.Event()

    def __enter__(self) -> Crowd:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
            if self._inside >= self._expected:
                self._complete.set()
        self._complete.wait(HANG_S)
        time.sleep(0.005)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
