"""What a job's start does at the same time: Ray's processes come up while the model is looked at."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# An interrupted program waits so long for what goes on in the background: an import that is cut off in the middle can
# abort the interpreter at its end, but a download must not hold it.
_LEAVE_S = 5.0


class Background(Generic[T]):
    """A call that has begun in a thread of its own; a context manager, at whose end it is waited for a little.

    >>> with Background(lambda: 6 * 7) as answer:
    ...     answer.result()
    42
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)
        self._thread.start()

    def __enter__(self) -> Background[T]:
        return self

    def __exit__(self, *args: object) -> None:
        self._thread.join(_LEAVE_S)

    def _run(self) -> None:
        try:
            self._value.append(self._call())
        except BaseException as exc:
            self._error = exc

    def result(self) -> T:
        """What the call returned, as soon as it has; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]


def starts_ray(address: str | None) -> bool:
    """Whether a job at ``address`` starts a Ray of its own, rather than joining one or using this process's."""
    if address not in (None, "local"):
        return False
    ray = sys.modules.get("ray")
    return ray is None or not ray.is_initialized()
