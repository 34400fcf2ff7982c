"""Fetch the next objects while the current ones are decoded."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batch_inference.errors import RowError, RowFailure
from batch_inference.storage.fetcher import Buffer

# Encoded bytes that one task holds ahead of the decoder, in addition to the object that it waits for.
_AHEAD_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """A request for an object or a range.

    Attributes:
        read: Function that fetches it, called in a thread; may raise RowError.
        size: Number of bytes that it will return; None if it is not known.
    """

    read: Callable[[], Buffer]
    size: int | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        data: Its bytes; empty if the request failed.
        error: The failure, or None.
        seconds: Duration of the request.
    """

    data: Buffer
    error: RowFailure | None
    seconds: float

    def __reduce__(self) -> tuple[Any, ...]:
        # Not every buffer can be pickled.
        return Answer, (bytes(self.data), self.error, self.seconds)


class ReadAhead:
    """Sends requests in order, ahead of the caller that takes the answers: several at a time, up to a number of bytes.

    Args:
        requests: Requests to send; the iterator advances only as far as the read-ahead reaches.
        concurrency: Requests under way at the same time; twice as many are sent or answered ahead.
        max_bytes: Bytes requested or answered ahead, in addition to the request whose answer is taken next.
    """

    def __init__(self, requests: Iterator[Request], concurrency: int, max_bytes: int = _AHEAD_BYTES) -> None:
        self._requests = requests
        self._concurrency = concurrency
        self._max_bytes = max_bytes
        self._tasks: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        self._early: dict[int, Answer] = {}
        self._expected_bytes: dict[int, int] = {}
        self._ahead_bytes = 0
        self._sent = self._taken = 0
        self._mean_bytes = 0.0
        self._threads = 0
        self._closed = False

    def next_answer(self) -> Answer:
        """Return the answer to the next request; raise IndexError if there are no more."""
        self.send()
        if self._taken == self._sent:
            raise IndexError("every answer was taken")
        while self._taken not in self._early:
            number, answer = self._answers.get()
            self._early[number] = answer
        answer = self._early.pop(self._taken)
        self._ahead_bytes -= self._expected_bytes.pop(self._taken)
        self._taken += 1
        self._mean_bytes += (len(answer.data) - self._mean_bytes) / min(self._taken, 32)
        return answer

    def close(self) -> None:
        """Stop sending; do not wait for requests under way."""
        self._closed = True
        for _ in range(self._threads):
            self._tasks.put(None)

    def send(self) -> None:
        """Send as many requests as the read-ahead allows."""
        while (ahead := self._sent - self._taken) < 2 * self._concurrency and (
            ahead == 0 or self._ahead_bytes < self._max_bytes
        ):
            request = next(self._requests, None)
            if request is None:
                return
            # An unknown size is estimated from the answers so far.
            size = int(self._mean_bytes) if request.size is None else request.size
            self._expected_bytes[self._sent] = size
            self._ahead_bytes += size
            self._tasks.put((self._sent, request))
            self._sent += 1
            if self._threads < self._concurrency:
                self._threads += 1
                threading.Thread(target=self._work, name=f"fetch-{self._threads}", daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closed:
            number, request = task
            start = time.perf_counter()
            data: Buffer = b""
            error: RowFailure | None = None
            try:
                data = request.read()
            except RowError as exc:
                error = exc.error
            except Exception as exc:  # a bug must cost one row, not the job
                error = RowError("fetch", "UNEXPECTED", f"{type(exc).__name__}: {exc}").error
            self._answers.put((number, Answer(data, error, time.perf_counter() - start)))
