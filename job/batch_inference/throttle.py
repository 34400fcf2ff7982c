"""How many requests a process has under way at a store: fewer when it asks to slow down, then step by step more."""

from __future__ import annotations

import random
import threading
import time


class Throttle:
    """Additive increase, multiplicative decrease: how TCP, and after it AWS's adaptive clients, share what they can't see.

    Each process adapts by itself. That is enough, since a store under load answers all of them with 503 or 429.

    Args:
        most: Requests under way at the most, and at the start.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._active = 0
        self._lowered = 0.0
        self._well = 0.0
        self._changed = threading.Condition(threading.Lock())

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return int(self._limit)

    def __enter__(self) -> Throttle:
        """Waits for a place. One that waits between two tries keeps its place: that is what brings the rate down."""
        with self._changed:
            while self._active >= int(self._limit):
                self._changed.wait()
            if self._active == 0:
                self._well = time.monotonic()
            self._active += 1
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._active -= 1
            self._changed.notify()

    def succeeded(self) -> None:
        """A request was answered: a place more for every round of them."""
        self._well = time.monotonic()
        if self._limit < self._most:
            with self._changed:
                self._limit = min(float(self._most), self._limit + 1 / self._limit)
                self._changed.notify()

    def refused(self, sent: float) -> None:
        """The store asked to slow down: half as many places, once for all requests that were under way together.

        Args:
            sent: When the request was sent, by ``time.monotonic()``.
        """
        with self._changed:
            if sent >= self._lowered:
                self._limit = max(1.0, self._limit / 2)
                self._lowered = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since the last success, or since requests began."""
        return time.monotonic() - self._well


def backoff_s(tries: int, first_s: float = 0.2, most_s: float = 10.0) -> float:
    """Exponential backoff with full jitter, which spreads clients that failed together over the whole interval.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Args:
        tries: Tries so far, from 1.
        first_s: Longest wait after the first.
        most_s: Longest wait after any.
    """
    return random.uniform(0, min(most_s, first_s * 2.0 ** min(tries - 1, 30)))  # noqa: S311 - no secret
