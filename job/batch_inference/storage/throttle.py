"""Limit the requests that a process has under way at a store; halve the limit when the store asks to slow down."""

from __future__ import annotations

import random
import threading
import time


class Throttle:
    """Additive increase, multiplicative decrease, as in TCP and in AWS's adaptive clients.

    Each process adapts by itself. That is enough, because a store under load answers all of them with 503 or 429.

    Args:
        maximum: Maximum number of requests under way; also the limit at the start.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._limit = float(maximum)
        self._active = 0
        self._lowered_at = 0.0
        self._succeeded_at = 0.0
        self._changed = threading.Condition(threading.Lock())

    @property
    def limit(self) -> int:
        """Number of requests that may be under way now."""
        return int(self._limit)

    def __enter__(self) -> Throttle:
        """Wait until another request may start; one that waits for its next try still counts, to lower the rate."""
        with self._changed:
            while self._active >= int(self._limit):
                self._changed.wait()
            if self._active == 0:
                self._succeeded_at = time.monotonic()
            self._active += 1
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._active -= 1
            self._changed.notify()

    def succeeded(self) -> None:
        """Note that a request was answered; raise the limit by one for every round of answers."""
        self._succeeded_at = time.monotonic()
        if self._limit < self._maximum:
            with self._changed:
                self._limit = min(float(self._maximum), self._limit + 1 / self._limit)
                self._changed.notify()

    def refused(self, sent: float) -> None:
        """Note that the store asked to slow down; halve the limit once for all requests that were under way together.

        Args:
            sent: Time at which the request was sent, by ``time.monotonic()``.
        """
        with self._changed:
            if sent >= self._lowered_at:
                self._limit = max(1.0, self._limit / 2)
                self._lowered_at = time.monotonic()

    def seconds_since_success(self) -> float:
        """Return the seconds since the last success, or since requests began."""
        return time.monotonic() - self._succeeded_at


def backoff_s(tries: int, first_s: float = 0.2, max_s: float = 10.0) -> float:
    """Return a random wait: exponential backoff with full jitter, which spreads clients that failed together.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Args:
        tries: Number of tries so far, from 1.
        first_s: Longest wait after the first try.
        max_s: Longest wait after any try.
    """
    return random.uniform(0, min(max_s, first_s * 2.0 ** min(tries - 1, 30)))  # noqa: S311 - no secret
