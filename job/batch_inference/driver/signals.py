"""Turn SIGTERM and SIGINT into an interruption of the job that leaves it resumable."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from batch_inference.driver.supervision import is_supervised
from batch_inference.errors import JobInterruptedError

# A signal to the whole process group arrives twice: the parent passes it on, too (:mod:`.supervision`). The second one would
# interrupt what the first one has started.
_SAME_SIGNAL_S = 2.0
_stopped_at: dict[int, float] = {}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`JobInterruptedError` in the main thread; change nothing in others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    received: list[str] = []

    def stop(number: int, frame: Any) -> None:
        moment = time.monotonic()
        repeated, _stopped_at[number] = moment - _stopped_at.get(number, -math.inf) < _SAME_SIGNAL_S, moment
        if repeated and is_supervised():
            return
        received.append(signal.Signals(number).name)
        # Ray's native code lets only this exception through while it waits; any other becomes a SystemError.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (KeyboardInterrupt, SystemExit, Exception) as exc:
        # What was interrupted may raise an error of its own, as Ray does while it starts; the reason is the signal. And a Ray that
        # has just started here handles SIGTERM by SystemExit(1) until its handler is replaced.
        if isinstance(exc, JobInterruptedError) or not (received or isinstance(exc, (KeyboardInterrupt, SystemExit))):
            raise
        default = "SIGTERM" if isinstance(exc, SystemExit) else "SIGINT"
        raise JobInterruptedError(
            f"stopped by {received[0] if received else default}",
            "Run the same command again: it resumes with the shards that are left.",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
